"""The order of examples is a function of seed, epoch and position; every example comes once an epoch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from newsbert_ray.data.examples import Titles
from newsbert_ray.data.order import (
    Ints,
    Order,
    Window,
    cut_updates,
    draw_examples,
    seeded_generator,
    share_examples,
    shuffle_alike,
    shuffle_groups,
    window_generator,
)
from newsbert_ray.data.shards import Shard
from tests.data.conftest import titles


def shard(name: str, rows: int) -> Shard:
    """A shard that is only counted."""
    return Shard(file=name, rows=rows, bytes=0, sha256="", examples=rows)


def window(rows: int, epoch: int = 0, number: int = 0) -> Window:
    """A window of one shard."""
    return Window(epoch, number, (shard("a", rows),), (rows,))


def window_batches(many: Titles, window: Window, order: Order) -> Iterator[Ints]:
    """Each update's rows of a window."""
    generator = window_generator(order, window)
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
