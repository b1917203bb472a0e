"""`newsbert-ray embed`: files of texts -> shards of their embeddings, over a cluster, restartable."""

from __future__ import annotations

import json
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
from newsbert_ray.record import read_record
from newsbert_ray.serving.encode import Arithmetic, Precision, best_device, load_encoder, weights_hash
from newsbert_ray.serving.shelf import EMBEDDED, REJECTED, EmbedError, Shelf, shard_name
from newsbert_ray.serving.texts import Piece, TextsError, cut_file, read_rows

_NOT_NEEDED = ("checkpoints/*",)
_SAY_SECONDS = 5.0
_SHOWN = 5
Say = Callable[[str], None]


@dataclass(frozen=True)
class Shared:
    """What all pieces need: the places of run and shards, as any machine understands them, and the numbers to
    compute in."""

    run: str
    out: str
    threads: int | None
    precision: Precision


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
    gpus: float = 0,
    precision: Precision = "fp32",
    max_rejected_share: float = 0.01,
    overwrite: bool = False,
    say: Say = print,
) -> dict[str, Any]:
    """Embed every text of some files by the student of a run. What is done already is not done again.

    Args:
        run: folder of a finished run, or its URL.
        input: MIND's news.tsv, or .jsonl or .parquet with news_id or id, and title or text; URLs too.
        out: folder or URL for part-NNNNN.parquet (id, text: string, embedding: D float32), in the order of
            the input, and embedded.json. On a cluster of several machines all of them reach it, the run and
            the input by these names: a shared disk, or URLs.
        workers: pieces at once, each on one core; as many as there are cores by default, 0 works in this
            process with all of them.
        gpus: of each worker, such as 0.25; the encoder then works there.
        precision: the encoder's numbers; bf16 pays where the hardware has it, and is off in the third digit.
        max_rejected_share: more bad rows than this share is an error.
        overwrite: replace embeddings that were made of other texts or by another model.
        say: told the progress and the closing lines.
    Returns:
        What embedded.json holds: rows, dimensions, parts, the model's and the files' hashes.
    Raises:
        EmbedError, TextsError: see there.
        RecordError, EncoderError: no whole finished run.
        StorageError: a URL that cannot be read or written.
    """
    began = time.perf_counter()
    folder = inputs.fetch(run, without=_NOT_NEEDED)
    record = read_record(folder)
    shelf = Shelf(storage.absolute(out))
    digests, pieces = [], list[Piece]()
    for file in input:
        digest, found = cut_file(file, first=len(pieces))
        digests.append(digest)
        pieces += found
    if not pieces:
        raise TextsError(f"{', '.join(map(str, input))}: no text in it")
    model = weights_hash(folder / "student")
    names = [storage.last_part(one) for one in input]
    made_of: dict[str, Any] = {"model_sha256": model, "precision": precision}
    made_of |= {"files": [list(pair) for pair in zip(names, digests, strict=True)]}
    shelf.claim(made_of, overwrite=overwrite)
    there = shelf.names()
    waiting = [piece for piece in pieces if shard_name(piece) not in there]
    if len(waiting) < len(pieces):
        say(f"{len(pieces) - len(waiting)} of {len(pieces)} shards are there already")
    shared = Shared(storage.absolute(run), shelf.place, 1 if workers != 0 else None, precision)
    found_now = _run(waiting, shared, workers=workers, gpus=gpus)
    done = list(_track(found_now, sum(p.size for p in waiting), say))
    footers = [shelf.footer(shard_name(piece)) for piece in pieces]
    rejected = [reason for footer in footers for reason in footer.rejected]
    rows = sum(footer.rows for footer in footers)
    if len(rejected) > max_rejected_share * max(1, rows + len(rejected)):
        raise EmbedError(
            f"{len(rejected):,} of {rows + len(rejected):,} rows are bad, at most {max_rejected_share:.1%} "
            f"may be: {'; '.join(rejected[:3])}. Mend the file, or allow more with --max_rejected_share"
        )
    described = {
        **made_of,
        "state": "whole",
        "rows": rows,
        "dimensions": footers[0].width,
        "parts": [shard_name(piece) for piece in pieces],
        "layers": record.settings["student"]["layers"],
        "task": record.settings.get("task", "topics"),
        "run": storage.absolute(run),
    }
    shelf.describe(described)
    for line in _closing(described, done, rejected, shelf.place, time.perf_counter() - began):
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
    described = Shelf(storage.absolute(place)).described()
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


def _run(pieces: Sequence[Piece], shared: Shared, *, workers: int | None, gpus: float) -> Iterator[Done]:
    if workers == 0 or not pieces:
        yield from (embed_piece(piece, shared) for piece in pieces)
        return
    from newsbert_ray.connect import ray_session
    from newsbert_ray.data.stream import map_chunks

    with ray_session(cpus=workers):
        yield from map_chunks(pieces, embed_piece, shared, workers=workers, gpus=gpus)


def embed_piece(piece: Piece, shared: Shared) -> Done:
    """Embed one piece and write its shard, whole or not at all."""
    student = inputs.fetch(shared.run, without=_NOT_NEEDED) / "student"
    arithmetic = Arithmetic(best_device(), shared.precision)
    encoder = load_encoder(student, arithmetic=arithmetic, threads=shared.threads)
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
    name = shard_name(piece)
    Shelf(shared.out).put(name, table.replace_schema_metadata({REJECTED: json.dumps(rejected)}))
    return Done(name, len(texts), time.perf_counter() - began, rejected)


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
    described: dict[str, Any], done: Sequence[Done], rejected: Sequence[str], place: str, seconds: float
) -> Iterator[str]:
    rows = sum(one.rows for one in done)
    if rejected:
        yield f"left out, {len(rejected):,} bad rows: {'; '.join(rejected[:_SHOWN])}"
    if rows:
        yield f"{rows:,} texts in {seconds:.1f} s ({rows / seconds:,.0f} titles/s, everything counted)"
    yield (
        f"{described['rows']:,} embeddings of {described['dimensions']} dimensions are in {place}: "
        f"{len(described['parts'])} shards (id, text, embedding) and {EMBEDDED}"
    )
