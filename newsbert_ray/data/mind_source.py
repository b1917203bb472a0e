"""MIND as a kind of source, in constant memory. Chunks are read twice, in this process or as Ray tasks.

First all chunks are scanned for ids, topics and times, because the fate of a line (its split, or a duplicate)
depends on the others; about 11 bytes a news line and 27 a behaviours line stay in memory. Then each chunk is
parsed, tokenised and written as shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from newsbert_ray.config import PrepareSettings
from newsbert_ray.data import labelled, mind, shards, sources
from newsbert_ray.data.mind import KEPT, NO_CODE, NO_TOPIC, RARE, Impression, Kind, Lines, News
from newsbert_ray.data.shards import SPLITS, Contents, Hashes, Manifest, Shard, Split, TextWriter, hash_ids
from newsbert_ray.data.sources import BadLine, Fate, PrepareError, Rejected, SourceFile, Workspace
from newsbert_ray.data.tokenizer import TitleTokenizer, restore_tokenizer
from newsbert_ray.files import format_size
from newsbert_ray.methods import TaskName

Group = Split | Literal["other"]
"""A split, or the news of none."""
Row = TypeVar("Row", News, Impression)

GROUPS: dict[int, Group] = dict(zip(KEPT, (*SPLITS, "other"), strict=True))
_FORMS: dict[Kind, str] = {
    "news": f" ({{}} has {mind.NEWS_COLUMNS} columns separated by tabs, and no header; a table with a "
    "header is a source itself, without its folder)",
    "behaviors": f" ({{}} has {mind.BEHAVIORS_COLUMNS} columns separated by tabs, and no header)",
    "texts": ", or say how to read it with --columns.encoding, --columns.delimiter, .text, .label and .id",
}


@dataclass(frozen=True)
class Job:
    """A chunk to write, of file number `number`, with the fates of its lines.

    `originals`: the number of the first line with the same id for a duplicate, 0 for other lines.
    `trains`: whether the file is for training; of others every impression is kept for the submission.
    """

    chunk: sources.Chunk
    kind: Kind
    number: int
    index: int
    fates: sources.Fates
    originals: shards.Ints
    trains: bool


@dataclass
class MindFile:
    """A file of MIND. `fates` and `originals` (as in Job) have an entry a line."""

    kind: Kind
    role: Fate
    source: SourceFile
    fates: sources.Fates = field(default_factory=lambda: np.zeros(0, dtype=np.uint8))
    originals: shards.Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def jobs(self) -> Iterator[Job]:
        for index, chunk in enumerate(self.source.chunks):
            lines, trains = slice(start := chunk.first_line - 1, start + chunk.lines), self.role is Fate.TRAIN
            fates, originals = self.fates[lines], self.originals[lines]
            yield Job(chunk, self.kind, self.source.number, index, fates, originals, trains)


@dataclass(frozen=True)
class Shared:
    """What all jobs need. Without a tokeniser they only list bad lines."""

    folder: Path
    known: sources.HashIndex
    labels: dict[str, int] = field(default_factory=dict)
    tokenizer: str = ""
    pad_id: int = 0
    max_tokens: int = 0


@dataclass
class Summary:
    """What a job has written. `users` are hashes of different users."""

    job: Job
    shards: list[tuple[Group, Shard]] = field(default_factory=list)
    rejected: Rejected = field(default_factory=Rejected)
    counts: Counter[str] = field(default_factory=Counter)
    users: Hashes = field(default_factory=lambda: hash_ids([]))


class NewsSource:
    """MIND's folders and zips, and other labelled texts, as a kind of source."""

    task: TaskName = "topics"

    def __init__(self, settings: PrepareSettings, workspace: Workspace) -> None:
        self._settings, self._workspace = settings, workspace
        self._files = _open_files(settings, workspace)
        self.files = [file.source for file in self._files]
        self.rows = [file.lines for file in self.files]
        self._news = [file for file in self._files if file.kind != "behaviors"]
        others = any(file.kind == "texts" for file in self._files)
        self.noun = "texts" if others else "news"
        self.max_tokens = 128 if others else 30  # 30 as in the paper
        self.columns = settings.columns.model_dump() if others else {}
        self._labels: list[str] = []
        self._rare: dict[str, int] = {}
        self._known = sources.HashIndex()
        self._counts: Counter[str] = Counter()
        self.rejected: list[Rejected] = []

    def assign_rows(self) -> None:
        """Read all rows once and decide the fate of each. PrepareError where a news file is mostly bad (no
        title is tokenised then), or a split would be empty."""
        lines, topics = self._scan()
        shares = sources.shares_of(self._settings, sources=len(self._news))
        self._assign_news(lines, topics, shares)
        for file in self._files:
            if file.kind == "behaviors":
                _assign_impressions(file, lines.pop(file.source.number), shares)
        for file in self._news:
            bad = int(np.isin(file.fates, (Fate.MALFORMED, Fate.DUPLICATE)).sum())
            if bad > self._settings.max_rejected_share * file.source.lines:
                shared = Shared(self._workspace.folder.absolute(), self._known)
                self._collect_rejected([file], [write_chunk(job, shared) for job in file.jobs()])
        self._require_news()

    def all_texts(self, *, training_only: bool) -> Iterator[str]:
        fates = {int(fate) for fate in ((Fate.TRAIN,) if training_only else KEPT)}
        for job in chain.from_iterable(file.jobs() for file in self._news):
            rows = sources.parse_chunk(job.chunk, mind.NEWS_PARSERS[job.kind])
            for fate, (_, row) in zip(job.fates.tolist(), rows, strict=True):
                if fate in fates and isinstance(row, News):
                    yield row.title

    def write(self, tokenizer: TitleTokenizer) -> Contents:
        shared = Shared(
            self._workspace.folder.absolute(),
            self._known,
            labels={label: index for index, label in enumerate(self._labels)},
            tokenizer=tokenizer.serialised,
            pad_id=tokenizer.pad_id,
            max_tokens=self._settings.max_tokens or self.max_tokens,
        )
        jobs = [job for file in self._files for job in file.jobs()]
        summaries: list[Summary] = []
        with sources.show_progress(self._workspace.say, "prepared", total=len(jobs)) as advance:
            for summary in self._workspace.map_all(jobs, write_chunk, shared):
                advance(1)
                summaries.append(summary)
        summaries.sort(key=lambda one: (one.job.number, one.job.index))  # Ray's tasks end in any order
        self._counts = sum((summary.counts for summary in summaries), Counter())
        self._collect_rejected(self._files, summaries)
        return self._describe(summaries)

    def summary(self, manifest: Manifest) -> Iterator[str]:
        counts = self._counts
        rows = ", ".join(f"{manifest.rows(split):,} {split}" for split in SPLITS)
        yield f"{self.noun}: {rows}; {len(manifest.labels)} topics"
        if counts["earlier"]:
            yield f"already in an earlier source, not repeated: {counts['earlier']:,} {self.noun}"
        if self._rare:
            named = ", ".join(f"{name} ({count})" for name, count in self._rare.items())
            yield f"topics with fewer than {RARE} {self.noun}, kept whole in train: {named}"
        if manifest.others:
            others = sum(shard.rows for shard in manifest.others)
            yield f"no topic of the training news: {others:,} news, for recommendation only"
        if manifest.behaviors:
            yield "impressions: " + ", ".join(
                f"{manifest.rows(split, 'recommendation'):,} {split} ({counts[f'{split} clicks']:,} clicks)"
                for split in manifest.behaviors
            )
        for split in manifest.behaviors:
            if unlabelled := counts[f"{split} unlabelled"]:
                yield f"{split}: {unlabelled:,} impressions without labels"
        statistics = {name.replace("_", " "): value for name, value in manifest.statistics.items()}
        if unknown := int(statistics.pop("unknown clicks")):
            yield f"clicks in histories on news that the sources do not have, left out: {unknown:,}"
        if unknown := int(statistics.pop("unknown candidates", 0)):
            yield f"candidates without a title, ranked last and in no metric: {unknown:,}"
        if self.noun == "texts":
            words, tokens = (statistics[f"{name} per title"] for name in ("words", "tokens"))
            yield f"{words:.1f} words and {tokens:.1f} tokens per text"
            return
        values = {name: f"{value:,.2f}".removesuffix(".00") for name, value in statistics.items()}
        yield "Table 1: " + ", ".join(f"{value} {name}" for name, value in values.items() if value != "0")

    def _scan(self) -> tuple[dict[int, Lines], dict[str, int]]:
        """The lines of each file by its number, and the code of each topic."""
        lines = {file.source.number: Lines.unread(file.source.lines, file.kind) for file in self._files}
        number = {chunk: file.source.number for file in self._files for chunk in file.source.chunks}
        topics: dict[str, int] = {}
        work = [(file.kind, chunk) for file in self._files for chunk in file.source.chunks]
        for chunk, scanned, names in self._workspace.map_all(work, mind.scan_chunk, None):
            code = np.array([topics.setdefault(name, len(topics)) for name in names], dtype=np.int64)
            if len(topics) >= NO_TOPIC:
                raise PrepareError(f"{chunk.file}: more than {NO_TOPIC:,} labels; is that column the label?")
            if names:
                good = scanned.codes < NO_TOPIC
                scanned.codes[good] = code[scanned.codes[good]]
            whole: tuple[npt.NDArray[Any], ...] = lines[number[chunk]]
            for column, part in zip(whole, scanned, strict=True):
                column[chunk.first_line - 1 : chunk.first_line - 1 + chunk.lines] = part
        return lines, topics

    def _assign_news(self, lines: dict[int, Lines], topics: dict[str, int], shares: sources.Shares) -> None:
        """The fate of every news, the training topics, and the news kept."""
        counts: shards.Ints = np.zeros(0, dtype=np.int64)
        earlier = hash_ids([])
        for position, file in enumerate(self._news):
            hashes, codes, _ = lines[file.source.number]
            file.fates, file.originals = mind.split_news(
                hashes,
                codes,
                role=file.role,
                earlier=earlier,
                trained=np.flatnonzero(counts).astype(np.uint16) if position else None,
                seed=self._settings.seed,
                shares=shares,
            )
            kept = np.isin(file.fates, KEPT)
            if position == 0:
                counts = np.bincount(codes[kept], minlength=len(topics))
            earlier = np.sort(np.concatenate([earlier, hashes[kept]]))
        for fate in KEPT:
            for file in self._news:
                self._known.add(lines[file.source.number].hashes[file.fates == fate])
        by_name = {name: int(counts[code]) for name, code in sorted(topics.items()) if counts[code]}
        self._labels = list(by_name)
        self._rare = {name: count for name, count in by_name.items() if count < RARE}

    def _require_news(self) -> None:
        """Refuse an empty split or a single topic; texts without any label are for --unlabelled."""
        news = self._news
        if not self._labels and any((file.fates == Fate.TRAIN).any() for file in news):
            return
        names = ", ".join(file.source.label if file.kind == "texts" else file.source.folder for file in news)
        for name in SPLITS:
            if not any((file.fates == Fate[name.upper()]).any() for file in news):
                lines = sum(file.source.lines for file in news)
                raise PrepareError(
                    f"{name} would be empty: none of the {lines:,} news lines of {names} falls into it; "
                    "give more news, a larger share, or a later source with news of its own"
                )
        if len(self._labels) < 2:
            raise PrepareError(
                f"{names}: a single topic ({self._labels[0]}); a classifier needs at least two topics"
            )

    def _collect_rejected(self, files: Sequence[MindFile], summaries: Sequence[Summary]) -> None:
        """List the bad lines of all files in the folder, in order; PrepareError where a file has too many."""
        rejected = {file.source.number: Rejected() for file in files}
        self.rejected = [*rejected.values()]
        for summary in summaries:
            rejected[summary.job.number].merge(summary.rejected)
        with (self._workspace.folder / sources.REJECTED).open("wb") as joined:
            for part in sorted(self._workspace.folder.glob("rejected-*.part")):
                joined.write(part.read_bytes())
                part.unlink()
        allowed = self._settings.max_rejected_share
        for file in files:
            bad, source = rejected[file.source.number], file.source
            lacking = sum(one.counts["incomplete"] for one in summaries if one.job.number == source.number)
            if lacking > allowed * source.lines:
                raise PrepareError(
                    f"{source.label}: {lacking:,} of {source.lines:,} impressions offer news without a title "
                    "in the sources; correct them, or allow more with --max_rejected_share"
                )
            if bad.counts.total() > allowed * source.lines:
                form = _FORMS[file.kind].format(source.name)
                self._workspace.refuse(source.label, source.lines, bad, allowed, form=form)

    def _describe(self, summaries: Iterable[Summary]) -> Contents:
        news: dict[Group, list[Shard]] = {}
        behaviors: dict[Group, list[Shard]] = {}
        for summary in summaries:
            written = behaviors if summary.job.kind == "behaviors" else news
            for group, shard in summary.shards:
                written.setdefault(group, []).append(shard)
        in_order = [shard for group in GROUPS.values() for shard in news.get(group, [])]
        counts = self._counts
        with TextWriter(self._workspace.folder) as writer:
            for shard in in_order:
                table = pq.read_table(self._workspace.folder / shard.file, columns=["tokens"])
                tokens = table["tokens"].combine_chunks()
                writer.add(tokens.values.to_numpy(), np.diff(tokens.offsets.to_numpy()))
        texts = writer.describe()
        users = np.unique(np.concatenate([hash_ids([]), *(summary.users for summary in summaries)]))
        assert texts.rows == len(self._known)
        return Contents(
            texts=texts,
            labels=self._labels,
            splits={split: news.get(split, []) for split in SPLITS},
            others=news.get("other", []),
            behaviors={split: behaviors[split] for split in SPLITS if split in behaviors},
            statistics={
                "users": len(users),
                "news": texts.rows,
                "news_categories": len(self._labels),
                "impressions": sum(shard.rows for each in behaviors.values() for shard in each),
                "clicks": sum(counts[f"{split} clicks"] for split in SPLITS),
                "words_per_title": counts["words"] / texts.rows,
                "tokens_per_title": counts["tokens"] / texts.rows,
                "unknown_clicks": counts["read"] - counts["read and known"],
                **({"unknown_candidates": unknown} if (unknown := counts["unknown candidates"]) else {}),
            },
        )


