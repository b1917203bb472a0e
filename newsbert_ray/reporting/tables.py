"""Records as table rows: one for each combination of settings, mean and standard deviation over seeds. Runs
of different tasks never share a row or a table. Needs neither torch nor Ray."""

from __future__ import annotations

import csv
import io
import math
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any, Literal

import numpy as np
import rich.box
import rich.table
import rich.text

from newsbert_ray.evaluation.metrics import topic_rows
from newsbert_ray.methods import TASKS, Task, TaskName
from newsbert_ray.record import RunRecord
from newsbert_ray.reporting import records as run_records
from newsbert_ray.reporting.page import Table
from newsbert_ray.reporting.records import distinct, flat_settings, grouped, one_task, varying_settings

Mode = Literal["max", "min"]
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet runs a cell that begins with one of these."""


@dataclass(frozen=True)
class Summary:
    """Mean and spread of `n` values."""

    mean: float
    sd: float | None
    """Sample standard deviation (n - 1); None for a single value."""
    n: int
    error: float | None = None
    """Mean of the values' own standard errors over the evaluated rows, where known."""
    by_seed: Mapping[int, float] = field(default_factory=dict)
    """Each seed's value, where known."""


@dataclass(frozen=True)
class Row:
    """Runs that differ only in their seed: the settings that vary in the table, and a summary by column."""

    settings: dict[str, Any]
    seeds: tuple[int, ...]
    columns: dict[str, Summary]
    task: TaskName = "topics"


@dataclass(frozen=True)
class Column:
    """A number of a record: its name in files, heading with unit, path, factor and digits shown."""

    name: str
    heading: str
    path: str
    factor: float = 1.0
    digits: int = 1

    @property
    def label(self) -> str:
        """The heading without its unit."""
        return self.heading.removesuffix(" (%)").removesuffix(" %")

    @property
    def full_label(self) -> str:
        """The heading with the split it is about, and its unit."""
        split = "test " if self.path.startswith("test.") else ""
        return f"{split}{self.label}{' (%)' if self.factor == 100.0 else ''}"

    def show(self, summary: Summary | None, *, unit: bool = False) -> str:
        """`81.73 ± 0.12`: the mean alone for one value, blank for none; with `unit`, `%` after a share."""
        if summary is None:
            return ""
        text = f"{summary.mean * self.factor:.{self.digits}f}"
        if summary.sd is not None:
            text += f" ± {summary.sd * self.factor:.{self.digits}f}"
        return f"{text} %" if unit and self.factor == 100.0 else text


def columns_of(task: Task) -> tuple[Column, ...]:
    """Columns of a task's tables: student's and teacher's metrics on the test split, throughput and time."""
    metrics = [
        Column(f"{prefix}{m.name}", f"{whose}{m.heading} %", f"test.{model}.{m.name}", 100.0)
        for model, prefix, whose in (("student", "", ""), ("teacher", "teacher_", "teacher's "))
        for m in task.metrics
    ]
    examples = task.examples
    speed = Column(f"{examples}_per_second", f"{examples}/s in training", "titles_per_second", digits=0)
    return (*metrics, speed, Column("seconds", "seconds per run", "seconds", digits=0))


PARAMETERS = Column("parameters", "million parameters", "parameters.student", 1e-6)
SPEED = Column("times_teacher", "times its teacher's titles/s", "speed.times_teacher")


def student_columns(task: Task) -> list[Column]:
    """The student's metrics on the test split."""
    return [column for column in columns_of(task) if column.path.startswith("test.student.")]


def number(record: RunRecord, path: str) -> float | None:
    """The number at a dotted path of the metrics (`test.student.accuracy`) or of the record, or None."""
    if path == "seconds":
        return record.seconds.get("total", sum(record.seconds.values()))
    if path == "titles_per_second":
        return record.titles_per_second
    return number_at(record.metrics, path)


