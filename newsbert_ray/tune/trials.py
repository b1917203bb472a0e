"""The trials of a sweep: each point once with each seed, judged by the mean. Hands them out, takes in how
they ended, tells the memory. Knows no Ray."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from newsbert_ray.files import format_size
from newsbert_ray.record import (
    METRICS,
    RECORD,
    STOPPED,
    EarlyStop,
    RecordError,
    RunRecord,
    read_entries,
    read_record,
    read_stop,
)
from newsbert_ray.storage import workdir as storage
from newsbert_ray.tune.space import Point, Prices, SearchSpace, point_label
from newsbert_ray.tune.study import Memory

TRIALS, FAILURES = "trials", "failures"

Curve = list[tuple[float, float]]
"""(epochs done, the first goal's metric) at each evaluation, in order."""


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
    """What a point came to, by seed: a number for each goal, a reason why there is none, an early end, or
    never begun because another seed was stopped early. A seed in none of them has not ended."""

    label: str
    point: Point
    numbers: list[int]
    values: dict[int, tuple[float, ...]] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    stops: dict[int, EarlyStop] = field(default_factory=dict)
    skipped: set[int] = field(default_factory=set)

    @property
    def means(self) -> tuple[float, ...]:
        """Each goal's mean over the seeds that finished; empty without any."""
        return tuple(statistics.fmean(column) for column in zip(*self.values.values(), strict=True))

    @property
    def mean(self) -> float:
        """The first goal's mean over the seeds that finished; NaN without any."""
        return self.means[0] if self.values else math.nan

    @property
    def sd(self) -> float:
        """The first goal's sample standard deviation over the seeds; NaN for fewer than two."""
        first = [values[0] for values in self.values.values()]
        return statistics.stdev(first) if len(first) > 1 else math.nan

    @property
    def ended(self) -> int:
        """Seeds that will not run any more."""
        return len(self.values) + len(self.failures) + len(self.stops) + len(self.skipped)


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


def trial_curve(folder: Path, metric: str) -> Curve:
    """What a trial has reported so far of `metric`, from its metrics.jsonl."""
    curve = []
    for entry in read_entries(folder / METRICS):
        value: Any = entry if entry.get("kind") == "evaluation" else None
        for part in metric.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, int | float):
            curve.append((float(entry["epoch"]), float(value)))
    return curve


