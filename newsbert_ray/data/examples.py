"""Examples of the three tasks: titles with topics, clicks with negatives, pairs of query and text.

They are made of columns of shards, and make batches. Knows no model and no Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from newsbert_ray.data import batches
from newsbert_ray.data.batches import Batch, Bucket, ClickChoices, Ints, PairChoices, Target, Topics
from newsbert_ray.data.shards import TextTable, gather, offsets_of, pad

TITLE_COLUMNS = ["news_id", "label"]
CLICK_COLUMNS = ["impression_id", "history", "candidates", "clicked"]
PAIR_COLUMNS = ["query", "text", "clicked"]

Rows = npt.NDArray[np.integer]
Joined = TypeVar("Joined", "Titles", "Impressions", "Pairs")


@dataclass(frozen=True)
class Examples:
    """Examples of one task, which can be selected and made into a batch. They name texts by their rows of
    `table`. `grouped`: whether neighbours share texts, and so should stay with one worker."""

    table: TextTable
    grouped: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[-1].name))

    @property
    def labelled(self) -> int:
        return len(self)

    def take(self, rows: Ints) -> Self:
        return replace(self, **{one.name: getattr(self, one.name)[rows] for one in fields(self)[1:]})

    def beside(self, table: TextTable, rows: Ints) -> Self:
        """Also the texts `rows` of `table`, without a label; it begins with this one's texts."""
        raise NotImplementedError

    def mentions(self) -> Rows:
        """The row of every text that an example names, again where several do."""
        raise NotImplementedError

    def count(self) -> tuple[int, int]:
        """Mentions of texts, and their tokens."""
        mentions = self.mentions()
        return len(mentions), int(self.table.lengths(mentions).sum())

    def collate(self, *, pad_id: int, budget: int) -> tuple[tuple[Bucket, ...], Target]:
        """Buckets of at most about `budget` tokens, and the target."""
        raise NotImplementedError


class Part(NamedTuple):
    """Examples of one forward pass, and the counts that their Batch carries."""

    examples: Examples
    rows: int
    texts: int
    tokens: int
    weight: float = 1.0
    piece: int = 0
    labelled: int | None = None


def collate(part: Part, *, pad_id: int, budget: int) -> Batch:
    """A part's examples as a Batch, texts padded with `pad_id` to the longest of their bucket."""
    buckets, target = part.examples.collate(pad_id=pad_id, budget=budget)
    return Batch(buckets, target, *part[1:])


