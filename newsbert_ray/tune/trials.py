"""The trials of a sweep: each point once with each seed. Hands them out, records how they ended, tells the
study, watches the budget and removes files that are no longer needed. Does not import Ray."""

from __future__ import annotations

import statistics
import time
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

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
from newsbert_ray.reporting.sweep_data import (
    FAILURES,
    TRIALS,
    Point,
    Trial,
    best_point,
    curve_of,
    number_at,
    point_label,
    undominated,
)
from newsbert_ray.storage.workdir import WorkDir
from newsbert_ray.tune.space import PointValues, Prices, SearchSpace
from newsbert_ray.tune.study import SweepStudy

CHECKPOINTS, STUDENT = "checkpoints", "student"

Curve = list[tuple[float, float]]
"""(epochs done, the first goal's metric) at each evaluation, in order."""


@dataclass(frozen=True)
class TrialSpec:
    """A trial to run: a point with one seed, and its own folder."""

    name: str
    label: str
    point: PointValues
    seed: int
    out: Path


class MetricError(ValueError):
    """A record without the metric of a goal."""


def metric_value(record: RunRecord, metric: str) -> float:
    """The number called `metric` (`validation.student.accuracy`) in a record's metrics.

    Raises:
        MetricError: it is missing, or not a finite number.
    """
    value = number_at(record.metrics, metric)
    if value is None:
        raise MetricError(f"the trial's record has no finite number {metric}")
    return value


def trial_curve(folder: Path, metric: str) -> Curve:
    """The values of `metric` that a trial has reported so far, from its metrics.jsonl."""
    evaluations = [entry for entry in read_entries(folder / METRICS) if entry.get("kind") == "evaluation"]
    return curve_of(evaluations, metric)


