"""Texts -> embeddings by an exported student, as fast as the machine allows: read together, sorted by length,
in buckets without much padding, and what their tokens share made once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from newsbert_ray.data.batches import cut_buckets
from newsbert_ray.data.tokenizer import TitleTokenizer, load_tokenizer
from newsbert_ray.model.encoder import Encoder
from newsbert_ray.model.pair import Top
from newsbert_ray.model.saved import load_student

TOKENS = 2048
"""Tokens that a processor reads at once: what a core's cache holds matters more than a large batch."""
TOKENS_GPU = 1 << 15
"""Tokens that a GPU reads at once: enough to keep it busy."""
GROUP = 8192
"""Texts that are sorted together."""
SHARED = 1 << 17
"""Tokens of texts that share what they have in common: memory (at most 16 D bytes a token) against speed."""
FEW = 64
"""Below so many texts, looking for what they share costs more than it saves."""
Ints = npt.NDArray[np.int64]
Precision = Literal["fp32", "bf16"]


class Arithmetic(NamedTuple):
    """Where an encoder computes, and in which numbers; pooling stays in fp32."""

    device: str = "cpu"
    precision: Precision = "fp32"


PLAIN = Arithmetic()


class TextEncoder:
    """A student with its tokeniser, ready to read texts; use it from one thread."""

    def __init__(
        self,
        encoder: Encoder,
        top: Top,
        tokenizer: TitleTokenizer,
        *,
        longest: int,
        arithmetic: Arithmetic = PLAIN,
    ) -> None:
        kind = torch.bfloat16 if arithmetic.precision == "bf16" else torch.float32
        self.encoder, self.top = encoder.to(arithmetic.device, kind).eval(), top.to(arithmetic.device).eval()
        self.tokenizer, self.longest, self.device = tokenizer, longest, torch.device(arithmetic.device)
        on_cpu = self.device.type == "cpu"
        self._budget = TOKENS if on_cpu else TOKENS_GPU
        self._contextless = Contextless.of(self.encoder) if on_cpu else None

    @property
    def width(self) -> int:
        """D."""
        return self.encoder.hidden_size

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Embeddings (M, D) of texts, in their order."""
        found = np.empty((len(texts), self.width), dtype=np.float32)
        for start in range(0, len(texts), GROUP):
            found[start : start + GROUP] = self._encode(texts[start : start + GROUP])
        return found

    @torch.inference_mode()
    def _encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        ids = list(self.tokenizer.encode(texts, max_tokens=self.longest))
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        order = np.argsort(lengths, kind="stable")
        found = np.empty((len(ids), self.width), dtype=np.float32)
        for cuts in _together(cut_buckets(lengths[order], budget=self._budget), lengths[order]):
            batches = [self._pad([ids[row] for row in order[start:stop].tolist()]) for start, stop in cuts]
            with self._shared(batches) as turns:
                for (start, stop), batch, _ in zip(cuts, batches, turns, strict=True):
                    real = np.arange(batch.shape[1]) < lengths[order[start:stop], None]
                    found[order[start:stop]] = self._read(batch, real.astype(np.int64))
        return found

    def _shared(self, batches: Sequence[Ints]) -> AbstractContextManager[Iterable[None]]:
        """What many texts share is made once, where there are many."""
        if self._contextless is None or sum(map(len, batches)) < FEW:
            return nullcontext([None] * len(batches))
        return self._contextless.remembered(batches)

    def _pad(self, ids: Sequence[Sequence[int]]) -> Ints:
        """Token ids (B, L) of texts in ascending length."""
        padded = np.full((len(ids), len(ids[-1])), self.tokenizer.pad_id, dtype=np.int64)
        for row, one in zip(padded, ids, strict=True):
            row[: len(one)] = one
        return padded

    def _read(self, ids: Ints, real: Ints) -> npt.NDArray[np.float32]:
        given, mask = (torch.from_numpy(array).to(self.device) for array in (ids, real))
        embedding: npt.NDArray[np.float32] = self.top.embed(self.encoder(given, mask), mask).cpu().numpy()
        return embedding


def _together(cuts: Iterable[tuple[int, int]], lengths: Ints) -> Iterator[list[tuple[int, int]]]:
    """Buckets (start, stop) of ascending `lengths`, as many at once as share what is made once."""
    group: list[tuple[int, int]] = []
    tokens = 0
    for start, stop in cuts:
        size = (stop - start) * int(lengths[stop - 1])
        if group and tokens + size > SHARED:
            yield group
            group, tokens = [], 0
        group.append((start, stop))
        tokens += size
    if group:
        yield group


@lru_cache(maxsize=1)
def load_encoder(student: Path, *, arithmetic: Arithmetic = PLAIN, threads: int | None = None) -> TextEncoder:
    """The student in a folder that a run exported, kept for a process's next piece of work.

    Raises:
        EncoderError, TokenizerError: it is not whole.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    encoder, top, described = load_student(student)
    longest = int(described.get("max_tokens") or 512)
    return TextEncoder(encoder, top, load_tokenizer(str(student)), longest=longest, arithmetic=arithmetic)


def weights_hash(student: Path) -> str:
    """SHA-256 of a student's weights: which one it is, wherever it lies."""
    with (student / "model.safetensors").open("rb") as weights:
        return hashlib.file_digest(weights, "sha256").hexdigest()


def best_device() -> str:
    """A GPU where this process has one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


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
