"""Tables of query, text and clicked (NewsBERT Fig. 3) as a kind of source: .tsv, .csv, .jsonl or .parquet ->
rows, the split of each, and shards of row numbers. Each different string is tokenised once.

A .tsv has no quoting (as MIND's files), a .csv the usual one; both begin with a header. Other columns are
ignored. Lines are read one by one, because Arrow's text readers stop at the first damaged one. There are two
passes over the tables in this process, in constant memory but for 12 bytes a different string.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, compress, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from newsbert_ray.config import PrepareSettings
from newsbert_ray.data import sources
from newsbert_ray.data.shards import PAIRS_SCHEMA, SPLITS, Manifest, Shard, Split, TextWriter, write_shard
from newsbert_ray.data.sources import (
    REJECTED,
    BadLine,
    Contents,
    PrepareError,
    Rejected,
    SourceFile,
    Workspace,
    parse_chunk,
    read_chunk,
    show_progress,
)
from newsbert_ray.data.split import (
    Fate,
    Fates,
    Hashes,
    Shares,
    describe_role,
    hash_ids,
    held_out,
    is_known,
    order_sources,
    role_of,
    split_by_hash,
)
from newsbert_ray.data.tokenizer import TitleTokenizer
from newsbert_ray.files import first_line, format_size, sha256_of
from newsbert_ray.methods import TaskName

COLUMNS = ("query", "text", "clicked")
SUFFIXES = (".tsv", ".csv", ".jsonl", ".parquet")

SHARD_ROWS = 50_000
_BLOCK_ROWS, _BLOCK_CHARACTERS = 2048, 16 << 20
_BUFFER_BYTES = 1 << 20
_EXPECTED = ", ".join(COLUMNS)
_SURROGATE = re.compile("[\ud800-\udfff]")
_TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")

Rows = npt.NDArray[np.int32]


class Pair(NamedTuple):
    """One row: a query, the text of a news, and whether it was clicked (0 or 1)."""

    query: str
    text: str
    clicked: int


class TableRow(NamedTuple):
    """A row, or the reason why it cannot be used; its line or row number (from 1) and, if bad, its text."""

    number: int
    shown: str
    row: Pair | BadLine


@dataclass(frozen=True)
class PairsTable:
    """A table that was read once and has the columns; `names` are all its columns, `modified` its time stamp
    then."""

    path: Path
    source: SourceFile
    modified: int
    names: tuple[str, ...] = ()

    @property
    def suffix(self) -> str:
        """Its format."""
        return self.path.suffix.lower()


def is_pairs_table(path: str | Path) -> bool:
    """Whether `path` is named like a table."""
    return Path(path).suffix.lower() in SUFFIXES


def open_table(source: str) -> PairsTable:
    """Hash a table and find its columns.

    Raises:
        PrepareError: no such file, no table, or one that lacks a column.
    """
    path = Path(source).expanduser()
    if not is_pairs_table(path):
        raise PrepareError(
            f"source {source}: not a table ({', '.join(SUFFIXES)}), as another source is; prepare folders of "
            "MIND and tables separately"
        )
    if not path.is_file():
        raise PrepareError(f"source {source}: no such file; give a table with the columns {_EXPECTED}")
    folder, modified = path.absolute().parent.name, path.stat().st_mtime_ns
    if path.suffix.lower() == ".parquet":
        hashed = SourceFile(folder, path.name, path.stat().st_size, sha256_of(path), ())
    else:
        hashed = sources.read_through(path, folder=folder)
    table = PairsTable(path, hashed, modified)
    names = _find_columns(table)
    _require_columns(table, names)
    return replace(table, names=tuple(names))


def read_pairs(table: PairsTable) -> Iterator[TableRow]:
    """Every row of `table` in its order; a bad one with the reason, `kind: details`.

    Raises:
        PrepareError: the file was altered since it was opened, or a Parquet file is damaged inside.
    """
    if table.suffix == ".parquet":
        yield from _read_parquet(table)
        return
    if table.suffix == ".jsonl":
        yield from _read_lines(table, _parse_json)
        return
    indices = [table.names.index(name) for name in COLUMNS]

    def pick(record: Sequence[str]) -> Pair:
        if len(record) != len(table.names):
            raise BadLine(f"columns: {len(record)} found, {len(table.names)} expected")
        return _make_pair(*(record[index] for index in indices))

    if table.suffix == ".tsv":
        rows = _read_lines(table, lambda line: pick(line.split("\t") if line else []))
    else:
        rows = (_table_row(number, ",", record, pick) for number, record in _csv_records(table))
    yield from islice(rows, 1, None)


def _read_lines(table: PairsTable, parse: Callable[[str], Pair]) -> Iterator[TableRow]:
    for chunk in table.source.chunks:
        for number, (shown, row) in enumerate(parse_chunk(chunk, parse), chunk.first_line):
            yield TableRow(number, shown, row)


def _table_row(
    number: int, separator: str, record: Sequence[Any] | BadLine, make: Callable[[Sequence[Any]], Pair]
) -> TableRow:
    if isinstance(record, BadLine):
        return TableRow(number, "", record)
    try:
        return TableRow(number, "", make(record))
    except BadLine as bad:
        shown = (v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in record)
        return TableRow(number, separator.join(shown), bad)


def _read_parquet(table: PairsTable) -> Iterator[TableRow]:
    number = 0
    try:
        with pq.ParquetFile(table.path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            for batch in file.iter_batches(256, columns=list(COLUMNS), use_threads=False):
                columns = [_values(batch.column(name)) for name in COLUMNS]
                for values in zip(*columns, strict=True):
                    number += 1
                    yield _table_row(number, "\t", values, lambda row: _make_pair(*row))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise PrepareError(
            f"{table.source.label}: damaged after row {number:,} ({first_line(error)}); write it again"
        ) from error
    if table.path.stat().st_mtime_ns != table.modified or table.path.stat().st_size != table.source.bytes:
        raise sources.changed(table.source.label)


def _find_columns(table: PairsTable) -> list[str]:
    """The names of a table's columns."""
    if table.suffix == ".parquet":
        return _parquet_columns(table)
    if not table.source.bytes:
        raise PrepareError(f"{table.source.label}: empty; the columns {_EXPECTED} expected")
    if table.suffix == ".jsonl":
        return _json_columns(table)
    if table.suffix == ".csv":
        header = next((record for _, record in _csv_records(table)), BadLine("columns: 0 found"))
    else:
        header = next(row for _, row in parse_chunk(table.source.chunks[0], lambda line: line.split("\t")))
    if isinstance(header, BadLine):
        raise PrepareError(f"{table.source.label}:1: no header ({header}); the columns {_EXPECTED} expected")
    return header


