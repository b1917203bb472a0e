"""MIND's files -> tokenised Parquet shards and their manifest, in constant memory.

`data.plan` decides what becomes of every line; here the chunks are parsed, tokenised and written, as a Ray
Data pipeline or in this process, the table of texts follows from the shards, and the sums are drawn. All is
written beside the output folder and moved there at the end.
"""

from __future__ import annotations

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

from newsbert_ray.config import PrepareSettings
from newsbert_ray.connect import inside_cluster
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
from newsbert_ray.data.pairs_prepare import prepare_pairs
from newsbert_ray.data.pairs_table import is_pairs_table
from newsbert_ray.data.plan import Plan, PlannedFile, make_plan, read_sources, require_news
from newsbert_ray.data.shards import FORMAT, MANIFEST, SPLITS, Manifest, Shard, Source, Texts, Tokenizer
from newsbert_ray.data.sources import PrepareError
from newsbert_ray.data.split import KEPT, RARE, Fate, Hashes, is_known
from newsbert_ray.data.texts import TextWriter
from newsbert_ray.data.tokens import TitleTokenizer
from newsbert_ray.data.vocabulary import make_tokenizer, own_tokenizer, training_flags
from newsbert_ray.inputs import brought
from newsbert_ray.record import write_json
from newsbert_ray.storage import is_url, publish, working

__all__ = ["PrepareError", "prepare"]

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
    from newsbert_ray.connect import ray_session
    from newsbert_ray.data.stream import map_chunks

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
