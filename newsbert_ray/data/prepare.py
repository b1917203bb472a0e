"""MIND's files -> tokenised Parquet shards and their manifest, in constant memory.

`data.plan` decides what becomes of every line; here the chunks are parsed, tokenised and written, as a Ray
Data pipeline or in this process, the table of texts follows from the shards, and the sums are drawn. All is
written beside the output folder and moved there at the end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from newsbert_ray.config import SCRATCH, PrepareSettings
from newsbert_ray.data.chunk import (
    GROUPS,
    Group,
    Job,
    Kind,
    Shared,
    Summary,
    explain_os_error,
    run_job,
    scan_chunk,
)
from newsbert_ray.data.mind import BadLine, excerpt
from newsbert_ray.data.output import (
    REJECTED,
    TITLE_TOKENS,
    find_prepared,
    fingerprint,
    join_rejected,
    move_into_place,
    partial_folder,
    row_settings,
)
from newsbert_ray.data.pairs_shards import PairsWriter
from newsbert_ray.data.plan import Plan, PlannedFile, make_plan, read_sources, require_news
from newsbert_ray.data.shards import (
    FORMAT,
    MANIFEST,
    SPLITS,
    Manifest,
    Shard,
    Source,
    Texts,
    TextWriter,
    Tokenizer,
)
from newsbert_ray.data.sources import PrepareError
from newsbert_ray.data.split import (
    KEPT,
    RARE,
    Fate,
    Fates,
    Hashes,
    hash_ids,
    is_known,
    order_sources,
    role_of,
    split_by_hash,
)
from newsbert_ray.data.tables import Line, Pair, PairsTable, is_pairs_table, open_table, read_pairs
from newsbert_ray.data.tokenizer import TitleTokenizer, learn_tokenizer, load_tokenizer
from newsbert_ray.data.word_vectors import VECTORS, fit_vectors, is_vectors
from newsbert_ray.files import write_json
from newsbert_ray.methods import METHODS
from newsbert_ray.ray_session import inside_cluster
from newsbert_ray.storage.inputs import brought
from newsbert_ray.storage.workdir import is_url, local, publish, working

__all__ = ["PrepareError", "is_pairs_table", "prepare", "prepare_pairs"]

Say = Callable[[str], None]
MapAll = Callable[[Sequence[Any], Callable[[Any, Any], Any], Any], Iterable[Any]]
_SAY_SECONDS = 5.0
_SHOWN = 5


@dataclass
class _Sums:
    """What all jobs did, added up; `rejected` and `shown` by the number of the file."""

    shards: dict[Kind, dict[Group, list[Shard]]] = field(
        default_factory=lambda: {"news": {}, "behaviors": {}}
    )
    rejected: dict[int, Counter[str]] = field(default_factory=dict)
    shown: dict[int, list[str]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    users: Hashes = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))

    @property
    def news(self) -> list[Shard]:
        """All news shards, in the order of the table of texts."""
        return [shard for group in GROUPS.values() for shard in self.shards["news"].get(group, [])]


def prepare(settings: PrepareSettings, *, say: Say = print) -> Manifest:
    """Prepare the shards of `settings.out`, or find them there already: of MIND's files, or of tables.

    Args:
        say: told the progress and the closing summary, a line at a time.
    Returns:
        The manifest, as `shards.read_manifest` gives it.
    Raises:
        PrepareError: sources, output folder or disk do not allow it; nothing at `settings.out` is altered.
        TokenizerError: the teacher's tokeniser cannot be had.
        StorageError: a source in a bucket cannot be read, an output folder there not be written, or another
            process works in it.
    """
    started = time.perf_counter()
    if inside_cluster() and any(map(is_url, (settings.out, *settings.source))):
        # Other machines would read and write in disks of their own: this process does all.
        settings = settings.model_copy(update={"workers": 0})
    settings = settings.model_copy(update={"source": [brought(source) for source in settings.source]})
    work = prepare_pairs if any(map(is_pairs_table, settings.source)) else _prepare
    try:
        with working(settings.out, marks=(MANIFEST,)) as folder:
            out = folder.expanduser()
            with partial_folder(out) as partial:
                return work(settings, out, partial, say, started)
    except OSError as error:
        raise PrepareError(f"cannot prepare {settings.out}: {explain_os_error(error)}") from error


def _prepare(settings: PrepareSettings, out: Path, partial: Path, say: Say, started: float) -> Manifest:
    files = read_sources(settings.source, unpacked=partial, say=say)
    tokenizer = own_tokenizer(settings)
    found = find_prepared(out, settings, files, tokenizer, say=say)
    if found is not None:
        counted = f"{_count_splits(found)} news of these very sources"
        say(f"already prepared: {settings.out} holds {counted}; nothing to do")
        publish(settings.out)
        return found
    mark = fingerprint(settings, files, tokenizer)
    with _mapping(settings.workers) as map_all:
        plan = make_plan(files, settings, lambda work: map_all(work, scan_chunk, None))
        _require_few_bad_news(plan, settings, out, partial)
        require_news(plan)
        if tokenizer is None:
            tokenizer = make_tokenizer(
                settings,
                partial,
                training=lambda: plan.titles(Fate.TRAIN),
                all_texts=lambda: plan.titles(*KEPT),
                say=say,
            )
        shared = _share(plan, tokenizer, settings, partial)
        jobs = plan.jobs()
        sums = _add_up(_track(map_all(jobs, run_job, shared), jobs, say))
    for file in plan.files:
        _require_few_rejected(file, sums, settings, out, partial)
    join_rejected(plan.files, partial, partial / REJECTED)
    tokenizer.save(partial / "tokenizer")
    texts = _write_texts(partial, sums.news)
    assert texts.rows == len(plan.known.rows)
    manifest = _describe(settings, plan, sums, tokenizer, mark, texts)
    write_json(partial / MANIFEST, manifest.model_dump(mode="json"))
    move_into_place(partial, out)
    publish(settings.out)
    for line in _closing_lines(manifest, plan, sums, settings, time.perf_counter() - started):
        say(line)
    return manifest


@contextmanager
def _mapping(workers: int | None) -> Iterator[MapAll]:
    """`function(item, shared)` over items: one after another in this process, or as a Ray Data pipeline."""
    if workers == 0:
        yield lambda items, function, shared: (function(item, shared) for item in items)
        return
    from newsbert_ray.data.stream import map_chunks
    from newsbert_ray.ray_session import ray_session

    with ray_session(cpus=workers):
        yield lambda items, function, shared: map_chunks(items, function, shared, workers=workers)


def _share(plan: Plan, tokenizer: TitleTokenizer, settings: PrepareSettings, partial: Path) -> Shared:
    return Shared(
        rejected_folder=str(partial.absolute()),
        folder=str(partial.absolute()),
        tokenizer=tokenizer.serialised,
        pad_id=tokenizer.pad_id,
        max_tokens=settings.max_tokens or TITLE_TOKENS,
        labels={label: index for index, label in enumerate(plan.labels)},
        known=plan.known,
    )


def _track(summaries: Iterable[Summary], jobs: Sequence[Job], say: Say) -> Iterator[Summary]:
    """Pass summaries on and say how far it is: a bar on a terminal, now and then a line elsewhere."""
    length = {(job.file, job.index): job.chunk.length for job in jobs}
    total = sum(length.values())
    with ExitStack() as stack:
        advance = _bar(stack, total) if sys.stderr.isatty() else _lines(total, say)
        for summary in summaries:
            if summary.error is not None:
                raise PrepareError(summary.error)
            yield summary
            advance(length[summary.file, summary.index])


def _bar(stack: ExitStack, total: int) -> Callable[[int], None]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("preparing"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    progress = stack.enter_context(Progress(*columns, console=Console(stderr=True), transient=True))
    task = progress.add_task("preparing", total=total)
    return lambda size: progress.advance(task, size)


def _lines(total: int, say: Say) -> Callable[[int], None]:
    started = said = time.perf_counter()
    done = 0

    def advance(size: int) -> None:
        nonlocal done, said
        done += size
        now = time.perf_counter()
        if now - said >= _SAY_SECONDS and done < total:
            said = now
            left = (now - started) * (total - done) / done
            say(f"prepared {100 * done / total:.0f} %, about {left:.0f} s left")

    return advance


def _add_up(summaries: Iterable[Summary]) -> _Sums:
    sums = _Sums()
    shown: dict[tuple[int, int], list[str]] = {}
    for summary in summaries:
        kind: Kind = "behaviors" if summary.file % 2 else "news"
        for group, shard in summary.shards:
            sums.shards[kind].setdefault(group, []).append(shard)
        sums.rejected.setdefault(summary.file, Counter()).update(summary.rejected)
        sums.counts.update(summary.counts)
        # Both are sorted; uniting them anew would sort all users for every chunk.
        fresh = summary.users[~is_known(summary.users, sums.users)]
        sums.users = np.insert(sums.users, np.searchsorted(sums.users, fresh), fresh)
        shown[summary.file, summary.index] = summary.shown
    # Tasks end in any order; the result has one order only.
    for (file, _), lines in sorted(shown.items()):
        sums.shown.setdefault(file, []).extend(lines)
    for groups in sums.shards.values():
        for shards in groups.values():
            shards.sort(key=lambda shard: shard.file)
    return sums


def _write_texts(partial: Path, news: Sequence[Shard]) -> Texts:
    """The table of texts: the tokens of all news shards, one shard in memory at a time."""
    writer = TextWriter(partial)
    try:
        for shard in news:
            tokens = pq.read_table(partial / shard.file, columns=["tokens"])["tokens"].combine_chunks()
            writer.add(tokens.values.to_numpy(), np.diff(tokens.offsets.to_numpy()))
    finally:
        texts = writer.close()
    return texts


def _require_few_bad_news(plan: Plan, settings: PrepareSettings, out: Path, partial: Path) -> None:
    """Stop before a title is tokenised if a news file is mostly damage."""
    for file in plan.of_kind("news"):
        bad = int(np.isin(file.fates, (Fate.MALFORMED, Fate.DUPLICATE)).sum())
        if bad > settings.max_rejected_share * file.source.lines:
            shared = Shared(str(partial), None, "", 0, 0, {}, plan.known)
            sums = _add_up(run_job(job, shared) for job in file.jobs())
            _require_few_rejected(file, sums, settings, out, partial)


def _require_few_rejected(
    file: PlannedFile, sums: _Sums, settings: PrepareSettings, out: Path, partial: Path
) -> None:
    bad = sums.rejected[file.number].total() if file.number in sums.rejected else 0
    if bad <= settings.max_rejected_share * file.source.lines:
        return
    listed = out.with_name(f"{out.name}.{REJECTED}")
    join_rejected([file], partial, partial / REJECTED)
    os.replace(partial / REJECTED, listed)
    first = "; ".join(sums.shown[file.number][:3])
    raise PrepareError(
        f"{file.source.folder}/{file.source.name}: {bad:,} of {file.source.lines:,} lines are bad, at most "
        f"{settings.max_rejected_share:.1%} may be: {first}. All are listed in "
        f"{listed}. Mend the file, or allow more with --max_rejected_share"
    )


def _describe(
    settings: PrepareSettings, plan: Plan, sums: _Sums, tokenizer: TitleTokenizer, mark: str, texts: Texts
) -> Manifest:
    behaviors = sums.shards["behaviors"]
    total: Counter[str] = sum(sums.rejected.values(), Counter())
    return Manifest(
        format=FORMAT,
        fingerprint=mark,
        settings=row_settings(settings),
        sources=[
            Source(
                folder=file.source.folder,
                file=file.source.name,
                bytes=file.source.bytes,
                sha256=file.source.sha256,
                rows=file.source.lines,
                rejected=sums.rejected.get(file.number, Counter()).total(),
            )
            for file in plan.files
        ],
        tokenizer=Tokenizer(
            name=tokenizer.name,
            sha256=tokenizer.sha256,
            vocabulary=tokenizer.vocabulary,
            pad_id=tokenizer.pad_id,
        ),
        labels=plan.labels,
        splits={split: sums.shards["news"][split] for split in SPLITS},
        others=sums.shards["news"].get("other", []),
        behaviors={split: behaviors[split] for split in SPLITS if split in behaviors},
        pairs={},
        texts=texts,
        statistics={
            "users": len(sums.users),
            "news": texts.rows,
            "news_categories": len(plan.labels),
            "impressions": sum(shard.rows for shards in behaviors.values() for shard in shards),
            "clicks": sum(sums.counts[f"{split} clicks"] for split in SPLITS),
            "words_per_title": sums.counts["words"] / texts.rows,
            "tokens_per_title": sums.counts["tokens"] / texts.rows,
            "unknown_clicks": sums.counts["read"] - sums.counts["read and known"],
        },
        rejected=dict(sorted(total.items())),
    )


def _closing_lines(
    manifest: Manifest, plan: Plan, sums: _Sums, settings: PrepareSettings, seconds: float
) -> Iterator[str]:
    """What a person wants to know at the end."""
    yield f"news: {_count_splits(manifest)}; {len(manifest.labels)} topics"
    if sums.counts["earlier"]:
        yield f"already in an earlier source, not repeated: {sums.counts['earlier']:,} news"
    if plan.rare:
        named = ", ".join(f"{name} ({count})" for name, count in plan.rare.items())
        yield f"topics with fewer than {RARE} news, kept whole in train: {named}"
    if manifest.others:
        count = sum(shard.rows for shard in manifest.others)
        yield f"no topic of the training news: {count:,} news, for recommendation only"
    yield from _behaviors_lines(manifest, sums)
    for kind, count in manifest.rejected.items():
        yield f"rejected, {kind}: {count:,}"
    shown = [line for number in sorted(sums.shown) for line in sums.shown[number]]
    yield from (f"  {line}" for line in shown[:_SHOWN])
    table = {name.replace("_", " "): value for name, value in manifest.statistics.items()}
    del table["unknown clicks"]
    yield "Table 1: " + ", ".join(
        f"{value:,.2f}".removesuffix(".00") + f" {name}" for name, value in table.items()
    )
    rows_read = sum(source.rows for source in manifest.sources)
    yield f"{rows_read:,} rows in {seconds:.1f} s ({rows_read / seconds:,.0f} rows/s)"
    yield f"{settings.out} holds the shards, {MANIFEST}, {REJECTED} and tokenizer/"
    given = f"--data {settings.out} {training_flags(settings)} --out RUN"
    yield f"next: newsbert-ray train {given}"
    if manifest.examples("train", "recommendation"):
        yield f"or:   newsbert-ray train --task recommendation {given}"


def _behaviors_lines(manifest: Manifest, sums: _Sums) -> Iterator[str]:
    if not manifest.behaviors:
        return
    yield "impressions: " + ", ".join(
        f"{manifest.rows(split, 'recommendation'):,} {split} ({sums.counts[f'{split} clicks']:,} clicks)"
        for split in manifest.behaviors
    )
    for split in manifest.behaviors:
        if count := sums.counts[f"{split} unlabelled"]:
            yield f"{split}: {count:,} impressions without labels"
    if count := int(manifest.statistics["unknown_clicks"]):
        yield f"clicks of histories on no news of the sources, left out: {count:,}"


def _count_splits(manifest: Manifest) -> str:
    return ", ".join(f"{manifest.rows(split):,} {split}" for split in SPLITS)


TextSource = Callable[[], Iterator[str]]


def own_tokenizer(settings: PrepareSettings) -> TitleTokenizer | None:
    """The teacher's own; None where it has none, and one is to be made.

    Raises:
        TokenizerError: it cannot be had.
    """
    if settings.teacher == SCRATCH or is_vectors(settings.teacher):
        return None
    return load_tokenizer(brought(settings.teacher))


def make_tokenizer(
    settings: PrepareSettings,
    folder: Path,
    *,
    training: TextSource,
    all_texts: TextSource,
    say: Callable[[str], None],
) -> TitleTokenizer:
    """WordPieces learned from the training texts, or the words that a file of word vectors knows of all
    texts; of these the vectors are written into the shards' folder.

    Raises:
        TokenizerError: no word vectors there.
    """
    if settings.teacher == SCRATCH:
        say(f"learning up to {settings.scratch.vocabulary:,} WordPieces from the training texts")
        return learn_tokenizer(training, vocabulary=settings.scratch.vocabulary)
    path = Path(brought(settings.teacher)).expanduser()
    say(f"reading {path.name}: which of the corpus's words it knows")
    found = fit_vectors(path, all_texts())
    np.save(folder / VECTORS, found.table)
    say(
        f"{path.name} knows {found.known:,} of {found.words:,} words, {found.share:.1%} of all there stand; "
        f"vectors {found.table.shape[1]} wide"
    )
    return found.tokenizer


def training_flags(settings: PrepareSettings) -> str:
    """What `newsbert-ray train` is told of the encoder, for shards of these settings."""
    if not is_vectors(settings.teacher):
        return f"--teacher {settings.teacher}"
    width = int(np.load(local(settings.out).expanduser() / VECTORS, mmap_mode="r").shape[1])
    usual = METHODS["glove"]["scratch"]["hidden"]
    heads = next(n for n in range(12, 0, -1) if width % n == 0)
    sizes = "" if width == usual else f" --scratch.hidden {width} --scratch.heads {heads}"
    return f"--method glove --teacher {SCRATCH}{sizes}"


TEXT_TOKENS = 512
"""Longest text where nothing else is asked: as far as BERT's positions go."""

