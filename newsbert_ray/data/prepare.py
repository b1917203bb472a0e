"""MIND's files -> tokenised Parquet shards and their manifest, in constant memory. The work on a chunk is `data.chunk`'s.

Three walks over the files: hash them and cut them into chunks; scan ids and topics, which decides every line's split;
parse, tokenise and write, as a Ray Data pipeline. All is written beside the output folder and renamed at the end.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from newsbert_ray.config import SCRATCH, PrepareSettings
from newsbert_ray.data.chunk import (
    Job,
    Kind,
    Scan,
    Shared,
    Summary,
    explain_os_error,
    rejected_part,
    rows_of,
    run_job,
    scan_behaviors,
    scan_news,
)
from newsbert_ray.data.mind import News, parse_news
from newsbert_ray.data.shards import (
    FORMAT,
    MANIFEST,
    SPLITS,
    Manifest,
    Shard,
    ShardError,
    Source,
    Split,
    Tokenizer,
    read_manifest,
)
from newsbert_ray.data.sources import PrepareError, SourceFile, SourceFolder, find_source, read_through
from newsbert_ray.data.split import (
    NO_CODE,
    RARE,
    Codes,
    Fate,
    Fates,
    Hashes,
    find_duplicates,
    order_sources,
    role_of,
    split_by_hash,
    split_news,
)
from newsbert_ray.data.tokens import TitleTokenizer, learn_tokenizer, load_tokenizer

__all__ = ["PrepareError", "prepare"]

REJECTED = "rejected.jsonl"
_SAY_SECONDS = 5.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class _File:
    """One file of a source, its place among all files, and (after the scan) what becomes of each of its lines."""

    number: int
    kind: Kind
    role: Fate
    source: SourceFile
    fates: Fates
    duplicates: dict[int, int]


@dataclass(frozen=True)
class _Plan:
    """Everything that is decided before a title is tokenised."""

    files: list[_File]
    labels: list[str]
    known: Hashes
    rare: dict[str, int]


@dataclass
class _Result:
    """Summaries of all jobs, added up."""

    shards: dict[str, dict[Split, list[Shard]]]
    rejected: dict[int, Counter[str]]
    shown: dict[int, list[str]]
    counts: Counter[str]
    users: int


def prepare(settings: PrepareSettings, *, say: Say = print) -> Manifest:
    """Prepare the shards of `settings.out`, or find them there already.

    Args:
        say: told the progress and the closing summary, a line at a time.
    Returns:
        The manifest, as `shards.read_manifest` gives it.
    Raises:
        PrepareError: sources, output folder or disk do not allow it; nothing at `settings.out` is altered then.
        TokenizerError: the teacher's tokeniser cannot be had.
    """
    started = time.perf_counter()
    try:
        with _partial_folder(Path(settings.out)) as partial:
            return _prepare(settings, partial, say, started)
    except OSError as error:
        raise PrepareError(f"cannot prepare {settings.out}: {explain_os_error(error)}") from error


def _prepare(settings: PrepareSettings, partial: Path, say: Say, started: float) -> Manifest:
    out = Path(settings.out)
    files = _read_sources(settings.source, partial, say)
    tokenizer = None if settings.teacher == SCRATCH else load_tokenizer(settings.teacher)
    found = _find_prepared(out, settings, files, tokenizer, say)
    if found is not None:
        say(f"already prepared: {out} holds {_split_counts(found)} of these very sources")
        return found
    plan = _make_plan(files, settings)
    _require_few_bad_news(plan, settings, partial)
    _require_news_in_splits(plan, settings)
    if tokenizer is None:
        say(f"learning {settings.scratch.vocabulary:,} WordPieces from the training titles")
        tokenizer = learn_tokenizer(_training_titles(plan), vocabulary=settings.scratch.vocabulary)
    shared = Shared(
        str(partial), str(partial), tokenizer.serialised, tokenizer.pad_id, settings.max_tokens,
        {label: index for index, label in enumerate(plan.labels)}, plan.known,
    )  # fmt: skip
    result = _run_jobs(_jobs(plan), shared, settings, say)
    for file in plan.files:
        _require_few_rejected(file, result, settings, partial)
    _join_rejected(plan.files, partial, partial / REJECTED)
    tokenizer.save(partial / "tokenizer")
    manifest = _manifest(settings, plan, result, tokenizer)
    (partial / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    _move_into_place(partial, out)
    for line in _closing_lines(manifest, plan, result, settings, time.perf_counter() - started):
        say(line)
    return manifest


def _read_sources(given: Sequence[str], partial: Path, say: Say) -> list[_File]:
    """Every file of every source, read through once, in the order of their roles."""
    if len({Path(one).expanduser().resolve() for one in given}) < len(given):
        raise PrepareError(f"sources {', '.join(given)}: one is given twice; give each once")
    folders = [find_source(one, unpacked=partial / f"source-{i}") for i, one in enumerate(given)]
    ordered = [folders[i] for i in order_sources([folder.name for folder in folders])]
    return [file for position, folder in enumerate(ordered) for file in _read_folder(folder, position, len(ordered), say)]


def _read_folder(folder: SourceFolder, position: int, sources: int, say: Say) -> Iterator[_File]:
    role = role_of(position, sources)
    if folder.behaviors is None:
        say(f"{folder.name}: no behaviors.tsv, so news only")
    paths: list[tuple[Kind, Path | None]] = [("news", folder.news), ("behaviors", folder.behaviors)]
    for kind, path in paths:
        if path is not None:
            source = read_through(path, folder=folder.name)
            say(f"{folder.name}/{source.name}: {source.lines:,} lines, {source.bytes / 1e6:,.1f} MB, for {_role(role, sources)}")
            yield _File(2 * position + (kind == "behaviors"), kind, role, source, np.zeros(0, dtype=np.uint8), {})


def _role(role: Fate, sources: int) -> str:
    if sources == 1:
        return "train, validation and test"
    return "train and validation" if role is Fate.TRAIN and sources == 2 else SPLITS[role]


def _make_plan(files: list[_File], settings: PrepareSettings) -> _Plan:
    """Scan all files and settle the fate of every line."""
    sources = sum(file.kind == "news" for file in files)
    shares = {
        "validation_share": settings.validation_share if sources < 3 else 0.0,
        "test_share": settings.test_share if sources == 1 else 0.0,
    }
    topics: dict[str, int] = {}
    known: Hashes = np.zeros(0, dtype=np.uint64)
    trained: Codes | None = None
    labels: list[str] = []
    rare: dict[str, int] = {}
    planned: list[_File] = []
    for file in (file for file in files if file.kind == "news"):
        hashes, codes = _scan_news(file, topics)
        fates, duplicates = split_news(
            hashes, codes, role=file.role, earlier=known, trained=trained, seed=settings.seed, **shares
        )
        kept = fates <= Fate.TEST
        if trained is None:
            counts = np.bincount(codes[kept], minlength=len(topics))
            trained = np.flatnonzero(counts).astype(np.uint16)
            labels = sorted(name for name, code in topics.items() if counts[code])
            rare = {name: int(counts[topics[name]]) for name in labels if counts[topics[name]] < RARE}
        known = np.sort(np.concatenate([known, hashes[kept]]))
        planned.append(replace(file, fates=fates, duplicates=duplicates))
    for file in (file for file in files if file.kind == "behaviors"):
        planned.append(_plan_behaviors(file, known, settings, sources))
    return _Plan(sorted(planned, key=lambda file: file.number), labels, known, rare)


def _scan_news(file: _File, topics: dict[str, int]) -> tuple[Hashes, Codes]:
    """Hash and topic code of every line of a news file; `topics` learns its topics."""
    hashes: list[Hashes] = []
    codes: list[Codes] = []
    for scan in map(scan_news, file.source.chunks):
        for name in scan.topics:
            topics.setdefault(name, len(topics))
        if len(topics) >= NO_CODE:
            raise PrepareError(f"{file.source.folder}/news.tsv: more than {NO_CODE - 1:,} categories; is column 2 the category?")
        of_all = np.array([topics[name] for name in scan.topics], dtype=np.uint16)
        good = scan.codes != NO_CODE
        scan.codes[good] = of_all[scan.codes[good]]
        hashes.append(scan.hashes)
        codes.append(scan.codes)
    return _join(hashes, np.uint64), _join(codes, np.uint16)


def _plan_behaviors(file: _File, known: Hashes, settings: PrepareSettings, sources: int) -> _File:
    hashes, well_formed = _scan_behaviors(file, None)
    duplicates = find_duplicates(hashes, well_formed)
    if duplicates:
        # The first of two lines counts only if it is whole, so now every line is looked at.
        hashes, well_formed = _scan_behaviors(file, known)
        duplicates = find_duplicates(hashes, well_formed)
    fates = np.full(len(hashes), file.role, dtype=np.uint8)
    if sources == 1:
        fates = split_by_hash(
            hashes, seed=settings.seed, validation_share=settings.validation_share, test_share=settings.test_share
        )
    fates[list(duplicates)] = Fate.DUPLICATE
    return replace(file, fates=fates, duplicates=duplicates)


def _scan_behaviors(file: _File, known: Hashes | None) -> tuple[Hashes, Any]:
    scans: list[Scan] = [scan_behaviors(chunk, known) for chunk in file.source.chunks]
    hashes = _join([scan.hashes for scan in scans], np.uint64)
    return hashes, _join([scan.codes for scan in scans], np.uint16) != NO_CODE


def _join(arrays: Sequence[Any], kind: Any) -> Any:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=kind)


def _jobs(plan: _Plan, kind: Kind | None = None) -> list[Job]:
    """One job a chunk, in the order of files and lines."""
    return [job for file in plan.files if kind in (None, file.kind) for job in _file_jobs(file)]


def _file_jobs(file: _File) -> Iterator[Job]:
    duplicates = sorted(file.duplicates.items())
    for index, chunk in enumerate(file.source.chunks):
        start = chunk.first_line - 1
        ours = {at - start: first + 1 for at, first in duplicates if start <= at < start + chunk.lines}
        yield Job(chunk, file.kind, file.number, index, file.fates[start : start + chunk.lines], ours)


def _training_titles(plan: _Plan) -> Iterator[str]:
    for job in _jobs(plan, "news"):
        for fate, (_, row) in zip(job.fates.tolist(), rows_of(job.chunk, parse_news), strict=True):
            if fate == Fate.TRAIN and isinstance(row, News):
                yield row.title


def _run_jobs(jobs: list[Job], shared: Shared, settings: PrepareSettings, say: Say) -> _Result:
    """Run all jobs, here or as a Ray Data pipeline, and add up what they say."""
    with ExitStack() as stack:
        if settings.workers == 0:
            summaries: Iterable[Summary] = (run_job(job, shared) for job in jobs)
        else:
            from newsbert_ray.connect import ray_session
            from newsbert_ray.data.stream import map_chunks

            stack.enter_context(ray_session(cpus=settings.workers))
            summaries = map_chunks(jobs, run_job, shared, workers=settings.workers)
        return _add_up(_track(summaries, jobs, say))


def _track(summaries: Iterable[Summary], jobs: Sequence[Job], say: Say) -> Iterator[Summary]:
    """Pass summaries on and say how far it is: a bar on a terminal, now and then a line elsewhere."""
    total = sum(job.chunk.length for job in jobs)
    length = {(job.file, job.index): job.chunk.length for job in jobs}
    started = said = time.perf_counter()
    done = 0
    for summary in summaries:
        if summary.error is not None:
            raise PrepareError(summary.error)
        yield summary
        done += length[summary.file, summary.index]
        now = time.perf_counter()
        if now - said >= _SAY_SECONDS and done < total:
            said = now
            say(f"prepared {100 * done / total:.0f} %, {(now - started) * (total - done) / done:.0f} s left")


def _add_up(summaries: Iterable[Summary]) -> _Result:
    result = _Result({"news": {}, "behaviors": {}}, {}, {}, Counter(), 0)
    shown: dict[tuple[int, int], list[str]] = {}
    users: Hashes = np.zeros(0, dtype=np.uint64)
    for summary in summaries:
        kind = "behaviors" if summary.file % 2 else "news"
        for split, shard in summary.shards:
            result.shards[kind].setdefault(split, []).append(shard)
        result.rejected.setdefault(summary.file, Counter()).update(summary.rejected)
        result.counts.update(summary.counts)
        shown[summary.file, summary.index] = summary.shown
        users = np.union1d(users, summary.users)
    for (file, _), lines in sorted(shown.items()):
        result.shown.setdefault(file, []).extend(lines)
    for splits in result.shards.values():
        for shards in splits.values():
            shards.sort(key=lambda shard: shard.file.split("-", 1)[1])
    result.users = len(users)
    return result


def _require_few_bad_news(plan: _Plan, settings: PrepareSettings, partial: Path) -> None:
    """Stop before a title is tokenised if a news file is mostly damage."""
    bad = [int(np.isin(file.fates, (Fate.MALFORMED, Fate.DUPLICATE, Fate.UNSEEN_TOPIC)).sum()) for file in plan.files]
    for file, count in zip(plan.files, bad, strict=True):
        if file.kind == "news" and count > settings.max_rejected_share * file.source.lines:
            shared = Shared(str(partial), None, "", 0, 0, {}, plan.known)
            result = _add_up(run_job(job, shared) for job in _file_jobs(file))
            _require_few_rejected(file, result, settings, partial)


def _require_few_rejected(file: _File, result: _Result, settings: PrepareSettings, partial: Path) -> None:
    bad = result.rejected.get(file.number, Counter()).total()
    lines = file.source.lines
    if bad > settings.max_rejected_share * lines:
        out = Path(settings.out)
        listed = out.with_name(f"{out.name}.{REJECTED}")
        _join_rejected([file], partial, partial / REJECTED)
        os.replace(partial / REJECTED, listed)
        raise PrepareError(
            f"{file.source.folder}/{file.source.name}: {bad:,} of {lines:,} lines are bad, at most "
            f"{settings.max_rejected_share:.1%} may be: {'; '.join(result.shown[file.number][:3])}; all stand in {listed}; "
            "mend the file, or allow more with --max_rejected_share"
        )


def _join_rejected(files: Iterable[_File], partial: Path, target: Path) -> None:
    """Join the chunks' rejected lines into `target`, in the order of files and lines."""
    with target.open("wb") as joined:
        for file in files:
            for index in range(len(file.source.chunks)):
                part = rejected_part(partial, file.number, index)
                if part.exists():
                    with part.open("rb") as lines:
                        shutil.copyfileobj(lines, joined)
                    part.unlink()


