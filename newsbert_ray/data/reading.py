"""Training updates and evaluation batches, read from the shards; one worker among several. Knows no Ray."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from newsbert_ray.config import TrainSettings
from newsbert_ray.data import batches, examples, shards
from newsbert_ray.data.batches import Batch, Ints, Order, Window
from newsbert_ray.data.examples import Clicks, Examples, Impressions, Pairs, Part, Titles, collate
from newsbert_ray.data.shards import Manifest, Shard, ShardError, Split, TextTable, read_shard, read_texts
from newsbert_ray.methods import TASKS, TaskName

_CACHED_WINDOWS = 16
EVALUATION_TOKENS = 8192
"""Tokens, padding included, that an encoder reads at once in evaluation."""

T = TypeVar("T")
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """This worker's rank (from 0), the number of workers, and the device this worker computes on."""

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    def owns(self, index: int) -> bool:
        """Whether work item `index` is computed by this worker; items are dealt out in turn."""
        return index % self.size == self.rank

    def sum_tensor(self, values: Tensor) -> Tensor:
        """`values` summed over all workers, in place; every worker must call it.

        The sum is exact where each entry is non-zero on one worker only.
        """
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values

    def sum_values(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value summed over all workers; every worker must call it with the same keys."""
        if self.size == 1:
            return dict(values)
        tensor = torch.tensor(list(values.values()), dtype=torch.float64)  # a GPU would have to be waited for
        return dict(zip(values, self.sum_tensor(tensor).tolist(), strict=True))

    def broadcast(self, value: T) -> T:
        """Rank 0's `value` on every worker; every worker must call it."""
        if self.size == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0, device=_CPU)
        return values[0]


ONE_WORKER = World()
"""A run without other workers, on the CPU."""


@dataclass(frozen=True)
class Update:
    """This worker's part of an update: batches to accumulate. `step` counts from 1 over the run."""

    step: int
    epoch: int
    parts: tuple[Batch, ...]


