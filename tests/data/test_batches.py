"""Batches are a function of seed, epoch and position; each title is trained on once an epoch, whoever
computes it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

from newsbert_ray.data.batches import Part, Topics, collate
from newsbert_ray.data.examples import Titles, join_titles, titles_of
from newsbert_ray.data.order import (
    Ints,
    Order,
    Window,
    cut_updates,
    draw_examples,
    share_examples,
    shuffle_alike,
    window_generator,
)
from newsbert_ray.data.reading import worker_parts
from newsbert_ray.data.shards import Shard


def titles(count: int, seed: int = 0) -> Titles:
    """Random titles of 3 to 12 tokens; title i has label i, so that it can be followed."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(3, 13, count)
    tokens = generator.integers(5, 99, lengths.sum()).astype(np.int32)
    return Titles(tokens, np.concatenate(([0], np.cumsum(lengths))), np.arange(count), np.arange(count))


def shard(name: str, rows: int) -> Shard:
    """A shard that is only counted."""
    return Shard(file=name, rows=rows, bytes=0, sha256="", examples=rows)


def window(rows: int, epoch: int = 0, number: int = 0) -> Window:
    """A window of one shard."""
    return Window(epoch, number, (shard("a", rows),), (rows,))


def window_batches(many: Titles, window: Window, order: Order) -> Iterator[Ints]:
    """Each update's rows of a window."""
    generator = window_generator(order, window)
    yield from cut_updates(shuffle_alike(many.lengths, order, generator), order, generator)


def test_every_title_once_an_epoch() -> None:
    """A title left out or doubled would alter the loss without a sign."""
    batches = list(window_batches(titles(1000), window(1000), Order(seed=1, batch_size=32)))
    assert sorted(np.concatenate(batches).tolist()) == list(range(1000))
    assert len(batches) == window(1000).batches(32) == 32


def test_same_seed_same_batches_other_epoch_others() -> None:
    """A resume finds its place only if the order is a function of seed, epoch and position."""

    def order(seed: int, epoch: int) -> list[list[int]]:
        found = window_batches(titles(300), window(300, epoch), Order(seed=seed, batch_size=32))
        return [rows.tolist() for rows in found]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_batches_hold_like_lengths() -> None:
    """Without buckets a batch's longest title pads all the others."""
    many = titles(3200)
    padded = sum(
        many.lengths[rows].max() * len(rows)
        for rows in window_batches(many, window(3200), Order(seed=0, batch_size=32))
    )
    assert padded < 1.05 * many.lengths.sum()


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (3, 2), (1, 4)])
def test_parts_make_up_the_batch(world_size: int, accumulate: int) -> None:
    """Workers and accumulation must divide the very same batch, with the whole batch's counts."""
    many = titles(70)
    rows = np.arange(31) * 2
    found: list[int] = []
    for rank in range(world_size):
        parts = worker_parts(many, rows, Order(0, 31, rank, world_size, accumulate))
        assert {part.rows for part in parts} == {31}
        assert {part.tokens for part in parts} == {int(many.lengths[rows].sum())}
        assert len(parts) == accumulate
        found += [int(label) for part in parts for label in part.examples.arrays()[2]]
    assert sorted(found) == rows.tolist()


def test_a_worker_without_titles_gets_a_stand_in_of_no_weight() -> None:
    """A worker that skipped an update would leave the others waiting in their all-reduce for ever."""
    (part,) = worker_parts(titles(5), np.array([3]), Order(0, 4, rank=1, world_size=2))
    assert part.weight == 0.0
    assert part.rows == 1
    (own,) = worker_parts(titles(5), np.array([3]), Order(0, 4, rank=0, world_size=2))
    assert own.weight == 1.0


def test_collate_by_hand() -> None:
    """Columns, shapes and dtypes that every model relies on."""
    two = Titles(np.array([5, 6, 7, 8, 9], np.int32), np.array([0, 2, 5]), np.array([1, 0]), np.array([7, 3]))
    batch = collate(Part(two, rows=4, texts=4, tokens=11), pad_id=99, budget=512)
    (bucket,) = batch.buckets
    assert bucket.rows is not None
    assert bucket.rows.tolist() == [7, 3]
    assert isinstance(batch.target, Topics)
    assert bucket.input_ids.tolist() == [[5, 6, 99], [7, 8, 9]]
    assert bucket.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert bucket.uses is None
    assert batch.target.labels.tolist() == [1, 0]
    assert (batch.rows, batch.texts, batch.tokens) == (4, 4, 11)
    kinds = {str(t.dtype) for t in (bucket.input_ids, bucket.attention_mask, batch.target.labels)}
    assert kinds == {"torch.int64"}
    pieces = collate(Part(two, rows=4, texts=4, tokens=11), pad_id=99, budget=3).buckets
    assert [piece.input_ids.tolist() for piece in pieces] == [[[5, 6]], [[7, 8, 9]]]


def test_take_and_join_keep_titles_whole() -> None:
    """Flat tokens with offsets: an error of one would give every title its neighbour's words."""
    many = titles(50)

    def words(t: Titles, i: int) -> list[int]:
        return [int(token) for token in t.tokens[t.offsets[i] : t.offsets[i + 1]]]

    taken = many.take(np.array([7, 0, 49, 7]))
    assert [words(taken, i) for i in range(4)] == [words(many, i) for i in (7, 0, 49, 7)]
    joined = join_titles([many.take(np.array([3])), many.take(np.array([], np.int64)), taken])
    assert [words(joined, i) for i in range(5)] == [words(many, i) for i in (3, 7, 0, 49, 7)]


def test_titles_of_a_sliced_table() -> None:
    """A slice of a Parquet table keeps its parent's buffers: offsets must start at zero again."""
    table = pa.table(
        {"tokens": pa.array([[1], [2, 3], [4, 5, 6]], pa.list_(pa.int32())), "label": pa.array([0, 1, 2])}
    )
    found = titles_of(table.slice(1))
    assert found.tokens.tolist() == [2, 3, 4, 5, 6]
    assert found.offsets.tolist() == [0, 2, 5]
    assert found.labels.tolist() == [1, 2]


def test_share_examples_adds_up() -> None:
    """A rounding error would train on a title more or fewer than was asked and recorded."""
    shards = [shard("a", 10), shard("b", 5), shard("c", 7)]
    for wanted in range(1, 23):
        quotas = share_examples(shards, wanted)
        assert sum(quotas) == wanted
        assert all(0 <= q <= s.rows for q, s in zip(quotas, shards, strict=True))
    with pytest.raises(ValueError, match="train_rows 23: the shards hold only 22"):
        share_examples(shards, 23)


def test_a_larger_draw_contains_the_smaller() -> None:
    """Learning curves over `train_rows` must grow one sample, not draw new ones."""
    names = [f"N{i}" for i in range(40)]
    small, large = draw_examples(names, 10).tolist(), draw_examples(names, 20).tolist()
    assert set(small) < set(large)
    assert large == sorted(large)
    assert draw_examples(names, 99).tolist() == list(range(40))
