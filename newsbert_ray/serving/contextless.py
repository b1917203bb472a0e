"""What an encoder makes of a token before it looks at the others: made once, read by every text that has it.

A BERT's embeddings, and the queries, keys and values of its first layer, depend on a token and its position
alone. Among thousands of titles most such pairs come again, so they are made once and looked up. And no pair
needs a product of its own with the first layer's weights: what enters them is the normalised sum of a word's
vector w and a position's p, so that

    W (g (w + p - mean) / s + h) + c  =  (W g (w - mean w) + W g (p - mean p)) / s + (W h + c)

takes one product a word, one a position, and a scale 1 / s a pair. The same numbers, but for rounding; the
fewer layers, the more it saves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from newsbert_ray.model.encoder import Encoder

_PROJECTED = ("query", "key", "value")


class _Remembered(nn.Module):
    """Stands where a module stood, and gives rows of what that one made, those of the present batch."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table  # (U, D), a row for each different token and position
        self.rows = torch.empty(0)

    def forward(self, *_given: Any, **_named: Any) -> Tensor:
        return self.table.index_select(0, self.rows.flatten()).view(*self.rows.shape, -1)


class Contextless:
    """The modules of a BERT that see one token at a time: its embeddings, its first layer's projections."""

    def __init__(self, encoder: Encoder) -> None:
        backbone = cast("Any", encoder.backbone)
        self._places: list[tuple[Any, str]] = [(backbone, "embeddings")]
        self._places += [(cast("Any", encoder.layers[0]).attention.self, name) for name in _PROJECTED]

    @classmethod
    def of(cls, encoder: Encoder) -> Contextless | None:
        """Those of an encoder; None where it is no BERT."""
        known = type(encoder) is Encoder and encoder.backbone.config.model_type == "bert"
        return cls(encoder) if known and len(encoder.layers) else None

    @contextmanager
    def remembered(self, batches: Sequence[npt.NDArray[np.int64]]) -> Iterator[Iterator[None]]:
        """While this holds, the encoder looks up what it knows of the tokens of some batches.

        Args:
            batches: token ids (B, L); the encoder is to read them in this order, each after one more step of
                what is yielded.
        """
        stride = max(batch.shape[1] for batch in batches)
        keys = [(batch * stride + np.arange(batch.shape[1])).ravel() for batch in batches]
        pairs, inverse = np.unique(np.concatenate(keys), return_inverse=True)
        tables = self._make(torch.from_numpy(pairs // stride), torch.from_numpy(pairs % stride))
        ends = np.cumsum([len(key) for key in keys])[:-1]
        rows = [
            torch.from_numpy(part).view(batch.shape)
            for part, batch in zip(np.split(inverse, ends), batches, strict=True)
        ]
        before = [getattr(parent, name) for parent, name in self._places]
        stands = [_Remembered(table) for table in tables]
        try:
            for (parent, name), stand in zip(self._places, stands, strict=True):
                setattr(parent, name, stand)
            yield _each(stands, rows)
        finally:
            for (parent, name), module in zip(self._places, before, strict=True):
                setattr(parent, name, module)

    @torch.inference_mode()
    def _make(self, tokens: Tensor, positions: Tensor) -> list[Tensor]:
        """Embeddings, queries, keys, values (U, D) of U tokens at their positions."""
        embed, *maps = (getattr(parent, name) for parent, name in self._places)
        norm = embed.LayerNorm
        words, word = torch.unique(tokens, return_inverse=True)
        places = torch.arange(int(positions.max()) + 1)
        of_words = _centred(embed.word_embeddings(words) + embed.token_type_embeddings.weight[0])
        of_places = _centred(embed.position_embeddings(places))
        sums = of_words[word].add_(of_places[positions])
        scale = sums.square().mean(-1, keepdim=True).add_(norm.eps).rsqrt_()
        found = [sums.mul_(scale).mul_(norm.weight).add_(norm.bias)]
        for one in maps:
            weight = one.weight * norm.weight
            whole = F.linear(of_words, weight)[word].add_(F.linear(of_places, weight)[positions])
            found.append(whole.mul_(scale).add_(one(norm.bias)))
        return found


def _centred(vectors: Tensor) -> Tensor:
    return vectors - vectors.mean(-1, keepdim=True)


def _each(stands: Sequence[_Remembered], rows: Sequence[Tensor]) -> Iterator[None]:
    for one in rows:
        for stand in stands:
            stand.rows = one
        yield
