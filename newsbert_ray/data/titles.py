"""Examples of topic classification: titles and their topics, from news shards. Knows no model, no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from newsbert_ray.data.batches import Bucket, Topics, make_bucket
from newsbert_ray.data.order import Ints, draw_examples
from newsbert_ray.data.texts import TextTable

COLUMNS = ["news_id", "label", "tokens"]


@dataclass(frozen=True)
class Titles:
    """Token ids and labels of many titles: ids flat, title i at offsets[i]:offsets[i + 1]; `rows` are their
    places in the table of texts."""

    tokens: npt.NDArray[np.int32]
    offsets: Ints
    labels: Ints
    rows: Ints
    together: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Ints:
        """Tokens of each title."""
        return np.diff(self.offsets)

    def take(self, rows: Ints) -> Titles:
        """The titles at `rows`, in that order."""
        flat, offsets = gather(self.offsets, rows)
        return Titles(self.tokens[flat], offsets, self.labels[rows], self.rows[rows])

    def count(self) -> tuple[int, int]:
        """Titles, and their tokens."""
        return len(self), len(self.tokens)

    def collate(self, *, pad_id: int, budget: int) -> tuple[tuple[Bucket, ...], Topics]:
        """The titles in their order: a batch's are of like length already, so that one bucket is the rule."""
        table = TextTable(self.tokens, self.offsets)
        pieces = -(-int(self.lengths.max(initial=1)) * len(self) // budget)
        buckets = [
            make_bucket(*table.ids(rows, pad_id=pad_id), rows=self.rows[rows])
            for rows in np.array_split(np.arange(len(self)), min(pieces, len(self)))
        ]
        return tuple(buckets), Topics(torch.from_numpy(self.labels))

    def arrays(self) -> tuple[npt.NDArray[np.integer], ...]:
        """Ids, lengths, labels and rows."""
        return self.tokens, self.lengths, self.labels, self.rows


def restore_titles(arrays: Sequence[npt.NDArray[np.integer]]) -> Titles:
    """The titles whose `arrays` travelled to another process."""
    tokens, lengths, labels, rows = arrays
    return Titles(
        tokens.astype(np.int32), offsets_of(lengths), labels.astype(np.int64), rows.astype(np.int64)
    )


def titles_of(table: pa.Table, *, quota: int | None = None, start: int = 0) -> Titles:
    """The titles of a news shard's columns `tokens` and `label`; with `news_id` too, `quota` of them.

    Args:
        start: the shard's first row in the table of texts.
    """
    rows = np.arange(table.num_rows)
    if quota is not None and quota < table.num_rows:
        rows = draw_examples(table.column("news_id").to_pylist(), quota)
        table = table.take(pa.array(rows))
    tokens, offsets = flat_lists(table.column("tokens"))
    labels = table.column("label").to_numpy().astype(np.int64)
    return Titles(np.asarray(tokens, np.int32), offsets, labels, start + rows)


def join_titles(parts: Sequence[Titles]) -> Titles:
    """Several Titles as one, in order."""
    lengths = [part.lengths for part in parts]
    return Titles(
        np.concatenate([np.zeros(0, np.int32), *(part.tokens for part in parts)]),
        offsets_of(np.concatenate([np.zeros(0, np.int64), *lengths])),
        np.concatenate([np.zeros(0, np.int64), *(part.labels for part in parts)]),
        np.concatenate([np.zeros(0, np.int64), *(part.rows for part in parts)]),
    )


def flat_lists(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.integer], Ints]:
    """A column of lists as all values one after another, and the offsets of each list."""
    whole = column.combine_chunks()
    if isinstance(whole, pa.ChunkedArray):
        whole = pa.concat_arrays(whole.chunks) if whole.num_chunks else pa.array([], type=whole.type)
    offsets = whole.offsets.to_numpy().astype(np.int64)
    if not len(offsets):
        return np.zeros(0, np.int32), np.zeros(1, np.int64)
    return whole.values.to_numpy()[offsets[0] : offsets[-1]], offsets - offsets[0]


def offsets_of(lengths: npt.NDArray[np.integer]) -> Ints:
    """Where each of lists of these lengths begins, and the end."""
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))


def gather(offsets: Ints, rows: Ints) -> tuple[Ints, Ints]:
    """Positions of the values of the lists at `rows` one after another, and their new offsets."""
    lengths = offsets[rows + 1] - offsets[rows]
    new = offsets_of(lengths)
    return np.repeat(offsets[rows] - new[:-1], lengths) + np.arange(new[-1]), new
