"""The trials of a sweep: each point once with each seed, handed out and recorded as they end; what they
occupy and cost, how many run at once, and which of their files stay. Starts no trial."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from newsbert_ray.config import SettingsError, TrainSettings
from newsbert_ray.files import format_size
from newsbert_ray.record import RECORD, STOPPED, EarlyStop, RecordError, RunRecord, read_record, read_stop
from newsbert_ray.reporting import sweep_data
from newsbert_ray.reporting.sweep_data import FAILURES, TRIALS, Point, Trial
from newsbert_ray.reporting.tables import number_at
from newsbert_ray.storage.workdir import WorkDir
from newsbert_ray.tune.space import PointValues, Prices, SearchSpace
from newsbert_ray.tune.study import Curve, SweepStudy

CHECKPOINTS, STUDENT = "checkpoints", "student"
TRIALS_PER_GPU = 4
"""Trials that share a GPU by default."""

Node = Mapping[str, float]
"""Resources of a cluster node, as Ray names them: {"CPU": 8.0, "GPU": 1.0}."""


@dataclass
class RunningTrial:
    """A trial that a process runs, or will run as soon as it has started."""

    trial: Trial
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
    """The finite number `metric` (`validation.student.accuracy`) of a record; RecordError without one."""
    value = number_at(record.metrics, metric)
    if value is None:
        raise RecordError(f"the trial's record has no finite number {metric}")
    return value


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
        self._queue: list[Trial] = []
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

    def out(self, name: str) -> Path:
        return self.folder / TRIALS / name

    def count(self, trial: Trial) -> int:
        """How often a trial counts: a point that the sampler drew twice is run once and counts twice."""
        return max(1, len(self._numbers.get(trial.label, ())))

    def collect(self) -> None:
        """Record everything that has ended already, up to the first trial that is due."""
        if (trial := self.next_trial()) is not None:
            self.put_back(trial)

    def next_trial(self) -> Trial | None:
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

    def put_back(self, trial: Trial) -> None:
        """Hand this trial out again, as the next one."""
        self._queue.insert(0, trial)

    def finish(self, trial: Trial, values: tuple[float, ...], *, seconds: float | None = None) -> None:
        """A trial has finished with one number for each goal."""
        self._download(trial, failed=False)
        self._end(replace(trial, state="finished", values=values, seconds=seconds))

    def fail(self, trial: Trial, reason: str) -> None:
        self._download(trial, failed=True)
        self._end(replace(trial, state="failed", reason=reason or "unknown reason"))

    def stop(self, trial: Trial, stop: EarlyStop) -> None:
        """A trial was stopped early. The point's seeds that have not started are skipped."""
        self._download(trial, failed=False)
        self._stop(trial, stop)

    def _stop(self, trial: Trial, stop: EarlyStop) -> None:
        skipped = [o for o in self._queue if o.label == trial.label and o != trial and not self._has_ended(o)]
        self._queue = [other for other in self._queue if other not in skipped]
        self.ended |= {other.name: replace(other, state="skipped") for other in skipped}
        ended = replace(trial, state="stopped", epoch=stop.epoch, values=(stop.value,), seconds=stop.seconds)
        self._end(replace(ended, reason=stop.reason))

    def _end(self, trial: Trial) -> None:
        self.ended[trial.name] = trial
        self._tell(trial.label, self._numbers[trial.label])

    def best(self) -> Point | None:
        """The best point by the first goal, of those that every seed finished where there is one."""
        return sweep_data.best_point(list(self.points.values()), self.space.goals[0])

    def _point(self, label: str) -> Point:
        values = self._values[label]
        names = [sweep_data.point_label(values, seed=seed) for seed in self.space.seeds]
        ended = tuple(self.ended[name] for name in names if name in self.ended)
        return Point(label, values, ended, self.space.seeds)

    def _add_point(self, number: int, values: PointValues, *, stopped: bool = False) -> None:
        label = sweep_data.point_label(values)
        if label in self._values:
            # The sampler has drawn the same point again: it is run once, and counts for both.
            self._numbers[label].append(number)
            self._tell(label, [number])
            return
        self._values[label], self._numbers[label] = values, [number]
        for seed in self.space.seeds:
            trial = Trial(sweep_data.point_label(values, seed=seed), values, seed, "under way")
            if stopped and not self._has_ended(trial):
                self.ended[trial.name] = replace(trial, state="skipped")
            else:
                self._queue.append(trial)

    def _has_ended(self, trial: Trial) -> bool:
        """Whether it left a record or an early end."""
        return any((self.out(trial.name) / file).exists() for file in (RECORD, STOPPED))

    def _collect_ended(self) -> None:
        """Record trials at the head of the queue that have left a record or an early end. A trial whose
        record is damaged, or has no such metric, is run again; the record is renamed."""
        while self._queue:
            trial = self._queue[0]
            folder = self.out(trial.name)
            if (folder / RECORD).exists():
                try:
                    record = read_record(folder)
                    values = tuple(metric_value(record, goal.metric) for goal in self.space.goals)
                except RecordError:
                    (folder / RECORD).replace(folder / f"{RECORD}.damaged")
                    return
                self._queue.pop(0)
                seconds = record.seconds.get("total")
                self._end(replace(trial, state="finished", values=values, seconds=seconds))
            elif (stop := read_stop(folder)) is not None:
                self._queue.pop(0)
                self._stop(trial, stop)
            else:
                return
            self.resumed += 1

    def _download(self, trial: Trial, *, failed: bool) -> None:
        """Copy what a trial has left in the sweep's bucket, where the sweep is in one."""
        self.workdir.collect(f"{TRIALS}/{trial.name}")
        if failed:
            self.workdir.collect(FAILURES)
        else:
            (self.folder / FAILURES / f"{trial.name}.txt").unlink(missing_ok=True)

    def _tell(self, label: str, numbers: list[int]) -> None:
        point = self._point(label)
        if len(point.trials) < len(self.space.seeds):
            return
        stopped, means = bool(point.of_state("stopped")), point.means if point.state != "failed" else ()
        for number in sorted({*numbers} - {ended.number for ended in self._study.ended}):
            self._study.tell(number, means, curve=self._mean_curve(point), stopped=stopped)

    def _mean_curve(self, point: Point) -> Curve:
        """Mean over a point's seeds at the epochs that each of them has reached."""
        curves = []
        for trial in [*point.of_state("finished"), *point.of_state("stopped")]:
            curve = dict(sweep_data.trial_curve(self.out(trial.name), self.space.metric))
            if trial.state == "stopped":
                curve.setdefault(trial.epoch, trial.values[0])
            curves.append(curve)
        common = set.intersection(*map(set, curves)) if curves else set()
        return [(epoch, statistics.fmean(curve[epoch] for curve in curves)) for epoch in sorted(common)]


