"""Tables of query, text and clicked (NewsBERT Fig. 3) as a kind of source: the split of each row, and shards
of row numbers. Each different string is tokenised once.

There are two passes over the tables in this process, in constant memory but for 12 bytes a different string.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, compress, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from newsbert_ray.config import PrepareSettings
from newsbert_ray.data import shards, sources
from newsbert_ray.data.shards import SPLITS, Contents, Manifest, Shard, Split, TextWriter, hash_ids
from newsbert_ray.data.sources import BadLine, Fate, PrepareError, Rejected
from newsbert_ray.data.tables import SUFFIXES, Record, Table, check_text, open_table, read_table, table_suffix
from newsbert_ray.data.tokenizer import TitleTokenizer
from newsbert_ray.files import format_size
from newsbert_ray.methods import TaskName

COLUMNS = ("query", "text", "clicked")

SHARD_ROWS = 50_000
_BLOCK_ROWS = 1024  # in memory at once


class Pair(NamedTuple):
    """One row: a query, the text of a news, and whether it was clicked (0 or 1)."""

    query: str
    text: str
    clicked: int


def read_pairs(table: Table) -> Iterator[Record]:
    """Every row of `table` in its order, its values as a Pair; errors are those of `read_table`."""
    return (record.map(_make_pair) for record in read_table(table, COLUMNS))


def _make_pair(query: Any, text: Any, clicked: Any) -> Pair:
    query, text = check_text("query", query), check_text("text", text)
    clicked = clicked.decode("utf-8", "replace") if isinstance(clicked, bytes) else clicked
    if not isinstance(clicked, str | int) or clicked not in ("0", "1", 0, 1):
        raise BadLine(f"label: clicked {repr(clicked)[:40]} is not 0 or 1")
    return Pair(query, text, int(clicked))


class Block(NamedTuple):
    """Neighbouring rows of a table, the good ones among them, and the split of each of these."""

    rows: list[Record]
    pairs: list[Pair]
    fates: sources.Fates


class PairsSource:
    """Tables of pairs as a kind of source.

    One table is split by a hash of the query; of two, the first gives validation; of three, each is a split.
    """

    noun = "pairs"
    task: TaskName = "retrieval"
    max_tokens = 512  # as many as BERT has positions

    def __init__(self, settings: PrepareSettings, workspace: sources.Workspace) -> None:
        self._settings, self._workspace = settings, workspace
        if other := [source for source in settings.source if not table_suffix(source)]:
            raise PrepareError(
                f"source {other[0]}: not a table ({', '.join(SUFFIXES)}), as another source is; prepare "
                "folders of MIND and tables separately"
            )
        tables = [open_table(source, columns=COLUMNS) for source in settings.source]
        order = sources.order_sources([table.path.stem for table in tables])
        self._tables = [(tables[index], role) for index, role, _ in order]
        self.files = [replace(table.source, number=number) for number, (table, _) in enumerate(self._tables)]
        self.columns: dict[str, str | None] = {}
        self.rows: list[int] = []
        self.rejected: list[Rejected] = []
        self._clicks: Counter[tuple[int, int]] = Counter()  # rows by (fate, clicked)
        for file, (_, _, splits) in zip(self.files, order, strict=True):
            workspace.say(f"{file.label}: {format_size(file.bytes)}, for {splits}")

    def assign_rows(self) -> None:
        """Count the rows of each split and list bad ones. PrepareError for too many bad rows, or a split that
        would be empty or have a single class."""
        with (
            (self._workspace.folder / sources.REJECTED).open("w", encoding="utf-8") as listed,
            sources.show_progress(self._workspace.say, "looked through") as advance,
        ):
            for number, file in enumerate(self.files):
                rows, rejected = 0, Rejected()
                for block in self._blocks(number):
                    clicked = (pair.clicked for pair in block.pairs)
                    self._clicks.update(zip(block.fates.tolist(), clicked, strict=True))
                    for line in block.rows:
                        if isinstance(line.values, BadLine):
                            listed.write(rejected.add(file.label, line.number, str(line.values), line.shown))
                    rows += len(block.rows)
                    advance(len(block.rows))
                self.rows.append(rows)
                self.rejected.append(rejected)
                if rejected.counts.total() > self._settings.max_rejected_share * rows:
                    listed.flush()
                    self._workspace.refuse(file.label, rows, rejected, self._settings.max_rejected_share)
        self._require_both_clicks()

    def all_texts(self, *, training_only: bool) -> Iterator[str]:
        """Queries and texts; equal neighbours come once."""
        with sources.show_progress(self._workspace.say, "learned from") as advance:
            for number in range(1 if training_only else len(self._tables)):
                for block in self._blocks(number):
                    advance(len(block.rows))
                    used = (block.fates == Fate.TRAIN) | (not training_only)
                    yield from dict.fromkeys(pair.query for pair in compress(block.pairs, used))
                    yield from dict.fromkeys(pair.text for pair in compress(block.pairs, used))

    def write(self, tokenizer: TitleTokenizer) -> Contents:
        settings = self._settings
        lengths = {"query": settings.query_tokens, "text": settings.max_tokens or self.max_tokens}
        total = sum(self.rows)
        with (
            TextWriter(self._workspace.folder) as texts,
            sources.show_progress(self._workspace.say, "prepared", total=total) as advance,
        ):
            writer = PairsWriter(self._workspace.folder, tokenizer, texts, lengths)
            for number in range(len(self._tables)):
                for block in self._blocks(number):
                    writer.add(number, block)
                    advance(len(block.rows))
                writer.end_table(number)
        counts, clicks = writer.counts, self._clicks
        return Contents(
            texts=texts.describe(),
            pairs=writer.shards,
            statistics={
                "queries": counts["query"],
                "texts": counts["text"],
                "pairs": sum(clicks.values()),
                "clicked": sum(count for (_, clicked), count in clicks.items() if clicked),
                **{
                    f"{what}_per_{kind}": counts[f"{kind} {what}"] / counts[kind]
                    for what in ("words", "tokens")
                    for kind in ("query", "text")
                },
            },
        )

    def summary(self, manifest: Manifest) -> Iterator[str]:
        rows = {split: manifest.rows(split, "retrieval") for split in SPLITS}
        shares = [
            f"{self._clicks[fate, 1] / rows[split]:.1%} of {split}" for fate, split in enumerate(SPLITS)
        ]
        counts = ", ".join(f"{count:,} {split}" for split, count in rows.items())
        yield f"{counts} pairs; clicked: {', '.join(shares)}"
        for name, plural in (("query", "queries"), ("text", "texts")):
            average = manifest.statistics[f"tokens_per_{name}"]
            yield f"{manifest.statistics[plural]:,.0f} different {plural} of {average:.1f} tokens on average"

    def _blocks(self, number: int) -> Iterator[Block]:
        """Table `number` in blocks; queries that differ only in case or blanks are in one split."""
        (table, role), seed = self._tables[number], self._settings.seed
        shares = sources.shares_of(self._settings, sources=len(self._tables))
        records = read_pairs(table)
        while rows := list(islice(records, _BLOCK_ROWS)):
            pairs = [row.values for row in rows if isinstance(row.values, Pair)]
            hashes = hash_ids([" ".join(pair.query.lower().split()) for pair in pairs])
            held_out = sources.split_by_hash(hashes, shares, seed=seed)
            fates = held_out if role is Fate.TRAIN else np.full(len(pairs), role, dtype=np.uint8)
            yield Block(rows, pairs, fates)

    def _require_both_clicks(self) -> None:
        """A split without clicked or without other pairs has no AUC, and teaches nothing."""
        names = ", ".join(file.label for file in self.files)
        for fate, split in enumerate(SPLITS):
            without, clicked = self._clicks[fate, 0], self._clicks[fate, 1]
            if not without and not clicked:
                raise PrepareError(
                    f"{split} would be empty: none of the {sum(self.rows):,} rows of {names} falls into it; "
                    "give more queries, a larger share, or a table of its own"
                )
            if not without or not clicked:
                raise PrepareError(
                    f"{split} would have a single class: {clicked:,} clicked and {without:,} other pairs of "
                    f"{names}; each split needs both"
                )


class PairsWriter:
    """Writes blocks of pairs as shards of about SHARD_ROWS rows of one table and split, and their texts.

    `lengths` are the longest query and text in tokens, special tokens included. `counts`: different queries
    and texts, and the tokens and words of each.
    """

    def __init__(
        self, folder: Path, tokenizer: TitleTokenizer, texts: TextWriter, lengths: dict[str, int]
    ) -> None:
        self.shards: dict[Split, list[Shard]] = {split: [] for split in SPLITS}
        self.counts: Counter[str] = Counter()
        self._folder, self._tokenizer, self._texts = folder, tokenizer, texts
        self._lengths, self._index = lengths, sources.HashIndex()
        self._waiting: dict[Split, list[pa.Table]] = {split: [] for split in SPLITS}
        self._shards_of_table: Counter[Split] = Counter()

    def add(self, table: int, block: Block) -> None:
        columns = {
            "query": self._add_texts("query", [pair.query for pair in block.pairs]),
            "text": self._add_texts("text", [pair.text for pair in block.pairs]),
            "clicked": [pair.clicked for pair in block.pairs],
        }
        rows = pa.table(columns, schema=shards.PAIRS_SCHEMA)
        for fate, split in enumerate(SPLITS):
            self._waiting[split].append(rows.filter(pa.array(block.fates == fate)))
            if sum(len(part) for part in self._waiting[split]) >= SHARD_ROWS:
                self._write(table, split)

    def end_table(self, table: int) -> None:
        for split in SPLITS:
            if any(len(part) for part in self._waiting[split]):
                self._write(table, split)
        self._shards_of_table.clear()

    def _add_texts(self, kind: str, strings: Sequence[str]) -> sources.Rows:
        # A query and a text that are equal may be cut to different lengths.
        rows, new = self._index.add(hash_ids([f"{kind} {string}" for string in strings]))
        ids = list(self._tokenizer.encode([strings[i] for i in new], max_tokens=self._lengths[kind]))
        lengths = np.array([len(one) for one in ids], dtype=np.int64)
        tokens = np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum()))
        self._texts.add(tokens, lengths)
        words = sum(len(strings[i].split()) for i in new)
        self.counts.update({kind: len(lengths), f"{kind} tokens": len(tokens), f"{kind} words": words})
        return rows

    def _write(self, table: int, split: Split) -> None:
        rows = pa.concat_tables(self._waiting[split]).combine_chunks()
        self._waiting[split] = []
        name = f"{split}-pairs-{table:02d}-{self._shards_of_table[split]:05d}.parquet"
        self._shards_of_table[split] += 1
        self.shards[split].append(shards.write_shard(self._folder, name, rows))
