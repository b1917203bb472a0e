"""Significance, importance of settings, and costs."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import integrate, special  # type: ignore[import-untyped]

from newsbert_ray.config import SettingsError
from newsbert_ray.methods import TASKS
from newsbert_ray.record import RunRecord, write_record
from newsbert_ray.reporting import statistics as importance
from newsbert_ray.reporting.figures import NothingToDraw
from newsbert_ray.reporting.report import report
from newsbert_ray.reporting.statistics import (
    Against,
    compare_rows,
    cost_figure,
    costs_of,
    cpu_hours_by_part,
    default_base,
    holm,
    importance_figure,
    importances_of,
    paired_test,
    read_against,
    significance_table,
    welch,
)
from newsbert_ray.reporting.sweep_data import read_sweep
from newsbert_ray.reporting.sweep_page import sweep_page
from newsbert_ray.reporting.tables import Row, columns_of, rows_of, summarise
from tests.reporting.conftest import GOALS, MakeRecord, MakeSweep, change_plan

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
def test_too_few_seeds_give_no_p(one: list[float], other: list[float]) -> None:
    """A p-value of two seeds would be taken for one of five."""
    assert welch(summarise(one), summarise(other)) is None


def test_holm_by_hand() -> None:
    """The smallest p times the number of tests, the next times one less, never falling."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_all_else_is_equal() -> None:
    """A 1-layer student is not compared with a 2-layer one; a base is not compared with itself."""
    rows = [
        row([0.6, 0.62, 0.61], method="finetune", layers=1),
        row([0.7, 0.71, 0.69], method="newsbert", layers=1),
        row([0.8, 0.81, 0.83], method="newsbert", layers=2),
        row([0.5, 0.51, 0.52], method="pkd", layers=3),
    ]
    assert default_base(rows) == Against("method", "newsbert")
    (found,) = compare_rows(rows, ACCURACY, Against("method", "newsbert"))
    assert (found.row, found.base) == (rows[0], rows[1])
    assert found.difference == pytest.approx(-0.09)
    assert found.p == found.corrected
    assert found.p == pytest.approx(by_hand([0.6, 0.62, 0.61], [0.7, 0.71, 0.69]), rel=1e-6)
    assert found.significant


def test_correction_is_over_a_column(make_record: MakeRecord) -> None:
    """Twenty uncorrected comparisons at 0.05 usually contain a false one."""
    base = [0.70, 0.71, 0.72, 0.70]
    rows = [row(base, method="newsbert")] + [row([x - 0.01 for x in base], method=f"m{i}") for i in range(4)]
    for found in compare_rows(rows, ACCURACY, Against("method", "newsbert")):
        assert found.p is not None
        assert found.corrected == pytest.approx(min(1.0, 4 * found.p))


def test_unknown_base_is_an_error() -> None:
    """The message lists the values that exist."""
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


@pytest.mark.usefixtures("_undrawn")
def test_a_report_compares_methods(make_record: MakeRecord, tmp_path: Path) -> None:
    """The page has the table of differences; with too few seeds it says so."""
    for method, mean in (("newsbert", 0.71), ("finetune", 0.68)):
        for seed, shift in enumerate((-0.001, 0.0, 0.001, 0.002)):
            folder = tmp_path / "runs" / f"{method}{seed}"
            folder.mkdir(parents=True)
            write_record(folder, _record(make_record, method, seed, mean + shift))
    page = report([tmp_path / "runs"], out=tmp_path / "report")[0].read_text()
    assert "Difference to method newsbert (all else equal), 4 seeds per row, in points" in page
    assert "| finetune | -3.00\\* (p \\< 0.001, \\< 0.001) | +0.00 (no spread) |" in page
    other = report([tmp_path / "runs"], out=tmp_path / "report", against="method=finetune")[0].read_text()
    assert "| newsbert | +3.00" in other
    few = [tmp_path / "runs" / f"{method}0" for method in ("newsbert", "finetune")]
    page = report(few, out=tmp_path / "few")[0].read_text()
    assert "-3.00 (1 seed: too few)" in page


def test_rows_without_the_number_are_left_out(make_record: MakeRecord) -> None:
    """A run on a test split without labels cannot be compared."""
    blind = make_record(method="finetune")
    blind = blind.model_copy(update={"metrics": {**blind.metrics, "test": {}}})
    rows = rows_of([blind, _record(make_record, "newsbert", 0, 0.7)])
    assert significance_table(rows, Against("method", "newsbert")) is None


