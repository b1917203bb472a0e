"""What becomes of every line of every source, decided before a title is tokenised. Writes nothing.

Two walks over the files, each in constant memory: hash them and cut them into chunks; scan ids and topics.
What stays is about eleven bytes a line, fifteen a behaviours line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from newsbert_ray.config import PrepareSettings
from newsbert_ray.data.chunk import Job, Kind, Scan, find_whole, rows_of
from newsbert_ray.data.mind import News, parse_news
from newsbert_ray.data.shards import SPLITS
from newsbert_ray.data.sources import Chunk, PrepareError, SourceFile, SourceFolder, find_source, read_through
from newsbert_ray.data.split import (
    KEPT,
    NO_CODE,
    RARE,
    Codes,
    Fate,
    Fates,
    Hashes,
    KnownNews,
    Minutes,
    find_duplicates,
    number_news,
    order_sources,
    role_of,
    split_by_time,
    split_news,
)

Work = tuple[Kind, Chunk]
ScanAll = Callable[[Sequence[Work]], Iterable[tuple[Chunk, Scan]]]


class Lines(NamedTuple):
    """A file's lines as their scans found them; `minutes` of behaviours only."""

    hashes: Hashes
    codes: Codes
    minutes: Minutes


@dataclass(frozen=True)
class PlannedFile:
    """One file of a source; `fates` has one entry a line once `make_plan` has scanned it.

    `number` is even for news, odd for behaviours, and orders the files. `duplicates`: position of a line
    -> position of the first with the same id.
    """

    number: int
    kind: Kind
    role: Fate
    source: SourceFile
    fates: Fates
    duplicates: dict[int, int]

    def jobs(self) -> Iterator[Job]:
        """One job a chunk, in the order of lines."""
        for index, chunk in enumerate(self.source.chunks):
            start = chunk.first_line - 1
            stop = start + chunk.lines
            ours = {at - start: first + 1 for at, first in self.duplicates.items() if start <= at < stop}
            yield Job(chunk, self.kind, self.number, index, self.fates[start:stop], ours)


@dataclass(frozen=True)
class Plan:
    """All files with their lines' fates, the training topics, and all news kept with their rows in the
    table of texts."""

    files: list[PlannedFile]
    labels: list[str]
    rare: dict[str, int]
    known: KnownNews

    def of_kind(self, kind: Kind) -> list[PlannedFile]:
        """The news files, or the behaviours files."""
        return [file for file in self.files if file.kind == kind]

    def jobs(self) -> list[Job]:
        """All jobs, in the order of files and lines."""
        return [job for file in self.files for job in file.jobs()]

    def titles(self, *fates: Fate) -> Iterator[str]:
        """Titles of these fates, in the order of their lines."""
        for file in self.of_kind("news"):
            for job in file.jobs():
                rows = rows_of(job.chunk, parse_news)
                for fate, (_, row) in zip(job.fates.tolist(), rows, strict=True):
                    if fate in fates and isinstance(row, News):
                        yield row.title


def read_sources(given: Sequence[str], *, unpacked: Path, say: Callable[[str], None]) -> list[PlannedFile]:
    """Every file of every source, hashed and cut, in the order of their roles; fates are still empty.

    Args:
        given: folders or zips.
        unpacked: folder for what zips hold.
        say: told each file's size and role.
    Raises:
        PrepareError: a source is given twice, or is none.
    """
    if len({Path(one).expanduser().resolve() for one in given}) < len(given):
        raise PrepareError(f"sources {', '.join(given)}: one is given twice; give each once")
    folders = [find_source(one, unpacked=unpacked / f"source-{i}") for i, one in enumerate(given)]
    ordered = [folders[i] for i in order_sources([folder.name for folder in folders])]
    files: list[PlannedFile] = []
    for position, folder in enumerate(ordered):
        files.extend(_read_folder(folder, position, len(ordered), say))
    return files


def make_plan(files: Sequence[PlannedFile], settings: PrepareSettings, scan: ScanAll) -> Plan:
    """Scan all files and settle the fate of every line.

    Args:
        scan: `chunk.scan_chunk` over pieces of work, in any order: in this process or over a cluster.
    Raises:
        PrepareError: more categories than any news has.
    """
    news = [file for file in files if file.kind == "news"]
    validation_share = settings.validation_share if len(news) < 3 else 0.0
    test_share = settings.test_share if len(news) == 1 else 0.0
    lines, topics = _scan(files, scan)
    counts: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
    earlier: Hashes = np.zeros(0, dtype=np.uint64)
    planned: list[PlannedFile] = []
    for file in news:
        hashes, codes, _ = lines[file.number]
        fates, duplicates = split_news(
            hashes,
            codes,
            role=file.role,
            earlier=earlier,
            trained=np.flatnonzero(counts).astype(np.uint16) if planned else None,
            seed=settings.seed,
            validation_share=validation_share,
            test_share=test_share,
        )
        kept = np.isin(fates, KEPT)
        if not planned:
            counts = np.bincount(codes[kept], minlength=len(topics))
        earlier = np.concatenate([earlier, hashes[kept]])
        earlier.sort()
        planned.append(replace(file, fates=fates, duplicates=duplicates))
    known = number_news(
        np.concatenate([lines[file.number].hashes[file.fates == fate] for fate in KEPT for file in planned])
    )
    planned += [
        _plan_behaviors(
            file,
            lines.pop(file.number),
            known,
            validation_share=validation_share if file.role is Fate.TRAIN else 0.0,
            test_share=test_share,
        )
        for file in files
        if file.kind == "behaviors"
    ]
    by_name = {name: int(counts[code]) for name, code in sorted(topics.items()) if counts[code]}
    rare = {name: count for name, count in by_name.items() if count < RARE}
    return Plan(sorted(planned, key=lambda file: file.number), list(by_name), rare, known)


