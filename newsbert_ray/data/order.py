"""The order of examples, as a pure function of seed, epoch and position. Knows no text, no torch and no Ray.

An epoch is a seeded order of *windows* (a few shards each); inside a window examples are arranged, cut into
updates, and the updates shuffled. Whoever reads the shards, this process or Ray Data, calls the same
functions and gets the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from newsbert_ray.config import SettingsError
from newsbert_ray.data.shards import Shard
from newsbert_ray.data.split import hash_ids

Ints = npt.NDArray[np.int64]

WINDOW_EXAMPLES = 65_536
"""Examples shuffled together; what a reader holds in memory."""
POOL_BATCHES = 50
"""Batches sorted by length together."""


@dataclass(frozen=True)
class Order:
    """What decides an epoch's batches, and which part of each this worker computes.

    An update is cut into `shares` (as many as workers by default), each in `accumulate` pieces. With fewer
    workers a worker has several shares: the cut, and so the result, hangs on `shares` alone.
    """

    seed: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1
    shares: int | None = None


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
    """How many of `count` training examples each shard gives, in proportion to its own; all where None.

    Raises:
        SettingsError: more asked than there are.
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
    windows: list[Window] = []
    members: list[int] = []
    for index in seeded_generator(seed, epoch, 0).permutation(len(shards)).tolist():
        if members and sum(quotas[m] for m in [*members, index]) > WINDOW_EXAMPLES:
            windows.append(_window(epoch, len(windows), shards, quotas, members))
            members = []
        members.append(index)
    windows.append(_window(epoch, len(windows), shards, quotas, members))
    return [window for window in windows if sum(window.quotas)]


def window_generator(order: Order, window: Window) -> np.random.Generator:
    """What arranges a window's examples."""
    return seeded_generator(order.seed, window.epoch, window.number + 1)


def cut_updates(rows: Ints, order: Order, generator: np.random.Generator) -> Iterator[Ints]:
    """Arranged `rows` as each update's rows, the updates in a drawn order."""
    cuts = [rows[start : start + order.batch_size] for start in range(0, len(rows), order.batch_size)]
    for index in generator.permutation(len(cuts)).tolist():
        yield cuts[index]


def shuffle_alike(lengths: Ints, order: Order, generator: np.random.Generator) -> Ints:
    """All rows shuffled, then those of like length together, in pools of POOL_BATCHES updates."""
    rows = generator.permutation(len(lengths))
    pool = order.batch_size * POOL_BATCHES
    for start in range(0, len(rows), pool):
        part = rows[start : start + pool]
        part[:] = part[np.argsort(lengths[part], kind="stable")]
    return rows


def shuffle_groups(groups: Ints, generator: np.random.Generator) -> Ints:
    """All rows in a drawn order of their groups (numbers that ascend along the rows), each group whole."""
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    sizes = np.diff(starts, append=len(groups))
    drawn = generator.permutation(len(starts))
    before = np.cumsum(sizes[drawn]) - sizes[drawn]
    return np.repeat(starts[drawn] - before, sizes[drawn]) + np.arange(len(groups))


def worker_rows(rows: Ints, order: Order, *, together: bool = False) -> dict[int, Ints]:
    """This worker's pieces of an update's rows by their number in the update; every row belongs to one piece
    of one worker.

    Args:
        together: neighbours stay together (those of a group share what they read); otherwise they are dealt
            out, so that all pieces have texts of like lengths.
    """
    shares, accumulate = order.shares or order.world_size, order.accumulate
    found: dict[int, Ints] = {}
    for share in range(order.rank, shares, order.world_size):
        own = np.array_split(rows, shares)[share] if together else rows[share::shares]
        pieces = (
            np.array_split(own, accumulate) if together else [own[i::accumulate] for i in range(accumulate)]
        )
        found |= {share * accumulate + i: piece for i, piece in enumerate(pieces)}
    return found


def seeded_generator(*key: int) -> np.random.Generator:
    """A generator that is a function of `key` alone."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(list(key))))


def _window(
    epoch: int, number: int, shards: Sequence[Shard], quotas: Sequence[int], members: Sequence[int]
) -> Window:
    ordered = sorted(members)
    return Window(epoch, number, tuple(shards[m] for m in ordered), tuple(quotas[m] for m in ordered))
