"""A retrieval table (query, text, clicked; NewsBERT Fig. 3) as .tsv, .csv, .jsonl or .parquet -> rows, in
constant memory. Knows no split and no tokeniser.

A .tsv has no quoting (as MIND's files), a .csv the usual one; both begin with a header. Other columns are
passed over. Lines are read one by one, because Arrow's text readers end at the first damaged one.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from newsbert_ray.data.chunk import rows_of
from newsbert_ray.data.mind import BadLine
from newsbert_ray.data.sources import CHUNK_BYTES, PrepareError, SourceFile, read_chunk, read_through
from newsbert_ray.files import first_line

COLUMNS = ("query", "text", "clicked")
SUFFIXES = (".tsv", ".csv", ".jsonl", ".parquet")

_PARQUET_ROWS = 256
_HEADER_LINES = 1000
_BUFFER_BYTES = 1 << 20
_HALF = re.compile("[\ud800-\udfff]")


class Pair(NamedTuple):
    """One row: what was asked, the text of a news, and whether it was clicked (0 or 1)."""

    query: str
    text: str
    clicked: int


class Line(NamedTuple):
    """A row, or the reason why it is none, with its place (line or row, from 1) and, if bad, what stands
    there."""

    number: int
    shown: str
    row: Pair | BadLine


@dataclass(frozen=True)
class PairsTable:
    """A table that was read through once and has the columns; `modified` is its time stamp then."""

    path: Path
    source: SourceFile
    modified: int

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.source.folder}/{self.source.name}"


def is_pairs_table(path: str | Path) -> bool:
    """Whether `path` is named like a table."""
    return Path(path).suffix.lower() in SUFFIXES


def open_table(given: str) -> PairsTable:
    """Hash a table and look for its columns.

    Raises:
        PrepareError: nothing there, no table, or one that lacks a column.
    """
    path = Path(given).expanduser()
    if not is_pairs_table(path):
        raise PrepareError(
            f"source {given}: no table ({', '.join(SUFFIXES)}), as another source is; prepare folders of "
            "MIND and tables apart"
        )
    if not path.is_file():
        raise PrepareError(f"source {given}: no such file; give a table with the columns {_named(COLUMNS)}")
    folder, modified = path.absolute().parent.name, path.stat().st_mtime_ns
    if _kind(path) == ".parquet":
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        source = SourceFile(folder, path.name, path.stat().st_size, digest, ())
    else:
        source = read_through(path, folder=folder)
    table = PairsTable(path, source, modified)
    _require_columns(table, _find_columns(table))
    return table


def read_pairs(table: PairsTable) -> Iterator[Line]:
    """Every row of `table` in its order; a bad one with the reason, `kind: details`.

    Raises:
        PrepareError: the file was altered since it was opened, or a Parquet file is damaged inside.
    """
    readers = {".tsv": _read_tsv, ".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    yield from readers[_kind(table.path)](table)


def _read_tsv(table: PairsTable) -> Iterator[Line]:
    header = _find_columns(table)
    places = [header.index(name) for name in COLUMNS]

    def parse(line: str) -> Pair:
        return _pick(line.split("\t") if line else [], places, len(header))

    for chunk in table.source.chunks:
        for number, (shown, row) in enumerate(rows_of(chunk, parse), chunk.first_line):
            if number > 1:
                yield Line(number, shown, row)


def _read_csv(table: PairsTable) -> Iterator[Line]:
    header = _find_columns(table)
    places = [header.index(name) for name in COLUMNS]
    rows = _csv_rows(table)
    next(rows)
    for number, row in rows:
        if isinstance(row, BadLine):
            yield Line(number, "", row)
            continue
        try:
            yield Line(number, "", _pick(row, places, len(header)))
        except BadLine as bad:
            yield Line(number, ",".join(row), bad)


def _read_jsonl(table: PairsTable) -> Iterator[Line]:
    def parse(line: str) -> Pair:
        row = _parse_object(line)
        for name in COLUMNS:
            if name not in row:
                raise BadLine(f"columns: {name} is missing")
        return _make_pair(*(row[name] for name in COLUMNS))

    for chunk in table.source.chunks:
        for number, (shown, row) in enumerate(rows_of(chunk, parse), chunk.first_line):
            yield Line(number, shown, row)


def _read_parquet(table: PairsTable) -> Iterator[Line]:
    number = 0
    try:
        with pq.ParquetFile(table.path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            for batch in file.iter_batches(_PARQUET_ROWS, columns=list(COLUMNS), use_threads=False):
                columns = [_values(batch.column(name)) for name in COLUMNS]
                for values in zip(*columns, strict=True):
                    number += 1
                    try:
                        yield Line(number, "", _make_pair(*values))
                    except BadLine as bad:
                        yield Line(number, "\t".join(_show(value) for value in values), bad)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise PrepareError(
            f"{table.name}: damaged after row {number:,} ({first_line(error)}); write it again"
        ) from error
    if table.path.stat().st_mtime_ns != table.modified or table.path.stat().st_size != table.source.bytes:
        raise PrepareError(
            f"{table.name}: changed while it was read; prepare again when nothing writes to it"
        )


def _find_columns(table: PairsTable) -> list[str]:
    """The names of a table's columns."""
    kind = _kind(table.path)
    if kind == ".parquet":
        return _parquet_columns(table)
    if not table.source.bytes:
        raise PrepareError(f"{table.name}: empty; the columns {_named(COLUMNS)} expected")
    if kind == ".jsonl":
        return _json_columns(table)
    if kind == ".csv":
        header = next((row for _, row in _csv_rows(table)), BadLine("columns: 0 found"))
    else:
        header = next(row for _, row in rows_of(table.source.chunks[0], lambda line: line.split("\t")))
    if isinstance(header, BadLine):
        raise PrepareError(f"{table.name}:1: no header ({header}); the columns {_named(COLUMNS)} expected")
    return header


