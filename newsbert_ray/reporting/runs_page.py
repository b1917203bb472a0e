"""Records of any runs -> the page about them: a table for each task, figures, what was run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from newsbert_ray.methods import TASKS, Task, TaskName
from newsbert_ray.record import RunRecord
from newsbert_ray.reporting.page import Block, Bullets, Facts, Page, Picture, Section, Table
from newsbert_ray.reporting.paper import depths_table, table1_of_runs, table2
from newsbert_ray.reporting.records import by_task, distinct, provenance, tuned_settings
from newsbert_ray.reporting.statistics import Against, significance_table, usual_base
from newsbert_ray.reporting.tables import number, rows_of, summary_of, table_cells


def runs_page(
    records: Sequence[RunRecord],
    figures: Mapping[str, Picture | str],
    *,
    against: Against | None = None,
    failed: Mapping[TaskName, Sequence[Mapping[str, Any]]] | None = None,
) -> Page:
    """The report of some runs; `figures` are drawn, or the reason why one is left out.

    Args:
        failed: of each task, what varied of each run that failed.
    Raises:
        SettingsError: no run is one that the others are to be compared with.
    """
    runs = len(distinct(records))
    groups = by_task(records)
    notes = [found for found in figures.values() if isinstance(found, str)]
    if repeats := len(records) - runs:
        notes.insert(0, f"{repeats} repeats of a run (same settings and seed) are left out")
    blocks: list[Block] = [
        _table(group, "" if list(groups) == ["topics"] else _caption(name, distinct(group)))
        for name, group in groups.items()
    ]
    blocks += [
        table
        for name, group in groups.items()
        for table in method_tables(group, against, (failed or {}).get(name, ()))
    ]
    blocks += [found for found in figures.values() if isinstance(found, Picture)]
    behind: list[Block] = [Facts(tuple(provenance(records)))]
    if table := table1_of_runs(records):
        behind.append(table)
    if notes:
        behind.append(Bullets(tuple(notes)))
    return Page(
        "Report",
        f"{runs} runs, test split. Mean ± standard deviation over seeds (one seed has none).",
        (Section("Results", tuple(blocks)), Section("What was run", tuple(behind))),
    )


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


def _table(records: Sequence[RunRecord], caption: str) -> Table:
    head, *rows = table_cells(rows_of(records))
    return Table(tuple(head), tuple(map(tuple, rows)), words=head.index("seeds"), caption=caption)


def _caption(name: TaskName, records: Sequence[RunRecord]) -> str:
    """`Recommendation: 3 runs, 982 impressions (3 left out). Standard error over the impressions, ...`."""
    task = TASKS[name]
    sizes = {
        f"{rows:,.0f} {task.rows}" + (f" ({out:,.0f} left out)" if out else "")
        for record in records
        if (rows := number(record, "test.student.rows"))
        for out in [number(record, "test.student.left_out")]
    }
    counted = f", {' or '.join(sorted(sizes))}" if sizes else ""
    runs = f"{len(records)} run{'s' if len(records) > 1 else ''}"
    unlabelled = sum(not record.metrics.get("test") for record in records)
    unknown = f", {unlabelled} on a test split without labels" if unlabelled else ""
    return f"{name.capitalize()}: {runs}{counted}{unknown}.{_noise(task, records)}"


def _noise(task: Task, records: Sequence[RunRecord]) -> str:
    """How far the metrics hang on which rows there are, whatever the seed."""
    errors = {
        metric.heading: summary.error
        for metric in task.metrics
        if (summary := summary_of(records, f"test.student.{metric.name}")) and summary.error is not None
    }
    if not errors:
        return ""
    listed = ", ".join(f"{heading} {100 * error:.1f}" for heading, error in errors.items())
    alone = any(len(row.seeds) == 1 for row in rows_of(records))
    brackets = "; in brackets that of a single seed's number" if alone else ""
    return f" Standard error over the {task.rows}, students' mean: {listed}{brackets}."
