"""Learning curves and the Pareto front of a sweep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from newsbert_ray.reporting.figure_data import NothingToDraw
from newsbert_ray.reporting.sweep_data import read_sweep
from newsbert_ray.reporting.sweep_figures import learning_curves, pareto_front

MakeSweep = Callable[..., Path]
GOALS = (
    {"metric": "validation.student.accuracy", "mode": "max"},
    {"metric": "speed.student_titles_per_second", "mode": "max"},
)


def test_best_points_in_colour_the_rest_grey(make_sweep: MakeSweep) -> None:
    """Sixty coloured lines tell nobody which is best; a stopped one must show where it ended."""
    sweep = read_sweep(make_sweep(points=12, stopped=0.5, failed=1, under_way=1, epochs=3))
    figure = learning_curves(sweep)
    (panel,) = figure.panels
    *best, teacher = panel.lines
    assert [line.label for line in best] == [
        f"β = {p.values['distill.beta']:.3g}" for p in sweep.finished[:4]
    ]
    assert best[0].x == (1.0, 2.0, 3.0)
    assert best[0].n == (2, 2, 2)
    assert teacher.reference
    assert sum(trace.stopped for trace in panel.traces) == 5
    assert all(trace.x == (1.0,) for trace in panel.traces if trace.stopped)
    # One finished point is not among the best four, one point is under way, one failed before an epoch.
    assert sum(not trace.stopped for trace in panel.traces) == 2 + 1
    assert "Grey: 8 other trials" in figure.caption
    assert "where 5 of them were stopped early" in figure.caption


def test_curve_is_the_mean_over_seeds(make_sweep: MakeSweep) -> None:
    """In per cent, at each epoch."""
    sweep = read_sweep(make_sweep(points=1, epochs=2))
    line = learning_curves(sweep).panels[0].lines[0]
    values = [trial.curve("validation.student.accuracy")[1][1] for trial in sweep.trials]
    assert line.y[1] == pytest.approx(100 * sum(values) / 2)


def test_goal_known_at_the_end_only_is_replaced_in_the_curves(make_sweep: MakeSweep) -> None:
    """Speed has no curve; the validation accuracy has, and the axis says so."""
    sweep = read_sweep(make_sweep(points=2, goals=GOALS[::-1]))
    assert learning_curves(sweep).panels[0].y_label == "validation accuracy (%)"


def test_many_settings_do_not_push_the_legend_off_the_page(make_sweep: MakeSweep) -> None:
    """A legend wider than the page is cut at both ends."""
    names = ["learning_rate", "distill.beta", "student.layers", "optimizer.decay", "optimizer.warmup_share"]
    sweep = read_sweep(
        make_sweep(axes=[*names, "distill.temperature", "distill.soft_label_t2", "batch_size"], points=3)
    )
    assert learning_curves(sweep).panels[0].lines[0].label == "rank 1 of the table"


def test_no_evaluation_makes_no_curves(make_sweep: MakeSweep) -> None:
    """Empty axes would look like a failure of the method."""
    with pytest.raises(NothingToDraw, match="no trial has been evaluated yet"):
        learning_curves(read_sweep(make_sweep(points=0, state="running")))


def test_one_evaluation_a_trial_makes_no_curves(make_sweep: MakeSweep) -> None:
    """Dots above each other at one epoch are no course of learning."""
    with pytest.raises(NothingToDraw, match="no trial was evaluated twice"):
        learning_curves(read_sweep(make_sweep(epochs=1)))


def test_front_stands_on_stairs(make_sweep: MakeSweep) -> None:
    """Between two points of a front nothing was measured: a slanted line would promise it."""
    sweep = read_sweep(make_sweep(axes=["student.layers", "distill.beta"], points=12, goals=GOALS))
    figure = pareto_front(sweep)
    (panel,) = figure.panels
    beaten, front = panel.dots
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
    """In a flat picture of three goals the front is no line."""
    goals = [*GOALS, {"metric": "speed.times_teacher", "mode": "max"}]
    figure = pareto_front(read_sweep(make_sweep(points=3, goals=goals)))
    assert [panel.x_label for panel in figure.panels] == ["student's titles/s", "speed, times the teacher's"]
    assert all(not dots.stairs for panel in figure.panels for dots in panel.dots)


def test_one_goal_has_no_front(make_sweep: MakeSweep) -> None:
    """A front of one goal is a dot."""
    with pytest.raises(NothingToDraw, match="one goal makes no front"):
        pareto_front(read_sweep(make_sweep(points=1)))


def test_clicks_and_students_without_a_teacher_have_curves_too(make_sweep: MakeSweep) -> None:
    """A recommendation sweep judged by speed shows an accuracy that none of its trials has; a fine-tuned
    student's best point shows a teacher that is not there."""
    speed = GOALS[1:]
    figure = learning_curves(read_sweep(make_sweep(points=2, task="recommendation", goals=speed)))
    assert figure.panels[0].y_label == "validation AUC (%)"
    assert figure.panels[0].lines[-1].reference
    alone = read_sweep(make_sweep("alone", axes=["method"], points=1, task="retrieval"))
    assert [line.label for line in learning_curves(alone).panels[0].lines] == ["method = finetune"]
