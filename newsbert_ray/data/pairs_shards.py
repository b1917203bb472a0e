"""Pairs of query and text -> shards of row numbers and the table of texts, each different string tokenised
once. Knows no file format and no settings."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from newsbert_ray.data.shards import PAIRS_SCHEMA, SPLITS, Shard, Split, Texts, TextWriter
from newsbert_ray.data.split import Fates, Hashes, hash_ids, is_known
from newsbert_ray.data.tables import Pair
from newsbert_ray.data.tokenizer import TitleTokenizer

SHARD_ROWS = 50_000

Rows = npt.NDArray[np.int32]


class TextIndex:
    """The row of every different string in the table of texts, by its 64-bit hash: 12 bytes a string."""

    def __init__(self) -> None:
        self._hashes: Hashes = np.zeros(0, dtype=np.uint64)
        self._rows: Rows = np.zeros(0, dtype=np.int32)

    def place(self, strings: Sequence[str]) -> tuple[Rows, list[int]]:
        """Each string's row, and the positions of those that are new, whose rows follow in that order."""
        found, first, inverse = np.unique(hash_ids(strings), return_index=True, return_inverse=True)
        at = np.searchsorted(self._hashes, found)
        known = is_known(found, self._hashes)
        new = np.flatnonzero(~known)
        new_in_order = new[np.argsort(first[new])]
        rows = np.empty(len(found), dtype=np.int32)
        rows[known] = self._rows[at[known]]
        rows[new_in_order] = len(self._rows) + np.arange(len(new))
        self._hashes = np.insert(self._hashes, at[new], found[new])
        self._rows = np.insert(self._rows, at[new], rows[new])
        return rows[inverse], first[new_in_order].tolist()


class PairsWriter:
    """Writes blocks of pairs: shards of about SHARD_ROWS rows of one table and split, and the table of texts.

    `counts`: different queries and texts, and the tokens of each kind. `query_tokens` and `text_tokens` are
    the longest of each, special tokens included.
    """

    def __init__(
        self, folder: Path, tokenizer: TitleTokenizer, *, query_tokens: int, text_tokens: int
    ) -> None:
        self.shards: dict[Split, list[Shard]] = {split: [] for split in SPLITS}
        self.counts: Counter[str] = Counter()
        self._folder, self._tokenizer = folder, tokenizer
        self._longest = {"query": query_tokens, "text": text_tokens}
        self._index, self._texts = TextIndex(), TextWriter(folder)
        self._waiting: dict[Split, list[pa.Table]] = {split: [] for split in SPLITS}
        self._index_in_table: Counter[Split] = Counter()

    def add(self, table: int, pairs: Sequence[Pair], fates: Fates) -> None:
        """Pairs of table number `table`, with the split of each."""
        queries = self._place("query", [pair.query for pair in pairs])
        texts = self._place("text", [pair.text for pair in pairs])
        clicked = pa.array([pair.clicked for pair in pairs], pa.int8())
        rows = pa.Table.from_arrays([pa.array(queries), pa.array(texts), clicked], schema=PAIRS_SCHEMA)
        for fate, split in enumerate(SPLITS):
            self._waiting[split].append(rows.filter(pa.array(fates == fate)))
            if sum(len(part) for part in self._waiting[split]) >= SHARD_ROWS:
                self._write(table, split)

    def end_table(self, table: int) -> None:
        """Write what still waits of table number `table`."""
        for split in SPLITS:
            if any(len(part) for part in self._waiting[split]):
                self._write(table, split)
        self._index_in_table.clear()

    def close(self) -> Texts:
        """End the table of texts and describe it."""
        return self._texts.close()

    def _place(self, kind: str, strings: Sequence[str]) -> Rows:
        # A query and a text that are equal may be cut to different lengths.
        rows, new = self._index.place([f"{kind} {string}" for string in strings])
        ids = list(self._tokenizer.encode([strings[i] for i in new], max_tokens=self._longest[kind]))
        lengths = np.array([len(one) for one in ids], dtype=np.int64)
        tokens = np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum()))
        self._texts.add(tokens, lengths)
        words = sum(len(strings[i].split()) for i in new)
        self.counts.update({kind: len(lengths), f"{kind} tokens": len(tokens), f"{kind} words": words})
        return rows

    def _write(self, table: int, split: Split) -> None:
        rows = pa.concat_tables(self._waiting[split]).combine_chunks()
        self._waiting[split] = []
        sink = pa.BufferOutputStream()
        pq.write_table(rows, sink, compression="zstd")
        content = sink.getvalue().to_pybytes()
        name = f"{split}-pairs-{table:02d}-{self._index_in_table[split]:05d}.parquet"
        self._index_in_table[split] += 1
        (self._folder / name).write_bytes(content)
        self.shards[split].append(
            Shard(
                file=name,
                rows=len(rows),
                bytes=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
                examples=len(rows),
            )
        )
