"""Task heads on text embeddings: topic classifier, click prediction, query-text match."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from newsbert_ray.config import SettingsError, UserKind
from newsbert_ray.data.batches import ClickChoices, PairChoices, Topics
from newsbert_ray.methods import TaskName
from newsbert_ray.model.pooling import HEAD_SIZE, HEADS, AttentivePooling, SelfAttention

NO_CHOICE = -1e9
"""Logit of a padded candidate. Finite, because a soft label of 0 times infinity is NaN."""


class Prediction(NamedTuple):
    """Logits (S, Y) and, in recommendation, user embeddings (S, D)."""

    logits: Tensor
    user_embedding: Tensor | None = None


class TopicHead(nn.Module):
    """The dense layer from news embedding to topic logits (NewsBERT 3.1)."""

    def __init__(self, hidden_size: int, topics: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, topics)

    def forward(self, embedding: Tensor, target: Topics) -> Prediction:
        return Prediction(self.dense(embedding))


class ClickHead(nn.Module):
    """User encoder and click predictor (NewsBERT 3.3).

    Attentive pooling over the clicked news, then the inner product with each candidate.
    """

    def __init__(self, hidden_size: int, query_size: int, user: UserKind = "pooling") -> None:
        super().__init__()
        if user == "self_attention" and hidden_size != HEADS * HEAD_SIZE:
            raise SettingsError(
                f"recommendation.user self_attention is {HEADS * HEAD_SIZE} wide and the encoder "
                f"{hidden_size}; set student.kind nrms, or recommendation.user pooling"
            )
        self.attention = SelfAttention(hidden_size) if user == "self_attention" else None
        """Self-attention over the clicked news before pooling (NRMS)."""
        self.user = AttentivePooling(hidden_size, query_size)
        fixed = torch.Generator().manual_seed(0)  # the other weights are drawn as without it
        self.newcomer = nn.Parameter(torch.randn(hidden_size, generator=fixed) / 50)
        """The embedding of a user without a history. Zeros would give all candidates the same score."""

    def encode_users(self, history: Tensor, history_mask: Tensor) -> Tensor:
        """User embeddings (S, D) from those of clicked news (S, T, D); `history_mask` (S, T) is 1 at real
        entries, and a row of zeros gives the learned newcomer."""
        empty = history_mask.sum(-1, keepdim=True) == 0  # (S, 1)
        if self.attention is not None:
            history = self.attention(history, history_mask + empty)
        pooled = self.user(history, history_mask + empty)
        return torch.where(empty, self.newcomer, pooled)

    def forward(self, embedding: Tensor, target: ClickChoices) -> Prediction:
        """News embeddings (M, D) to scores (S, C) of each user's candidates."""
        users = self.encode_users(embedding[target.history], target.history_mask)
        scores = torch.bmm(embedding[target.candidates], users.unsqueeze(-1)).squeeze(-1)
        return Prediction(scores.masked_fill(~target.candidate_mask, NO_CHOICE), users)


class PairHead(nn.Module):
    """Two towers with shared weights (Fig. 3): (query . text) / sqrt(D) - a learned threshold.

    The paper has the inner product only. The division changes no ranking; without it the scores of a wide
    encoder start in the hundreds and training only shrinks them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.zeros(()))

    def scores(self, queries: Tensor, texts: Tensor) -> Tensor:
        """(S, D) and (S, D) to scores (S,); above 0 where a click is more likely than none."""
        products: Tensor = (queries * texts).sum(-1)
        return products / math.sqrt(queries.shape[-1]) - self.threshold

    def forward(self, embedding: Tensor, target: PairChoices) -> Prediction:
        """Text embeddings (M, D) to logits (S, 2) of (no click, click); their softmax is sigmoid(score)."""
        scores = self.scores(embedding[target.queries], embedding[target.texts])
        return Prediction(torch.stack([torch.zeros_like(scores), scores], -1))


def build_head(
    task: TaskName, hidden_size: int, *, query_size: int, topics: int, user: UserKind = "pooling"
) -> nn.Module:
    """A task's head with fresh weights from torch's generator; `user` is for recommendation only."""
    if task == "topics":
        return TopicHead(hidden_size, topics)
    return ClickHead(hidden_size, query_size, user) if task == "recommendation" else PairHead()
