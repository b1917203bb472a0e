"""A student that is no Transformer: one bidirectional LSTM over word embeddings (Tang et al. 2019, 3.1)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from newsbert_ray.model.encoder import EncoderError
from newsbert_ray.model.words import WordsEncoder, load_words_encoder

KIND = "newsbert_bilstm"
"""`model_type` of its exported config.json."""


class RecurrentEncoder(WordsEncoder):
    """Word embeddings and one BiLSTM whose two directions side by side are D wide, as the teacher is."""

    kind = KIND
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
