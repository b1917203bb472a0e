"""Gradients of word embedding tables at the cost of the rows a batch touches, not of the whole vocabulary.

Autograd's dense way allocates and clears a gradient for every word of the vocabulary in every step. Here it
hands over the touched rows alone; they are added into one dense gradient a table that stays, and only they
are cleared again. Adam sees the same dense gradient as ever.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class TableGradients:
    """Keeps one dense gradient for each table; for a learner whose gradients no other worker needs."""

    def __init__(self, tables: Sequence[nn.Embedding]) -> None:
        self.tables = list(tables)
        self._dense: list[Tensor | None] = [None] * len(self.tables)
        self._touched: list[Tensor | None] = [None] * len(self.tables)
        for table in self.tables:
            table.sparse = True

    def clear(self) -> None:
        """Before backward: forget the last step's gradients."""
        for table, dense, touched in zip(self.tables, self._dense, self._touched, strict=True):
            if dense is not None and touched is not None:
                dense.index_fill_(0, touched, 0.0)
            table.weight.grad = None

    def gather(self) -> None:
        """After the last backward: each table's `.grad` becomes the dense gradient."""
        for index, table in enumerate(self.tables):
            sparse = table.weight.grad
            if sparse is None:
                continue
            if self._dense[index] is None:
                self._dense[index] = torch.zeros_like(table.weight)
            dense = self._dense[index]
            assert dense is not None
            touched = sparse._indices()[0]
            dense.index_add_(0, touched, sparse._values())
            self._touched[index] = touched
            table.weight.grad = dense
