"""The best point, the front, a goal in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from newsbert_ray.reporting.sweep_data import Axis, Goal, Point, Sweep, Trial, listed
from newsbert_ray.reporting.tables import Mode


def _point(label: str, *values: tuple[float, ...], **settings: object) -> Point:
    trials = tuple(
        Trial(f"{label},seed={seed}", {}, seed, "finished", {}, 2, 2.0, (), values=found)
        for seed, found in enumerate(values)
    )
    return Point(label, settings, trials, "finished")


def _sweep(points: list[Point], *modes: Mode, **plan: object) -> Sweep:
    goals = tuple(Goal("validation.student.accuracy", mode) for mode in modes)
    return Sweep(Path("x"), {"trials": 4, **plan}, (), goals, (0, 1), tuple(points), {}, False)


@pytest.mark.parametrize(("mode", "order"), [("max", "bca"), ("min", "acb")])
def test_best_comes_first(mode: Mode, order: str) -> None:
    """The first point is the one whose command people run; the mean over seeds decides."""
    points = [_point("a", (0.1,), (0.2,)), _point("b", (0.9,), (0.5,)), _point("c", (0.9,), (0.4,))]
    assert "".join(point.label for point in _sweep(points, mode).finished) == order


def test_of_equals_the_one_in_the_command_is_best() -> None:
    """The settings on the page and the command below them must be the same point's."""
    points = [_point("a", (0.5,), beta=0.1, t2=False), _point("b", (0.5,), beta=0.1, t2=True)]
    assert _sweep(points, "max").finished[0].label == "a"
    for t2, label in (("false", "a"), ("true", "b")):
        command = f"newsbert-ray train --data '/a b' --beta 0.1 --t2 {t2} --seed 0"
        assert _sweep(points, "max", best=command).finished[0].label == label


def test_front_by_hand() -> None:
    """A point that another beats in everything is no choice; one that is equal in one goal may be beaten."""
    points = [
        _point("a", (0.9, 1.0)),
        _point("b", (0.8, 3.0)),
        _point("c", (0.7, 2.0)),
        _point("d", (0.9, 0.5)),
        _point("e", (0.8, 3.0)),
    ]
    assert [point.label for point in _sweep(points, "max", "max").front] == ["a", "b", "e"]
    assert [point.label for point in _sweep(points, "max", "min").front] == ["d"]
    assert [point.label for point in _sweep(points, "max").front] == ["a", "d"]


def test_spread_over_seeds_by_hand() -> None:
    """Mean and sample standard deviation are what stands behind every ±."""
    summary = _point("a", (0.6, 1.0), (0.8, 3.0)).summary(1)
    assert summary is not None
    assert (summary.mean, summary.n) == (2.0, 2)
    assert summary.sd == pytest.approx(2**0.5)
    assert _point("a").summary() is None


@pytest.mark.parametrize(
    ("metric", "heading"),
    [
        ("validation.student.accuracy", "validation accuracy (%)"),
        ("test.teacher.macro_f1", "teacher's test macro-F1 (%)"),
        ("speed.student_titles_per_second", "student's titles/s"),
        ("speed.times_teacher", "speed, times the teacher's"),
    ],
)
def test_goal_in_words(metric: str, heading: str) -> None:
    """A dotted name on an axis tells a reader of a paper nothing; a share in per cent says so."""
    column = Goal(metric, "max").column
    assert column.heading == heading
    assert column.factor == (100.0 if "%" in heading else 1.0)


def test_condition_hangs_on_a_setting_that_varies() -> None:
    """An axis below another that is itself ruled out does not vary either."""
    axis = Axis("b", low=0, high=1, when={"a": (1, 2)})
    assert axis.active({"a": 2})
    assert not axis.active({"a": 3})
    assert not axis.active({})


def test_list_reads_like_a_sentence() -> None:
    """`a, b and c`, whatever their number."""
    assert [listed(["a", "b", "c"][:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]