class Jobs:
    """Every trial of a sweep, each handed out at most once; one whose folder holds its end has ended."""

    def __init__(
        self, space: SearchSpace, memory: Memory, folder: Path, *, place: str | Path | None = None
    ) -> None:
        """`folder`: the sweep's on this machine; `place`: what the user calls it, a URL perhaps."""
        self.space = space
        self.folder = folder
        self.place = folder if place is None else place
        self.results: dict[str, PointResult] = {}
        self.total = space.points * len(space.seeds)
        self.found = 0
        """Trials that an earlier start had ended."""
        self.seconds: dict[str, float] = {}
        """How long each ended trial took, by name; failures are not among them."""
        self.closed = ""
        """Why no further trial is handed out, although some are due."""
        self._memory = memory
        self._queue: list[Job] = []
        self._exhausted = False
        for ended in memory.ended:
            self._open(ended.number, ended.point, stopped=ended.stopped)
        self._skip_ended()

    @property
    def exhausted(self) -> bool:
        """Whether every trial has been handed out."""
        return self._exhausted and not self._queue

    @property
    def unfinished(self) -> int:
        """Trials that have not ended in any way."""
        return max(0, self.total - sum(r.ended * max(1, len(r.numbers)) for r in self.results.values()))

    @property
    def due(self) -> int:
        """Trials to run still, those that run already included."""
        return 0 if self.exhausted else self.unfinished

    def names(self, result: PointResult) -> list[str]:
        """Those of a point's trials."""
        return [point_label(result.point, seed=seed) for seed in self.space.seeds]

    def waiting(self, running: Container[str]) -> list[Point] | None:
        """The point of each trial that has neither ended nor is `running`, by name; None where a sampler has
        yet to draw them."""
        if self.space.search.sampler != "grid":
            return None
        found = []
        for point in self.space.grid():
            result = self.results.get(point_label(point))
            ended = {*result.values, *result.failures, *result.stops, *result.skipped} if result else set()
            seeds = (seed for seed in self.space.seeds if seed not in ended)
            found += [point for seed in seeds if point_label(point, seed=seed) not in running]
        return found

    def settle(self) -> None:
        """Take in everything that has ended already, up to the first trial that is due."""
        job = self.next_job()
        if job is not None:
            self._queue.insert(0, job)

    def next_job(self) -> Job | None:
        """The next trial to run, or None when all have been handed out, or no more may be."""
        self._skip_ended()
        while not self._queue and not self._exhausted and not self.closed:
            found = self._memory.next_point()
            if found is None:
                self._exhausted = True
            else:
                self._open(*found)
                self._skip_ended()
                # A head that dies now would have another point suggested in its place.
                storage.publish(self.place)
        return self._queue.pop(0) if self._queue and not self.closed else None

    def put_back(self, job: Job) -> None:
        """A trial that was handed out and cannot start now; it is the next again."""
        self._queue.insert(0, job)

    def finish(
        self, job: Job, *, values: tuple[float, ...] | None, failure: str = "", seconds: float | None = None
    ) -> None:
        """A trial's end: a number for each goal, or why it has none."""
        self._collect(job, failed=values is None)
        self._finish(job, values=values, failure=failure, seconds=seconds)

    def _finish(
        self, job: Job, *, values: tuple[float, ...] | None, failure: str = "", seconds: float | None = None
    ) -> None:
        result = self.results[job.label]
        if values is None:
            result.failures[job.seed] = failure or "unknown reason"
        else:
            result.values[job.seed] = values
            if seconds is not None:
                self.seconds[job.name] = seconds
        self._tell(result, result.numbers)

    def stop(self, job: Job, stop: EarlyStop) -> None:
        """A trial's early end. The point's seeds that have not begun are not run: it has lost already."""
        self._collect(job, failed=False)
        self._stop(job, stop)

    def _stop(self, job: Job, stop: EarlyStop) -> None:
        result = self.results[job.label]
        result.stops[job.seed] = stop
        self.seconds[job.name] = stop.seconds
        lost = [other for other in self._queue if other.label == job.label and not _has_ended(other.out)]
        result.skipped |= {other.seed for other in lost}
        self._queue = [other for other in self._queue if other not in lost]
        self._tell(result, result.numbers)

    def best(self) -> PointResult | None:
        """The best point by the first goal among those that all seeds finished; among all with a value where
        there is none."""
        results = [result for result in self.results.values() if result.values]
        whole = [result for result in results if len(result.values) == len(self.space.seeds)]
        better: Callable[..., PointResult] = max if self.space.mode == "max" else min
        return better(whole or results, key=lambda result: result.mean) if results else None

    def curves(self) -> Iterator[tuple[str, Curve]]:
        """Name and curve of every trial in the sweep's folder that has reported."""
        for folder in sorted((self.folder / TRIALS).glob("*")):
            if curve := trial_curve(folder, self.space.metric):
                yield folder.name, curve

    def _open(self, number: int, point: Point, *, stopped: bool = False) -> None:
        label = point_label(point)
        result = self.results.get(label)
        if result is not None:
            # The sampler has chosen the same point again: it is run once, and counts for both.
            result.numbers.append(number)
            self._tell(result, [number])
            return
        self.results[label] = result = PointResult(label=label, point=point, numbers=[number])
        for seed in self.space.seeds:
            name = point_label(point, seed=seed)
            job = Job(name, label, point, seed, self.folder / TRIALS / name)
            if stopped and not _has_ended(job.out):
                result.skipped.add(seed)
            else:
                self._queue.append(job)

    def _skip_ended(self) -> None:
        """Take trials that have left a record or an early end off the queue's head, and count them.

        One whose record is damaged, or without the metric, is run again; the record is put aside.
        """
        while self._queue:
            job = self._queue[0]
            if (job.out / RECORD).exists():
                try:
                    record = read_record(job.out)
                    values = tuple(metric_value(record, goal.metric) for goal in self.space.goals)
                except (RecordError, MetricError):
                    (job.out / RECORD).replace(job.out / f"{RECORD}.damaged")
                    return
                self._queue.pop(0)
                self._finish(job, values=values, seconds=record.seconds.get("total"))
            elif (stop := read_stop(job.out)) is not None:
                self._queue.pop(0)
                self._stop(job, stop)
            else:
                return
            self.found += 1

    def _collect(self, job: Job, *, failed: bool) -> None:
        """Bring what a trial has left in the sweep's bucket, if that is where it is."""
        storage.collect(self.place, f"{TRIALS}/{job.name}")
        if failed:
            storage.collect(self.place, FAILURES)
        else:
            (self.folder / FAILURES / f"{job.name}.txt").unlink(missing_ok=True)

    def _tell(self, result: PointResult, numbers: list[int]) -> None:
        if result.ended < len(self.space.seeds):
            return
        told = {ended.number for ended in self._memory.ended}
        for number in numbers:
            if number not in told:
                self._memory.tell(
                    number,
                    None if result.failures or not (result.values or result.stops) else result.means,
                    curve=self._mean_curve(result),
                    stopped=bool(result.stops),
                )

    def _mean_curve(self, result: PointResult) -> Curve:
        """Mean over a point's seeds at the evaluations that each of them has reached."""
        seeds = [*result.values, *result.stops]
        folders = [self.folder / TRIALS / point_label(result.point, seed=seed) for seed in seeds]
        known = [dict(trial_curve(folder, self.space.metric)) for folder in folders]
        for curve, stop in zip(known, [result.stops.get(seed) for seed in seeds], strict=True):
            if stop is not None:
                curve.setdefault(stop.epoch, stop.value)
        common = set.intersection(*map(set, known)) if known else set()
        return [(epoch, statistics.fmean(curve[epoch] for curve in known)) for epoch in sorted(common)]


