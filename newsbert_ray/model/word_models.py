"""One-layer encoders over word embeddings: a BiLSTM (Tang et al. 2019) and NRMS (Wu et al. 2019)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from newsbert_ray.model.encoder import WEIGHTS, Encoder, EncoderError, States, write_encoder
from newsbert_ray.model.pooling import HEAD_SIZE, HEADS, SelfAttention


class WordModel(Encoder):
    """Word embeddings followed by one layer of width D, which the subclass defines."""

    kind: ClassVar[str]
    """`model_type` in the exported config.json."""
    words: nn.Embedding

    def __init__(self, words: nn.Embedding, hidden_size: int, *, dropout: float) -> None:
        """
        Args:
            words: (vocabulary, W) word embeddings, copied.
            hidden_size: D.
            dropout: on the embeddings and on the layer's output.
        """
        nn.Module.__init__(self)
        self.words = copy.deepcopy(words)
        self.dropout = nn.Dropout(dropout)
        self._width = hidden_size

    @property
    def hidden_size(self) -> int:
        """D."""
        return self._width

    @property
    def word_embedding(self) -> nn.Embedding:
        """The word embeddings."""
        return self.words

    def encode(self, input_ids: Tensor, attention_mask: Tensor, *, projections: bool = False) -> States:
        """Hidden states.

        Raises:
            EncoderError: projections are requested, which these models do not have.
        """
        if projections:
            raise EncoderError(f"losses on attention need a Transformer student, not {self.kind}")
        return States(self(input_ids, attention_mask))

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        config = {
            "model_type": self.kind,
            "vocab_size": self.words.num_embeddings,
            "embedding_size": self.words.embedding_dim,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": 1,
        }
        write_encoder(folder, config, self.state_dict())


class RecurrentEncoder(WordModel):
    """Word embeddings and one BiLSTM; its two directions together are D wide, as the teacher is."""

    kind = "newsbert_bilstm"

    def __init__(self, words: nn.Embedding, hidden_size: int, *, dropout: float) -> None:
        """
        Args:
            hidden_size: D, even.
        """
        super().__init__(words, hidden_size, dropout=dropout)
        if hidden_size % 2:
            raise EncoderError(f"a BiLSTM of width {hidden_size}: the width must be even for two directions")
        self.lstm = nn.LSTM(words.embedding_dim, hidden_size // 2, batch_first=True, bidirectional=True)

    @property
    def layers(self) -> nn.ModuleList:
        """The one layer."""
        return nn.ModuleList([self.lstm])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Word embeddings (B, L, W) and the LSTM's states (B, L, D), 0 at padding."""
        embedded = self.dropout(self.words(input_ids))
        lengths = attention_mask.sum(-1).cpu()
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(
            self.lstm(packed)[0], batch_first=True, total_length=input_ids.shape[1]
        )
        return embedded, self.dropout(states)


class NrmsEncoder(WordModel):
    """Word embeddings and one layer of self-attention (NRMS, its section 3.1)."""

    kind = "newsbert_nrms"

    def __init__(self, words: nn.Embedding, *, dropout: float) -> None:
        super().__init__(words, HEADS * HEAD_SIZE, dropout=dropout)
        self.attention = SelfAttention(words.embedding_dim)

    @property
    def layers(self) -> nn.ModuleList:
        """The one layer."""
        return nn.ModuleList([self.attention])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Word embeddings (B, L, W) and the layer's states (B, L, D)."""
        embedded = self.dropout(self.words(input_ids))
        return embedded, self.dropout(self.attention(embedded, attention_mask))


WORD_MODELS = (RecurrentEncoder.kind, NrmsEncoder.kind)


def load_word_model(folder: Path, config: Mapping[str, Any]) -> WordModel:
    """The word model that `save` wrote, in evaluation mode.

    Raises:
        KeyError, OSError, RuntimeError: a file is incomplete.
    """
    from safetensors.torch import load_file

    with torch.device("meta"):
        words = nn.Embedding(config["vocab_size"], config["embedding_size"])
    words = words.to_empty(device="cpu")
    encoder: WordModel
    if config["model_type"] == RecurrentEncoder.kind:
        encoder = RecurrentEncoder(words, config["hidden_size"], dropout=0.0)
    else:
        encoder = NrmsEncoder(words, dropout=0.0)
    encoder.load_state_dict(load_file(folder / WEIGHTS))
    return encoder.eval()
