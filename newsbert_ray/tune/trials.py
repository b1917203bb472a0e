"""The trials of a sweep: each point once with each seed. Hands them out, records how they ended, tells the
study, and decides with Ray's schedulers which of them end early. Starts no trial."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

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
    State,
    Trial,
    best_point,
    curve_of,
    point_label,
)
from newsbert_ray.reporting.tables import number_at
from newsbert_ray.storage.workdir import WorkDir
from newsbert_ray.tune.space import PointValues, SearchSpace
from newsbert_ray.tune.study import SweepStudy

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler

EPOCH = "epoch"
SIMULATIONS = 20
"""Random orders of the trials over which a saving is averaged."""

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

    def trial(self, state: State, **values: Any) -> Trial:
        """The trial once it has ended so."""
        return Trial(self.name, self.point, self.seed, state, **values)

    @property
    def has_ended(self) -> bool:
        """Whether it left a record or an early end."""
        return (self.out / RECORD).exists() or (self.out / STOPPED).exists()


@dataclass
class RunningTrial:
    """A trial that a process runs, or will run as soon as it has started."""

    spec: TrialSpec
    epochs: int = 0
    """Epochs that are planned."""
    began: float = 0.0
    """When its first process started, by time.monotonic; 0 before."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Its last evaluation, by dotted name."""
    stop: EarlyStop | None = None
    """Its early end, once that is decided."""
    deaths: int = 0
    """How often its process died without getting an epoch further."""
    epoch_at_death: float = 0.0

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self.began if self.began else 0.0


def metric_value(record: RunRecord, metric: str) -> float:
    """The number called `metric` (`validation.student.accuracy`) in a record's metrics. Raises RecordError
    where it is missing, or not a finite number."""
    value = number_at(record.metrics, metric)
    if value is None:
        raise RecordError(f"the trial's record has no finite number {metric}")
    return value


def trial_curve(folder: Path, metric: str) -> Curve:
    """The values of `metric` that a trial has reported so far, from its metrics.jsonl."""
    evaluations = [entry for entry in read_entries(folder / METRICS) if entry.get("kind") == "evaluation"]
    return curve_of(evaluations, metric)


def read_curves(sweep: Path, metric: str) -> dict[str, Curve]:
    """The curve of every trial in a sweep's folder that has reported, by name."""
    folders = sorted((sweep / TRIALS).glob("*"))
    return {folder.name: curve for folder in folders if (curve := trial_curve(folder, metric))}