def _has_ended(folder: Path) -> bool:
    return (folder / RECORD).exists() or (folder / STOPPED).exists()


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


CHECKPOINTS, STUDENT = "checkpoints", "student"


class Keeper:
    """Tidies up after each trial, and knows how much disk the sweep can come to need at once."""

    def __init__(self, jobs: Jobs, *, slots: int, keep: int) -> None:
        """`slots` trials at once, each keeping its `keep` newest checkpoints."""
        self._jobs = jobs
        self.slots = slots
        self._keep = keep
        self._largest = 0
        self._looked: set[str] = set()
        self._removed: set[str] = set()
        self._left: list[Job] = []

    def reported(self, job: Job) -> None:
        """A trial has just written a checkpoint: its size is looked at, in a bucket once a trial."""
        if storage.is_url(self._jobs.place) and job.name in self._looked:
            return
        self._looked.add(job.name)
        kinds: dict[str, int] = {}
        for name, size in folder_sizes(self._place(job, CHECKPOINTS)).items():
            kind = name.split("-")[0]
            kinds[kind] = max(kinds.get(kind, 0), size)
        self._largest = max(self._largest, sum(kinds.values()))

    def ended(self, job: Job, *, is_idle: bool = True) -> None:
        """Remove what nobody goes on from, and the students that are no longer among the best.

        Args:
            is_idle: nobody writes into the trial's folder any more; otherwise its checkpoints are left alone.
        """
        if storage.is_url(self._jobs.place) and not is_idle:
            self._left.append(job)
        if is_idle:
            storage.remove(self._jobs.place, f"{TRIALS}/{job.name}/{CHECKPOINTS}")
        for name in students(self._jobs)[self._jobs.space.keep_students :]:
            if name not in self._removed:
                storage.remove(self._jobs.place, f"{TRIALS}/{name}/{STUDENT}")
                self._removed.add(name)
        storage.publish(self._jobs.place)

    def settle(self) -> None:
        """All trials are at rest now: checkpoints in the bucket go that were left alone."""
        for job in self._left:
            storage.remove(self._jobs.place, f"{TRIALS}/{job.name}/{CHECKPOINTS}")
        self._left = []

    @property
    def bound(self) -> int:
        """Bytes of checkpoints that all running trials together can have at most: for each its `keep` newest
        and the one being written, with the best model of each."""
        return self.slots * (self._keep + 1) * self._largest

    def line(self) -> str:
        """What stands there, and the bound."""
        files = storage.sizes(storage.join(self._jobs.place, TRIALS))
        now = sum(size for name, size in files.items() if name.split("/")[1:2] == [CHECKPOINTS])
        sizes = [
            sum(size for name, size in files.items() if name.startswith(f"{trial}/{STUDENT}/"))
            for trial in students(self._jobs)
        ]
        kept = [size for size in sizes if size]
        return (
            f"disk: checkpoints {format_size(now)} now, at most {format_size(self.bound)} while it ran "
            f"({self.slots} trials at once); {len(kept)} students kept, {format_size(sum(kept))} "
            f"(keep_students: {self._jobs.space.keep_students})"
        )

    def _place(self, job: Job, part: str) -> str | Path:
        return storage.join(self._jobs.place, TRIALS, job.name, part)


def students(jobs: Jobs) -> list[str]:
    """The finished trials by name: those of the Pareto front, then by the first goal."""
    ends = [
        (values, point_label(result.point, seed=seed))
        for result in jobs.results.values()
        for seed, values in result.values.items()
    ]
    signs = [1.0 if goal.mode == "max" else -1.0 for goal in jobs.space.goals]
    signed = [tuple(s * v for s, v in zip(signs, values, strict=True)) for values, _ in ends]
    front = set(pareto_front(signed)) if len(signs) > 1 else set()
    order = sorted(range(len(ends)), key=lambda i: (i not in front, -signed[i][0]))
    return [ends[i][1] for i in order]


def pareto_front(values: list[tuple[float, ...]]) -> list[int]:
    """Indices of the values that no other is at least as good as everywhere and better somewhere; more is
    better."""
    return [
        i
        for i, one in enumerate(values)
        if not any(other != one and all(o >= v for o, v in zip(other, one, strict=True)) for other in values)
    ]


def folder_sizes(place: str | Path) -> dict[str, int]:
    """Bytes of each folder in `place`, by name."""
    sizes: dict[str, int] = {}
    for name, size in storage.sizes(place).items():
        folder = name.split("/")[0]
        sizes[folder] = sizes.get(folder, 0) + size
    return sizes