def _parquet_columns(table: PairsTable) -> list[str]:
    try:
        schema = pq.read_schema(table.path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise PrepareError(
            f"{table.name}: no readable Parquet file ({first_line(error)}); write it again"
        ) from error
    for field in schema:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if field.name in COLUMNS[:2] and not _is_text(kind):
            raise PrepareError(f"{table.name}: column {field.name} holds {field.type}, text expected")
        if field.name == COLUMNS[2] and not (
            _is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
        ):
            raise PrepareError(f"{table.name}: column {field.name} holds {field.type}, 0 or 1 expected")
    return list(schema.names)


def _json_columns(table: PairsTable) -> list[str]:
    """Keys of the first objects, as many as it takes to find every column."""
    found: dict[str, None] = {}
    for chunk in table.source.chunks:
        for number, (_, row) in enumerate(rows_of(chunk, _parse_object), chunk.first_line):
            if isinstance(row, dict):
                found.update(dict.fromkeys(row))
            if set(COLUMNS) <= found.keys() or number >= _HEADER_LINES:
                return list(found)
    return list(found)


def _require_columns(table: PairsTable, names: Sequence[str]) -> None:
    missing = [name for name in COLUMNS if name not in names]
    twice = [name for name in COLUMNS if names.count(name) > 1]
    if not missing and not twice:
        return
    # A line of MIND, or a binary file, is long and of no use to a reader.
    shown = ", ".join(repr(name[:40]) for name in names[:8]) + (", ..." if len(names) > 8 else "")
    fault = f"no column {_named(missing)}" if missing else f"column {_named(twice)} is there twice"
    cure = "" if _kind(table.path) in (".jsonl", ".parquet") else " in the first line"
    raise PrepareError(
        f"{table.name}: {fault}; found {shown or 'none'}, expected {_named(COLUMNS)}{cure} (of MIND give the "
        "folder)"
    )


def _csv_rows(table: PairsTable) -> Iterator[tuple[int, list[str] | BadLine]]:
    """Every record with the number of the line on which it begins; damage in one ends with its line."""
    overlong: list[int] = []
    reader = csv.reader(_csv_lines(table, overlong), strict=True)
    while True:
        start = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines = f" in lines {start} to {reader.line_num}" if reader.line_num > start else ""
            yield start, BadLine(f"csv: {error}{lines}")
            continue
        if overlong and start <= overlong[-1] <= reader.line_num:
            yield start, BadLine(f"columns: line of more than {CHUNK_BYTES:,} bytes")
        else:
            yield start, row


def _csv_lines(table: PairsTable, overlong: list[int]) -> Iterator[str]:
    """Lines with their ends; bytes that are no UTF-8 as lone surrogates, overlong lines empty and noted."""
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


def _pick(row: Sequence[str], places: Sequence[int], expected: int) -> Pair:
    if len(row) != expected:
        raise BadLine(f"columns: {len(row)} found, {expected} expected")
    return _make_pair(*(row[place] for place in places))


def _make_pair(query: Any, text: Any, clicked: Any) -> Pair:
    return Pair(_check_text("query", query), _check_text("text", text), _check_click(clicked))


def _check_text(name: str, value: Any) -> str:
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = value[error.start]
            raise BadLine(f"encoding: byte 0x{byte:02x} of {name} is not UTF-8") from error
    if value is None or value == "":
        raise BadLine(f"{name}: empty")
    if not isinstance(value, str):
        raise BadLine(f"{name}: {type(value).__name__} found, text expected")
    if value.isspace():
        raise BadLine(f"{name}: empty")
    if "\0" in value:
        raise BadLine(f"encoding: NUL in {name}")
    if not value.isascii() and (half := _HALF.search(value)):
        raise BadLine(f"encoding: {half[0]!r} at character {half.start() + 1} of {name} is not UTF-8")
    return value


def _check_click(value: Any) -> int:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str) and value in ("0", "1"):
        return int(value)
    if isinstance(value, int) and value in (0, 1):
        return int(value)
    shown = repr(value)[:40]
    raise BadLine(f"label: clicked {shown} is not 0 or 1")


def _values(column: pa.Array) -> list[Any]:
    """Texts as bytes: Arrow's own decoding would end at the first bad one."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _is_text(column.type):
        column = column.cast(pa.large_binary())
    values: list[Any] = column.to_pylist()
    return values


def _show(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _is_text(kind: pa.DataType) -> bool:
    checks = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return str(kind) in checks


def _kind(path: Path) -> str:
    return path.suffix.lower()


def _named(names: Sequence[str]) -> str:
    return ", ".join(names)
