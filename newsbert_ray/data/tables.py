"""Tables (.tsv, .csv, .jsonl, .parquet) -> rows, one by one, in constant memory. Knows no task.

A .tsv has no quoting (as MIND's files), a .csv the usual one; both begin with a header. Lines are read one by
one, because Arrow's text readers stop at the first damaged one.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TextIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from newsbert_ray.config import ColumnSettings
from newsbert_ray.data.sources import CHUNK_BYTES, BadLine, PrepareError, SourceFile, changed
from newsbert_ray.files import first_line, sha256_of

SUFFIXES = (".tsv", ".csv", ".jsonl", ".parquet")

_BUFFER_BYTES = 1 << 20
_USUAL = ColumnSettings()
_TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


class Record(NamedTuple):
    """A row's line or row number (from 1), its text if it is bad, and its values or why it has none."""

    number: int
    shown: str
    values: Sequence[Any] | BadLine

    def map(self, make: Callable[..., Sequence[Any]]) -> Record:
        """The record with the values that `make` makes of its own, or with the BadLine that it raises."""
        if isinstance(self.values, BadLine):
            return self
        try:
            return self._replace(values=make(*self.values))
        except BadLine as bad:
            return self._replace(values=bad)


@dataclass(frozen=True)
class Table:
    """A table and what its first lines tell; `names` are its columns, `size` and `modified` its state then.

    `header`: lines before the first row. `encoding`, `delimiter`: of a text file.
    """

    path: Path
    size: int
    modified: int
    names: tuple[str, ...] = ()
    header: int = 1
    encoding: str = "utf-8-sig"
    delimiter: str = ","

    @property
    def suffix(self) -> str:
        return table_suffix(self.path)

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"{self.path.absolute().parent.name}/{self.path.name}"

    @cached_property
    def source(self) -> SourceFile:
        """The file, hashed at the first use."""
        return SourceFile(
            self.path.absolute().parent.name, self.path.name, self.size, sha256_of(self.path), ()
        )

    @contextmanager
    def open(self) -> Iterator[TextIO]:
        """The text file, decompressed; bytes that are not UTF-8 become lone surrogates."""
        opened = gzip.open if self.path.suffix == ".gz" else open
        errors = "surrogateescape" if self.encoding == "utf-8-sig" else "strict"
        try:
            with opened(self.path, "rt", encoding=self.encoding, errors=errors, newline="\n") as file:
                yield cast("TextIO", file)
        except UnicodeError as error:
            fault = f"not {self.encoding} ({first_line(error)}); name its encoding by --columns.encoding"
            raise PrepareError(f"{self.label}: {fault}") from error
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            fault = f"damaged gzip ({error}); download it again"
            raise PrepareError(f"{self.label}: {fault}") from error


def table_suffix(path: str | Path) -> str:
    """The format that a path's name gives, without .gz; empty for no table."""
    suffix = Path(str(path).lower().removesuffix(".gz")).suffix
    return suffix if suffix in SUFFIXES and not str(path).lower().endswith(".parquet.gz") else ""


def open_table(source: str, *, columns: Sequence[str], settings: ColumnSettings = _USUAL) -> Table:
    """Find the columns of a table, which must have these `columns`; PrepareError where it is none or lacks
    one. `settings` has its encoding and delimiter; where its columns are numbers, the table has no header."""
    path = Path(source).expanduser()
    expected = f" the columns {', '.join(columns)}" if columns else " text and label"
    if not path.is_file():
        raise PrepareError(f"source {source}: no such file; give a table with{expected}")
    status = path.stat()
    table = Table(path, status.st_size, status.st_mtime_ns, encoding=_encoding(path, settings.encoding))
    if not table.size:
        raise PrepareError(f"{table.label}: empty; a table with{expected} expected")
    if table.suffix == ".parquet":
        try:
            table = replace(table, names=tuple(pq.read_schema(path).names))
        except (pa.ArrowException, OSError, ValueError) as error:
            fault = f"no readable Parquet file ({first_line(error)}); write it again"
            raise PrepareError(f"{table.label}: {fault}") from error
    elif table.suffix == ".jsonl":
        table = replace(table, names=tuple(_json_columns(table, columns)))
    else:
        table = _read_header(table, settings, expected)
    _require_columns(table, columns)
    return table


def column_names(source: str) -> tuple[str, ...]:
    """The columns of a table; none where they cannot be found."""
    try:
        return open_table(source, columns=()).names
    except (PrepareError, OSError):
        return ()


def read_table(table: Table, columns: Sequence[str | None], *, required: bool = True) -> Iterator[Record]:
    """The values of `columns` (None: the value None) in every row of `table`, in its order; a bad row with
    the reason, one of .jsonl without them all only if they are `required`. PrepareError where the file was
    altered since it was opened, or a Parquet file is damaged inside.

    Text is `str` or `bytes` as the file has it: `check_text` makes a text of it.
    """
    if table.suffix == ".parquet":
        yield from _read_parquet(table, columns)
    else:
        is_json = table.suffix == ".jsonl"
        keys = [table.names.index(name) if name and not is_json else name for name in columns]
        for record in _records(table):
            if isinstance(record.values, BadLine):
                yield record
            elif is_json or record.number > table.header:
                yield record._replace(values=_pick(record.values, keys, len(table.names), required))
    status = table.path.stat()
    if (status.st_mtime_ns, status.st_size) != (table.modified, table.size):
        raise changed(table.label)


def check_text(name: str, value: Any) -> str:
    """`value` of the column `name` as a text; BadLine where it is blank, no text, or not UTF-8."""
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