def _parquet_columns(table: PairsTable) -> list[str]:
    try:
        schema = pq.read_schema(table.path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise PrepareError(
            f"{table.source.label}: no readable Parquet file ({first_line(error)}); write it again"
        ) from error
    for field in schema:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        is_text = str(kind) in _TEXT_TYPES
        is_flag = is_text or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
        if field.name in COLUMNS and not (is_flag if field.name == "clicked" else is_text):
            expected = "0 or 1" if field.name == "clicked" else "text"
            raise PrepareError(
                f"{table.source.label}: column {field.name} holds {field.type}, {expected} expected"
            )
    return list(schema.names)


def _json_columns(table: PairsTable) -> list[str]:
    """Keys of the first objects, as many as it takes to find every column."""
    names: dict[str, None] = {}
    for chunk in table.source.chunks:
        for number, (_, row) in enumerate(parse_chunk(chunk, _parse_object), chunk.first_line):
            if isinstance(row, dict):
                names.update(dict.fromkeys(row))
            if set(COLUMNS) <= names.keys() or number >= 1000:
                return list(names)
    return list(names)


def _require_columns(table: PairsTable, names: Sequence[str]) -> None:
    missing = [name for name in COLUMNS if name not in names]
    twice = [name for name in COLUMNS if names.count(name) > 1]
    if not missing and not twice:
        return
    # A line of MIND or of a binary file is long and useless to a reader.
    shown = ", ".join(repr(name[:40]) for name in names[:8]) + (", ..." if len(names) > 8 else "")
    fault = f"no column {', '.join(missing)}" if missing else f"column {', '.join(twice)} is there twice"
    where = "" if table.suffix in (".jsonl", ".parquet") else " in the first line"
    raise PrepareError(
        f"{table.source.label}: {fault}; found {shown or 'none'}, expected {_EXPECTED}{where} (of MIND "
        "give the folder)"
    )


def _csv_records(table: PairsTable) -> Iterator[tuple[int, list[str] | BadLine]]:
    """Every record with the number of its first line; damage in one ends with its line."""
    overlong: list[int] = []
    reader = csv.reader(_csv_lines(table, overlong), strict=True)
    while True:
        start = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines = f" in lines {start} to {reader.line_num}" if reader.line_num > start else ""
            yield start, BadLine(f"csv: {error}{lines}")
            continue
        if overlong and start <= overlong[-1] <= reader.line_num:
            yield start, BadLine(f"columns: line of more than {sources.CHUNK_BYTES:,} bytes")
        else:
            yield start, record


def _csv_lines(table: PairsTable, overlong: list[int]) -> Iterator[str]:
    """Lines with their ends. Bytes that are not UTF-8 become lone surrogates; overlong lines are empty, and
    their numbers are added to `overlong`."""
    for chunk in table.source.chunks:
        content = read_chunk(chunk)
        if chunk.overlong:
            overlong.append(chunk.first_line)
            yield "\n"
            continue
        content = content.removeprefix(b"\xef\xbb\xbf") if chunk.offset == 0 else content
        yield from io.StringIO(content.decode("utf-8", "surrogateescape"), newline="\n")


def _parse_object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadLine(f"json: {error}") from error
    if not isinstance(row, dict):
        raise BadLine(f"json: {type(row).__name__} found, an object expected")
    return row


def _parse_json(line: str) -> Pair:
    row = _parse_object(line)
    for name in COLUMNS:
        if name not in row:
            raise BadLine(f"columns: {name} is missing")
    return _make_pair(*(row[name] for name in COLUMNS))


def _make_pair(query: Any, text: Any, clicked: Any) -> Pair:
    return Pair(_check_text("query", query), _check_text("text", text), _check_click(clicked))


def _check_text(name: str, value: Any) -> str:
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = value[error.start]
            raise BadLine(f"encoding: byte 0x{byte:02x} of {name} is not UTF-8") from error
    if value is None or (isinstance(value, str) and (not value or value.isspace())):
        raise BadLine(f"{name}: empty")
    if not isinstance(value, str):
        raise BadLine(f"{name}: {type(value).__name__} found, text expected")
    if "\0" in value:
        raise BadLine(f"encoding: NUL in {name}")
    if not value.isascii() and (half := _SURROGATE.search(value)):
        raise BadLine(f"encoding: {half[0]!r} at character {half.start() + 1} of {name} is not UTF-8")
    return value


def _check_click(value: Any) -> int:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if value in ("0", "1", 0, 1) and isinstance(value, str | int):
        return int(value)
    shown = repr(value)[:40]
    raise BadLine(f"label: clicked {shown} is not 0 or 1")


def _values(column: pa.Array) -> list[Any]:
    """Texts as bytes: Arrow's own decoding would stop at the first bad one."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if str(column.type) in _TEXT_TYPES:
        column = column.cast(pa.large_binary())
    values: list[Any] = column.to_pylist()
    return values


class Block(NamedTuple):
    """Neighbouring rows of a table, the good ones among them, and the split of each of these."""

    rows: list[TableRow]
    pairs: list[Pair]
    fates: Fates


class PairsSource:
    """Tables of pairs, as a `sources.Corpus`.

    One table is split by a hash of the query; of two, the first gives validation; of three, each is a split.
    """

    noun = "pairs"
    task: TaskName = "retrieval"
    max_tokens = 512  # as many as BERT has positions
    query_tokens = True

    def __init__(self, settings: PrepareSettings, workspace: Workspace) -> None:
        self._settings, self._workspace = settings, workspace
        tables = [open_table(source) for source in settings.source]
        self._tables = [tables[i] for i in order_sources([table.path.stem for table in tables])]
        self.files = [replace(table.source, number=number) for number, table in enumerate(self._tables)]
        self._rows: list[int] = []
        self._rejected: list[Rejected] = []
        self._clicks: Counter[tuple[int, int]] = Counter()  # rows by (fate, clicked)
        for number, file in enumerate(self.files):
            splits = describe_role(role_of(number, len(tables)), len(tables))
            workspace.say(f"{file.label}: {format_size(file.bytes)}, for {splits}")

    def assign_rows(self) -> None:
        """Count the rows of each split and list bad ones."""
        with (
            (self._workspace.folder / REJECTED).open("w", encoding="utf-8") as listed,
            show_progress(self._workspace.say, "looked through") as advance,
        ):
            for number, file in enumerate(self.files):
                rows, rejected = 0, Rejected()
                for block in self._blocks(number):
                    clicked = (pair.clicked for pair in block.pairs)
                    self._clicks.update(zip(block.fates.tolist(), clicked, strict=True))
                    for line in block.rows:
                        if isinstance(line.row, BadLine):
                            listed.write(rejected.add(file.label, line.number, str(line.row), line.shown))
                    rows += len(block.rows)
                    advance(len(block.rows))
                self._rows.append(rows)
                self._rejected.append(rejected)
                if rejected.counts.total() > self._settings.max_rejected_share * rows:
                    listed.flush()
                    self._workspace.refuse(file.label, rows, rejected, self._settings.max_rejected_share)
        self._require_both_clicks()

    def all_texts(self, *, training_only: bool) -> Iterator[str]:
        """Queries and texts; equal neighbours come once."""
        with show_progress(self._workspace.say, "learned from") as advance:
            for number in range(1 if training_only else len(self._tables)):
                for block in self._blocks(number):
                    advance(len(block.rows))
                    used = (block.fates == Fate.TRAIN) | (not training_only)
                    yield from dict.fromkeys(pair.query for pair in compress(block.pairs, used))
                    yield from dict.fromkeys(pair.text for pair in compress(block.pairs, used))

    def write(self, tokenizer: TitleTokenizer) -> Contents:
        """Write the shards and the table of texts."""
        lengths = {
            "query": self._settings.query_tokens,
            "text": self._settings.max_tokens or self.max_tokens,
        }
        total = sum(self._rows)
        with (
            TextWriter(self._workspace.folder) as texts,
            show_progress(self._workspace.say, "prepared", total=total) as advance,
        ):
            writer = PairsWriter(self._workspace, tokenizer, texts, lengths)
            for number in range(len(self._tables)):
                for block in self._blocks(number):
                    writer.add(number, block)
                    advance(len(block.rows))
                writer.end_table(number)
        counts, clicks = writer.counts, self._clicks
        return Contents(
            rows=self._rows,
            rejected=self._rejected,
            texts=texts.describe(),
            pairs=writer.shards,
            statistics={
                "queries": counts["query"],
                "texts": counts["text"],
                "pairs": sum(clicks.values()),
                "clicked": sum(count for (_, clicked), count in clicks.items() if clicked),
                "words_per_query": counts["query words"] / counts["query"],
                "words_per_text": counts["text words"] / counts["text"],
                "tokens_per_query": counts["query tokens"] / counts["query"],
                "tokens_per_text": counts["text tokens"] / counts["text"],
            },
        )

    def summary(self, manifest: Manifest) -> Iterator[str]:
        """Counts of pairs, clicks, queries and texts."""
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
        """Rows of table `number` in blocks of bounded size."""
        rows: list[TableRow] = []
        characters = 0
        for line in read_pairs(self._tables[number]):
            rows.append(line)
            characters += len(line.row.text) if isinstance(line.row, Pair) else len(line.shown)
            if len(rows) >= _BLOCK_ROWS or characters >= _BLOCK_CHARACTERS:
                yield self._block(number, rows)
                rows, characters = [], 0
        if rows:
            yield self._block(number, rows)

    def _block(self, number: int, rows: list[TableRow]) -> Block:
        """Rows with their splits; queries that differ only in case or blanks share one."""
        pairs = [line.row for line in rows if isinstance(line.row, Pair)]
        role = role_of(number, len(self._tables))
        if role is not Fate.TRAIN:
            return Block(rows, pairs, np.full(len(pairs), role, dtype=np.uint8))
        shares = Shares(self._settings.validation_share, self._settings.test_share)
        shares = held_out(shares, sources=len(self._tables))
        hashes = hash_ids([" ".join(pair.query.lower().split()) for pair in pairs])
        return Block(rows, pairs, split_by_hash(hashes, shares, seed=self._settings.seed))

    def _require_both_clicks(self) -> None:
        """A split without clicked or without other pairs has no AUC, and teaches nothing."""
        names = ", ".join(file.label for file in self.files)
        for fate, split in enumerate(SPLITS):
            without, clicked = self._clicks[fate, 0], self._clicks[fate, 1]
            if not without and not clicked:
                raise PrepareError(
                    f"{split} would be empty: none of the {sum(self._rows):,} rows of {names} falls into it; "
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
        self, workspace: Workspace, tokenizer: TitleTokenizer, texts: TextWriter, lengths: dict[str, int]
    ) -> None:
        self.shards: dict[Split, list[Shard]] = {split: [] for split in SPLITS}
        self.counts: Counter[str] = Counter()
        self._folder, self._tokenizer, self._texts = workspace.folder, tokenizer, texts
        self._lengths, self._index = lengths, TextIndex()
        self._waiting: dict[Split, list[pa.Table]] = {split: [] for split in SPLITS}
        self._shards_of_table: Counter[Split] = Counter()

    def add(self, table: int, block: Block) -> None:
        """Pairs of table number `table`."""
        columns = {
            "query": self._add_texts("query", [pair.query for pair in block.pairs]),
            "text": self._add_texts("text", [pair.text for pair in block.pairs]),
            "clicked": [pair.clicked for pair in block.pairs],
        }
        rows = pa.table(columns, schema=PAIRS_SCHEMA)
        for fate, split in enumerate(SPLITS):
            self._waiting[split].append(rows.filter(pa.array(block.fates == fate)))
            if sum(len(part) for part in self._waiting[split]) >= SHARD_ROWS:
                self._write(table, split)

    def end_table(self, table: int) -> None:
        """Write what still waits of table number `table`."""
        for split in SPLITS:
            if any(len(part) for part in self._waiting[split]):
                self._write(table, split)
        self._shards_of_table.clear()

    def _add_texts(self, kind: str, strings: Sequence[str]) -> Rows:
        # A query and a text that are equal may be cut to different lengths.
        rows, new = self._index.add([f"{kind} {string}" for string in strings])
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
        self.shards[split].append(write_shard(self._folder, name, rows))


class TextIndex:
    """The row of every different string in the table of texts, by its 64-bit hash: 12 bytes a string."""

    def __init__(self) -> None:
        self._hashes: Hashes = np.zeros(0, dtype=np.uint64)
        self._rows: Rows = np.zeros(0, dtype=np.int32)

    def add(self, strings: Sequence[str]) -> tuple[Rows, list[int]]:
        """Each string's row, and the positions of new strings, which get the next rows in that order."""
        different, first, inverse = np.unique(hash_ids(strings), return_index=True, return_inverse=True)
        positions = np.searchsorted(self._hashes, different)
        known = is_known(different, self._hashes)
        new = np.flatnonzero(~known)
        new_in_order = new[np.argsort(first[new])]
        rows = np.empty(len(different), dtype=np.int32)
        rows[known] = self._rows[positions[known]]
        rows[new_in_order] = len(self._rows) + np.arange(len(new))
        self._hashes = np.insert(self._hashes, positions[new], different[new])
        self._rows = np.insert(self._rows, positions[new], rows[new])
        return rows[inverse], first[new_in_order].tolist()
