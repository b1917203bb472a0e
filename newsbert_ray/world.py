"""One worker among several: its rank, its device, and the collective operations between workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

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
        """Whether this worker writes the run's files and prints."""
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
        tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        return dict(zip(values, self.sum_tensor(tensor).tolist(), strict=True))

    def broadcast(self, value: T) -> T:
        """Rank 0's `value` on every worker; every worker must call it."""
        if self.size == 1:
            return value
        values = [value]
        device = self.device if self.device.type == "cuda" else None
        torch.distributed.broadcast_object_list(values, src=0, device=device)
        return values[0]


ONE_WORKER = World()
"""A run without other workers, on the CPU."""
