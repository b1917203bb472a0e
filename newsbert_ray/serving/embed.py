"""`newsbert-ray embed`: a file of texts -> shards of their embeddings, over a cluster, restartable."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from newsbert_ray import inputs, storage
from newsbert_ray.data.mind import BadLine
from newsbert_ray.record import read_record, write_json
from newsbert_ray.serving.encode import best_device, load_encoder
from newsbert_ray.serving.texts import Piece, TextsError, cut_file, read_rows

EMBEDDED = "embedded.json"
_REJECTED = "rejected"
"""In a shard's metadata: why rows of its piece were left out."""
_SAY_SECONDS = 5.0
_SHOWN = 5
Say = Callable[[str], None]


class EmbedError(ValueError):
    """An output folder that may not be written to, or texts that are mostly damage; the text says more."""


@dataclass(frozen=True)
class _Shared:
    """What all pieces need."""

    student: str
    out: str
    threads: int | None


class Done(NamedTuple):
    """What became of a piece: its shard, its rows, the seconds they took, and what was no row."""

    shard: str
    rows: int
    seconds: float
    rejected: list[str]


def embed(
    run: str | Path,
    *,
    input: Sequence[str],
    out: str | Path,
    workers: int | None = None,
    max_rejected_share: float = 0.01,
    overwrite: bool = False,
    say: Say = print,
) -> dict[str, Any]:
    """Embed every text of some files by the student of a run. What is done already is not done again.

    Args:
        run: folder of a finished run, or its URL.
        input: MIND's news.tsv, or .jsonl or .parquet with news_id or id, and title or text; URLs too.
        out: folder for part-NNNNN.parquet (id, text: string, embedding: D float32), in the order of the
            input, and embedded.json; on a cluster one that all nodes share.
        workers: texts' pieces at once, each on one core; all cores by default, 0 works in this process with
            all of them.
        max_rejected_share: more bad rows than this share is an error.
        overwrite: replace embeddings that were made of other texts or by another model.
        say: told the progress and the closing lines.
    Returns:
        What embedded.json holds: rows, dimensions, parts, the model's and the files' hashes.
    Raises:
        EmbedError, TextsError: see there.
        RecordError, EncoderError: no whole finished run.
    """
    began = time.perf_counter()
    folder = inputs.fetch(run, without=("checkpoints/*",))
    record = read_record(folder)
    student, target = folder / "student", Path(out)
    files = [Path(inputs.brought(one)).expanduser() for one in input]
    digests, pieces = [], list[Piece]()
    for file in files:
        digest, found = cut_file(file, first=len(pieces))
        digests.append(digest)
        pieces += found
    if not pieces:
        raise TextsError(f"{', '.join(map(str, files))}: no text in it")
    with (student / "model.safetensors").open("rb") as weights:
        model = hashlib.file_digest(weights, "sha256").hexdigest()
    made_of = {"model_sha256": model, "files": dict(zip([f.name for f in files], digests, strict=True))}
    _claim(target, made_of, overwrite=overwrite)
    waiting = [piece for piece in pieces if not (target / _shard(piece)).is_file()]
    if len(waiting) < len(pieces):
        say(f"{len(pieces) - len(waiting)} of {len(pieces)} shards are there already")
    shared = _Shared(str(student.absolute()), str(target.absolute()), 1 if workers != 0 else None)
    done = list(_track(_run(waiting, shared, workers=workers), sum(p.size for p in waiting), say))
    rejected = [reason for piece in pieces for reason in _rejected(target / _shard(piece))]
    rows = sum(pq.read_metadata(target / _shard(piece)).num_rows for piece in pieces)
    if len(rejected) > max_rejected_share * max(1, rows + len(rejected)):
        raise EmbedError(
            f"{len(rejected):,} of {rows + len(rejected):,} rows are bad, at most {max_rejected_share:.1%} "
            f"may be: {'; '.join(rejected[:3])}. Mend the file, or allow more with --max_rejected_share"
        )
    described = {
        **made_of,
        "state": "whole",
        "rows": rows,
        "dimensions": _width(target / _shard(pieces[0])),
        "parts": [_shard(piece) for piece in pieces],
        "layers": record.settings["student"]["layers"],
        "task": record.settings.get("task", "topics"),
        "run": storage.absolute(run),
    }
    write_json(target / EMBEDDED, described)
    for line in _closing(described, done, rejected, target, time.perf_counter() - began):
        say(line)
    return described


class Embedded(NamedTuple):
    """Texts with their ids and embeddings (M, D), and what embedded.json says of them."""

    names: list[str]
    texts: list[str]
    embeddings: npt.NDArray[np.float32]
    described: dict[str, Any]


