"""The figures of a sweep: learning curves, Pareto front, a goal over each setting, nodes over time. Those
that cannot be drawn raise NothingToDraw, as in `figures`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import PurePath
from statistics import fmean, geometric_mean
from typing import Any, Literal

from newsbert_ray.methods import TASKS
from newsbert_ray.record import RunRecord
from newsbert_ray.reporting import figures
from newsbert_ray.reporting.figures import DotLook, FigureData, Line, LineLook, Make, NothingToDraw, Panel
from newsbert_ray.reporting.records import flat_settings
from newsbert_ray.reporting.statistics import cost_figure, importance_figure
from newsbert_ray.reporting.sweep_data import Axis, Goal, Point, Sweep, listed
from newsbert_ray.reporting.tables import short, summarise
from newsbert_ray.telemetry import read_events

BEST = 4
"""Points whose learning curves are coloured."""
MAX_LETTERS = 95
"""Letters of a legend's line that fit the width of a page."""
MAX_TICKS = 9
"""A setting with more values gets a continuous axis."""
MIN_BELOW = 3.0
"""Per cent below the finished points that are always drawn."""
_SHIFTS = (0.0, 0.09, -0.09, 0.18, -0.18, 0.27, -0.27, 0.36, -0.36)
"""Shifts of dots that would hide each other; neighbouring positions are 1 apart."""
Steps = list[tuple[float, float]]
"""(minutes since the first event, count from then on)."""


def sweep_figures(sweep: Sweep) -> dict[str, Make]:
    records = sweep.records
    is_grid = sweep.space["search"]["sampler"] == "grid"  # other samplers' points would be a line each
    makes = figures.runs_figures(records) if is_grid else {}
    makes["pareto_front"] = partial(pareto_front, sweep)
    for goal in range(len(sweep.goals)):
        makes[_over_name(goal)] = partial(over_settings, sweep, goal=goal)
    makes |= {
        "importances": partial(importance_figure, sweep),
        "learning_curves": partial(learning_curves, sweep),
        "seconds_by_part": partial(cost_figure, sweep),
        "nodes_and_trials": lambda: nodes_figure(read_events(sweep.folder)),
        "quality_kept": lambda: figures.quality_figure(best_at_each_depth(sweep), chosen=True),
        "block_gradients": partial(figures.blocks_figure, records),
    }
    if sweep.finished and sweep.task is TASKS["topics"]:
        best = sweep.folder / "trials" / sweep.finished[0].trials[0].name
        makes["map_of_titles"] = partial(figures.map_figure, best)
    return makes


def _over_name(goal: int) -> str:
    return "metric_over_settings" if goal == 0 else f"metric_over_settings_{goal + 1}"


def learning_curves(sweep: Sweep) -> FigureData[Panel]:
    """The first goal over epochs (or the task's first metric): the best points in colour, others grey."""
    goal = sweep.goals[0]
    if not goal.metric.startswith("validation."):
        goal = Goal(metric=f"validation.student.{sweep.task.primary.name}", mode="max")
    best = sweep.finished[:BEST]
    names = [figures.describe(point.values, 3) or "no setting" for point in best]
    if max(map(len, names), default=0) > MAX_LETTERS:
        names = [f"rank {rank} of the table" for rank in range(1, len(best) + 1)]
    lines, others = list[Line](), list[Line]()
    for point, name in zip(best, names, strict=True):
        lines += figures.mean_curve([trial.entries for trial in point.trials], goal.metric, name)
    teacher = goal.metric.replace(".student.", ".teacher.")
    if best and teacher != goal.metric:
        runs = [trial.entries for trial in best[0].trials]
        lines += figures.mean_curve(runs, teacher, "teacher of the best", "reference")
    for trial in (t for t in sweep.trials if all(t not in point.trials for point in best)):
        kind: tuple[str, LineLook] = ("other trials", "run")
        if trial.state == "stopped":
            kind = ("stopped early", "cross")
        others += figures.mean_curve([trial.entries], goal.metric, *kind)
    if not lines and not others:
        raise NothingToDraw("no trial has been evaluated yet")
    if max(len(line.x) for line in (*lines, *others)) < 2:
        raise NothingToDraw("learning curves are left out: no trial was evaluated twice")
    seeds = f", mean of {len(sweep.seeds)} seeds" if len(sweep.seeds) > 1 else ""
    texts = [f"In colour: the best {len(best)} points{seeds}." if best else "No point has finished yet."]
    texts += [f"Grey: {len(others)} other trials, each one run."] if others else []
    if ended := sum(line.look == "cross" for line in others):
        texts.append(f"Crosses: where {ended} of them were stopped early.")
    alt = f"Learning curves: {goal.column.heading} over epochs. "
    alt += f"The best point reaches {max(lines[0].y):.4g}." if lines else ""
    panel = Panel("", "epoch", goal.column.heading, (*lines, *others))
    return FigureData("learning_curves", (panel,), " ".join(texts), whole_x=True, wide=True, alt=alt)


