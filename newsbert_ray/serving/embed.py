"""`newsbert-ray embed`: files of texts -> Parquet files of their embeddings, on one machine or a cluster.

The work is cut into pieces, one output file each. An interrupted command continues with the missing ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from newsbert_ray.data.mind import parse_news
from newsbert_ray.data.sources import BadLine, Chunk, parse_chunk, read_through, show_progress
from newsbert_ray.files import sha256_of
from newsbert_ray.secrets import mask_url
from newsbert_ray.serving.predictor import NOT_NEEDED, Precision, load_predictor, read_run, weights_hash
from newsbert_ray.storage.bucket import Remote, is_url
from newsbert_ray.storage.workdir import absolute, download_input, fetch, last_part

EMBEDDED = "embedded.json"
REJECTED = "rejected"
"""Key in a file's metadata: why rows of its piece were left out."""
SUFFIXES = (".tsv", ".jsonl", ".parquet")
IDS, TEXTS = ("news_id", "id", "nid"), ("title", "text")
"""Names of a table's columns; the first that exists is used."""
ROWS = 8192
"""Rows of a piece, at most: a core embeds them in seconds."""
_SHOWN = 5
Say = Callable[[str], None]


class EmbedError(ValueError):
    """An output folder that must not be written to, or too many bad rows; the text says more."""


class TextsError(ValueError):
    """A file that cannot be embedded; the text says why and what to do."""


class EmbedTask(NamedTuple):
    """What all pieces share: locations that every machine understands, threads, and the encoder's numbers."""

    run: str
    out: str
    threads: int | None
    precision: Precision


def embed(
    run: str | Path,
    *,
    input: Sequence[str],
    out: str | Path,
    workers: int | None = None,
    gpus: float = 0,
    precision: Precision = "fp32",
    max_rejected_share: float = 0.01,
    overwrite: bool = False,
    say: Say = print,
) -> dict[str, Any]:
    """The verb `embed`. Arguments, result and errors are those of `newsbert_ray.embed`."""
    start = time.perf_counter()
    record, student = read_run(run)
    folder = Remote(absolute(out))
    files, pieces = [], list[Piece]()
    for file in input:
        digest, own = cut_file(file, first=len(pieces))
        files.append([last_part(file), digest])
        pieces += own
    if not pieces:
        raise TextsError(f"{', '.join(map(str, input))}: contains no text")
    source = {"model_sha256": weights_hash(student), "precision": precision, "files": files}
    _claim(folder, source, overwrite=overwrite)
    existing = folder.files()
    waiting = [piece for piece in pieces if piece.output not in existing]
    if len(waiting) < len(pieces):
        say(f"{len(pieces) - len(waiting)} of {len(pieces)} files are already embedded")
    task = EmbedTask(absolute(run), folder.url, 1 if workers != 0 else None, precision)
    done = 0
    with show_progress(say, "embedding", total=sum(piece.size for piece in waiting)) as advance:
        for rows in _run(waiting, task, workers=workers, gpus=gpus):
            advance(rows)
            done += rows
    seconds = time.perf_counter() - start
    parts = [piece.output for piece in pieces]
    if missing := sorted(set(parts) - folder.files().keys()):
        raise EmbedError(
            f"{folder.url}: {missing[0]} was written by another machine, to its own disk; give an --out that "
            "all machines share, or a URL such as s3://bucket/vectors"
        )
    footers = [_read_footer(folder, part) for part in parts]
    rejected = [reason for _, _, reasons in footers for reason in reasons]
    total, width = sum(rows for rows, _, _ in footers), footers[0][1]
    if len(rejected) > max_rejected_share * max(1, total + len(rejected)):
        raise EmbedError(
            f"{len(rejected):,} of {total + len(rejected):,} rows are bad, at most {max_rejected_share:.1%} "
            f"may be: {'; '.join(rejected[:3])}. Correct the file, or allow more with --max_rejected_share"
        )
    settings = record.settings
    model = {"layers": settings["student"]["layers"], "task": settings.get("task", "topics")}
    made = {"state": "whole", "rows": total, "dimensions": width, "parts": parts}
    description = {**source, **made, **model, "run": absolute(run)}
    _describe(folder, description)
    if rejected:
        say(f"left out, {len(rejected):,} bad rows: {'; '.join(rejected[:_SHOWN])}")
    if done:
        say(f"{done:,} texts in {seconds:.1f} s ({done / seconds:,.0f} texts/s with loading and writing)")
    say(
        f"{total:,} embeddings of {width} dimensions are in {folder.url}: {len(pieces)} "
        f"file{'s' if len(pieces) > 1 else ''} (id, text, embedding) and {EMBEDDED}"
    )
    return description


