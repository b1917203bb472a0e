"""MIND as a kind of source: its chunks are parsed, tokenised and written as shards, in this process or as Ray
tasks, in constant memory. `data.mind_rows` decides before what becomes of every line."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from newsbert_ray.config import PrepareSettings
from newsbert_ray.data import mind
from newsbert_ray.data.mind import Impression, News
from newsbert_ray.data.mind_rows import (
    Job,
    Kind,
    MindFile,
    RowPlan,
    open_files,
    parse_impressions,
    plan_rows,
    require_news,
)
from newsbert_ray.data.shards import (
    BEHAVIORS_SCHEMA,
    NEWS_SCHEMA,
    SPLITS,
    Manifest,
    Shard,
    Split,
    Texts,
    TextWriter,
    write_shard,
)
from newsbert_ray.data.sources import (
    REJECTED,
    BadLine,
    Contents,
    Rejected,
    Workspace,
    parse_chunk,
    show_progress,
)
from newsbert_ray.data.split import KEPT, RARE, Fate, Hashes, KnownNews, hash_ids
from newsbert_ray.data.tokenizer import TitleTokenizer, restore_tokenizer
from newsbert_ray.methods import TaskName

Group = Split | Literal["other"]
"""A split, or the news of none."""
Row = TypeVar("Row", News, Impression)

GROUPS: dict[int, Group] = {
    Fate.TRAIN: "train",
    Fate.VALIDATION: "validation",
    Fate.TEST: "test",
    Fate.UNSEEN_TOPIC: "other",
}
_FORMS: dict[Kind, str] = {
    "news": f" ({mind.NEWS} has {mind.NEWS_COLUMNS} columns separated by tabs, and no header)",
    "behaviors": f" ({mind.BEHAVIORS} has {mind.BEHAVIORS_COLUMNS} columns separated by tabs, and no header)",
}


@dataclass(frozen=True)
class Shared:
    """What all jobs need. Without a tokeniser they only list bad lines."""

    folder: Path
    known: KnownNews
    labels: dict[str, int] = field(default_factory=dict)
    tokenizer: str = ""
    pad_id: int = 0
    max_tokens: int = 0


@dataclass
class Summary:
    """What a job has written. `users` are hashes of different users."""

    job: tuple[int, int]
    bytes: int
    kind: Kind
    shards: list[tuple[Group, Shard]] = field(default_factory=list)
    rejected: Rejected = field(default_factory=Rejected)
    counts: Counter[str] = field(default_factory=Counter)
    users: Hashes = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))


class MindSource:
    """MIND's folders and zips, as a `sources.Corpus`."""

    noun = "news"
    task: TaskName = "topics"
    max_tokens = 30  # as in the paper
    query_tokens = False

    def __init__(self, settings: PrepareSettings, workspace: Workspace) -> None:
        self._settings, self._workspace = settings, workspace
        self._plan = RowPlan(open_files(settings.source, workspace), [], {}, KnownNews.empty())
        self.files = [file.source for file in self._plan.files]
        self._counts: Counter[str] = Counter()

    def assign_rows(self) -> None:
        """Decide the fate of every line; stop before a title is tokenised if a news file is mostly bad."""
        self._plan = plan_rows(self._plan.files, self._settings, self._workspace.map_all)
        for file in self._plan.of_kind("news"):
            bad = int(np.isin(file.fates, (Fate.MALFORMED, Fate.DUPLICATE)).sum())
            if bad > self._settings.max_rejected_share * file.source.lines:
                shared = Shared(self._workspace.folder.absolute(), self._plan.known)
                self._collect_rejected([file], [write_chunk(job, shared) for job in file.jobs()])
        require_news(self._plan)

    def all_texts(self, *, training_only: bool) -> Iterator[str]:
        """Titles in the order of their lines."""
        fates = {int(fate) for fate in ((Fate.TRAIN,) if training_only else KEPT)}
        for job in chain.from_iterable(file.jobs() for file in self._plan.of_kind("news")):
            rows = parse_chunk(job.chunk, mind.parse_news)
            for fate, (_, row) in zip(job.fates.tolist(), rows, strict=True):
                if fate in fates and isinstance(row, News):
                    yield row.title

    def write(self, tokenizer: TitleTokenizer) -> Contents:
        """Write the shards of news and behaviours, and the table of texts."""
        shared = Shared(
            self._workspace.folder.absolute(),
            self._plan.known,
            labels={label: index for index, label in enumerate(self._plan.labels)},
            tokenizer=tokenizer.serialised,
            pad_id=tokenizer.pad_id,
            max_tokens=self._settings.max_tokens or self.max_tokens,
        )
        jobs = [job for file in self._plan.files for job in file.jobs()]
        summaries, users = [], _UserCount()
        with show_progress(
            self._workspace.say, "prepared", total=sum(job.chunk.length for job in jobs)
        ) as advance:
            for summary in self._workspace.map_all(jobs, write_chunk, shared):
                advance(summary.bytes)
                users.add(summary.users)
                summary.users = summary.users[:0]
                summaries.append(summary)
        summaries.sort(key=lambda summary: summary.job)  # Ray's tasks end in any order
        self._counts = sum((summary.counts for summary in summaries), Counter())
        rejected = self._collect_rejected(self._plan.files, summaries)
        return self._describe(summaries, rejected, users=users.total())

    def summary(self, manifest: Manifest) -> Iterator[str]:
        """Counts of news, topics, impressions and clicks, and Table 1 of the paper."""
        counts = self._counts
        rows = ", ".join(f"{manifest.rows(split):,} {split}" for split in SPLITS)
        yield f"news: {rows}; {len(manifest.labels)} topics"
        if counts["earlier"]:
            yield f"already in an earlier source, not repeated: {counts['earlier']:,} news"
        if self._plan.rare:
            named = ", ".join(f"{name} ({count})" for name, count in self._plan.rare.items())
            yield f"topics with fewer than {RARE} news, kept whole in train: {named}"
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
        values = {name: f"{value:,.2f}".removesuffix(".00") for name, value in statistics.items()}
        yield "Table 1: " + ", ".join(f"{value} {name}" for name, value in values.items())

    def _collect_rejected(self, files: Sequence[MindFile], summaries: Iterable[Summary]) -> list[Rejected]:
        """The bad lines of each file, which are then listed in the folder.

        Raises:
            PrepareError: too many in one of them.
        """
        rejected = {file.source.number: Rejected() for file in files}
        for summary in summaries:
            rejected[summary.job[0]].merge(summary.rejected)
        folder, allowed = self._workspace.folder, self._settings.max_rejected_share
        for file in files:
            bad, source = rejected[file.source.number], file.source
            if bad.counts.total() > allowed * source.lines:
                _join_rejected([file], folder)
                self._workspace.refuse(source.label, source.lines, bad, allowed, form=_FORMS[file.kind])
        _join_rejected(files, folder)
        return list(rejected.values())

    def _describe(self, summaries: Iterable[Summary], rejected: list[Rejected], *, users: int) -> Contents:
        shards: dict[Kind, dict[Group, list[Shard]]] = {"news": {}, "behaviors": {}}
        for summary in summaries:
            for group, shard in summary.shards:
                shards[summary.kind].setdefault(group, []).append(shard)
        news, behaviors = shards["news"], shards["behaviors"]
        in_order = [shard for group in GROUPS.values() for shard in news.get(group, [])]
        texts, counts = _write_texts(self._workspace.folder, in_order), self._counts
        assert texts.rows == len(self._plan.known.rows)
        return Contents(
            rows=[file.lines for file in self.files],
            rejected=rejected,
            texts=texts,
            labels=self._plan.labels,
            splits={split: news[split] for split in SPLITS},
            others=news.get("other", []),
            behaviors={split: behaviors[split] for split in SPLITS if split in behaviors},
            statistics={
                "users": users,
                "news": texts.rows,
                "news_categories": len(self._plan.labels),
                "impressions": sum(shard.rows for each in behaviors.values() for shard in each),
                "clicks": sum(counts[f"{split} clicks"] for split in SPLITS),
                "words_per_title": counts["words"] / texts.rows,
                "tokens_per_title": counts["tokens"] / texts.rows,
                "unknown_clicks": counts["read"] - counts["read and known"],
            },
        )


