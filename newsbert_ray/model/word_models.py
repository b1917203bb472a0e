"""Encoders over word embeddings: a BiLSTM (Tang et al. 2019), NRMS (Wu et al. 2019), and vectors alone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from newsbert_ray.model.encoder import WEIGHTS, Encoder, EncoderError, States, write_encoder
from newsbert_ray.model.pooling import HEAD_SIZE, HEADS, AttentivePooling, SelfAttention

_TOKENS_AT_ONCE = 1024


class WordModel(Encoder):
    """Word embeddings, and at most one layer of width D, which the subclass defines."""

    kind: ClassVar[str]
    """`model_type` in the exported config.json."""
    layer_names: ClassVar[tuple[str, ...]] = ()
    words: nn.Embedding

    def __init__(self, words: nn.Embedding, hidden_size: int, *, dropout: float) -> None:
        """`words` (vocabulary, W) are copied; `dropout` is on the embeddings and on the layer's output."""
        nn.Module.__init__(self)
        self.words = copy.deepcopy(words)
        self.dropout = nn.Dropout(dropout)
        self._width = hidden_size

    @property
    def layers(self) -> nn.ModuleList:
        return nn.ModuleList([getattr(self, name) for name in self.layer_names])

    @property
    def hidden_size(self) -> int:
        return self._width

    @property
    def word_embedding(self) -> nn.Embedding:
        return self.words

    @property
    def heads(self) -> int:
        """Attention heads, which these models do not have."""
        raise EncoderError(
            f"losses on attention need a Transformer student, not {self.kind.removeprefix('newsbert_')}; set "
            "their weights to 0, or choose another method"
        )

    def encode(self, input_ids: Tensor, attention_mask: Tensor, *, projections: bool = False) -> States:
        """Hidden states; EncoderError for projections, which these models do not have."""
        return States(self(input_ids, attention_mask), (self.heads,) if projections else ())  # type: ignore[arg-type]

    def save(self, folder: Path) -> None:
        config = {
            "model_type": self.kind,
            "vocab_size": self.words.num_embeddings,
            "embedding_size": self.words.embedding_dim,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": len(self.layers),
        }
        write_encoder(folder, config, self.state_dict())