def _open_files(settings: PrepareSettings, workspace: Workspace) -> list[MindFile]:
    """Every file of every source, hashed and cut into chunks, in the order of their roles."""
    parts: list[tuple[str, dict[Kind, SourceFile]]] = []  # the name that decides a role, and the files
    for number, source in enumerate(settings.source):
        unpacked = workspace.folder / f"source-{number}"
        if not mind.is_mind(source):
            opened = labelled.open_parts(source, settings.columns, say=workspace.say)
            parts += [(file.name, {"texts": file}) for file in labelled.write_parts(opened, unpacked)]
            continue
        name, paths = mind.find_files(source, unpacked=unpacked)
        if "behaviors" not in paths:
            workspace.say(f"{name}: no {mind.BEHAVIORS}, so news only")
        parts.append((name, {kind: sources.read_through(path, folder=name) for kind, path in paths.items()}))
    files: list[MindFile] = []
    for position, (index, role, splits) in enumerate(sources.order_sources([name for name, _ in parts])):
        # Even numbers are news, odd ones behaviours: they are in the names of shards and in fingerprints.
        for number, (kind, file) in enumerate(parts[index][1].items(), 2 * position):
            size = f"{file.lines:,} {'rows' if kind == 'texts' else 'lines'}, {format_size(file.bytes)}"
            workspace.say(f"{file.label}: {size}, for {splits}")
            files.append(MindFile(kind, role, replace(file, number=number)))
    return files


