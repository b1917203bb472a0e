"""Files of texts, read in constant memory: plain text, tables, MIND's news.tsv, standard input; `predict`."""

from __future__ import annotations

import gzip
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.csv import CSVWriter

from newsbert_ray.config import ColumnSettings, SettingsError, build_settings
from newsbert_ray.data.labelled import NO_LABEL, TEXTS, Columns, find_columns, usual_name
from newsbert_ray.data.mind import NEWS_COLUMNS, News, parse_news
from newsbert_ray.data.sources import BadLine, Say, parse_chunk, parse_lines, read_through, show_progress
from newsbert_ray.data.tables import SUFFIXES, Table, open_table, read_table, table_suffix
from newsbert_ray.files import replace_file
from newsbert_ray.secrets import mask_url
from newsbert_ray.serving.predictor import Precision, load
from newsbert_ray.storage.bucket import is_url
from newsbert_ray.storage.workdir import download_input

STREAM = "-"
"""Standard input or output."""
PREDICTED = (".jsonl", ".csv", ".parquet")
SHOWN = 5
"""Bad rows that a message shows."""
Fields = dict[str, Any]
ROWS = 8192
"""Rows of a piece, at most: a core embeds them in seconds."""


class TextsError(ValueError):
    """A file whose texts cannot be read; the text says why and what to do."""


class Row(NamedTuple):
    """A text with its id."""

    name: str
    text: str


@dataclass(frozen=True)
class TextFile:
    """A file of texts: its SHA-256, its lines or rows (bad ones and a header included), and an iterator of
    its rows, of which a bad one is the reason."""

    sha256: str
    lines: int
    rows: Iterator[Row | BadLine]

    def pieces(self) -> Iterator[list[Row | BadLine]]:
        """The rows, up to ROWS at a time."""
        while rows := list(islice(self.rows, ROWS)):
            yield rows


def open_texts(location: str | Path, columns: Mapping[str, Any] = {}) -> TextFile:
    """A file of texts, of which nothing but a header has been read: path or URL of MIND's news.tsv, of a
    table with a column of texts (`columns`: values of `TextColumns`), or of a .txt with one text a line; `-`
    is standard input. TextsError, PrepareError: no such file, another format, or no column of texts."""
    if str(location) == STREAM:
        raws = (parse_lines(raw, str, is_start=n == 0) for n, raw in enumerate(sys.stdin.buffer))
        return TextFile("", 0, _read_lines(chain.from_iterable(raws)))
    path = Path(download_input(str(location))).expanduser().absolute()
    suffix = table_suffix(path) or path.suffix.lower()
    if suffix not in (*SUFFIXES, ".txt"):
        raise TextsError(f"{path}: give a {', '.join(SUFFIXES)} (.gz too, but of .parquet) or .txt file")
    if not path.is_file() or not path.stat().st_size:
        raise TextsError(f"{path}: " + ("contains no text" if path.is_file() else "no such file"))
    if suffix != ".txt":
        settings = build_settings(ColumnSettings, {**columns, "label": NO_LABEL}, where="columns")
        table = open_table(str(path), columns=(), settings=settings)
        is_mind = suffix == ".tsv" and len(table.names) == NEWS_COLUMNS and settings.text is None
        if not is_mind or usual_name(table.names, TEXTS):
            found = find_columns(str(path), table.names, settings)
            return TextFile(table.source.sha256, _count_rows(path, suffix), _read_columns(table, found))
    source = read_through(path, folder=path.parent.name)
    parse: Callable[[str], str | News] = str if suffix == ".txt" else parse_news
    chunks = (parse_chunk(chunk, parse) for chunk in source.chunks)
    return TextFile(source.sha256, source.lines, _read_lines(chain.from_iterable(chunks)))


def _count_rows(path: Path, suffix: str) -> int:
    """The rows or lines of a table."""
    if suffix == ".parquet":
        return int(pq.read_metadata(path).num_rows)
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _read_lines(lines: Iterable[tuple[str, News | str | BadLine]]) -> Iterator[Row | BadLine]:
    """The rows of lines that are not blank; the id of a text alone is the number of its line."""
    for number, (line, row) in enumerate(lines, 1):
        if isinstance(row, News):
            yield Row(row.news_id, row.title)
        elif line.strip():
            yield Row(str(number), row) if isinstance(row, str) else row