class Embedded(NamedTuple):
    """M texts with their ids and embeddings (M, D), and the content of embedded.json."""

    names: list[str]
    texts: list[str]
    embeddings: npt.NDArray[np.float32]
    description: dict[str, Any]


def read_embedded(folder: str | Path) -> Embedded:
    """Read what `embed` wrote into memory.

    Raises:
        EmbedError: no embeddings there, or incomplete ones.
    """
    local = fetch(folder)
    description = _read_description(Remote(absolute(local)))
    if description.get("state") != "whole":
        raise EmbedError(
            f"{folder}: contains no complete embeddings; make them with: newsbert-ray embed RUN --input "
            f"news.tsv --out {folder}"
        )
    table = pa.concat_tables(pq.read_table(local / part) for part in description["parts"]).combine_chunks()
    values = table["embedding"].combine_chunks().values.to_numpy()
    embeddings = values.reshape(-1, description["dimensions"])
    return Embedded(table["id"].to_pylist(), table["text"].to_pylist(), embeddings, description)


def embed_piece(piece: Piece, task: EmbedTask) -> int:
    """Embed one piece and write its file; returns the number of its rows, with the bad ones."""
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    student = fetch(task.run, without=NOT_NEEDED) / "student"
    predictor = load_predictor(student, precision=task.precision)
    rows = list(read_rows(piece))
    good = [row for row in rows if isinstance(row, Row)]
    embeddings = pa.array(predictor.embed([row.text for row in good]).ravel())
    columns = [pa.array(values, pa.string()) for values in zip(*good, strict=True)] or [[], []]
    columns.append(pa.FixedSizeListArray.from_arrays(embeddings, predictor.width))
    table = pa.table(columns, names=["id", "text", "embedding"])
    rejected = json.dumps([str(row) for row in rows if isinstance(row, BadLine)])
    buffer = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({REJECTED: rejected}), buffer)
    Remote(task.out).write(piece.output, buffer.getvalue())
    return len(rows)


def _run(pieces: Sequence[Piece], task: EmbedTask, *, workers: int | None, gpus: float) -> Iterator[int]:
    if workers == 0 or not pieces:
        yield from (embed_piece(piece, task) for piece in pieces)
        return
    from newsbert_ray.data.stream import map_chunks
    from newsbert_ray.ray_session import ray_session

    with ray_session(cpus=workers):
        yield from map_chunks(pieces, embed_piece, task, workers=workers, gpus=gpus)


def _read_footer(folder: Remote, part: str) -> tuple[int, int, list[str]]:
    """A file's rows, the width of its embeddings, and why rows of its piece were left out."""
    with folder.open(part) as file:
        metadata = pq.read_metadata(file)
    schema = metadata.schema.to_arrow_schema()
    rejected = json.loads((schema.metadata or {}).get(REJECTED.encode(), b"[]"))
    return metadata.num_rows, schema.field("embedding").type.list_size, rejected


def _read_description(folder: Remote) -> dict[str, Any]:
    """The content of embedded.json; empty if there is none."""
    try:
        description: dict[str, Any] = json.loads(folder.read(EMBEDDED) or b"{}")
    except ValueError:
        return {}
    return description


def _describe(folder: Remote, description: dict[str, Any]) -> None:
    folder.write(EMBEDDED, (json.dumps(description, indent=1) + "\n").encode())


def _claim(folder: Remote, source: dict[str, Any], *, overwrite: bool) -> None:
    """Start embeddings of these files by this model, or continue them.

    Raises:
        EmbedError: the location holds something else.
    """
    known, files, shown = _read_description(folder), folder.files(), mask_url(folder.url)
    if not known and files:
        raise EmbedError(f"--out {shown}: exists, and holds no embeddings; give another --out")
    if known:
        known = {"precision": "fp32", **known}  # the first version did not write it
        if {name: known.get(name) for name in source} == source:
            return
        if not overwrite:
            raise EmbedError(
                f"--out {shown}: holds embeddings of other texts, of another model or in another "
                "precision; add --overwrite, or give another --out"
            )
        folder.remove(name for name in files if name.startswith("part-") and "/" not in name)
    _describe(folder, {**source, "state": "under way"})


@dataclass(frozen=True)
class Piece:
    """A part of a file: `size` lines or rows from `start` on, of a chunk of lines or of a Parquet row group.

    Attributes:
        number: counts the pieces of all files.
        location: the file's path, or its URL, perhaps for another machine.
        columns: indices of id and text in a .tsv with a header; None in MIND's news.tsv.
    """

    number: int
    location: str
    lines: Chunk | None = None
    group: int | None = None
    columns: tuple[int, int] | None = None
    start: int = 0
    size: int = 0

    @property
    def output(self) -> str:
        """Name of the file with its embeddings."""
        return f"part-{self.number:05d}.parquet"


