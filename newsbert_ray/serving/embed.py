"""`newsbert-ray embed` and `predict`: files of texts -> embeddings, or topics with their probabilities.

Texts are read in constant memory. `embed` cuts them into pieces, one output file each, and embeds these on
one machine or a cluster; an interrupted command continues with the missing ones.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, islice
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from newsbert_ray.config import SettingsError
from newsbert_ray.data.sources import BadLine, show_progress
from newsbert_ray.files import replace_file
from newsbert_ray.record import RECORD
from newsbert_ray.secrets import mask_url
from newsbert_ray.serving.predictor import NOT_NEEDED, Precision, load, load_predictor, read_run, weights_hash
from newsbert_ray.serving.texts import ROWS, STREAM, Row, TextsError, open_texts
from newsbert_ray.storage.bucket import Remote, is_url
from newsbert_ray.storage.workdir import absolute, fetch, last_part

EMBEDDED = "embedded.json"
REJECTED = "rejected"
"""Key in a file's metadata: why rows of its piece were left out."""
PREDICTED = (".jsonl", ".csv", ".parquet")
_GROUP = 512
"""Pieces in memory at once, on a cluster."""
_SHOWN = 5
Say = Callable[[str], None]
Columns = dict[str, Any]


class EmbedError(ValueError):
    """An output folder that must not be written to, or too many bad rows; the text says more."""


class Piece(NamedTuple):
    """Some rows of the input; `number` counts the pieces of all files."""

    number: int
    rows: list[Row | BadLine]

    @property
    def output(self) -> str:
        """Name of the file with its embeddings."""
        return f"part-{self.number:05d}.parquet"


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
    folder, files = Remote(absolute(out)), [open_texts(file) for file in input]
    pieces = (Piece(*pair) for pair in enumerate(chain.from_iterable(file.pieces() for file in files)))
    if (first := next(pieces, None)) is None:
        raise TextsError(f"{', '.join(map(str, input))}: contains no text")
    hashes = [[last_part(name), file.sha256] for name, file in zip(input, files, strict=True)]
    source = {"model_sha256": weights_hash(student), "precision": precision, "files": hashes}
    if whole := _claim(folder, source, overwrite=overwrite):
        say(f"all {len(whole['parts'])} files of {mask_url(folder.url)} are already embedded")
        return whole
    existing, parts = folder.files(), list[str]()
    task = EmbedTask(absolute(run), folder.url, 1 if workers != 0 else None, precision)
    done = 0
    with show_progress(say, "embedding", total=sum(file.lines for file in files)) as advance:

        def waiting() -> Iterator[Piece]:
            for piece in chain([first], pieces):
                parts.append(piece.output)
                if piece.output in existing:
                    advance(len(piece.rows))
                else:
                    yield piece

        for rows in _run(waiting(), task, workers=workers, gpus=gpus):
            advance(rows)
            done += rows
    if kept := len(existing.keys() & {*parts}):
        say(f"{kept} of {len(parts)} files were already embedded")
    seconds = time.perf_counter() - start
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
    made = {"state": "whole", "rows": total, "dimensions": width, "parts": parts, "piece_rows": ROWS}
    description = {**source, **made, **model, "run": absolute(run)}
    _describe(folder, description)
    if rejected:
        say(f"left out, {len(rejected):,} bad rows: {'; '.join(rejected[:_SHOWN])}")
    if done:
        say(f"{done:,} texts in {seconds:.1f} s ({done / seconds:,.0f} texts/s with loading and writing)")
    say(
        f"{total:,} embeddings of {width} dimensions are in {folder.url}: {len(parts)} "
        f"file{'s' if len(parts) > 1 else ''} (id, text, embedding) and {EMBEDDED}"
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
        is_run = (local / RECORD).is_file() or (local / "settings.json").is_file()
        run, out = (folder, "VECTORS") if is_run else ("RUN", folder)
        raise EmbedError(
            f"{folder}: {'a run, which ' if is_run else ''}contains no complete embeddings; make them with: "
            f"newsbert-ray embed {quote(str(run))} --input news.tsv --out {quote(str(out))}"
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
    good = [row for row in piece.rows if isinstance(row, Row)]
    embeddings = pa.array(predictor.embed([row.text for row in good]).ravel())
    columns = [pa.array(values, pa.string()) for values in zip(*good, strict=True)] or [[], []]
    columns.append(pa.FixedSizeListArray.from_arrays(embeddings, predictor.width))
    table = pa.table(columns, names=["id", "text", "embedding"])
    rejected = json.dumps([str(row) for row in piece.rows if isinstance(row, BadLine)])
    buffer = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({REJECTED: rejected}), buffer)
    Remote(task.out).write(piece.output, buffer.getvalue())
    return len(piece.rows)


def _run(pieces: Iterator[Piece], task: EmbedTask, *, workers: int | None, gpus: float) -> Iterator[int]:
    if workers == 0:
        yield from (embed_piece(piece, task) for piece in pieces)
        return
    from newsbert_ray.data.stream import map_chunks
    from newsbert_ray.ray_session import ConnectError, ray_session

    if not (group := list(islice(pieces, _GROUP))):
        return
    try:
        with ray_session(cpus=workers):
            while group:
                yield from map_chunks(group, embed_piece, task, workers=workers, gpus=gpus)
                group = list(islice(pieces, _GROUP))
    except ConnectError as error:
        raise EmbedError(f"{error}. To work without Ray, in this process: --workers 0") from error


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


def _claim(folder: Remote, source: dict[str, Any], *, overwrite: bool) -> dict[str, Any] | None:
    """Start embeddings of these files by this model, or continue them.

    Returns:
        The description of embeddings that are complete.
    Raises:
        EmbedError: the location holds something else.
    """
    known, files, shown = _read_description(folder), folder.files(), mask_url(folder.url)
    if not known and files:
        raise EmbedError(f"--out {shown}: exists, and holds no embeddings; give another --out")
    if known:
        known = {"precision": "fp32", **known}  # the first version did not write it
        is_same = {name: known.get(name) for name in source} == source
        if is_same and known.get("state") == "whole" and {*known["parts"]} <= files.keys():
            return known
        # An earlier version cut files into other pieces.
        if is_same and known.get("piece_rows") == ROWS:
            return None
        if not overwrite:
            raise EmbedError(
                f"--out {shown}: holds embeddings of other texts, of another model or in another "
                "precision; add --overwrite, or give another --out"
            )
        folder.remove(name for name in files if name.startswith("part-") and "/" not in name)
    _describe(folder, {**source, "piece_rows": ROWS, "state": "under way"})
    return None


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
        say(f"left out, {len(bad):,} bad rows: {'; '.join(bad[:_SHOWN])}")
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
        if path.suffix == ".parquet":
            writers = list[pq.ParquetWriter]()

            def write_parquet(rows: list[Columns]) -> None:
                table = pa.Table.from_pylist(rows)
                if not writers:
                    writers.append(opened.enter_context(pq.ParquetWriter(partial, table.schema)))
                writers[0].write_table(table)

            yield write_parquet
            return
        file = opened.enter_context(partial.open("w", encoding="utf-8", newline=""))
        writer = csv.writer(file)

        def write_csv(rows: list[Columns]) -> None:
            if not file.tell():
                writer.writerow(rows[0])
            writer.writerows(row.values() for row in rows)

        yield write_csv if path.suffix == ".csv" else lambda rows: file.writelines(map(_json_line, rows))


def _json_line(row: Columns) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
