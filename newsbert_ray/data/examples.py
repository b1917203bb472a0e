"""Examples of topic classification: titles and their topics, from news shards. Knows no model, no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from newsbert_ray.data.batches import Bucket, ClickChoices, PairChoices, Topics, make_bucket, unique_texts
from newsbert_ray.data.order import Ints, draw_examples
from newsbert_ray.data.shards import TextTable

TITLE_COLUMNS = ["news_id", "label", "tokens"]


@dataclass(frozen=True)
class Titles:
    """Token ids and labels of many titles: ids flat, title i at offsets[i]:offsets[i + 1]; `rows` are their
    places in the table of texts."""

    tokens: npt.NDArray[np.int32]
    offsets: Ints
    labels: Ints
    rows: Ints
    together: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Ints:
        """Tokens of each title."""
        return np.diff(self.offsets)

    def take(self, rows: Ints) -> Titles:
        """The titles at `rows`, in that order."""
        flat, offsets = gather(self.offsets, rows)
        return Titles(self.tokens[flat], offsets, self.labels[rows], self.rows[rows])

    def count(self) -> tuple[int, int]:
        """Titles, and their tokens."""
        return len(self), len(self.tokens)

    def collate(self, *, pad_id: int, budget: int) -> tuple[tuple[Bucket, ...], Topics]:
        """The titles in their order: a batch's are of like length already, so that one bucket is the rule."""
        table = TextTable(self.tokens, self.offsets)
        pieces = -(-int(self.lengths.max(initial=1)) * len(self) // budget)
        buckets = [
            make_bucket(*table.ids(rows, pad_id=pad_id), rows=self.rows[rows])
            for rows in np.array_split(np.arange(len(self)), min(pieces, len(self)))
        ]
        return tuple(buckets), Topics(torch.from_numpy(self.labels))

    def arrays(self) -> tuple[npt.NDArray[np.integer], ...]:
        """Ids, lengths, labels and rows."""
        return self.tokens, self.lengths, self.labels, self.rows


def restore_titles(arrays: Sequence[npt.NDArray[np.integer]]) -> Titles:
    """The titles whose `arrays` travelled to another process."""
    tokens, lengths, labels, rows = arrays
    return Titles(
        tokens.astype(np.int32), offsets_of(lengths), labels.astype(np.int64), rows.astype(np.int64)
    )


def titles_of(table: pa.Table, *, quota: int | None = None, start: int = 0) -> Titles:
    """The titles of a news shard's columns `tokens` and `label`; with `news_id` too, `quota` of them.

    Args:
        start: the shard's first row in the table of texts.
    """
    rows = np.arange(table.num_rows)
    if quota is not None and quota < table.num_rows:
        rows = draw_examples(table.column("news_id").to_pylist(), quota)
        table = table.take(pa.array(rows))
    tokens, offsets = flat_lists(table.column("tokens"))
    labels = table.column("label").to_numpy().astype(np.int64)
    return Titles(np.asarray(tokens, np.int32), offsets, labels, start + rows)


def join_titles(parts: Sequence[Titles]) -> Titles:
    """Several Titles as one, in order."""
    lengths = [part.lengths for part in parts]
    return Titles(
        np.concatenate([np.zeros(0, np.int32), *(part.tokens for part in parts)]),
        offsets_of(np.concatenate([np.zeros(0, np.int64), *lengths])),
        np.concatenate([np.zeros(0, np.int64), *(part.labels for part in parts)]),
        np.concatenate([np.zeros(0, np.int64), *(part.rows for part in parts)]),
    )


def flat_lists(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.integer], Ints]:
    """A column of lists as all values one after another, and the offsets of each list."""
    whole = column.combine_chunks()
    if isinstance(whole, pa.ChunkedArray):
        whole = pa.concat_arrays(whole.chunks) if whole.num_chunks else pa.array([], type=whole.type)
    offsets = whole.offsets.to_numpy().astype(np.int64)
    if not len(offsets):
        return np.zeros(0, np.int32), np.zeros(1, np.int64)
    return whole.values.to_numpy()[offsets[0] : offsets[-1]], offsets - offsets[0]


