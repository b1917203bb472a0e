"""Tables of query, text and clicked (NewsBERT Fig. 3), as .tsv, .csv, .jsonl or .parquet -> rows, in constant
memory. Knows no split and no tokeniser.

A .tsv has no quoting (as MIND's files), a .csv the usual one; both begin with a header. Other columns are
ignored. Lines are read one by one, because Arrow's text readers stop at the first damaged one.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from newsbert_ray.data import sources
from newsbert_ray.data.sources import BadLine, PrepareError, SourceFile, parse_chunk, read_chunk
from newsbert_ray.files import first_line

COLUMNS = ("query", "text", "clicked")
SUFFIXES = (".tsv", ".csv", ".jsonl", ".parquet")

_EXPECTED = ", ".join(COLUMNS)
_PARQUET_ROWS = 256
_HEADER_LINES = 1000
_BUFFER_BYTES = 1 << 20
_SURROGATE = re.compile("[\ud800-\udfff]")
_TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


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
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        hashed = SourceFile(folder, path.name, path.stat().st_size, digest, ())
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
            for batch in file.iter_batches(_PARQUET_ROWS, columns=list(COLUMNS), use_threads=False):
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
            if set(COLUMNS) <= names.keys() or number >= _HEADER_LINES:
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
