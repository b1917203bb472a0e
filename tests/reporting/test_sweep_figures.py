"""What the figures of a sweep show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from newsbert_ray.reporting.figures import NothingToDraw, Panel
from newsbert_ray.reporting.sweep_data import Axis, Goal, Point, State, Sweep, Trial, curve_of, read_sweep
from newsbert_ray.reporting.sweep_figures import (
    learning_curves,
    node_and_trial_steps,
    nodes_figure,
    over_settings,
    pareto_front,
)
from tests.reporting.conftest import GOALS, MakeSweep

Points = list[tuple[Any, Sequence[float], State]]


def test_best_points_in_colour_the_rest_grey(make_sweep: MakeSweep) -> None:
    """Sixty coloured lines do not show which is best; a stopped line shows where it ended."""
    sweep = read_sweep(make_sweep(points=12, stopped=0.5, failed=1, under_way=1, epochs=3))
    figure = learning_curves(sweep)
    (panel,) = figure.panels
    best = [line for line in panel.lines if line.look == "mean"]
    others = [line for line in panel.lines if line.look in ("run", "cross")]
    (teacher,) = (line for line in panel.lines if line.look == "reference")
    assert [line.label for line in best] == [
        f"β = {p.values['distill.beta']:.3g}" for p in sweep.finished[:4]
    ]
    assert best[0].x == (1.0, 2.0, 3.0)
    assert best[0].n == (2, 2, 2)
    assert teacher.label == "teacher of the best"
    assert sum(line.look == "cross" for line in others) == 5
    assert all(line.x == (1.0,) for line in others if line.look == "cross")
    # One finished point is not among the best four, one point is under way, one failed before an epoch.
    assert sum(line.look == "run" for line in others) == 2 + 1
    assert "Grey: 8 other trials" in figure.caption
    assert "where 5 of them were stopped early" in figure.caption


def test_curve_is_the_mean_over_seeds(make_sweep: MakeSweep) -> None:
    """In per cent, at each epoch."""
    sweep = read_sweep(make_sweep(points=1, epochs=2))
    line = learning_curves(sweep).panels[0].lines[0]
    values = [curve_of(trial.entries, "validation.student.accuracy")[1][1] for trial in sweep.trials]
    assert line.y[1] == pytest.approx(100 * sum(values) / 2)


def test_goal_without_a_curve_is_replaced(make_sweep: MakeSweep) -> None:
    """Speed has no curve; validation accuracy has one, and the axis says so."""
    sweep = read_sweep(make_sweep(points=2, goals=GOALS[::-1]))
    assert learning_curves(sweep).panels[0].y_label == "validation accuracy (%)"


def test_long_legend_becomes_ranks(make_sweep: MakeSweep) -> None:
    """A legend wider than the page would be cut off."""
    names = ["learning_rate", "distill.beta", "student.layers", "optimizer.decay", "optimizer.warmup_share"]
    sweep = read_sweep(
        make_sweep(axes=[*names, "distill.temperature", "distill.soft_label_t2", "batch_size"], points=3)
    )
    assert learning_curves(sweep).panels[0].lines[0].label == "rank 1 of the table"


def test_front_is_a_step_line(make_sweep: MakeSweep) -> None:
    """Nothing was measured between two points of a front; a slanted line would claim it."""
    sweep = read_sweep(make_sweep(axes=["student.layers", "distill.beta"], points=12, goals=GOALS))
    figure = pareto_front(sweep)
    (panel,) = figure.panels
    beaten, front = panel.lines
    assert (panel.x_label, panel.y_label) == ("student's titles/s", "validation accuracy (%)")
    assert front.look == "front"
    assert front.stairs == "before"
    assert len(front.x) == len(sweep.front)
    assert len(front.x) + len(beaten.x) == 12
    assert list(front.x) == sorted(front.x)
    assert list(front.y) == sorted(front.y, reverse=True)
    assert figure.alt.startswith(
        f"{len(front.x)} of 12 points lie on the Pareto front of validation accuracy"
    )


def test_front_of_three_goals_has_a_panel_for_each_pair(make_sweep: MakeSweep) -> None:
    """With three goals the front is not a line in two dimensions."""
    goals = [*GOALS, {"metric": "speed.times_teacher", "mode": "max"}]
    figure = pareto_front(read_sweep(make_sweep(points=3, goals=goals)))
    assert [panel.x_label for panel in figure.panels] == ["student's titles/s", "speed, times the teacher's"]
    assert all(not dots.stairs for panel in figure.panels for dots in panel.lines)


LEFT_OUT: list[tuple[Callable[[Sweep], Any], dict[str, Any], str]] = [
    (learning_curves, {"points": 0, "state": "running"}, "no trial has been evaluated yet"),
    (learning_curves, {"epochs": 1}, "no trial was evaluated twice"),
    (pareto_front, {"points": 1}, "one goal makes no front"),
    (over_settings, {"points": 1, "failed": 1}, "no point has a value yet"),
    (over_settings, {"axes": [], "points": 1}, "nothing varies"),
]


@pytest.mark.parametrize(("make", "asked", "reason"), LEFT_OUT)
def test_left_out_figures_say_why(
    make_sweep: MakeSweep, make: Callable[[Sweep], Any], asked: dict[str, Any], reason: str
) -> None:
    """Empty axes would look like a failure of the method, and dots at one epoch are not a curve."""
    with pytest.raises(NothingToDraw, match=reason):
        make(read_sweep(make_sweep(**asked)))


def test_curves_of_other_tasks_and_of_students_without_a_teacher(make_sweep: MakeSweep) -> None:
    """Curves show the task's own metric, and a teacher only where there is one."""
    speed = GOALS[1:]
    figure = learning_curves(read_sweep(make_sweep(points=2, task="recommendation", goals=speed)))
    assert figure.panels[0].y_label == "validation AUC (%)"
    assert any(line.look == "reference" for line in figure.panels[0].lines)
    alone = read_sweep(make_sweep("alone", axes=["method"], points=1, task="retrieval"))
    assert [line.label for line in learning_curves(alone).panels[0].lines] == ["method = finetune"]


