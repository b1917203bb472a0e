"""Batches: the order of examples, what a batch holds, and buckets of texts with the least padding."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from newsbert_ray.data.batches import (
    Ints,
    Order,
    Topics,
    Window,
    cut_buckets,
    cut_updates,
    draw_examples,
    seeded_generator,
    share_examples,
    shuffle_alike,
    shuffle_groups,
)
from newsbert_ray.data.examples import Part, Titles, collate
from newsbert_ray.data.shards import Shard, TextTable
from tests.data.conftest import titles


def shard(name: str, rows: int) -> Shard:
    """A shard that is only counted."""
    return Shard(file=name, rows=rows, bytes=0, sha256="", examples=rows)


def window(rows: int, epoch: int = 0, number: int = 0) -> Window:
    """A window of one shard."""
    return Window(epoch, number, (shard("a", rows),), (rows,))


def window_batches(many: Titles, window: Window, order: Order) -> Iterator[Ints]:
    """Each update's rows of a window."""
    generator = seeded_generator(order.seed, window.epoch, window.number + 1)
    yield from (
        rows for rows, _ in cut_updates(shuffle_alike(many.lengths, order, generator), order, generator)
    )


def test_every_title_once_an_epoch() -> None:
    """A title left out or doubled would alter the loss without a sign."""
    batches = list(window_batches(titles(1000), window(1000), Order(seed=1, batch_size=32)))
    assert sorted(np.concatenate(batches).tolist()) == list(range(1000))
    assert len(batches) == window(1000).batches(32) == 32


def test_same_seed_same_batches_other_epoch_others() -> None:
    """A resume finds its place only if the order is a function of seed, epoch and position."""

    def order(seed: int, epoch: int) -> list[list[int]]:
        batches = window_batches(titles(300), window(300, epoch), Order(seed=seed, batch_size=32))
        return [rows.tolist() for rows in batches]

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


def test_groups_stay_whole_when_shuffled() -> None:
    """Clicks of one impression share all of their history: apart, it would be encoded for each of them."""
    groups = np.array([0, 0, 0, 3, 4, 4, 9])
    orders = {tuple(shuffle_groups(groups, seeded_generator(seed)).tolist()) for seed in range(200)}
    assert len(orders) == 24
    assert all(sorted(order) == list(range(7)) for order in orders)
    for order in orders:
        changes = np.count_nonzero(np.diff(groups[list(order)]))
        assert changes == 3


def test_collate_by_hand() -> None:
    """Columns, shapes and dtypes that every model relies on."""
    table = TextTable(np.array([7, 8, 9, 5, 6], np.int32), np.array([0, 3, 5]))
    two = Titles(table, np.array([1, 0]), np.array([1, 0]))
    batch = collate(Part(two, rows=4, texts=4, tokens=11), pad_id=99, budget=512)
    (bucket,) = batch.buckets
    assert bucket.rows is not None
    assert bucket.rows.tolist() == [1, 0]
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


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(40, 200), st.integers(0, 60))
def test_buckets_hold_every_text_and_waste_least(lengths: list[int], budget: int, start: int) -> None:
    """A text left out of all buckets would be no news; padding beyond the best cuts is time for nothing."""
    ordered = np.sort(np.array(lengths))
    cuts = list(cut_buckets(ordered, budget=budget, start_tokens=start))
    assert [a for a, _ in cuts] == [0, *(b for _, b in cuts[:-1])]
    assert cuts[-1][1] == len(ordered)
    for a, b in cuts:
        assert b > a
        assert (b - a) * ordered[b - 1] <= budget + ordered[b - 1]
    unlimited = list(cut_buckets(ordered, budget=10**9, start_tokens=start))
    cost = sum((b - a) * int(ordered[b - 1]) + start for a, b in unlimited)
    # Never worse than one bucket, nor than one for each length.
    assert cost <= len(ordered) * int(ordered[-1]) + start
    assert cost <= int(ordered.sum()) + start * len(set(lengths))


def test_buckets_are_the_best_ones() -> None:
    """Against all possible cuts, tried one by one."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        ordered = np.sort(generator.integers(1, 20, 7))
        best = min(
            sum((b - a) * int(ordered[b - 1]) + 9 for a, b in zip([0, *cut], [*cut, 7], strict=True))
            for bits in range(64)
            for cut in [[i + 1 for i in range(6) if bits >> i & 1]]
        )
        cuts = cut_buckets(ordered, budget=10**6, start_tokens=9)
        assert sum((b - a) * int(ordered[b - 1]) + 9 for a, b in cuts) == best