def best_at_each_depth(sweep: Sweep) -> list[RunRecord]:
    """Records of the best finished point, by the sweep's first goal, of each method at each depth."""
    best: dict[tuple[str, int], list[RunRecord]] = {}
    for records in (point.records for point in sweep.finished if point.records):
        flat = flat_settings(records[0])
        best.setdefault((str(flat["method"]), int(flat[figures.DEPTH])), records)
    return [record for records in best.values() for record in records]


def pareto_front(sweep: Sweep) -> FigureData[Panel]:
    """Finished points over two goals, the Pareto front on a step line; a panel for each further goal."""
    if len(sweep.goals) < 2:
        raise NothingToDraw("one goal makes no front")
    if not sweep.finished:
        raise NothingToDraw("no point has finished yet")
    front = sorted(sweep.front, key=lambda point: point.mean(1))
    groups: list[tuple[str, DotLook, list[Point]]] = [
        ("beaten by another point", "finished", [p for p in sweep.finished if p not in front]),
        ("Pareto front", "front", front),
    ]
    first = sweep.goals[0].column
    panels = []
    for index, goal in list(enumerate(sweep.goals))[1:]:
        steps: Literal["before", "after"] = "before" if goal.mode == "max" else "after"
        lines = []
        for label, look, points in groups:
            x = tuple(goal.column.factor * point.mean(index) for point in points)
            y = tuple(first.factor * point.mean() for point in points)
            stairs = steps if look == "front" and len(sweep.goals) == 2 else ""
            line = Line(label, x, y, _spreads(points, first.factor), look=look, stairs=stairs)
            lines += [line] if points else []
        panels.append(Panel("", goal.column.heading, first.heading, tuple(lines)))
    bars = ", bars ± sd over seeds" if len(sweep.seeds) > 1 else ""
    caption = (
        f"Each dot is a finished point{bars}. On the Pareto front: no other point is as good in every goal "
        "and better in one."
    )
    goals = listed([goal.column.heading for goal in sweep.goals])
    alt = f"{len(front)} of {len(sweep.finished)} points lie on the Pareto front of {goals}."
    return FigureData("pareto_front", tuple(panels), caption, share_y=True, alt=alt)


def over_settings(sweep: Sweep, *, goal: int = 0) -> FigureData[Panel]:
    """A goal over each setting with two values so far: a dot for each point, and the mean over the dots."""
    shown = [p for p in sweep.of("finished", "stopped") if p.summary(goal)]
    if not sweep.axes or not shown:
        raise NothingToDraw("nothing varies" if not sweep.axes else "no point has a value yet")
    column = sweep.goals[goal].column
    floor = _floor(sweep, goal)
    axes = sweep.varied(shown) or [a for a in sweep.axes if any(a.name in p.values for p in shown)]
    panels = tuple(_over_axis(sweep, axis, shown, goal, floor) for axis in axes)
    better = max if sweep.goals[goal].mode == "max" else min
    trends = []
    for panel, trend in ((panel, panel.trend) for panel in panels if panel.trend):
        y, x = better(zip(trend.y, trend.x, strict=True))
        where = panel.ticks[round(x)] if panel.ticks else short(x, 3)
        trends.append(f"{y:.4g} at {panel.x_label} = {where}")
    alt = f"{column.heading} of {len(shown)} points over {listed([p.x_label for p in panels])}."
    alt += f" Best mean: {'; '.join(trends)}." if trends else ""
    name, caption = _over_name(goal), _over_caption(sweep, shown, panels, floor)
    return FigureData(name, panels, caption, share_y=True, wide=len(panels) > 1, alt=alt)