def _sweep(axis: Axis, points: Points, *, seeds: Sequence[int] = (0,)) -> Sweep:
    """Points on one axis: (value of the setting, the goal by seed, state)."""
    made = []
    for index, (x, ys, state) in enumerate(points):
        trials = tuple(
            Trial(f"{index},seed={seed}", {}, seed, state, {}, 9, 9.0, (), values=(y,))
            for seed, y in enumerate(ys)
        )
        made.append(Point(str(index), {axis.name: x}, trials, (0,)))
    goals = (Goal(metric="validation.student.accuracy", mode="max"),)
    return Sweep(Path("x"), {"trials": 9}, (axis,), goals, tuple(seeds), tuple(made), {}, False)


def _finished(*pairs: tuple[Any, float]) -> Points:
    """Points of one seed: (value of the setting, the goal)."""
    return [(x, (y,), "finished") for x, y in pairs]


def _panel(sweep: Sweep) -> Panel:
    (panel,) = over_settings(sweep).panels
    return panel


GRID = Axis(name="distill.beta", values=(0.0, 0.1))
RANGE = Axis(name="distill.beta", low=0.0, high=1.0)


def test_dots_and_means_by_hand() -> None:
    """Per cent, sd over seeds for each dot, mean and standard error over the dots of a value."""
    sweep = _sweep(
        GRID,
        [
            (0.0, (0.60, 0.62), "finished"),
            (0.0, (0.65, 0.65), "finished"),
            (0.1, (0.70, 0.72), "finished"),
            (0.1, (0.73, 0.75), "finished"),
        ],
        seeds=(0, 1),
    )
    panel = _panel(sweep)
    rest, best = panel.lines
    assert (rest.look, best.look) == ("finished", "best")
    assert rest.x == (0.0, 0.0, 1.0)
    assert rest.y == pytest.approx((61.0, 65.0, 71.0))
    assert rest.sd == pytest.approx((2**0.5, 0.0, 2**0.5))
    assert best.y == pytest.approx((74.0,))
    assert panel.ticks == ("0", "0.1")
    assert panel.trend is not None
    assert panel.trend.x == (0.0, 1.0)
    assert panel.trend.y == pytest.approx((63.0, 72.5))
    assert panel.trend.sd == pytest.approx((2.0, 1.5))