@dataclass(frozen=True)
class TrainingSchedule:
    """The order in which a run with these settings reads its task's examples from prepared shards.

    `order` decides the batches, and this worker's part of each.
    """

    settings: TrainSettings = field(hash=False)
    manifest: Manifest = field(hash=False)
    order: Order

    def windows(self, epoch: int) -> list[Window]:
        shards = self.manifest.shards("train", self.settings.task)
        quotas = batches.share_examples(shards, self.settings.train_rows)
        return batches.epoch_windows(shards, quotas, seed=self.order.seed, epoch=epoch)

    def steps(self, epoch: int) -> int:
        """Updates of a whole `epoch`, one pass over the labelled examples."""
        return sum(window.batches(self.order.batch_size) for window in self.windows(epoch))

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The last step of each epoch; `steps` may cut the last epoch."""
        ends: list[int] = []
        limit = self.settings.steps
        for done in itertools.accumulate(map(self.steps, itertools.count())):
            ends.append(done if limit is None else min(done, limit))
            if len(ends) == self.settings.epochs if limit is None else done >= limit:
                break
        return tuple(ends)

    def evaluations(self, every: int | None) -> frozenset[int]:
        """Steps after which validation is evaluated: all `every` steps and the last of the run.

        Also the last of each epoch, unless the run has a length in updates and `every` is given.
        """
        multiples = range(every, self.total_steps + 1, every) if every else ()
        return frozenset((*multiples, *(self.ends[-1:] if every and self.settings.steps else self.ends)))

    @property
    def total_steps(self) -> int:
        return self.ends[-1]

    def windows_from(self, done: int) -> Iterator[tuple[Window, int, int]]:
        """(window, its first step, updates to skip in it) for everything after `done` steps."""
        first_step = 1
        for epoch in range(len(self.ends)):
            for window in self.windows(epoch):
                next_step = first_step + window.batches(self.order.batch_size)
                if next_step - 1 > done and first_step <= self.total_steps:
                    yield window, first_step, max(0, done + 1 - first_step)
                first_step = next_step


def make_schedule(settings: TrainSettings, manifest: Manifest, world: World = ONE_WORKER) -> TrainingSchedule:
    """The schedule of a run with these settings, for one worker of `world`; ShardError or SettingsError where
    the shards hold nothing, or too little, to train or evaluate the task on.

    Batches are cut for `settings.workers` workers, even if there are fewer.
    """
    needed: dict[Split, str] = {"train": "train on", "validation": "evaluate"}
    for split, verb in needed.items():
        manifest.require(split, settings.task, folder=settings.data)
        if manifest.examples(split, settings.task) == 0:
            raise ShardError(
                f"{settings.data}: its {split} split has no {TASKS[settings.task].examples} to {verb} "
                "(its impressions have no labels, or none has both a click and a candidate that was not "
                f"clicked); prepare labelled behaviours for {split}"
            )
    accumulate = settings.optimizer.accumulate
    shares = max(settings.workers, world.size)
    beside = unlabelled_size(settings, manifest)
    labelled = settings.batch_size - beside
    order = Order(settings.seed, labelled, world.rank, world.size, accumulate, shares, beside)
    batches.share_examples(manifest.shards("train", settings.task), settings.train_rows)
    return TrainingSchedule(settings, manifest, order)


def unlabelled_size(settings: TrainSettings, manifest: Manifest) -> int:
    """Texts without labels in a batch: none where the shards, by their manifest, leave none."""
    used = manifest.examples("train") if settings.train_rows is None else settings.train_rows
    clicks = settings.task == "recommendation"
    some = settings.unlabelled is not None or clicks or used < manifest.rows("train")
    return settings.unlabelled_size if some else 0


def read_updates(schedule: TrainingSchedule, *, done: int = 0) -> Iterator[Update]:
    """All updates after `done` steps, read in this process."""
    for window, first_step, skip in schedule.windows_from(done):
        for step, parts in window_parts(schedule, window, first_step=first_step, skip=skip):
            yield collate_update(parts, schedule, step=step, epoch=window.epoch)


def window_parts(
    schedule: TrainingSchedule, window: Window, *, first_step: int, skip: int
) -> Iterator[tuple[int, list[Part]]]:
    """(step, this worker's parts) of a window's updates, without the first `skip` and those after the end."""
    examples = window_examples(schedule, window)
    generator = batches.seeded_generator(schedule.order.seed, window.epoch, window.number + 1)
    if isinstance(examples, Clicks):
        arranged = batches.shuffle_groups(examples.groups, generator)
    else:
        assert isinstance(examples, Titles | Pairs)
        arranged = batches.shuffle_alike(examples.lengths, schedule.order, generator)
    beside = _arrange_beside(schedule, window, first_step)
    for index, (rows, more) in enumerate(batches.cut_updates(arranged, schedule.order, generator, beside)):
        if index >= skip and first_step + index <= schedule.total_steps:
            texts = Texts(training_texts(schedule), more) if len(more) else None
            yield first_step + index, worker_parts(examples, rows, schedule.order, texts)


def worker_parts(examples: Examples, rows: Ints, order: Order, more: Texts | None = None) -> list[Part]:
    """This worker's pieces of the update over `rows` and the texts `more`, which have no labels; at least one
    piece, of weight 0 where none is its own."""
    whole, pieces = examples.take(rows), batches.worker_rows(rows, order, grouped=examples.grouped)
    own = {number: examples.take(piece) for number, piece in pieces.items() if more or len(piece)}
    if more is not None:
        whole = whole.beside(*more)
        others = batches.worker_rows(more.rows, order)
        own = {number: piece.beside(more.table, others[number]) for number, piece in own.items()}
    counts = whole.count()
    own = {number: piece for number, piece in own.items() if piece.count()[0]}
    weight = 1.0 if own else 0.0
    return [
        Part(piece, len(whole), *counts, weight, number, whole.labelled)
        for number, piece in (own or {order.rank: examples.take(rows[:1])}).items()
    ]


def collate_update(parts: Sequence[Part], schedule: TrainingSchedule, *, step: int, epoch: int) -> Update:
    pad_id, budget = schedule.manifest.tokenizer.pad_id, schedule.settings.token_budget
    return Update(step, epoch, tuple(collate(part, pad_id=pad_id, budget=budget) for part in parts))


def window_examples(schedule: TrainingSchedule, window: Window) -> Examples:
    """The examples of a window's shards, in shard order, with negatives drawn for its epoch.

    What is read from the shards is cached for the process's later epochs and runs.
    """
    folder, shards, quotas = schedule.settings.data, window.shards, window.quotas
    table = read_texts(folder, schedule.manifest)
    if schedule.settings.task == "topics":
        starts = dict(schedule.manifest.news)
        pieces = ((shard, quota, starts[shard]) for shard, quota in zip(shards, quotas, strict=True))
        return _window_titles(folder, table, tuple(pieces))
    if schedule.settings.task == "retrieval":
        columns = [read_shard(folder, shard, examples.PAIR_COLUMNS) for shard in shards]
        parts = zip(columns, quotas, strict=True)
        return examples.join([examples.pairs_of(shard, table, quota=quota) for shard, quota in parts])
    recommendation = schedule.settings.recommendation
    impressions, chosen = _window_impressions(folder, shards, quotas, recommendation.history)
    generator = batches.seeded_generator(schedule.order.seed, window.epoch, window.number + 1, 1)
    npratio = recommendation.npratio
    return examples.draw_clicks(impressions, table, chosen, npratio=npratio, generator=generator)


def trained_texts(schedule: TrainingSchedule) -> Ints:
    """Rows of `training_texts` that training may encode, ascending.

    In recommendation these include every candidate that may be drawn as a negative. Of the texts without
    labels a short run reads only the first.
    """
    mentioned, more = _mentioned_texts(schedule), schedule.order.beside
    if not more:
        return mentioned
    rows = unlabelled_texts(schedule).rows
    count = more * sum(map(schedule.steps, range(len(schedule.ends))))
    if count < len(rows):
        rows = batches.cycle_rows(rows, 0, count, seed=schedule.order.seed)
    return np.union1d(mentioned, rows)


def _mentioned_texts(schedule: TrainingSchedule) -> Ints:
    """Rows of the table of texts that examples mention, ascending."""
    texts: list[npt.NDArray[np.integer]] = [np.zeros(0, np.int64)]
    for window in schedule.windows(0):
        if schedule.settings.task == "recommendation":
            impressions = _window_impressions(
                schedule.settings.data, window.shards, window.quotas, schedule.settings.recommendation.history
            )[0]
            texts += [impressions.history, impressions.candidates]
        else:
            texts.append(window_examples(schedule, window).mentions())
    return np.unique(np.concatenate(texts)).astype(np.int64)


class Texts(NamedTuple):
    """Rows of a table of texts."""

    table: TextTable
    rows: Ints


def training_texts(schedule: TrainingSchedule) -> TextTable:
    """The table of texts, continued by those of `unlabelled`."""
    if schedule.order.beside and schedule.settings.unlabelled is not None:
        return unlabelled_texts(schedule).table
    return read_texts(schedule.settings.data, schedule.manifest)


@lru_cache(maxsize=2)
def unlabelled_texts(schedule: TrainingSchedule) -> Texts:
    """The texts without labels: train news that no example mentions, and the train news of `unlabelled`;
    ShardError where there is none, or the other shards have another tokeniser.

    No text that validation or test has too, and none of `unlabelled` that these shards have: by their tokens,
    as far as both keep them.
    """
    manifest, table = schedule.manifest, read_texts(schedule.settings.data, schedule.manifest)
    folder = schedule.settings.unlabelled or schedule.settings.data
    other = shards.read_manifest(folder) if schedule.settings.unlabelled else manifest
    shards.require_tokenizer(other, manifest, folder=folder)
    longest = min(int(one.settings.get("max_tokens") or 512) for one in (manifest, other))

    def begins(text: npt.NDArray[np.integer]) -> bytes:
        return text[: longest - 1].tobytes()

    train = manifest.rows("train")
    held_out = table.split(np.arange(train, train + manifest.rows("validation") + manifest.rows("test")))
    hidden, rows = set(map(begins, held_out)), np.setdiff1d(np.arange(train), _mentioned_texts(schedule))
    rows = rows[[begins(text) not in hidden for text in table.split(rows)]] if len(rows) else rows
    if schedule.settings.unlabelled is not None:
        other.require("train", "topics", folder=folder)
        known = set(map(begins, table.split(np.arange(len(table)))))
        texts = read_texts(folder, other).split(np.arange(other.rows("train")))
        further = [text for text in texts if begins(text) not in known]
        rows = np.concatenate([rows, np.arange(len(further)) + len(table)])
        lengths = np.array([len(text) for text in further], np.int64)
        offsets = shards.offsets_of(np.concatenate([np.diff(table.offsets), lengths]))
        table = TextTable(np.concatenate([table.tokens, *further]), offsets)
    if not len(rows):
        raise ShardError(f"{schedule.settings.data}: no text is left for unlabelled_share; set it to 0")
    return Texts(table, rows)


@dataclass(frozen=True)
class SplitData:
    """One split of prepared shards for evaluation; `history`: how many of a user's last clicks are used."""

    folder: Path
    manifest: Manifest
    split: Split
    task: TaskName = "topics"
    history: int = 50

    @classmethod
    def of(cls, settings: TrainSettings, manifest: Manifest, split: Split) -> Self:
        return cls(Path(settings.data), manifest, split, settings.task, settings.recommendation.history)

    def batches(self, size: int, world: World = ONE_WORKER) -> Iterator[Batch]:
        """Every title once over all workers, similar lengths together. Workers may differ by one batch."""
        number, starts, table = 0, dict(self.manifest.news), read_texts(self.folder, self.manifest)
        for shard in self.manifest.splits[self.split]:
            titles = _window_titles(str(self.folder), table, ((shard, None, starts[shard]),))
            rows = np.argsort(titles.lengths, kind="stable")
            for start in range(0, len(rows), size):
                if world.owns(number):
                    batch = titles.take(rows[start : start + size])
                    part = Part(batch, len(batch), *batch.count())
                    yield collate(part, pad_id=self.manifest.tokenizer.pad_id, budget=EVALUATION_TOKENS)
                number += 1

    def impressions(self) -> Iterator[tuple[pa.Table, Impressions]]:
        """Each behaviours shard in the order of the file, whole and as impressions; ShardError if none."""
        for shard in self.manifest.require(self.split, "recommendation", folder=self.folder):
            table = read_shard(self.folder, shard)
            yield table, examples.impressions_of(table, history=self.history)

    def news_rows(self) -> Ints:
        """Rows of the table of texts that occur in histories or candidates, ascending."""
        occurs = np.zeros(self.manifest.texts.rows, np.bool_)
        for _, impressions in self.impressions():
            occurs[impressions.history] = True
            occurs[impressions.candidates[impressions.candidates >= 0]] = True
        return np.flatnonzero(occurs)

    def pairs(self) -> Iterator[Pairs]:
        """Each pairs shard, in order; ShardError if there is none."""
        table = read_texts(self.folder, self.manifest)
        for shard in self.manifest.require(self.split, "retrieval", folder=self.folder):
            yield examples.pairs_of(read_shard(self.folder, shard, examples.PAIR_COLUMNS), table)


def _arrange_beside(schedule: TrainingSchedule, window: Window, first_step: int) -> Ints:
    """The texts without labels for a window's updates, arranged by length as its titles are."""
    more = schedule.order.beside
    if not more:
        return np.zeros(0, np.int64)
    texts, count = unlabelled_texts(schedule), window.batches(schedule.order.batch_size) * more
    rows = batches.cycle_rows(texts.rows, (first_step - 1) * more, count, seed=schedule.order.seed)
    return rows[batches.sort_pools(texts.table.lengths(rows), more)]


@lru_cache(maxsize=_CACHED_WINDOWS)
def _window_titles(
    folder: str, table: TextTable, pieces: tuple[tuple[Shard, int | None, int], ...]
) -> Titles:
    """The titles of shards, each with a quota and its first row of the table of texts."""
    parts = []
    for shard, quota, start in pieces:
        columns = read_shard(folder, shard, examples.TITLE_COLUMNS)
        parts.append(examples.titles_of(columns, table, quota=quota, start=start))
    return examples.join(parts)


@lru_cache(maxsize=_CACHED_WINDOWS)
def _window_impressions(
    folder: str, shards: tuple[Shard, ...], quotas: tuple[int, ...], history: int
) -> tuple[Impressions, Ints]:
    """The impressions of a window that hold its chosen clicks, and these clicks' positions among all."""
    parts, chosen, before = [], [], 0
    for shard, quota in zip(shards, quotas, strict=True):
        table = read_shard(folder, shard, examples.CLICK_COLUMNS)
        whole = examples.impressions_of(table, history=history)
        impressions, positions = examples.choose_clicks(table, whole, quota)
        parts.append(impressions)
        chosen.append(before + positions)
        before += len(examples.find_clicks(impressions)[0])
    return examples.join(parts), np.concatenate(chosen)