class _UserCount:
    """Counts different users by their hashes, of which it keeps at most about twice as many."""

    def __init__(self) -> None:
        self._known: Hashes = np.zeros(0, dtype=np.uint64)
        self._new: list[Hashes] = []

    def add(self, users: Hashes) -> None:
        self._new.append(users)
        if sum(map(len, self._new)) > len(self._known):
            self.total()

    def total(self) -> int:
        self._known, self._new = np.unique(np.concatenate([self._known, *self._new])), []
        return len(self._known)


def write_chunk(job: Job, shared: Shared) -> Summary:
    """Write the shards of a chunk, and list its bad lines in a file of its own."""
    summary = Summary((job.number, job.index), job.chunk.length, job.kind)
    if job.kind == "news":
        news = _sort_rows(job, parse_chunk(job.chunk, mind.parse_news), shared, summary)
        if shared.tokenizer:
            _write_news(job, news, shared, summary)
    else:
        lines, row_of = parse_impressions(job.chunk, shared.known)
        impressions = _sort_rows(job, lines, shared, summary)
        _write_behaviors(job, impressions, row_of, shared, summary)
    return summary


def _sort_rows(
    job: Job, lines: Iterable[tuple[str, Row | BadLine]], shared: Shared, summary: Summary
) -> dict[Group, list[Row]]:
    """The rows that are kept, by group; bad ones are listed."""
    kept: dict[Group, list[Row]] = {group: [] for group in GROUPS.values()}
    listed: list[str] = []
    for position, ((text, row), fate) in enumerate(zip(lines, job.fates.tolist(), strict=True)):
        if not isinstance(row, BadLine) and fate in GROUPS:
            kept[GROUPS[fate]].append(row)
        elif not isinstance(row, BadLine) and fate == Fate.EARLIER:
            summary.counts["earlier"] += 1
        else:
            duplicate = f"duplicate id: first at line {job.originals.get(position)}"
            reason = str(row) if isinstance(row, BadLine) else duplicate
            number = job.chunk.first_line + position
            listed.append(summary.rejected.add(job.chunk.file, number, reason, text))
    if listed:
        _rejected_part(shared.folder, job.number, job.index).write_text("".join(listed), "utf-8")
    return kept