class Trials:
    """Every trial of a sweep. Each is handed out at most once; a record or an early end in its folder
    counts."""

    def __init__(self, space: SearchSpace, study: SweepStudy, workdir: WorkDir) -> None:
        """`workdir`: the sweep's folder."""
        self.space = space
        self.workdir = workdir
        self.folder = workdir.path
        self.ended: dict[str, Trial] = {}
        """Trials that have ended in any way, by name."""
        self.total = space.points * len(space.seeds)
        self.resumed = 0
        """Trials that had ended before this start."""
        self.end_reason = ""
        """Why no further trial is handed out although some are left."""
        self._study = study
        self._values: dict[str, PointValues] = {}
        self._numbers: dict[str, list[int]] = {}
        self._queue: list[TrialSpec] = []
        self._exhausted = False
        for point in study.ended:
            self._add_point(point.number, point.values, stopped=point.stopped)
        self._collect_ended()

    @property
    def points(self) -> dict[str, Point]:
        """Every point that was drawn, by label, with its trials that have ended."""
        return {label: self._point(label) for label in self._values}

    @property
    def exhausted(self) -> bool:
        """Whether every trial has been handed out."""
        return self._exhausted and not self._queue

    @property
    def unfinished(self) -> int:
        """How many trials have not ended in any way."""
        return max(0, self.total - sum(self.count(trial) for trial in self.ended.values()))

    @property
    def due(self) -> int:
        """Trials that are still to run, those that run now included."""
        return 0 if self.exhausted else self.unfinished

    @property
    def seconds(self) -> dict[str, float]:
        """Duration of each trial that finished or was stopped, by name."""
        return {name: trial.seconds for name, trial in self.ended.items() if trial.seconds is not None}

    def count(self, trial: Trial) -> int:
        """How often a trial counts: a point that the sampler drew twice is run once and counts twice."""
        return max(1, len(self._numbers.get(point_label(trial.point), ())))

    def waiting(self, running: Container[str]) -> list[PointValues] | None:
        """The point of each trial that has neither ended nor is in `running`; None where a sampler has yet to
        draw them."""
        if self.space.search.sampler != "grid":
            return None
        return [
            point
            for point in self.space.grid()
            for seed in self.space.seeds
            if (name := point_label(point, seed=seed)) not in self.ended and name not in running
        ]

    def collect(self) -> None:
        """Record everything that has ended already, up to the first trial that is due."""
        spec = self.next_trial()
        if spec is not None:
            self.put_back(spec)

    def next_trial(self) -> TrialSpec | None:
        """The next trial to run; None when all have been handed out, or no more may start."""
        self._collect_ended()
        while not self._queue and not self._exhausted and not self.end_reason:
            drawn = self._study.next_point()
            if drawn is None:
                self._exhausted = True
            else:
                self._add_point(*drawn)
                self._collect_ended()
                # If this machine dies now, a resume must not draw another point instead.
                self.workdir.publish()
        return self._queue.pop(0) if self._queue and not self.end_reason else None

    def put_back(self, spec: TrialSpec) -> None:
        """Hand this trial out again, as the next one."""
        self._queue.insert(0, spec)

    def finish(self, spec: TrialSpec, values: tuple[float, ...], *, seconds: float | None = None) -> None:
        """A trial has finished with one number for each goal."""
        self._download(spec, failed=False)
        self._end(spec, Trial(spec.name, spec.point, spec.seed, "finished", values=values, seconds=seconds))

    def fail(self, spec: TrialSpec, reason: str) -> None:
        """A trial has failed."""
        self._download(spec, failed=True)
        self._end(spec, Trial(spec.name, spec.point, spec.seed, "failed", reason=reason or "unknown reason"))

    def stop(self, spec: TrialSpec, stop: EarlyStop) -> None:
        """A trial was stopped early. The point's seeds that have not started are skipped."""
        self._download(spec, failed=False)
        self._stop(spec, stop)

    def _stop(self, spec: TrialSpec, stop: EarlyStop) -> None:
        skipped = [o for o in self._queue if o.label == spec.label and o != spec and not _has_ended(o.out)]
        self._queue = [other for other in self._queue if other not in skipped]
        for other in skipped:
            self.ended[other.name] = Trial(other.name, other.point, other.seed, "skipped")
        trial = Trial(spec.name, spec.point, spec.seed, "stopped", epoch=stop.epoch, values=(stop.value,))
        self._end(spec, replace(trial, seconds=stop.seconds, reason=stop.reason))

    def _end(self, spec: TrialSpec, trial: Trial) -> None:
        self.ended[spec.name] = trial
        self._tell(spec.label, self._numbers[spec.label])

    def best(self) -> Point | None:
        """The best point by the first goal, of those that every seed finished where there is one."""
        return best_point(list(self.points.values()), self.space.goals[0])

    def curves(self) -> Iterator[tuple[str, Curve]]:
        """Name and curve of every trial in the sweep's folder that has reported."""
        for folder in sorted((self.folder / TRIALS).glob("*")):
            if curve := trial_curve(folder, self.space.metric):
                yield folder.name, curve

    def _point(self, label: str) -> Point:
        values = self._values[label]
        names = [point_label(values, seed=seed) for seed in self.space.seeds]
        ended = [self.ended[name] for name in names if name in self.ended]
        return Point.of(label, values, ended, seeds=self.space.seeds)

    def _add_point(self, number: int, values: PointValues, *, stopped: bool = False) -> None:
        label = point_label(values)
        if label in self._values:
            # The sampler has drawn the same point again: it is run once, and counts for both.
            self._numbers[label].append(number)
            self._tell(label, [number])
            return
        self._values[label], self._numbers[label] = values, [number]
        for seed in self.space.seeds:
            name = point_label(values, seed=seed)
            spec = TrialSpec(name, label, values, seed, self.folder / TRIALS / name)
            if stopped and not _has_ended(spec.out):
                self.ended[name] = Trial(name, values, seed, "skipped")
            else:
                self._queue.append(spec)

    def _collect_ended(self) -> None:
        """Record trials at the head of the queue that have left a record or an early end.

        A trial whose record is damaged, or has no such metric, is run again; the record is renamed.
        """
        while self._queue:
            spec = self._queue[0]
            if (spec.out / RECORD).exists():
                try:
                    record = read_record(spec.out)
                    values = tuple(metric_value(record, goal.metric) for goal in self.space.goals)
                except (RecordError, MetricError):
                    (spec.out / RECORD).replace(spec.out / f"{RECORD}.damaged")
                    return
                self._queue.pop(0)
                trial = Trial(spec.name, spec.point, spec.seed, "finished", values=values)
                self._end(spec, replace(trial, seconds=record.seconds.get("total")))
            elif (stop := read_stop(spec.out)) is not None:
                self._queue.pop(0)
                self._stop(spec, stop)
            else:
                return
            self.resumed += 1

    def _download(self, spec: TrialSpec, *, failed: bool) -> None:
        """Copy what a trial has left in the sweep's bucket, where the sweep is in one."""
        self.workdir.collect(f"{TRIALS}/{spec.name}")
        if failed:
            self.workdir.collect(FAILURES)
        else:
            (self.folder / FAILURES / f"{spec.name}.txt").unlink(missing_ok=True)

    def _tell(self, label: str, numbers: list[int]) -> None:
        point = self._point(label)
        if len(point.trials) < len(self.space.seeds):
            return
        told = {ended.number for ended in self._study.ended}
        has_values = point.state != "failed" and bool(point.of_state("finished") or point.of_state("stopped"))
        for number in numbers:
            if number not in told:
                self._study.tell(
                    number,
                    point.means if has_values else None,
                    curve=self._mean_curve(point),
                    stopped=bool(point.of_state("stopped")),
                )

    def _mean_curve(self, point: Point) -> Curve:
        """Mean over a point's seeds at the epochs that each of them has reached."""
        curves = []
        for trial in [*point.of_state("finished"), *point.of_state("stopped")]:
            curve = dict(trial_curve(self.folder / TRIALS / trial.name, self.space.metric))
            if trial.state == "stopped":
                curve.setdefault(trial.epoch, trial.values[0])
            curves.append(curve)
        common = set.intersection(*map(set, curves)) if curves else set()
        return [(epoch, statistics.fmean(curve[epoch] for curve in curves)) for epoch in sorted(common)]