class Trials:
    """Every trial of a sweep, handed out at most once; a record or an early end in its folder counts."""

    def __init__(self, space: SearchSpace, study: SweepStudy, workdir: WorkDir) -> None:
        """`workdir`: the sweep's folder."""
        self.space = space
        self.workdir = workdir
        self.folder = workdir.path
        self.ended: dict[str, Trial] = {}
        """Trials that have ended in any way, by name."""
        self.running: dict[str, RunningTrial] = {}
        """Trials that have been handed to a process, by Ray Tune's id."""
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
    def unfinished(self) -> int:
        """How many trials have not ended in any way."""
        return max(0, self.total - sum(self.count(trial) for trial in self.ended.values()))

    @property
    def due(self) -> int:
        """Trials that are still to run, those that run now included."""
        return 0 if self._exhausted and not self._queue else self.unfinished

    @property
    def seconds(self) -> dict[str, float]:
        """Duration of each trial that finished or was stopped, by name."""
        return {name: trial.seconds for name, trial in self.ended.items() if trial.seconds is not None}

    def count(self, trial: Trial) -> int:
        """How often a trial counts: a point that the sampler drew twice is run once and counts twice."""
        return max(1, len(self._numbers.get(point_label(trial.point), ())))

    def collect(self) -> None:
        """Record everything that has ended already, up to the first trial that is due."""
        if (spec := self.next_trial()) is not None:
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
        self._end(spec, spec.trial("finished", values=values, seconds=seconds))

    def fail(self, spec: TrialSpec, reason: str) -> None:
        """A trial has failed."""
        self._download(spec, failed=True)
        self._end(spec, spec.trial("failed", reason=reason or "unknown reason"))

    def stop(self, spec: TrialSpec, stop: EarlyStop) -> None:
        """A trial was stopped early. The point's seeds that have not started are skipped."""
        self._download(spec, failed=False)
        skipped = [o for o in self._queue if o.label == spec.label and o != spec and not o.has_ended]
        self._queue = [other for other in self._queue if other not in skipped]
        self.ended |= {other.name: other.trial("skipped") for other in skipped}
        values = {"epoch": stop.epoch, "values": (stop.value,), "seconds": stop.seconds}
        self._end(spec, spec.trial("stopped", **values, reason=stop.reason))

    def _end(self, spec: TrialSpec, trial: Trial) -> None:
        self.ended[spec.name] = trial
        self._tell(spec.label, self._numbers[spec.label])

    def best(self) -> Point | None:
        """The best point by the first goal, of those that every seed finished where there is one."""
        return best_point(list(self.points.values()), self.space.goals[0])

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
            if stopped and not spec.has_ended:
                self.ended[name] = spec.trial("skipped")
            else:
                self._queue.append(spec)

    def _collect_ended(self) -> None:
        """Record trials at the head of the queue that have left a record or an early end. A trial whose
        record is damaged, or has no such metric, is run again; the record is renamed."""
        while self._queue:
            spec = self._queue[0]
            if (spec.out / RECORD).exists():
                try:
                    record = read_record(spec.out)
                    values = tuple(metric_value(record, goal.metric) for goal in self.space.goals)
                except RecordError:
                    (spec.out / RECORD).replace(spec.out / f"{RECORD}.damaged")
                    return
                self._queue.pop(0)
                self._end(spec, spec.trial("finished", values=values, seconds=record.seconds.get("total")))
            elif (stop := read_stop(spec.out)) is not None:
                self._queue.pop(0)
                self.stop(spec, stop)
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
        stopped = bool(point.of_state("stopped"))
        has_values = point.state != "failed" and (stopped or bool(point.of_state("finished")))
        for number in sorted({*numbers} - {ended.number for ended in self._study.ended}):
            means, curve = point.means if has_values else None, self._mean_curve(point)
            self._study.tell(number, means, curve=curve, stopped=stopped)

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


class _NamedTrial(NamedTuple):
    """A trial as far as Ray's schedulers use it."""

    trial_id: str


class EarlyStopping:
    """Decides which trials end early, by the rungs of all trials it has seen. A trial is never stopped at its
    last epoch: that is already paid for."""

    def __init__(self, space: SearchSpace, *, epochs: int) -> None:
        """Decide by the first goal of `space`; `epochs`: the most that a trial may have."""
        self.reason = space.scheduler
        self._metric = space.metric
        self._scheduler = _ray_scheduler(space, epochs=epochs)
        self._trials: dict[str, Any] = {}
        # The median rule asks for waiting trials, in order to pause one; our trials are never paused.
        self._controller: Any = SimpleNamespace(get_live_trials=list)

    def should_stop(self, name: str, result: Mapping[str, Any], *, epochs: int) -> bool:
        """Whether the trial `name`, of so many `epochs`, ends with this evaluation."""
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


class Saving(NamedTuple):
    """What remains with early stopping: the shares of epochs and of trials that reach their end; and why."""

    epochs: float
    finished: float
    source: str


def estimate_saving(
    space: SearchSpace, epochs: Sequence[int], *, slots: int, curves: Sequence[Curve] | None = None
) -> Saving:
    """What early stopping leaves of trials of so many `epochs`: the mean over SIMULATIONS random orders.

    Recorded curves are assigned at random; one that is too short keeps its last value. Without any, every
    trial keeps its rank from the first epoch to the last.
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
        # At each epoch the last value by its end; before the first evaluation, that one's value.
        trials = [
            [
                ([curve[0][1]] + [value for at, value in curve if at <= epoch])[-1]
                for epoch in range(1, last + 1)
            ]
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
    """Epochs of each trial, and whether it reached its end, from its metric at each epoch, `slots` at
    once."""
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
