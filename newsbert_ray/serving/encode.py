"""Texts -> embeddings by an exported student, as fast as the machine allows: read together, sorted by length,
in buckets without much padding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from newsbert_ray.data.batches import cut_buckets
from newsbert_ray.data.tokens import TitleTokenizer, load_tokenizer
from newsbert_ray.model.assemble import load_student
from newsbert_ray.model.encoder import Encoder
from newsbert_ray.model.pair import Top

TOKENS = 4096
"""Tokens that the encoder reads at once: what a core's cache holds matters more than a large batch."""


class TextEncoder:
    """A student with its tokeniser, ready to read texts; use it from one thread."""

    def __init__(
        self, encoder: Encoder, top: Top, tokenizer: TitleTokenizer, *, longest: int, device: str = "cpu"
    ) -> None:
        self.encoder, self.top = encoder.to(device).eval(), top.to(device).eval()
        self.tokenizer, self.longest, self.device = tokenizer, longest, torch.device(device)

    @property
    def width(self) -> int:
        """D."""
        return self.encoder.hidden_size

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Embeddings (M, D) of texts, in their order."""
        ids = list(self.tokenizer.encode(texts, max_tokens=self.longest))
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        order = np.argsort(lengths, kind="stable")
        found = np.empty((len(ids), self.width), dtype=np.float32)
        for start, stop in cut_buckets(lengths[order], budget=TOKENS):
            rows = order[start:stop]
            found[rows] = self._read([ids[row] for row in rows.tolist()], lengths[rows])
        return found

    @torch.inference_mode()
    def _read(self, ids: Sequence[Sequence[int]], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        width = int(lengths[-1])
        real = np.arange(width) < lengths[:, None]
        padded = np.full(real.shape, self.tokenizer.pad_id, dtype=np.int64)
        padded[real] = np.concatenate([np.asarray(one, dtype=np.int64) for one in ids])
        given, mask = (torch.from_numpy(array).to(self.device) for array in (padded, real.astype(np.int64)))
        embedding: npt.NDArray[np.float32] = self.top.embed(self.encoder(given, mask), mask).cpu().numpy()
        return embedding


@lru_cache(maxsize=1)
def load_encoder(student: Path, *, device: str = "cpu", threads: int | None = None) -> TextEncoder:
    """The student in a folder that a run exported, kept for a process's next piece of work.

    Raises:
        EncoderError, TokenizerError: it is not whole.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    encoder, top, described = load_student(student)
    longest = int(described.get("max_tokens") or 512)
    return TextEncoder(encoder, top, load_tokenizer(str(student)), longest=longest, device=device)


def best_device() -> str:
    """A GPU where this process has one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