def _assign_impressions(file: MindFile, lines: Lines, shares: sources.Shares) -> None:
    """The fate of every impression: by time in the training file, otherwise the file's role. Lines that are
    bad for their candidates alone count in the shares, as candidates are not parsed yet."""
    well_formed = lines.codes != NO_CODE
    file.originals = mind.find_originals(lines.hashes, well_formed)
    repeated = file.originals > 0
    file.fates = np.full(len(well_formed), file.role, dtype=np.uint8)
    if file.role is Fate.TRAIN:
        well_formed[repeated] = False
        file.fates = mind.split_by_time(lines.minutes, lines.hashes, well_formed, shares)
    file.fates[repeated] = Fate.DUPLICATE


def write_chunk(job: Job, shared: Shared) -> Summary:
    summary = Summary(job)
    tables: dict[Group, tuple[pa.Table, int]] = {}
    if job.kind == "behaviors":
        lines, row_of = mind.parse_impressions(job.chunk, shared.known, complete=job.trains)
        for group, rows in _sort_rows(job, lines, shared, summary).items():
            tables[group] = _impression_table(rows, group, row_of, summary)
    else:
        news = sources.parse_chunk(job.chunk, mind.NEWS_PARSERS[job.kind])
        for group, titles in _sort_rows(job, news, shared, summary).items():
            if shared.tokenizer:
                tables[group] = _news_table(titles, group, shared, summary)
    kind = "behaviors" if job.kind == "behaviors" else "news"
    for group, (table, examples) in tables.items():
        name = f"{group}-{kind}-{job.number:02d}-{job.index:05d}.parquet"
        summary.shards.append((group, shards.write_shard(shared.folder, name, table, examples=examples)))
    return summary


