"""Batches: texts to encode, in buckets of similar length, and the target of the task.

A text that several examples of a batch mention is in it once, and `uses` counts its mentions. Losses over
texts are weighted by it, so that they equal those of a batch in which every mention is encoded separately.
Knows no model and no Ray.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from newsbert_ray.data.shards import TextTable

Ints = npt.NDArray[np.int64]

START_SHARE = 1 / 128
"""Cost of one more bucket, in tokens of padding, as a share of the token budget. A device that is fast with
large batches has a large budget, and so gets few buckets."""


class _Tensors:
    """A frozen dataclass of tensors that can be copied to a device."""

    def to(self, device: torch.device) -> Self:
        """The same on `device`; a GPU copies from pinned memory while it computes."""
        pin = device.type == "cuda"
        tensors = {
            field.name: (value.pin_memory() if pin and not value.is_cuda else value).to(
                device, non_blocking=True
            )
            for field in fields(self)  # type: ignore[arg-type]
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **tensors)  # type: ignore[type-var]


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
    """Target of retrieval: whether a query's text was clicked.

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
        target: of the task.
        rows: examples in the whole update.
        texts: mentions of texts in the whole update.
        tokens: real tokens of all mentions in the whole update.
        weight: 1, or 0 for a placeholder that a worker computes when an update has fewer examples than
            workers.
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
        """The same batch on `device`."""
        buckets = tuple(bucket.to(device) for bucket in self.buckets)
        return replace(self, buckets=buckets, target=self.target.to(device))


def unique_texts(
    table: TextTable, mentions: npt.NDArray[np.integer], *, pad_id: int, budget: int
) -> tuple[tuple[Bucket, ...], Ints]:
    """Each different text of `mentions` once, in buckets of similar length.

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
    of_table = None if rows is None else torch.from_numpy(rows.astype(np.int64))
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
