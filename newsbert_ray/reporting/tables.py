"""Records -> rows: one row for each setting that was tried, mean and standard deviation over its seeds.

Pure, but for `sweep_table`, which dresses the rows for a terminal. Knows no tensor and no Ray.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal

from newsbert_ray.record import RunRecord

if TYPE_CHECKING:
    from rich.table import Table

Mode = Literal["max", "min"]

_NOT_COMPARED = frozenset({"seed", "out", "threads", "log_every", "checkpoint", "device"})
"""The seed is averaged over; the others alter no number: those that a run may go on with changed."""


@dataclass(frozen=True)
class Summary:
    """Mean of `n` values; `sd` is the sample standard deviation (n - 1), None for a single value."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class Row:
    """Runs that differ only in their seed: the settings that vary in the table, a summary by column."""

    settings: dict[str, Any]
    seeds: tuple[int, ...]
    columns: dict[str, Summary]


@dataclass(frozen=True)
class Column:
    """A number of a record: its name in files, heading with unit, path, factor and digits shown."""

    name: str
    heading: str
    path: str
    factor: float = 1.0
    digits: int = 1


COLUMNS = (
    Column("accuracy", "accuracy %", "test.student.accuracy", 100.0),
    Column("macro_f1", "macro-F1 %", "test.student.macro_f1", 100.0),
    Column("teacher_accuracy", "teacher's accuracy %", "test.teacher.accuracy", 100.0),
    Column("teacher_macro_f1", "teacher's macro-F1 %", "test.teacher.macro_f1", 100.0),
    Column("titles_per_second", "titles/s in training", "titles_per_second", digits=0),
    Column("seconds", "seconds a run", "seconds", digits=0),
)


def flat_settings(record: RunRecord) -> dict[str, Any]:
    """The settings that may make two runs different, by dotted name.

    Shards count by what is in them and a teacher by its name, not by where they lie.
    """
    flat = flat_values({n: value for n, value in record.settings.items() if n not in _NOT_COMPARED})
    if "teacher" in flat:
        flat["teacher"] = teacher_name(record)
    if record.data.get("fingerprint"):
        flat["data"] = data_name(record)
    return flat


def flat_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted name."""
    return dict(_flatten(settings))


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def data_name(record: RunRecord) -> str:
    """Name and the fingerprint's first digits of the shards behind a run, as far as the record knows them."""
    name = str(record.data.get("name") or PurePath(str(record.settings.get("data", "unknown"))).name)
    fingerprint = str(record.data.get("fingerprint", ""))[:8]
    return f"{name} ({fingerprint})" if fingerprint else name


def teacher_name(record: RunRecord) -> str:
    """The last part of the teacher's name: the same for a folder however it was reached, and for a model of
    the hub without its owner."""
    name = str(record.settings.get("teacher", "unknown"))
    return PurePath(name).name or name


def varying_settings(records: Sequence[RunRecord]) -> list[str]:
    """Dotted names of the settings in which the records differ, in the order of the settings."""
    flats = [flat_settings(record) for record in records]
    names = dict.fromkeys(name for flat in flats for name in flat)
    return [name for name in names if len({repr(flat.get(name)) for flat in flats}) > 1]


def distinct(records: Sequence[RunRecord]) -> list[RunRecord]:
    """The records without repeats of a run (same settings and seed), which would make a spread of nothing."""
    kept: dict[str, RunRecord] = {}
    for record in records:
        kept.setdefault(repr((sorted(flat_settings(record).items()), record.seed)), record)
    return list(kept.values())


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


def rows_of(records: Sequence[RunRecord], columns: Sequence[Column] = COLUMNS) -> list[Row]:
    """One row for each combination of the varying settings, sorted by them; repeats of a run count once.

    A column that no run of a row knows is absent from that row.
    """
    rows = _rows_as_found(records, columns)
    return sorted(rows, key=lambda row: [_order(value) for value in row.settings.values()])


def _rows_as_found(records: Sequence[RunRecord], columns: Sequence[Column]) -> list[Row]:
    records = distinct(records)
    varying = varying_settings(records)
    groups: dict[tuple[str, ...], list[RunRecord]] = {}
    for record in records:
        flat = flat_settings(record)
        groups.setdefault(tuple(repr(flat.get(name)) for name in varying), []).append(record)
    return [_row(group, varying, columns) for group in groups.values()]


