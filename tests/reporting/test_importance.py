"""Which settings mattered, and how sure that is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from newsbert_ray.reporting import statistics as importance
from newsbert_ray.reporting.figure_data import NothingToDraw
from newsbert_ray.reporting.statistics import TooFewPoints, importance_figure, importances_of
from newsbert_ray.reporting.sweep_data import read_sweep

MakeSweep = Callable[..., Path]
AXES = ["learning_rate", "student.layers", "distill.temperature"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "REPEATS", 10)


def test_what_matters_comes_first_and_above_chance(make_sweep: MakeSweep) -> None:
    """The metric of the invented sweep hangs on the rate alone; temperature does nothing."""
    found = importances_of(read_sweep(make_sweep(axes=AXES, points=40, seeds=(0,))))
    first, *rest = found.found
    assert first.name == "learning_rate"
    assert first.share > 0.5
    assert first.share > first.chance
    assert sum(i.share for i in found.found) == pytest.approx(1.0)
    temperature = next(i for i in rest if i.name == "distill.temperature")
    assert temperature.share < temperature.chance
    assert (found.points, found.top) == (40, 5)


def test_stopped_points_count(make_sweep: MakeSweep) -> None:
    """Early stopping leaves good rates only: among the finished alone the rate would seem to do nothing."""
    sweep = read_sweep(make_sweep(axes=AXES, points=40, seeds=(0,), stopped=0.7))
    assert len(sweep.finished) == 12
    found = importances_of(sweep)
    assert found.points == 40
    assert found.found[0].name == "learning_rate"
    assert "28 stopped early that count as behind the finished ones" in importance_figure(sweep).caption


def test_conditional_settings_are_judged(make_sweep: MakeSweep) -> None:
    """Half of the points do not have the setting; that must neither raise nor drop it."""
    axes = ["learning_rate", "optimizer.decay", "optimizer.warmup_share"]
    found = importances_of(read_sweep(make_sweep(axes=axes, points=30, seeds=(0,))))
    assert {i.name for i in found.found} == set(axes)


def test_same_points_give_the_same_bars(make_sweep: MakeSweep) -> None:
    """Bars that change from one report to the next cannot be trusted."""
    folder = make_sweep(axes=AXES, points=12, seeds=(0,))
    assert importance_figure(read_sweep(folder)) == importance_figure(read_sweep(folder))


@pytest.mark.parametrize(("points", "stopped"), [(9, 0.0), (12, 0.75)])
def test_too_few_points_are_not_drawn(make_sweep: MakeSweep, points: int, stopped: float) -> None:
    """Bars of noise look like knowledge."""
    sweep = read_sweep(make_sweep(axes=AXES, points=points, seeds=(0,), stopped=stopped))
    with pytest.raises(TooFewPoints, match=r"too few points to say .* 10 are needed, 5 of them finished"):
        importances_of(sweep)


def test_lone_setting_is_not_compared(make_sweep: MakeSweep) -> None:
    """100 % of the importance is no news."""
    with pytest.raises(NothingToDraw, match="fewer than two settings varied"):
        importances_of(read_sweep(make_sweep(points=10, seeds=(0,))))


def test_each_goal_has_its_own_bars(make_sweep: MakeSweep) -> None:
    """What makes a student good and what makes it fast are two questions."""
    goals = [
        {"metric": "validation.student.accuracy", "mode": "max"},
        {"metric": "speed.student_titles_per_second", "mode": "max"},
    ]
    sweep = read_sweep(make_sweep(axes=AXES, points=40, seeds=(0,), goals=goals))
    good, fast = importance_figure(sweep).panels
    assert (good.title, fast.title) == ("validation accuracy (%)", "student's titles/s")
    assert good.bars[0].name == "learning_rate"
    assert fast.bars[0].name == "student.layers"