def test_single_seed_has_no_bar() -> None:
    """An error bar of length 0 would claim certainty, and a line through single dots a trend."""
    panel = _panel(_sweep(GRID, _finished((0.0, 0.6), (0.1, 0.7))))
    assert [dots.sd for dots in panel.lines] == [(None,), (None,)]
    assert panel.trend is None


def test_bins_have_equal_counts() -> None:
    """On a continuous axis each mean is taken over as many dots as its neighbours."""
    points = _finished(*((i / 100, 0.5 + (i // 4) / 10) for i in range(12)))
    trend = _panel(_sweep(RANGE, points)).trend
    assert trend is not None
    assert trend.x == pytest.approx((0.015, 0.055, 0.095))
    assert trend.y == pytest.approx((50.0, 60.0, 70.0))
    assert trend.sd == pytest.approx((0.0, 0.0, 0.0))


def test_log_axis_is_log_and_its_bins_too() -> None:
    """On a linear axis rates from 1e-5 to 1e-2 would all be near zero."""
    axis = Axis(name="learning_rate", low=1e-5, high=1e-1, log=True)
    points = _finished(*((10.0**-i * (1 + j / 10), 0.5) for i in (2, 4) for j in range(5)))
    panel = _panel(_sweep(axis, points))
    assert panel.log_x
    assert panel.trend is not None
    assert panel.trend.x[0] == pytest.approx(1.19e-4, rel=0.01)


def test_words_are_not_joined_by_a_line() -> None:
    """There is nothing between `linear` and `cosine`."""
    axis = Axis(name="optimizer.decay", values=("linear", "cosine"))
    pairs = _finished(*((word, y) for word in ("cosine", "linear") for y in (0.5, 0.6)))
    panel = _panel(_sweep(axis, pairs))
    assert panel.ticks == ("linear", "cosine")
    assert panel.trend is not None
    assert panel.trend.look == "means"


def test_long_folder_names_are_cut() -> None:
    """A path of eighty letters would push the panel off the page."""
    axis = Axis(name="teacher", values=("hub/a-very-long-name-of-a-model", "b"))
    panel = _panel(_sweep(axis, [("b", (0.5,), "finished")]))
    assert panel.ticks == ("a-very-long-n…", "b")


def test_equal_dots_are_shifted() -> None:
    """Ten equal results must not look like one; distant ones are not moved."""
    panel = _panel(_sweep(GRID, _finished(*((0.0, y) for y in (0.5, 0.5, 0.5, 0.6, 0.7)))))
    assert panel.lines[0].x == pytest.approx((0.0, 0.09, -0.09, 0.0))


def test_trend_ignores_stopped_points() -> None:
    """A value after one epoch cannot be compared with one after nine."""
    points: Points = [
        *_finished((0.0, 0.70), (0.0, 0.72), (0.1, 0.74), (0.1, 0.76)),
        (0.0, (0.695,), "stopped"),
        (0.1, (0.20,), "stopped"),
    ]
    figure = over_settings(_sweep(GRID, points))
    (panel,) = figure.panels
    stopped, below = panel.lines[:2]
    assert stopped.look == "stopped"
    assert stopped.y == pytest.approx((69.5,))
    assert below.look == "below"
    assert below.y == (panel.floor,)
    assert panel.floor == pytest.approx(67.0)
    assert panel.trend is not None
    assert panel.trend.y == pytest.approx((71.0, 75.0))
    assert "the 2 points that were stopped early" in figure.caption
    assert "stopped points are not included" in figure.caption


def test_failed_and_unfinished_points_are_not_drawn() -> None:
    """Half of a point's seeds do not give its mean."""
    points: Points = [
        (0.0, (0.7,), "finished"),
        (0.0, (0.1,), "under way"),
        (0.1, (), "failed"),
    ]
    assert [len(dots.x) for dots in _panel(_sweep(GRID, points)).lines] == [1]


def test_conditional_axis_shows_its_own_points_only(make_sweep: MakeSweep) -> None:
    """Points without the setting have no position on its axis."""
    folder = make_sweep(axes=["optimizer.decay", "optimizer.warmup_share"], points=9, seeds=(0,))
    sweep = read_sweep(folder)
    decay, warmup = over_settings(sweep).panels
    own = sum("optimizer.warmup_share" in point.values for point in sweep.points)
    assert 0 < own < len(sweep.points)
    assert sum(len(dots.x) for dots in decay.lines) == len(sweep.points)
    assert sum(len(dots.x) for dots in warmup.lines) == own


def test_constant_setting_has_no_panel() -> None:
    """`--vary student.layers=2` fixes a setting; it is shown only where there is no other."""
    plain = _sweep(GRID, _finished((0.0, 0.6), (0.1, 0.7)))
    points = tuple(replace(p, values={**p.values, "method": "finetune"}) for p in plain.points)
    sweep = replace(plain, axes=(GRID, Axis(name="method", values=("finetune",))), points=points)
    assert [panel.x_label for panel in over_settings(sweep).panels] == ["distill.beta"]
    alone = replace(sweep, axes=sweep.axes[1:])
    assert [panel.x_label for panel in over_settings(alone).panels] == ["method"]


def test_alt_text_says_where_the_mean_is_best() -> None:
    """The text alternative gives the figure's answer."""
    alt = over_settings(_sweep(GRID, _finished((0.0, 0.5), (0.0, 0.6), (0.1, 0.7), (0.1, 0.8)))).alt
    assert alt == (
        "validation accuracy (%) of 4 points over distill.beta. Best mean: 75 at distill.beta = 0.1."
    )


def event(second: int, name: str, **fields: Any) -> dict[str, Any]:
    """A line of events.jsonl."""
    return {"time": f"2026-01-01T00:{second // 60:02d}:{second % 60:02d}.000Z", "event": name, **fields}


GROWN = [
    event(0, "start"),
    event(6, "node_came", nodes=1),
    event(30, "node_came", nodes=2),
    event(36, "trial_start", trial="a"),
    event(60, "node_gone", nodes=1),
    event(60, "trial_broke_off", trial="a"),
    event(90, "node_came", nodes=2),
    event(96, "trial_retry", trial="a"),
    event(120, "trial_start", trial="b"),
    event(150, "trial_end", trial="a"),
    event(180, "interrupted"),
]


def test_steps_by_hand() -> None:
    """A trial that was interrupted does not run; an interrupted sweep runs none."""
    nodes, trials = node_and_trial_steps(GROWN)
    assert nodes == [(0.1, 1), (0.5, 2), (1.0, 1), (1.5, 2)]
    assert trials == [
        (0.0, 0), (0.6, 1), (1.0, 0), (1.6, 1), (2.0, 2), (2.5, 1), (3.0, 0),
    ]  # fmt: skip


def test_counts_are_steps() -> None:
    """A slope between two counts would show half a node."""
    figure = nodes_figure(GROWN)
    (nodes,) = figure.panels[0].lines
    assert list(zip(nodes.x, nodes.y, strict=True))[:3] == [(0, 0), (0.1, 1), (0.5, 2)]
    assert nodes.stairs == "after"
    assert nodes.x[-1] == 3.0
    assert "up to 2 nodes, and up to 2 trials" in figure.alt


@pytest.mark.parametrize("events", [[], GROWN[:2]])
def test_one_machine_makes_no_figure(events: list[dict[str, Any]]) -> None:
    """A sweep on one machine needs no figure of its nodes."""
    with pytest.raises(NothingToDraw):
        nodes_figure(events)
