"""World: one worker needs no process group, and work is divided without gaps."""

from __future__ import annotations

import torch

from newsbert_ray.world import World


def test_every_item_has_one_owner() -> None:
    """An item that two workers compute counts twice in a metric; one that none computes is missing."""
    workers = [World(rank, 3) for rank in range(3)]
    assert [[worker.owns(item) for worker in workers].count(True) for item in range(7)] == [1] * 7
    assert [worker.is_rank_zero for worker in workers] == [True, False, False]


def test_one_worker_needs_no_group() -> None:
    """A run in one process must not wait for others."""
    world, values = World(), torch.tensor([1.0, 2.0])
    assert world.sum_values({"a": 1.5}) == {"a": 1.5}
    assert world.sum_tensor(values) is values
    assert world.broadcast("value") == "value"