_BLOCK_ROWS, _BLOCK_CHARACTERS = 2048, 16 << 20


@dataclass(frozen=True)
class _Tables:
    """All tables in the order of their roles, and what decides the split of a row."""

    tables: Sequence[PairsTable]
    settings: PrepareSettings

    def role(self, number: int) -> Fate:
        return role_of(number, len(self.tables))

    def fates(self, number: int, pairs: Sequence[Pair]) -> Fates:
        """The split of each of table `number`'s rows; queries that differ in case or blanks share it."""
        if self.role(number) is not Fate.TRAIN or len(self.tables) > 2:
            return np.full(len(pairs), self.role(number), dtype=np.uint8)
        return split_by_hash(
            hash_ids([" ".join(pair.query.lower().split()) for pair in pairs]),
            seed=self.settings.seed,
            validation_share=self.settings.validation_share,
            test_share=self.settings.test_share if len(self.tables) == 1 else 0.0,
        )

    def training_strings(self, say: Say) -> Iterator[str]:
        """Queries and texts that train; neighbours that are equal come once."""
        return self._strings(self.tables[:1], say, only=Fate.TRAIN)

    def strings(self, say: Say) -> Iterator[str]:
        """All queries and texts; neighbours that are equal come once."""
        return self._strings(self.tables, say)

    def _strings(self, tables: Sequence[PairsTable], say: Say, only: Fate | None = None) -> Iterator[str]:
        tell = _teller(say, lambda done, _: f"learned from {done:,} rows")
        for number, table in enumerate(tables):
            for block in _blocks(read_pairs(table)):
                tell(len(block))
                pairs = _good(block)
                if only is not None:
                    kept = np.flatnonzero(self.fates(number, pairs) == only)
                    pairs = [pairs[i] for i in kept.tolist()]
                yield from dict.fromkeys(pair.query for pair in pairs)
                yield from dict.fromkeys(pair.text for pair in pairs)


