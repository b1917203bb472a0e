"""One chunk of a file: scan its ids, then write its rows as shards; in this process or in a Ray task.

Scanning comes first for all chunks, because what becomes of a line (its split, a duplicate) depends on the
others.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from newsbert_ray.data.mind import (
    BadLine,
    Impression,
    News,
    Row,
    excerpt,
    parse_behaviors,
    parse_lines,
    parse_news,
)
from newsbert_ray.data.shards import BEHAVIORS_SCHEMA, NEWS_SCHEMA, SPLITS, Shard, Split
from newsbert_ray.data.sources import CHUNK_BYTES, Chunk, PrepareError, read_chunk
from newsbert_ray.data.split import NO_CODE, Codes, Fate, Fates, Hashes, hash_ids, is_known
from newsbert_ray.data.tokens import TitleTokenizer, restore_tokenizer

Kind = Literal["news", "behaviors"]
_SHOWN = 3


@dataclass(frozen=True)
class Scan:
    """A chunk's lines, shapes (lines,): hash of the id, code of the topic in `topics` (NO_CODE: no row)."""

    hashes: Hashes
    codes: Codes
    topics: list[str]
    error: str | None = None


@dataclass(frozen=True)
class Job:
    """One chunk and what becomes of each of its lines; `file` numbers the file among all sources' files."""

    chunk: Chunk
    kind: Kind
    file: int
    index: int
    fates: Fates
    duplicates: dict[int, int]
    """Position in the chunk -> line number of the first with the same id."""


@dataclass(frozen=True)
class Shared:
    """What all jobs need. Without `folder` nothing but rejected lines is worked out."""

    rejected_folder: str
    folder: str | None
    tokenizer: str
    pad_id: int
    max_tokens: int
    labels: dict[str, int]
    known: Hashes


@dataclass
class Summary:
    """What one job did. `error`: why it could not; then the rest means nothing."""

    file: int
    index: int
    shards: list[tuple[Split, Shard]] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    shown: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    users: Hashes = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))
    error: str | None = None


def rows_of(chunk: Chunk, parse: Callable[[str], Row]) -> Iterator[tuple[str, Row | BadLine]]:
    """Each line of `chunk` as (text, row or the reason why it is none)."""
    content = read_chunk(chunk)
    if chunk.overlong:
        yield (
            content.decode("utf-8", errors="replace"),
            BadLine(f"columns: line of more than {CHUNK_BYTES:,} bytes"),
        )
        return
    yield from parse_lines(content, parse, is_start=chunk.offset == 0)


def scan_news(chunk: Chunk) -> Scan:
    """Ids and topics of a chunk of news.tsv."""
    codes = np.full(chunk.lines, NO_CODE, dtype=np.uint16)
    topics: dict[str, int] = {}
    ids: list[str] = []
    for position, (_, row) in enumerate(rows_of(chunk, parse_news)):
        ids.append("" if isinstance(row, BadLine) else row.news_id)
        if not isinstance(row, BadLine):
            codes[position] = min(topics.setdefault(row.category, len(topics)), int(NO_CODE) - 1)
    return Scan(hash_ids(ids), codes, list(topics))


def scan_behaviors(chunk: Chunk, known: Hashes | None) -> Scan:
    """Impression ids of a chunk of behaviors.tsv.

    Args:
        known: sorted hashes of the news. With it a line that is no whole impression gets NO_CODE; without,
            no line is looked at beyond its id, which is quick.
    """
    rows = rows_of(chunk, _first_column) if known is None else _impressions(chunk, known)
    codes = np.zeros(chunk.lines, dtype=np.uint16)
    ids: list[str] = []
    for position, (_, row) in enumerate(rows):
        if isinstance(row, BadLine):
            codes[position] = NO_CODE
        ids.append(row if isinstance(row, str) else row.impression_id if isinstance(row, Impression) else "")
    return Scan(hash_ids(ids), codes, [])


