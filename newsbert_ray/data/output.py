"""The folder that `prepare` writes: found again by content, written beside its place, moved when whole."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from newsbert_ray.config import SCRATCH, PrepareSettings
from newsbert_ray.data.chunk import rejected_part
from newsbert_ray.data.plan import PlannedFile
from newsbert_ray.data.shards import FORMAT, MANIFEST, Manifest, Part, Shard, ShardError, read_manifest
from newsbert_ray.data.sources import PrepareError
from newsbert_ray.data.tables import is_pairs_table
from newsbert_ray.data.tokenizer import TitleTokenizer
from newsbert_ray.data.word_vectors import identity, is_vectors
from newsbert_ray.files import locked
from newsbert_ray.storage.inputs import brought

REJECTED = "rejected.jsonl"
_LOCK = ".lock"
_MADE_OF = ("scratch.vocabulary", "vectors")
"""Row settings of tokenisers that are made of the corpus's texts."""
TITLE_TOKENS = 30
"""Longest title where the settings name none (paper: titles of 30 tokens)."""


def find_prepared(
    out: Path,
    settings: PrepareSettings,
    files: Sequence[PlannedFile],
    tokenizer: TitleTokenizer | None,
    *,
    say: Callable[[str], None],
) -> Manifest | None:
    """The manifest at `out` if it was made from the same and is whole; None where `out` may be written.

    Args:
        tokenizer: None for one that is still to be made.
    Raises:
        PrepareError: `out` holds something else, which is named.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file():
        raise PrepareError(f"out {out}: there already, and no folder of prepared shards; give another --out")
    try:
        found = read_manifest(out)
    except ShardError as error:
        if settings.overwrite:
            return None
        raise PrepareError(str(error)) from error
    changes = list(_changes(found, settings, files, tokenizer))
    if not changes and found.fingerprint != fingerprint(settings, files, tokenizer):
        changes = ["the sources in another order"]
    if changes and not settings.overwrite:
        raise PrepareError(
            f"out {out}: prepared from something else: {'; '.join(changes)}; add --overwrite true, or give "
            "another --out"
        )
    damaged = [] if changes else [part.file for part in _all_parts(found) if not _is_whole(out, part)]
    if damaged:
        say(f"{out / damaged[0]}: missing or damaged ({len(damaged)} in all), so all is prepared again")
    return None if changes or damaged else found


def fingerprint(
    settings: PrepareSettings, files: Sequence[PlannedFile], tokenizer: TitleTokenizer | None
) -> str:
    """SHA-256 over sources, tokeniser (None: to be made of the texts) and settings that alter a row."""
    made_from = {
        "format": FORMAT,
        "sources": [[file.number, file.source.sha256] for file in files],
        "tokenizer": SCRATCH if tokenizer is None else tokenizer.sha256,
        "settings": row_settings(settings),
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def row_settings(settings: PrepareSettings) -> dict[str, Any]:
    """The settings that alter a row."""
    vectors = (
        {"vectors": identity(Path(brought(settings.teacher)).expanduser())}
        if is_vectors(settings.teacher)
        else {}
    )
    return {
        "max_tokens": settings.max_tokens or TITLE_TOKENS,
        "query_tokens": settings.query_tokens if any(map(is_pairs_table, settings.source)) else None,
        "validation_share": settings.validation_share,
        "test_share": settings.test_share,
        "seed": settings.seed,
        "scratch.vocabulary": settings.scratch.vocabulary if settings.teacher == SCRATCH else None,
        **vectors,
    }


@contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """A locked folder beside `out` to write into; gone at the end, whatever happens, unless it was moved.

    Those of runs that died (nobody holds their lock) are removed first.
    """
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    for stale in parent.glob(f"{_escape(out.name)}.partial-*"):
        with suppress(OSError), locked(stale / _LOCK):
            shutil.rmtree(stale, ignore_errors=True)
    partial = parent / f"{out.name}.partial-{secrets.token_hex(4)}"
    partial.mkdir()
    with locked(partial / _LOCK):
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def move_into_place(partial: Path, out: Path) -> None:
    """Make `partial` the folder `out`; what was there goes last."""
    for path in partial.glob("source-*"):
        shutil.rmtree(path)
    (partial / _LOCK).unlink()
    old = out.with_name(f"{partial.name}-old")
    if out.exists():
        os.rename(out, old)
    os.rename(partial, out)
    shutil.rmtree(old, ignore_errors=True)


def join_rejected(files: Iterable[PlannedFile], partial: Path, target: Path) -> None:
    """Join the chunks' rejected lines into `target`, in the order of files and lines."""
    with target.open("wb") as joined:
        for file in files:
            for index in range(len(file.source.chunks)):
                part = rejected_part(partial, file.number, index)
                if part.exists():
                    with part.open("rb") as lines:
                        shutil.copyfileobj(lines, joined)
                    part.unlink()


def _changes(
    found: Manifest, settings: PrepareSettings, files: Sequence[PlannedFile], tokenizer: TitleTokenizer | None
) -> Iterator[str]:
    """What differs between prepared shards and what is asked for, a phrase each."""
    old = {f"{source.folder}/{source.file}": source.sha256 for source in found.sources}
    new = {f"{file.source.folder}/{file.source.name}": file.source.sha256 for file in files}
    if sorted(old.values()) != sorted(new.values()):
        yield from _changed_sources(old, new)
    name = Path(settings.teacher).name if tokenizer is None else tokenizer.name
    asked = row_settings(settings)
    if tokenizer is None or any(found.settings.get(key) for key in _MADE_OF):
        same = all(bool(found.settings.get(key)) == bool(asked.get(key)) for key in _MADE_OF)
    else:
        same = found.tokenizer.sha256 == tokenizer.sha256
    if not same:
        yield f"tokeniser {found.tokenizer.name} then, {name} now" + (
            ", with other contents" if found.tokenizer.name == name else ""
        )
    for key, value in asked.items():
        if found.settings.get(key) != value and same:
            yield f"{key} {found.settings.get(key)} then, {value} now"


def _changed_sources(old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[str]:
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            state = "is new" if name not in old else "is not given now" if name not in new else "has changed"
            yield f"source {name} {state}"


def _all_parts(manifest: Manifest) -> Iterator[Shard | Part]:
    for splits in (manifest.splits, manifest.behaviors, manifest.pairs):
        for shards in splits.values():
            yield from shards
    yield from manifest.others
    yield from (manifest.texts.tokens, manifest.texts.offsets)


def _is_whole(folder: Path, part: Shard | Part) -> bool:
    try:
        with (folder / part.file).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == part.sha256
    except FileNotFoundError:
        return False


def _escape(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
