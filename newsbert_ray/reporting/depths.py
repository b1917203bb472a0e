"""Methods at every student depth, in one small table: where a reader looks first. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from newsbert_ray.record import RunRecord
from newsbert_ray.reporting.compared import (
    distinct,
    flat_settings,
    one_task,
    tuned_settings,
    varying_settings,
)
from newsbert_ray.reporting.names import NAMES
from newsbert_ray.reporting.page import Table
from newsbert_ray.reporting.points import bare
from newsbert_ray.reporting.significance import LEVEL, MARK, compare_rows, usual_base
from newsbert_ray.reporting.tables import Column, Row, columns_of, rows_of, show

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