@dataclass(frozen=True)
class Titles(Examples):
    """Titles, as (N,) rows of the table of texts, and the (N,) topic of each; -1 where it has no label."""

    rows: Ints
    labels: Ints

    @property
    def lengths(self) -> Ints:
        return self.table.lengths(self.rows)

    @property
    def labelled(self) -> int:
        return int(np.count_nonzero(self.labels >= 0))

    def mentions(self) -> Rows:
        return self.rows

    def beside(self, table: TextTable, rows: Ints) -> Titles:
        """Also the texts `rows` of `table`; like lengths are neighbours then."""
        labels = np.concatenate([self.labels, np.full(len(rows), -1)])
        joined = Titles(table, np.concatenate([self.rows, rows]), labels)
        return joined.take(np.argsort(joined.lengths, kind="stable"))

    def collate(self, *, pad_id: int, budget: int) -> tuple[tuple[Bucket, ...], Topics]:
        """In few buckets: titles of a batch have similar lengths already."""
        pieces = -(-int(self.lengths.max(initial=1)) * len(self) // budget)
        buckets = [
            batches.make_bucket(*self.table.ids(rows, pad_id=pad_id), rows)
            for rows in np.array_split(self.rows, min(pieces, len(self)))
        ]
        return tuple(buckets), Topics(torch.from_numpy(self.labels))


def titles_of(shard: pa.Table, table: TextTable, *, quota: int | None = None, start: int = 0) -> Titles:
    """The titles of a news shard that begins at row `start` of the table of texts; with a `quota` so many of
    those with a label, chosen by `news_id`."""
    labels = shard.column("label").to_numpy().astype(np.int64)
    rows = np.arange(len(labels))
    if quota is not None:
        rows = np.flatnonzero(labels >= 0)
        rows = rows[batches.draw_examples(shard.column("news_id").take(pa.array(rows)).to_pylist(), quota)]
    return Titles(table, start + rows, labels[rows])


@dataclass(frozen=True)
class Impressions:
    """Many impressions; news are rows of the table of texts. Flat: impression i has the `history` from
    history_offsets[i] to history_offsets[i + 1], and likewise the `candidates` by `offsets`. `clicked` is 0
    or 1 for each candidate, -1 where an impression has no labels."""

    history: Rows
    history_offsets: Ints
    candidates: Rows
    offsets: Ints
    clicked: npt.NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def take(self, rows: Ints) -> Impressions:
        read, history_offsets = gather(self.history_offsets, rows)
        offered, offsets = gather(self.offsets, rows)
        return Impressions(
            self.history[read], history_offsets, self.candidates[offered], offsets, self.clicked[offered]
        )


@dataclass(frozen=True)
class Clicks(Examples):
    """Clicks, each with its user's history and its negatives.

    Attributes:
        history, offsets: rows of the table of texts, flat; click i has offsets[i]:offsets[i + 1].
        candidates: (S, C) rows of the table, the clicked one first; -1 where the impression has too few.
        groups: (S,) number of the impression, ascending.
        others: rows of the table of further texts, which no click mentions.
    """

    history: Rows
    offsets: Ints
    candidates: Rows
    groups: Ints
    others: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    grouped: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.candidates)

    def beside(self, table: TextTable, rows: Ints) -> Clicks:
        return replace(self, table=table, others=rows)

    def take(self, rows: Ints) -> Clicks:
        flat, offsets = gather(self.offsets, rows)
        return Clicks(self.table, self.history[flat], offsets, self.candidates[rows], self.groups[rows])

    def mentions(self) -> Rows:
        """The row of every news in histories, then of every candidate, then of every further text."""
        return np.concatenate([self.history, self.candidates[self.candidates >= 0], self.others])

    def collate(self, *, pad_id: int, budget: int) -> tuple[tuple[Bucket, ...], ClickChoices]:
        buckets, positions = batches.unique_texts(self.table, self.mentions(), pad_id=pad_id, budget=budget)
        present = self.candidates >= 0  # (S, C)
        read = len(self.history)
        candidates = np.zeros(present.shape, np.int64)
        candidates[present] = positions[read : read + np.count_nonzero(present)]
        history, mask = pad(positions[:read], np.diff(self.offsets))  # (S, T)
        return buckets, ClickChoices(
            history=torch.from_numpy(history),
            history_mask=torch.from_numpy(mask.astype(np.int64)),
            candidates=torch.from_numpy(candidates),
            candidate_mask=torch.from_numpy(present),
            labels=torch.zeros(len(self), dtype=torch.int64),
        )


def impressions_of(table: pa.Table, *, history: int) -> Impressions:
    """The impressions of a behaviours shard, each with the last `history` clicks of its history."""
    read, read_offsets = flat_lists(table.column("history"))
    starts = np.maximum(read_offsets[:-1], read_offsets[1:] - history)
    lengths = read_offsets[1:] - starts
    offsets = offsets_of(lengths)
    flat = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
    candidates, candidate_offsets = flat_lists(table.column("candidates"))
    clicked = np.full(len(candidates), -1, np.int8)
    labelled = np.repeat(table.column("clicked").is_valid().to_numpy(), np.diff(candidate_offsets))
    clicked[labelled] = table.column("clicked").combine_chunks().flatten().to_numpy()
    return Impressions(read[flat], offsets, candidates, candidate_offsets, clicked)


def find_clicks(impressions: Impressions) -> tuple[Ints, Ints, Ints]:
    """Flat positions of the clicks whose impression has a negative, those of all negatives, and the (I + 1,)
    offsets of each impression's negatives."""
    owner = np.repeat(np.arange(len(impressions)), np.diff(impressions.offsets))
    clicked = impressions.clicked == 1
    # A candidate listed without a click is no negative if the impression lists it with one, too.
    key = owner * (int(impressions.candidates.max(initial=0)) + 1) + impressions.candidates
    negatives = np.flatnonzero((impressions.clicked == 0) & ~np.isin(key, key[clicked]))
    negatives = negatives[np.sort(np.unique(key[negatives], return_index=True)[1])]
    counts = np.bincount(owner[negatives], minlength=len(impressions))
    clicks = np.flatnonzero(clicked & (counts[owner] > 0))
    return clicks, negatives, offsets_of(counts)