def number_at(entry: Mapping[str, Any], path: str) -> float | None:
    """The finite number at a dotted path of nested values; None where there is none."""
    value: Any = entry
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def summarise(values: Sequence[float]) -> Summary:
    """Mean and sample standard deviation of one or more values."""
    return Summary(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def summary_of(records: Sequence[RunRecord], path: str) -> Summary | None:
    """Mean and spread of the number at `path` over the records that have it; None where none has."""
    pairs = [(record.seed, value) for record in records if (value := number(record, path)) is not None]
    if not pairs:
        return None
    errors = [error for record in records if (error := number(record, f"{path}_error")) is not None]
    summary = summarise([value for _, value in pairs])
    return replace(summary, error=fmean(errors) if errors else None, by_seed=dict(pairs))


def teacher_summary(records: Sequence[RunRecord], path: str) -> Summary | None:
    """The teacher's number beside the student's at `path`; None where there is none."""
    return summary_of(records, path.replace("student", "teacher")) if "student" in path else None


def pair_table(records: Sequence[RunRecord], columns: Iterable[Column], caption: str) -> Table:
    """The student's numbers beside its teacher's, a row for each of `columns` that the records have."""
    rows = [
        (column.full_label, column.show(student), column.show(teacher_summary(records, column.path)))
        for column in columns
        if (student := summary_of(records, column.path))
    ]
    return Table(("", "student", "teacher"), tuple(rows), caption=caption)


def rows_of(records: Sequence[RunRecord], columns: Sequence[Column] | None = None) -> list[Row]:
    """One row for each combination of the varying settings; repeats of a run count once. A column (by default
    `columns_of` the task) that no run of a row has is absent from it. ValueError for several tasks."""
    columns = columns_of(one_task(records)) if columns is None else columns
    records = distinct(records)
    varying = varying_settings(records)
    rows = []
    for group in grouped(records, lambda r: tuple(repr(flat_settings(r).get(n)) for n in varying)).values():
        flat = flat_settings(group[0])
        summaries = {c.name: summary for c in columns if (summary := summary_of(group, c.path))}
        seeds = tuple(sorted(record.seed for record in group))
        settings = {name: flat.get(name) for name in varying}
        rows.append(Row(settings, seeds, summaries, run_records.task_name(group[0])))
    return sorted(rows, key=lambda row: list(map(sort_key, row.settings.values())))


def short(value: Any, digits: int = 6) -> str:
    """A setting's value for people: at most `digits` digits of a number; null and bools as in YAML."""
    if isinstance(value, bool) or value is None:
        return {None: "none", True: "true", False: "false"}[value]
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def sort_key(value: Any) -> tuple[int, float, str]:
    """A key that sorts None before numbers before words."""
    if value is None:
        return 0, 0.0, ""
    return (1, float(value), "") if isinstance(value, int | float) else (2, 0.0, str(value))


def results_table(rows: Sequence[Row], caption: str = "") -> Table:
    """The rows, all of one task. A single seed's number has its standard error in brackets, where known."""
    columns = [c for c in columns_of(TASKS[rows[0].task]) if any(c.name in row.columns for row in rows)]

    def cell(summary: Summary | None, column: Column) -> str:
        if summary is None or summary.sd is not None or summary.error is None:
            return column.show(summary)
        return f"{column.show(summary)} (± {summary.error * column.factor:.{column.digits}f})"

    body = []
    for row in rows:
        cells = (cell(row.columns.get(column.name), column) for column in columns)
        body.append((*map(str, row.settings.values()), str(len(row.seeds)), *cells))
    settings = rows[0].settings
    head = (*settings, "seeds", *(column.heading for column in columns))
    return Table(head, tuple(body), words=len(settings), caption=caption)


def topic_tables(points: Mapping[str, Any]) -> list[Table]:
    """Results by topic, confusion matrix and worst mistakes from a run's map.json, where it has them."""
    if "confusion" not in points:
        return []

    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:.1f}"

    labels, confusion = points["labels"], np.array(points["confusion"], np.int64)
    rows = topic_rows(confusion, labels)
    order = [labels.index(row.topic) for row in rows]
    results = tuple(
        (row.topic, row.taken_for or "", str(row.titles), *map(percent, (row.precision, row.recall, row.f1)))
        for row in rows
    )
    matrix = tuple((labels[i], *(str(n or "") for n in confusion[i, order].tolist())) for i in order)
    head = ("topic", "most often taken for", "titles", "precision %", "recall %", "F1 %")
    of = f"{confusion.sum():,} titles of {points['split']}"
    caption = f"Confusion matrix, {of}: rows are true topics, columns predicted ones."
    tables = [
        Table(head, results, words=2, caption=f"The student's results by topic, {of}."),
        Table(("topic", *(row.topic for row in rows)), matrix, caption=caption),
    ]
    mistakes = tuple(
        (one["title"], labels[one["topic"]], labels[one["predicted"]], f"{100 * one['probability']:.1f}")
        for one in points["mistakes"]
    )
    caption = f"The student's most confident mistakes on {points['split']}."
    mistakes_head = ("title", "topic", "predicted", "probability %")
    return [*tables, Table(mistakes_head, mistakes, words=3, caption=caption)] if mistakes else tables


def to_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV: full precision, shares from 0 to 1, standard deviation and error in own columns. Rows
    of several tasks have a first column `task`, and leave the other tasks' columns blank."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    settings = [name for row in rows for name in row.settings]
    head = dict.fromkeys([*(["task"] if tasks[1:] else []), *settings, "n_seeds"])
    lines: list[dict[str, Any]] = []
    for row in rows:
        lines.append({"task": row.task, **row.settings, "n_seeds": len(row.seeds)})
        for name, summary in row.columns.items():
            lines[-1] |= {name: summary.mean, f"{name}_sd": summary.sd}
            lines[-1] |= {} if summary.error is None else {f"{name}_error": summary.error}
    for column in (column for task in tasks for column in columns_of(TASKS[task])):
        names = (column.name, f"{column.name}_sd", f"{column.name}_error")
        head |= dict.fromkeys(name for name in names if any(name in line for line in lines))
    return csv_text(list(head), ([line.get(name) for name in head] for line in lines))


def csv_text(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """CSV in which no text cell is a formula for a spreadsheet: such a cell gets a leading apostrophe."""

    def plain(cell: Any) -> Any:
        return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA_STARTS) else cell

    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(map(plain, line) for line in (head, *lines))
    return file.getvalue()


def terminal_table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Collection[str] = (),
    spare: Iterable[str] = (),
    styles: Mapping[int, str] | None = None,
    fixed: Collection[str] = (),
    title: str | None = None,
) -> rich.table.Table:
    """A table for the terminal; a cell is shown as it is. Columns of `right` are aligned right; those of
    `spare` are left out, in order, until it fits; where it never does, cells of `fixed` do not wrap."""
    columns = {cells[0]: cells for cells in zip(head, *rows, strict=True)}
    for name in spare:
        widths = (max(len(line) for cell in cells for line in cell.split("\n")) for cells in columns.values())
        if 2 + sum(2 + width for width in widths) <= shutil.get_terminal_size().columns:
            break
        del columns[name]
    shown = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title)
    for name in columns:
        justify: Literal["left", "right"] = "right" if name in right else "left"
        shown.add_column(rich.text.Text(name), justify=justify, overflow="fold", no_wrap=name in fixed)
    for index, row in enumerate(list(zip(*columns.values(), strict=True))[1:]):
        shown.add_row(*map(rich.text.Text, row), style=(styles or {}).get(index))
    return shown
