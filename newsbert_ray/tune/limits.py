"""When a sweep ends before its last point: wall time, money, or a point that is good enough. Knows no Ray."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable

from newsbert_ray.tune.jobs import Jobs
from newsbert_ray.tune.space import Prices


class Budget:
    """What a sweep has spent, and whether one more trial may start.

    A trial may start if it is expected, at the mean of those that have ended, to end within the limits.
    """

    def __init__(self, jobs: Jobs, *, cpus: float, gpus: float) -> None:
        """`cpus` and `gpus`: what one trial occupies, all its workers together."""
        self._jobs = jobs
        self._limits = jobs.space.limits
        self._began = time.monotonic()
        self.hourly = hourly_price(jobs.space.prices, cpus=cpus, gpus=gpus)
        """Money for an hour of one trial."""

    def spent(self, running: Iterable[float] = ()) -> float:
        """Money so far; `running`: seconds since each running trial's start."""
        return self.hourly * (sum(self._jobs.seconds.values()) + sum(running)) / 3600

    def refusal(self, running: Iterable[float] = ()) -> str:
        """Why no trial may start now, empty where one may; a running trial may yet make room by ending soon.

        Args:
            running: seconds since each running trial's start.
        """
        running = list(running)
        mean = statistics.fmean(self._jobs.seconds.values()) if self._jobs.seconds else 0.0
        if self._limits.hours is not None:
            expected = time.monotonic() - self._began + mean
            if expected > 3600 * self._limits.hours:
                return f"limits.hours = {self._limits.hours:g} leaves no time for another trial"
        if self._limits.cost is not None:
            expected = self.spent([*(max(mean, seconds) for seconds in running), mean])
            if expected > self._limits.cost or self.spent(running) >= self._limits.cost:
                return f"limits.cost = {self._limits.cost:g} leaves no money for another trial"
        return ""

    def reached(self) -> str:
        """Which point is as good as the target; empty where none is, or no target is set."""
        target, best = self._limits.target, self._jobs.best()
        if target is None or best is None or len(best.values) < len(self._jobs.space.seeds):
            return ""
        good = best.mean >= target if self._jobs.space.mode == "max" else best.mean <= target
        return f"{best.label} reached limits.target = {target:g} ({best.mean:.4f})" if good else ""


def hourly_price(prices: Prices, *, cpus: float, gpus: float) -> float:
    """Money for an hour of so many CPUs and GPUs."""
    return prices.cpu_hour * cpus + prices.gpu_hour * gpus
