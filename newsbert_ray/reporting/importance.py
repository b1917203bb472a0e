"""How much each varied setting mattered: PED-ANOVA (Watanabe et al. 2023) as Optuna computes it, with an
interval and with what chance alone would give. Loads Optuna only to compute."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from newsbert_ray.reporting.panels import Bar, Bars, FigureData, NothingToDraw
from newsbert_ray.reporting.sweeps import Axis, Point, Sweep

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

IMPORTANCE_FIGURE = "importances"
LEAST_POINTS = 10
"""Fewer points say nothing about several settings."""
LEAST_TOP = 5
"""The best points are told from the others; fewer of them than this are noise."""
REPEATS = 100


@dataclass(frozen=True)
class Importance:
    """Of one setting: its share of the whole, 5th and 95th percentile over resampled points, and the 95th
    percentile where the values are shuffled among the points."""

    name: str
    share: float
    low: float
    high: float
    chance: float


@dataclass(frozen=True)
class Importances:
    """For one goal, the most important first. The `top` of the `points`, equals included, were told
    from the rest."""

    found: tuple[Importance, ...]
    points: int
    top: int


class TooFewPoints(NothingToDraw):
    """Too few points to say which settings matter."""


def importances_of(sweep: Sweep, *, goal: int = 0) -> Importances:
    """How much each varied setting decides whether a point is among the best.

    Points that were stopped early count as behind all finished ones: that is why they were stopped. Without
    them a setting whose bad values were all stopped would seem not to matter.

    Raises:
        TooFewPoints: fewer than LEAST_POINTS, or fewer than LEAST_TOP finished.
        NothingToDraw: fewer than two settings varied.
    """
    finished, stopped = sweep.finished, sweep.of("stopped")
    count = len(finished) + len(stopped)
    if count < LEAST_POINTS or len(finished) < LEAST_TOP:
        raise TooFewPoints(
            f"too few points to say which settings mattered: {len(finished)} finished, {len(stopped)} were "
            f"stopped early; {LEAST_POINTS} are needed, {LEAST_TOP} of them finished"
        )
    sign = 1.0 if sweep.goals[goal].mode == "max" else -1.0
    scores = [(point, sign * point.mean(goal)) for point in finished]
    last = min(score for _, score in scores)
    # Of those that were stopped the later and better ones first: they must not be equals.
    stopped.sort(key=lambda p: (max(t.epoch for t in p.trials), sign * p.mean(goal)), reverse=True)
    scores += [(point, last - rank) for rank, point in enumerate(stopped, 1)]
    axes = [axis for axis in sweep.axes if len({repr(p.values.get(axis.name)) for p, _ in scores}) > 1]
    if len(axes) < 2:
        raise NothingToDraw("fewer than two settings varied over the points: there is nothing to compare")
    top = min(len(finished), max(LEAST_TOP, math.ceil(count / 10)))
    return _compare(axes, scores, top)


def _compare(axes: Sequence[Axis], scores: Sequence[tuple[Point, float]], top: int) -> Importances:
    """The estimate, its bootstrap and its shuffles; always the same for the same points."""
    chance = random.Random(0)
    real = _divergences(axes, scores, top)
    whole = sum(real.values()) or 1.0
    resampled: dict[str, list[float]] = {name: [] for name in real}
    shuffled: dict[str, list[float]] = {name: [] for name in real}
    for _ in range(REPEATS):
        again = _divergences(axes, [chance.choice(scores) for _ in scores], top)
        total = sum(again.values()) or 1.0
        values = [score for _, score in scores]
        chance.shuffle(values)
        mixed = _divergences(axes, [(p, v) for (p, _), v in zip(scores, values, strict=True)], top)
        for name in real:
            resampled[name].append(again.get(name, 0.0) / total)
            shuffled[name].append(mixed.get(name, 0.0) / whole)
    found = [
        Importance(
            name,
            value / whole,
            _percentile(resampled[name], 0.05),
            _percentile(resampled[name], 0.95),
            _percentile(shuffled[name], 0.95),
        )
        for name, value in real.items()
    ]
    found.sort(key=lambda importance: -importance.share)
    least = sorted((score for _, score in scores), reverse=True)[top - 1]
    return Importances(tuple(found), len(scores), sum(score >= least for _, score in scores))


def _percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def _divergences(axes: Sequence[Axis], scores: Sequence[tuple[Point, float]], top: int) -> dict[str, float]:
    """How far the best points' distribution lies from that of all, by setting."""
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    ranges = {axis.name: _distribution(axis, [point for point, _ in scores]) for axis in axes}
    for point, score in scores:
        own = {name: value for name, value in point.values.items() if name in ranges}
        study.add_trial(
            optuna.create_trial(params=own, distributions={name: ranges[name] for name in own}, value=score)
        )
    evaluator = PedAnovaImportanceEvaluator(target_quantile=top / len(scores))
    with warnings.catch_warnings():
        # Optuna calls shares that are not made to sum to 1 experimental, and says so each time.
        warnings.simplefilter("ignore")
        found = get_param_importances(study, evaluator=evaluator, normalize=False)
    return {axis.name: float(found.get(axis.name, 0.0)) for axis in axes}


def _distribution(axis: Axis, points: Sequence[Point]) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.values is not None or axis.low is None or axis.high is None:
        seen = [point.values[axis.name] for point in points if axis.name in point.values]
        return CategoricalDistribution(list(axis.values or dict.fromkeys(seen)))
    if axis.integer:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log, step=int(axis.step or 1))
    return FloatDistribution(axis.low, axis.high, log=axis.log, step=axis.step)


def importance_figure(sweep: Sweep) -> FigureData[Bars]:
    """A bar for each varied setting, a panel for each goal.

    Raises:
        TooFewPoints, NothingToDraw: as importances_of.
    """
    panels, leading = [], []
    for index, goal in enumerate(sweep.goals):
        found = importances_of(sweep, goal=index)
        panels.append(
            Bars(
                goal.column.heading if len(sweep.goals) > 1 else "",
                "share of all importance",
                tuple(Bar(i.name, i.share, i.low, i.high, i.chance) for i in found.found),
                value_label="importance",
                interval_label="90 % of 100 resamplings",
                chance_label="chance: 95 % of 100 shufflings stay below",
            )
        )
        leading.append(f"{found.found[0].name} ({found.found[0].share:.0%})")
    stopped = len(sweep.of("stopped"))
    behind = f", {stopped} stopped early that count as behind the finished ones" if stopped else ""
    clear = [bar.name for panel in panels for bar in panel.bars if bar.chance and bar.value > bar.chance]
    return FigureData(
        IMPORTANCE_FIGURE,
        tuple(panels),
        f"PED-ANOVA on {found.points} points{behind}: how far the settings of the best {found.top} lie from "
        "those of all. A bar that does not pass the mark of chance cannot be told from no influence.",
        wide=True,
        alt=f"Importance of each setting. First: {', '.join(leading)}. "
        + (f"Above chance: {', '.join(dict.fromkeys(clear))}." if clear else "None is above chance."),
    )
