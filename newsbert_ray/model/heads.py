"""Task heads on a news embedding: the topic classifier."""

from __future__ import annotations

from torch import Tensor, nn


class TopicHead(nn.Module):
    """The dense layer from news embedding to topic logits (NewsBERT 3.1)."""

    def __init__(self, hidden_size: int, topics: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, topics)

    def forward(self, news_embedding: Tensor) -> Tensor:
        """(B, D) to logits (B, Y)."""
        logits: Tensor = self.dense(news_embedding)
        return logits
