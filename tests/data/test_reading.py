"""The schedule of a run's updates: counted right, and entered at any step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from newsbert_ray.config import PrepareSettings, TrainSettings, build_settings
from newsbert_ray.data import batches as ordering
from newsbert_ray.data.batches import Order
from newsbert_ray.data.prepare import prepare
from newsbert_ray.data.reading import (
    SplitData,
    TrainingSchedule,
    Update,
    World,
    make_schedule,
    read_updates,
    trained_texts,
    unlabelled_texts,
    worker_parts,
)
from newsbert_ray.data.shards import read_manifest, read_texts
from newsbert_ray.data.synthetic import synthesize
from tests.conftest import MakeSettings
from tests.data.conftest import titles


def schedule(shards: Path, limit: int | None = None, **order: int) -> TrainingSchedule:
    """Two epochs over the small corpus."""
    settings = TrainSettings(data=str(shards), teacher="scratch", out="run", epochs=2, steps=limit)
    return TrainingSchedule(settings, read_manifest(shards), Order(5, 32, **order))


def key(update: Update) -> tuple[int, int, list[list[list[int]]]]:
    """What must be equal."""
    return update.step, update.epoch, [part.buckets[0].input_ids.tolist() for part in update.parts]


@pytest.mark.parametrize("window_rows", [ordering.WINDOW_EXAMPLES, 100])
@pytest.mark.parametrize("done", [0, 1, 8, 9, 10, 17])
def test_entered_anywhere_it_goes_on_as_it_would_have(
    shards: Path, monkeypatch: pytest.MonkeyPatch, window_rows: int, done: int
) -> None:
    """A resume that skipped or repeated a batch would not be the same run."""
    monkeypatch.setattr(ordering, "WINDOW_EXAMPLES", window_rows)
    whole = [key(update) for update in read_updates(schedule(shards))]
    assert [step for step, _, _ in whole] == list(range(1, schedule(shards).total_steps + 1))
    assert [key(update) for update in read_updates(schedule(shards), done=done)] == whole[done:]


@pytest.mark.parametrize("window_rows", [ordering.WINDOW_EXAMPLES, 100])
@pytest.mark.parametrize("limit", [3, 8, 9, 13, 40])
def test_a_length_in_steps_cuts_the_last_epoch(
    shards: Path, monkeypatch: pytest.MonkeyPatch, window_rows: int, limit: int
) -> None:
    """A run of N updates has the first N of a longer one, wherever it is entered."""
    monkeypatch.setattr(ordering, "WINDOW_EXAMPLES", window_rows)
    longer = [key(update) for update in read_updates(schedule(shards, limit=50))]
    cut = schedule(shards, limit=limit)
    assert [key(update) for update in read_updates(cut)] == longer[:limit]
    assert [key(update) for update in read_updates(cut, done=2)] == longer[2:limit]
    assert cut.ends[-1] == cut.total_steps == limit
    assert cut.ends[:-1] == tuple(schedule(shards, limit=50).ends[: len(cut.ends) - 1])
    assert longer[: schedule(shards).total_steps] == [
        key(update) for update in read_updates(schedule(shards))
    ]


def test_a_run_of_many_short_epochs_is_not_evaluated_after_each(shards: Path) -> None:
    """A thousand titles are eight updates of 128: an evaluation after each would take all the time."""
    short = schedule(shards, limit=50)
    assert short.evaluations(20) == {20, 40, 50}
    assert short.evaluations(None) == set(short.ends)
    assert schedule(shards).evaluations(3) > set(schedule(shards).ends)


def with_unlabelled(
    make_settings: MakeSettings, size: int = 1, rank: int = 0, **values: Any
) -> TrainingSchedule:
    """A schedule of 100 labelled titles, a quarter of each batch."""
    settings = make_settings(**{"train_rows": 100, "unlabelled_share": 0.75, "workers": size, **values})
    return make_schedule(settings, read_manifest(settings.data), World(rank, size))


def texts_of(update: Update, *, labelled: bool) -> list[int]:
    """Rows of the update's texts with or without a label."""
    rows = []
    for part in update.parts:
        own = torch.cat([bucket.rows for bucket in part.buckets if bucket.rows is not None])
        rows += own[(part.target.labels >= 0) == labelled].tolist()
    return rows


