"""Shards read straight from Parquet: training updates and evaluation batches for this process. Knows no
Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from newsbert_ray.config import TrainSettings
from newsbert_ray.data import examples
from newsbert_ray.data.batches import Batch, Examples, Part, collate
from newsbert_ray.data.examples import Clicks, Impressions, Pairs, Titles
from newsbert_ray.data.order import (
    Ints,
    Order,
    Window,
    cut_updates,
    epoch_windows,
    seeded_generator,
    share_examples,
    shuffle_alike,
    shuffle_groups,
    window_generator,
    worker_rows,
)
from newsbert_ray.data.shards import Manifest, Shard, ShardError, Split, TextTable, read_shard, read_texts
from newsbert_ray.methods import TASKS, TaskName

_CACHED_WINDOWS = 4
EVALUATION_TOKENS = 8192
"""Most tokens, padding included, that an encoder reads at once in evaluation."""


@dataclass(frozen=True)
class Update:
    """One update's work for this worker: `parts` to accumulate, of a batch at `step` (from 1 over the whole
    run)."""

    step: int
    epoch: int
    parts: tuple[Batch, ...]


@dataclass(frozen=True)
class TrainingSchedule:
    """The schedule of a run: its task's examples in their training order, over prepared shards."""

    folder: str
    manifest: Manifest
    order: Order
    epochs: int
    train_rows: int | None
    task: TaskName = "topics"
    npratio: int = 4
    history: int = 50
    budget: int = 8192

    def windows(self, epoch: int) -> list[Window]:
        """The windows of `epoch` (from 0), in order."""
        shards = self.manifest.shards("train", self.task)
        quotas = share_examples(shards, self.train_rows)
        return epoch_windows(shards, quotas, seed=self.order.seed, epoch=epoch)

    def steps(self, epoch: int) -> int:
        """Updates of `epoch`."""
        return sum(window.batches(self.order.batch_size) for window in self.windows(epoch))

    def starts(self, window: Window) -> tuple[int, ...]:
        """Where each news shard of a window begins in the table of texts."""
        known = dict(self.manifest.news)
        return tuple(known[shard] for shard in window.shards)

    @property
    def examples(self) -> int:
        """Examples of an epoch."""
        return self.train_rows or self.manifest.examples("train", self.task)

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


_NEEDED: tuple[tuple[Split, str], ...] = (("train", "learn from"), ("validation", "be judged by"))


def make_schedule(
    settings: TrainSettings, manifest: Manifest, *, rank: int = 0, world_size: int = 1
) -> TrainingSchedule:
    """The schedule that a run's settings ask for, as worker `rank` of `world_size` follows it; a batch is cut
    for `settings.workers`, however few there are.

    Raises:
        ShardError: the shards hold nothing to train the task on.
        SettingsError: more training examples asked than there are.
    """
    for split, verb in _NEEDED:
        manifest.require(split, settings.task, folder=settings.data)
        if manifest.examples(split, settings.task) == 0:
            raise ShardError(
                f"{settings.data}: its {split} split has no {TASKS[settings.task].examples} to {verb} "
                "(impressions without labels, or without a click beside a candidate that was not clicked); "
                f"prepare labelled behaviours for {split}"
            )
    accumulate = settings.optimizer.accumulate
    shares = max(settings.workers, world_size)
    order = Order(settings.seed, settings.batch_size, rank, world_size, accumulate, shares)
    schedule = TrainingSchedule(
        settings.data,
        manifest,
        order,
        settings.epochs,
        settings.train_rows,
        task=settings.task,
        npratio=settings.recommendation.npratio,
        history=settings.recommendation.history,
        budget=settings.token_budget,
    )
    share_examples(manifest.shards("train", settings.task), settings.train_rows)
    return schedule


def read_updates(schedule: TrainingSchedule, *, done: int = 0) -> Iterator[Update]:
    """All updates after `done` steps, read in this process."""
    for window, first, skip in schedule.windows_from(done):
        for step, parts in window_parts(schedule, window, first=first, skip=skip):
            yield collate_update(parts, schedule, step=step, epoch=window.epoch)


def window_parts(
    schedule: TrainingSchedule, window: Window, *, first: int, skip: int
) -> Iterator[tuple[int, list[Part]]]:
    """(step, this worker's parts) of a window's updates, leaving out the first `skip`."""
    examples = window_examples(schedule, window)
    generator = window_generator(schedule.order, window)
    arranged = _arrange(examples, schedule.order, generator)
    for index, rows in enumerate(cut_updates(arranged, schedule.order, generator)):
        if index >= skip:
            yield first + index, worker_parts(examples, rows, schedule.order)


def worker_parts(examples: Examples, rows: Ints, order: Order) -> list[Part]:
    """This worker's part of the update over `rows`, in the pieces to accumulate; at least one."""
    texts, tokens = examples.take(rows).count()
    pieces = worker_rows(rows, order, together=examples.together)
    held = {number: piece for number, piece in pieces.items() if len(piece)}
    weight = 1.0 if held else 0.0
    return [
        Part(examples.take(piece), len(rows), texts, tokens, weight, number)
        for number, piece in (held or {order.rank: rows[:1]}).items()
    ]


def collate_update(parts: Sequence[Part], schedule: TrainingSchedule, *, step: int, epoch: int) -> Update:
    """An update's parts as batches."""
    pad_id = schedule.manifest.tokenizer.pad_id
    return Update(step, epoch, tuple(collate(part, pad_id=pad_id, budget=schedule.budget) for part in parts))


