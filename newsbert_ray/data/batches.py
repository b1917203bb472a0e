"""Rows to batches, as a pure function of seed, epoch and position: the one statement of what a batch holds.

An epoch is a seeded order of *windows* (a few shards each); inside a window rows are shuffled, sorted by
length in pools and cut, so that a batch holds titles of like length. Whoever reads the shards, this process
or Ray Data, calls the same functions and gets the same batches. Knows no model, no Ray.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from newsbert_ray.config import SettingsError
from newsbert_ray.data.shards import Manifest, Shard

Ints = npt.NDArray[np.int64]

WINDOW_ROWS = 65_536
"""Rows shuffled together; what a reader holds in memory."""
POOL_BATCHES = 50
"""Batches sorted by length together."""


@dataclass(frozen=True)
class Batch:
    """Titles for one forward pass: a whole update's batch, or one worker's or one accumulation's part of it.

    Attributes:
        input_ids: (B, L) int64, padded to the longest title here.
        attention_mask: (B, L) int64, 1 where a token is real.
        labels: (B,) int64 topic indices.
        rows: titles in the whole update's batch.
        tokens: real tokens in the whole update's batch.
        weight: 1, or 0 for a stand-in that keeps a worker in step when an update has fewer titles than
            workers.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    rows: int
    tokens: int
    weight: float = 1.0

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            attention_mask=self.attention_mask.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Titles:
    """Token ids and labels of many titles: ids flat, title i at offsets[i]:offsets[i + 1]."""

    tokens: npt.NDArray[np.int32]
    offsets: Ints
    labels: Ints

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Ints:
        """Tokens of each title."""
        return np.diff(self.offsets)

    def take(self, rows: Ints) -> Titles:
        """The titles at `rows`, in that order."""
        lengths = self.lengths[rows]
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        flat = np.repeat(self.offsets[:-1][rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Titles(self.tokens[flat], offsets, self.labels[rows])


@dataclass(frozen=True)
class Part:
    """Titles of one forward pass with the counts that Batch carries."""

    titles: Titles
    rows: int
    tokens: int
    weight: float = 1.0


@dataclass(frozen=True)
class Order:
    """What decides an epoch's batches, and which part of each this worker computes."""

    seed: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1


@dataclass(frozen=True)
class Window:
    """A few shards whose rows are shuffled together, and how many training rows are drawn from each."""

    epoch: int
    number: int
    shards: tuple[Shard, ...]
    quotas: tuple[int, ...]

    def batches(self, batch_size: int) -> int:
        """Updates this window gives."""
        return -(-sum(self.quotas) // batch_size)


def titles_of(table: pa.Table) -> Titles:
    """Columns `tokens` and `label` of a news table."""
    column = table.column("tokens").combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], type=column.type)
    offsets = column.offsets.to_numpy().astype(np.int64)
    tokens = column.values.to_numpy()[offsets[0] : offsets[-1]] if len(offsets) else np.zeros(0, np.int32)
    labels = table.column("label").to_numpy().astype(np.int64)
    return Titles(np.asarray(tokens, np.int32), offsets - offsets[0], labels)


def join_titles(parts: Sequence[Titles]) -> Titles:
    """Several Titles as one, in order."""
    lengths = np.concatenate([part.lengths for part in parts]) if parts else np.zeros(0, np.int64)
    return Titles(
        np.concatenate([part.tokens for part in parts]) if parts else np.zeros(0, np.int32),
        np.concatenate(([0], np.cumsum(lengths))),
        np.concatenate([part.labels for part in parts]) if parts else np.zeros(0, np.int64),
    )


def draw_rows(table: pa.Table, quota: int) -> pa.Table:
    """The `quota` rows of a shard with the smallest hash of their news id, in shard order; a larger quota
    adds rows."""
    if quota >= table.num_rows:
        return table
    hashes = [
        hashlib.blake2b(i.encode(), digest_size=8).digest() for i in table.column("news_id").to_pylist()
    ]
    chosen = np.sort(np.argsort(np.array(hashes, dtype="S8"), kind="stable")[:quota])
    return table.take(pa.array(chosen))


def share_rows(shards: Sequence[Shard], rows: int | None) -> list[int]:
    """How many of `rows` training rows each shard gives, in proportion to its size; all where rows is None.

    Raises:
        SettingsError: more rows asked than there are.
    """
    sizes = [shard.rows for shard in shards]
    total = sum(sizes)
    if rows is None:
        return sizes
    if rows > total:
        raise SettingsError(f"train_rows {rows}: the shards hold only {total} training titles")
    ends = [rows * end // total for end in np.cumsum(sizes).tolist()]
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def epoch_windows(manifest: Manifest, order: Order, *, epoch: int, train_rows: int | None) -> list[Window]:
    """The windows of an epoch in their order; a function of seed and epoch alone."""
    shards = manifest.splits["train"]
    quotas = share_rows(shards, train_rows)
    generator = _generator(order.seed, epoch, 0)
    windows: list[Window] = []
    members: list[int] = []
    for index in generator.permutation(len(shards)).tolist():
        if members and sum(quotas[m] for m in [*members, index]) > WINDOW_ROWS:
            windows.append(_window(epoch, len(windows), shards, quotas, members))
            members = []
        members.append(index)
    windows.append(_window(epoch, len(windows), shards, quotas, members))
    return [window for window in windows if sum(window.quotas)]


def window_batches(titles: Titles, window: Window, order: Order) -> Iterator[Ints]:
    """Row numbers of each update's batch in a window, in their order: shuffled, then like lengths
    together."""
    generator = _generator(order.seed, window.epoch, window.number + 1)
    rows = generator.permutation(len(titles))
    pool = order.batch_size * POOL_BATCHES
    lengths = titles.lengths
    for start in range(0, len(rows), pool):
        part = rows[start : start + pool]
        part[:] = part[np.argsort(lengths[part], kind="stable")]
    cuts = [rows[start : start + order.batch_size] for start in range(0, len(rows), order.batch_size)]
    for index in generator.permutation(len(cuts)).tolist():
        yield cuts[index]


def worker_rows(rows: Ints, order: Order) -> list[Ints]:
    """This worker's part of an update's rows, in `accumulate` pieces; every row belongs to one piece of one
    worker."""
    own = rows[order.rank :: order.world_size]
    return [own[i :: order.accumulate] for i in range(order.accumulate)]


def worker_parts(titles: Titles, rows: Ints, order: Order) -> list[Part]:
    """This worker's part of the update over `rows` of `titles`, in the pieces to accumulate; at least one."""
    count, tokens = len(rows), int(titles.lengths[rows].sum())
    pieces = [piece for piece in worker_rows(rows, order) if len(piece)]
    weight = 1.0 if pieces else 0.0
    return [Part(titles.take(piece), count, tokens, weight) for piece in pieces or [rows[:1]]]


def collate(part: Part, *, pad_id: int) -> Batch:
    """A part's titles as a Batch, padded with `pad_id` to the longest of them."""
    titles = part.titles
    lengths = titles.lengths
    width = int(lengths.max(initial=1))
    mask = np.arange(width)[None, :] < lengths[:, None]  # (B, L)
    ids = np.full(mask.shape, pad_id, np.int64)
    ids[mask] = titles.tokens
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(mask.astype(np.int64)),
        torch.from_numpy(titles.labels),
        rows=part.rows,
        tokens=part.tokens,
        weight=part.weight,
    )


def _window(
    epoch: int, number: int, shards: Sequence[Shard], quotas: Sequence[int], members: Sequence[int]
) -> Window:
    ordered = sorted(members)
    return Window(epoch, number, tuple(shards[m] for m in ordered), tuple(quotas[m] for m in ordered))


def _generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, stream])))
