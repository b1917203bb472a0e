"""A sweep's points as rows: the best of them for a page, all of them as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from newsbert_ray.reporting.figures import short
from newsbert_ray.reporting.page import Table
from newsbert_ray.reporting.sweep_data import Point, Sweep
from newsbert_ray.reporting.tables import Column, Summary, columns_of, show, summary_of


def points_table(sweep: Sweep, points: Sequence[Point], caption: str) -> Table:
    """Settings of the points, their goals, and what else their records know of the student."""
    names = [axis.name for axis in sweep.axes]
    columns = [
        column
        for column in _others(sweep)
        if "teacher" not in column.path and any(_summary(point, column) for point in points)
    ]
    goals = [goal.column.heading for goal in sweep.goals]
    head = (*names, *goals, *(full(column) for column in columns))
    rows = tuple(
        (
            *(short(point.values[name], 4) if name in point.values else "" for name in names),
            *(show(point.summary(index), goal.column) for index, goal in enumerate(sweep.goals)),
            *(show(_summary(point, column), column) for column in columns),
        )
        for point in points
    )
    return Table(head, rows, words=len(names), caption=caption)


def points_csv(sweep: Sweep) -> str:
    """Every point, the finished ones first and the best of them on top: full precision, shares from 0 to 1.

    `epochs` is how far the furthest of its trials came.
    """
    names = [axis.name for axis in sweep.axes]
    columns = _others(sweep)
    heads = [*(goal.metric for goal in sweep.goals), *(column.name for column in columns)]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    pairs = [cell for head in heads for cell in (head, f"{head}_sd")]
    writer.writerow([*names, "state", "n_seeds", "epochs", *pairs])
    for point in [*sweep.finished, *sweep.of("stopped", "under way", "failed")]:
        known = [point.summary(index) for index in range(len(sweep.goals))]
        known += [_summary(point, column) for column in columns]
        numbers = [cell for s in known for cell in ((s.mean, s.sd) if s else (None, None))]
        settings = [point.values.get(name) for name in names]
        reached = max(trial.epoch for trial in point.trials)
        writer.writerow([*settings, point.state, len(point.trials), reached, *numbers])
    return file.getvalue()


def _others(sweep: Sweep) -> list[Column]:
    judged = {goal.metric for goal in sweep.goals}
    return [column for column in columns_of(sweep.task) if column.path not in judged]


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


def _summary(point: Point, column: Column) -> Summary | None:
    return summary_of(point.records, column.path)
