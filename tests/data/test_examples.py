"""Clicks with histories and negatives: drawn from the right impression, the same for the same seed, and each
news of a batch encoded once."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from newsbert_ray.data.batches import ClickChoices, Order, seeded_generator
from newsbert_ray.data.examples import (
    Clicks,
    Impressions,
    Part,
    choose_clicks,
    collate,
    draw_clicks,
    find_clicks,
    impressions_of,
    join,
    titles_of,
)
from newsbert_ray.data.reading import worker_parts
from newsbert_ray.data.shards import BEHAVIORS_SCHEMA, TextTable


def table_of(lengths: list[int]) -> TextTable:
    """Texts of these lengths; text i consists of the id 10 + i."""
    tokens = np.repeat(np.arange(10, 10 + len(lengths), dtype=np.int32), lengths)
    return TextTable(tokens, np.concatenate(([0], np.cumsum(lengths))))


TABLE = table_of([3 + i % 4 for i in range(30)])


def behaviors(*rows: tuple[list[int], list[int], list[int] | None]) -> pa.Table:
    """A behaviours shard of (history, candidates, clicked) rows."""
    columns = {
        "impression_id": [str(i + 1) for i in range(len(rows))],
        "user_id": [f"U{i}" for i in range(len(rows))],
        "time": [0] * len(rows),
        "history": [row[0] for row in rows],
        "candidates": [row[1] for row in rows],
        "clicked": [row[2] for row in rows],
    }
    return pa.table(columns, schema=BEHAVIORS_SCHEMA)


def draw(table: pa.Table, *, seed: int = 0, npratio: int = 2, history: int = 50) -> Clicks:
    """All clicks of a shard."""
    impressions = impressions_of(table, history=history)
    every = np.arange(len(find_clicks(impressions)[0]))
    return draw_clicks(impressions, TABLE, every, npratio=npratio, generator=seeded_generator(seed))


def reads(clicks: Clicks, i: int) -> list[int]:
    """History of click i."""
    return [int(row) for row in clicks.history[clicks.offsets[i] : clicks.offsets[i + 1]]]


def test_clicks_by_hand() -> None:
    """Each click has its own user's history, and negatives of its own impression."""
    clicks = draw(
        behaviors(
            ([1, 2, 3], [4, 5, 6, 7], [0, 1, 0, 1]),
            ([], [8, 9], [1, 0]),  # a newcomer; fewer negatives than npratio
            ([1], [10, 11], [0, 0]),  # no click
            ([1], [12, 13], [1, 1]),  # only clicks
            ([1], [14, 15], None),  # no labels
        )
    )
    assert clicks.candidates[:, 0].tolist() == [5, 7, 8]
    assert [set(row[1:].tolist()) for row in clicks.candidates] == [{4, 6}, {4, 6}, {9, -1}]
    assert [reads(clicks, i) for i in range(3)] == [[1, 2, 3], [1, 2, 3], []]
    assert clicks.groups.tolist() == [0, 0, 1]


def test_a_candidate_listed_twice() -> None:
    """A news that was clicked is no negative of its impression, and none is drawn twice."""
    clicks = draw(behaviors(([], [4, 4, 5, 5, 6], [1, 0, 0, 0, 0])), npratio=4)
    (row,) = clicks.candidates.tolist()
    assert row[0] == 4
    assert sorted(row[1:]) == [-1, -1, 5, 6]


def test_a_history_keeps_its_last_clicks() -> None:
    """Old clicks say less; the first ones would be another user's model."""
    clicks = draw(behaviors((list(range(20)), [21, 22], [1, 0]), ([3], [21, 22], [1, 0])), history=5)
    assert reads(clicks, 0) == [15, 16, 17, 18, 19]
    assert reads(clicks, 1) == [3]


def test_negatives_are_drawn_anew_by_the_seed_alone() -> None:
    """Epochs must differ, runs of one seed must not; every negative must have its turn."""
    table = behaviors(([1], list(range(2, 22)), [1] + [0] * 19))
    first = draw(table, seed=1).candidates.tolist()
    assert first == draw(table, seed=1).candidates.tolist()
    drawn = [tuple(draw(table, seed=seed).candidates[0, 1:].tolist()) for seed in range(200)]
    assert len(set(drawn)) > 100
    assert {n for pair in drawn for n in pair} == set(range(3, 22))
    assert all(a != b for a, b in drawn)


@pytest.mark.parametrize("quota", [1, 2, 3])
def test_a_draw_of_clicks_grows(quota: int) -> None:
    """`train_rows` counts clicks, also those of one impression; a larger sample contains the smaller."""
    table = behaviors(*[([10 + i], [2 + i, 20, 21], [1, 1, 0]) for i in range(3)])
    impressions = impressions_of(table, history=9)

    def drawn(count: int) -> set[tuple[int, int]]:
        held, chosen = choose_clicks(table, impressions, count)
        clicks = draw_clicks(held, TABLE, chosen, npratio=1, generator=seeded_generator(0))
        pairs = set(zip(clicks.history.tolist(), clicks.candidates[:, 0].tolist(), strict=True))
        assert len(clicks) == len(pairs) == count
        assert len(held) == len({reader for reader, _ in pairs})
        return pairs

    assert drawn(quota) < drawn(quota + 1) < drawn(6)
    assert drawn(6) == {(10 + i, news) for i in range(3) for news in (2 + i, 20)}


