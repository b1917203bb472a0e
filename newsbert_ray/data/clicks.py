"""Examples of recommendation: clicks with negatives and histories, from behaviours shards. Knows no model, no
Ray.

"NewsBERT" is Wu et al. 2021 (3.3, Fig. 2). What MIND's lines can hold is settled here:
a history keeps its last clicks, and may be empty; an impression without a click, without labels, or with only
clicked candidates gives no example; a news that is clicked in an impression is never a negative there, even
where it is listed a second time without a click, and one that is listed twice can be drawn once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from newsbert_ray.data.batches import Bucket, ClickChoices, unique_texts
from newsbert_ray.data.order import Ints, draw_examples
from newsbert_ray.data.texts import TextTable
from newsbert_ray.data.titles import flat_lists, gather, offsets_of

COLUMNS = ["impression_id", "history", "candidates", "clicked"]
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
