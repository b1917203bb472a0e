"""What Tune asks of a sweep: which trial is next, and whether one that has reported goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from newsbert_ray.config import SettingsError
from newsbert_ray.record import EarlyStop
from newsbert_ray.tune.jobs import Job, Jobs
from newsbert_ray.tune.limits import Budget
from newsbert_ray.tune.stopping import EarlyStopping


@dataclass
class Running:
    """A trial under way: its job, how many epochs it has, when it began, its early end once that is known."""

    job: Job
    epochs: int
    began: float = 0.0
    stop: EarlyStop | None = None

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self.began if self.began else 0.0


class Queue(Searcher):
    """Hands jobs to Tune as it asks, as long as the budget allows."""

    def __init__(
        self,
        jobs: Jobs,
        config: Callable[[Job], Mapping[str, Any]],
        slots: int,
        budget: Budget,
        *,
        refused: Callable[[Job], None],
    ) -> None:
        super().__init__()
        self.running: dict[str, Running] = {}
        self.jobs = jobs
        self._config = config
        self._slots = slots
        self._budget = budget
        self._refused = refused
        self._deaths: dict[str, int] = {}
        self._began: dict[str, float] = {}
        self._reached: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: Any, **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        if len(self.running) >= self._slots:
            return None
        while (job := self.jobs.next_job()) is not None:
            if self._held_back():
                self.jobs.put_back(job)
                return Searcher.FINISHED if self.jobs.closed else None
            try:
                config = dict(self._config(job))
            except SettingsError as error:
                # A combination that cannot be, which only the sampler has brought together.
                self.jobs.finish(job, values=None, failure=str(error))
                self._refused(job)
                continue
            began = self._began.get(job.name, 0.0)
            self.running[trial_id] = Running(job, epochs=config["settings"]["epochs"], began=began)
            return config
        # One that runs may yet have to be handed out again.
        return None if self.running else Searcher.FINISHED

    def again(self, running: Running, *, counted: bool, most: int, reached: float = 0.0) -> bool:
        """Hand a trial out again that has broken off; False where it has done so too often.

        Args:
            counted: it was its own fault, as far as is known: that a machine died is known only later.
            most: how often it may go on after those without getting further.
            reached: epochs that it has reported.
        """
        name = running.job.name
        if reached > self._reached.get(name, 0.0):
            self._reached[name], self._deaths[name] = reached, 0
        self._deaths[name] = self._deaths.get(name, 0) + counted
        if self._deaths[name] > most:
            return False
        self._began[name] = running.began
        self.jobs.put_back(running.job)
        return True

    def _held_back(self) -> bool:
        """Whether no trial may start now; closes the sweep where none ever may."""
        reached = self._budget.reached()
        refusal = reached or self._budget.refusal(trial.seconds for trial in self.running.values())
        if reached or (refusal and not self.running):
            self.jobs.closed = refusal
        return bool(refusal)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep is resumed from its own memory, not from Tune's")


class Judge(FIFOScheduler):
    """Asks the sweep's judge at each report; Tune ends the trial where it says so."""

    def __init__(self, queue: Queue, judge: EarlyStopping) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._queue = queue
        self._judge = judge

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        running = self._queue.running[trial.trial_id]
        if not self._judge.stops(running.job.name, result, epochs=running.epochs):
            return str(self.CONTINUE)
        running.stop = EarlyStop(
            epoch=result["epoch"],
            value=result[self._queue.jobs.space.metric],
            seconds=running.seconds,
            reason=self._judge.reason,
        )
        return str(self.STOP)