def _has_ended(folder: Path) -> bool:
    return (folder / RECORD).exists() or (folder / STOPPED).exists()


class Budget:
    """What a sweep has spent, and whether one more trial may start.

    A trial may start if it is expected, at the mean of those that have ended, to end within the limits.
    """

    def __init__(self, trials: Trials, *, cpus: float, gpus: float) -> None:
        """`cpus` and `gpus`: what one trial occupies, all its workers together."""
        self._trials = trials
        self._limits = trials.space.limits
        self._began = time.monotonic()
        self.hourly = hourly_price(trials.space.prices, cpus=cpus, gpus=gpus)
        """Money for an hour of one trial."""

    def spent(self, running: Iterable[float] = ()) -> float:
        """Money so far; `running`: seconds since the start of each running trial."""
        return self.hourly * (sum(self._trials.seconds.values()) + sum(running)) / 3600

    def refusal(self, running: Iterable[float] = ()) -> str:
        """Why no trial may start now; empty where one may. A running trial may still make room by ending
        soon.

        Args:
            running: seconds since the start of each running trial.
        """
        running = list(running)
        ended = self._trials.seconds.values()
        mean = statistics.fmean(ended) if ended else 0.0
        if self._limits.hours is not None:
            expected = time.monotonic() - self._began + mean
            if expected > 3600 * self._limits.hours:
                return f"limits.hours = {self._limits.hours:g} leaves no time for another trial"
        if self._limits.cost is not None:
            expected = self.spent([*(max(mean, seconds) for seconds in running), mean])
            if expected > self._limits.cost or self.spent(running) >= self._limits.cost:
                return f"limits.cost = {self._limits.cost:g} leaves no money for another trial"
        return ""

    def target_reached(self) -> str:
        """Which point is as good as the target; empty where none is, or no target is set."""
        target, best, goal = self._limits.target, self._trials.best(), self._trials.space.goals[0]
        if target is None or best is None or best.state != "finished":
            return ""
        value = best.means[0]
        good = goal.sign * value >= goal.sign * target
        return f"{best.label} reached limits.target = {target:g} ({value:.4f})" if good else ""


