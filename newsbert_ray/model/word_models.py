"""One-layer encoders over word embeddings: a BiLSTM (Tang et al. 2019) and NRMS (Wu et al. 2019)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

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
        # cuDNN would like both directions' weights in one piece; it copies them, which costs little.
        warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous")
        self.lstm = nn.LSTM(words.embedding_dim, hidden_size // 2, batch_first=True, bidirectional=True)

    @property
    def layers(self) -> nn.ModuleList:
        """The one layer."""
        return nn.ModuleList([self.lstm])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Word embeddings (B, L, W) and the LSTM's states (B, L, D), 0 at padding."""
        embedded = self.dropout(self.words(input_ids))
        # Packing would wait for the device to count the tokens. Here the second direction reads each text
        # backwards from its own last token, so that neither begins in the padding.
        mirrored = _mirror(attention_mask)[..., None]
        weights = list(self.lstm.parameters())
        half = len(weights) // 2
        there = self._read(embedded, weights[:half])
        back = self._read(embedded.gather(1, mirrored.expand_as(embedded)), weights[half:])
        states = torch.cat([there, back.gather(1, mirrored.expand_as(back))], -1)
        return embedded, self.dropout(states * attention_mask[..., None])

    def _read(self, embedded: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """States (B, L, D / 2) of one direction, from the first position to the last."""
        start = embedded.new_zeros(1, len(embedded), self.lstm.hidden_size)
        states: Tensor = torch.lstm(
            embedded, (start, start), list(weights), True, 1, 0.0, self.training, False, True
        )[0]
        return states


def _mirror(attention_mask: Tensor) -> Tensor:
    """Positions (B, L) that reverse each text's tokens and leave its padding where it is."""
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = attention_mask.sum(-1, keepdim=True) - 1
    return torch.where(positions <= last, last - positions, positions)


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