def scan_chunk(work: tuple[Kind, Chunk], known: Hashes | None) -> tuple[Chunk, Scan]:
    """Scan a chunk of either kind; the chunk comes back with it, as scans end in any order.

    What a file or a disk can cause comes back as the scan's `error`.
    """
    kind, chunk = work
    try:
        return chunk, scan_news(chunk) if kind == "news" else scan_behaviors(chunk, known)
    except PrepareError as error:
        return chunk, Scan(hash_ids([]), np.zeros(0, dtype=np.uint16), [], str(error))
    except OSError as error:
        return chunk, Scan(hash_ids([]), np.zeros(0, dtype=np.uint16), [], explain_os_error(error))


def run_job(job: Job, shared: Shared) -> Summary:
    """Write one chunk's shards and rejected lines; what a file or a disk can cause comes back as `error`."""
    try:
        return _run_news(job, shared) if job.kind == "news" else _run_behaviors(job, shared)
    except PrepareError as error:
        return Summary(job.file, job.index, error=str(error))
    except OSError as error:
        return Summary(job.file, job.index, error=explain_os_error(error))


def explain_os_error(error: OSError) -> str:
    """One message for a full disk or a path that a worker cannot see."""
    where = f" ({error.filename})" if error.filename else ""
    cure = "free some room beside --out; on several machines all files must lie where every one sees them"
    return f"{error.strerror or error}{where}; {cure}"


def rejected_part(folder: str | Path, file: int, index: int) -> Path:
    """Where one chunk's rejected lines wait to be joined."""
    return Path(folder) / f"rejected-{file:02d}-{index:05d}.part"


def _run_news(job: Job, shared: Shared) -> Summary:
    summary = Summary(job.file, job.index)
    kept: list[list[News]] = [[] for _ in SPLITS]
    rejected: list[tuple[int, str, str]] = []
    for position, (line, row) in enumerate(rows_of(job.chunk, parse_news)):
        fate = int(job.fates[position])
        if isinstance(row, BadLine):
            rejected.append((position, line, str(row)))
        elif fate <= Fate.TEST:
            kept[fate].append(row)
        elif fate == Fate.DUPLICATE:
            rejected.append((position, line, _duplicate(job, position)))
        elif fate == Fate.UNSEEN_TOPIC:
            rejected.append((position, line, f"label: category {row.category!r} has no training news"))
        else:
            summary.counts["earlier"] += 1
    _write_rejected(job, shared, rejected, summary)
    if shared.folder is None:
        return summary
    tokenizer = _tokenizer(shared.tokenizer, shared.pad_id)
    for split, rows in zip(SPLITS, kept, strict=True):
        if rows:
            table = _news_table(rows, tokenizer, shared)
            summary.shards.append((split, _write_shard(job, shared.folder, split, table)))
            summary.counts["words"] += sum(len(row.title.split()) for row in rows)
            summary.counts["tokens"] += len(table["tokens"].combine_chunks().values)
    return summary


def _run_behaviors(job: Job, shared: Shared) -> Summary:
    summary = Summary(job.file, job.index)
    kept: list[list[Impression]] = [[] for _ in SPLITS]
    rejected: list[tuple[int, str, str]] = []
    for position, (line, row) in enumerate(_impressions(job.chunk, shared.known)):
        if isinstance(row, BadLine):
            rejected.append((position, line, str(row)))
        elif job.fates[position] <= Fate.TEST:
            kept[job.fates[position]].append(row)
        else:
            rejected.append((position, line, _duplicate(job, position)))
    _write_rejected(job, shared, rejected, summary)
    if shared.folder is None:
        return summary
    for split, rows in zip(SPLITS, kept, strict=True):
        if rows:
            summary.shards.append((split, _write_shard(job, shared.folder, split, _behaviors_table(rows))))
            summary.counts["impressions"] += len(rows)
            summary.counts["clicks"] += sum(sum(row.clicked) for row in rows if row.clicked)
    summary.users = np.unique(hash_ids([row.user_id for rows in kept for row in rows]))
    return summary


