"""Tables (.tsv, .csv, .jsonl, .parquet) -> rows, one by one, in constant memory. Knows no task.

A .tsv has no quoting (as MIND's files), a .csv the usual one; both begin with a header. Lines are read one by
one, because Arrow's text readers stop at the first damaged one.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from newsbert_ray.data.sources import CHUNK_BYTES, BadLine, PrepareError, SourceFile, changed
from newsbert_ray.files import first_line, sha256_of

SUFFIXES = (".tsv", ".csv", ".jsonl", ".parquet")

_BUFFER_BYTES = 1 << 20
_TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


class Record(NamedTuple):
    """A row's line or row number (from 1), its text if it is bad, and its values or why it has none."""

    number: int
    shown: str
    values: Sequence[Any] | BadLine


@dataclass(frozen=True)
class Table:
    """A table that was read once; `names` are all its columns, `modified` its time stamp then."""

    path: Path
    source: SourceFile
    modified: int
    names: tuple[str, ...] = ()

    @property
    def suffix(self) -> str:
        """Its format."""
        return self.path.suffix.lower()


def is_table(path: str | Path) -> bool:
    """Whether `path` is named like a table."""
    return Path(path).suffix.lower() in SUFFIXES


def open_table(source: str, *, columns: Sequence[str]) -> Table:
    """Hash a table and find its columns.

    Args:
        columns: columns that it must have.
    Raises:
        PrepareError: no such file, no table, or one that lacks a column.
    """
    path, expected = Path(source).expanduser(), ", ".join(columns)
    if not path.is_file():
        raise PrepareError(f"source {source}: no such file; give a table with the columns {expected}")
    status = path.stat()
    hashed = SourceFile(path.absolute().parent.name, path.name, status.st_size, sha256_of(path), ())
    table = Table(path, hashed, status.st_mtime_ns)
    if table.suffix == ".parquet":
        names = list(_parquet_schema(table).names)
    elif not status.st_size:
        raise PrepareError(f"{hashed.label}: empty; the columns {expected} expected")
    elif table.suffix == ".jsonl":
        names = _json_columns(table, columns)
    else:
        header = next((values for _, _, values in _records(table)), BadLine("columns: 0 found"))
        if isinstance(header, BadLine):
            raise PrepareError(f"{hashed.label}:1: no header ({header}); the columns {expected} expected")
        names = [str(name) for name in header]
    _require_columns(table, names, columns)
    return replace(table, names=tuple(names))


def read_table(table: Table, columns: Sequence[str]) -> Iterator[Record]:
    """The values of `columns` in every row of `table`, in its order; a bad row with the reason.

    Text is `str` or `bytes` as the file has it: `check_text` makes a text of it.

    Raises:
        PrepareError: the file was altered since it was opened, or a Parquet file is damaged inside.
    """
    if table.suffix == ".parquet":
        yield from _read_parquet(table, columns)
    else:
        is_json = table.suffix == ".jsonl"
        places: list[Any] = list(columns) if is_json else [table.names.index(name) for name in columns]
        for record in _records(table):
            if isinstance(record.values, BadLine):
                yield record
            elif is_json or record.number > 1:
                yield record._replace(values=_pick(record.values, places, len(table.names)))
    status = table.path.stat()
    if (status.st_mtime_ns, status.st_size) != (table.modified, table.source.bytes):
        raise changed(table.source.label)


def check_text(name: str, value: Any) -> str:
    """`value` of the column `name` as a text.

    Raises:
        BadLine: nothing but blanks, no text, or one that is not UTF-8.
    """
    text = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
    if text is None or (isinstance(text, str) and (not text or text.isspace())):
        raise BadLine(f"{name}: empty")
    if not isinstance(text, str):
        raise BadLine(f"{name}: {type(text).__name__} found, text expected")
    if "\0" in text:
        raise BadLine(f"encoding: NUL in {name}")
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        fault = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else repr(text[error.start])
        raise BadLine(f"encoding: {fault} at character {error.start + 1} of {name} is not UTF-8") from error
    return text


