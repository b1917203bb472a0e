"""Gradients of word embeddings at the cost of a batch's words, not of the whole vocabulary.

Autograd's dense gradient allocates and clears a row for every word of the vocabulary in every step. Here
autograd returns the touched rows only. They are added into one dense gradient per embedding that is kept
between steps, and only they are cleared again. Adam sees the same dense gradient as before. Workers exchange
touched rows, not whole embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SparseEmbeddingGradients:
    """The dense gradient of each embedding: this worker's, or the mean over `world_size` workers."""

    def __init__(self, embeddings: Sequence[nn.Embedding], *, world_size: int = 1) -> None:
        self.embeddings = list(embeddings)
        self.world_size = world_size
        self._dense: list[Tensor | None] = [None] * len(self.embeddings)
        self._touched: list[Tensor | None] = [None] * len(self.embeddings)
        self._padding = [embedding.padding_idx for embedding in self.embeddings]
        for embedding in self.embeddings:
            embedding.sparse = True
            embedding.padding_idx = None  # autograd would wait for the device to count its rows; see `gather`

    def clear(self) -> None:
        """Before backward: clear the last step's gradients."""
        for embedding, dense, touched in zip(self.embeddings, self._dense, self._touched, strict=True):
            if dense is not None and touched is not None:
                dense.index_fill_(0, touched, 0.0)
            embedding.weight.grad = None

    def gather(self) -> None:
        """After the last backward: set each `.grad` to the dense gradient. Every worker must call it."""
        for index, embedding in enumerate(self.embeddings):
            sparse = embedding.weight.grad
            if sparse is None:
                continue
            if self._dense[index] is None:
                self._dense[index] = torch.zeros_like(embedding.weight)
            dense = self._dense[index]
            assert dense is not None
            touched, rows = sparse._indices()[0], sparse._values()
            if self.world_size > 1:
                touched, rows = mean_rows(touched, rows, world_size=self.world_size)
            dense.index_add_(0, touched, rows)
            if (padding := self._padding[index]) is not None:
                dense[padding].zero_()
            self._touched[index] = touched
            embedding.weight.grad = dense


def mean_rows(touched: Tensor, rows: Tensor, *, world_size: int) -> tuple[Tensor, Tensor]:
    """All workers' gradient rows divided by the number of workers, in rank order.

    Args:
        touched: (R,) int64, this worker's row numbers; a row may occur several times.
        rows: (R, D) gradients of these rows.
    Returns:
        (S,) row numbers and (S, D) gradients of all workers; some of them are zero.
    """
    unique, inverse = torch.unique(touched, return_inverse=True)
    summed = rows.new_zeros(len(unique), rows.shape[1]).index_add_(0, inverse, rows)
    longest = torch.tensor([len(unique)], device=rows.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    # all_gather needs equal shapes: pad with zero gradients for row 0.
    padding = int(longest) - len(unique)
    padded_touched = nn.functional.pad(unique, (0, padding))
    padded_rows = nn.functional.pad(summed, (0, 0, 0, padding)) / world_size
    all_touched = [torch.empty_like(padded_touched) for _ in range(world_size)]
    all_rows = [torch.empty_like(padded_rows) for _ in range(world_size)]
    dist.all_gather(all_touched, padded_touched)
    dist.all_gather(all_rows, padded_rows)
    return torch.cat(all_touched), torch.cat(all_rows)