@dataclass(frozen=True)
class Resources:
    """How many trials run at once, what one worker of a trial occupies, and how many workers a trial has."""

    slots: int
    cpus: float
    gpus: float
    workers: int = 1

    @property
    def nested(self) -> bool:
        """Whether a trial is a Ray Train group of its own, started by an actor that holds no CPU."""
        return self.workers > 1

    @property
    def trial_cpus(self) -> float:
        return self.cpus * self.workers

    @property
    def trial_gpus(self) -> float:
        return self.gpus * self.workers

    def hourly_price(self, prices: Prices) -> float:
        """Money for an hour of one trial."""
        return prices.cpu_hour * self.trial_cpus + prices.gpu_hour * self.trial_gpus

    @property
    def tune_request(self) -> dict[str, float]:
        """What Tune reserves for a trial; a Ray Train group reserves its workers' share itself."""
        if self.nested:
            return {"CPU": 0, "node:__internal_head__": 0.001}
        return {"CPU": self.cpus, "GPU": self.gpus} if self.gpus else {"CPU": self.cpus}


def plan_resources(
    settings: TrainSettings,
    nodes: Sequence[Node],
    *,
    trials: int,
    concurrency: int | None = None,
    gpus: float | None = None,
    growing: bool = False,
) -> Resources:
    """The resources of each trial of a sweep whose first trial has `settings`.

    Args:
        nodes: the cluster's nodes.
        trials, concurrency: how many are to run; the most at once.
        gpus: GPUs of each worker; where there are GPUs an equal share by default, at most TRIALS_PER_GPU
            trials on each, or one GPU for each worker of a group.
        growing: the cluster starts nodes on demand, so `concurrency` trials run at once, however few fit now.
    Raises:
        SettingsError: not even one trial would fit, and Ray would wait for ever.
    """
    cpus, workers = float(settings.threads or 1), settings.workers
    if growing and concurrency is not None:
        default = (1.0 if workers > 1 else 1.0 / TRIALS_PER_GPU) if settings.device == "cuda" else 0.0
        share = (gpus or default) if settings.device != "cpu" else 0.0
        return Resources(slots=min(trials, concurrency), cpus=cpus, gpus=share, workers=workers)
    total = sum(node.get("GPU", 0.0) for node in nodes) if settings.device != "cpu" else 0.0
    if (settings.device == "cuda" or gpus) and not total:
        setting = f"gpus = {gpus:g}" if gpus else "device = cuda"
        cure = ", or set --concurrency, so that the cluster grows" if growing else ""
        raise SettingsError(f"{setting}: Ray has no GPU; use --device cpu and leave gpus out{cure}")
    share = (gpus or (1.0 if workers > 1 else 0.0)) if total else 0.0
    usable = [node for node in nodes if node.get("GPU") or not total]
    fitting = 0
    for node in usable:
        most = int(node.get("GPU", 0.0) / share + 1e-9) if share else math.inf
        fitting += int(min(node.get("CPU", 0.0) // cpus, most))
    if fitting < workers:
        grow = "; or let the cluster grow: set the number of trials at once with --concurrency"
        raise SettingsError(_does_not_fit(usable, cpus, share, workers, fitting) + grow * growing)
    slots = fitting // workers
    if total and not share and concurrency is None:
        slots = min(slots, int(total * TRIALS_PER_GPU))
    slots = max(1, min(slots, trials, concurrency or slots))
    if total and not share:
        share = min(1.0, int(total / slots * 1000) / 1000)
    return Resources(slots=slots, cpus=cpus, gpus=share, workers=workers)


def _does_not_fit(nodes: Sequence[Node], cpus: float, gpus: float, workers: int, fitting: int) -> str:
    """Why no trial fits, and the cure."""
    kind = "node with a GPU" if any(node.get("GPU") for node in nodes) else "node"
    largest = max((node.get("CPU", 0.0) for node in nodes), default=0.0)
    if not fitting and largest < cpus:
        has = f"Ray's largest {kind} has {largest:g}"
        return f"threads = {cpus:g}: a trial needs {cpus:g} CPUs of one node, and {has}; use fewer threads"
    each = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
    cure = "use fewer workers, threads or gpus"
    return f"workers = {workers}: each needs {each} of one node, and {fitting} fit on Ray's nodes; {cure}"


class Budget:
    """What a sweep has spent, and whether one more trial may start: one that is expected to end within the
    limits, at the mean of those that have ended."""

    def __init__(self, trials: Trials, resources: Resources) -> None:
        self.resources = resources
        self._trials = trials
        self._limits = trials.space.limits
        self._began = time.monotonic()
        self.hourly = resources.hourly_price(trials.space.prices)
        """Money for an hour of one trial."""

    def spent(self, *more: float) -> float:
        """Money for the trials that have ended or run, and for trials of so many seconds `more`."""
        running = (trial.seconds for trial in self._trials.running.values())
        return self.hourly * (sum(self._trials.seconds.values()) + sum(running) + sum(more)) / 3600

    def expected(self) -> tuple[float, list[float]]:
        """Mean seconds of the trials that have ended, and what each running one still takes at that mean."""
        ended, running = self._trials.seconds.values(), self._trials.running.values()
        mean = statistics.fmean(ended) if ended else 0.0
        return mean, [max(0.0, mean - trial.seconds) for trial in running]

    def refusal(self) -> str:
        """Why no trial may start now; empty where one may. A trial that ends soon may still make room."""
        limits, (mean, rest) = self._limits, self.expected()
        if limits.hours is not None and time.monotonic() - self._began + mean > 3600 * limits.hours:
            return f"limits.hours = {limits.hours:g} leaves no time for another trial"
        if limits.cost is not None and (self.spent(mean, *rest) > limits.cost or self.spent() >= limits.cost):
            return f"limits.cost = {limits.cost:g} leaves no money for another trial"
        return ""

    def seconds_left(self) -> dict[str, float]:
        """Seconds until each limit ends the sweep; that on the cost if all slots are in use."""
        limits, left = self._limits, dict[str, float]()
        if limits.hours is not None:
            left["hours"] = 3600 * limits.hours - (time.monotonic() - self._began)
        if limits.cost is not None and self.hourly:
            left["cost"] = 3600 * (limits.cost - self.spent()) / (self.hourly * self.resources.slots)
        return left

    def target_reached(self) -> str:
        """Which point is as good as the target; empty where none is, or no target is set."""
        target, best, goal = self._limits.target, self._trials.best(), self._trials.space.goals[0]
        if target is None or best is None or best.state != "finished":
            return ""
        value = best.means[0]
        good = goal.sign * value >= goal.sign * target
        return f"{best.label} reached limits.target = {target:g} ({value:.4f})" if good else ""


class Retention:
    """Removes files of ended trials that are no longer needed, and bounds the disk space of checkpoints."""

    def __init__(self, trials: Trials, resources: Resources, *, checkpoints: int) -> None:
        """`checkpoints`: how many of the newest ones a running trial keeps."""
        self._trials, self.slots, self._checkpoints = trials, resources.slots, checkpoints
        # Whether a group still writes into a bucket cannot be seen from here.
        self._at_end_only = resources.nested and trials.workdir.is_remote
        self._largest = 0
        self._measured, self._removed = set[str](), set[str]()
        self._to_clear: list[str] = []

    def reported(self, trial: str) -> None:
        """A trial has written a checkpoint: measure it; in a bucket once for each trial."""
        if self._trials.workdir.is_remote and trial in self._measured:
            return
        self._measured.add(trial)
        folders = Counter[str]()
        for name, size in self._trials.workdir.child(TRIALS, trial, CHECKPOINTS).sizes().items():
            folders[name.split("/")[0]] += size
        kinds = [[s for n, s in folders.items() if n.startswith(kind)] for kind in ("step-", "best-")]
        self._largest = max(self._largest, sum(max(sizes, default=0) for sizes in kinds))

    def ended(self, trial: str) -> None:
        """Remove a trial's checkpoints, once no worker writes them, and students no longer among the best."""
        self._to_clear.append(trial)
        self.clear()
        for name in ranked_trials(self._trials)[self._trials.space.keep_students :]:
            if name not in self._removed:
                self._trials.workdir.remove(f"{TRIALS}/{name}/{STUDENT}")
                self._removed.add(name)
        self._trials.workdir.publish()

    def clear(self, *, at_end: bool = False) -> bool:
        """Remove ended trials' checkpoints, except where a worker may write; whether some are left."""
        from newsbert_ray.training.ray_group import GROUP_FOLDER, is_idle

        for name in list(self._to_clear):
            folder = self._trials.workdir.path / TRIALS / name
            if is_idle(folder) and (at_end or not self._at_end_only):
                self._trials.workdir.remove(f"{TRIALS}/{name}/{CHECKPOINTS}")
                shutil.rmtree(folder / GROUP_FOLDER, ignore_errors=True)
                self._to_clear.remove(name)
        return bool(self._to_clear) and not self._at_end_only

    def line(self) -> str:
        """Disk space of checkpoints and of the students that are kept."""
        students, now = Counter[str](), 0
        for name, size in self._trials.workdir.child(TRIALS).sizes().items():
            trial, part = f"{name}/".split("/")[:2]
            students[trial] += size if part == STUDENT else 0
            now += size if part == CHECKPOINTS else 0
        kept = [students[trial] for trial in ranked_trials(self._trials) if students[trial]]
        # The newest checkpoints of each running trial, the one being written, and the best model.
        bound = self.slots * (self._checkpoints + 1) * self._largest
        return (
            f"disk: {len(kept)} students kept, {format_size(sum(kept))} "
            f"(keep_students: {self._trials.space.keep_students}); checkpoints {format_size(now)} now, at "
            f"most {format_size(bound)} during the sweep ({self.slots} trials at once)"
        )


def ranked_trials(trials: Trials) -> list[str]:
    """Names of the finished trials: those on the Pareto front of several goals, then by the first goal."""
    finished = [trial for trial in trials.ended.values() if trial.state == "finished"]
    goals = trials.space.goals
    scores = [tuple(g.sign * v for g, v in zip(goals, trial.values, strict=True)) for trial in finished]
    front = set(sweep_data.undominated(scores)) if len(goals) > 1 else set()
    order = sorted(range(len(scores)), key=lambda i: (i not in front, -scores[i][0]))
    return [finished[i].name for i in order]