def test_paired_by_hand() -> None:
    """The t-test of the differences, each seed with itself."""
    one = replace(summarise([0.70, 0.75, 0.72, 0.78]), by_seed={0: 0.70, 1: 0.75, 2: 0.72, 3: 0.78})
    other = replace(summarise([0.77, 0.69, 0.74, 0.72]), by_seed={3: 0.77, 0: 0.69, 1: 0.74, 2: 0.70})
    differences = [0.01, 0.01, 0.02, 0.01]
    mean = sum(differences) / 4
    sd = math.sqrt(sum((d - mean) ** 2 for d in differences) / 3)
    t, free = mean / (sd / 2), 3
    scale = special.gamma((free + 1) / 2) / (math.sqrt(free * math.pi) * special.gamma(free / 2))
    tail, _ = integrate.quad(lambda x: scale * (1 + x * x / free) ** (-(free + 1) / 2), t, math.inf)
    assert paired_test(one, other) == pytest.approx(2 * tail, rel=1e-6)
    assert paired_test(one, summarise([0.1] * 4)) is None
    few = replace(other, by_seed={0: 0.69, 1: 0.74})
    assert paired_test(one, few) is None
    alike = replace(one, by_seed={seed: value + 0.25 for seed, value in one.by_seed.items()})
    assert paired_test(one, alike) is None


def test_rows_of_records_are_paired_by_seed(make_record: MakeRecord) -> None:
    """Records in another order than their seeds are paired correctly."""
    runs = [make_record(method="newsbert", seed=s, accuracy=0.7 + 0.01 * s) for s in (2, 0, 1)]
    runs += [make_record(method="finetune", seed=s, accuracy=0.69 + 0.011 * s) for s in (0, 1, 2)]
    (found,) = compare_rows(rows_of(runs), ACCURACY, Against("method", "newsbert"))
    assert found.paired is not None
    assert found.paired < 0.01 < (found.p or 0.0)


AXES = ["learning_rate", "student.layers", "distill.temperature"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "REPEATS", 10)


def test_important_setting_comes_first_and_above_chance(make_sweep: MakeSweep) -> None:
    """The metric of the invented sweep depends on the learning rate only."""
    found, points, top = importances_of(read_sweep(make_sweep(axes=AXES, points=40, seeds=(0,))))
    first, *rest = found
    assert first.name == "learning_rate"
    assert first.value > 0.5
    assert first.chance is not None
    assert first.value > first.chance
    assert sum(i.value for i in found) == pytest.approx(1.0)
    temperature = next(i for i in rest if i.name == "distill.temperature")
    assert temperature.chance is not None
    assert temperature.value < temperature.chance
    assert (points, top) == (40, 5)


def test_stopped_points_count(make_sweep: MakeSweep) -> None:
    """Early stopping leaves only good rates: among finished points the rate would seem not to matter."""
    sweep = read_sweep(make_sweep(axes=AXES, points=40, seeds=(0,), stopped=0.7))
    assert len(sweep.finished) == 12
    found, points, _ = importances_of(sweep)
    assert points == 40
    assert found[0].name == "learning_rate"
    assert "of which 28 were stopped early and count as worse" in importance_figure(sweep).caption


def test_conditional_settings_are_included(make_sweep: MakeSweep) -> None:
    """Half of the points do not have the setting."""
    axes = ["learning_rate", "optimizer.decay", "optimizer.warmup_share"]
    found, *_ = importances_of(read_sweep(make_sweep(axes=axes, points=30, seeds=(0,))))
    assert {i.name for i in found} == set(axes)


def test_same_points_give_the_same_bars(make_sweep: MakeSweep) -> None:
    """Bars that change from one report to the next cannot be trusted."""
    folder = make_sweep(axes=AXES, points=12, seeds=(0,))
    assert importance_figure(read_sweep(folder)) == importance_figure(read_sweep(folder))


@pytest.mark.parametrize(("points", "stopped"), [(9, 0.0), (12, 0.75)])
def test_too_few_points_are_not_drawn(make_sweep: MakeSweep, points: int, stopped: float) -> None:
    """Bars of noise would look like knowledge."""
    sweep = read_sweep(make_sweep(axes=AXES, points=points, seeds=(0,), stopped=stopped))
    with pytest.raises(NothingToDraw, match=r"too few points to say .* 10 are needed, 5 of them finished"):
        importances_of(sweep)


def test_lone_setting_is_not_compared(make_sweep: MakeSweep) -> None:
    """A single setting always has 100 % of the importance."""
    with pytest.raises(NothingToDraw, match="fewer than two settings varied"):
        importances_of(read_sweep(make_sweep(points=10, seeds=(0,))))


