"""NRMS (Wu et al. 2019, EMNLP, "Neural News Recommendation with Multi-Head Self-Attention"): self-attention
over a title's words, and over the news that a user clicked."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from newsbert_ray.model.encoder import Encoder, EncoderError, States

KIND = "newsbert_nrms"
"""`model_type` of its exported config.json."""
WEIGHTS = "model.safetensors"
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


class NrmsEncoder(Encoder):
    """Word embeddings under one layer of self-attention (section 3.1)."""

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

    @property
    def word_table(self) -> nn.Embedding:
        """The word embedding table."""
        return self.words

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Word embeddings (B, L, W) and the layer's states (B, L, D)."""
        embedded = self.dropout(self.words(input_ids))
        return embedded, self.dropout(self.attention(embedded, attention_mask))

    def read(self, input_ids: Tensor, attention_mask: Tensor, *, projections: bool = False) -> States:
        """Hidden states; no loss looks into its attention.

        Raises:
            EncoderError: projections are asked for.
        """
        if projections:
            raise EncoderError("losses over attention need a Transformer; NRMS is none")
        return States(self(input_ids, attention_mask))

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        from safetensors.torch import save_file

        config = {
            "model_type": KIND,
            "vocab_size": self.words.num_embeddings,
            "embedding_size": self.words.embedding_dim,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": 1,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        save_file({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, folder / WEIGHTS)


def load_nrms(folder: Path, config: Mapping[str, Any]) -> NrmsEncoder:
    """What `save` wrote, in evaluation mode.

    Raises:
        KeyError, OSError, RuntimeError: it is not whole.
    """
    from safetensors.torch import load_file

    with torch.device("meta"):
        words = nn.Embedding(config["vocab_size"], config["embedding_size"])
    encoder = NrmsEncoder(words.to_empty(device="cpu"), dropout=0.0)
    encoder.load_state_dict(load_file(folder / WEIGHTS))
    return encoder.eval()
