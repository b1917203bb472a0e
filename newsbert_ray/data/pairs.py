"""Examples of retrieval: query-text pairs with a click or none, from pairs shards. Knows no model, no Ray.

"NewsBERT" is Wu et al. 2021 (Fig. 3, NewsRetrieval).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from newsbert_ray.data.batches import Bucket, PairChoices, unique_texts
from newsbert_ray.data.order import Ints, draw_examples
from newsbert_ray.data.texts import TextTable

COLUMNS = ["query", "text", "clicked"]


@dataclass(frozen=True)
class Pairs:
    """Pairs: rows of the table of texts for query and text, and 1 where the text was clicked, all (S,)."""

    table: TextTable
    queries: Ints
    texts: Ints
    clicked: Ints
    together: bool = False

    def __len__(self) -> int:
        return len(self.clicked)

    @property
    def lengths(self) -> Ints:
        """Tokens of each pair's text."""
        return self.table.lengths(self.texts)

    def take(self, rows: Ints) -> Pairs:
        """The pairs at `rows`, in that order."""
        return Pairs(self.table, self.queries[rows], self.texts[rows], self.clicked[rows])

    def count(self) -> tuple[int, int]:
        """Mentions of queries and texts, and their tokens."""
        mentions = np.concatenate([self.queries, self.texts])
        return len(mentions), int(self.table.lengths(mentions).sum())

    def collate(self, *, pad_id: int, budget: int) -> tuple[tuple[Bucket, ...], PairChoices]:
        """Each different query and text once, and the pairs over them."""
        mentions = np.concatenate([self.queries, self.texts])
        buckets, places = unique_texts(self.table, mentions, pad_id=pad_id, budget=budget)
        queries, texts = (torch.from_numpy(half) for half in np.split(places, 2))
        return buckets, PairChoices(queries, texts, torch.from_numpy(self.clicked))

    def arrays(self) -> tuple[npt.NDArray[np.integer], ...]:
        """Queries, texts and clicks."""
        return self.queries, self.texts, self.clicked


def restore_pairs(arrays: Sequence[npt.NDArray[np.integer]], table: TextTable) -> Pairs:
    """The pairs whose `arrays` travelled to another process."""
    queries, texts, clicked = (array.astype(np.int64) for array in arrays)
    return Pairs(table, queries, texts, clicked)


def pairs_of(shard: pa.Table, table: TextTable, *, quota: int | None = None) -> Pairs:
    """The pairs of a shard; `quota` of them by a fixed hash of their place."""
    if quota is not None and quota < shard.num_rows:
        names = [f"{q}:{t}" for q, t in zip(*(shard.column(c).to_pylist() for c in COLUMNS[:2]), strict=True)]
        shard = shard.take(pa.array(draw_examples(names, quota)))
    queries, texts, clicked = (shard.column(c).to_numpy().astype(np.int64) for c in COLUMNS)
    return Pairs(table, queries, texts, clicked)


def join_pairs(parts: Sequence[Pairs], table: TextTable) -> Pairs:
    """Several Pairs as one, in order."""
    empty = np.zeros(0, np.int64)
    return Pairs(
        table,
        np.concatenate([empty, *(part.queries for part in parts)]),
        np.concatenate([empty, *(part.texts for part in parts)]),
        np.concatenate([empty, *(part.clicked for part in parts)]),
    )
