"""What encoders of one layer over word embeddings have in common that are no Transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from newsbert_ray.model.encoder import Encoder, EncoderError, States

WEIGHTS = "model.safetensors"
E = TypeVar("E", bound="WordsEncoder")


class WordsEncoder(Encoder):
    """Word embeddings under one layer, D wide; a subclass has the layer."""

    kind: ClassVar[str]
    """`model_type` of its exported config.json."""
    lacks: ClassVar[str]
    """How its lack of attention is said."""
    words: nn.Embedding

    @property
    def word_table(self) -> nn.Embedding:
        """The word embedding table."""
        return self.words

    def read(self, input_ids: Tensor, attention_mask: Tensor, *, projections: bool = False) -> States:
        """Hidden states; there is no attention that a loss looks into.

        Raises:
            EncoderError: projections are asked for.
        """
        if projections:
            raise EncoderError(f"losses over attention need a Transformer; {self.lacks}")
        return States(self(input_ids, attention_mask))

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        from safetensors.torch import save_file

        config = {
            "model_type": self.kind,
            "vocab_size": self.words.num_embeddings,
            "embedding_size": self.words.embedding_dim,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": 1,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        save_file({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, folder / WEIGHTS)


def load_words_encoder(folder: Path, config: Mapping[str, Any], build: Callable[[nn.Embedding], E]) -> E:
    """What `save` wrote, in evaluation mode.

    Args:
        build: makes the encoder of its word table.
    Raises:
        KeyError, OSError, RuntimeError: it is not whole.
    """
    from safetensors.torch import load_file

    with torch.device("meta"):
        words = nn.Embedding(config["vocab_size"], config["embedding_size"])
    encoder = build(words.to_empty(device="cpu"))
    encoder.load_state_dict(load_file(folder / WEIGHTS))
    return encoder.eval()


BILSTM_KIND = "newsbert_bilstm"
"""`model_type` of its exported config.json."""


class RecurrentEncoder(WordsEncoder):
    """Word embeddings and one BiLSTM whose two directions side by side are D wide, as the teacher is."""

    kind = BILSTM_KIND
    lacks = "a BiLSTM has none"

    def __init__(self, words: nn.Embedding, hidden_size: int, *, dropout: float) -> None:
        """
        Args:
            words: (vocabulary, W) word embeddings, copied.
            hidden_size: D, even.
            dropout: of the embeddings, and of the LSTM's output.
        """
        nn.Module.__init__(self)
        if hidden_size % 2:
            raise EncoderError(f"a BiLSTM of width {hidden_size}: its two directions need an even width")
        self._width = hidden_size
        self.words = copy.deepcopy(words)
        self.lstm = nn.LSTM(words.embedding_dim, hidden_size // 2, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)

    @property
    def layers(self) -> nn.ModuleList:
        """The one layer."""
        return nn.ModuleList([self.lstm])

    @property
    def hidden_size(self) -> int:
        """D."""
        return self._width

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Word embeddings (B, L, W) and the LSTM's states (B, L, D), 0 where there is padding."""
        embedded = self.dropout(self.words(input_ids))
        lengths = attention_mask.sum(-1).cpu()
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(
            self.lstm(packed)[0], batch_first=True, total_length=input_ids.shape[1]
        )
        return embedded, self.dropout(states)


def load_recurrent(folder: Path, config: Mapping[str, Any]) -> RecurrentEncoder:
    """What `save` wrote, in evaluation mode.

    Raises:
        KeyError, OSError, RuntimeError: it is not whole.
    """
    return load_words_encoder(
        folder, config, lambda words: RecurrentEncoder(words, config["hidden_size"], dropout=0.0)
    )


NRMS_KIND = "newsbert_nrms"
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

    kind = NRMS_KIND
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
