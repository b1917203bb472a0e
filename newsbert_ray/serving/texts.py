"""Files of texts to embed -> pieces of work -> (id, text) rows. Knows no model and no Ray."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from newsbert_ray.data.mind import BadLine, parse_news
from newsbert_ray.data.sources import Chunk, read_chunk, read_through
from newsbert_ray.inputs import brought
from newsbert_ray.remote import is_url

KINDS = (".tsv", ".jsonl", ".parquet")
IDS, TEXTS = ("news_id", "id"), ("title", "text")
"""Names that a table's columns may have, the first found is taken."""
ROWS = 8192
"""Rows of a piece, at most: what a core embeds in seconds."""


class TextsError(ValueError):
    """A file that cannot be embedded; the text says why and what to do."""


@dataclass(frozen=True)
class Piece:
    """A part of a file: `size` lines or rows from `start` on, of a chunk of lines or of a row group of
    Parquet. `number` counts over all files; `path` is the file's place for whoever reads it, perhaps another
    machine."""

    number: int
    path: str
    lines: Chunk | None = None
    group: int | None = None
    start: int = 0
    size: int = 0


class Row(NamedTuple):
    """A text with its id."""

    name: str
    text: str


def cut_file(given: str | Path, *, first: int = 0) -> tuple[str, list[Piece]]:
    """SHA-256 of a file, or of what stands at a URL, and its pieces, numbered from `first`.

    Raises:
        TextsError: no such file, another kind, or without the columns that are needed.
    """
    path = _at_hand(str(given))
    place = str(given) if is_url(given) else str(path)
    if path.suffix not in KINDS:
        raise TextsError(f"{path}: give a {', '.join(KINDS)} file")
    if not path.is_file():
        raise TextsError(f"{path}: no such file")
    if path.suffix == ".parquet":
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        file = _open_parquet(path)
        _columns(file.schema_arrow.names, path)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        groups = [Piece(0, place, group=n, size=size) for n, size in enumerate(sizes)]
        return digest, _numbered(groups, first)
    source = read_through(path, folder=path.parent.name)
    return source.sha256, _numbered([Piece(0, place, lines=c, size=c.lines) for c in source.chunks], first)


def _numbered(parts: Sequence[Piece], first: int) -> list[Piece]:
    """Parts of a file as pieces of at most ROWS rows, numbered from `first`."""
    cut = [
        replace(part, start=start, size=min(ROWS, part.size - start))
        for part in parts
        for start in range(0, part.size, ROWS)
    ]
    return [replace(piece, number=first + n) for n, piece in enumerate(cut)]


def read_rows(piece: Piece) -> Iterator[Row | BadLine]:
    """The rows of a piece, in their order; what is none with its reason.

    Raises:
        PrepareError, TextsError: the file has changed since it was cut.
    """
    path = _at_hand(piece.path)
    if piece.lines is None:
        file = _open_parquet(path)
        columns = _columns(file.schema_arrow.names, path)
        table = file.read_row_group(piece.group, columns=list(columns)).slice(piece.start, piece.size)
        names, texts = (table[name].to_pylist() for name in columns)
        for name, text in zip(names, texts, strict=True):
            yield _checked(name, text)
        return
    if piece.lines.overlong:
        yield BadLine("columns: a line too long to be a row")
        return
    lines = read_chunk(replace(piece.lines, path=str(path))).split(b"\n")
    for line in lines[piece.start : piece.start + piece.size]:
        if line.strip():
            yield _parse(line.rstrip(b"\r"), path.suffix)


def _at_hand(given: str) -> Path:
    """The file on this machine, a copy of it where a URL is given."""
    return Path(brought(given)).expanduser().absolute()


def _parse(line: bytes, kind: str) -> Row | BadLine:
    try:
        text = line.decode("utf-8")
        if kind == ".tsv":
            news = parse_news(text)
            return Row(news.news_id, news.title)
        value = json.loads(text)
        if not isinstance(value, dict):
            return BadLine("columns: no JSON object")
        name = next((value[key] for key in IDS if key in value), None)
        return _checked(name, next((value[key] for key in TEXTS if key in value), None))
    except BadLine as bad:
        return bad
    except UnicodeDecodeError:
        return BadLine("encoding: not UTF-8")
    except ValueError as error:
        return BadLine(f"columns: no JSON ({error})")


def _checked(name: object, text: object) -> Row | BadLine:
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        return BadLine(f"id: {name!r} is none")
    if not isinstance(text, str) or not text.strip():
        return BadLine("text: empty")
    return Row(str(name), text)


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise TextsError(f"{path}: no whole Parquet file ({error})") from error


def _columns(names: list[str], path: Path) -> tuple[str, str]:
    found = [next((name for name in known if name in names), None) for known in (IDS, TEXTS)]
    if None in found:
        raise TextsError(
            f"{path}: its columns are {', '.join(names)}; name the id {' or '.join(IDS)} and the text "
            f"{' or '.join(TEXTS)}"
        )
    return str(found[0]), str(found[1])