@pytest.mark.parametrize("window_rows", [ordering.WINDOW_EXAMPLES, 40])
def test_texts_without_labels_stand_beside_the_labelled(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, window_rows: int
) -> None:
    """Labelled titles in their epochs, the others in passes of their own; none of validation or test."""
    monkeypatch.setattr(ordering, "WINDOW_EXAMPLES", window_rows)
    both = with_unlabelled(make_settings)
    alone = with_unlabelled(make_settings, unlabelled_share=0, batch_size=8)
    updates, labelled = list(read_updates(both)), list(read_updates(alone))
    with_labels = [[sorted(texts_of(u, labelled=True)) for u in some] for some in (updates, labelled)]
    assert with_labels[0] == with_labels[1]
    others = [row for update in updates for row in texts_of(update, labelled=False)]
    assert {len(texts_of(update, labelled=False)) for update in updates} == {24}
    pool = unlabelled_texts(both).rows.tolist()
    assert len(others) > len(pool)
    assert set(others) == set(pool)
    assert set(range(both.manifest.rows("train"))) >= set(pool)
    assert not set(pool) & {row for update in labelled for row in texts_of(update, labelled=True)}
    (part,) = updates[0].parts
    assert (part.rows, part.labelled, part.texts) == (32, 8, 32)
    assert part.tokens == sum(int(bucket.attention_mask.sum()) for bucket in part.buckets)


def test_a_short_run_needs_only_the_first_texts_without_labels(make_settings: MakeSettings) -> None:
    """A frozen teacher encodes what is needed: forty thousand texts take minutes on a CPU."""
    short = with_unlabelled(make_settings, train_rows=20, steps=2)
    read = {row for update in read_updates(short) for row in texts_of(update, labelled=False)}
    needed = set(trained_texts(short).tolist())
    assert read < needed
    assert len(needed) == 20 + 3 * 24
    long = with_unlabelled(make_settings, steps=40)
    assert set(trained_texts(long).tolist()) > set(unlabelled_texts(long).rows.tolist())


@pytest.mark.parametrize("done", [1, 14])
def test_texts_without_labels_resume(make_settings: MakeSettings, done: int) -> None:
    """The pass over them goes on where it was."""
    whole = [key(update) for update in read_updates(with_unlabelled(make_settings))]
    assert [key(update) for update in read_updates(with_unlabelled(make_settings), done=done)] == whole[done:]


def test_workers_share_the_texts_without_labels(make_settings: MakeSettings) -> None:
    """Every text with one worker once, with the counts of the whole update."""
    whole = next(read_updates(with_unlabelled(make_settings, **{"optimizer.accumulate": 2})))
    updates = [
        next(read_updates(with_unlabelled(make_settings, 2, rank, **{"optimizer.accumulate": 2})))
        for rank in range(2)
    ]
    assert {(part.rows, part.labelled, part.weight) for u in updates for part in u.parts} == {(32, 8, 1.0)}
    for labelled in (True, False):
        shared = [row for update in updates for row in texts_of(update, labelled=labelled)]
        assert sorted(shared) == sorted(texts_of(whole, labelled=labelled))


@pytest.mark.parametrize("window_rows", [ordering.WINDOW_EXAMPLES, 100])
def test_with_all_texts_labelled_nothing_changes(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, window_rows: int
) -> None:
    """A share of texts that do not exist must not make the batches smaller."""
    monkeypatch.setattr(ordering, "WINDOW_EXAMPLES", window_rows)
    without = with_unlabelled(make_settings, train_rows=None, unlabelled_share=0)
    with_share = with_unlabelled(make_settings, train_rows=None)
    assert [key(u) for u in read_updates(with_share)] == [key(u) for u in read_updates(without)]


