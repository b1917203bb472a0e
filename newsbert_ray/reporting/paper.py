"""Tables 1 (corpora) and 2 (systems) of NewsBERT (Wu et al. 2021), and systems over depth, with ours."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from newsbert_ray.data.shards import SPLITS, Manifest
from newsbert_ray.methods import TaskName
from newsbert_ray.record import RunRecord
from newsbert_ray.reporting import records as run_records
from newsbert_ray.reporting import statistics
from newsbert_ray.reporting.page import Page, Section, Table
from newsbert_ray.reporting.records import NAMES, distinct, flat_settings, grouped, one_task, varying_settings
from newsbert_ray.reporting.statistics import LEVEL, MARK, Against
from newsbert_ray.reporting.tables import PARAMETERS, SPEED, columns_of, csv_text, rows_of, student_columns

PAPER_LAYERS = 12
"""Layers of the encoder that the paper's speed-ups refer to."""

_TABLE2_COLUMNS: Mapping[TaskName, slice] = {"topics": slice(0, 2), "recommendation": slice(2, 6)}
_OTHER_LAYERS = frozenset({"bilstm_soft", "glove"})
_DEPTH, _JOINT = "student.layers", "newsbert"


@cache
def _published() -> dict[str, Any]:
    """The paper's numbers. Table 1: the parts about MIND and NewsRetrieval, null where it has no number.
    Table 2, per cent: accuracy, macro-F1, AUC, MRR, nDCG@5, nDCG@10; only UniLM's rows and GloVe's."""
    numbers: dict[str, Any] = json.loads(Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))
    return numbers


def method_tables(
    records: Sequence[RunRecord], against: Against | None, failed: Sequence[Mapping[str, Any]] = ()
) -> list[Table]:
    """The tables that compare the runs of one task with each other and with the paper, as far as they can be
    compared; `failed`: the varied settings of each run that failed."""
    tuned = run_records.tuned_settings(records)
    rows = [
        replace(row, settings={n: value for n, value in row.settings.items() if n not in tuned})
        for row in rows_of(records)
    ]
    base = against or statistics.default_base(rows)
    compared = statistics.significance_table(rows, base, tuned=tuned) if base else None
    tables = [depths_table(records), table2(records, failed), compared]
    return [table for table in tables if table is not None]


def table2(records: Sequence[RunRecord], failed: Sequence[Mapping[str, Any]] = ()) -> Table | None:
    """Our rows of the paper's systems, each with the paper's own numbers; `failed`: `method` and
    `student.layers` of each run that failed, as far as they varied. None where settings other than method,
    depth and learning rates vary, or only one method was run."""
    task, paper_columns = one_task(records), _TABLE2_COLUMNS.get(run_records.task_name(records[0]))
    varying = set(varying_settings(records)) | {name for settings in failed for name in settings}
    tuned = run_records.tuned_settings(records)
    if "method" not in varying or not varying <= {"method", _DEPTH, *tuned} or paper_columns is None:
        return None
    metrics = student_columns(task)
    first = flat_settings(records[0])

    def key(settings: Mapping[str, Any]) -> tuple[str, int]:
        return str(settings.get("method", first["method"])), int(settings.get(_DEPTH, first[_DEPTH]))

    rows = {key(row.settings): row for row in rows_of(records, (*metrics, PARAMETERS, SPEED))}
    lost = Counter(map(key, failed))
    order = list(NAMES)
    body = []
    for method, depth in sorted(rows.keys() | lost.keys(), key=lambda key: (order.index(key[0]), -key[1])):
        row = rows.get((method, depth))
        numbers = row.columns if row else {}
        failures = f" ({lost[method, depth]} failed)" if lost[method, depth] else ""
        seeds = f"{len(row.seeds) if row else 0}{failures}"
        parameters = PARAMETERS.show(numbers.get(PARAMETERS.name)).removesuffix(" ± 0.0")
        by_layers = "" if method in _OTHER_LAYERS or not depth else f"{PAPER_LAYERS / depth:.1f}"
        means = (column.show(numbers.get(column.name)) if row else "failed" for column in metrics)
        published = _published()["table2"].get(f"{method} {depth}", [])[paper_columns]
        theirs = [f"{value:.2f}" for value in published] or [""] * len(metrics)
        sizes = (str(depth), seeds, parameters, by_layers, SPEED.show(numbers.get(SPEED.name)))
        body.append((NAMES[method], *sizes, *means, *theirs))
    ours = ("system", "layers", "seeds", PARAMETERS.heading, f"speed-up by layers, from {PAPER_LAYERS}")
    paper = (f"the paper's {column.label} %" for column in metrics)
    head = (*ours, SPEED.heading, *(column.heading for column in metrics), *paper)
    return Table(head, tuple(body), caption=_table2_caption(records, tuned))


def _table2_caption(records: Sequence[RunRecord], tuned: Sequence[str]) -> str:
    data = " or ".join(dict.fromkeys(map(run_records.data_name, records)))
    teachers = " or ".join(dict.fromkeys(map(run_records.teacher_name, records)))
    sizes = sorted({int(record.data.get("train_rows") or 0) for record in records} - {0})
    counts = " or ".join(f"{size:,}" for size in sizes)
    trained = f", trained on {counts} {one_task(records).examples}" if sizes else ""
    rates = ""
    for name in tuned:
        methods: dict[str, dict[str, None]] = {}
        for flat in map(flat_settings, records):
            methods.setdefault(f"{flat.get(name)}", {})[NAMES[str(flat["method"])]] = None
        values = ", ".join(f"{value} ({'; '.join(who)})" for value, who in sorted(methods.items()))
        rates += f", {name} {values}"
    return (
        f"Table 2. Ours: {data}{trained}, encoder {teachers}{rates}; mean ± sd over seeds. "
        "The paper's: the authors' own cut of MIND, UniLMv2 (first 8 layers as teacher), 5 seeds: other data "
        "and another encoder, so only the order of the rows can be compared."
    )