def _floor(sweep: Sweep, goal: int) -> float | None:
    """Lower end of y that leaves enough height to the finished points; None where all points fit."""
    factor = sweep.goals[goal].column.factor
    finished = [factor * point.mean(goal) for point in sweep.finished]
    stopped = [factor * point.mean(goal) for point in sweep.of("stopped")]
    if len(finished) < 2 or not stopped or sweep.goals[goal].mode == "min":
        return None
    floor = min(finished) - max((max(finished) - min(finished)) / 2, MIN_BELOW)
    return floor if min(stopped) < floor else None


def _over_axis(sweep: Sweep, axis: Axis, shown: Sequence[Point], goal: int, floor: float | None) -> Panel:
    points = [point for point in shown if axis.name in point.values]
    ticks = _ticks(axis, [point.values[axis.name] for point in points])
    column = sweep.goals[goal].column
    means = {point.label: column.factor * point.mean(goal) for point in points}
    best = sweep.finished[0] if sweep.finished and goal == 0 and len(sweep.goals) == 1 else None
    stopped = [point for point in points if point.state == "stopped"]
    below = [point for point in stopped if floor is not None and means[point.label] < floor]
    finished = [point for point in points if point.state == "finished"]
    groups: list[tuple[str, DotLook, list[Point]]] = [
        ("stopped early", "stopped", [point for point in stopped if point not in below]),
        ("stopped early, below the axis", "below", below),
        ("finished", "finished", [point for point in finished if point is not best]),
        ("best", "best", [point for point in finished if point is best]),
    ]
    values = {point.label: point.values[axis.name] for point in points}
    x = {label: float(ticks.index(value) if ticks else value) for label, value in values.items()}
    y = {label: mean if floor is None else max(mean, floor) for label, mean in means.items()}
    log = axis.log and not ticks
    trend = _trend([(x[p.label], means[p.label]) for p in finished], log=log, ticks=ticks)
    if ticks:
        x |= _shifted({label: x[label] for label in x if best is None or label != best.label}, y)
    lines = []
    for label, look, group in groups:
        xs, ys = (tuple(place[point.label] for point in group) for place in (x, y))
        spreads = () if look == "below" else _spreads(group, column.factor, goal)
        lines += [Line(label, xs, ys, spreads, look=look)] if group else []
    x_range = None if ticks or axis.low is None or axis.high is None else (axis.low, axis.high)
    names = tuple(map(_tick, ticks))
    return Panel("", axis.name, column.heading, tuple(lines), trend, names, log, floor, x_range)


def _spreads(points: Sequence[Point], factor: float, goal: int = 0) -> tuple[float | None, ...]:
    summaries = [point.summary(goal) for point in points]
    return tuple(None if s is None or s.sd is None else factor * s.sd for s in summaries)


def _ticks(axis: Axis, values: Sequence[Any]) -> list[Any]:
    """The values that get a position of their own on x; none where x is continuous."""
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if axis.values is not None and (len(axis.values) <= MAX_TICKS or not numeric):
        return list(axis.values)
    if not numeric:
        return list(dict.fromkeys(values))
    few = sorted(set(values))
    whole = all(isinstance(v, int) for v in values)
    return few if whole and len(few) <= MAX_TICKS and not axis.log else []


def _tick(value: Any) -> str:
    """A value below an axis: of a folder or a Hub name the last part, cut where it is long."""
    text = PurePath(value).name if isinstance(value, str) else short(value, 3)
    return text if len(text) <= 14 else f"{text[:13]}…"


def _shifted(x: Mapping[str, float], y: Mapping[str, float]) -> dict[str, float]:
    """`x`, with dots at one position and of about one height shifted so that each can be seen."""
    near = 0.04 * (max(y.values()) - min(y.values()))
    placed: dict[float, list[tuple[float, float]]] = {}
    shifted = {}
    for label in sorted(x, key=lambda label: y[label]):
        others = placed.setdefault(x[label], [])
        taken = [other for other, height in others if abs(y[label] - height) <= near]
        free = (shift for shift in _SHIFTS if all(abs(shift - other) > 0.05 for other in taken))
        shift = next(free, _SHIFTS[len(others) % len(_SHIFTS)])
        others.append((shift, y[label]))
        shifted[label] = x[label] + shift
    return shifted


