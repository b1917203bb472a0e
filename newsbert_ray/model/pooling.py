"""Attentive pooling of tokens, and of a user's clicked news (NewsBERT 3.1; Yang et al. 2016)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AttentivePooling(nn.Module):
    """Tokens to one embedding: a = softmax over tokens of q . tanh(W h + b), then the sum weighted by a."""

    def __init__(self, hidden_size: int, query_size: int) -> None:
        super().__init__()
        self.key = nn.Linear(hidden_size, query_size)
        self.query = nn.Linear(query_size, 1, bias=False)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Pooled states.

        Args:
            hidden: (B, L, D).
            attention_mask: (B, L) 1 at real tokens; each row needs one.
        Returns:
            (B, D). Masked positions have weight 0.
        """
        scores = self.query(torch.tanh(self.key(hidden))).squeeze(-1)  # (B, L)
        scores = scores.float().masked_fill(attention_mask == 0, float("-inf"))
        weights = torch.softmax(scores, dim=-1).to(hidden.dtype)
        return torch.bmm(weights.unsqueeze(1), hidden).squeeze(1)
