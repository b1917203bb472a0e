"""Rows compared: the t-test and its correction by hand, and what is compared with what."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from scipy import integrate, special  # type: ignore[import-untyped]

from newsbert_ray.config import SettingsError
from newsbert_ray.methods import TASKS
from newsbert_ray.record import RunRecord, write_record
from newsbert_ray.reporting.report import report
from newsbert_ray.reporting.statistics import (
    Against,
    compare_rows,
    holm,
    paired,
    read_against,
    significance_table,
    usual_base,
    welch,
)
from newsbert_ray.reporting.tables import Row, Summary, columns_of, rows_of, summarise

if TYPE_CHECKING:
    from tests.conftest import MakeRecord

ACCURACY = columns_of(TASKS["topics"])[0]


def row(values: list[float], **settings: object) -> Row:
    """A row of one column."""
    return Row(settings, tuple(range(len(values))), {"accuracy": summarise(values)})


def by_hand(one: list[float], other: list[float]) -> float:
    """Welch's p from its definition: the tail of Student's density, integrated."""
    mean = [sum(v) / len(v) for v in (one, other)]
    part = [
        sum((x - m) ** 2 for x in v) / (len(v) - 1) / len(v) for v, m in zip((one, other), mean, strict=True)
    ]
    t = abs(mean[0] - mean[1]) / math.sqrt(sum(part))
    free = sum(part) ** 2 / sum(p**2 / (len(v) - 1) for p, v in zip(part, (one, other), strict=True))
    scale = special.gamma((free + 1) / 2) / (math.sqrt(free * math.pi) * special.gamma(free / 2))
    tail, _ = integrate.quad(lambda x: scale * (1 + x * x / free) ** (-(free + 1) / 2), t, math.inf)
    return float(2 * tail)


def test_welch_by_hand() -> None:
    """Unequal variances and numbers of seeds, two-sided."""
    one, other = [0.70, 0.72, 0.71, 0.74, 0.70], [0.69, 0.60, 0.66]
    assert welch(summarise(one), summarise(other)) == pytest.approx(by_hand(one, other), rel=1e-6)


@pytest.mark.parametrize(
    ("one", "other"), [([0.5, 0.6], [0.7, 0.8, 0.9]), ([0.5] * 5, [0.6] * 5), ([0.5], [0.6])]
)
def test_too_little_gives_no_p(one: list[float], other: list[float]) -> None:
    """A p-value of two seeds would be taken for one of five."""
    assert welch(summarise(one), summarise(other)) is None


def test_holm_by_hand() -> None:
    """The least times their number, then the next times one less, never falling."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_all_else_is_equal() -> None:
    """A 1-layer student must not be compared with a 2-layer one; a base is not compared with itself."""
    rows = [
        row([0.6, 0.62, 0.61], method="finetune", layers=1),
        row([0.7, 0.71, 0.69], method="newsbert", layers=1),
        row([0.8, 0.81, 0.83], method="newsbert", layers=2),
        row([0.5, 0.51, 0.52], method="pkd", layers=3),
    ]
    assert usual_base(rows) == Against("method", "newsbert")
    (found,) = compare_rows(rows, ACCURACY, Against("method", "newsbert"))
    assert (found.row, found.base) == (rows[0], rows[1])
    assert found.difference == pytest.approx(-0.09)
    assert found.p == found.corrected
    assert found.p == pytest.approx(by_hand([0.6, 0.62, 0.61], [0.7, 0.71, 0.69]), rel=1e-6)
    assert found.marked


def test_the_correction_counts_a_column(make_record: MakeRecord) -> None:
    """Twenty comparisons find a false one at 0.05 more often than not."""
    base = [0.70, 0.71, 0.72, 0.70]
    rows = [row(base, method="newsbert")] + [row([x - 0.01 for x in base], method=f"m{i}") for i in range(4)]
    for found in compare_rows(rows, ACCURACY, Against("method", "newsbert")):
        assert found.p is not None
        assert found.corrected == pytest.approx(min(1.0, 4 * found.p))