def depths_table(records: Sequence[RunRecord]) -> Table | None:
    """One row for each system, one column for each student depth and metric, where these alone vary."""
    task = one_task(records)
    groups = dict(sorted(grouped(distinct(records), lambda r: int(flat_settings(r)[_DEPTH])).items()))
    methods = {str(flat_settings(record)["method"]) for record in records}
    if min(len(groups), len(methods)) < 2:
        return None
    several_sizes = len({str(flat_settings(record)["train_rows"]) for record in records}) > 1
    metrics = student_columns(task)
    teachers = [column for column in columns_of(task) if column.path.startswith("test.teacher.")]
    head, of_teacher = ["system"], list[str]()
    cells: dict[str, list[str]] = {name: [] for name in methods}
    for depth, group in groups.items():
        tuned = run_records.tuned_settings(group)
        if set(varying_settings(group)) - {"method", *tuned}:
            return None
        only = str(flat_settings(group[0])["method"])
        rows = [replace(row, settings={"method": row.settings.get("method", only)}) for row in rows_of(group)]
        by_method = {str(row.settings["method"]): row for row in rows}
        base = statistics.default_base(rows)
        size = f" ({int(group[0].data.get('train_rows') or 0):,} {task.examples})" if several_sizes else ""
        for column, teacher in zip(metrics, teachers, strict=True):
            head.append(f"{depth} layer{'s' if depth > 1 else ''}{size}: {column.label} %")
            compared = statistics.compare_rows(rows, column, base) if base and base.value == _JOINT else []
            marked = {str(c.row.settings["method"]) for c in compared if c.significant}
            for name in methods:
                row = by_method.get(name)
                shown = column.show(row.columns.get(column.name)) if row else ""
                cells[name].append(shown + (MARK if name in marked else ""))
            joint = by_method.get(_JOINT)
            of_teacher.append(teacher.show(joint.columns.get(teacher.name)) if joint else "")
    body = [(NAMES[name], *cells[name]) for name in sorted(cells, key=list(NAMES).index)]
    if any(of_teacher):
        body.append((f"teacher of {NAMES[_JOINT]}", *of_teacher))
    caption = "Systems over student depth, test split, mean ± sd over seeds"
    if _JOINT in methods:
        caption += f"; {MARK} differs from {NAMES[_JOINT]} (p < {LEVEL:g}, Welch's t-test, Holm's correction)"
    return Table(tuple(head), tuple(body), caption=f"{caption}.")


def table1(corpora: Mapping[str, Mapping[str, float]]) -> Table | None:
    """Counts and means of corpora, each a column under its name, and the paper's; None if none is known."""

    def show(value: float | None) -> str:
        return "" if value is None else f"{value:,.{0 if float(value).is_integer() else 2}f}"

    known = {name: numbers for name, numbers in corpora.items() if numbers}
    rows = [
        (kind.replace("_", " "), *(show(numbers.get(kind)) for numbers in known.values()), show(theirs))
        for kind, theirs in _published()["table1"].items()
        if any(numbers.get(kind) for numbers in known.values())  # labelled texts have no users
    ]
    caption = "Table 1. Contents of the shards; the paper used other corpora."
    return Table(("", *known, "the paper's"), tuple(rows), caption=caption) if rows else None


def table1_of_runs(records: Sequence[RunRecord]) -> Table | None:
    """Table 1 of the corpora behind some runs, as far as their records tell."""
    return table1({run_records.data_name(record): record.data.get("statistics") or {} for record in records})


def corpora_page(manifests: Mapping[str, Manifest]) -> Page:
    """The report of prepared shards, by the names of their folders."""
    table = table1({name: manifest.statistics for name, manifest in manifests.items()})
    facts = [f"{name}: {_describe(manifest)}" for name, manifest in manifests.items()]
    section = Section("What is in the shards", (table, facts) if table else (facts,))
    return Page("Corpora" if len(manifests) > 1 else "Corpus", ", ".join(manifests), (section,))


def corpora_csv(manifests: Mapping[str, Manifest]) -> str:
    """Every number of every corpus in full precision, one row each."""
    numbers = ((name, *pair) for name, manifest in manifests.items() for pair in manifest.statistics.items())
    return csv_text(("corpus", "statistic", "value"), numbers)


def _describe(manifest: Manifest) -> str:
    """`news: 40,120 train, ...; tokens of NAME`."""
    parts = []
    rows = {"news": manifest.splits, "impressions": manifest.behaviors, "pairs": manifest.pairs}
    for kind, shards in rows.items():
        counts = [f"{sum(s.rows for s in shards.get(split, [])):,} {split}" for split in SPLITS]
        parts += [f"{kind}: {', '.join(counts)}"] if shards else []
    parts.append(f"tokens of {manifest.tokenizer.name} ({manifest.tokenizer.vocabulary:,})")
    sources = ", ".join(f"{source.folder}/{source.file}" for source in manifest.sources)
    return "; ".join([*parts, f"from {sources}"])