def hourly_price(prices: Prices, *, cpus: float, gpus: float) -> float:
    """Money for an hour of so many CPUs and GPUs."""
    return prices.cpu_hour * cpus + prices.gpu_hour * gpus


class Retention:
    """Removes the files of ended trials that are no longer needed, and bounds the disk space of
    checkpoints."""

    def __init__(self, trials: Trials, *, slots: int, checkpoints: int) -> None:
        """`slots` trials run at once, each keeping its newest `checkpoints`."""
        self._trials = trials
        self.slots = slots
        self._checkpoints = checkpoints
        self._largest = 0
        self._measured: set[str] = set()
        self._removed: set[str] = set()
        self._postponed: list[TrialSpec] = []

    def reported(self, spec: TrialSpec) -> None:
        """A trial has written a checkpoint: measure it; in a bucket once for each trial."""
        if self._trials.workdir.is_remote and spec.name in self._measured:
            return
        self._measured.add(spec.name)
        largest: dict[str, int] = {}
        checkpoints = self._trials.workdir.child(TRIALS, spec.name, CHECKPOINTS)
        for name, size in _folder_sizes(checkpoints).items():
            kind = name.split("-")[0]  # step-12 or best-12
            largest[kind] = max(largest.get(kind, 0), size)
        self._largest = max(self._largest, sum(largest.values()))

    def ended(self, spec: TrialSpec, *, writers_gone: bool = True) -> None:
        """Remove a trial's checkpoints, and students that are no longer among the best.

        Args:
            writers_gone: no process writes into the trial's folder; otherwise its checkpoints stay for now.
        """
        workdir = self._trials.workdir
        if writers_gone:
            workdir.remove(f"{TRIALS}/{spec.name}/{CHECKPOINTS}")
        elif workdir.is_remote:
            self._postponed.append(spec)
        for name in ranked_trials(self._trials)[self._trials.space.keep_students :]:
            if name not in self._removed:
                workdir.remove(f"{TRIALS}/{name}/{STUDENT}")
                self._removed.add(name)
        workdir.publish()

    def finish(self) -> None:
        """All trials have ended: remove the checkpoints whose removal was postponed."""
        for spec in self._postponed:
            self._trials.workdir.remove(f"{TRIALS}/{spec.name}/{CHECKPOINTS}")
        self._postponed = []

    @property
    def bound(self) -> int:
        """The most bytes of checkpoints that all running trials together can have: for each its newest ones,
        the one being written, and the best model."""
        return self.slots * (self._checkpoints + 1) * self._largest

    def line(self) -> str:
        """Disk space of checkpoints and of the students that are kept."""
        files = self._trials.workdir.child(TRIALS).sizes()
        now = sum(size for name, size in files.items() if name.split("/")[1:2] == [CHECKPOINTS])
        sizes = [
            sum(size for name, size in files.items() if name.startswith(f"{trial}/{STUDENT}/"))
            for trial in ranked_trials(self._trials)
        ]
        kept = [size for size in sizes if size]
        return (
            f"disk: {len(kept)} students kept, {format_size(sum(kept))} "
            f"(keep_students: {self._trials.space.keep_students}); checkpoints {format_size(now)} now, at "
            f"most {format_size(self.bound)} during the sweep ({self.slots} trials at once)"
        )


def ranked_trials(trials: Trials) -> list[str]:
    """Names of the finished trials: those on the Pareto front of several goals, then by the first goal."""
    finished = [trial for trial in trials.ended.values() if trial.state == "finished"]
    goals = trials.space.goals
    scores = [tuple(g.sign * v for g, v in zip(goals, trial.values, strict=True)) for trial in finished]
    front = set(undominated(scores)) if len(goals) > 1 else set()
    order = sorted(range(len(finished)), key=lambda i: (i not in front, -scores[i][0]))
    return [finished[i].name for i in order]


def _folder_sizes(workdir: WorkDir) -> dict[str, int]:
    """Bytes of each folder in `workdir`, by name."""
    sizes: dict[str, int] = {}
    for name, size in workdir.sizes().items():
        folder = name.split("/")[0]
        sizes[folder] = sizes.get(folder, 0) + size
    return sizes