def test_each_goal_has_its_own_bars(make_sweep: MakeSweep) -> None:
    """Other settings decide quality than decide speed."""
    sweep = read_sweep(make_sweep(axes=AXES, points=40, seeds=(0,), goals=GOALS))
    good, fast = importance_figure(sweep).panels
    assert (good.title, fast.title) == ("validation accuracy (%)", "student's titles/s")
    assert good.bars[0].name == "learning_rate"
    assert fast.bars[0].name == "student.layers"


def test_costs_by_hand(make_sweep: MakeSweep) -> None:
    """Two points of four stopped after one of nine epochs, with one seed of two; a trial is 33 s or 4 s."""
    folder = make_sweep(points=5, stopped=0.5, failed=1, prices={"cpu_hour": 3.6, "gpu_hour": 36.0})
    costs = costs_of(read_sweep(folder))
    assert costs.seconds == pytest.approx(4 * 33 + 2 * 4)
    assert costs.cpu_hours == pytest.approx(140 / 3600)
    assert costs.gpu_hours == 0.0
    assert costs.money == pytest.approx(0.14)
    assert costs.saved_epochs == 2 * (8 + 9)
    assert costs.seconds_per_epoch == pytest.approx(140 / (4 * 9 + 2))
    assert costs.unknown == 1
    parts = {name: hours * 3600 for name, hours in cpu_hours_by_part(read_sweep(folder)).items()}
    assert parts == pytest.approx({"train": 120.0, "evaluate": 12.0, "stopped early": 8.0})


def test_gpus_are_those_of_the_trials(make_sweep: MakeSweep) -> None:
    """A quarter of a GPU costs a quarter of its price."""
    folder = make_sweep(points=1, seeds=(0,), prices={"gpu_hour": 2.0})
    change_plan(folder, place={"slots": 4, "cpus": 1.0, "gpus": 0.25})
    costs = costs_of(read_sweep(folder))
    assert costs.gpu_hours == pytest.approx(33 / 3600 / 4)
    assert costs.money == pytest.approx(33 / 3600 / 2)


def test_threads_are_counted(make_sweep: MakeSweep) -> None:
    """Four threads for an hour are four CPU-hours."""
    folder = make_sweep(points=1, seeds=(0,))
    change_plan(folder, place={"slots": 1, "cpus": 8.0, "gpus": 0.0})
    assert costs_of(read_sweep(folder)).cpu_hours == pytest.approx(8 * 33 / 3600)


def test_prerequisites_are_counted(make_sweep: MakeSweep) -> None:
    """A trial and its teacher, two threads for 33 s each; a damaged record is skipped."""
    folder = make_sweep(points=1, seeds=(0,), prices={"cpu_hour": 3600.0})
    change_plan(folder, place={"slots": 1, "cpus": 2.0, "gpus": 0.0})
    (path,) = (folder / "trials").glob("*/record.json")
    for name, text in (("ab12", path.read_text()), ("cd34", "{")):
        (folder / "teachers" / name).mkdir(parents=True)
        (folder / "teachers" / name / "record.json").write_text(text)
    costs = costs_of(read_sweep(folder))
    assert (costs.prerequisite_seconds, costs.seconds) == (33.0, 33.0)
    assert costs.cpu_hours == pytest.approx(4 * 33 / 3600)
    assert costs.money == pytest.approx(132)
    assert cpu_hours_by_part(read_sweep(folder))["prerequisites"] == pytest.approx(66 / 3600)
    page = sweep_page(read_sweep(folder), defaultdict(lambda: "none"))
    (facts,) = [block for block in page.sections[-2].blocks if isinstance(block, dict)]
    assert facts["prerequisites"].startswith("33 s, 1 run that trials share")


def test_unit_fits_the_numbers(make_sweep: MakeSweep) -> None:
    """Bars of 0.0008 hours cannot be read; without a price, a cost of `0.00` would be read as free."""
    sweep = read_sweep(make_sweep(points=1))
    assert costs_of(sweep).money is None
    (panel,) = cost_figure(sweep).panels
    assert panel.x_label == "CPU-minutes"
    assert [(bar.name, bar.value) for bar in panel.bars] == [("train", 1.0), ("evaluate", pytest.approx(0.1))]


def test_no_time_makes_no_figure(make_sweep: MakeSweep) -> None:
    """Before the first trial has ended there are no bars."""
    with pytest.raises(NothingToDraw, match="no trial has recorded its time yet"):
        cost_figure(read_sweep(make_sweep(points=0, state="running")))
