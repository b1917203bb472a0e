"""What a batch holds: texts to encode, in buckets of like length, and what is asked of them.

A text that several examples of a batch name stands there once, and `uses` says how often it is named: losses
over texts are weighted by it, so that they are those of the batch with every mention encoded separately.
Knows no model, no Ray.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from newsbert_ray.data.shards import TextTable

Ints = npt.NDArray[np.int64]

START_SHARE = 1 / 128
"""What starting one more bucket costs, in padding, as a share of the token budget: a device that likes large
passes is given a large budget, and then gets few buckets."""


class _Moving:
    """A frozen dataclass of tensors that can be sent to a device."""

    def to(self, device: torch.device) -> Self:
        """The same on `device`."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)  # type: ignore[arg-type]
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True)
class Bucket(_Moving):
    """Texts that are encoded together.

    Attributes:
        input_ids: (B, L) int64, padded to the longest text here.
        attention_mask: (B, L) int64, 1 where a token is real.
        uses: (B,) float32, how often the batch names each text; None where once each.
        rows: (B,) int64, each text's place in the table of texts; None where it has none.
    """

    input_ids: Tensor
    attention_mask: Tensor
    uses: Tensor | None = None
    rows: Tensor | None = None


@dataclass(frozen=True)
class Topics(_Moving):
    """What is asked in topic classification: the topic of each text, (B,) int64."""

    labels: Tensor


@dataclass(frozen=True)
class ClickChoices(_Moving):
    """What is asked in recommendation: which of its candidates a user clicked, given what they read before.

    Attributes:
        history: (S, T) int64, positions among the batch's texts; 0 where there is none.
        history_mask: (S, T) int64, 1 where there is one; a row may have none.
        candidates: (S, C) int64, positions among the batch's texts, the clicked one first.
        candidate_mask: (S, C) bool, False where an impression had too few to draw from.
        labels: (S,) int64, all 0.
    """

    history: Tensor
    history_mask: Tensor
    candidates: Tensor
    candidate_mask: Tensor
    labels: Tensor


@dataclass(frozen=True)
class PairChoices(_Moving):
    """What is asked in retrieval: whether a query's text was clicked.

    Attributes:
        queries, texts: (S,) int64, positions among the batch's texts.
        labels: (S,) int64, 0 or 1.
    """

    queries: Tensor
    texts: Tensor
    labels: Tensor


Target = Topics | ClickChoices | PairChoices


@dataclass(frozen=True)
class Batch:
    """Examples for one forward pass: a whole update's, or one worker's or one accumulation's part of it.

    Attributes:
        buckets: the texts; positions in `target` count through them in order.
        target: what is asked.
        rows: examples in the whole update.
        texts: mentions of texts in the whole update.
        tokens: real tokens of all mentions in the whole update.
        weight: 1, or 0 for a stand-in that keeps a worker in step when an update has fewer examples than
            workers.
        piece: number of this part in the update: dropout is drawn from it, whichever worker computes it.
    """

    buckets: tuple[Bucket, ...]
    target: Target
    rows: int
    texts: int
    tokens: int
    weight: float = 1.0
    piece: int = 0

    @property
    def padded_tokens(self) -> int:
        """Tokens that an encoder reads, padding included."""
        return sum(bucket.input_ids.numel() for bucket in self.buckets)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        buckets = tuple(bucket.to(device) for bucket in self.buckets)
        return replace(self, buckets=buckets, target=self.target.to(device))


class Examples(Protocol):
    """Examples of one task: rows that can be taken, counted, sent, and made into buckets and a target."""

    @property
    def together(self) -> bool:
        """Whether neighbours share texts, and so should stay with one worker."""
        ...

    def __len__(self) -> int: ...

    def take(self, rows: Ints) -> Self:
        """The examples at `rows`, in that order."""
        ...

    def count(self) -> tuple[int, int]:
        """Mentions of texts, and their tokens."""
        ...

    def collate(self, *, pad_id: int, budget: int) -> tuple[tuple[Bucket, ...], Target]:
        """Buckets of at most about `budget` tokens, and what is asked."""
        ...

    def arrays(self) -> tuple[npt.NDArray[np.integer], ...]:
        """All that `restore` needs to make the same examples elsewhere, beside the table of texts."""
        ...


@dataclass(frozen=True)
class Part:
    """Examples of one forward pass with the counts that Batch carries."""

    examples: Examples
    rows: int
    texts: int
    tokens: int
    weight: float = 1.0
    piece: int = 0


def collate(part: Part, *, pad_id: int, budget: int) -> Batch:
    """A part's examples as a Batch, texts padded with `pad_id` to the longest of their bucket."""
    buckets, target = part.examples.collate(pad_id=pad_id, budget=budget)
    return Batch(buckets, target, part.rows, part.texts, part.tokens, part.weight, part.piece)


def unique_texts(
    table: TextTable, mentions: npt.NDArray[np.integer], *, pad_id: int, budget: int
) -> tuple[tuple[Bucket, ...], Ints]:
    """Each different text of `mentions` once, in buckets of like length.

    Args:
        mentions: (M,) rows of the table.
    Returns:
        The buckets, and the (M,) position of each mention's text among them.
    """
    different, inverse, uses = np.unique(mentions, return_inverse=True, return_counts=True)
    lengths = table.lengths(different)
    order = np.argsort(lengths, kind="stable")
    position = np.empty(len(order), np.int64)
    position[order] = np.arange(len(order))
    buckets = []
    for start, stop in cut_buckets(lengths[order], budget=budget):
        chosen = order[start:stop]
        ids, mask = table.ids(different[chosen], pad_id=pad_id)
        buckets.append(make_bucket(ids, mask, uses[chosen], rows=different[chosen]))
    return tuple(buckets), position[inverse]


def make_bucket(
    ids: Ints,
    mask: npt.NDArray[np.bool_],
    uses: npt.NDArray[np.integer] | None = None,
    *,
    rows: npt.NDArray[np.integer] | None = None,
) -> Bucket:
    """Arrays as a Bucket."""
    counts = None if uses is None or (uses == 1).all() else torch.from_numpy(uses.astype(np.float32))
    places = None if rows is None else torch.from_numpy(rows.astype(np.int64))
    return Bucket(torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64)), counts, places)


def cut_buckets(lengths: Ints, *, budget: int, start_tokens: int | None = None) -> Iterator[tuple[int, int]]:
    """Cuts of ascending `lengths` into buckets (start, stop) with the least padding for their number.

    The cuts minimise padded tokens plus `start_tokens` a bucket (START_SHARE of the budget by default),
    exactly, by dynamic programming over the different lengths; a bucket of more than `budget` tokens is then
    cut evenly.
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