def _pick(row: Any, places: Sequence[Any], count: int) -> Sequence[Any] | BadLine:
    if isinstance(row, dict):
        missing = [name for name in places if name not in row]
        return BadLine(f"columns: {missing[0]} is missing") if missing else [row[name] for name in places]
    if len(row) != count:
        return BadLine(f"columns: {len(row)} found, {count} expected")
    return [row[index] for index in places]


def _records(table: Table) -> Iterator[Record]:
    """Every line or quoted record of a text table, a header included."""
    with table.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        if table.suffix == ".csv":
            yield from _csv_records(file)
            return
        for number, line in enumerate(_lines(file), 1):
            text = line.removesuffix("\n").removesuffix("\r")
            try:
                yield Record(number, text, _parse_line(table, line, text))
            except BadLine as bad:
                yield Record(number, text, bad)


def _parse_line(table: Table, line: str, text: str) -> Any:
    if len(line) >= CHUNK_BYTES and not line.endswith("\n"):
        raise BadLine(f"columns: line of more than {CHUNK_BYTES:,} bytes")
    return _parse_object(text) if table.suffix == ".jsonl" else text.split("\t") if text else []


def _lines(file: TextIO) -> Iterator[str]:
    """Each line; of one longer than CHUNK_BYTES only the beginning, without an end."""
    while line := file.readline(CHUNK_BYTES):
        yield line
        while not line.endswith("\n") and (line := file.readline(CHUNK_BYTES)):
            pass


def _csv_records(file: TextIO) -> Iterator[Record]:
    """Every record with the number of its first line; damage in one ends with its line."""
    reader = csv.reader(_lines(file), strict=True)
    while True:
        start = reader.line_num + 1
        try:
            record = next(reader)
            yield Record(start, ",".join(record), record)
        except StopIteration:
            return
        except csv.Error as error:
            lines = f" in lines {start} to {reader.line_num}" if reader.line_num > start else ""
            yield Record(start, "", BadLine(f"csv: {error}{lines}"))


def _parse_object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadLine(f"json: {error}") from error
    if not isinstance(row, dict):
        raise BadLine(f"json: {type(row).__name__} found, an object expected")
    return row


def _json_columns(table: Table, columns: Sequence[str]) -> list[str]:
    """Keys of the first objects, as many as it takes to find every column."""
    names: dict[str, None] = {}
    for number, _, row in _records(table):
        names.update(dict.fromkeys(row if isinstance(row, dict) else ()))
        if set(columns) <= names.keys() or number >= 1000:
            break
    return list(names)


def _parquet_schema(table: Table) -> pa.Schema:
    try:
        return pq.read_schema(table.path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise PrepareError(
            f"{table.source.label}: no readable Parquet file ({first_line(error)}); write it again"
        ) from error


def _read_parquet(table: Table, columns: Sequence[str]) -> Iterator[Record]:
    number = 0
    try:
        with pq.ParquetFile(table.path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            for batch in file.iter_batches(256, columns=list(columns), use_threads=False):
                for values in zip(*(_values(batch.column(name)) for name in columns), strict=True):
                    number += 1
                    shown = (v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values)
                    yield Record(number, "\t".join(shown), values)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise PrepareError(
            f"{table.source.label}: damaged after row {number:,} ({first_line(error)}); write it again"
        ) from error


def _values(column: pa.Array) -> list[Any]:
    """Texts as bytes: Arrow's own decoding would stop at the first bad one."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if str(column.type) in _TEXT_TYPES:
        column = column.cast(pa.large_binary())
    values: list[Any] = column.to_pylist()
    return values


def _require_columns(table: Table, names: Sequence[str], columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in names]
    twice = [name for name in columns if names.count(name) > 1]
    if not missing and not twice:
        return
    # A line of MIND or of a binary file is long and useless to a reader.
    shown = ", ".join(repr(name[:40]) for name in names[:8]) + (", ..." if len(names) > 8 else "")
    fault = f"no column {', '.join(missing)}" if missing else f"column {', '.join(twice)} is there twice"
    where = "" if table.suffix in (".jsonl", ".parquet") else " in the first line"
    raise PrepareError(
        f"{table.source.label}: {fault}; found {shown or 'none'}, expected {', '.join(columns)}{where} (of "
        "MIND give the folder)"
    )
