"""The schedule of a run's updates: counted right, and entered at any step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from newsbert_ray.data import order as ordering
from newsbert_ray.data.order import Order
from newsbert_ray.data.reading import (
    TrainingSchedule,
    Update,
    World,
    evaluation_batches,
    read_updates,
    worker_parts,
)
from newsbert_ray.data.shards import read_manifest
from tests.data.conftest import titles


def schedule(shards: Path, limit: int | None = None, **order: int) -> TrainingSchedule:
    """Two epochs over the small corpus."""
    return TrainingSchedule(str(shards), read_manifest(shards), Order(5, 32, **order), 2, None, limit=limit)


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
        for batch in evaluation_batches(shards, manifest, "test", batch_size=7, world=World(rank, world_size))
        for label in batch.target.labels.tolist()
    ]
    alone = [b.target.labels for b in evaluation_batches(shards, manifest, "test", batch_size=7)]
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
        labels += [int(label) for part in parts for label in part.examples.arrays()[2]]
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
