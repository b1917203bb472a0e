"""A sweep -> each goal over each varied setting, with its uncertainty: pure and comparable."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import PurePath
from statistics import fmean, stdev
from typing import Any

from newsbert_ray.reporting.figures import short
from newsbert_ray.reporting.panels import Dots, FigureData, Look, NothingToDraw, Scatter, Trend
from newsbert_ray.reporting.sweeps import Axis, Point, Sweep, listed

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