def _trend(pairs: Sequence[tuple[float, float]], *, log: bool, ticks: Sequence[Any]) -> Line | None:
    """Means at each value, or in bins of equal count where there are many values; None for too few dots."""
    positions = sorted({x for x, _ in pairs})
    if ticks or len(positions) <= MAX_TICKS:
        groups = [[(x, y) for x, y in pairs if x == position] for position in positions]
    else:
        ordered, count = sorted(pairs), min(6, len(pairs) // 4)
        cuts = [round(i * len(ordered) / max(1, count)) for i in range(count + 1)]
        groups = [ordered[a:b] for a, b in pairwise(cuts)]
    if len(groups) < 2 or len(pairs) < 2 * len(groups):
        return None
    xs, ys = zip(*(zip(*group, strict=True) for group in groups), strict=True)
    x = tuple(geometric_mean(values) if log else fmean(values) for values in xs)
    summaries = list(map(summarise, ys))
    errors = tuple(None if s.sd is None else s.sd / math.sqrt(s.n) for s in summaries)
    joined = not any(isinstance(tick, str | bool) for tick in ticks)
    look: LineLook = "trend" if joined else "means"
    return Line("mean ± standard error", x, tuple(s.mean for s in summaries), errors, look=look)


def _over_caption(sweep: Sweep, shown: Sequence[Point], panels: Sequence[Panel], floor: float | None) -> str:
    kind = f"the mean of {len(sweep.seeds)} seeds, its bar ± sd" if len(sweep.seeds) > 1 else "one run"
    texts = [f"Each dot is a point, {kind}."]
    if stopped := sum(point.state == "stopped" for point in shown):
        below = " (an arrow: it lies below the axis)" if floor is not None else ""
        texts.append(f"Hollow: the {stopped} points that were stopped early, at their last value{below}.")
    ticks = [panel.ticks for panel in panels if panel.trend]
    if ticks:
        bins = "" if all(ticks) else ", on a continuous axis in bins of equally many points"
        texts.append(
            f"Line: mean ± standard error of the finished points at each value{bins}; the other settings "
            + ("vary too, and stopped points are not included." if stopped else "vary too.")
        )
    return " ".join(texts)


def nodes_figure(events: Sequence[Mapping[str, Any]]) -> FigureData[Panel]:
    """Nodes (with the head) and running trials, over the minutes since the first of a sweep's events."""
    nodes, trials = node_and_trial_steps(events)
    most = int(max((count for _, count in nodes), default=0))
    if most < 2:
        raise NothingToDraw("nodes over time are left out: the sweep ran on one machine")
    end = max(minute for minute, _ in [*nodes, *trials])
    panels = []
    for heading, steps in (("nodes", nodes), ("trials running", trials)):
        x, y = zip((0.0, 0.0), *steps, (end, steps[-1][1] if steps else 0.0), strict=True)
        panels.append(Panel("", "minutes", heading, (Line("", x, y, look="plain", stairs="after"),)))
    busiest = int(max((count for _, count in trials), default=0))
    caption = "Nodes of the cluster, including its head, and running trials, from events.jsonl."
    alt = f"The cluster had up to {most} nodes, and up to {busiest} trials ran at once."
    return FigureData("nodes_and_trials", tuple(panels), caption, whole_y=True, alt=alt)


def node_and_trial_steps(events: Sequence[Mapping[str, Any]]) -> tuple[Steps, Steps]:
    """The nodes, and the trials running, from each change on; whatever ends the sweep ends all trials."""
    running: set[str] = set()
    nodes, trials = Steps(), Steps()
    for event in events:
        kind, times = event["event"], [datetime.fromisoformat(e["time"]) for e in (event, events[0])]
        minute = (times[0] - times[1]).total_seconds() / 60
        if kind in ("node_came", "node_gone"):
            nodes.append((minute, float(event["nodes"])))
        if kind in ("trial_start", "trial_retry"):
            running.add(event["trial"])
        elif kind in ("trial_end", "trial_broke_off"):
            running.discard(event["trial"])
        elif kind in ("start", "resume", "interrupted", "error", "end"):
            running.clear()
        else:
            continue
        trials.append((minute, float(len(running))))
    return nodes, trials