def _impressions(chunk: Chunk, known: Hashes) -> Iterator[tuple[str, Impression | BadLine]]:
    """Rows of a chunk of behaviors.tsv; one that names a news which is not in `known` is bad."""
    rows = list(rows_of(chunk, parse_behaviors))
    named = list(
        {
            name
            for _, row in rows
            if isinstance(row, Impression)
            for name in chain(row.history, row.candidates)
        }
    )
    unknown = {named[i] for i in np.flatnonzero(~is_known(hash_ids(named), known)).tolist()}
    for line, row in rows:
        if (
            unknown
            and isinstance(row, Impression)
            and not unknown.isdisjoint(chain(row.history, row.candidates))
        ):
            place = "candidate" if unknown.isdisjoint(row.history) else "history"
            name = next(name for name in chain(row.history, row.candidates) if name in unknown)
            yield line, BadLine(f"unknown id: {place} {name[:40]!r} is no news of the sources")
        else:
            yield line, row


def _news_table(rows: Sequence[News], tokenizer: TitleTokenizer, shared: Shared) -> pa.Table:
    ids = list(tokenizer.encode([row.title for row in rows], max_tokens=shared.max_tokens))
    columns = [
        pa.array([row.news_id for row in rows], pa.string()),
        pa.array([row.title for row in rows], pa.string()),
        pa.array([row.category for row in rows], pa.string()),
        pa.array([row.subcategory for row in rows], pa.string()),
        pa.array([shared.labels[row.category] for row in rows], pa.int32()),
        _lists(ids, pa.int32()),
    ]
    return pa.Table.from_arrays(columns, schema=NEWS_SCHEMA)


def _behaviors_table(rows: Sequence[Impression]) -> pa.Table:
    columns = [
        pa.array([row.impression_id for row in rows], pa.string()),
        pa.array([row.user_id for row in rows], pa.string()),
        pa.array([row.time for row in rows], pa.timestamp("ms")),
        _lists([row.history for row in rows], pa.string()),
        _lists([row.candidates for row in rows], pa.string()),
        pa.array([row.clicked for row in rows], pa.list_(pa.int8())),
    ]
    return pa.Table.from_arrays(columns, schema=BEHAVIORS_SCHEMA)


def _lists(lists: Sequence[Sequence[int]] | Sequence[Sequence[str]], kind: pa.DataType) -> pa.ListArray:
    offsets = np.zeros(len(lists) + 1, dtype=np.int32)
    np.cumsum([len(one) for one in lists], out=offsets[1:])
    flat: Iterable[int | str] = chain.from_iterable(lists)
    values = np.fromiter(flat, np.int32, int(offsets[-1])) if pa.types.is_integer(kind) else list(flat)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, kind))


def _write_shard(job: Job, folder: str, split: Split, table: pa.Table) -> Shard:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    name = f"{split}-{job.kind}-{job.file:02d}-{job.index:05d}.parquet"
    (Path(folder) / name).write_bytes(content)
    return Shard(file=name, rows=len(table), bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _write_rejected(
    job: Job, shared: Shared, rejected: Sequence[tuple[int, str, str]], summary: Summary
) -> None:
    if not rejected:
        return
    with rejected_part(shared.rejected_folder, job.file, job.index).open("w", encoding="utf-8") as part:
        for position, line, reason in rejected:
            number = job.chunk.first_line + position
            entry = {"file": job.chunk.file, "line": number, "reason": reason, "text": excerpt(line)}
            part.write(json.dumps(entry) + "\n")
            summary.rejected[reason.partition(":")[0]] += 1
            if len(summary.shown) < _SHOWN:
                summary.shown.append(f"{job.chunk.file}:{number}: {reason}")


def _duplicate(job: Job, position: int) -> str:
    return f"duplicate id: first at line {job.duplicates[position]}"


def _first_column(line: str) -> str:
    return line.partition("\t")[0]


@lru_cache(maxsize=1)
def _tokenizer(serialised: str, pad_id: int) -> TitleTokenizer:
    """A task's own tokeniser, made once a process."""
    return restore_tokenizer(serialised, name="", pad_id=pad_id)
