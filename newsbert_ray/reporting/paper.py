"""The paper's Table 2 beside our own rows of the same systems (NewsBERT, Wu et al. 2021). Pure."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from newsbert_ray.data.shards import SPLITS, Manifest
from newsbert_ray.methods import TaskName
from newsbert_ray.record import RunRecord
from newsbert_ray.reporting.page import Block, Bullets, Page, Section, Table
from newsbert_ray.reporting.records import (
    NAMES,
    data_name,
    distinct,
    flat_settings,
    one_task,
    task_name,
    teacher_name,
    tuned_settings,
    varying_settings,
)
from newsbert_ray.reporting.statistics import (
    LEVEL,
    MARK,
    Against,
    compare_rows,
    significance_table,
    usual_base,
)
from newsbert_ray.reporting.tables import Column, Row, bare, columns_of, rows_as_found, rows_of, show

PAPERS_LAYERS = 12
"""Of the encoder that the paper's speed-ups are counted from, in layers."""

_TABLE2: Mapping[tuple[str, int], tuple[float, ...]] = {
    ("glove", 1): (71.13, 49.71, 67.92, 33.09, 36.03, 41.80),
    ("finetune", 12): (74.54, 51.75, 70.53, 35.29, 38.61, 44.29),
    ("finetune", 8): (74.69, 52.10, 70.72, 35.40, 38.74, 44.41),
    ("finetune", 4): (73.53, 51.20, 69.64, 34.38, 37.65, 43.38),
    ("finetune", 2): (72.96, 50.76, 68.96, 33.52, 36.74, 42.48),
    ("finetune", 1): (72.32, 50.37, 68.02, 33.14, 36.09, 41.87),
    ("twinbert", 4): (73.59, 51.24, 69.78, 34.48, 37.76, 43.47),
    ("twinbert", 2): (72.98, 50.84, 69.12, 33.67, 36.89, 42.60),
    ("twinbert", 1): (72.40, 50.45, 68.32, 33.40, 36.34, 42.09),
    ("tinybert", 4): (73.76, 51.12, 69.90, 34.52, 37.77, 43.48),
    ("tinybert", 2): (73.15, 50.94, 69.35, 33.80, 37.42, 43.06),
    ("tinybert", 1): (72.55, 50.50, 68.40, 33.46, 36.39, 42.15),
    ("newsbert", 4): (74.45, 51.78, 70.31, 34.89, 38.32, 43.95),
    ("newsbert", 2): (74.10, 51.26, 69.89, 34.50, 37.75, 43.50),
    ("newsbert", 1): (73.49, 50.65, 68.97, 33.54, 36.77, 42.51),
}
"""Table 2, per cent: accuracy, macro-F1; AUC, MRR, nDCG@5, nDCG@10. Its rows of UniLM and those marked *;
GloVe's has no number of layers."""
_PLACE: Mapping[TaskName, slice] = {"topics": slice(0, 2), "recommendation": slice(2, 6)}
_ROWS = frozenset({"method", "student.layers"})
_OF_OTHER_LAYERS = frozenset({"bilstm_soft", "glove"})
_EXTRA = (
    Column("parameters", "million parameters", "parameters.student", 1e-6),
    Column("times_teacher", "times its teacher's titles/s", "speed.times_teacher"),
)


def table2(records: Sequence[RunRecord], failed: Sequence[Mapping[str, Any]] = ()) -> Table | None:
    """Our rows of the paper's systems, each with the paper's own numbers; None where other settings vary too,
    or only one method was run.

    Args:
        records: of one task.
        failed: `method` and `student.layers` of each run that failed, as far as they varied.
    """
    task, place = one_task(records), _PLACE.get(task_name(records[0]))
    varying = set(varying_settings(records)) | {name for row in failed for name in row}
    tuned = tuned_settings(records)
    if "method" not in varying or not varying <= _ROWS | set(tuned) or place is None:
        return None
    metrics = [column for column in columns_of(task) if column.path.startswith("test.student.")]
    rows = rows_as_found(records, (*metrics, *_EXTRA))
    everyones = flat_settings(records[0])["student.layers"]
    depths = {id(row): int(row.settings.get("student.layers", everyones)) for row in rows}
    everyone = str(flat_settings(records[0])["method"])
    found = {(str(row.settings.get("method", everyone)), depths[id(row)]): row for row in rows}
    lost = Counter(
        (str(row.get("method", everyone)), int(row.get("student.layers", everyones))) for row in failed
    )
    order = {name: number for number, name in enumerate(NAMES)}
    keys = sorted(found.keys() | lost.keys(), key=lambda key: (order[key[0]], -key[1]))
    head = (
        *("system", "layers", "seeds", _EXTRA[0].heading, f"speed-up by layers, of {PAPERS_LAYERS}"),
        _EXTRA[1].heading,
        *(column.heading for column in metrics),
        *(f"the paper's {bare(column)} %" for column in metrics),
    )
    body = []
    for method, depth in keys:
        row = found.get((method, depth))
        theirs = _TABLE2.get((method, depth), ())[place]
        ours = [show(row.columns.get(column.name), column) if row else "failed" for column in metrics]
        extra = [show(row.columns.get(column.name), column) if row else "" for column in _EXTRA]
        by_layers = "" if method in _OF_OTHER_LAYERS else f"{PAPERS_LAYERS / depth:.1f}"
        paper = [f"{value:.2f}" for value in theirs] or [""] * len(metrics)
        away = lost[method, depth]
        seeds = str(len(row.seeds) if row else 0) + (f" ({away} failed)" if away else "")
        counted = (str(depth), seeds, extra[0].removesuffix(" ± 0.0"), by_layers, extra[1])
        body.append((NAMES[method], *counted, *ours, *paper))
    return Table(head, tuple(body), words=1, caption=_caption(records, tuned))