def read_embedded(folder: str | Path) -> Embedded:
    """What `embed` left, all in memory.

    Raises:
        EmbedError: none there, or not whole.
    """
    place = inputs.fetch(folder)
    described = _described(place)
    if described is None or described.get("state") != "whole":
        raise EmbedError(
            f"{folder}: no whole embeddings there; make them with: newsbert-ray embed RUN --input news.tsv "
            f"--out {folder}"
        )
    tables = [pq.read_table(place / part) for part in described["parts"]]
    table = pa.concat_tables(tables).combine_chunks()
    values = table["embedding"].combine_chunks().values.to_numpy()
    embeddings = values.reshape(-1, described["dimensions"])
    return Embedded(table["id"].to_pylist(), table["text"].to_pylist(), embeddings, described)


def _run(pieces: Sequence[Piece], shared: _Shared, *, workers: int | None) -> Iterator[Done]:
    if workers == 0 or not pieces:
        yield from (embed_piece(piece, shared) for piece in pieces)
        return
    from newsbert_ray.connect import ray_session
    from newsbert_ray.data.stream import map_chunks

    with ray_session(cpus=workers):
        yield from map_chunks(pieces, embed_piece, shared, workers=workers)


def embed_piece(piece: Piece, shared: _Shared) -> Done:
    """Embed one piece and write its shard, whole or not at all."""
    encoder = load_encoder(Path(shared.student), device=best_device(), threads=shared.threads)
    began = time.perf_counter()
    names, texts, rejected = [], [], []
    for row in read_rows(piece):
        if isinstance(row, BadLine):
            rejected.append(str(row))
        else:
            names.append(row.name)
            texts.append(row.text)
    found = encoder.encode(texts)
    embeddings = pa.FixedSizeListArray.from_arrays(pa.array(found.ravel()), encoder.width)
    strings = {"id": pa.array(names, pa.string()), "text": pa.array(texts, pa.string())}
    table = pa.table({**strings, "embedding": embeddings})
    table = table.replace_schema_metadata({_REJECTED: json.dumps(rejected)})
    name = _shard(piece)
    partial = Path(shared.out) / f".{name}.{os.getpid()}"
    pq.write_table(table, partial)
    os.replace(partial, Path(shared.out) / name)
    return Done(name, len(texts), time.perf_counter() - began, rejected)


def _shard(piece: Piece) -> str:
    return f"part-{piece.number:05d}.parquet"


def _width(shard: Path) -> int:
    return int(pq.read_schema(shard).field("embedding").type.list_size)


def _rejected(shard: Path) -> list[str]:
    """Why rows of a shard's piece were left out."""
    metadata = pq.read_schema(shard).metadata or {}
    found: list[str] = json.loads(metadata.get(_REJECTED.encode(), b"[]"))
    return found


def _described(folder: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((folder / EMBEDDED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def _claim(target: Path, made_of: dict[str, Any], *, overwrite: bool) -> None:
    """Make `target` the folder of these embeddings, or go on with it."""
    target.mkdir(parents=True, exist_ok=True)
    known = _described(target)
    if known is None and any(target.iterdir()):
        raise EmbedError(f"--out {target}: there already, and no folder of embeddings; give another --out")
    if known is not None and {name: known.get(name) for name in made_of} != made_of:
        if not overwrite:
            raise EmbedError(
                f"--out {target}: embeddings of other texts or by another model; add --overwrite, or give "
                "another --out"
            )
        for part in target.glob("*part-*.parquet*"):
            part.unlink()
        known = None
    if known is None:
        write_json(target / EMBEDDED, {**made_of, "state": "under way"})


def _track(found: Iterable[Done], total: int, say: Say) -> Iterator[Done]:
    """Pass results on, and say now and then how far it is and how fast."""
    began = said = time.perf_counter()
    rows = 0
    for one in found:
        yield one
        rows += one.rows + len(one.rejected)
        now = time.perf_counter()
        if now - said >= _SAY_SECONDS and rows < total:
            said = now
            rate = rows / (now - began)
            left = (total - rows) / rate
            say(f"{rows:,} of about {total:,} texts, {rate:,.0f} titles/s, {left:,.0f} s left")


def _closing(
    described: dict[str, Any], done: Sequence[Done], rejected: Sequence[str], target: Path, seconds: float
) -> Iterator[str]:
    rows = sum(one.rows for one in done)
    if rejected:
        yield f"left out, {len(rejected):,} bad rows: {'; '.join(rejected[:_SHOWN])}"
    if rows:
        yield f"{rows:,} texts in {seconds:.1f} s ({rows / seconds:,.0f} titles/s, everything counted)"
    yield (
        f"{described['rows']:,} embeddings of {described['dimensions']} dimensions are in {target}: "
        f"{len(described['parts'])} shards (id, text, embedding) and {EMBEDDED}"
    )
