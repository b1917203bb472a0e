"""Trials that are groups of workers: nothing of a group stays in the cluster, or on the disk, after its end.

A trial that Tune ends leaves its group to Ray, which ends the workers within moments and keeps their CPUs.
The sweep's own process outlives every trial, so it is the one that tidies up. Knows no point and no Optuna.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from newsbert_ray.training.placement import GROUP_FOLDER, at_rest, release_orphans
from newsbert_ray.tune.keeping import CHECKPOINTS

TICK_SECONDS = 2.0
SETTLE_SECONDS = 30.0


class Caretaker:
    """Gives back, while a sweep runs and at its end, what groups hold whose trials are gone."""

    def __init__(self, *, seconds: float = TICK_SECONDS) -> None:
        self._seconds = seconds
        self._last = time.monotonic()
        self._ended: list[Path] = []

    def ended(self, run: Path) -> None:
        """This trial has ended for good: its checkpoints go as soon as no worker writes any more."""
        self._ended.append(run)

    def tick(self) -> None:
        """Look, where some time has passed since the last look; takes milliseconds."""
        if time.monotonic() - self._last >= self._seconds:
            self._look()

    def settle(self, *, seconds: float = SETTLE_SECONDS) -> bool:
        """Wait, once all trials have ended, until everything is given back; False if it was not in time."""
        end = time.monotonic() + seconds
        while self._look():
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    def _look(self) -> bool:
        """Give back what can be; whether something is still held."""
        groups = release_orphans()
        for run in [run for run in self._ended if at_rest(run)]:
            for folder in (CHECKPOINTS, GROUP_FOLDER):
                shutil.rmtree(run / folder, ignore_errors=True)
            self._ended.remove(run)
        self._last = time.monotonic()
        return bool(groups or self._ended)