def _row(group: Sequence[RunRecord], varying: Sequence[str], columns: Sequence[Column]) -> Row:
    flat = flat_settings(group[0])
    known = {column: [number(record, column.path) for record in group] for column in columns}
    summaries = {
        column.name: summarise(found)
        for column, values in known.items()
        if (found := [value for value in values if value is not None])
    }
    seeds = tuple(sorted(record.seed for record in group))
    return Row({name: flat.get(name) for name in varying}, seeds, summaries)


def _order(value: Any) -> tuple[int, float, str]:
    """A key under which None, numbers and words can stand in one column."""
    if value is None:
        return 0, 0.0, ""
    if isinstance(value, int | float):
        return 1, float(value), ""
    return 2, 0.0, str(value)


def shown_columns(rows: Sequence[Row], columns: Sequence[Column] = COLUMNS) -> list[Column]:
    """The columns of which at least one row knows the number."""
    return [column for column in columns if any(column.name in row.columns for row in rows)]


def show(summary: Summary | None, column: Column) -> str:
    """`mean ± sd` in the column's unit; only the mean where there is one value, blank where there is none."""
    if summary is None:
        return ""
    mean = f"{summary.mean * column.factor:.{column.digits}f}"
    return mean if summary.sd is None else f"{mean} ± {summary.sd * column.factor:.{column.digits}f}"


def table_cells(rows: Sequence[Row]) -> list[list[str]]:
    """The rows as a table's cells, its head first."""
    columns = shown_columns(rows)
    head = [*rows[0].settings, "seeds", *(column.heading for column in columns)]
    body = [
        [
            *(str(value) for value in row.settings.values()),
            str(len(row.seeds)),
            *(show(row.columns.get(column.name), column) for column in columns),
        ]
        for row in rows
    ]
    return [head, *body]


def to_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV: full precision, shares from 0 to 1, mean and standard deviation in own columns."""
    columns = shown_columns(rows)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    heads = [head for column in columns for head in (column.name, f"{column.name}_sd")]
    writer.writerow([*rows[0].settings, "n_seeds", *heads])
    for row in rows:
        found = [row.columns.get(column.name) for column in columns]
        pairs = [(summary.mean, summary.sd) if summary else (None, None) for summary in found]
        writer.writerow(
            [*row.settings.values(), len(row.seeds), *(value for pair in pairs for value in pair)]
        )
    return file.getvalue()


def sweep_table(
    records: Sequence[RunRecord],
    metric: str = "test.student.accuracy",
    *,
    mode: Mode = "max",
    seeds: int | None = None,
) -> Table:
    """The rows of a sweep for a terminal 80 letters wide, the best first, of equals the first tried.

    Rows that miss a seed come after those that have all. Of the other numbers as many are shown as fit.

    Args:
        metric: what the sweep is judged by, a dotted path into the metrics.
        mode: whether the largest or the smallest is the best.
        seeds: how many each point was to have; by default as many as there are in all the records.
    """
    share = metric.endswith(("accuracy", "macro_f1"))
    heading = metric.replace(".", "\n") + (" %" if share else "")
    judge = Column("metric", heading, metric, *((100.0, 1) if share else (1.0, 4)))
    columns = [judge, *(column for column in _TERMINAL if column.path != metric)]
    rows = _rows_as_found(records, columns)
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


_TERMINAL_WIDTH = 80
_TERMINAL = (
    Column("accuracy", "test\naccuracy %", "test.student.accuracy", 100.0),
    Column("teacher_accuracy", "teacher's\naccuracy %", "test.teacher.accuracy", 100.0),
    Column("titles_per_second", "titles/s", "titles_per_second", digits=0),
)


def _rank(row: Row, column: Column, mode: Mode, seeds: int) -> tuple[bool, float]:
    """The key to sort by: rows with all seeds first, of these the best; a row without a value comes last."""
    summary = row.columns.get(column.name)
    if summary is None:
        return True, math.inf
    return summary.n < seeds, -summary.mean if mode == "max" else summary.mean