def _pick(row: Any, keys: Sequence[Any], count: int, required: bool) -> Sequence[Any] | BadLine:
    if isinstance(row, dict):
        missing = [name for name in keys if name not in row]
        fault = required and missing
        return BadLine(f"columns: {missing[0]} is missing") if fault else [row.get(name) for name in keys]
    if len(row) != count:
        return BadLine(f"columns: {len(row)} found, {count} expected")
    return [None if index is None else row[index] for index in keys]


def _records(table: Table) -> Iterator[Record]:
    """Every line or quoted record of a text table, a header included."""
    with table.open() as file:
        if table.suffix == ".csv":
            yield from _csv_records(file, table.delimiter)
            return
        for number, line in enumerate(_lines(file), 1):
            text = line.removesuffix("\n").removesuffix("\r")
            values: Any = text.split(table.delimiter) if text else []
            if len(line) >= CHUNK_BYTES and not line.endswith("\n"):
                values = BadLine(f"columns: line of more than {CHUNK_BYTES:,} bytes")
            elif table.suffix == ".jsonl":
                values = _parse_object(text)
            yield Record(number, text, values)


def _lines(file: TextIO) -> Iterator[str]:
    """Each line; of one longer than CHUNK_BYTES only the beginning, without an end."""
    while line := file.readline(CHUNK_BYTES):
        yield line
        while not line.endswith("\n") and (line := file.readline(CHUNK_BYTES)):
            pass


def _csv_records(file: TextIO, delimiter: str) -> Iterator[Record]:
    """Every record with the number of its first line; damage in one ends with its line."""
    reader = csv.reader(_lines(file), delimiter=delimiter, strict=True)
    while True:
        start = reader.line_num + 1
        try:
            record = next(reader)
            yield Record(start, delimiter.join(record), record)
        except StopIteration:
            return
        except csv.Error as error:
            lines = f" in lines {start} to {reader.line_num}" if reader.line_num > start else ""
            yield Record(start, "", BadLine(f"csv: {error}{lines}"))


def _encoding(path: Path, named: str) -> str:
    """The encoding that the first bytes tell, or the one named."""
    with path.open("rb") as file:
        start = file.read(2)
    usual = named.lower().replace("_", "-") in ("utf-8", "utf8")
    if usual and start in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    try:
        return "utf-8-sig" if usual else codecs.lookup(named).name
    except LookupError as error:
        raise PrepareError(
            f"columns.encoding {named}: no such encoding; utf-8, utf-16 or latin-1, say"
        ) from error


def _read_header(table: Table, settings: ColumnSettings, expected: str) -> Table:
    """The table with its delimiter and the names in its first line, or numbers where it has no header."""
    with table.open() as file:
        first = next(_lines(file), "")
    delimiter = settings.delimiter or ("\t" if table.suffix == ".tsv" else max(",;\t|", key=first.count))
    table = replace(table, delimiter=delimiter)
    header = next((values for _, _, values in _records(table)), BadLine("columns: 0 found"))
    if isinstance(header, BadLine):
        raise PrepareError(f"{table.label}:1: no header ({header}); a table with{expected} expected")
    names = [str(name).strip() for name in header]
    named = [one.strip() for one in f"{settings.text or ''},{settings.label or ''}".split(",")]
    if any(one.isdigit() and one not in names for one in named):
        return replace(table, header=0, names=tuple(str(number) for number in range(1, len(names) + 1)))
    return replace(table, names=tuple(names))


def _parse_object(line: str) -> dict[str, Any] | BadLine:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadLine(f"json: {error}")
    return row if isinstance(row, dict) else BadLine(f"json: {type(row).__name__} found, an object expected")


def _json_columns(table: Table, columns: Sequence[str]) -> list[str]:
    """Keys of the first objects, as many as it takes to find every column."""
    names: dict[str, None] = {}
    for number, _, row in _records(table):
        names.update(dict.fromkeys(row if isinstance(row, dict) else ()))
        if (columns and set(columns) <= names.keys()) or number >= 1000:
            break
    return list(names)


def _read_parquet(table: Table, columns: Sequence[str | None]) -> Iterator[Record]:
    number, wanted = 0, [name for name in columns if name]
    try:
        with pq.ParquetFile(table.path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            for batch in file.iter_batches(256, columns=wanted, use_threads=False):
                none = [None] * len(batch)
                for values in zip(*(_values(batch.column(n)) if n else none for n in columns), strict=True):
                    number += 1
                    shown = (v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values)
                    yield Record(number, "\t".join(shown), values)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise PrepareError(
            f"{table.label}: damaged after row {number:,} ({first_line(error)}); write it again"
        ) from error


def _values(column: pa.Array) -> list[Any]:
    """Texts as bytes: Arrow's own decoding would stop at the first bad one."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if str(column.type) in _TEXT_TYPES:
        column = column.cast(pa.large_binary())
    return cast("list[Any]", column.to_pylist())


def _require_columns(table: Table, columns: Sequence[str]) -> None:
    names = table.names
    missing = [name for name in columns if name not in names]
    twice = [name for name in columns if names.count(name) > 1]
    if not missing and not twice:
        return
    # A line of MIND or of a binary file is long and useless to a reader.
    shown = ", ".join(repr(name[:40]) for name in names[:8]) + (", ..." if len(names) > 8 else "")
    fault = f"no column {', '.join(missing)}" if missing else f"column {', '.join(twice)} is there twice"
    where = "" if table.suffix in (".jsonl", ".parquet") else " in the first line"
    raise PrepareError(
        f"{table.label}: {fault}; found {shown or 'none'}, expected {', '.join(columns)}{where} (of "
        "MIND give the folder)"
    )