def test_a_base_that_is_not_there_is_said() -> None:
    """With the values that are."""
    rows = [row([0.6], method="finetune"), row([0.6], method="newsbert")]
    with pytest.raises(SettingsError, match="no row has it; it is finetune, newsbert here"):
        significance_table(rows, Against("method", "pkd"))
    with pytest.raises(SettingsError, match="it does not vary here"):
        significance_table(rows, Against("distill.beta", "0"))
    with pytest.raises(SettingsError, match="expected SETTING=VALUE"):
        read_against("method")


def _record(make_record: MakeRecord, method: str, seed: int, accuracy: float) -> RunRecord:
    record = make_record(method=method, seed=seed)
    metrics = {**record.metrics, "test": {"student": {"accuracy": accuracy, "macro_f1": 0.5, "rows": 9}}}
    return record.model_copy(update={"metrics": metrics})


def test_a_report_compares_methods(make_record: MakeRecord, tmp_path: Path) -> None:
    """The table stands on the page, with what it is about; with too few seeds it says so."""
    for method, mean in (("newsbert", 0.71), ("finetune", 0.68)):
        for seed, shift in enumerate((-0.001, 0.0, 0.001, 0.002)):
            folder = tmp_path / "runs" / f"{method}{seed}"
            folder.mkdir(parents=True)
            write_record(folder, _record(make_record, method, seed, mean + shift))
    page = report([tmp_path / "runs"], out=tmp_path / "report")[0].read_text()
    assert "Difference to method newsbert (all else equal), 4 seeds a row, in points" in page
    assert "| finetune | -3.00\\* (p \\< 0.001, \\< 0.001) | +0.00 (no spread) |" in page
    other = report([tmp_path / "runs"], out=tmp_path / "report", against="method=finetune")[0].read_text()
    assert "| newsbert | +3.00" in other
    few = [tmp_path / "runs" / f"{method}0" for method in ("newsbert", "finetune")]
    page = report(few, out=tmp_path / "few")[0].read_text()
    assert "-3.00 (1 seed: too few)" in page


def test_rows_without_the_number_are_left_out(make_record: MakeRecord) -> None:
    """A run on a test split without labels has nothing to compare."""
    blind = make_record(method="finetune")
    blind = blind.model_copy(update={"metrics": {**blind.metrics, "test": {}}})
    rows = rows_of([blind, _record(make_record, "newsbert", 0, 0.7)])
    assert significance_table(rows, Against("method", "newsbert")) is None
    assert isinstance(rows[0].columns.get("accuracy"), Summary | None)


def test_paired_by_hand() -> None:
    """Seeds that move both rows alike hide nothing: the t-test of the differences, each seed with itself."""
    one = replace(summarise([0.70, 0.75, 0.72, 0.78]), by_seed={0: 0.70, 1: 0.75, 2: 0.72, 3: 0.78})
    other = replace(summarise([0.77, 0.69, 0.74, 0.72]), by_seed={3: 0.77, 0: 0.69, 1: 0.74, 2: 0.70})
    differences = [0.01, 0.01, 0.02, 0.01]
    mean = sum(differences) / 4
    sd = math.sqrt(sum((d - mean) ** 2 for d in differences) / 3)
    t, free = mean / (sd / 2), 3
    scale = special.gamma((free + 1) / 2) / (math.sqrt(free * math.pi) * special.gamma(free / 2))
    tail, _ = integrate.quad(lambda x: scale * (1 + x * x / free) ** (-(free + 1) / 2), t, math.inf)
    assert paired(one, other) == pytest.approx(2 * tail, rel=1e-6)
    assert paired(one, summarise([0.1] * 4)) is None
    few = replace(other, by_seed={0: 0.69, 1: 0.74})
    assert paired(one, few) is None
    alike = replace(one, by_seed={seed: value + 0.25 for seed, value in one.by_seed.items()})
    assert paired(one, alike) is None


def test_rows_of_records_are_paired_by_seed(make_record: MakeRecord) -> None:
    """The order of the records is no order of seeds."""
    runs = [make_record(method="newsbert", seed=s, accuracy=0.7 + 0.01 * s) for s in (2, 0, 1)]
    runs += [make_record(method="finetune", seed=s, accuracy=0.69 + 0.011 * s) for s in (0, 1, 2)]
    (found,) = compare_rows(rows_of(runs), ACCURACY, Against("method", "newsbert"))
    assert found.paired is not None
    assert found.paired < 0.01 < (found.p or 0.0)