def draw_clicks(
    impressions: Impressions, table: TextTable, chosen: Ints, *, npratio: int, generator: np.random.Generator
) -> Clicks:
    """The clicks at the positions `chosen` among all that can be learned from, each with `npratio` negatives
    that `generator` draws: fewer where its impression has fewer, none twice."""
    clicks, negatives, offsets = find_clicks(impressions)
    clicks = clicks[chosen]
    owner = np.searchsorted(impressions.offsets, clicks, side="right") - 1
    candidates = np.full((len(clicks), 1 + npratio), -1, np.int32)
    candidates[:, 0] = impressions.candidates[clicks]
    counts = np.diff(offsets)[owner]
    flat, starts = gather(offsets, owner)  # for each click all negatives of its impression
    number = np.repeat(np.arange(len(clicks)), counts)
    drawn = np.lexsort((generator.random(len(flat)), number))
    rank = np.arange(len(flat)) - np.repeat(starts[:-1], counts)
    kept = rank < npratio
    candidates[number[kept], 1 + rank[kept]] = impressions.candidates[negatives[flat[drawn[kept]]]]
    history, history_offsets = gather(impressions.history_offsets, owner)
    return Clicks(table, impressions.history[history], history_offsets, candidates, owner)


def choose_clicks(table: pa.Table, impressions: Impressions, quota: int) -> tuple[Impressions, Ints]:
    """`quota` of a shard's clicks that can be learned from, by a fixed hash: the impressions that hold them,
    and their positions among these impressions' clicks."""
    clicks = find_clicks(impressions)[0]
    if quota >= len(clicks):
        return impressions, np.arange(len(clicks))
    owner = np.searchsorted(impressions.offsets, clicks, side="right") - 1
    ids = table.column("impression_id").to_pylist()
    within = clicks - impressions.offsets[owner]
    names = [f"{ids[i]}:{position}" for i, position in zip(owner.tolist(), within.tolist(), strict=True)]
    chosen = batches.draw_examples(names, quota)
    kept = np.unique(owner[chosen])
    positions = np.cumsum(np.isin(owner, kept)) - 1
    return impressions.take(kept), positions[chosen]


@dataclass(frozen=True)
class Pairs(Examples):
    """Pairs: rows of the table of texts for query and text, and 1 where the text was clicked, all (S,)."""

    queries: Ints
    texts: Ints
    clicked: Ints

    @property
    def lengths(self) -> Ints:
        """Tokens of each pair's text."""
        return self.table.lengths(self.texts)

    def mentions(self) -> Rows:
        return np.concatenate([self.queries, self.texts])

    def collate(self, *, pad_id: int, budget: int) -> tuple[tuple[Bucket, ...], PairChoices]:
        buckets, positions = batches.unique_texts(self.table, self.mentions(), pad_id=pad_id, budget=budget)
        queries, texts = (torch.from_numpy(half) for half in np.split(positions, 2))
        return buckets, PairChoices(queries, texts, torch.from_numpy(self.clicked))


def pairs_of(shard: pa.Table, table: TextTable, *, quota: int | None = None) -> Pairs:
    """The pairs of a shard; `quota` of them, by a fixed hash of their rows."""
    if quota is not None and quota < shard.num_rows:
        queries, texts = (shard.column(name).to_pylist() for name in ("query", "text"))
        names = [f"{query}:{text}" for query, text in zip(queries, texts, strict=True)]
        shard = shard.take(pa.array(batches.draw_examples(names, quota)))
    return Pairs(table, *(shard.column(name).to_numpy().astype(np.int64) for name in PAIR_COLUMNS))


def join(parts: Sequence[Joined]) -> Joined:
    """Several Titles, Impressions or Pairs as one, in order; the pairs are over one table of texts."""
    columns: dict[str, Any] = {}
    for name in (one.name for one in fields(parts[0])):
        values = [getattr(part, name) for part in parts]
        if name.endswith("offsets"):
            columns[name] = offsets_of(np.concatenate([np.diff(value) for value in values]))
        elif name != "table":
            columns[name] = np.concatenate(values)
    return replace(parts[0], **columns)


def flat_lists(column: pa.ChunkedArray) -> tuple[Rows, Ints]:
    """A column of lists as all values one after another, and the offsets of each list."""
    lists = column.combine_chunks()
    return lists.flatten().to_numpy(), offsets_of(lists.value_lengths().to_numpy())