def _read_columns(table: Table, columns: Columns) -> Iterator[Row | BadLine]:
    """The rows of a table without its blank lines; without a column of ids they are counted from 1."""
    names = [*columns.texts, columns.label, columns.name]
    for number, record in enumerate(read_table(table, names, required=False), 1):
        values = columns.pick("", record._replace(number=number)).values
        if not isinstance(values, BadLine):
            yield Row(values[0], values[2])
        elif record.shown.strip() or str(values).startswith("csv"):
            yield values


def predict(
    run: str | Path,
    *,
    input: str | Path = STREAM,
    out: str | Path = STREAM,
    top_k: int = 1,
    columns: Mapping[str, Any] = {},
    precision: Precision = "fp32",
    overwrite: bool = False,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """The verb `predict`. Arguments, result and errors are those of `newsbert_ray.predict`."""
    start = time.perf_counter()
    student = load(run, precision=precision)
    texts, bad, done = open_texts(input, columns), list[str](), 0
    with (
        _open_predictions(out, overwrite=overwrite) as write,
        show_progress(say, "predicting", total=texts.lines or None) as advance,
    ):
        for rows in texts.pieces():
            bad += [str(row) for row in rows if isinstance(row, BadLine)]
            good = [row for row in rows if isinstance(row, Row)]
            predictions = student.predict([row.text for row in good], top=top_k)
            pairs = zip(good, predictions, strict=True)
            if good:
                write([{"id": row.name, "text": row.text, **_columns(one.topics)} for row, one in pairs])
            done += len(good)
            advance(len(rows))
        if not done:
            raise TextsError(f"--input {input}: contains no text" + "".join(f"; {one}" for one in bad[:1]))
    if bad:
        say(f"left out, {len(bad):,} bad rows: {'; '.join(bad[:SHOWN])}")
    seconds = time.perf_counter() - start
    say(f"{done:,} texts in {seconds:.1f} s ({done / seconds:,.0f} texts/s with loading and writing)")
    return {"out": str(out), "rows": done, "left_out": len(bad)}


def _columns(topics: Sequence[tuple[str, float]]) -> Fields:
    """`topic` and `probability` of the first topic, `topic_2` and `probability_2` of the second, ..."""
    columns: Fields = {}
    for rank, (topic, probability) in enumerate(topics, 1):
        end = f"_{rank}" if rank > 1 else ""
        columns |= {f"topic{end}": topic, f"probability{end}": round(probability, 6)}
    return columns


@contextmanager
def _open_predictions(out: str | Path, *, overwrite: bool) -> Iterator[Callable[[list[Fields]], None]]:
    """A function that writes rows to `out`, in the format of its name; after an error no file is left."""
    path = Path(out)
    if str(out) == STREAM:
        yield lambda rows: sys.stdout.writelines(map(_json_line, rows))
        return
    if is_url(out) or path.suffix not in PREDICTED:
        raise SettingsError(f"--out {mask_url(str(out))}: give a {', '.join(PREDICTED)} file on this machine")
    if path.exists() and not overwrite:
        raise SettingsError(f"--out {path}: exists; add --overwrite, or give another --out")
    with ExitStack() as opened:
        partial = opened.enter_context(replace_file(path))
        if path.suffix == ".jsonl":
            file = opened.enter_context(partial.open("w", encoding="utf-8"))
            yield lambda rows: file.writelines(map(_json_line, rows))
            return
        writer, writers = {".csv": CSVWriter, ".parquet": pq.ParquetWriter}[path.suffix], list[Any]()

        def write(rows: list[Fields]) -> None:
            table = pa.Table.from_pylist(rows)
            if not writers:
                writers.append(opened.enter_context(writer(partial, table.schema)))
            writers[0].write_table(table)

        yield write


def _json_line(row: Fields) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
