"""`newsbert-ray embed`: files of texts -> shards of their embeddings, over a cluster, restartable."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from newsbert_ray.data.mind import parse_news
from newsbert_ray.data.sources import BadLine, Chunk, read_chunk, read_through
from newsbert_ray.files import replace_file
from newsbert_ray.record import read_record
from newsbert_ray.serving.predictor import Arithmetic, Precision, best_device, load_encoder, weights_hash
from newsbert_ray.storage import inputs
from newsbert_ray.storage import workdir as storage
from newsbert_ray.storage.bucket import Remote, is_url
from newsbert_ray.storage.inputs import brought

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

    Arguments, result and errors are those of `newsbert_ray.embed`.
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
    from newsbert_ray.data.stream import map_chunks
    from newsbert_ray.ray_session import ray_session

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


EMBEDDED = "embedded.json"
REJECTED = "rejected"
"""In a shard's metadata: why rows of its piece were left out."""


class EmbedError(ValueError):
    """An output folder that may not be written to, or texts that are mostly damage; the text says more."""


class Footer(NamedTuple):
    """What a shard says of itself: rows, numbers in an embedding, and why rows of its piece were left out."""

    rows: int
    width: int
    rejected: list[str]


def shard_name(piece: Piece) -> str:
    """The file of a piece."""
    return f"part-{piece.number:05d}.parquet"


class Shelf:
    """A folder or URL of shards; cheap to make anew on every machine that writes one."""

    def __init__(self, place: str | Path) -> None:
        self.place = str(place)
        self._remote = Remote(self.place) if is_url(self.place) else None

    def names(self) -> set[str]:
        """The whole files that are there."""
        return {name for name in storage.sizes(self.place) if "/" not in name}

    def put(self, name: str, table: pa.Table) -> None:
        """Write a shard, whole or not at all."""
        if self._remote is None:
            with replace_file(Path(self.place) / name) as partial:
                pq.write_table(table, partial)
            return
        with tempfile.TemporaryDirectory() as folder:
            pq.write_table(table, Path(folder) / name)
            self._remote.upload(Path(folder), [name])

    def footer(self, name: str) -> Footer:
        """What the shard says of itself.

        Raises:
            EmbedError: it is not there, though it was written.
        """
        try:
            opened = (Path(self.place) / name).open("rb") if self._remote is None else self._remote.open(name)
        except FileNotFoundError as error:
            raise EmbedError(
                f"{self.place}: {name} was written by another machine, which has a folder of its own there; "
                "give an --out that all machines share, or a URL such as s3://bucket/vectors"
            ) from error
        with opened as file:
            found = pq.read_metadata(file)
        schema = found.schema.to_arrow_schema()
        rejected = json.loads((schema.metadata or {}).get(REJECTED.encode(), b"[]"))
        return Footer(found.num_rows, schema.field("embedding").type.list_size, rejected)

    def described(self) -> dict[str, Any] | None:
        """What embedded.json holds; None where there is none."""
        if self._remote is None:
            path = Path(self.place) / EMBEDDED
            content = path.read_bytes() if path.is_file() else None
        else:
            content = self._remote.read(EMBEDDED)
        try:
            found: dict[str, Any] | None = json.loads(content) if content else None
        except ValueError:
            return None
        return found

    def describe(self, described: dict[str, Any]) -> None:
        """Write embedded.json."""
        storage.leave(self.place, EMBEDDED, json.dumps(described, indent=1) + "\n")

    def claim(self, made_of: dict[str, Any], *, overwrite: bool) -> None:
        """Make the place that of embeddings made of this, or go on with it.

        Raises:
            EmbedError: it holds something else.
        """
        if self._remote is None:
            Path(self.place).mkdir(parents=True, exist_ok=True)
            there = any(Path(self.place).iterdir())
        else:
            there = bool(self._remote.files())
        known, shown = self.described(), storage.shown(self.place)
        if known is not None:
            known = {"precision": "fp32", **known}  # which older ones do not name
        if known is None and there:
            raise EmbedError(f"--out {shown}: there already, and no folder of embeddings; give another --out")
        if known is not None and {name: known.get(name) for name in made_of} != made_of:
            if not overwrite:
                raise EmbedError(
                    f"--out {shown}: embeddings of other texts, by another model or in another "
                    "precision; add --overwrite, or give another --out"
                )
            self._clear()
            known = None
        if known is None:
            self.describe({**made_of, "state": "under way"})

    def _clear(self) -> None:
        """Remove every shard."""
        if self._remote is None:
            for part in Path(self.place).glob("*part-*.parquet*"):
                part.unlink()
        else:
            self._remote.remove(name for name in self.names() if name.startswith("part-"))


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