class Row(NamedTuple):
    """A text with its id."""

    name: str
    text: str


def cut_file(location: str | Path, *, first: int = 0) -> tuple[str, list[Piece]]:
    """SHA-256 of a file, and its pieces, numbered from `first`.

    Args:
        location: path or URL; a URL is downloaded.
    Raises:
        TextsError: no such file, another format, or a required column is missing.
    """
    path = _local_file(str(location))
    location = str(location) if is_url(location) else str(path)
    if path.suffix not in SUFFIXES:
        raise TextsError(f"{path}: give a {', '.join(SUFFIXES)} file")
    if not path.is_file():
        raise TextsError(f"{path}: no such file")
    if path.suffix == ".parquet":
        file, _ = _open_parquet(path)
        digest = sha256_of(path)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        parts = [Piece(0, location, group=group, size=size) for group, size in enumerate(sizes)]
    else:
        source = read_through(path, folder=path.parent.name)
        digest, columns = source.sha256, _header_columns(path) if path.suffix == ".tsv" else None
        parts = [Piece(0, location, lines=c, columns=columns, size=c.lines) for c in source.chunks]
    cut = [
        replace(part, start=start, size=min(ROWS, part.size - start))
        for part in parts
        for start in range(0, part.size, ROWS)
    ]
    return digest, [replace(piece, number=first + number) for number, piece in enumerate(cut)]


def read_rows(piece: Piece) -> Iterator[Row | BadLine]:
    """The rows of a piece in their order; a bad one as the reason.

    Raises:
        PrepareError, TextsError: the file has changed since it was cut.
    """
    path = _local_file(piece.location)
    if piece.lines is None:
        file, columns = _open_parquet(path)
        table = file.read_row_group(piece.group, columns=list(columns)).slice(piece.start, piece.size)
        for name, text in zip(*(table[column].to_pylist() for column in columns), strict=True):
            try:
                yield _check_row(name, text)
            except BadLine as bad:
                yield bad
        return

    def parse(line: str) -> Row:
        return _parse_line(line, path.suffix, piece.columns)

    lines = parse_chunk(replace(piece.lines, path=str(path)), parse)
    for number, (line, row) in enumerate(lines, piece.lines.first_line - 1):
        is_header = number == 0 and piece.columns is not None
        index = number - piece.lines.first_line + 1 - piece.start
        if 0 <= index < piece.size and line.strip() and not is_header:
            yield row


def _local_file(location: str) -> Path:
    return Path(download_input(location)).expanduser().absolute()


def _header_columns(path: Path) -> tuple[int, int] | None:
    """Indices of id and text if the first line of a .tsv names them."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header = file.readline(10_000).rstrip("\r\n").split("\t")
    names = _id_and_text(header)
    return (header.index(names[0]), header.index(names[1])) if names else None


def _id_and_text(names: Collection[str]) -> tuple[str, str] | None:
    """Which of these columns hold id and text."""
    found = [name for known in (IDS, TEXTS) for name in [n for n in known if n in names][:1]]
    return (found[0], found[1]) if len(found) == 2 else None


def _parse_line(line: str, suffix: str, columns: tuple[int, int] | None) -> Row:
    if suffix == ".jsonl":
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadLine(f"columns: not JSON ({error})") from error
        if not isinstance(value, dict):
            raise BadLine("columns: not a JSON object")
        names = _id_and_text(value)
        if names is None:
            raise BadLine(f"columns: no {' or '.join(IDS)}, or no {' or '.join(TEXTS)}")
        return _check_row(value[names[0]], value[names[1]])
    if columns is None:
        news = parse_news(line)
        return Row(news.news_id, news.title)
    cells = line.split("\t")
    if len(cells) <= max(columns):
        raise BadLine(f"columns: {len(cells)} found, {max(columns) + 1} expected")
    return _check_row(*(cells[column] for column in columns))


def _check_row(name: object, text: object) -> Row:
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise BadLine(f"id: {name!r} is not an id")
    if not isinstance(text, str) or not text.strip():
        raise BadLine("text: empty")
    return Row(str(name), text)


def _open_parquet(path: Path) -> tuple[pq.ParquetFile, tuple[str, str]]:
    """The file, and its columns with id and text."""
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise TextsError(f"{path}: not a complete Parquet file ({error})") from error
    columns = _id_and_text(file.schema_arrow.names)
    if columns is None:
        raise TextsError(
            f"{path}: its columns are {', '.join(file.schema_arrow.names)}; name the id {' or '.join(IDS)} "
            f"and the text {' or '.join(TEXTS)}"
        )
    return file, columns