def require_news(plan: Plan) -> None:
    """A split without news would alter every number.

    Raises:
        PrepareError: which split would be empty, or which topic would have no training news.
    """
    news = plan.of_kind("news")
    names = ", ".join(file.source.folder for file in news)
    for split in SPLITS:
        fate = Fate[split.upper()]
        if not any((file.fates == fate).any() for file in news):
            lines = sum(file.source.lines for file in news)
            raise PrepareError(
                f"{split} would be empty: none of the {lines:,} news lines of {names} falls into it; "
                "give more news, a larger share, or a later source with news of its own"
            )
    if len(plan.labels) < 2:
        raise PrepareError(
            f"{names}: a single topic ({plan.labels[0]}); at least two are needed to tell apart"
        )


def _read_folder(
    folder: SourceFolder, position: int, sources: int, say: Callable[[str], None]
) -> Iterator[PlannedFile]:
    role = role_of(position, sources)
    if folder.behaviors is None:
        say(f"{folder.name}: no behaviors.tsv, so news only")
    paths: list[tuple[Kind, Path | None]] = [("news", folder.news), ("behaviors", folder.behaviors)]
    for kind, path in paths:
        if path is not None:
            source = read_through(path, folder=folder.name)
            size = f"{source.lines:,} lines, {source.bytes / 1e6:,.1f} MB"
            say(f"{folder.name}/{source.name}: {size}, for {_splits_of(role, sources)}")
            number = 2 * position + (kind == "behaviors")
            yield PlannedFile(number, kind, role, source, np.zeros(0, dtype=np.uint8), {})


def _splits_of(role: Fate, sources: int) -> str:
    if sources == 1:
        return "train, validation and test"
    return "train and validation" if role is Fate.TRAIN and sources == 2 else SPLITS[role]


def _scan(files: Sequence[PlannedFile], scan: ScanAll) -> tuple[dict[int, Lines], dict[str, int]]:
    """Every line by the file's number, and the code of each topic."""
    work: list[Work] = [(file.kind, chunk) for file in files for chunk in file.source.chunks]
    number = {chunk: file.number for file in files for chunk in file.source.chunks}
    lines = {file.number: _no_lines(file) for file in files}
    topics: dict[str, int] = {}
    for chunk, found in scan(work):
        if found.error is not None:
            raise PrepareError(found.error)
        for name in found.topics:
            topics.setdefault(name, len(topics))
        if len(topics) >= NO_CODE:
            raise PrepareError(
                f"{chunk.file}: more than {NO_CODE - 1:,} categories; is column 2 the category?"
            )
        codes = found.codes.copy()
        if found.topics:
            good = codes != NO_CODE
            codes[good] = np.array([topics[name] for name in found.topics], dtype=np.uint16)[codes[good]]
        of_file = lines[number[chunk]]
        place = slice(chunk.first_line - 1, chunk.first_line - 1 + chunk.lines)
        of_file.hashes[place], of_file.codes[place] = found.hashes, codes
        if len(of_file.minutes):
            of_file.minutes[place] = found.minutes
    return lines, topics


def _no_lines(file: PlannedFile) -> Lines:
    lines = file.source.lines
    return Lines(
        np.zeros(lines, dtype=np.uint64),
        np.full(lines, NO_CODE, dtype=np.uint16),
        np.zeros(lines if file.kind == "behaviors" else 0, dtype=np.int32),
    )


def _plan_behaviors(
    file: PlannedFile, lines: Lines, known: KnownNews, *, validation_share: float, test_share: float
) -> PlannedFile:
    """The fate of every line: by time where the file gives away a share, else the file's role.

    A line that is bad for its candidates alone counts in the shares, as nobody has looked at these yet.
    """
    well_formed = lines.codes != NO_CODE
    duplicates = find_duplicates(lines.hashes, well_formed)
    if duplicates:
        # The first of two lines counts only if it is whole, so of these the candidates are looked at too.
        repeated = np.unique([*duplicates, *duplicates.values()])
        whole = well_formed.copy()
        whole[repeated] = _look_at(file, repeated, known)
        duplicates = find_duplicates(lines.hashes, whole)
    fates = np.full(len(well_formed), file.role, dtype=np.uint8)
    if file.role is Fate.TRAIN:
        well_formed[list(duplicates)] = False
        fates = split_by_time(
            lines.minutes,
            lines.hashes,
            well_formed,
            validation_share=validation_share,
            test_share=test_share,
        )
    fates[list(duplicates)] = Fate.DUPLICATE
    return replace(file, fates=fates, duplicates=duplicates)


def _look_at(file: PlannedFile, positions: npt.NDArray[np.int64], known: KnownNews) -> npt.NDArray[np.bool_]:
    """Whether the behaviours lines at `positions` (ascending) are whole; reads the chunks that hold them."""
    found = [np.zeros(0, dtype=np.bool_)]
    for chunk in file.source.chunks:
        start, stop = np.searchsorted(positions, [chunk.first_line - 1, chunk.first_line - 1 + chunk.lines])
        if start < stop:
            found.append(find_whole(chunk, known)[positions[start:stop] - (chunk.first_line - 1)])
    return np.concatenate(found)
