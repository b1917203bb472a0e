"""A sweep -> what its learning curves and its Pareto front show: pure and comparable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from newsbert_ray.reporting.figures import short, symbol
from newsbert_ray.reporting.panels import (
    Dots,
    FigureData,
    Line,
    Look,
    NothingToDraw,
    Panel,
    Scatter,
    Trace,
)
from newsbert_ray.reporting.sweeps import Goal, Point, Sweep, Trial, listed
from newsbert_ray.reporting.tables import summarise

CURVES_FIGURE, FRONT_FIGURE = "learning_curves", "pareto_front"
BEST = 4
"""Learning curves drawn in colour."""
MAX_LETTERS = 95
"""Letters of a legend's line that a page is wide enough for."""


def learning_curves(sweep: Sweep) -> FigureData[Panel]:
    """The first goal over epochs: the best points in colour, every other trial thin and grey.

    Where the goal is not known at each evaluation, the task's first metric on validation instead.

    Raises:
        NothingToDraw: no trial was evaluated, or none twice.
    """
    goal = sweep.goals[0]
    if not goal.metric.startswith("validation."):
        goal = Goal(f"validation.student.{sweep.task.primary.name}", "max")
    column = goal.column
    best = sweep.finished[:BEST]
    of_best = {trial.name for point in best for trial in point.trials}
    traces = [
        Trace(
            _trace_label(trial),
            tuple(x for x, _ in curve),
            tuple(column.factor * y for _, y in curve),
            stopped=trial.state == "stopped",
        )
        for trial in sweep.trials
        if trial.name not in of_best and (curve := trial.curve(goal.metric))
    ]
    names = _names(best)
    lines = [
        _mean_curve(point.trials, goal, name)
        for point, name in zip(best, names, strict=True)
        if point.trials[0].curve(goal.metric)
    ]
    if not lines and not traces:
        raise NothingToDraw("no trial has been evaluated yet")
    if max(len(x) for x in [*(line.x for line in lines), *(trace.x for trace in traces)]) < 2:
        raise NothingToDraw("learning curves are left out: no trial was evaluated twice")
    teacher = Goal(goal.metric.replace(".student.", ".teacher."), goal.mode)
    if lines and teacher != goal and best[0].trials[0].curve(teacher.metric):
        line = _mean_curve(best[0].trials, teacher, "teacher of the best")
        lines.append(Line(line.label, line.x, line.y, line.sd, line.n, reference=True))
    return FigureData(
        CURVES_FIGURE,
        (Panel("", "epoch", column.heading, tuple(lines), tuple(traces)),),
        _curves_caption(sweep, traces),
        error_bars=False,
        whole_x=True,
        wide=True,
        alt=f"Learning curves: {column.heading} over epochs. "
        + (f"The best point reaches {max(lines[0].y):.4g}." if lines else ""),
    )


def _curves_caption(sweep: Sweep, traces: Sequence[Trace]) -> str:
    best = len(sweep.finished[:BEST])
    stopped = sum(trace.stopped for trace in traces)
    seeds = f", mean of {len(sweep.seeds)} seeds" if len(sweep.seeds) > 1 else ""
    texts = [f"In colour: the best {best} points{seeds}." if best else "No point has finished yet."]
    if traces:
        texts.append(f"Grey: {len(traces)} other trials, each one run.")
    if stopped:
        texts.append(f"Crosses: where {stopped} of them were stopped early.")
    return " ".join(texts)


def _trace_label(trial: Trial) -> str:
    return "stopped early" if trial.state == "stopped" else "other trials"


def _mean_curve(trials: Sequence[Trial], goal: Goal, label: str) -> Line:
    """Mean over the seeds at the epochs that all of them have."""
    found: dict[float, list[float]] = {}
    for trial in trials:
        for x, y in trial.curve(goal.metric):
            found.setdefault(x, []).append(goal.column.factor * y)
    common = {x: ys for x, ys in found.items() if len(ys) == len(trials)} or found
    xs = tuple(sorted(common))
    summaries = [summarise(common[x]) for x in xs]
    return Line(
        label,
        xs,
        tuple(s.mean for s in summaries),
        tuple(s.sd for s in summaries),
        tuple(s.n for s in summaries),
    )


def _names(points: Sequence[Point]) -> list[str]:
    """What the legend calls the best points; their ranks where their settings would not fit."""
    names = [describe(point.values) for point in points]
    if max(map(len, names), default=0) <= MAX_LETTERS:
        return names
    return [f"rank {rank} of the table" for rank in range(1, len(points) + 1)]


def describe(values: Mapping[str, Any]) -> str:
    """Settings in one line, as in a legend: `β = 0.1, N = 2`."""
    return ", ".join(f"{symbol(name)} = {short(value, 3)}" for name, value in values.items()) or "no setting"


def pareto_front(sweep: Sweep) -> FigureData[Scatter]:
    """Finished points over two goals, those that no other beats on a line; a panel for each further goal.

    Raises:
        NothingToDraw: one goal, or no finished point.
    """
    if len(sweep.goals) < 2 or not sweep.finished:
        raise NothingToDraw(
            "one goal makes no front" if len(sweep.goals) < 2 else "no point has finished yet"
        )
    front = sorted(sweep.front, key=lambda point: point.mean(1))
    others = [point for point in sweep.finished if point not in front]
    looks: list[tuple[str, Look, list[Point]]] = [
        ("beaten by another point", "finished", others),
        ("Pareto front", "front", front),
    ]
    panels = [
        Scatter(
            "",
            goal.column.heading,
            sweep.goals[0].column.heading,
            tuple(_over_goals(sweep, group, i, label, look) for label, look, group in looks if group),
        )
        for i, goal in enumerate(sweep.goals)
        if i
    ]
    bars = ", bars ± sd over seeds" if len(sweep.seeds) > 1 else ""
    return FigureData(
        FRONT_FIGURE,
        tuple(panels),
        f"Each dot is a finished point{bars}. On the Pareto front: no other point is as good in every goal "
        "and better in one.",
        share_y=True,
        alt=f"{len(front)} of {len(sweep.finished)} points lie on the Pareto front of "
        f"{listed([goal.column.heading for goal in sweep.goals])}.",
    )


def _over_goals(sweep: Sweep, points: Sequence[Point], goal: int, label: str, look: Look) -> Dots:
    first, other = sweep.goals[0].column, sweep.goals[goal].column
    spreads = [s.sd if (s := point.summary()) else None for point in points]
    pair = look == "front" and len(sweep.goals) == 2
    return Dots(
        label,
        look,
        tuple(other.factor * point.mean(goal) for point in points),
        tuple(first.factor * point.mean() for point in points),
        tuple(None if sd is None else first.factor * sd for sd in spreads),
        stairs="" if not pair else "before" if sweep.goals[goal].mode == "max" else "after",
    )