@dataclass
class _Scan:
    """What the first walk found; `rows` and `rejected` by the number of the table."""

    rows: list[int] = field(default_factory=list)
    rejected: list[Counter[str]] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    clicks: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Rows by (fate, clicked)."""


def prepare_pairs(settings: PrepareSettings, out: Path, partial: Path, say: Say, started: float) -> Manifest:
    """Prepare the shards of `out` in `partial` from tables, or find them there already; `prepare` calls it.

    One table is split by a hash of the query; of two, the first gives validation; of three, each is a split.

    Raises:
        PrepareError: the tables do not allow it.
        TokenizerError: the teacher's tokeniser cannot be had.
    """
    settings = settings.model_copy(update={"max_tokens": settings.max_tokens or TEXT_TOKENS})
    tables = _open_tables(settings, say)
    files = _as_planned(tables)
    tokenizer = own_tokenizer(settings)
    found = find_prepared(out, settings, files, tokenizer, say=say)
    if found is not None:
        counted = f"{_count_splits_pairs(found)} of these very sources"
        say(f"already prepared: {settings.out} holds {counted}; nothing to do")
        publish(settings.out)
        return found
    mark = fingerprint(settings, files, tokenizer)
    scan = _scan(tables, out, partial, say)
    _require_both_clicks(tables, scan)
    if tokenizer is None:
        tokenizer = make_tokenizer(
            settings,
            partial,
            training=lambda: tables.training_strings(say),
            all_texts=lambda: tables.strings(say),
            say=say,
        )
    written, texts = _write(tables, tokenizer, partial, sum(scan.rows), say)
    tokenizer.save(partial / "tokenizer")
    manifest = _describe_pairs(tables, scan, written, texts, tokenizer, mark)
    write_json(partial / MANIFEST, manifest.model_dump(mode="json"))
    move_into_place(partial, out)
    publish(settings.out)
    for line in _closing_lines_pairs(manifest, scan, settings, time.perf_counter() - started):
        say(line)
    return manifest


def _open_tables(settings: PrepareSettings, say: Say) -> _Tables:
    given = settings.source
    if len({Path(one).expanduser().resolve() for one in given}) < len(given):
        raise PrepareError(f"sources {', '.join(given)}: one is given twice; give each once")
    opened = [open_table(one) for one in given]
    order = order_sources([table.path.stem for table in opened])
    tables = _Tables([opened[i] for i in order], settings)
    for number, table in enumerate(tables.tables):
        role = SPLITS[tables.role(number)]
        whose = {1: "train, validation and test", 2: "train and validation" if number == 0 else role}
        say(f"{table.name}: {table.source.bytes / 1e6:,.1f} MB, for {whose.get(len(opened), role)}")
    return tables


def _as_planned(tables: _Tables) -> list[PlannedFile]:
    """The tables as `output` takes sources."""
    nothing = np.zeros(0, dtype=np.uint8)
    return [
        PlannedFile(number, "news", tables.role(number), table.source, nothing, {})
        for number, table in enumerate(tables.tables)
    ]


def _scan(tables: _Tables, out: Path, partial: Path, say: Say) -> _Scan:
    """The first walk: counts, and rejected rows listed in `partial`.

    Raises:
        PrepareError: too many rows of a table are bad.
    """
    scan = _Scan()
    tell = _teller(say, lambda done, _: f"looked through {done:,} rows")
    with (partial / REJECTED).open("w", encoding="utf-8") as listed:
        for number, table in enumerate(tables.tables):
            rows, rejected, shown = 0, Counter[str](), list[str]()
            for block in _blocks(read_pairs(table)):
                pairs = _good(block)
                fates = tables.fates(number, pairs).tolist()
                scan.clicks.update(zip(fates, (pair.clicked for pair in pairs), strict=True))
                for line in block:
                    if isinstance(line.row, BadLine):
                        listed.write(_entry(table, line))
                        rejected[str(line.row).partition(":")[0]] += 1
                        if len(shown) < _SHOWN:
                            shown.append(f"{table.name}:{line.number}: {line.row}")
                rows += len(block)
                tell(len(block))
            scan.rows.append(rows)
            scan.rejected.append(rejected)
            scan.shown += shown
            listed.flush()
            _require_few_rejected_pairs(tables, number, rows, rejected.total(), shown, out, partial)
    return scan


def _require_few_rejected_pairs(
    tables: _Tables, number: int, rows: int, bad: int, shown: Sequence[str], out: Path, partial: Path
) -> None:
    allowed = tables.settings.max_rejected_share
    if bad > allowed * rows:
        listed = out.with_name(f"{out.name}.{REJECTED}")
        os.replace(partial / REJECTED, listed)
        raise PrepareError(
            f"{tables.tables[number].name}: {bad:,} of {rows:,} rows are bad, at most {allowed:.1%} may be: "
            f"{'; '.join(shown[:3])}. All are listed in {listed}. Mend the file, or allow more with "
            "--max_rejected_share"
        )


def _require_both_clicks(tables: _Tables, scan: _Scan) -> None:
    """Without rows of both kinds a split has no AUC, and training nothing to learn."""
    names = ", ".join(table.name for table in tables.tables)
    for fate, split in enumerate(SPLITS):
        without, clicked = scan.clicks[fate, 0], scan.clicks[fate, 1]
        if not without and not clicked:
            raise PrepareError(
                f"{split} would be empty: none of the {sum(scan.rows):,} rows of {names} falls into it; "
                "give more queries, a larger share, or a table of its own"
            )
        if not without or not clicked:
            raise PrepareError(
                f"{split} would have a single class: {clicked:,} clicked and {without:,} other pairs of "
                f"{names}; each split needs both"
            )


def _write(
    tables: _Tables, tokenizer: TitleTokenizer, partial: Path, total: int, say: Say
) -> tuple[PairsWriter, Texts]:
    """The second walk: shards and the table of texts."""
    tell = _teller(
        say, lambda done, spent: f"prepared {done / total:.0%}, about {spent * (total / done - 1):.0f} s left"
    )
    writer = PairsWriter(
        partial,
        tokenizer,
        query_tokens=tables.settings.query_tokens,
        text_tokens=tables.settings.max_tokens or TEXT_TOKENS,
    )
    try:
        for number, table in enumerate(tables.tables):
            for block in _blocks(read_pairs(table)):
                pairs = _good(block)
                writer.add(number, pairs, tables.fates(number, pairs))
                tell(len(block))
            writer.end_table(number)
    finally:
        texts = writer.close()
    return writer, texts


def _blocks(lines: Iterable[Line]) -> Iterator[list[Line]]:
    """Lines in blocks of bounded size."""
    block: list[Line] = []
    characters = 0
    for line in lines:
        block.append(line)
        characters += len(line.row.text) if isinstance(line.row, Pair) else len(line.shown)
        if len(block) >= _BLOCK_ROWS or characters >= _BLOCK_CHARACTERS:
            yield block
            block, characters = [], 0
    if block:
        yield block


def _good(block: Iterable[Line]) -> list[Pair]:
    return [line.row for line in block if isinstance(line.row, Pair)]


def _entry(table: PairsTable, line: Line) -> str:
    entry = {"file": table.name, "line": line.number, "reason": str(line.row), "text": excerpt(line.shown)}
    return json.dumps(entry) + "\n"


def _teller(say: Say, text: Callable[[int, float], str]) -> Callable[[int], None]:
    """Says `text(rows so far, seconds)` now and then."""
    started = said = time.perf_counter()
    done = 0

    def tell(rows: int) -> None:
        nonlocal done, said
        done += rows
        now = time.perf_counter()
        if now - said >= _SAY_SECONDS:
            said = now
            say(text(done, now - started))

    return tell


def _describe_pairs(
    tables: _Tables, scan: _Scan, written: PairsWriter, texts: Texts, tokenizer: TitleTokenizer, mark: str
) -> Manifest:
    counts = written.counts
    return Manifest(
        format=FORMAT,
        fingerprint=mark,
        settings=row_settings(tables.settings),
        sources=[
            Source(
                folder=table.source.folder,
                file=table.source.name,
                bytes=table.source.bytes,
                sha256=table.source.sha256,
                rows=rows,
                rejected=rejected.total(),
            )
            for table, rows, rejected in zip(tables.tables, scan.rows, scan.rejected, strict=True)
        ],
        tokenizer=Tokenizer(
            name=tokenizer.name,
            sha256=tokenizer.sha256,
            vocabulary=tokenizer.vocabulary,
            pad_id=tokenizer.pad_id,
        ),
        labels=[],
        splits={},
        others=[],
        behaviors={},
        pairs=written.shards,
        texts=texts,
        statistics={
            "queries": counts["query"],
            "texts": counts["text"],
            "pairs": sum(scan.clicks.values()),
            "clicked": sum(count for (_, clicked), count in scan.clicks.items() if clicked),
            "words_per_query": counts["query words"] / counts["query"],
            "words_per_text": counts["text words"] / counts["text"],
            "tokens_per_query": counts["query tokens"] / counts["query"],
            "tokens_per_text": counts["text tokens"] / counts["text"],
        },
        rejected=dict(sorted(sum(scan.rejected, Counter()).items())),
    )


def _closing_lines_pairs(
    manifest: Manifest, scan: _Scan, settings: PrepareSettings, seconds: float
) -> Iterator[str]:
    """What a person wants to know at the end."""
    shares = [
        f"{scan.clicks[fate, 1] / manifest.rows(split, 'retrieval'):.1%} of {split}"
        for fate, split in enumerate(SPLITS)
    ]
    numbers = manifest.statistics
    yield f"{_count_splits_pairs(manifest)}; clicked: {', '.join(shares)}"
    for name, plural in (("query", "queries"), ("text", "texts")):
        average = numbers[f"tokens_per_{name}"]
        yield f"{numbers[plural]:,.0f} different {plural} of {average:.1f} tokens on average"
    for kind, count in manifest.rejected.items():
        yield f"rejected, {kind}: {count:,}"
    yield from (f"  {line}" for line in scan.shown[:_SHOWN])
    rows = sum(scan.rows)
    yield f"{rows:,} rows in {seconds:.1f} s ({rows / seconds:,.0f} rows/s)"
    yield f"{settings.out} holds the shards, {MANIFEST}, {REJECTED} and tokenizer/"
    yield (
        f"next: newsbert-ray train --task retrieval --data {settings.out} {training_flags(settings)} "
        "--out RUN"
    )


def _count_splits_pairs(manifest: Manifest) -> str:
    counts = [f"{manifest.rows(split, 'retrieval'):,} {split}" for split in SPLITS]
    return ", ".join(counts) + " pairs"
