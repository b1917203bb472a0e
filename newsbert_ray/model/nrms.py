"""NRMS (Wu et al. 2019, EMNLP, "Neural News Recommendation with Multi-Head Self-Attention"): self-attention
over a title's words, and over the news that a user clicked."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from newsbert_ray.model.words import WordsEncoder, load_words_encoder

KIND = "newsbert_nrms"
"""`model_type` of its exported config.json."""
HEADS, HEAD_SIZE = 20, 20
"""The authors' own (section 3.2); 400 wide in all."""


class SelfAttention(nn.Module):
    """Multi-head self-attention as NRMS has it (Eqs. 1 and 2): no output map, no residual, no norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, HEADS * HEAD_SIZE, bias=False)
        self.key = nn.Linear(width, HEADS * HEAD_SIZE, bias=False)
        self.value = nn.Linear(width, HEADS * HEAD_SIZE, bias=False)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Attended states.

        Args:
            states: (B, L, W).
            mask: (B, L) 1 where there is one; each row needs one.
        Returns:
            (B, L, HEADS x HEAD_SIZE); masked positions are read by none.
        """
        query, key, value = (
            found.view(*found.shape[:2], HEADS, HEAD_SIZE).transpose(1, 2)
            for found in (self.query(states), self.key(states), self.value(states))
        )
        read = scaled_dot_product_attention(query, key, value, attn_mask=mask.bool()[:, None, None, :])
        return read.transpose(1, 2).flatten(2)


class NrmsEncoder(WordsEncoder):
    """Word embeddings under one layer of self-attention (section 3.1)."""

    kind = KIND
    lacks = "NRMS is none"

    def __init__(self, words: nn.Embedding, *, dropout: float) -> None:
        """
        Args:
            words: (vocabulary, W) word embeddings, copied.
            dropout: of the embeddings, and of what attention gives.
        """
        nn.Module.__init__(self)
        self.words = copy.deepcopy(words)
        self.attention = SelfAttention(words.embedding_dim)
        self.dropout = nn.Dropout(dropout)

    @property
    def layers(self) -> nn.ModuleList:
        """The one layer."""
        return nn.ModuleList([self.attention])

    @property
    def hidden_size(self) -> int:
        """D."""
        return HEADS * HEAD_SIZE

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Word embeddings (B, L, W) and the layer's states (B, L, D)."""
        embedded = self.dropout(self.words(input_ids))
        return embedded, self.dropout(self.attention(embedded, attention_mask))


def load_nrms(folder: Path, config: Mapping[str, Any]) -> NrmsEncoder:
    """What `save` wrote, in evaluation mode.

    Raises:
        KeyError, OSError, RuntimeError: it is not whole.
    """
    return load_words_encoder(folder, config, lambda words: NrmsEncoder(words, dropout=0.0))
