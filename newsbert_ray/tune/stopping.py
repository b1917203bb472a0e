"""Early stopping: Ray's schedulers, called with trial names, so that a live sweep, a resume and a simulation
on recorded curves all decide alike; and that simulation. Runs no trial."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from newsbert_ray.reporting.sweep_data import TRIALS
from newsbert_ray.tune.space import SearchSpace
from newsbert_ray.tune.trials import Curve, trial_curve

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler

EPOCH = "epoch"

SIMULATIONS = 20
"""Random orders of the trials over which a saving is averaged."""


class _NamedTrial:
    """A trial as far as Ray's schedulers use it."""

    def __init__(self, name: str) -> None:
        self.trial_id = name


class EarlyStopping:
    """Decides which trials of a sweep end early. Keeps the rungs of all trials it has seen, by name.

    A trial is never stopped at its last epoch: that is already paid for.
    """

    def __init__(self, space: SearchSpace, *, epochs: int) -> None:
        """Decide by the first goal of `space`; `epochs`: the most that a trial may have."""
        self.reason = space.scheduler
        self._metric = space.metric
        self._scheduler = _ray_scheduler(space, epochs=epochs)
        self._trials: dict[str, Any] = {}
        # The median rule asks for waiting trials, in order to pause one; our trials are never paused.
        self._controller: Any = SimpleNamespace(get_live_trials=list)

    def should_stop(self, name: str, result: Mapping[str, Any], *, epochs: int) -> bool:
        """Whether the trial `name` ends with this evaluation.

        Args:
            result: holds `epoch` (epochs done) and the metric, at least.
            epochs: how many the trial has in all.
        """
        if self._scheduler is None or EPOCH not in result or self._metric not in result:
            return False
        if name not in self._trials:
            self._trials[name] = _NamedTrial(name)
            self._scheduler.on_trial_add(self._controller, self._trials[name])
        decision = self._scheduler.on_trial_result(self._controller, self._trials[name], dict(result))
        return decision == "STOP" and result[EPOCH] < epochs

    def load_curve(self, name: str, curve: Iterable[tuple[float, float]]) -> None:
        """Take in what a trial had reported before a resume: (epoch, metric) in order."""
        for epoch, value in curve:
            self.should_stop(name, {EPOCH: epoch, self._metric: value}, epochs=0)


def _ray_scheduler(space: SearchSpace, *, epochs: int) -> TrialScheduler | None:
    if space.scheduler == "none":
        return None
    from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule

    options: dict[str, Any] = {"time_attr": EPOCH, "metric": space.metric, "mode": space.goals[0].mode}
    grace = min(space.stopping.grace, epochs)
    if space.scheduler == "median":
        return MedianStoppingRule(**options, grace_period=grace)
    return AsyncHyperBandScheduler(
        **options,
        grace_period=grace,
        max_t=max(epochs, grace),
        reduction_factor=space.stopping.factor,
        stop_last_trials=False,
    )


@dataclass(frozen=True)
class RecordedTrial:
    """A trial that was trained to its end: (epochs done, metric) at each evaluation, and its final value."""

    name: str
    curve: Curve
    value: float


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a simulated trial; `cost`: epochs since the evaluation before."""

    trial: RecordedTrial
    epoch: float
    value: float
    cost: float
    stopped: bool
    finished: bool


def simulate(
    next_trial: Callable[[], RecordedTrial | None], space: SearchSpace, *, slots: int
) -> Iterator[Evaluation]:
    """Every evaluation of recorded trials, in the order in which `slots` at once would make them.

    An epoch takes the same time in every trial. `next_trial` is called whenever a slot is free.
    """
    early: EarlyStopping | None = None
    running: list[tuple[float, int, int, RecordedTrial]] = []  # due, order, index in the curve, trial
    order, clock = itertools.count(), 0.0
    while True:
        while len(running) < slots and (trial := next_trial()) is not None:
            heapq.heappush(running, (clock + trial.curve[0][0], next(order), 0, trial))
            early = early or EarlyStopping(space, epochs=round(trial.curve[-1][0]))
        if not running or early is None:
            return
        clock, _, index, trial = heapq.heappop(running)
        (epoch, value), last = trial.curve[index], index + 1 == len(trial.curve)
        before = trial.curve[index - 1][0] if index else 0.0
        result = {EPOCH: epoch, space.metric: value}
        stopped = early.should_stop(trial.name, result, epochs=round(trial.curve[-1][0]))
        if not last and not stopped:
            due = clock + trial.curve[index + 1][0] - epoch
            heapq.heappush(running, (due, next(order), index + 1, trial))
        yield Evaluation(trial, epoch, value, epoch - before, stopped, last and not stopped)


@dataclass(frozen=True)
class Saving:
    """What remains with early stopping: the share of all epochs, the share of trials that reach their end,
    and what the estimate is based on."""

    epochs: float
    finished: float
    source: str


def estimate_saving(
    space: SearchSpace, epochs: Sequence[int], *, slots: int, curves: Sequence[Curve] | None = None
) -> Saving:
    """What the space's early stopping leaves of trials of so many `epochs`: the mean over SIMULATIONS orders.

    Recorded curves are assigned at random; one that is too short keeps its last value. Without any, every
    trial keeps its rank from the first epoch to the last, and all orders of the ranks are equally likely.
    """
    generator = random.Random(space.search.seed)
    spent, finished = 0.0, 0
    for _ in range(SIMULATIONS):
        next_trial = partial(next, iter(_random_trials(epochs, curves or (), generator)), None)
        for evaluation in simulate(next_trial, space, slots=slots):
            spent += evaluation.cost
            finished += evaluation.finished
    source = "assuming that trials keep their rank from the first epoch to the last"
    if curves:
        source = f"simulated on {len(curves)} recorded curves in random order"
    return Saving(spent / (SIMULATIONS * sum(epochs)), finished / (SIMULATIONS * len(epochs)), source)


def recorded_curves(folder: str | Path, metric: str) -> list[Curve]:
    """The learning curves of an earlier sweep's trials, those stopped early included."""
    curves = [trial_curve(path, metric) for path in sorted((Path(folder) / TRIALS).glob("*"))]
    return [curve for curve in curves if curve]


def _random_trials(
    epochs: Sequence[int], curves: Sequence[Curve], generator: random.Random
) -> list[RecordedTrial]:
    """A random curve for each trial, at whole epochs."""
    if not curves:
        drawn: Sequence[Curve] = [[(1.0, generator.random())] for _ in epochs]
    elif len(curves) >= len(epochs):
        drawn = generator.sample(curves, len(epochs))
    else:
        drawn = generator.choices(curves, k=len(epochs))
    trials = []
    for number, (last, curve) in enumerate(zip(epochs, drawn, strict=True)):
        values = [(float(epoch), _value_at(curve, epoch)) for epoch in range(1, last + 1)]
        trials.append(RecordedTrial(f"trial {number}", values, values[-1][1]))
    return trials


def _value_at(curve: Curve, epoch: int) -> float:
    """The last value by the end of `epoch`; before the first evaluation, that one's value."""
    known = [value for at, value in curve if at <= epoch]
    return known[-1] if known else curve[0][1]
