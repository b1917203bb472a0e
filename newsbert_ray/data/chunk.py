"""One chunk of a file: scan its ids, then write its rows as shards; in this process or in a Ray task.

Scanning comes first for all chunks, because what becomes of a line (its split, a duplicate) depends on the
others, and so does the row that a news has in the table of texts.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from newsbert_ray.data.mind import (
    BadLine,
    Header,
    Impression,
    News,
    Row,
    count_examples,
    excerpt,
    parse_behaviors,
    parse_header,
    parse_lines,
    parse_news,
)
from newsbert_ray.data.shards import BEHAVIORS_SCHEMA, NEWS_SCHEMA, Shard, Split
from newsbert_ray.data.sources import CHUNK_BYTES, Chunk, PrepareError, read_chunk
from newsbert_ray.data.split import (
    NO_CODE,
    Codes,
    Fate,
    Fates,
    Hashes,
    KnownNews,
    Minutes,
    hash_ids,
    minutes_of,
)
from newsbert_ray.data.tokenizer import TitleTokenizer, restore_tokenizer

Kind = Literal["news", "behaviors"]
Group = Split | Literal["other"]
"""A split, or the news of none."""

GROUPS: dict[Fate, Group] = {
    Fate.TRAIN: "train",
    Fate.VALIDATION: "validation",
    Fate.TEST: "test",
    Fate.UNSEEN_TOPIC: "other",
}
_SHOWN = 3


@dataclass(frozen=True)
class Scan:
    """A chunk's lines, shapes (lines,): hash of the id, code of the topic in `topics` (NO_CODE: no row), and
    of impressions the minute."""

    hashes: Hashes
    codes: Codes
    topics: list[str] = field(default_factory=list)
    minutes: Minutes = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
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
    known: KnownNews


@dataclass
class Summary:
    """What one job did. `error`: why it could not; then the rest means nothing."""

    file: int
    index: int
    shards: list[tuple[Group, Shard]] = field(default_factory=list)
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


def scan_behaviors(chunk: Chunk) -> Scan:
    """Ids and minutes of a chunk of behaviors.tsv; histories and candidates are not looked at."""
    codes = np.zeros(chunk.lines, dtype=np.uint16)
    good: list[Header] = []
    for position, (_, row) in enumerate(rows_of(chunk, parse_header)):
        if isinstance(row, BadLine):
            codes[position] = NO_CODE
        else:
            good.append(row)
    hashes = np.full(chunk.lines, hash_ids([""])[0], dtype=np.uint64)
    hashes[codes != NO_CODE] = hash_ids([row.impression_id for row in good])
    minutes = np.zeros(chunk.lines, dtype=np.int32)
    minutes[codes != NO_CODE] = minutes_of([row.time for row in good])
    return Scan(hashes, codes, minutes=minutes)


def find_whole(chunk: Chunk, known: KnownNews) -> npt.NDArray[np.bool_]:
    """Whether each line of a chunk of behaviors.tsv is an impression, candidates included; shape (lines,)."""
    rows, _ = _impressions(chunk, known)
    return np.array([isinstance(row, Impression) for _, row in rows], dtype=np.bool_)


def scan_chunk(work: tuple[Kind, Chunk], _: None = None) -> tuple[Chunk, Scan]:
    """Scan a chunk of either kind; the chunk comes back with it, as scans end in any order.

    What a file or a disk can cause comes back as the scan's `error`.
    """
    kind, chunk = work
    try:
        return chunk, scan_news(chunk) if kind == "news" else scan_behaviors(chunk)
    except PrepareError as error:
        message = str(error)
    except OSError as error:
        message = explain_os_error(error)
    return chunk, Scan(hash_ids([]), np.zeros(0, dtype=np.uint16), error=message)


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
    kept: dict[Fate, list[News]] = {fate: [] for fate in GROUPS}
    rejected: list[tuple[int, str, str]] = []
    for position, (line, row) in enumerate(rows_of(job.chunk, parse_news)):
        fate = Fate(job.fates[position])
        if isinstance(row, BadLine):
            rejected.append((position, line, str(row)))
        elif fate in kept:
            kept[fate].append(row)
        elif fate is Fate.DUPLICATE:
            rejected.append((position, line, _duplicate(job, position)))
        else:
            summary.counts["earlier"] += 1
    _write_rejected(job, shared, rejected, summary)
    if shared.folder is None:
        return summary
    tokenizer = _tokenizer(shared.tokenizer, shared.pad_id)
    for fate, rows in kept.items():
        if rows:
            table = _news_table(rows, tokenizer, shared)
            shard = _write_shard(job, shared.folder, GROUPS[fate], table, examples=len(rows))
            summary.shards.append((GROUPS[fate], shard))
            summary.counts["words"] += sum(len(row.title.split()) for row in rows)
            summary.counts["tokens"] += len(table["tokens"].combine_chunks().values)
    return summary


def _run_behaviors(job: Job, shared: Shared) -> Summary:
    summary = Summary(job.file, job.index)
    kept: dict[Fate, list[Impression]] = {fate: [] for fate in GROUPS}
    rejected: list[tuple[int, str, str]] = []
    lines, place = _impressions(job.chunk, shared.known)
    for position, (line, row) in enumerate(lines):
        fate = Fate(job.fates[position])
        if isinstance(row, BadLine):
            rejected.append((position, line, str(row)))
        elif fate in kept:
            kept[fate].append(row)
        else:
            rejected.append((position, line, _duplicate(job, position)))
    _write_rejected(job, shared, rejected, summary)
    if shared.folder is None:
        return summary
    for fate, rows in kept.items():
        if rows:
            table = _behaviors_table(rows, place)
            examples = sum(map(count_examples, rows))
            shard = _write_shard(job, shared.folder, GROUPS[fate], table, examples=examples)
            summary.shards.append((GROUPS[fate], shard))
            summary.counts[f"{GROUPS[fate]} clicks"] += sum(sum(row.clicked) for row in rows if row.clicked)
            summary.counts[f"{GROUPS[fate]} unlabelled"] += sum(row.clicked is None for row in rows)
            summary.counts["read"] += sum(len(row.history) for row in rows)
            summary.counts["read and known"] += len(table["history"].combine_chunks().values)
    summary.users = np.unique(hash_ids([row.user_id for rows in kept.values() for row in rows]))
    return summary


def _impressions(
    chunk: Chunk, known: KnownNews
) -> tuple[list[tuple[str, Impression | BadLine]], dict[str, int]]:
    """Rows of a chunk of behaviors.tsv, and the row in the table of texts of each known news that they name.

    An impression with an unknown candidate is bad: left out of the ranking, it would alter its numbers.
    """
    rows = list(rows_of(chunk, parse_behaviors))
    lists = (
        names for _, row in rows if isinstance(row, Impression) for names in (row.history, row.candidates)
    )
    named = list(set(chain.from_iterable(lists)))
    places = known.find(hash_ids(named)).tolist()
    place = {name: at for name, at in zip(named, places, strict=True) if at >= 0}
    if len(place) < len(named):
        rows = [(line, _require_candidates(row, place)) for line, row in rows]
    return rows, place


def _require_candidates(row: Impression | BadLine, place: dict[str, int]) -> Impression | BadLine:
    if isinstance(row, Impression):
        for name in row.candidates:
            if name not in place:
                return BadLine(f"unknown id: candidate {name[:40]!r} is no news of the sources")
    return row


def _news_table(rows: Sequence[News], tokenizer: TitleTokenizer, shared: Shared) -> pa.Table:
    ids = list(tokenizer.encode([row.title for row in rows], max_tokens=shared.max_tokens))
    columns = [
        pa.array([row.news_id for row in rows], pa.string()),
        pa.array([row.title for row in rows], pa.string()),
        pa.array([row.category for row in rows], pa.string()),
        pa.array([row.subcategory for row in rows], pa.string()),
        # A topic that training does not have is no label.
        pa.array([shared.labels.get(row.category, -1) for row in rows], pa.int32()),
        _lists(ids),
    ]
    return pa.Table.from_arrays(columns, schema=NEWS_SCHEMA)


def _behaviors_table(rows: Sequence[Impression], place: dict[str, int]) -> pa.Table:
    columns = [
        pa.array([row.impression_id for row in rows], pa.string()),
        pa.array([row.user_id for row in rows], pa.string()),
        pa.array([row.time for row in rows], pa.timestamp("ms")),
        _lists([[place[name] for name in row.history if name in place] for row in rows]),
        _lists([[place[name] for name in row.candidates] for row in rows]),
        pa.array([row.clicked for row in rows], pa.list_(pa.int8())),
    ]
    return pa.Table.from_arrays(columns, schema=BEHAVIORS_SCHEMA)


def _lists(lists: Sequence[Sequence[int]]) -> pa.ListArray:
    offsets = np.zeros(len(lists) + 1, dtype=np.int32)
    np.cumsum([len(one) for one in lists], out=offsets[1:])
    values = np.fromiter(chain.from_iterable(lists), np.int32, int(offsets[-1]))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _write_shard(job: Job, folder: str, group: Group, table: pa.Table, *, examples: int) -> Shard:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    name = f"{group}-{job.kind}-{job.file:02d}-{job.index:05d}.parquet"
    (Path(folder) / name).write_bytes(content)
    return Shard(
        file=name,
        rows=len(table),
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        examples=examples,
    )


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


@lru_cache(maxsize=1)
def _tokenizer(serialised: str, pad_id: int) -> TitleTokenizer:
    """A task's own tokeniser, made once a process."""
    return restore_tokenizer(serialised, name="", pad_id=pad_id)