def _require_news_in_splits(plan: _Plan, settings: PrepareSettings) -> None:
    news = [file for file in plan.files if file.kind == "news"]
    for split in SPLITS:
        fate = Fate[split.upper()]
        if not any((file.fates == fate).any() for file in news):
            names = ", ".join(file.source.folder for file in news)
            raise PrepareError(
                f"{split} would be empty: of {sum(file.source.lines for file in news):,} news lines in {names} none falls "
                "into it; give more news, another --validation_share or --test_share, or a later source with new news"
            )


def _find_prepared(
    out: Path, settings: PrepareSettings, files: Sequence[_File], tokenizer: TitleTokenizer | None, say: Say
) -> Manifest | None:
    """The manifest at `out` if it was made from the same; None where `out` may be written.

    Raises:
        PrepareError: `out` holds something else, which is named.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file():
        raise PrepareError(f"out {out}: not empty, and no prepared shards; give another --out")
    try:
        found = read_manifest(out)
    except ShardError as error:
        if settings.overwrite:
            return None
        raise PrepareError(str(error)) from error
    changes = list(_changes(found, settings, files, tokenizer))
    if not changes and found.fingerprint == _fingerprint(settings, files, tokenizer):
        damaged = [shard.file for shard in _all_shards(found) if not _is_whole(out, shard)]
        if not damaged:
            return found
        say(f"{out}: shard {damaged[0]} is damaged ({len(damaged)} in all); preparing again")
        return None
    if settings.overwrite:
        return None
    what = "; ".join(changes) or "another order of sources"
    raise PrepareError(f"out {out}: prepared from something else: {what}; add --overwrite true, or give another --out")


def _changes(
    found: Manifest, settings: PrepareSettings, files: Sequence[_File], tokenizer: TitleTokenizer | None
) -> Iterator[str]:
    """What differs between prepared shards and what is asked for, one phrase each."""
    old = {(source.folder, source.file): source.sha256 for source in found.sources}
    new = {(file.source.folder, file.source.name): file.source.sha256 for file in files}
    if sorted(old.values()) != sorted(new.values()):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                state = "is new" if key not in old else "is not given now" if key not in new else "has changed"
                yield f"source {'/'.join(key)} {state}"
    name = SCRATCH if tokenizer is None else tokenizer.name
    if found.tokenizer.name == SCRATCH or tokenizer is None:
        if found.tokenizer.name != name:
            yield f"tokeniser {found.tokenizer.name} then, {name} now"
    elif found.tokenizer.sha256 != tokenizer.sha256:
        yield f"tokeniser {found.tokenizer.name} then, {name} now, with other contents"
    for key, value in _row_settings(settings).items():
        if found.settings.get(key) != value:
            yield f"{key} {found.settings.get(key)} then, {value} now"


def _row_settings(settings: PrepareSettings) -> dict[str, Any]:
    """The settings that alter a row."""
    return {
        "max_tokens": settings.max_tokens,
        "validation_share": settings.validation_share,
        "test_share": settings.test_share,
        "seed": settings.seed,
        "scratch.vocabulary": settings.scratch.vocabulary if settings.teacher == SCRATCH else None,
    }


def _fingerprint(settings: PrepareSettings, files: Sequence[_File], tokenizer: TitleTokenizer | None) -> str:
    made_from = {
        "format": FORMAT,
        "sources": [[file.number, file.source.sha256] for file in files],
        "tokenizer": SCRATCH if tokenizer is None else tokenizer.sha256,
        "settings": _row_settings(settings),
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def _all_shards(manifest: Manifest) -> Iterator[Shard]:
    for splits in (manifest.splits, manifest.behaviors):
        for shards in splits.values():
            yield from shards


def _is_whole(folder: Path, shard: Shard) -> bool:
    try:
        content = (folder / shard.file).read_bytes()
    except FileNotFoundError:
        return False
    return len(content) == shard.bytes and hashlib.sha256(content).hexdigest() == shard.sha256


def _manifest(settings: PrepareSettings, plan: _Plan, result: _Result, tokenizer: TitleTokenizer) -> Manifest:
    news = sum(shard.rows for shards in result.shards["news"].values() for shard in shards)
    counts = result.counts
    return Manifest(
        format=FORMAT,
        fingerprint=_fingerprint(settings, plan.files, None if settings.teacher == SCRATCH else tokenizer),
        settings=_row_settings(settings),
        sources=[
            Source(
                folder=file.source.folder,
                file=file.source.name,
                bytes=file.source.bytes,
                sha256=file.source.sha256,
                rows=file.source.lines,
                rejected=result.rejected.get(file.number, Counter()).total(),
            )
            for file in plan.files
        ],
        tokenizer=Tokenizer(
            name=tokenizer.name, sha256=tokenizer.sha256, vocabulary=tokenizer.vocabulary, pad_id=tokenizer.pad_id
        ),
        labels=plan.labels,
        splits={split: result.shards["news"][split] for split in SPLITS},
        behaviors={split: shards for split in SPLITS if (shards := result.shards["behaviors"].get(split))},
        statistics={
            "users": result.users,
            "news": news,
            "news_categories": len(plan.labels),
            "impressions": counts["impressions"],
            "clicks": counts["clicks"],
            "words_per_title": counts["words"] / news,
            "tokens_per_title": counts["tokens"] / news,
        },
        rejected=dict(sum((result.rejected[number] for number in sorted(result.rejected)), Counter())),
    )


def _closing_lines(
    manifest: Manifest, plan: _Plan, result: _Result, settings: PrepareSettings, seconds: float
) -> Iterator[str]:
    """What a person wants to know at the end."""
    yield f"news: {_split_counts(manifest)}; {len(manifest.labels)} topics"
    if result.counts["earlier"]:
        yield f"already in an earlier source, not repeated: {result.counts['earlier']:,} news"
    if plan.rare:
        named = ", ".join(f"{name} ({count})" for name, count in plan.rare.items())
        yield f"topics with fewer than {RARE} news, kept whole in train: {named}"
    if manifest.behaviors:
        rows = {split: sum(shard.rows for shard in shards) for split, shards in manifest.behaviors.items()}
        yield "impressions: " + ", ".join(f"{count:,} {split}" for split, count in rows.items())
    for kind, count in sorted(manifest.rejected.items()):
        yield f"rejected, {kind}: {count:,}"
    shown = [line for number in sorted(result.shown) for line in result.shown[number]]
    yield from (f"  {line}" for line in shown[:5])
    table = manifest.statistics
    yield "Table 1: " + ", ".join(f"{name} {value:,.2f}".removesuffix(".00") for name, value in table.items())
    rows_read = sum(source.rows for source in manifest.sources)
    yield f"{rows_read:,} rows in {seconds:.1f} s ({rows_read / seconds:,.0f} rows/s)"
    yield f"shards, {MANIFEST}, {REJECTED} and tokenizer/ lie in {settings.out}"
    yield f"next: newsbert-ray train --data {settings.out} --teacher {settings.teacher} --out RUN"


def _split_counts(manifest: Manifest) -> str:
    return ", ".join(f"{manifest.rows(split):,} {split}" for split in SPLITS)


@contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """A locked folder beside `out` to write into; gone at the end, whatever happens, unless it was moved.

    Those of runs that died (nobody holds their lock) are removed first.
    """
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    for stale in parent.glob(f"{out.name}.partial-*"):
        lock = _lock(stale)
        if lock is not None:
            shutil.rmtree(stale, ignore_errors=True)
            os.close(lock)
    partial = parent / f"{out.name}.partial-{secrets.token_hex(4)}"
    partial.mkdir()
    held = _lock(partial)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if held is not None:
            os.close(held)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock; None if another process does. The kernel frees it when one dies."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _move_into_place(partial: Path, out: Path) -> None:
    for path in partial.glob("source-*"):
        shutil.rmtree(path)
    if out.exists():
        old = out.with_name(f"{partial.name}-old")
        os.rename(out, old)
        os.rename(partial, out)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(partial, out)