def test_further_shards_give_their_new_train_news(make_settings: MakeSettings, tmp_path: Path) -> None:
    """A text of the run's own validation or test would be learned from; one of its train is there already."""
    own = make_settings().data
    sources = synthesize(tmp_path / "mind", news=400, users=10, topics=4, seed=9)
    values = {
        "source": [str(sources[0])],
        "teacher": f"{own}/tokenizer",
        "out": str(tmp_path / "more"),
        "workers": 0,
    }
    prepare(build_settings(PrepareSettings, values), say=lambda _: None)
    same = with_unlabelled(make_settings, unlabelled=own)
    more = with_unlabelled(make_settings, unlabelled=str(tmp_path / "more"))
    alone = unlabelled_texts(with_unlabelled(make_settings)).rows
    assert unlabelled_texts(same).rows.tolist() == alone.tolist()
    table, rows = unlabelled_texts(more)
    held_out = read_texts(own, more.manifest)
    known = {text.tobytes() for text in held_out.split(np.arange(len(held_out)))}
    assert 0 < len(rows) - len(alone) <= read_manifest(tmp_path / "more").rows("train")
    assert not known & {text.tobytes() for text in table.split(rows[len(alone) :])}


def test_an_epoch_has_every_title_once(shards: Path) -> None:
    """Windows must cover all shards, whatever their order."""
    manifest = read_manifest(shards)
    updates = [update for update in read_updates(schedule(shards)) if update.epoch == 1]
    labels = [part.target.labels for update in updates for part in update.parts]
    assert sum(map(len, labels)) == manifest.rows("train")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_title_once_over_all_workers(shards: Path, world_size: int) -> None:
    """Ray's own split drops rows to make shares equal: metrics would depend on the number of workers."""
    manifest = read_manifest(shards)
    labels = [
        label
        for rank in range(world_size)
        for batch in SplitData(shards, manifest, "test").batches(7, World(rank, world_size))
        for label in batch.target.labels.tolist()
    ]
    alone = [b.target.labels for b in SplitData(shards, manifest, "test").batches(7)]
    assert len(labels) == manifest.rows("test")
    assert sorted(labels) == sorted(torch.cat(alone).tolist())


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (3, 2), (1, 4)])
def test_parts_make_up_the_batch(world_size: int, accumulate: int) -> None:
    """Workers and accumulation must divide the very same batch, with the whole batch's counts."""
    many = titles(70)
    rows = np.arange(31) * 2
    labels: list[int] = []
    for rank in range(world_size):
        parts = worker_parts(many, rows, Order(0, 31, rank, world_size, accumulate))
        assert {part.rows for part in parts} == {31}
        assert {part.tokens for part in parts} == {int(many.lengths[rows].sum())}
        assert len(parts) == accumulate
        labels += [int(row) for part in parts for row in part.examples.mentions()]
    assert sorted(labels) == rows.tolist()


def test_a_worker_without_titles_gets_a_stand_in_of_no_weight() -> None:
    """A worker that skipped an update would leave the others waiting in their all-reduce for ever."""
    (part,) = worker_parts(titles(5), np.array([3]), Order(0, 4, rank=1, world_size=2))
    assert part.weight == 0.0
    assert part.rows == 1
    (own,) = worker_parts(titles(5), np.array([3]), Order(0, 4, rank=0, world_size=2))
    assert own.weight == 1.0


def test_every_item_has_one_owner() -> None:
    """An item that two workers compute counts twice in a metric; one that none computes is missing."""
    workers = [World(rank, 3) for rank in range(3)]
    assert [[worker.owns(item) for worker in workers].count(True) for item in range(7)] == [1] * 7
    assert [worker.is_rank_zero for worker in workers] == [True, False, False]


def test_one_worker_needs_no_group() -> None:
    """A run in one process must not wait for others."""
    world, values = World(), torch.tensor([1.0, 2.0])
    assert world.sum_values({"a": 1.5}) == {"a": 1.5}
    assert world.sum_tensor(values) is values
    assert world.broadcast("value") == "value"
