"""Files of texts, read in constant memory: plain text, tables, MIND's news.tsv, standard input; `predict`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.csv import CSVWriter

from newsbert_ray.config import SettingsError
from newsbert_ray.data.labelled import IDS, TEXTS, usual_name
from newsbert_ray.data.mind import NEWS_COLUMNS, parse_news
from newsbert_ray.data.sources import BadLine, Say, parse_chunk, parse_lines, read_through, show_progress
from newsbert_ray.data.tables import SUFFIXES, Table, check_text, open_table, read_table
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
Columns = dict[str, Any]
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


def open_texts(location: str | Path) -> TextFile:
    """A file of texts, of which nothing but a header has been read.

    Args:
        location: path or URL of MIND's news.tsv, of a table with a column of texts, or of a .txt with one
            text a line; `-` is standard input, one text a line.
    Raises:
        TextsError, PrepareError: no such file, another format, or no column of texts.
    """
    if str(location) == STREAM:
        raws = (parse_lines(raw, str, is_start=n == 0) for n, raw in enumerate(sys.stdin.buffer))
        return TextFile("", 0, _read_lines(chain.from_iterable(raws)))
    path = Path(download_input(str(location))).expanduser().absolute()
    suffix = path.suffix.lower()
    if suffix not in (*SUFFIXES, ".txt"):
        raise TextsError(f"{path}: give a {', '.join(SUFFIXES)} or .txt file")
    if not path.is_file() or not path.stat().st_size:
        raise TextsError(f"{path}: " + ("contains no text" if path.is_file() else "no such file"))
    table = None if suffix == ".txt" else open_table(str(path), columns=())
    names = table.names if table else ()
    text, name = usual_name(names, TEXTS), usual_name(names, IDS)
    if table and text:
        columns = (text,) if name is None else (name, text)  # without an id, rows are counted from 1
        with path.open("rb") as file:
            blocks = iter(lambda: file.read(1 << 20), b"")
            parquet = suffix == ".parquet"
            lines = pq.read_metadata(path).num_rows if parquet else sum(b.count(b"\n") for b in blocks)
        return TextFile(table.source.sha256, lines, _read_columns(table, columns))
    if suffix != ".txt" and not (suffix == ".tsv" and len(names) == NEWS_COLUMNS):
        raise TextsError(
            f"{path}: its columns are {', '.join(name[:40] for name in names[:10])}; name the text "
            f"{' or '.join(TEXTS[:2])}, and the id, if there is one, {' or '.join(IDS[:3])}"
        )
    source = read_through(path, folder=path.parent.name)
    parse: Callable[[str], str | Row] = str if suffix == ".txt" else _parse_news
    chunks = (parse_chunk(chunk, parse) for chunk in source.chunks)
    return TextFile(source.sha256, source.lines, _read_lines(chain.from_iterable(chunks)))


def _parse_news(line: str) -> Row:
    news = parse_news(line)
    return Row(news.news_id, news.title)


def _read_lines(lines: Iterable[tuple[str, Row | str | BadLine]]) -> Iterator[Row | BadLine]:
    """The rows of lines that are not blank; the id of a text alone is the number of its line."""
    for number, (line, row) in enumerate(lines, 1):
        if line.strip():
            yield Row(str(number), row) if isinstance(row, str) else row


def _read_columns(table: Table, columns: Sequence[str]) -> Iterator[Row | BadLine]:
    """The rows of a table, from its columns of ids (if it has one) and texts; without blank lines."""
    for number, (_, shown, values) in enumerate(read_table(table, columns), 1):
        if isinstance(values, BadLine):
            if shown.strip() or str(values).startswith("csv"):
                yield values
            continue
        *name, text = values
        try:
            is_number = bool(name) and isinstance(name[0], int) and not isinstance(name[0], bool)
            own = str(name[0]) if is_number else check_text("id", name[0]) if name else str(number)
            yield Row(own, check_text(columns[-1], text))
        except BadLine as bad:
            yield bad


def predict(
    run: str | Path,
    *,
    input: str | Path = STREAM,
    out: str | Path = STREAM,
    top_k: int = 1,
    precision: Precision = "fp32",
    overwrite: bool = False,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """The verb `predict`. Arguments, result and errors are those of `newsbert_ray.predict`."""
    start = time.perf_counter()
    student = load(run, precision=precision)
    texts, bad, done = open_texts(input), list[str](), 0
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


def _columns(topics: Sequence[tuple[str, float]]) -> Columns:
    """`topic` and `probability` of the first topic, `topic_2` and `probability_2` of the second, ..."""
    columns: Columns = {}
    for rank, (topic, probability) in enumerate(topics, 1):
        end = f"_{rank}" if rank > 1 else ""
        columns |= {f"topic{end}": topic, f"probability{end}": round(probability, 6)}
    return columns


@contextmanager
def _open_predictions(out: str | Path, *, overwrite: bool) -> Iterator[Callable[[list[Columns]], None]]:
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

        def write(rows: list[Columns]) -> None:
            table = pa.Table.from_pylist(rows)
            if not writers:
                writers.append(opened.enter_context(writer(partial, table.schema)))
            writers[0].write_table(table)

        yield write


def _json_line(row: Columns) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