def offsets_of(lengths: npt.NDArray[np.integer]) -> Ints:
    """Where each of lists of these lengths begins, and the end."""
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))


def gather(offsets: Ints, rows: Ints) -> tuple[Ints, Ints]:
    """Positions of the values of the lists at `rows` one after another, and their new offsets."""
    lengths = offsets[rows + 1] - offsets[rows]
    new = offsets_of(lengths)
    return np.repeat(offsets[rows] - new[:-1], lengths) + np.arange(new[-1]), new


CLICK_COLUMNS = ["impression_id", "history", "candidates", "clicked"]
Rows = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Impressions:
    """Many impressions: news as rows of the table of texts, flat, impression i at offsets[i]:offsets[i + 1].

    `clicked` holds 0 or 1 a candidate, and -1 where an impression carries no labels.
    """

    history: Rows
    history_offsets: Ints
    candidates: Rows
    offsets: Ints
    clicked: npt.NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True)
class Clicks:
    """Clicks, each with its user's history and its negatives.

    Attributes:
        history, offsets: rows of the table of texts, flat; click i has offsets[i]:offsets[i + 1].
        candidates: (S, C) rows of the table, the clicked one first, -1 where there were too few to draw from.
        groups: (S,) number of the impression, ascending.
    """

    table: TextTable
    history: Rows
    offsets: Ints
    candidates: Rows
    groups: Ints
    together: bool = True

    def __len__(self) -> int:
        return len(self.candidates)

    def take(self, rows: Ints) -> Clicks:
        """The clicks at `rows`, in that order."""
        flat, offsets = gather(self.offsets, rows)
        return Clicks(self.table, self.history[flat], offsets, self.candidates[rows], self.groups[rows])

    def mentions(self) -> Rows:
        """All news named, histories first."""
        return np.concatenate([self.history, self.candidates[self.candidates >= 0]])

    def count(self) -> tuple[int, int]:
        """Mentions of news, and their tokens."""
        mentions = self.mentions()
        return len(mentions), int(self.table.lengths(mentions).sum())

    def collate(self, *, pad_id: int, budget: int) -> tuple[tuple[Bucket, ...], ClickChoices]:
        """Each different news once, and the clicks over them."""
        buckets, places = unique_texts(self.table, self.mentions(), pad_id=pad_id, budget=budget)
        drawn = self.candidates >= 0  # (S, C)
        read = len(self.history)
        candidates = np.zeros(drawn.shape, np.int64)
        candidates[drawn] = places[read:]
        lengths = np.diff(self.offsets)
        mask = np.arange(max(1, int(lengths.max(initial=1))))[None, :] < lengths[:, None]  # (S, T)
        history = np.zeros(mask.shape, np.int64)
        history[mask] = places[:read]
        return buckets, ClickChoices(
            history=torch.from_numpy(history),
            history_mask=torch.from_numpy(mask.astype(np.int64)),
            candidates=torch.from_numpy(candidates),
            candidate_mask=torch.from_numpy(drawn),
            labels=torch.zeros(len(self), dtype=torch.int64),
        )

    def arrays(self) -> tuple[npt.NDArray[np.integer], ...]:
        """Histories, their lengths, candidates with their number in front, groups."""
        width = np.array([self.candidates.shape[1]], np.int32)
        flat = np.concatenate([width, self.candidates.ravel()])
        return self.history, np.diff(self.offsets), flat, self.groups


def restore_clicks(arrays: Sequence[npt.NDArray[np.integer]], table: TextTable) -> Clicks:
    """The clicks whose `arrays` travelled to another process."""
    history, lengths, flat, groups = arrays
    candidates = flat[1:].reshape(-1, int(flat[0])).astype(np.int32)
    return Clicks(table, history.astype(np.int32), offsets_of(lengths), candidates, groups.astype(np.int64))


