"""`newsbert-ray embed` and `similar`: files of texts -> embeddings, and the texts that are alike.

`embed` cuts texts into pieces, one output file each, and embeds these on one machine or a cluster; an
interrupted command continues with the missing ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from operator import attrgetter
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from newsbert_ray.config import SettingsError
from newsbert_ray.data.mind import Impression, parse_behaviors
from newsbert_ray.data.sources import BadLine, Say, parse_chunk, read_through, show_progress
from newsbert_ray.record import RECORD
from newsbert_ray.secrets import mask_url
from newsbert_ray.serving import predictor
from newsbert_ray.serving.predictor import Floats, Precision, Predictor
from newsbert_ray.serving.texts import ROWS, SHOWN, Row, TextsError, open_texts
from newsbert_ray.storage.bucket import Remote
from newsbert_ray.storage.workdir import absolute, fetch, last_part

EMBEDDED = "embedded.json"
REJECTED = "rejected"
"""Key in a file's metadata: why rows of its piece were left out."""
_GROUP = 512
"""Pieces in memory at once, on a cluster."""


class EmbedError(ValueError):
    """An output folder that must not be written to, or too many bad rows; the text says more."""


class Piece(NamedTuple):
    """Some rows of the input, and the name of the file for their embeddings."""

    output: str
    rows: list[Row | BadLine]


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
    columns: Mapping[str, Any] = {},
    precision: Precision = "fp32",
    max_rejected_share: float = 0.01,
    overwrite: bool = False,
    say: Say = print,
) -> dict[str, Any]:
    """The verb `embed`. Arguments, result and errors are those of `newsbert_ray.embed`."""
    start = time.perf_counter()
    record, student = predictor.read_run(run)
    folder, files = Remote(absolute(out)), [open_texts(file, columns) for file in input]
    batches = chain.from_iterable(file.pieces() for file in files)
    pieces = (Piece(f"part-{number:05d}.parquet", rows) for number, rows in enumerate(batches))
    if (first := next(pieces, None)) is None:
        raise TextsError(f"{', '.join(map(str, input))}: contains no text")
    hashes = [[last_part(name), file.sha256] for name, file in zip(input, files, strict=True)]
    source: dict[str, Any] = {"model_sha256": predictor.weights_hash(student), "precision": precision}
    source |= {"files": hashes} | ({"columns": columns} if columns else {})
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
    folder.write_json(EMBEDDED, description)
    if rejected:
        say(f"left out, {len(rejected):,} bad rows: {'; '.join(rejected[:SHOWN])}")
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
    embeddings: Floats
    description: dict[str, Any]


def read_embedded(folder: str | Path) -> Embedded:
    """Read what `embed` wrote into memory; EmbedError if it is missing or incomplete."""
    local = fetch(folder)
    description = Remote(absolute(local)).read_json(EMBEDDED)
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
    model = predictor.load(task.run, precision=task.precision)
    good = [row for row in piece.rows if isinstance(row, Row)]
    embeddings = pa.array(model.embed([row.text for row in good]).ravel())
    columns = [pa.array(values, pa.string()) for values in zip(*good, strict=True)] or [[], []]
    columns.append(pa.FixedSizeListArray.from_arrays(embeddings, model.width))
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


def _claim(folder: Remote, source: dict[str, Any], *, overwrite: bool) -> dict[str, Any] | None:
    """Start or continue embeddings of these files by this model; the description of complete ones. EmbedError
    if the location holds something else."""
    known, files, shown = folder.read_json(EMBEDDED), folder.files(), mask_url(folder.url)
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
    folder.write_json(EMBEDDED, {**source, "piece_rows": ROWS, "state": "under way"})
    return None


class Match(NamedTuple):
    """A text, its id, and its score: a cosine, or the click score for a user."""

    score: float
    name: str
    text: str


class Answer(NamedTuple):
    """The query in words, the texts that it consists of, and the matches, best first."""

    question: str
    query: list[str]
    matches: list[Match]


def similar(
    vectors: str | Path,
    *,
    to: str | None = None,
    read: Sequence[str] = (),
    user: str | None = None,
    behaviors: str | Path | None = None,
    run: str | Path | None = None,
    top: int = 10,
) -> Answer:
    """The verb `similar`. Arguments, result and errors are those of `newsbert_ray.similar`."""
    if sum(map(bool, (to, read, user))) != 1:
        raise SettingsError("give one of: --to ID_OR_TEXT, --read ID ID ..., --user USER --behaviors FILE")
    embedded = read_embedded(vectors)
    indices = {name: index for index, name in enumerate(embedded.names)}
    if to is not None:
        rows, query = ([indices[to]], []) if to in indices else ([], [to])
        vector = embedded.embeddings[rows[0]] if rows else _load_student(embedded, run).embed(query)[0]
        scores = predictor.cosines(embedded.embeddings, vector)
        return _answer(f"like {to}", scores, embedded, rows, top, query)
    clicked = list(read) if user is None else _read_history(user, behaviors)
    rows = [indices[name] for name in clicked if name in indices]
    if not rows:
        raise SettingsError(f"none of the {len(clicked)} texts that were read is among these embeddings")
    history = embedded.embeddings[rows]
    if embedded.description.get("task") == "recommendation":
        kind = "click score"
        scores = _load_student(embedded, run).user_scores(history, embedded.embeddings)
    else:
        kind = "cosine to their mean: not trained on clicks"
        scores = predictor.cosine_to_mean(history, embedded.embeddings)
    question = f"{user or 'a user'} who read {len(rows)} of these ({kind})"
    return _answer(question, scores, embedded, rows, top)


def _answer(
    question: str, scores: Floats, embedded: Embedded, rows: list[int], top: int, query: Sequence[str] = ()
) -> Answer:
    """The texts outside the query (`rows`, and texts of `query`), best first; equal ones appear once."""
    texts, matches = [*query, *(embedded.texts[row] for row in rows)], list[Match]()
    seen = {embedded.texts[row] for row in rows}
    for row in np.argsort(-scores, kind="stable").tolist():
        if len(matches) == top:
            break
        if (text := embedded.texts[row]) not in seen:
            seen.add(text)
            matches.append(Match(float(scores[row]), embedded.names[row], text))
    return Answer(question, texts, matches)


def _load_student(embedded: Embedded, run: str | Path | None) -> Predictor:
    location = run or embedded.description.get("run")
    if not location or not (student := fetch(location, without=predictor.NOT_NEEDED) / "student").is_dir():
        raise SettingsError(f"the run that embedded these texts is not at {location}; give --run")
    if predictor.weights_hash(student) != embedded.description["model_sha256"]:
        raise SettingsError(f"the student of {location} did not embed these texts; embed them again")
    return predictor.load_predictor(student, device="cpu")


def _read_history(user: str, behaviors: str | Path | None) -> list[str]:
    """What a user of behaviors.tsv had read before the last impression there."""
    if behaviors is None:
        raise SettingsError(f"--user {user}: give --behaviors, a behaviors.tsv with this user's impressions")

    def parse(line: str) -> Impression | None:
        return parse_behaviors(line) if f"\t{user}\t" in line else None

    chunks = read_through(fetch(behaviors), folder="").chunks
    rows = [row for chunk in chunks for _, row in parse_chunk(chunk, parse) if isinstance(row, Impression)]
    own = [row for row in rows if row.user_id == user]
    if not own:
        raise SettingsError(f"--user {user}: no impression of this user in {behaviors}")
    return max(reversed(own), key=attrgetter("time")).history
