"""A sweep -> what its learning curves and its Pareto front show: pure and comparable."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import PurePath
from statistics import fmean, stdev
from typing import Any

from newsbert_ray.reporting.figures import (
    Dots,
    FigureData,
    Line,
    Look,
    NothingToDraw,
    Panel,
    Scatter,
    Trace,
    Trend,
    short,
    symbol,
)
from newsbert_ray.reporting.sweep_data import Axis, Goal, Point, Sweep, Trial, listed
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


OVER_FIGURE = "metric_over_settings"
MAX_TICKS = 9
"""More values of a setting than this stand on a continuous axis."""
LEAST_BELOW = 3.0
"""Per cent below the finished points that are always drawn."""
_STEPS = (0.0, 0.09, -0.09, 0.18, -0.18, 0.27, -0.27, 0.36, -0.36)
"""How far a dot steps aside; neighbouring places lie 1 apart."""


def over_settings(sweep: Sweep, *, goal: int = 0) -> FigureData[Scatter]:
    """A goal over each varied setting: a panel for each that has two values so far, a dot for each point, and
    where their mean lies.

    Raises:
        NothingToDraw: no point has a value, or nothing varies.
    """
    shown = [p for p in sweep.of("finished", "stopped") if p.summary(goal)]
    if not sweep.axes or not shown:
        raise NothingToDraw("nothing varies" if not sweep.axes else "no point has a value yet")
    column = sweep.goals[goal].column
    floor = _floor(sweep, goal)
    varied = [axis for axis in sweep.axes if len({repr(p.values.get(axis.name)) for p in shown}) > 1]
    panels = tuple(
        _over_axis(sweep, axis, [p for p in shown if axis.name in p.values], goal, floor)
        for axis in varied or [axis for axis in sweep.axes if any(axis.name in p.values for p in shown)]
    )
    better = max if sweep.goals[goal].mode == "max" else min
    trends = "; ".join(text for panel in panels if (text := _turn(panel, better)))
    return FigureData(
        OVER_FIGURE if goal == 0 else f"{OVER_FIGURE}_{goal + 1}",
        panels,
        _over_caption(sweep, shown, panels, floor),
        share_y=True,
        wide=len(panels) > 1,
        alt=f"{column.heading} of {len(shown)} points over {listed([p.x_label for p in panels])}."
        + (f" Best mean: {trends}." if trends else ""),
    )


def _floor(sweep: Sweep, goal: int) -> float | None:
    """Where y begins, so that the finished points have most of it; None where all find room.

    What was stopped after an epoch or two lies far below them, and would leave them no height.
    """
    factor = sweep.goals[goal].column.factor
    finished = [factor * point.mean(goal) for point in sweep.finished]
    stopped = [factor * point.mean(goal) for point in sweep.of("stopped")]
    if len(finished) < 2 or not stopped or sweep.goals[goal].mode == "min":
        return None
    floor = min(finished) - max((max(finished) - min(finished)) / 2, LEAST_BELOW)
    return floor if min(stopped) < floor else None


def _over_axis(sweep: Sweep, axis: Axis, points: Sequence[Point], goal: int, floor: float | None) -> Scatter:
    ticks = _ticks(axis, [point.values[axis.name] for point in points])
    column = sweep.goals[goal].column
    means = {point.label: column.factor * point.mean(goal) for point in points}
    best = sweep.finished[0] if sweep.finished and goal == 0 and len(sweep.goals) == 1 else None
    stopped = [point for point in points if point.state == "stopped"]
    below = [point for point in stopped if floor is not None and means[point.label] < floor]
    finished = [point for point in points if point.state == "finished"]
    groups: list[tuple[str, Look, list[Point]]] = [
        ("stopped early", "stopped", [point for point in stopped if point not in below]),
        ("stopped early, below the axis", "below", below),
        ("finished", "finished", [point for point in finished if point is not best]),
        ("best", "best", [point for point in finished if point is best]),
    ]
    x = {point.label: _position(axis, point, ticks) for point in points}
    y = {label: mean if floor is None else max(mean, floor) for label, mean in means.items()}
    spread = _spread({label: x[label] for label in x if best is None or label != best.label}, y)
    log = axis.log and not ticks
    return Scatter(
        "",
        axis.name,
        column.heading,
        tuple(
            _dots(group, label, look, {**x, **(spread if ticks else {})}, y, goal, column.factor)
            for label, look, group in groups
            if group
        ),
        _trend([(x[p.label], means[p.label]) for p in finished], log=log, ticks=ticks),
        tuple(map(_tick, ticks)),
        log,
        floor,
        None if ticks or axis.low is None or axis.high is None else (axis.low, axis.high),
    )


def _dots(
    points: Sequence[Point],
    label: str,
    look: Look,
    x: Mapping[str, float],
    y: Mapping[str, float],
    goal: int,
    factor: float,
) -> Dots:
    sds = [None if look == "below" else s.sd if (s := p.summary(goal)) else None for p in points]
    return Dots(
        label,
        look,
        tuple(x[point.label] for point in points),
        tuple(y[point.label] for point in points),
        tuple(None if sd is None else factor * sd for sd in sds),
    )


def _ticks(axis: Axis, values: Sequence[Any]) -> list[Any]:
    """The values that get a place of their own on x; none where x is continuous."""
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if axis.values is not None and (len(axis.values) <= MAX_TICKS or not numeric):
        return list(axis.values)
    few = sorted(set(values)) if numeric else list(dict.fromkeys(values))
    if not numeric or (all(isinstance(v, int) for v in values) and len(few) <= MAX_TICKS and not axis.log):
        return few
    return []


def _tick(value: Any) -> str:
    """A value under an axis; of a folder or a model of the hub the last part, cut where it is long."""
    text = PurePath(value).name if isinstance(value, str) else short(value, 3)
    return text if len(text) <= 14 else f"{text[:13]}…"


def _position(axis: Axis, point: Point, ticks: Sequence[Any]) -> float:
    value = point.values[axis.name]
    return float(ticks.index(value) if ticks else value)


def _spread(x: Mapping[str, float], y: Mapping[str, float]) -> dict[str, float]:
    """`x`, where dots at one place and of about one height step aside, so that each can be seen."""
    near = 0.04 * (max(y.values()) - min(y.values()))
    placed: dict[float, list[tuple[float, float]]] = {}
    spread = {}
    for label in sorted(x, key=lambda label: y[label]):
        there = placed.setdefault(x[label], [])
        free = (
            step
            for step in _STEPS
            if all(abs(step - other) > 0.05 or abs(y[label] - height) > near for other, height in there)
        )
        step = next(free, _STEPS[len(there) % len(_STEPS)])
        there.append((step, y[label]))
        spread[label] = x[label] + step
    return spread


def _trend(pairs: Sequence[tuple[float, float]], *, log: bool, ticks: Sequence[Any]) -> Trend | None:
    """Means at each value, or in bins of equal count where there are many values; None for too few dots."""
    places = sorted({x for x, _ in pairs})
    if ticks or len(places) <= MAX_TICKS:
        groups = [[(x, y) for x, y in pairs if x == place] for place in places]
    else:
        ordered, count = sorted(pairs), min(6, len(pairs) // 4)
        cuts = [round(i * len(ordered) / max(1, count)) for i in range(count + 1)]
        groups = [ordered[a:b] for a, b in pairwise(cuts)]
    if len(groups) < 2 or len(pairs) < 2 * len(groups):
        return None
    ys = [[y for _, y in group] for group in groups]
    centre = _geometric if log else fmean
    return Trend(
        tuple(centre([x for x, _ in group]) for group in groups),
        tuple(map(fmean, ys)),
        tuple(stdev(y) / math.sqrt(len(y)) if len(y) > 1 else None for y in ys),
        joined=not any(isinstance(tick, str | bool) for tick in ticks),
    )


def _geometric(values: Sequence[float]) -> float:
    return math.exp(fmean(map(math.log, values)))


def _turn(panel: Scatter, better: Callable[..., tuple[float, float]]) -> str:
    """Where the mean is best."""
    if panel.trend is None:
        return ""
    y, x = better(zip(panel.trend.y, panel.trend.x, strict=True))
    where = panel.ticks[round(x)] if panel.ticks else short(x, 3)
    return f"{y:.4g} at {panel.x_label} = {where}"


def _over_caption(
    sweep: Sweep, shown: Sequence[Point], panels: Sequence[Scatter], floor: float | None
) -> str:
    stopped = sum(point.state == "stopped" for point in shown)
    several = len(sweep.seeds) > 1
    kind = f"the mean of {len(sweep.seeds)} seeds, its bar ± sd" if several else "one run"
    texts = [f"Each dot is a point, {kind}."]
    if stopped:
        below = " (an arrow: it lies below the axis)" if floor is not None else ""
        texts.append(f"Hollow: the {stopped} points that were stopped early, at their last value{below}.")
    trends = [(panel.trend, panel.ticks) for panel in panels if panel.trend]
    if trends:
        binned = not all(ticks for _, ticks in trends)
        where = "at each value, on a continuous axis in bins of equally many" if binned else "at each value"
        texts.append(
            f"Line: mean ± standard error of the finished points {where}; the other settings vary along"
            + (", what was stopped is not in it." if stopped else ".")
        )
    return " ".join(texts)


NODES_FIGURE = "nodes_and_trials"
_BEGINS = ("trial_start", "trial_retry")
_ENDS = ("trial_end", "trial_broke_off")
_ALL_END = ("start", "resume", "interrupted", "error", "end")


def nodes_figure(events: Sequence[Mapping[str, Any]]) -> FigureData[Panel]:
    """Nodes (the head among them) and trials under way, over the minutes since the sweep's first start.

    Args:
        events: of the sweep's events.jsonl, in order.
    Raises:
        NothingToDraw: the sweep was never on more than one node.
    """
    nodes, trials = node_steps(events), trial_steps(events)
    most = int(max((count for _, count in nodes), default=0))
    if most < 2:
        raise NothingToDraw("nodes over time are left out: the sweep ran on one machine")
    end = max(at for at, _ in [*nodes, *trials])
    panels = tuple(
        Panel("", "minutes", heading, (), (_stairs(steps, end),))
        for heading, steps in (("nodes", nodes), ("trials running", trials))
    )
    busiest = int(max((count for _, count in trials), default=0))
    return FigureData(
        NODES_FIGURE,
        panels,
        "Nodes of the cluster, its head among them, and trials under way, as events.jsonl has them.",
        error_bars=False,
        whole_y=True,
        alt=f"The cluster had up to {most} nodes, and up to {busiest} trials ran at once.",
    )


def node_steps(events: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(minutes, nodes from then on) at each change."""
    return [
        (at, float(event["nodes"]))
        for at, event in _timed(events)
        if event["event"] in ("node_came", "node_gone")
    ]


def trial_steps(events: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(minutes, trials running from then on) at each change; whatever ends the sweep ends them all."""
    running: set[str] = set()
    steps = []
    for at, event in _timed(events):
        if event["event"] in _BEGINS:
            running.add(event["trial"])
        elif event["event"] in _ENDS:
            running.discard(event["trial"])
        elif event["event"] in _ALL_END:
            running.clear()
        else:
            continue
        steps.append((at, float(len(running))))
    return steps


def _timed(events: Sequence[Mapping[str, Any]]) -> list[tuple[float, Mapping[str, Any]]]:
    """Each event with its minutes since the first."""
    times = [datetime.fromisoformat(event["time"]) for event in events]
    return [((at - times[0]).total_seconds() / 60, event) for at, event in zip(times, events, strict=True)]


def _stairs(steps: Sequence[tuple[float, float]], end: float) -> Trace:
    """A line that keeps each value until the next."""
    xs, ys = [0.0], [0.0]
    for at, value in steps:
        xs += [at, at]
        ys += [ys[-1], value]
    return Trace("", (*xs, end), (*ys, ys[-1]), main=True)
