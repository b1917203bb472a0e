"""Which trials end before their last epoch: Ray's schedulers, asked by name, so that a resume, the live sweep
and a replay of recorded curves all judge alike. Runs no trial."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from newsbert_ray.tune.space import SearchSpace

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler

EPOCH = "epoch"


class _Named:
    """A trial as far as Ray's schedulers look at it."""

    def __init__(self, name: str) -> None:
        self.trial_id = name


class EarlyStopping:
    """A sweep's judge. Holds the rungs of all trials that it has seen, by their names.

    A trial is never stopped at its last epoch: it has been paid for.
    """

    def __init__(self, space: SearchSpace, *, epochs: int) -> None:
        """Judge by the first goal of `space`; `epochs`: the most that a trial may have."""
        self.reason = space.scheduler
        self._metric = space.metric
        self._scheduler = _scheduler(space, epochs=epochs)
        self._trials: dict[str, Any] = {}
        # The median rule asks who else waits, to pause a trial that it cannot judge yet; ours never pause.
        self._nobody: Any = SimpleNamespace(get_live_trials=list)

    def stops(self, name: str, result: Mapping[str, Any], *, epochs: int) -> bool:
        """Whether the trial `name` ends with this evaluation.

        Args:
            result: holds `epoch` (epochs done) and the metric, at least.
            epochs: how many the trial has in all.
        """
        if self._scheduler is None or EPOCH not in result or self._metric not in result:
            return False
        if name not in self._trials:
            self._trials[name] = _Named(name)
            self._scheduler.on_trial_add(self._nobody, self._trials[name])
        decision = self._scheduler.on_trial_result(self._nobody, self._trials[name], dict(result))
        return decision == "STOP" and result[EPOCH] < epochs

    def recall(self, name: str, curve: Iterable[tuple[float, float]]) -> None:
        """Take in what a trial had reported before: (epoch, metric) in order."""
        for epoch, value in curve:
            self.stops(name, {EPOCH: epoch, self._metric: value}, epochs=0)


def _scheduler(space: SearchSpace, *, epochs: int) -> TrialScheduler | None:
    if space.scheduler == "none":
        return None
    from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule

    judged: dict[str, Any] = {"time_attr": EPOCH, "metric": space.metric, "mode": space.mode}
    grace = min(space.stopping.grace, epochs)
    if space.scheduler == "median":
        return MedianStoppingRule(**judged, grace_period=grace)
    return AsyncHyperBandScheduler(
        **judged,
        grace_period=grace,
        max_t=max(epochs, grace),
        reduction_factor=space.stopping.factor,
        stop_last_trials=False,
    )