def impressions_of(table: pa.Table, *, history: int) -> Impressions:
    """The impressions of a behaviours shard, each history cut to its last `history` clicks."""
    read, read_offsets = flat_lists(table.column("history"))
    starts = np.maximum(read_offsets[:-1], read_offsets[1:] - history)
    lengths = read_offsets[1:] - starts
    offsets = offsets_of(lengths)
    flat = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
    candidates, candidate_offsets = flat_lists(table.column("candidates"))
    clicked = np.full(len(candidates), -1, np.int8)
    labelled = np.repeat(table.column("clicked").is_valid().to_numpy(), np.diff(candidate_offsets))
    clicked[labelled] = flat_lists(table.column("clicked").drop_null())[0]
    return Impressions(
        np.asarray(read, np.int32)[flat],
        offsets,
        np.asarray(candidates, np.int32),
        candidate_offsets,
        clicked,
    )


def join_impressions(parts: Sequence[Impressions]) -> Impressions:
    """Several Impressions as one, in order."""
    return Impressions(
        np.concatenate([np.zeros(0, np.int32), *(part.history for part in parts)]),
        _join_offsets([part.history_offsets for part in parts]),
        np.concatenate([np.zeros(0, np.int32), *(part.candidates for part in parts)]),
        _join_offsets([part.offsets for part in parts]),
        np.concatenate([np.zeros(0, np.int8), *(part.clicked for part in parts)]),
    )


def find_clicks(impressions: Impressions) -> tuple[Ints, Ints, Ints]:
    """Clicks to learn from, and what may stand against them.

    Returns:
        Positions (flat, among all candidates) of the clicks whose impression has a negative; positions of
        all negatives, in order; and the (I + 1,) offsets of each impression's among these.
    """
    owner = np.repeat(np.arange(len(impressions)), np.diff(impressions.offsets))
    clicked = impressions.clicked == 1
    # A listing without a click is no negative where the same news is clicked in the same impression.
    key = owner * (int(impressions.candidates.max(initial=0)) + 1) + impressions.candidates
    negatives = np.flatnonzero((impressions.clicked == 0) & ~np.isin(key, key[clicked]))
    negatives = negatives[np.sort(np.unique(key[negatives], return_index=True)[1])]
    counts = np.bincount(owner[negatives], minlength=len(impressions))
    clicks = np.flatnonzero(clicked & (counts[owner] > 0))
    return clicks, negatives, offsets_of(counts)


def draw_clicks(
    impressions: Impressions,
    table: TextTable,
    *,
    npratio: int,
    generator: np.random.Generator,
    chosen: Ints | None = None,
) -> Clicks:
    """Every click that can be learned from, with its negatives drawn.

    Args:
        npratio: negatives of a click; fewer where its impression has fewer, none twice.
        generator: draws them.
        chosen: positions among the clicks, of those to keep; all by default.
    """
    clicks, negatives, offsets = find_clicks(impressions)
    if chosen is not None:
        clicks = clicks[chosen]
    owner = np.searchsorted(impressions.offsets, clicks, side="right") - 1
    candidates = np.full((len(clicks), 1 + npratio), -1, np.int32)
    candidates[:, 0] = impressions.candidates[clicks]
    counts = np.diff(offsets)[owner]
    flat, places = gather(offsets, owner)  # for each click all negatives of its impression
    number = np.repeat(np.arange(len(clicks)), counts)
    drawn = np.lexsort((generator.random(len(flat)), number))
    rank = np.arange(len(flat)) - np.repeat(places[:-1], counts)
    kept = rank < npratio
    candidates[number[kept], 1 + rank[kept]] = impressions.candidates[negatives[flat[drawn[kept]]]]
    history, history_offsets = gather(impressions.history_offsets, owner)
    return Clicks(table, impressions.history[history], history_offsets, candidates, owner)