def _sort_rows(
    job: Job, lines: Iterable[tuple[str, Row | BadLine]], shared: Shared, summary: Summary
) -> dict[Group, list[Row]]:
    kept: dict[Group, list[Row]] = {group: [] for group in GROUPS.values()}
    listed: list[str] = []
    for position, ((text, row), fate) in enumerate(zip(lines, job.fates.tolist(), strict=True)):
        if not isinstance(row, BadLine) and fate in GROUPS:
            kept[GROUPS[fate]].append(row)
        elif not isinstance(row, BadLine) and fate == Fate.EARLIER:
            summary.counts["earlier"] += 1
        else:
            duplicate = f"duplicate id: first at line {job.originals[position]}"
            reason = str(row) if isinstance(row, BadLine) else duplicate
            number = getattr(row, "number", None) or job.chunk.first_line + position
            listed.append(summary.rejected.add(job.chunk.file, number, reason, text))
    if listed:
        part = shared.folder / f"rejected-{job.number:02d}-{job.index:05d}.part"
        part.write_text("".join(listed), "utf-8")
    return {group: rows for group, rows in kept.items() if rows}


def _news_table(rows: list[News], group: Group, shared: Shared, summary: Summary) -> tuple[pa.Table, int]:
    tokenizer = restore_tokenizer(shared.tokenizer, name="", pad_id=shared.pad_id)
    ids, topics, subcategories, titles = zip(*rows, strict=True)
    columns = {
        "news_id": ids,
        "title": titles,
        "category": topics,
        "subcategory": subcategories,
        # A topic without training news is no label.
        "label": [shared.labels.get(topic, -1) for topic in topics],
        "tokens": list(tokenizer.encode(titles, max_tokens=shared.max_tokens)),
    }
    table = pa.table(columns, schema=shards.NEWS_SCHEMA)
    summary.counts["words"] += sum(len(title.split()) for title in titles)
    summary.counts["tokens"] += len(table["tokens"].combine_chunks().values)
    return table, sum(label >= 0 for label in columns["label"]) if group == "train" else len(rows)


def _impression_table(
    rows: list[Impression], group: Group, row_of: dict[str, int], summary: Summary
) -> tuple[pa.Table, int]:
    ids, users, times, histories, candidates, clicked = zip(*rows, strict=True)
    columns = {
        "impression_id": ids,
        "user_id": users,
        "time": times,
        "history": [[row_of[name] for name in history if name in row_of] for history in histories],
        "candidates": [[row_of.get(name, -1) for name in offered] for offered in candidates],
        "clicked": clicked,
    }
    table = pa.table(columns, schema=shards.BEHAVIORS_SCHEMA)
    known = [row for row in rows if all(name in row_of for name in row.candidates)]
    summary.counts["incomplete"] += len(rows) - len(known)
    summary.counts[f"{group} clicks"] += sum(map(sum, filter(None, clicked)))
    summary.counts[f"{group} unlabelled"] += clicked.count(None)
    summary.counts["unknown candidates"] += sum(offered.count(-1) for offered in columns["candidates"])
    summary.counts["read"] += sum(map(len, histories))
    summary.counts["read and known"] += len(table["history"].combine_chunks().values)
    summary.users = np.union1d(summary.users, hash_ids(users))
    return table, sum(map(mind.count_examples, known))
