"""What becomes of every line of MIND's files, decided before a title is tokenised. Writes nothing.

All chunks are scanned for ids, topics and times, in this process or as Ray tasks, because the fate of a line
(its split, or a duplicate) depends on the others. About 11 bytes a news line and 15 a behaviours line stay in
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from newsbert_ray.config import PrepareSettings
from newsbert_ray.data import mind, split
from newsbert_ray.data.shards import SPLITS
from newsbert_ray.data.sources import (
    BadLine,
    Chunk,
    MapAll,
    PrepareError,
    SourceFile,
    Workspace,
    parse_chunk,
    read_through,
)
from newsbert_ray.data.split import NO_CODE, Codes, Fate, Fates, Hashes, KnownNews, Minutes, Shares
from newsbert_ray.files import format_size

Kind = Literal["news", "behaviors"]


@dataclass(frozen=True)
class Job:
    """A chunk to write, of file number `number`, with the fates of its lines.

    `originals`: position of a duplicate in the chunk -> line number of the first line with the same id.
    """

    chunk: Chunk
    kind: Kind
    number: int
    index: int
    fates: Fates
    originals: dict[int, int]


@dataclass(frozen=True)
class MindFile:
    """A file of MIND. `fates` has an entry a line; `duplicates` maps a line's position to its original's."""

    kind: Kind
    role: Fate
    source: SourceFile
    fates: Fates = field(default_factory=lambda: np.zeros(0, dtype=np.uint8))
    duplicates: dict[int, int] = field(default_factory=dict)

    def jobs(self) -> Iterator[Job]:
        """A job for each chunk, in the order of lines."""
        repeated = np.array(list(self.duplicates), dtype=np.int64)
        for index, chunk in enumerate(self.source.chunks):
            start, stop = chunk.first_line - 1, chunk.first_line - 1 + chunk.lines
            ours = repeated[slice(*np.searchsorted(repeated, [start, stop]))].tolist()
            originals = {position - start: self.duplicates[position] + 1 for position in ours}
            yield Job(chunk, self.kind, self.source.number, index, self.fates[start:stop], originals)


@dataclass(frozen=True)
class RowPlan:
    """All files with the fates of their lines, the training topics (`rare` with their counts), and the news
    kept."""

    files: list[MindFile]
    labels: list[str]
    rare: dict[str, int]
    known: KnownNews

    def of_kind(self, kind: Kind) -> list[MindFile]:
        """The news files, or the behaviours files."""
        return [file for file in self.files if file.kind == kind]


class Lines(NamedTuple):
    """Of each line: hash of the id, code of the topic (NO_CODE: malformed), minute of an impression."""

    hashes: Hashes
    codes: Codes
    minutes: Minutes


class Scan(NamedTuple):
    """What was read of a chunk; `lines.codes` index `topics`."""

    chunk: Chunk
    lines: Lines
    topics: list[str]


def open_files(sources: Sequence[str], workspace: Workspace) -> list[MindFile]:
    """Every file of every source, hashed and cut into chunks, in the order of their roles.

    Args:
        sources: folders or zips; what zips hold is written to the workspace.
    Raises:
        PrepareError: a source is not one of MIND.
    """
    folders = [
        mind.find_folder(one, unpacked=workspace.folder / f"source-{i}") for i, one in enumerate(sources)
    ]
    ordered = [folders[i] for i in split.order_sources([folder.name for folder in folders])]
    files: list[MindFile] = []
    for position, folder in enumerate(ordered):
        role = split.role_of(position, len(ordered))
        if folder.behaviors is None:
            workspace.say(f"{folder.name}: no {mind.BEHAVIORS}, so news only")
        # Even numbers are news, odd ones behaviours: they are in the names of shards and in fingerprints.
        paths: list[tuple[Kind, Path | None]] = [("news", folder.news), ("behaviors", folder.behaviors)]
        for number, (kind, path) in enumerate(paths, 2 * position):
            if path is not None:
                source = read_through(path, folder=folder.name, number=number)
                size = f"{source.lines:,} lines, {format_size(source.bytes)}"
                workspace.say(f"{source.label}: {size}, for {split.describe_role(role, len(ordered))}")
                files.append(MindFile(kind, role, source))
    return files


def plan_rows(files: Sequence[MindFile], settings: PrepareSettings, map_all: MapAll) -> RowPlan:
    """Scan all files and decide the fate of every line.

    Raises:
        PrepareError: too many categories.
    """
    news = [file for file in files if file.kind == "news"]
    shares = split.held_out(Shares(settings.validation_share, settings.test_share), sources=len(news))
    lines, topics = _scan(files, map_all)
    counts: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
    earlier: Hashes = np.zeros(0, dtype=np.uint64)
    planned: list[MindFile] = []
    for file in news:
        hashes, codes, _ = lines[file.source.number]
        trained = np.flatnonzero(counts).astype(np.uint16) if planned else None
        fates, duplicates = split.split_news(
            hashes,
            codes,
            role=file.role,
            earlier=earlier,
            trained=trained,
            seed=settings.seed,
            shares=shares,
        )
        kept = np.isin(fates, split.KEPT)
        if not planned:
            counts = np.bincount(codes[kept], minlength=len(topics))
        earlier = np.concatenate([earlier, hashes[kept]])
        earlier.sort()
        planned.append(replace(file, fates=fates, duplicates=duplicates))
    in_order = [
        lines[file.source.number].hashes[file.fates == fate] for fate in split.KEPT for file in planned
    ]
    known = split.number_news(np.concatenate(in_order))
    for file in files:
        if file.kind == "behaviors":
            planned.append(_plan_behaviors(file, lines.pop(file.source.number), known, shares))
    planned.sort(key=lambda file: file.source.number)
    by_name = {name: int(counts[code]) for name, code in sorted(topics.items()) if counts[code]}
    rare = {name: count for name, count in by_name.items() if count < split.RARE}
    return RowPlan(planned, list(by_name), rare, known)


def require_news(plan: RowPlan) -> None:
    """Refuse an empty split: it would alter every number.

    Raises:
        PrepareError: which split would be empty, or that there is a single topic.
    """
    news = plan.of_kind("news")
    names = ", ".join(file.source.folder for file in news)
    for name in SPLITS:
        if not any((file.fates == Fate[name.upper()]).any() for file in news):
            lines = sum(file.source.lines for file in news)
            raise PrepareError(
                f"{name} would be empty: none of the {lines:,} news lines of {names} falls into it; "
                "give more news, a larger share, or a later source with news of its own"
            )
    if len(plan.labels) < 2:
        raise PrepareError(
            f"{names}: a single topic ({plan.labels[0]}); a classifier needs at least two topics"
        )


def scan_chunk(work: tuple[Kind, Chunk], shared: None = None) -> Scan:
    """Ids and topics of a chunk of news.tsv; ids and times of one of behaviors.tsv, which is not parsed
    further."""
    kind, chunk = work
    lines, topics = _no_lines(chunk.lines, kind), dict[str, int]()
    ids = [""] * chunk.lines
    times: dict[int, datetime] = {}
    parse: Callable[[str], mind.News | mind.Header] = mind.parse_news if kind == "news" else mind.parse_header
    for position, (_, row) in enumerate(parse_chunk(chunk, parse)):
        if isinstance(row, mind.News):
            ids[position] = row.news_id
            lines.codes[position] = min(topics.setdefault(row.category, len(topics)), int(NO_CODE) - 1)
        elif isinstance(row, mind.Header):
            ids[position], times[position] = row.impression_id, row.time
    lines.hashes[:] = split.hash_ids(ids)
    if times:
        lines.codes[list(times)] = 0
        lines.minutes[list(times)] = split.minutes_of(list(times.values()))
    return Scan(chunk, lines, list(topics))


def parse_impressions(
    chunk: Chunk, known: KnownNews
) -> tuple[list[tuple[str, mind.Impression | BadLine]], dict[str, int]]:
    """Rows of a chunk of behaviors.tsv, and the row in the table of texts of each known news in them.

    An impression with an unknown candidate is refused: ranked without it, it would alter the metrics.
    """
    lines = list(parse_chunk(chunk, mind.parse_behaviors))
    impressions = (row for _, row in lines if isinstance(row, mind.Impression))
    named = list(set(chain.from_iterable((*row.history, *row.candidates) for row in impressions)))
    rows = known.find(split.hash_ids(named)).tolist()
    row_of = {name: row for name, row in zip(named, rows, strict=True) if row >= 0}
    if len(row_of) < len(named):
        lines = [(text, _require_candidates(row, row_of)) for text, row in lines]
    return lines, row_of


def _require_candidates(row: mind.Impression | BadLine, row_of: dict[str, int]) -> mind.Impression | BadLine:
    if isinstance(row, mind.Impression):
        for name in row.candidates:
            if name not in row_of:
                return BadLine(f"unknown id: candidate {name[:40]!r} is not in the news of the sources")
    return row


def _scan(files: Sequence[MindFile], map_all: MapAll) -> tuple[dict[int, Lines], dict[str, int]]:
    """The lines of each file by its number, and the code of each topic."""
    lines = {file.source.number: _no_lines(file.source.lines, file.kind) for file in files}
    number = {chunk: file.source.number for file in files for chunk in file.source.chunks}
    topics: dict[str, int] = {}
    work = [(file.kind, chunk) for file in files for chunk in file.source.chunks]
    for chunk, scanned, names in map_all(work, scan_chunk, None):
        code = np.array([topics.setdefault(name, len(topics)) for name in names], dtype=np.int64)
        if len(topics) >= NO_CODE:
            raise PrepareError(
                f"{chunk.file}: more than {NO_CODE - 1:,} categories; is column 2 the category?"
            )
        target = lines[number[chunk]]
        rows = slice(chunk.first_line - 1, chunk.first_line - 1 + chunk.lines)
        target.hashes[rows], target.codes[rows] = scanned.hashes, scanned.codes
        if names:
            good = scanned.codes != NO_CODE
            target.codes[rows][good] = code[scanned.codes[good]]
        if len(target.minutes):
            target.minutes[rows] = scanned.minutes
    return lines, topics


def _no_lines(count: int, kind: Kind) -> Lines:
    """Lines of which nothing is known yet."""
    minutes = np.zeros(count if kind == "behaviors" else 0, dtype=np.int32)
    return Lines(np.zeros(count, dtype=np.uint64), np.full(count, NO_CODE, dtype=np.uint16), minutes)


def _plan_behaviors(file: MindFile, lines: Lines, known: KnownNews, shares: Shares) -> MindFile:
    """The fate of every impression: by time in the training file, otherwise the file's role.

    Lines that are bad for their candidates alone count in the shares, as candidates are not parsed yet.
    """
    well_formed = lines.codes != NO_CODE
    duplicates = split.find_duplicates(lines.hashes, well_formed)
    if duplicates:
        # The earlier of two lines counts only if it is whole, so the candidates of these are parsed too.
        repeated = np.unique([*duplicates, *duplicates.values()])
        whole = well_formed.copy()
        whole[repeated] = _are_whole(file, repeated, known)
        duplicates = split.find_duplicates(lines.hashes, whole)
    fates = np.full(len(well_formed), file.role, dtype=np.uint8)
    if file.role is Fate.TRAIN:
        well_formed[list(duplicates)] = False
        fates = split.split_by_time(lines.minutes, lines.hashes, well_formed, shares)
    fates[list(duplicates)] = Fate.DUPLICATE
    return replace(file, fates=fates, duplicates=duplicates)


def _are_whole(file: MindFile, positions: npt.NDArray[np.int64], known: KnownNews) -> npt.NDArray[np.bool_]:
    """Whether the behaviours lines at `positions` (ascending) are good; reads the chunks that hold them."""
    whole = [np.zeros(0, dtype=np.bool_)]
    for chunk in file.source.chunks:
        first = chunk.first_line - 1
        start, stop = np.searchsorted(positions, [first, first + chunk.lines])
        if start < stop:
            lines, _ = parse_impressions(chunk, known)
            good = np.array([isinstance(row, mind.Impression) for _, row in lines], dtype=np.bool_)
            whole.append(good[positions[start:stop] - first])
    return np.concatenate(whole)
