"""Tables of query, text and clicked -> tokenised Parquet shards, their table of texts and their manifest.

Two walks over the tables, each in constant memory but for some 16 bytes a different text: the first counts
and names what is bad, so that no error comes after hours; the second tokenises, with the threads of the
`tokenizers` library, each different query and text once.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from newsbert_ray.config import PrepareSettings
from newsbert_ray.data.mind import BadLine, excerpt
from newsbert_ray.data.output import (
    REJECTED,
    find_prepared,
    fingerprint,
    move_into_place,
    row_settings,
)
from newsbert_ray.data.pairs_shards import PairsWriter
from newsbert_ray.data.pairs_table import Line, Pair, PairsTable, is_pairs_table, open_table, read_pairs
from newsbert_ray.data.plan import PlannedFile
from newsbert_ray.data.shards import (
    FORMAT,
    MANIFEST,
    SPLITS,
    Manifest,
    Source,
    Texts,
    Tokenizer,
)
from newsbert_ray.data.sources import PrepareError
from newsbert_ray.data.split import (
    Fate,
    Fates,
    hash_ids,
    order_sources,
    role_of,
    split_by_hash,
)
from newsbert_ray.data.tokens import TitleTokenizer
from newsbert_ray.data.vocabulary import make_tokenizer, own_tokenizer, training_flags
from newsbert_ray.record import write_json
from newsbert_ray.storage import publish

__all__ = ["is_pairs_table", "prepare_pairs"]

TEXT_TOKENS = 512
"""Longest text where nothing else is asked: as far as BERT's positions go."""

Say = Callable[[str], None]
_BLOCK_ROWS, _BLOCK_CHARACTERS = 2048, 16 << 20
_SAY_SECONDS = 5.0
_SHOWN = 5


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
        counted = f"{_count_splits(found)} of these very sources"
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
    manifest = _describe(tables, scan, written, texts, tokenizer, mark)
    write_json(partial / MANIFEST, manifest.model_dump(mode="json"))
    move_into_place(partial, out)
    publish(settings.out)
    for line in _closing_lines(manifest, scan, settings, time.perf_counter() - started):
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
            _require_few_rejected(tables, number, rows, rejected.total(), shown, out, partial)
    return scan


def _require_few_rejected(
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


def _describe(
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


def _closing_lines(
    manifest: Manifest, scan: _Scan, settings: PrepareSettings, seconds: float
) -> Iterator[str]:
    """What a person wants to know at the end."""
    shares = [
        f"{scan.clicks[fate, 1] / manifest.rows(split, 'retrieval'):.1%} of {split}"
        for fate, split in enumerate(SPLITS)
    ]
    numbers = manifest.statistics
    yield f"{_count_splits(manifest)}; clicked: {', '.join(shares)}"
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


def _count_splits(manifest: Manifest) -> str:
    counts = [f"{manifest.rows(split, 'retrieval'):,} {split}" for split in SPLITS]
    return ", ".join(counts) + " pairs"
