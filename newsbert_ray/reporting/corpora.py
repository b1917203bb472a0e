"""Table 1: what a corpus holds, beside the paper's (NewsBERT, Wu et al. 2021). Pure."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from newsbert_ray.data.shards import SPLITS, Manifest
from newsbert_ray.record import RunRecord
from newsbert_ray.reporting.compared import data_name
from newsbert_ray.reporting.page import Block, Bullets, Page, Section, Table

_PAPERS: Mapping[str, float | None] = {
    "users": 1_000_000,
    "news": 161_013,
    "news_categories": 20,
    "impressions": 15_777_377,
    "clicks": 24_155_470,
    "words_per_title": 11.52,
    "tokens_per_title": None,
    "queries": 1_990_942,
    "texts": 1_428_779,
    "pairs": None,
    "clicked": None,
    "words_per_query": 11.83,
    "words_per_text": 596.09,
    "tokens_per_query": None,
    "tokens_per_text": None,
}
"""Table 1 of the paper, MIND's part and NewsRetrieval's; None where it says nothing."""
CAPTION = "Table 1. What is in the shards; the paper's corpora are others."


def table1(corpora: Mapping[str, Mapping[str, float]]) -> Table | None:
    """Counts and means of corpora by their names, each a column, beside the paper's; None where none is
    known."""
    known = {name: numbers for name, numbers in corpora.items() if numbers}
    rows = []
    for kind, papers in _PAPERS.items():
        cells = [shown(numbers[kind]) if kind in numbers else "" for numbers in known.values()]
        if any(cells):
            rows.append((kind.replace("_", " "), *cells, shown(papers) if papers is not None else ""))
    if not rows:
        return None
    return Table(("", *known, "the paper's"), tuple(rows), caption=CAPTION)


def table1_of_runs(records: Sequence[RunRecord]) -> Table | None:
    """Table 1 of the corpora behind some runs, as far as their records tell."""
    return table1({data_name(record): record.data.get("statistics") or {} for record in records})


def shown(value: float) -> str:
    """A count without decimals, a mean with two."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.2f}"


def corpora_page(manifests: Mapping[str, Manifest]) -> Page:
    """The report of prepared shards, by the names that their folders have."""
    table = table1({name: manifest.statistics for name, manifest in manifests.items()})
    facts = [f"{name}: {_describe(manifest)}" for name, manifest in manifests.items()]
    blocks: tuple[Block, ...] = (*([table] if table else []), Bullets(tuple(facts)))
    names = ", ".join(manifests)
    return Page("Corpora" if len(manifests) > 1 else "Corpus", names, (Section("What is there", blocks),))


def corpora_csv(manifests: Mapping[str, Manifest]) -> str:
    """Every number of every corpus in full: a row each."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("corpus", "statistic", "value"))
    for name, manifest in manifests.items():
        writer.writerows((name, kind, value) for kind, value in manifest.statistics.items())
    return file.getvalue()


def _describe(manifest: Manifest) -> str:
    """`40,120 news in train, ...; tokens of NAME`."""
    parts = []
    for what, shards in (
        ("news", manifest.splits),
        ("impressions", manifest.behaviors),
        ("pairs", manifest.pairs),
    ):
        counts = [f"{sum(s.rows for s in shards.get(split, [])):,} {split}" for split in SPLITS]
        if shards:
            parts.append(f"{what}: {', '.join(counts)}")
    parts.append(f"tokens of {manifest.tokenizer.name} ({manifest.tokenizer.vocabulary:,})")
    sources = ", ".join(f"{source.folder}/{source.file}" for source in manifest.sources)
    return "; ".join([*parts, f"from {sources}"])
