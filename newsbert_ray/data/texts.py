"""The table of texts: every news, query or article that rows name, as token ids, mapped into memory so that
all processes of a machine share one copy. Knows no row and no torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from newsbert_ray.data.shards import Manifest, Part, ShardError, Texts

TOKENS = "texts-tokens.npy"
OFFSETS = "texts-offsets.npy"

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TextTable:
    """Token ids of many texts: ids flat, text i at offsets[i]:offsets[i + 1]."""

    tokens: npt.NDArray[np.int32]
    offsets: Ints

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self, rows: npt.NDArray[np.integer]) -> Ints:
        """Tokens of each of `rows`, shape as `rows`."""
        found: Ints = self.offsets[rows + 1] - self.offsets[rows]
        return found

    def ids(self, rows: npt.NDArray[np.integer], *, pad_id: int) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Texts side by side.

        Args:
            rows: (B,) rows of the table.
        Returns:
            (B, L) ids padded with `pad_id` to the longest of them, and (B, L) whether a token is real.
        """
        lengths = self.lengths(rows)
        mask = np.arange(int(lengths.max(initial=1)))[None, :] < lengths[:, None]
        ids = np.full(mask.shape, pad_id, np.int64)
        flat = np.repeat(self.offsets[rows], lengths) + np.arange(int(lengths.sum()))
        flat -= np.repeat(np.cumsum(lengths) - lengths, lengths)
        ids[mask] = self.tokens[flat]
        return ids, mask


class TextWriter:
    """Writes a table's files, a block of texts at a time, in constant memory but for 8 bytes a text."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._count = 0
        self._file = (folder / TOKENS).open("wb")
        self._write_header()

    def add(self, tokens: npt.NDArray[np.int32], lengths: npt.NDArray[np.integer]) -> None:
        """Append texts: their ids one after another, and how many each has."""
        self._file.write(np.ascontiguousarray(tokens, "<i4").tobytes())
        self._count += len(tokens)
        self._lengths.append(lengths.astype(np.int32))

    def close(self) -> Texts:
        """End both files and describe them."""
        self._file.seek(0)
        self._write_header()
        self._file.close()
        lengths = np.concatenate([np.zeros(1, np.int32), *self._lengths])
        np.save(self._folder / OFFSETS, np.cumsum(lengths, dtype="<i8"), allow_pickle=False)
        return Texts(
            rows=len(lengths) - 1,
            tokens=_describe(self._folder / TOKENS),
            offsets=_describe(self._folder / OFFSETS),
        )

    def _write_header(self) -> None:
        # A fixed width, because the count is known at the end only.
        header = f"{{'descr': '<i4', 'fortran_order': False, 'shape': ({self._count:<16d},), }}"
        padded = header.ljust(117) + "\n"
        self._file.write(b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded.encode("latin1"))


def read_texts(folder: str | Path, manifest: Manifest) -> TextTable:
    """The table of texts of prepared shards, mapped, not read; its files' hashes are looked at once a
    process.

    Raises:
        ShardError: missing, cut short or altered.
    """
    return _read(str(folder), manifest.texts)


@lru_cache(maxsize=2)
def _read(folder: str, texts: Texts) -> TextTable:
    arrays = []
    for part in (texts.tokens, texts.offsets):
        path = Path(folder) / part.file
        try:
            if _describe(path) != part:
                raise ShardError(f"{path}: damaged; prepare again with --overwrite true")
            arrays.append(np.load(path, mmap_mode="r", allow_pickle=False))
        except FileNotFoundError as error:
            raise ShardError(f"{path}: missing; prepare again with --overwrite true") from error
        except ValueError as error:
            raise ShardError(
                f"{path}: no array of numbers ({error}); prepare again with --overwrite true"
            ) from error
    return TextTable(arrays[0], np.array(arrays[1]))


def _describe(path: Path) -> Part:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Part(file=path.name, bytes=path.stat().st_size, sha256=digest)
