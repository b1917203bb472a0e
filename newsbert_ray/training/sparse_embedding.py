"""Gradients of word embedding tables at the cost of the rows a batch touches, not of the whole vocabulary.

Autograd's dense way allocates and clears a gradient for every word of the vocabulary in every step. Here it
hands over the touched rows alone; they are added into one dense gradient a table that stays, and only they
are cleared again. Adam sees the same dense gradient as ever. Workers exchange touched rows, not tables.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


class TableGradients:
    """Keeps one dense gradient for each table: this worker's, or the mean over `world_size` of them."""

    def __init__(self, tables: Sequence[nn.Embedding], *, world_size: int = 1) -> None:
        self.tables = list(tables)
        self._world_size = world_size
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
        """After the last backward: each table's `.grad` becomes the dense gradient; all workers call it."""
        for index, table in enumerate(self.tables):
            sparse = table.weight.grad
            if sparse is None:
                continue
            if self._dense[index] is None:
                self._dense[index] = torch.zeros_like(table.weight)
            dense = self._dense[index]
            assert dense is not None
            touched, rows = sparse._indices()[0], sparse._values()
            if self._world_size > 1:
                touched, rows = mean_rows(touched, rows, world_size=self._world_size)
            dense.index_add_(0, touched, rows)
            self._touched[index] = touched
            table.weight.grad = dense


def mean_rows(touched: Tensor, rows: Tensor, *, world_size: int) -> tuple[Tensor, Tensor]:
    """Every worker's rows over the number of workers, in the order of their ranks.

    Args:
        touched: (R,) int64, rows of the table, this worker's own R; one may come several times.
        rows: (R, D) what is added to them.
    Returns:
        The (S,) rows and (S, D) values of all workers, zero rows among them.
    """
    different, inverse = torch.unique(touched, return_inverse=True)
    summed = rows.new_zeros(len(different), rows.shape[1]).index_add_(0, inverse, rows)
    most = torch.tensor([len(different)], device=rows.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    # Shorter ones are filled up with zeros for row 0: gathered tensors must be of one shape.
    short = int(most) - len(different)
    own_touched = nn.functional.pad(different, (0, short))
    own_rows = nn.functional.pad(summed, (0, 0, 0, short)) / world_size
    all_touched = [torch.empty_like(own_touched) for _ in range(world_size)]
    all_rows = [torch.empty_like(own_rows) for _ in range(world_size)]
    dist.all_gather(all_touched, own_touched)
    dist.all_gather(all_rows, own_rows)
    return torch.cat(all_touched), torch.cat(all_rows)
