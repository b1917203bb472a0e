"""Shards read straight from Parquet: training updates and evaluation batches for this process. Knows no
Ray."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from newsbert_ray.data.batches import (
    Batch,
    Order,
    Part,
    Titles,
    Window,
    collate,
    draw_rows,
    epoch_windows,
    join_titles,
    titles_of,
    window_batches,
    worker_parts,
)
from newsbert_ray.data.shards import Manifest, Shard, Split, read_shard

_CACHED_WINDOWS = 4


@dataclass(frozen=True)
class Update:
    """One update's work for this worker: `parts` to accumulate, of a batch at `step` (from 1 over the whole
    run)."""

    step: int
    epoch: int
    parts: tuple[Batch, ...]


@dataclass(frozen=True)
class Course:
    """The course of a run: its training order over prepared shards."""

    folder: str
    manifest: Manifest
    order: Order
    epochs: int
    train_rows: int | None

    def windows(self, epoch: int) -> list[Window]:
        """The windows of `epoch` (from 0), in order."""
        return epoch_windows(self.manifest, self.order, epoch=epoch, train_rows=self.train_rows)

    def steps(self, epoch: int) -> int:
        """Updates of `epoch`."""
        return sum(window.batches(self.order.batch_size) for window in self.windows(epoch))

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        return sum(self.steps(epoch) for epoch in range(self.epochs))

    def windows_from(self, done: int) -> Iterator[tuple[Window, int, int]]:
        """(window, its first step, batches to skip in it) for all work after `done` steps."""
        first = 1
        for epoch in range(self.epochs):
            for window in self.windows(epoch):
                after = first + window.batches(self.order.batch_size)
                if after - 1 > done:
                    yield window, first, max(0, done + 1 - first)
                first = after


def read_updates(plan: Course, *, done: int = 0) -> Iterator[Update]:
    """All updates after `done` steps, read in this process."""
    for window, first, skip in plan.windows_from(done):
        for step, parts in parts_of(
            window_titles(plan.folder, window), plan.order, window, first=first, skip=skip
        ):
            yield collate_update(parts, plan, step=step, epoch=window.epoch)


def parts_of(
    titles: Titles, order: Order, window: Window, *, first: int, skip: int
) -> Iterator[tuple[int, list[Part]]]:
    """(step, this worker's parts) of a window's updates from its titles, leaving out the first `skip`."""
    for index, rows in enumerate(window_batches(titles, window, order)):
        if index >= skip:
            yield first + index, worker_parts(titles, rows, order)


def collate_update(parts: list[Part], plan: Course, *, step: int, epoch: int) -> Update:
    """An update's parts as batches."""
    pad_id = plan.manifest.tokenizer.pad_id
    return Update(step, epoch, tuple(collate(part, pad_id=pad_id) for part in parts))


def window_titles(folder: str, window: Window) -> Titles:
    """The titles of a window's shards, in shard order; kept for a process's next run over the same shards."""
    return _window_titles(folder, window.shards, window.quotas)


@lru_cache(maxsize=_CACHED_WINDOWS)
def _window_titles(folder: str, shards: tuple[Shard, ...], quotas: tuple[int, ...]) -> Titles:
    return join_titles([_drawn(folder, shard, quota) for shard, quota in zip(shards, quotas, strict=True)])


def _drawn(folder: str, shard: Shard, quota: int) -> Titles:
    return titles_of(draw_rows(read_shard(folder, shard, ["news_id", "label", "tokens"]), quota))


def evaluation_batches(
    folder: str | Path,
    manifest: Manifest,
    split: Split,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Every title of a split once over all workers, like lengths together; a worker may get one batch
    more."""
    number = 0
    for shard in manifest.splits[split]:
        titles = _shard_titles(str(folder), shard)
        rows = np.argsort(titles.lengths, kind="stable")
        for start in range(0, len(rows), batch_size):
            if number % world_size == rank:
                part = titles.take(rows[start : start + batch_size])
                yield collate(Part(part, len(part), len(part.tokens)), pad_id=manifest.tokenizer.pad_id)
            number += 1


@lru_cache(maxsize=_CACHED_WINDOWS)
def _shard_titles(folder: str, shard: Shard) -> Titles:
    return titles_of(read_shard(folder, shard, ["label", "tokens"]))