def test_joined_shards_are_one() -> None:
    """Offsets of the second shard that start anew would give its users the first one's histories."""
    first, second = (
        behaviors(([1, 2], [3, 4], [1, 0])),
        behaviors(([5], [6, 7, 8], [0, 1, 0]), ([], [9], None)),
    )
    parts = [impressions_of(one, history=9) for one in (first, second)]
    joined = join(parts)
    whole = impressions_of(pa.concat_tables([first, second]), history=9)
    for name in Impressions.__dataclass_fields__:
        assert getattr(joined, name).tolist() == getattr(whole, name).tolist()
    assert find_clicks(joined)[0].tolist() == [0, 3]


def batch_of(clicks: Clicks) -> tuple[list[list[int]], list[float], ClickChoices]:
    """Texts of a batch in order (their ids without padding), how often each is used, and the target."""
    batch = collate(Part(clicks, len(clicks), *clicks.count()), pad_id=0, budget=512)
    texts: list[list[int]] = []
    uses: list[float] = []
    for bucket in batch.buckets:
        for ids, mask in zip(bucket.input_ids, bucket.attention_mask, strict=True):
            texts.append(ids[mask.bool()].tolist())
        uses += [1.0] * len(bucket.input_ids) if bucket.uses is None else bucket.uses.tolist()
    assert isinstance(batch.target, ClickChoices)
    return texts, uses, batch.target


def test_each_news_of_a_batch_stands_there_once() -> None:
    """Encoded once, whoever mentions it, and counted as often as it is mentioned."""
    clicks = draw(behaviors(([1, 2, 1], [4, 5, 6], [0, 1, 0]), ([2, 5], [4, 7], [1, 0])), npratio=2)
    texts, uses, target = batch_of(clicks)
    assert len(texts) == len({tuple(text) for text in texts}) == 6
    counted = {text[0] - 10: count for text, count in zip(texts, uses, strict=True)}
    assert counted == {1: 2, 2: 2, 4: 2, 5: 2, 6: 1, 7: 1}
    assert sum(counted.values()) == clicks.count()[0]

    def named(positions: torch.Tensor) -> list[int]:
        return [texts[position][0] - 10 for position in positions.tolist()]

    assert named(target.history[0]) == [1, 2, 1]
    assert named(target.history[1][:2]) == [2, 5]
    assert target.history_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    for i in range(2):
        kept = target.candidate_mask[i]
        assert named(target.candidates[i][kept]) == [row for row in clicks.candidates[i].tolist() if row >= 0]
    assert target.candidate_mask.tolist() == [[True, True, True], [True, True, False]]
    assert target.labels.tolist() == [0, 0]


def test_a_batch_of_newcomers_alone() -> None:
    """A batch without any history must still have a column for it."""
    texts, _, target = batch_of(draw(behaviors(([], [4, 5], [1, 0]))))
    assert target.history.shape == (1, 1)
    assert target.history_mask.sum() == 0
    assert len(texts) == 2


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (3, 2)])
def test_parts_make_up_the_update(world_size: int, accumulate: int) -> None:
    """Workers divide the very same clicks, with the whole update's counts."""
    clicks = draw(behaviors(*[([i, i + 1], [i + 2, i + 3, i + 4], [1, 0, 1]) for i in range(9)]))
    clicked: list[int] = []
    for rank in range(world_size):
        parts = worker_parts(clicks, np.arange(len(clicks)), Order(0, 18, rank, world_size, accumulate))
        assert {(part.rows, part.texts, part.tokens) for part in parts} == {(18, *clicks.count())}
        for part in parts:
            assert isinstance(part.examples, Clicks)
            clicked += part.examples.candidates[:, 0].tolist()
    assert clicked == clicks.candidates[:, 0].tolist()


def test_a_draw_of_titles_is_of_those_with_a_label() -> None:
    """The others are texts without labels; a quota of all labelled ones takes none of them."""
    table = pa.table(
        {
            "news_id": [f"N{i}" for i in range(6)],
            "label": pa.array([0, -1, 2, -1, 1, 0]),
        }
    )
    assert titles_of(table, TABLE, quota=4, start=10).rows.tolist() == [10, 12, 14, 15]
    two = titles_of(table, TABLE, quota=2)
    assert len(two) == two.labelled == 2
    assert titles_of(table, TABLE).labels.tolist() == [0, -1, 2, -1, 1, 0]
