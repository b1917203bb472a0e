"""Batches: the order of examples, and texts to encode in buckets of similar length with the target of a task.

The order is a pure function of seed, epoch and position. An epoch is a seeded order of *windows* (a few
shards each). Inside a window examples are arranged and cut into updates, and the updates are shuffled. This
process and Ray Data read shards with the same functions, and so get the same batches.

A text that several examples of a batch mention is in it once, and `uses` counts its mentions. Losses over
texts are weighted by it, so that they equal those of a batch in which every mention is encoded separately.
Knows no model and no Ray.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from newsbert_ray.config import SettingsError
from newsbert_ray.data.shards import Shard, TextTable, hash_ids

Ints = npt.NDArray[np.int64]

WINDOW_EXAMPLES = 65_536
"""Examples shuffled together, and held in memory."""
POOL_BATCHES = 50
"""Batches sorted by length together."""
_NO_ROWS = np.zeros(0, np.int64)
START_SHARE = 1 / 128
"""Cost of one more bucket, in tokens of padding, as a share of the token budget. A device that is fast with
large batches has a large budget, and so gets few buckets."""


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
        return -(-sum(self.quotas) // batch_size)


def share_examples(shards: Sequence[Shard], count: int | None) -> list[int]:
    """How many of `count` training examples come from each shard, in proportion to its own; all where None.
    SettingsError where there are fewer."""
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
    """This worker's pieces of an update's rows, by their number in the update; every row is in one piece.
    Where `grouped`, neighbours stay together, because those of a group share a history; otherwise they are
    dealt out in turn, so that all pieces have similar lengths."""
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


class _Tensors:
    """A frozen dataclass of tensors that can be copied to a device."""

    def to(self, device: torch.device) -> Self:
        """The same on `device`; a GPU copies from pinned memory while it computes."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        if device.type == "cuda":
            tensors = {name: one if one.is_cuda else one.pin_memory() for name, one in tensors.items()}
        moved = {name: one.to(device, non_blocking=True) for name, one in tensors.items()}
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True)
class Bucket(_Tensors):
    """Texts that are encoded in one pass.

    Attributes:
        input_ids: (B, L) int64, padded to the longest text here.
        attention_mask: (B, L) int64, 1 where a token is real.
        uses: (B,) float32, mentions of each text in the batch; None where one each.
        rows: (B,) int64, row of each text in the table of texts; None where it is not in it.
    """

    input_ids: Tensor
    attention_mask: Tensor
    uses: Tensor | None = None
    rows: Tensor | None = None


@dataclass(frozen=True)
class Topics(_Tensors):
    """Target of topic classification: the topic of each text, (B,) int64; -1 where it has no label."""

    labels: Tensor


@dataclass(frozen=True)
class ClickChoices(_Tensors):
    """Target of recommendation: which of its candidates a user clicked, given their history.

    Attributes:
        history: (S, T) int64, positions among the batch's texts, padded with 0.
        history_mask: (S, T) int64, 1 where a click is real; a row may have none.
        candidates: (S, C) int64, positions among the batch's texts, the clicked one first.
        candidate_mask: (S, C) bool, False where an impression has too few candidates.
        labels: (S,) int64, all 0.
    """

    history: Tensor
    history_mask: Tensor
    candidates: Tensor
    candidate_mask: Tensor
    labels: Tensor


@dataclass(frozen=True)
class PairChoices(_Tensors):
    """Target of retrieval: whether a query's text was clicked. `queries` and `texts` are positions among the
    batch's texts, `labels` 0 or 1, all (S,) int64."""

    queries: Tensor
    texts: Tensor
    labels: Tensor


Target = Topics | ClickChoices | PairChoices


@dataclass(frozen=True)
class Batch:
    """Examples for one forward pass: a whole update's, or one worker's or one accumulation's part of it.

    Attributes:
        buckets: the texts; positions in `target` count through them in order.
        rows, texts, tokens: examples, mentions of texts and their real tokens in the whole update.
        weight: 1, or 0 for a placeholder: an update had fewer examples than workers.
        piece: number of this part in the update. It seeds dropout, whichever worker computes the part.
        labelled: examples with a label in the whole update; None where all have one.
    """

    buckets: tuple[Bucket, ...]
    target: Target
    rows: int
    texts: int
    tokens: int
    weight: float = 1.0
    piece: int = 0
    labelled: int | None = None

    @property
    def padded_tokens(self) -> int:
        """Tokens that an encoder reads, padding included."""
        return sum(bucket.input_ids.numel() for bucket in self.buckets)

    def to(self, device: torch.device) -> Batch:
        buckets = tuple(bucket.to(device) for bucket in self.buckets)
        return replace(self, buckets=buckets, target=self.target.to(device))


def unique_texts(
    table: TextTable, mentions: npt.NDArray[np.integer], *, pad_id: int, budget: int
) -> tuple[tuple[Bucket, ...], Ints]:
    """Each different text of the `mentions` (M,), rows of the table, once in buckets of similar length; and
    the (M,) position of each mention's text among them."""
    different, inverse, uses = np.unique(mentions, return_inverse=True, return_counts=True)
    lengths = table.lengths(different)
    order = np.argsort(lengths, kind="stable")
    position = np.empty(len(order), np.int64)
    position[order] = np.arange(len(order))
    buckets = []
    for start, stop in cut_buckets(lengths[order], budget=budget):
        chosen = order[start:stop]
        ids, mask = table.ids(different[chosen], pad_id=pad_id)
        buckets.append(make_bucket(ids, mask, different[chosen], uses[chosen]))
    return tuple(buckets), position[inverse]


def make_bucket(
    ids: Ints, mask: npt.NDArray[np.bool_], rows: npt.NDArray[np.integer], uses: Ints | None = None
) -> Bucket:
    counts = None if uses is None or (uses == 1).all() else torch.from_numpy(uses.astype(np.float32))
    of_table = torch.from_numpy(rows.astype(np.int64))
    return Bucket(torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64)), counts, of_table)


def cut_buckets(lengths: Ints, *, budget: int, start_tokens: int | None = None) -> Iterator[tuple[int, int]]:
    """Cuts of ascending `lengths` into buckets (start, stop).

    The cuts minimise padded tokens plus `start_tokens` a bucket (START_SHARE of the budget by default), by
    dynamic programming over the different lengths. A bucket of more than `budget` tokens is then cut evenly.
    """
    start_tokens = round(START_SHARE * budget) if start_tokens is None else start_tokens
    if not len(lengths):
        return
    widths, starts = np.unique(lengths, return_index=True)
    ends = np.append(starts[1:], len(lengths))
    best = np.zeros(len(widths) + 1)  # least cost of the texts before each different length
    origin = np.zeros(len(widths) + 1, np.int64)
    for k, (width, end) in enumerate(zip(widths.tolist(), ends.tolist(), strict=True)):
        costs = best[: k + 1] + width * (end - starts[: k + 1])
        origin[k + 1] = int(costs.argmin())
        best[k + 1] = costs[origin[k + 1]] + start_tokens
    cuts = []
    k = len(widths)
    while k:
        cuts.append((int(starts[origin[k]]), int(ends[k - 1])))
        k = int(origin[k])
    for start, stop in reversed(cuts):
        pieces = -(-int(lengths[stop - 1]) * (stop - start) // budget)
        edges = np.linspace(start, stop, min(pieces, stop - start) + 1).round().astype(np.int64).tolist()
        yield from itertools.pairwise(edges)