def _caption(records: Sequence[RunRecord], tuned: Sequence[str]) -> str:
    data = " or ".join(dict.fromkeys(map(data_name, records)))
    teachers = " or ".join(dict.fromkeys(map(teacher_name, records)))
    rows = sorted({int(record.data.get("train_rows") or 0) for record in records} - {0})
    counted = " or ".join(f"{n:,}" for n in rows)
    trained = f", trained on {counted} {one_task(records).examples}" if rows else ""
    return (
        f"Table 2. Ours: {data}{trained}, encoder {teachers}{_rates(records, tuned)}; mean ± sd over seeds. "
        "The paper's: the authors' own cut of MIND, UniLMv2 (first 8 layers as teacher), 5 seeds: other data "
        "and another encoder, so that only the order of the rows compares."
    )


def _rates(records: Sequence[RunRecord], tuned: Sequence[str]) -> str:
    """What each method has of its own, in words."""
    said = []
    for name in tuned:
        values: dict[str, dict[str, None]] = {}
        for record in records:
            flat = flat_settings(record)
            values.setdefault(f"{flat.get(name)}", {})[NAMES[str(flat["method"])]] = None
        said.append(
            f"{name} " + ", ".join(f"{value} ({'; '.join(who)})" for value, who in sorted(values.items()))
        )
    return "".join(f", {words}" for words in said)


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


def method_tables(
    records: Sequence[RunRecord], against: Against | None, failed: Sequence[Mapping[str, Any]] = ()
) -> list[Table]:
    """What the runs of one task come to beside each other, and beside the paper's; as far as they compare.

    Args:
        failed: what varied, of each run that failed.
    """
    tuned = tuned_settings(records)
    rows = [
        replace(row, settings={n: value for n, value in row.settings.items() if n not in tuned})
        for row in rows_of(records)
    ]
    base = against or usual_base(rows)
    compared = significance_table(rows, base, tuned=tuned) if base else None
    found = [depths_table(records), table2(records, failed), compared]
    return [table for table in found if table is not None]


_DEPTH, _SIZE, _JOINT = "student.layers", "train_rows", "newsbert"


def depths_table(records: Sequence[RunRecord]) -> Table | None:
    """A system a row, a column for each student depth and metric; None for fewer than two methods or depths,
    or where other settings vary too. From one depth to the next the data may differ: the head says so.

    Args:
        records: of one task.
    """
    task = one_task(records)
    groups: dict[int, list[RunRecord]] = {}
    for record in distinct(records):
        groups.setdefault(int(flat_settings(record)[_DEPTH]), []).append(record)
    flats = [flat_settings(record) for record in records]
    methods = {str(flat["method"]) for flat in flats}
    if min(len(groups), len(methods)) < 2:
        return None
    metrics = [column for column in columns_of(task) if column.path.startswith("test.student.")]
    teachers = [column for column in columns_of(task) if column.path.startswith("test.teacher.")]
    sizes = {str(flat[_SIZE]) for flat in flats}
    head, cells, beside = ["system"], dict[str, list[str]](), list[str]()
    for depth, group in sorted(groups.items()):
        tuned = tuned_settings(group)
        if set(varying_settings(group)) - {"method", *tuned}:
            return None
        own = {name for name in tuned if name != "method"}
        rows = [replace(row, settings=_without(row.settings, own)) for row in rows_of(group)]
        alone = str(flat_settings(group[0])["method"])
        by_method = {str(row.settings.get("method", alone)): row for row in rows}
        counted = f" ({_count(group[0])} {task.examples})" if len(sizes) > 1 else ""
        for column, teacher in zip(metrics, teachers, strict=True):
            head.append(f"{depth} layer{'s' if depth > 1 else ''}{counted}: {bare(column)} %")
            marked = _marked(rows, column)
            for name in methods:
                row = by_method.get(name)
                shown = show(row.columns.get(column.name), column) if row else ""
                cells.setdefault(name, []).append(shown + (MARK if name in marked else ""))
            joint = by_method.get(_JOINT)
            beside.append(show(joint.columns.get(teacher.name), teacher) if joint else "")
    order = list(NAMES)
    body = [(NAMES[name], *cells[name]) for name in sorted(cells, key=order.index)]
    if any(beside):
        body.append((f"the teacher beside {NAMES[_JOINT]}", *beside))
    caption = "Systems over student depth, test split, mean ± sd over seeds"
    if _JOINT in methods:
        caption += f"; {MARK} differs from {NAMES[_JOINT]} (p < {LEVEL:g}, Welch's t-test, Holm's correction)"
    return Table(tuple(head), tuple(body), words=1, caption=f"{caption}.")


def _marked(rows: Sequence[Row], column: Column) -> set[str]:
    """Methods whose difference to NewsBERT is significant."""
    base = usual_base(rows)
    if base is None or base.value != _JOINT:
        return set()
    return {str(found.row.settings["method"]) for found in compare_rows(rows, column, base) if found.marked}


def _without(settings: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def _count(record: RunRecord) -> str:
    """Examples that it learned from."""
    return f"{int(record.data.get('train_rows') or 0):,}"