class RecurrentEncoder(WordModel):
    """Word embeddings and one BiLSTM; its two directions together are D wide, as the teacher is."""

    kind = "newsbert_bilstm"
    layer_names = ("lstm",)

    def __init__(self, words: nn.Embedding, hidden_size: int, *, dropout: float) -> None:
        super().__init__(words, hidden_size, dropout=dropout)
        if hidden_size % 2:
            raise EncoderError(f"a BiLSTM of width {hidden_size}: the width must be even for two directions")
        # cuDNN would like both directions' weights in one piece; it copies them, which costs little.
        warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous")
        self.lstm = nn.LSTM(words.embedding_dim, hidden_size // 2, batch_first=True, bidirectional=True)

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
        options = (True, 1, 0.0, self.training, False, True)
        states: Tensor = torch.lstm(embedded, (start, start), list(weights), *options)[0]
        return states


def _mirror(attention_mask: Tensor) -> Tensor:
    """Positions (B, L) that reverse each text's tokens and leave its padding where it is."""
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = attention_mask.sum(-1, keepdim=True) - 1
    return torch.where(positions <= last, last - positions, positions)


class NrmsEncoder(WordModel):
    """Word embeddings and one layer of self-attention (NRMS, its section 3.1)."""

    kind = "newsbert_nrms"
    layer_names = ("attention",)

    def __init__(self, words: nn.Embedding, *, dropout: float) -> None:
        super().__init__(words, HEADS * HEAD_SIZE, dropout=dropout)
        self.attention = SelfAttention(words.embedding_dim)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Word embeddings (B, L, W) and the layer's states (B, L, D)."""
        embedded = self.dropout(self.words(input_ids))
        return embedded, self.dropout(self.attention(embedded, attention_mask))


class StaticEncoder(WordModel):
    """Word vectors without a layer. Those of special tokens stay 0, so they change only a text's length."""

    kind = "newsbert_static"
    special: Tensor

    def __init__(self, words: nn.Embedding, special: Sequence[int] = (), *, dropout: float) -> None:
        """`special`: ids of the tokens that every text has, such as [CLS] and [SEP]."""
        super().__init__(words, words.embedding_dim, dropout=dropout)
        is_special = torch.zeros(words.num_embeddings, dtype=torch.bool)
        is_special[list(special)] = True
        self.register_buffer("special", is_special)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Word vectors (B, L, D), the only level."""
        vectors = self.dropout(self.words(input_ids))
        return (vectors.masked_fill(self.special[input_ids].unsqueeze(-1), 0.0),)

    @torch.no_grad()
    def weighted_vectors(self, pooling: AttentivePooling) -> Tensor:
        """(V, D + 1) in fp32: each token's vector times its weight in attentive pooling, and that weight.

        The weight exp(q . tanh(W e + b)) depends on the token alone, so a text's embedding is the sum of its
        tokens' rows: the first D numbers divided by the last.
        """
        vectors = self.words.weight.float().masked_fill(self.special.unsqueeze(-1), 0.0)
        scores = pooling.scores(vectors)
        weights = (scores - scores.median()).clamp(-60.0, 60.0).exp().unsqueeze(-1)  # a factor cancels out
        return torch.cat([vectors * weights, weights], -1)


@torch.no_grad()
def token_vectors(
    teacher: Encoder, vocabulary: int, *, before: Sequence[int], after: Sequence[int]
) -> Tensor:
    """(vocabulary, D) in fp32: what a teacher makes of each token alone, its last hidden state in a text of
    it only, between the ids of special tokens `before` and `after`.

    Frequent tokens weigh as much as others: attentive pooling learns their weights. On MIND, weights by
    frequency (SIF, Arora et al. 2017) or centring did not help.
    """
    training, device = teacher.training, teacher.word_embedding.weight.device
    teacher.eval()
    parts = []
    for tokens in torch.split(torch.arange(vocabulary, device=device), _TOKENS_AT_ONCE):
        ids = torch.tensor([*before, 0, *after], device=device).repeat(len(tokens), 1)
        ids[:, len(before)] = tokens
        parts.append(teacher(ids, torch.ones_like(ids))[-1][:, len(before)].float())
    teacher.train(training)
    return torch.cat(parts)


def reduce_width(vectors: Tensor, width: int) -> Tensor:
    """Vectors (V, D) on their first `width` principal components; unchanged if they are as narrow."""
    if width >= vectors.shape[1]:
        return vectors
    centred = vectors.double() - vectors.double().mean(0)
    _, axes = torch.linalg.eigh(centred.T @ centred)  # ascending
    axes = axes[:, -width:].flip(-1)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # else each sign is arbitrary
    return torch.matmul(centred, axes).to(vectors.dtype)


WORD_MODELS: Mapping[str, Callable[[nn.Embedding, int], WordModel]] = {
    RecurrentEncoder.kind: partial(RecurrentEncoder, dropout=0.0),
    NrmsEncoder.kind: lambda words, _: NrmsEncoder(words, dropout=0.0),
    StaticEncoder.kind: lambda words, _: StaticEncoder(words, dropout=0.0),
}
"""How to make each kind from its word embeddings and its width."""


def load_word_model(folder: Path, config: Mapping[str, Any]) -> WordModel:
    """The word model that `save` wrote, in evaluation mode; errors as `load_exported`."""
    from safetensors.torch import load_file

    with torch.device("meta"):
        words = nn.Embedding(config["vocab_size"], config["embedding_size"])
    encoder = WORD_MODELS[config["model_type"]](words.to_empty(device="cpu"), config["hidden_size"])
    encoder.load_state_dict(load_file(folder / WEIGHTS))
    return encoder.eval()
