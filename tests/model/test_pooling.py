"""Attentive pooling: by hand, and independent of padding."""

from __future__ import annotations

import math

import torch

from newsbert_ray.model.pooling import AttentivePooling


def test_by_hand() -> None:
    """a = softmax(q . tanh(W h + b)): with tanh(W h + b) = (0, atanh-free 0.5) shares are 1 : e^(0.5 q)."""
    pooling = AttentivePooling(1, 1)
    with torch.no_grad():
        pooling.key.weight.fill_(math.atanh(0.5))
        pooling.key.bias.zero_()
        pooling.query.weight.fill_(2.0 * math.log(3.0))
    hidden = torch.tensor([[[0.0], [1.0]]])  # scores 0 and log 3: shares 1/4 and 3/4
    torch.testing.assert_close(pooling(hidden, torch.ones(1, 2)), torch.tensor([[0.75]]))


def test_masked_tokens_have_no_weight() -> None:
    """If padding leaked in, a title's embedding would depend on its neighbours in the batch."""
    torch.manual_seed(0)
    pooling = AttentivePooling(4, 3)
    hidden = torch.randn(2, 5, 4)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    changed = torch.where(mask.unsqueeze(-1) == 1, hidden, torch.full_like(hidden, 1e4))
    torch.testing.assert_close(pooling(hidden, mask), pooling(changed, mask))
    torch.testing.assert_close(pooling(hidden[:1, :2], mask[:1, :2]), pooling(hidden, mask)[:1])