def _write_news(job: Job, kept: dict[Group, list[News]], shared: Shared, summary: Summary) -> None:
    tokenizer = _tokenizer(shared.tokenizer, shared.pad_id)
    for group, rows in kept.items():
        if not rows:
            continue
        columns = [
            pa.array([row.news_id for row in rows], pa.string()),
            pa.array([row.title for row in rows], pa.string()),
            pa.array([row.category for row in rows], pa.string()),
            pa.array([row.subcategory for row in rows], pa.string()),
            # A topic without training news is no label.
            pa.array([shared.labels.get(row.category, -1) for row in rows], pa.int32()),
            _lists(list(tokenizer.encode([row.title for row in rows], max_tokens=shared.max_tokens))),
        ]
        table = pa.Table.from_arrays(columns, schema=NEWS_SCHEMA)
        summary.shards.append((group, write_shard(shared.folder, _shard_name(job, group), table)))
        summary.counts["words"] += sum(len(row.title.split()) for row in rows)
        summary.counts["tokens"] += len(table["tokens"].combine_chunks().values)


def _write_behaviors(
    job: Job, kept: dict[Group, list[Impression]], row_of: dict[str, int], shared: Shared, summary: Summary
) -> None:
    for group, rows in kept.items():
        if not rows:
            continue
        columns = [
            pa.array([row.impression_id for row in rows], pa.string()),
            pa.array([row.user_id for row in rows], pa.string()),
            pa.array([row.time for row in rows], pa.timestamp("ms")),
            _lists([[row_of[name] for name in row.history if name in row_of] for row in rows]),
            _lists([[row_of[name] for name in row.candidates] for row in rows]),
            pa.array([row.clicked for row in rows], pa.list_(pa.int8())),
        ]
        table = pa.Table.from_arrays(columns, schema=BEHAVIORS_SCHEMA)
        examples = sum(map(mind.count_examples, rows))
        shard = write_shard(shared.folder, _shard_name(job, group), table, examples=examples)
        summary.shards.append((group, shard))
        summary.counts[f"{group} clicks"] += sum(sum(row.clicked) for row in rows if row.clicked)
        summary.counts[f"{group} unlabelled"] += sum(row.clicked is None for row in rows)
        summary.counts["read"] += sum(len(row.history) for row in rows)
        summary.counts["read and known"] += len(table["history"].combine_chunks().values)
    summary.users = np.unique(hash_ids([row.user_id for rows in kept.values() for row in rows]))


def _lists(lists: Sequence[Sequence[int]]) -> pa.ListArray:
    offsets = np.zeros(len(lists) + 1, dtype=np.int32)
    np.cumsum([len(one) for one in lists], out=offsets[1:])
    values = np.fromiter(chain.from_iterable(lists), np.int32, int(offsets[-1]))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _shard_name(job: Job, group: Group) -> str:
    return f"{group}-{job.kind}-{job.number:02d}-{job.index:05d}.parquet"


def _rejected_part(folder: Path, number: int, index: int) -> Path:
    return folder / f"rejected-{number:02d}-{index:05d}.part"


def _join_rejected(files: Iterable[MindFile], folder: Path) -> None:
    """Join the chunks' bad lines in the order of files and lines."""
    with (folder / REJECTED).open("wb") as joined:
        for file in files:
            for index in range(len(file.source.chunks)):
                part = _rejected_part(folder, file.source.number, index)
                if part.exists():
                    with part.open("rb") as lines:
                        shutil.copyfileobj(lines, joined)
                    part.unlink()


def _write_texts(folder: Path, news: Sequence[Shard]) -> Texts:
    """The table of texts: the tokens of all news shards, one shard in memory at a time."""
    with TextWriter(folder) as writer:
        for shard in news:
            tokens = pq.read_table(folder / shard.file, columns=["tokens"])["tokens"].combine_chunks()
            writer.add(tokens.values.to_numpy(), np.diff(tokens.offsets.to_numpy()))
    return writer.describe()


@lru_cache(maxsize=1)
def _tokenizer(serialised: str, pad_id: int) -> TitleTokenizer:
    """A task's own tokeniser, made once a process."""
    return restore_tokenizer(serialised, name="", pad_id=pad_id)
