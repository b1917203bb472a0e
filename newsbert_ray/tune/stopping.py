"""Early stopping: Ray's schedulers, called with trial names, so that a live sweep, a resume and a simulation
on recorded curves all decide alike; and that simulation. Runs no trial."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    spent, finished = 0, 0
    for _ in range(SIMULATIONS):
        if not curves:
            drawn: Sequence[Curve] = [[(1.0, generator.random())] for _ in epochs]
        elif len(curves) >= len(epochs):
            drawn = generator.sample(curves, len(epochs))
        else:
            drawn = generator.choices(curves, k=len(epochs))
        trials = [
            [_value_at(curve, epoch) for epoch in range(1, last + 1)]
            for last, curve in zip(epochs, drawn, strict=True)
        ]
        for trial_epochs, is_finished in _simulate(space, trials, slots=slots):
            spent += trial_epochs
            finished += is_finished
    source = "assuming that trials keep their rank from the first epoch to the last"
    if curves:
        source = f"simulated on {len(curves)} recorded curves in random order"
    return Saving(spent / (SIMULATIONS * sum(epochs)), finished / (SIMULATIONS * len(epochs)), source)


def _simulate(
    space: SearchSpace, trials: Sequence[Sequence[float]], *, slots: int
) -> Iterator[tuple[int, bool]]:
    """Epochs of each trial, and whether it reached its end; `slots` trials at once advance epoch by epoch.

    Args:
        trials: the metric at each epoch.
    """
    early = EarlyStopping(space, epochs=max(map(len, trials)))
    waiting, running = list(range(len(trials))), dict[int, int]()
    while waiting or running:
        while waiting and len(running) < slots:
            running[waiting.pop(0)] = 0
        for number, epoch in [(number, done + 1) for number, done in running.items()]:
            running[number], values = epoch, trials[number]
            result = {EPOCH: float(epoch), space.metric: values[epoch - 1]}
            stopped = early.should_stop(str(number), result, epochs=len(values))
            if stopped or epoch == len(values):
                del running[number]
                yield epoch, not stopped


def recorded_curves(folder: str | Path, metric: str) -> list[Curve]:
    """The learning curves of an earlier sweep's trials, those stopped early included."""
    curves = [trial_curve(path, metric) for path in sorted((Path(folder) / TRIALS).glob("*"))]
    return [curve for curve in curves if curve]


def _value_at(curve: Curve, epoch: int) -> float:
    """The last value by the end of `epoch`; before the first evaluation, that one's value."""
    known = [value for at, value in curve if at <= epoch]
    return known[-1] if known else curve[0][1]
