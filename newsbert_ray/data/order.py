"""The order of examples, as a pure function of seed, epoch and position. Knows no text, torch or Ray.

An epoch is a seeded order of *windows* (a few shards each). Inside a window examples are arranged and cut
into updates, and the updates are shuffled. This process and Ray Data read shards with the same functions, and
so get the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from newsbert_ray.config import SettingsError
from newsbert_ray.data.shards import Shard, hash_ids

Ints = npt.NDArray[np.int64]

WINDOW_EXAMPLES = 65_536
"""Examples shuffled together, and held in memory."""
POOL_BATCHES = 50
"""Batches sorted by length together."""
_NO_ROWS = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Order:
    """Decides an epoch's batches, and the part of each that this worker computes.

    An update has `batch_size` examples and `beside` texts without labels. It is cut into `shares` (by default
    one a worker), each in `accumulate` pieces. With fewer workers than shares a worker has several, so the
    result depends on `shares` alone.
    """

    seed: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1
    shares: int | None = None
    beside: int = 0


@dataclass(frozen=True)
class Window:
    """A few shards whose examples are shuffled together, and how many are drawn from each."""

    epoch: int
    number: int
    shards: tuple[Shard, ...]
    quotas: tuple[int, ...]

    def batches(self, batch_size: int) -> int:
        """Updates this window gives."""
        return -(-sum(self.quotas) // batch_size)


def share_examples(shards: Sequence[Shard], count: int | None) -> list[int]:
    """How many of `count` training examples come from each shard, in proportion to its own; all where None.

    Raises:
        SettingsError: `count` is more than there are.
    """
    sizes = [shard.examples for shard in shards]
    total = sum(sizes)
    if count is None:
        return sizes
    if count > total:
        raise SettingsError(f"train_rows {count}: the shards hold only {total} training examples")
    ends = [count * end // total for end in np.cumsum(sizes).tolist()]
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def draw_examples(names: Sequence[str], quota: int) -> Ints:
    """Positions of the `quota` names with the smallest hash, in order; a larger quota adds positions."""
    if quota >= len(names):
        return np.arange(len(names))
    return np.sort(np.argsort(hash_ids(names).byteswap(), kind="stable")[:quota])


def epoch_windows(shards: Sequence[Shard], quotas: Sequence[int], *, seed: int, epoch: int) -> list[Window]:
    """The windows of an epoch in their order; a function of seed and epoch alone."""
    groups: list[list[int]] = [[]]
    for index in seeded_generator(seed, epoch, 0).permutation(len(shards)).tolist():
        if groups[-1] and sum(quotas[m] for m in [*groups[-1], index]) > WINDOW_EXAMPLES:
            groups.append([])
        groups[-1].append(index)
    windows = []
    for number, group in enumerate(map(sorted, groups)):
        own = tuple(quotas[m] for m in group)
        windows.append(Window(epoch, number, tuple(shards[m] for m in group), own))
    return [window for window in windows if sum(window.quotas)]


def window_generator(order: Order, window: Window) -> np.random.Generator:
    """The generator that arranges a window's examples."""
    return seeded_generator(order.seed, window.epoch, window.number + 1)


def cut_updates(
    rows: Ints, order: Order, generator: np.random.Generator, beside: Ints = _NO_ROWS
) -> Iterator[tuple[Ints, Ints]]:
    """The rows of each update and those `beside` them, both arranged; the updates are shuffled."""
    size, more = order.batch_size, order.beside
    cuts = [rows[start : start + size] for start in range(0, len(rows), size)]
    for index in generator.permutation(len(cuts)).tolist():
        yield cuts[index], beside[index * more : (index + 1) * more]


def cycle_rows(rows: Ints, start: int, count: int, *, seed: int) -> Ints:
    """`count` of `rows` from `start` of an endless sequence, each pass of which has its own seeded order."""
    first, size = start // len(rows), len(rows)
    passes = range(first, (start + count - 1) // size + 1)
    orders = [seeded_generator(seed, number, 0, 2).permutation(size) for number in passes]
    chosen: Ints = rows[np.concatenate([_NO_ROWS, *orders])[start - first * size :][:count]]
    return chosen


def shuffle_alike(lengths: Ints, order: Order, generator: np.random.Generator) -> Ints:
    """All rows shuffled, then sorted by length within pools of POOL_BATCHES updates."""
    rows = generator.permutation(len(lengths))
    return rows[sort_pools(lengths[rows], order.batch_size)]


def sort_pools(lengths: Ints, batch_size: int) -> Ints:
    """The order that sorts by length within each POOL_BATCHES updates."""
    pools = np.arange(len(lengths)) // (batch_size * POOL_BATCHES)
    return np.lexsort((lengths, pools))


def shuffle_groups(groups: Ints, generator: np.random.Generator) -> Ints:
    """All rows with their groups shuffled and each group whole; `groups` ascend along the rows."""
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    sizes = np.diff(starts, append=len(groups))
    drawn = generator.permutation(len(starts))
    before = np.cumsum(sizes[drawn]) - sizes[drawn]
    return np.repeat(starts[drawn] - before, sizes[drawn]) + np.arange(len(groups))


def worker_rows(rows: Ints, order: Order, *, grouped: bool = False) -> dict[int, Ints]:
    """This worker's pieces of an update's rows, by their number in the update.

    Every row belongs to one piece of one worker.

    Args:
        grouped: neighbours stay together, because those of a group share a history; otherwise they are dealt
            out in turn, so that all pieces have similar lengths.
    """
    shares, accumulate = order.shares or order.world_size, order.accumulate
    own_pieces: dict[int, Ints] = {}
    for share in range(order.rank, shares, order.world_size):
        if grouped:
            pieces = np.array_split(np.array_split(rows, shares)[share], accumulate)
        else:
            pieces = [rows[share::shares][i::accumulate] for i in range(accumulate)]
        own_pieces |= {share * accumulate + i: piece for i, piece in enumerate(pieces)}
    return own_pieces


def seeded_generator(*key: int) -> np.random.Generator:
    """A generator that depends on `key` alone."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(list(key))))
