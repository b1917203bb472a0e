"""Rankings of an encoder as it comes."""

from __future__ import annotations

from typing import cast

import torch

from newsbert_ray.model.heads import ClickHead
from tests.benchmarks.impressions import _Mean


def test_queries_of_zero_give_means() -> None:
    """A text is the mean of its real tokens, with length 1; a user is the mean of the clicked news."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 3, 4, generator=generator)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    top = _Mean(4).eval()
    embedding = top.embed((states,), mask)
    wanted = torch.stack([states[0, :2].mean(0), states[1].mean(0)])
    torch.testing.assert_close(embedding, wanted / wanted.norm(dim=1, keepdim=True))
    users = cast("ClickHead", top.head).encode_users(
        embedding[None].expand(2, 2, 4), torch.tensor([[1, 1], [0, 0]])
    )
    torch.testing.assert_close(users, torch.stack([embedding.mean(0), torch.zeros(4)]))
