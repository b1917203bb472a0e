"""The table that a sweep ends with, for a terminal 80 letters wide. Loads rich only to dress it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from newsbert_ray.record import RunRecord
from newsbert_ray.reporting.compared import distinct, one_task
from newsbert_ray.reporting.tables import Column, Mode, Row, rows_as_found, show, shown_columns
from newsbert_ray.tasks import HEADINGS, Task

if TYPE_CHECKING:
    from rich.table import Table

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