def window_examples(schedule: TrainingSchedule, window: Window) -> Examples:
    """The examples of a window's shards, in shard order, with the negatives of its epoch; what was read is
    kept for a process's next run over the same shards."""
    if schedule.task == "topics":
        return _window_titles(schedule.folder, window.shards, window.quotas, schedule.starts(window))
    table = read_texts(schedule.folder, schedule.manifest)
    if schedule.task == "retrieval":
        return _window_pairs(schedule.folder, table, window.shards, window.quotas)
    impressions, chosen = _window_impressions(schedule.folder, window.shards, window.quotas, schedule.history)
    drawing = seeded_generator(schedule.order.seed, window.epoch, window.number + 1, 1)
    return examples.draw_clicks(
        impressions, table, npratio=schedule.npratio, generator=drawing, chosen=chosen
    )


def trained_texts(schedule: TrainingSchedule) -> Ints:
    """Rows of the table of texts that training may encode, ascending; of recommendation every candidate of
    the impressions that clicks are drawn from, whichever become negatives."""
    found: list[npt.NDArray[np.integer]] = [np.zeros(0, np.int64)]
    for window in schedule.windows(0):
        if schedule.task == "recommendation":
            impressions, _ = _window_impressions(
                schedule.folder, window.shards, window.quotas, schedule.history
            )
            found += [impressions.history, impressions.candidates]
            continue
        examples = window_examples(schedule, window)
        assert isinstance(examples, Titles | Pairs)
        found += [examples.rows] if isinstance(examples, Titles) else [examples.queries, examples.texts]
    return np.unique(np.concatenate(found)).astype(np.int64)


def restore_examples(schedule: TrainingSchedule, arrays: Sequence[npt.NDArray[np.integer]]) -> Examples:
    """Examples whose `arrays` travelled here from another process."""
    if schedule.task == "topics":
        return examples.restore_titles(arrays)
    table = read_texts(schedule.folder, schedule.manifest)
    return (examples.restore_clicks if schedule.task == "recommendation" else examples.restore_pairs)(
        arrays, table
    )


def _arrange(examples: Examples, order: Order, generator: np.random.Generator) -> Ints:
    if isinstance(examples, Clicks):
        return shuffle_groups(examples.groups, generator)
    assert isinstance(examples, Titles | Pairs)
    return shuffle_alike(examples.lengths, order, generator)


@lru_cache(maxsize=_CACHED_WINDOWS)
def _window_titles(
    folder: str, shards: tuple[Shard, ...], quotas: tuple[int, ...], starts: tuple[int, ...]
) -> Titles:
    found = []
    for shard, quota, start in zip(shards, quotas, starts, strict=True):
        table = read_shard(folder, shard, examples.TITLE_COLUMNS)
        found.append(examples.titles_of(table, quota=quota, start=start))
    return examples.join_titles(found)


def _window_pairs(folder: str, table: TextTable, shards: tuple[Shard, ...], quotas: tuple[int, ...]) -> Pairs:
    found = []
    for shard, quota in zip(shards, quotas, strict=True):
        found.append(examples.pairs_of(read_shard(folder, shard, examples.PAIR_COLUMNS), table, quota=quota))
    return examples.join_pairs(found, table)


@lru_cache(maxsize=_CACHED_WINDOWS)
def _window_impressions(
    folder: str, shards: tuple[Shard, ...], quotas: tuple[int, ...], history: int
) -> tuple[Impressions, Ints]:
    """A window's impressions, as far as their clicks are drawn, and which of their clicks are."""
    found, chosen, before = [], [], 0
    for shard, quota in zip(shards, quotas, strict=True):
        table = read_shard(folder, shard, examples.CLICK_COLUMNS)
        whole = examples.impressions_of(table, history=history)
        impressions, drawn = examples.choose_clicks(table, whole, quota)
        found.append(impressions)
        chosen.append(before + drawn)
        before += len(examples.find_clicks(impressions)[0])
    return examples.join_impressions(found), np.concatenate(chosen)


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
    number, starts = 0, dict(manifest.news)
    for shard in manifest.splits[split]:
        found = _shard_titles(str(folder), shard, starts[shard])
        rows = np.argsort(found.lengths, kind="stable")
        for start in range(0, len(rows), batch_size):
            if number % world_size == rank:
                part = found.take(rows[start : start + batch_size])
                counted = Part(part, len(part), *part.count())
                yield collate(counted, pad_id=manifest.tokenizer.pad_id, budget=EVALUATION_TOKENS)
            number += 1


def read_impressions(
    folder: str | Path, manifest: Manifest, split: Split, *, history: int
) -> Iterator[tuple[pa.Table, Impressions]]:
    """Each behaviours shard of a split, in the order of the file: its whole table, and the impressions in it.

    Raises:
        ShardError: no behaviours in this split.
    """
    for shard in manifest.require(split, "recommendation", folder=folder):
        table = read_shard(folder, shard)
        yield table, examples.impressions_of(table, history=history)


def read_pairs(folder: str | Path, manifest: Manifest, split: Split) -> Iterator[Pairs]:
    """Each pairs shard of a split, in order.

    Raises:
        ShardError: no pairs in this split.
    """
    table = read_texts(folder, manifest)
    for shard in manifest.require(split, "retrieval", folder=folder):
        yield examples.pairs_of(read_shard(folder, shard, examples.PAIR_COLUMNS), table)


@lru_cache(maxsize=_CACHED_WINDOWS)
def _shard_titles(folder: str, shard: Shard, start: int) -> Titles:
    return examples.titles_of(read_shard(folder, shard, ["label", "tokens"]), start=start)