def choose_clicks(table: pa.Table, impressions: Impressions, quota: int) -> tuple[Impressions, Ints]:
    """A shard's `quota` clicks, among those that can be learned from, by a fixed hash.

    Returns:
        The impressions that hold them, and their positions among these impressions' clicks.
    """
    clicks = find_clicks(impressions)[0]
    if quota >= len(clicks):
        return impressions, np.arange(len(clicks))
    owner = np.searchsorted(impressions.offsets, clicks, side="right") - 1
    ids = table.column("impression_id").to_pylist()
    within = clicks - impressions.offsets[owner]
    names = [f"{ids[i]}:{place}" for i, place in zip(owner.tolist(), within.tolist(), strict=True)]
    chosen = draw_examples(names, quota)
    kept = np.unique(owner[chosen])
    place = np.cumsum(np.isin(owner, kept)) - 1
    return _take(impressions, kept), place[chosen]


def _take(impressions: Impressions, rows: Ints) -> Impressions:
    """The impressions at `rows`, in that order."""
    read, history_offsets = gather(impressions.history_offsets, rows)
    offered, offsets = gather(impressions.offsets, rows)
    return Impressions(
        impressions.history[read],
        history_offsets,
        impressions.candidates[offered],
        offsets,
        impressions.clicked[offered],
    )


def _join_offsets(parts: Sequence[Ints]) -> Ints:
    return offsets_of(np.concatenate([np.zeros(0, np.int64), *(np.diff(part) for part in parts)]))


PAIR_COLUMNS = ["query", "text", "clicked"]


@dataclass(frozen=True)
class Pairs:
    """Pairs: rows of the table of texts for query and text, and 1 where the text was clicked, all (S,)."""

    table: TextTable
    queries: Ints
    texts: Ints
    clicked: Ints
    together: bool = False

    def __len__(self) -> int:
        return len(self.clicked)

    @property
    def lengths(self) -> Ints:
        """Tokens of each pair's text."""
        return self.table.lengths(self.texts)

    def take(self, rows: Ints) -> Pairs:
        """The pairs at `rows`, in that order."""
        return Pairs(self.table, self.queries[rows], self.texts[rows], self.clicked[rows])

    def count(self) -> tuple[int, int]:
        """Mentions of queries and texts, and their tokens."""
        mentions = np.concatenate([self.queries, self.texts])
        return len(mentions), int(self.table.lengths(mentions).sum())

    def collate(self, *, pad_id: int, budget: int) -> tuple[tuple[Bucket, ...], PairChoices]:
        """Each different query and text once, and the pairs over them."""
        mentions = np.concatenate([self.queries, self.texts])
        buckets, places = unique_texts(self.table, mentions, pad_id=pad_id, budget=budget)
        queries, texts = (torch.from_numpy(half) for half in np.split(places, 2))
        return buckets, PairChoices(queries, texts, torch.from_numpy(self.clicked))

    def arrays(self) -> tuple[npt.NDArray[np.integer], ...]:
        """Queries, texts and clicks."""
        return self.queries, self.texts, self.clicked


def restore_pairs(arrays: Sequence[npt.NDArray[np.integer]], table: TextTable) -> Pairs:
    """The pairs whose `arrays` travelled to another process."""
    queries, texts, clicked = (array.astype(np.int64) for array in arrays)
    return Pairs(table, queries, texts, clicked)


def pairs_of(shard: pa.Table, table: TextTable, *, quota: int | None = None) -> Pairs:
    """The pairs of a shard; `quota` of them by a fixed hash of their place."""
    if quota is not None and quota < shard.num_rows:
        names = [
            f"{q}:{t}" for q, t in zip(*(shard.column(c).to_pylist() for c in PAIR_COLUMNS[:2]), strict=True)
        ]
        shard = shard.take(pa.array(draw_examples(names, quota)))
    queries, texts, clicked = (shard.column(c).to_numpy().astype(np.int64) for c in PAIR_COLUMNS)
    return Pairs(table, queries, texts, clicked)


def join_pairs(parts: Sequence[Pairs], table: TextTable) -> Pairs:
    """Several Pairs as one, in order."""
    empty = np.zeros(0, np.int64)
    return Pairs(
        table,
        np.concatenate([empty, *(part.queries for part in parts)]),
        np.concatenate([empty, *(part.texts for part in parts)]),
        np.concatenate([empty, *(part.clicked for part in parts)]),
    )
