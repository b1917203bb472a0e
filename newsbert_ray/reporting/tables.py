"""Records -> rows: one row for each setting that was tried, mean and standard deviation over its seeds.

Runs of different tasks never share a row or a table. Pure; knows no tensor and no Ray.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal

from newsbert_ray.methods import HEADINGS, TASKS, Task, TaskName
from newsbert_ray.record import RunRecord
from newsbert_ray.reporting.records import distinct, flat_settings, one_task, task_name, varying_settings

if TYPE_CHECKING:
    from rich.table import Table


Mode = Literal["max", "min"]


@dataclass(frozen=True)
class Summary:
    """Mean of `n` values; `sd` is the sample standard deviation (n - 1), None for a single value.

    `error` is the mean of the values' own standard errors, over what was evaluated; None where none has one.
    `by_seed` has each seed's value, where they are known by seed.
    """

    mean: float
    sd: float | None
    n: int
    error: float | None = None
    by_seed: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """Runs that differ only in their seed: the settings that vary in the table, a summary by column, and the
    task of all."""

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


def columns_of(task: Task) -> tuple[Column, ...]:
    """What a table of a task's runs can show: the student's metrics on the test split, the first of them
    leading, its teacher's, speed and time."""
    student = [Column(m.name, f"{m.heading} %", f"test.student.{m.name}", 100.0) for m in task.metrics]
    teacher = [
        Column(f"teacher_{m.name}", f"teacher's {m.heading} %", f"test.teacher.{m.name}", 100.0)
        for m in task.metrics
    ]
    examples = task.examples
    speed = Column(f"{examples}_per_second", f"{examples}/s in training", "titles_per_second", digits=0)
    return (*student, *teacher, speed, Column("seconds", "seconds a run", "seconds", digits=0))


def number(record: RunRecord, path: str) -> float | None:
    """The number at a dotted path of the metrics (`test.student.accuracy`) or of the record, or None."""
    if path == "seconds":
        return record.seconds.get("total", sum(record.seconds.values()))
    if path == "titles_per_second":
        return record.titles_per_second
    value: Any = record.metrics
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) else None


