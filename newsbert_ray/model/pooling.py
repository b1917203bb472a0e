"""Attentive pooling of tokens and of clicked news (NewsBERT 3.1), and the self-attention of NRMS."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

HEADS, HEAD_SIZE = 20, 20
"""NRMS's attention heads (its section 3.2): 400 wide together."""


class AttentivePooling(nn.Module):
    """Tokens to one embedding: a = softmax over tokens of q . tanh(W h + b), then the sum weighted by a."""

    def __init__(self, hidden_size: int, query_size: int) -> None:
        super().__init__()
        self.key = nn.Linear(hidden_size, query_size)
        self.query = nn.Linear(query_size, 1, bias=False)

    def scores(self, hidden: Tensor) -> Tensor:
        """q . tanh(W h + b) of states (..., D), which the softmax turns into weights: (...)."""
        scores: Tensor = self.query(torch.tanh(self.key(hidden))).squeeze(-1)
        return scores

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Pooled states (B, D) of `hidden` (B, L, D); `attention_mask` (B, L) is 1 at real tokens, of which
        each row needs one, and others have weight 0."""
        scores = self.scores(hidden).float().masked_fill(attention_mask == 0, float("-inf"))
        weights = torch.softmax(scores, dim=-1).to(hidden.dtype)
        return torch.bmm(weights.unsqueeze(1), hidden).squeeze(1)


class SelfAttention(nn.Module):
    """NRMS's multi-head self-attention (its Eqs. 1 and 2): no output map, no residual, no norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, HEADS * HEAD_SIZE, bias=False)
        self.key = nn.Linear(width, HEADS * HEAD_SIZE, bias=False)
        self.value = nn.Linear(width, HEADS * HEAD_SIZE, bias=False)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Attended states (B, L, HEADS x HEAD_SIZE) of `states` (B, L, W); `mask` (B, L) is 1 at real
        positions, of which each row needs one, and others are not attended to."""
        query, key, value = (
            projected.view(*projected.shape[:2], HEADS, HEAD_SIZE).transpose(1, 2)
            for projected in (self.query(states), self.key(states), self.value(states))
        )
        attended = scaled_dot_product_attention(query, key, value, attn_mask=mask.bool()[:, None, None, :])
        return attended.transpose(1, 2).flatten(2)
