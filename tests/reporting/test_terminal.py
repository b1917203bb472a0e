from __future__ import annotations

import io
import re
from collections.abc import Callable

import pytest
from rich.console import Console
from rich.table import Table

from newsbert_ray.record import RunRecord
from newsbert_ray.reporting.tables import Mode, sweep_table

MakeRecord = Callable[..., RunRecord]


def _printed(table: Table) -> list[list[str]]:
    """The cells of the rows, from a terminal 80 letters wide."""
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(table)
    text = console.export_text()
    assert "…" not in text
    return [line.split() for line in text.splitlines() if re.match(r"\s+\d", line) and "runs" not in line]


@pytest.mark.parametrize(("mode", "order"), [("max", ["0.1", "0.2", "0.0"]), ("min", ["0.0", "0.2", "0.1"])])
def test_sweep_table_puts_the_best_first(mode: Mode, order: list[str], make_record: MakeRecord) -> None:
    """The first line of a sweep's table is the one that people take."""
    records = [
        make_record(accuracy=a, **{"distill.beta": b}) for a, b in [(0.6, 0.0), (0.8, 0.1), (0.7, 0.2)]
    ]
    lines = _printed(sweep_table(records, "validation.student.accuracy", mode=mode))
    assert [line[0] for line in lines] == order
    assert {line[0]: line[2] for line in lines} == {"0.0": "60.0", "0.1": "80.0", "0.2": "70.0"}


def test_of_equals_the_first_tried_comes_first(make_record: MakeRecord) -> None:
    """Two lines for the best point, the table's and the sweep's own, must name the same one."""
    records = [make_record(accuracy=0.7, **{"distill.beta": b}) for b in (0.3, 0.1, 0.2)]
    assert [line[0] for line in _printed(sweep_table(records))] == ["0.3", "0.1", "0.2"]


def test_sweep_table_fits_a_terminal(make_record: MakeRecord) -> None:
    """Numbers cut off at the edge are the ones that were wanted."""
    records = [
        make_record(
            accuracy=0.6 + 0.01 * seed + beta, seed=seed, **{"distill.beta": beta, "student.layers": n}
        )
        for seed in (0, 1)
        for beta in (0.05, 0.1)
        for n in (1, 2)
    ]
    lines = _printed(sweep_table(records, "validation.student.accuracy"))
    assert len(lines) == 4
    assert lines[0][:6] == ["1", "0.1", "2", "70.5", "±", "0.7"]


def test_sweep_table_of_three_axes_fits_a_terminal(make_record: MakeRecord) -> None:
    """With more axes the other numbers make room; what the sweep is judged by stays whole."""
    records = [
        make_record(
            accuracy=0.7 + 0.01 * seed + beta / 10,
            seed=seed,
            **{"distill.beta": beta, "student.layers": 2, "distill.temperature": t, "learning_rate": rate},
        )
        for seed in (0, 1)
        for beta, t, rate in ((0.123456789, 1.0, 5e-5), (0.25, 12.5, 3.0517578125e-05))
    ]
    lines = _printed(sweep_table(records, "validation.student.accuracy"))
    assert lines[0] == ["0.25", "12.5", "3.052e-05", "2", "73.0", "±", "0.7", *lines[0][7:]]
    assert lines[1] == ["0.1235", "1.0", "5e-05", "2", "71.7", "±", "0.7", *lines[1][7:]]


def test_sweep_table_of_many_axes_keeps_its_numbers(make_record: MakeRecord) -> None:
    """Where even the settings have no room they break; a number cut short would be another number."""
    values = {
        "distill.weights.news_embedding": 1.5,
        "distill.weights.soft_labels": 2.5,
        "optimizer.clip_norm": 0.01,
        "model.teacher_layers": 4,
        "distill.temperature": 2.0,
        "optimizer.warmup_share": 0.2,
        "learning_rate": 3.0517578125e-05,
    }
    table = sweep_table([make_record(), make_record(accuracy=0.9, **values)], "validation.student.accuracy")
    assert _printed(table)[0][-1] == "90.0"


@pytest.mark.parametrize("mode", ["max", "min"])
def test_point_that_misses_a_seed_is_not_the_best(mode: Mode, make_record: MakeRecord) -> None:
    """A lucky seed alone must not head the table while the sweep names another point the best."""
    lucky = 0.9 if mode == "max" else 0.1
    records = [make_record(accuracy=lucky, seed=0, **{"distill.beta": 0.3})]
    records += [make_record(accuracy=0.7, seed=seed, **{"distill.beta": 0.1}) for seed in (0, 1)]
    lines = _printed(sweep_table(records, mode=mode))
    assert [line[:2] for line in lines] == [["0.1", "2"], ["0.3", "1"]]
    lines = _printed(sweep_table(records, mode=mode, seeds=3))
    assert [line[:2] for line in lines] == [["0.3", "1"], ["0.1", "2"]]


def test_sweep_table_of_clicks(make_record: MakeRecord) -> None:
    """A share is shown in per cent whatever its task calls it, beside that task's own numbers."""
    records = [
        make_record(task="recommendation", auc=a, teacher_auc=0.66, **{"distill.beta": b})
        for a, b in [(0.61, 0.1), (0.63, 0.2)]
    ]
    for metric in (None, "validation.student.auc"):
        table = sweep_table(records, metric)
        assert [line[:3] for line in _printed(table)] == [["0.2", "1", "63.0"], ["0.1", "1", "61.0"]]
        headings = [str(column.header) for column in table.columns]
        assert headings[-2:] == ["teacher's\nAUC %", "clicks/s"]