def summarise(values: Sequence[float]) -> Summary:
    """Mean and sample standard deviation of one or more values."""
    return Summary(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def rows_of(records: Sequence[RunRecord]) -> list[Row]:
    """One row for each combination of the varying settings, sorted by them; repeats of a run count once.

    A column that no run of a row knows is absent from that row.

    Raises:
        ValueError: runs of several tasks.
    """
    rows = rows_as_found(records, columns_of(one_task(records)))
    return sorted(rows, key=lambda row: [_order(value) for value in row.settings.values()])


def rows_as_found(records: Sequence[RunRecord], columns: Sequence[Column]) -> list[Row]:
    """As `rows_of`, with these columns, in the order of the records."""
    records = distinct(records)
    varying = varying_settings(records)
    groups: dict[tuple[str, ...], list[RunRecord]] = {}
    for record in records:
        flat = flat_settings(record)
        groups.setdefault(tuple(repr(flat.get(name)) for name in varying), []).append(record)
    return [_row(group, varying, columns) for group in groups.values()]


def _row(group: Sequence[RunRecord], varying: Sequence[str], columns: Sequence[Column]) -> Row:
    flat = flat_settings(group[0])
    known = {column.name: summary_of(group, column.path) for column in columns}
    summaries = {name: summary for name, summary in known.items() if summary}
    seeds = tuple(sorted(record.seed for record in group))
    return Row({name: flat.get(name) for name in varying}, seeds, summaries, task_name(group[0]))


def _order(value: Any) -> tuple[int, float, str]:
    """A key under which None, numbers and words can stand in one column."""
    if value is None:
        return 0, 0.0, ""
    if isinstance(value, int | float):
        return 1, float(value), ""
    return 2, 0.0, str(value)


def summary_of(records: Sequence[RunRecord], path: str) -> Summary | None:
    """Mean and spread of the number at `path` over the records that know it; None where none does."""
    by_seed = {record.seed: value for record in records if (value := number(record, path)) is not None}
    found = [value for record in records if (value := number(record, path)) is not None]
    errors = [value for record in records if (value := number(record, f"{path}_error")) is not None]
    error = fmean(errors) if errors else None
    return replace(summarise(found), error=error, by_seed=by_seed) if found else None


def shown_columns(rows: Sequence[Row], columns: Sequence[Column]) -> list[Column]:
    """The columns of which at least one row knows the number."""
    return [column for column in columns if any(column.name in row.columns for row in rows)]


def show(summary: Summary | None, column: Column) -> str:
    """`mean ± sd` in the column's unit; only the mean where there is one value, blank where there is none."""
    if summary is None:
        return ""
    mean = f"{summary.mean * column.factor:.{column.digits}f}"
    return mean if summary.sd is None else f"{mean} ± {summary.sd * column.factor:.{column.digits}f}"


def say(summary: Summary | None, column: Column) -> str:
    """As `show`, with its unit where a share is meant: `81.73 ± 0.12 %`."""
    return f"{show(summary, column)} %" if summary and column.factor == 100.0 else show(summary, column)


def bare(column: Column) -> str:
    """A column's heading without its unit."""
    return column.heading.removesuffix(" (%)").removesuffix(" %")


def full(column: Column) -> str:
    """A column's heading with the split that it is about, and its unit."""
    split = "test " if column.path.startswith("test.") else ""
    return f"{split}{bare(column)}{' (%)' if column.factor == 100.0 else ''}"


def table_cells(rows: Sequence[Row]) -> list[list[str]]:
    """The rows, all of one task, as a table's cells, its head first. The number of a single seed has its
    standard error in brackets, where the record knows one."""
    columns = shown_columns(rows, columns_of(TASKS[rows[0].task]))
    head = [*rows[0].settings, "seeds", *(column.heading for column in columns)]
    body = [
        [
            *(str(value) for value in row.settings.values()),
            str(len(row.seeds)),
            *(_cell(row.columns.get(column.name), column) for column in columns),
        ]
        for row in rows
    ]
    return [head, *body]


def _cell(summary: Summary | None, column: Column) -> str:
    shown = show(summary, column)
    if summary is None or summary.sd is not None or summary.error is None:
        return shown
    return f"{shown} (± {summary.error * column.factor:.{column.digits}f})"


def to_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV: full precision, shares from 0 to 1, mean and standard deviation in own columns, then
    the mean of the runs' standard errors where they know one.

    Rows of several tasks have a first column that says which, and leave the others' columns blank.
    """
    tasks = list(dict.fromkeys(row.task for row in rows))
    settings = list(dict.fromkeys(name for row in rows for name in row.settings))
    lines = [
        {
            **({"task": row.task} if len(tasks) > 1 else {}),
            **row.settings,
            "n_seeds": len(row.seeds),
            **{head: value for name, summary in row.columns.items() for head, value in _heads(name, summary)},
        }
        for row in rows
    ]
    named = [
        (column.name, found)
        for task in tasks
        for column in columns_of(TASKS[task])
        if (found := [row.columns[column.name] for row in rows if column.name in row.columns])
    ]
    heads = [
        head
        for name, found in named
        for head in (
            name,
            f"{name}_sd",
            *([f"{name}_error"] if any(s.error is not None for s in found) else []),
        )
    ]
    file = io.StringIO()
    first = ["task"] if len(tasks) > 1 else []
    names = list(dict.fromkeys([*first, *settings, "n_seeds", *heads]))
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def _heads(name: str, summary: Summary) -> list[tuple[str, float | None]]:
    """A summary's cells by their heads."""
    error = [] if summary.error is None else [(f"{name}_error", summary.error)]
    return [(name, summary.mean), (f"{name}_sd", summary.sd), *error]


_TERMINAL_WIDTH = 80


def sweep_table(
    records: Sequence[RunRecord],
    metric: str | None = None,
    *,
    mode: Mode = "max",
    seeds: int | None = None,
) -> Table:
    """The rows of a sweep for a terminal 80 letters wide, the best first, of equals the first tried.

    Rows that miss a seed come after those that have all. Of the other numbers as many are shown as fit.

    Args:
        metric: what the sweep is judged by, a dotted path into the metrics; by default the student's first
            metric on the test split.
        mode: whether the largest or the smallest is the best.
        seeds: how many each point was to have; by default as many as there are in all the records.
    """
    task = one_task(records)
    metric = metric or f"test.student.{task.primary.name}"
    share = metric.rpartition(".")[2] in HEADINGS
    heading = metric.replace(".", "\n") + (" %" if share else "")
    judge = Column("metric", heading, metric, *((100.0, 1) if share else (1.0, 4)))
    columns = [judge, *(column for column in _further(task) if column.path != metric)]
    rows = rows_as_found(records, columns)
    wanted = seeds or len({record.seed for record in records})
    rows.sort(key=lambda row: _rank(row, judge, mode, wanted))
    columns = shown_columns(rows, columns)
    title = f"{len(distinct(records))} runs, best {metric} first"
    tables = (_dressed(rows, columns[:count], title) for count in range(len(columns), 0, -1))
    return next(
        (table for table in tables if _width(table) <= _TERMINAL_WIDTH), _dressed(rows, [judge], title)
    )


def _dressed(rows: Sequence[Row], columns: Sequence[Column], title: str) -> Table:
    """A table for a terminal; where it is too narrow the settings' cells break, the numbers never."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title)
    for name in rows[0].settings if rows else ():
        table.add_column(name.replace(".", "\n"), justify="right", overflow="fold")
    table.add_column("seeds", justify="right", no_wrap=True)
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for position, row in enumerate(rows):
        cells = [_brief(value) for value in row.settings.values()]
        numbers = [show(row.columns.get(column.name), column) for column in columns]
        table.add_row(*cells, str(len(row.seeds)), *numbers, style="bold" if position == 0 else None)
    return table


def _width(table: Table) -> int:
    """Letters that `table` takes where nothing breaks."""
    from rich.console import Console

    return Console(width=1000).measure(table).maximum


def _brief(value: Any) -> str:
    return str(float(f"{value:.4g}")) if isinstance(value, float) else str(value)


def _further(task: Task) -> tuple[Column, ...]:
    """What stands beside the metric that a sweep is judged by, as far as there is room."""
    first, examples = task.primary, task.examples
    return (
        Column(first.name, f"test\n{first.heading} %", f"test.student.{first.name}", 100.0),
        Column(f"teacher_{first.name}", f"teacher's\n{first.heading} %", f"test.teacher.{first.name}", 100.0),
        Column(f"{examples}_per_second", f"{examples}/s", "titles_per_second", digits=0),
    )


def _rank(row: Row, column: Column, mode: Mode, seeds: int) -> tuple[bool, float]:
    """The key to sort by: rows with all seeds first, of these the best; a row without a value comes last."""
    summary = row.columns.get(column.name)
    if summary is None:
        return True, math.inf
    return summary.n < seeds, -summary.mean if mode == "max" else summary.mean
