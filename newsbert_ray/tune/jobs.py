"""The trials of a sweep: each point once with each seed, judged by the mean. Hands them out, takes in their
values, tells the memory. Knows no Ray."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from newsbert_ray.record import RECORD, RecordError, RunRecord, read_record
from newsbert_ray.tune.memory import Memory
from newsbert_ray.tune.space import Point, SearchSpace, point_label

TRIALS = "trials"


@dataclass(frozen=True)
class Job:
    """One trial: a point with one seed, and its own folder."""

    name: str
    label: str
    point: Point
    seed: int
    out: Path


@dataclass
class PointResult:
    """What a point came to. `values` and `failures` by seed; a seed in neither has not ended."""

    label: str
    point: Point
    numbers: list[int]
    values: dict[int, float] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean over the seeds that finished; NaN without any."""
        return statistics.fmean(self.values.values()) if self.values else math.nan

    @property
    def sd(self) -> float:
        """Sample standard deviation over the seeds; NaN for fewer than two."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else math.nan


class MetricError(ValueError):
    """A record without the metric that the sweep judges by."""


def metric_value(record: RunRecord, metric: str) -> float:
    """The number called `metric` (`validation.student.accuracy`) in a record's metrics.

    Raises:
        MetricError: not there, or not a finite number.
    """
    value: Any = record.metrics
    for part in metric.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise MetricError(f"the trial's record has {metric} = {value!r}, expected a finite number")
    return float(value)


class Jobs:
    """Every trial of a sweep, each handed out at most once; one whose record exists counts as finished."""

    def __init__(self, space: SearchSpace, memory: Memory, folder: Path) -> None:
        self.space = space
        self.results: dict[str, PointResult] = {}
        self.total = space.points * len(space.seeds)
        self.found = 0
        """Trials that an earlier run had finished."""
        self._memory = memory
        self.folder = folder
        self._queue: list[Job] = []
        self._exhausted = False
        for number, point, _ in memory.completed:
            self._open(number, point)
        self._skip_finished()

    @property
    def exhausted(self) -> bool:
        """Whether every trial has been handed out."""
        return self._exhausted and not self._queue

    @property
    def unfinished(self) -> int:
        """Trials that have neither a value nor a failure."""
        ended = sum((len(r.values) + len(r.failures)) * max(1, len(r.numbers)) for r in self.results.values())
        return max(0, self.total - ended)

    @property
    def due(self) -> int:
        """Trials to run still, those that run already included."""
        return 0 if self.exhausted else self.unfinished

    def settle(self) -> None:
        """Take in everything that has finished already, up to the first trial that is due."""
        job = self.next_job()
        if job is not None:
            self._queue.insert(0, job)

    def next_job(self) -> Job | None:
        """The next trial to run, or None when all have been handed out."""
        self._skip_finished()
        while not self._queue and not self._exhausted:
            found = self._memory.next_point()
            if found is None:
                self._exhausted = True
            else:
                self._open(*found)
                self._skip_finished()
        return self._queue.pop(0) if self._queue else None

    def finish(self, job: Job, *, value: float | None, failure: str = "") -> None:
        """A trial's end: its value, or why it has none."""
        result = self.results[job.label]
        if value is None:
            result.failures[job.seed] = failure or "unknown reason"
        else:
            result.values[job.seed] = value
        self._tell(result, result.numbers)

    def best(self) -> PointResult | None:
        """The best point among those that all seeds finished; among all with a value where there is none."""
        results = [result for result in self.results.values() if result.values]
        whole = [result for result in results if len(result.values) == len(self.space.seeds)]
        better: Callable[..., PointResult] = max if self.space.mode == "max" else min
        return better(whole or results, key=lambda result: result.mean) if results else None

    def _open(self, number: int, point: Point) -> None:
        label = point_label(point)
        result = self.results.get(label)
        if result is not None:
            # The sampler has chosen the same point again: it is run once, and counts for both.
            result.numbers.append(number)
            self._tell(result, [number])
            return
        self.results[label] = PointResult(label=label, point=point, numbers=[number])
        for seed in self.space.seeds:
            name = point_label(point, seed=seed)
            self._queue.append(Job(name, label, point, seed, self.folder / TRIALS / name))

    def _skip_finished(self) -> None:
        """Take trials with a record off the queue's head; their values come from it.

        One whose record is damaged, or without the metric, is run again; the record is put aside.
        """
        while self._queue and (self._queue[0].out / RECORD).exists():
            job = self._queue[0]
            try:
                value = metric_value(read_record(job.out), self.space.metric)
            except (RecordError, MetricError):
                (job.out / RECORD).replace(job.out / f"{RECORD}.damaged")
                return
            self._queue.pop(0)
            self.finish(job, value=value)
            self.found += 1

    def _tell(self, result: PointResult, numbers: list[int]) -> None:
        if len(result.values) + len(result.failures) < len(self.space.seeds):
            return
        told = {number for number, _, _ in self._memory.completed}
        for number in numbers:
            if number not in told:
                self._memory.tell(number, None if result.failures else result.mean)
