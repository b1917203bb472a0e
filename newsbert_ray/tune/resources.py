"""What a trial occupies and how many run at once, decided before the first trial so that none waits for ever;
and whether every machine of the cluster can read and write what a trial needs."""

from __future__ import annotations

import math
import secrets
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from newsbert_ray.config import SettingsError, TrainSettings
from newsbert_ray.data.shards import MANIFEST
from newsbert_ray.files import format_size
from newsbert_ray.reporting.sweep_data import SWEEP, TRIALS, undominated
from newsbert_ray.storage.bucket import StorageError
from newsbert_ray.storage.workdir import WorkDir, fetch
from newsbert_ray.tune.space import Prices
from newsbert_ray.tune.trials import Trials, TrialSpec

CHECKPOINTS, STUDENT = "checkpoints", "student"
TRIALS_PER_GPU = 4
"""Trials that share a GPU by default."""

Node = Mapping[str, float]
"""Resources of a cluster node, as Ray names them: {"CPU": 8.0, "GPU": 1.0}."""


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
        """CPUs of one trial."""
        return self.cpus * self.workers

    @property
    def trial_gpus(self) -> float:
        """GPUs of one trial."""
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

    def refusal(self) -> str:
        """Why no trial may start now; empty where one may. A trial that ends soon may still make room."""
        ended, limits = self._trials.seconds.values(), self._limits
        mean = statistics.fmean(ended) if ended else 0.0
        rest = (max(0.0, mean - trial.seconds) for trial in self._trials.running.values())
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
        self._to_clear: list[TrialSpec] = []

    def reported(self, spec: TrialSpec) -> None:
        """A trial has written a checkpoint: measure it; in a bucket once for each trial."""
        if self._trials.workdir.is_remote and spec.name in self._measured:
            return
        self._measured.add(spec.name)
        folders = Counter[str]()
        for name, size in self._trials.workdir.child(TRIALS, spec.name, CHECKPOINTS).sizes().items():
            folders[name.split("/")[0]] += size
        # step-12 or best-12
        largest = [
            max((s for n, s in folders.items() if n.startswith(k)), default=0) for k in ("step", "best")
        ]
        self._largest = max(self._largest, sum(largest))

    def ended(self, spec: TrialSpec) -> None:
        """Remove a trial's checkpoints, once no worker writes them, and students no longer among the best."""
        self._to_clear.append(spec)
        self.clear()
        for name in ranked_trials(self._trials)[self._trials.space.keep_students :]:
            if name not in self._removed:
                self._trials.workdir.remove(f"{TRIALS}/{name}/{STUDENT}")
                self._removed.add(name)
        self._trials.workdir.publish()

    def clear(self, *, at_end: bool = False) -> bool:
        """Remove the checkpoints of ended trials in whose folders no worker writes; whether some are left.
        `at_end`: no worker is left in the cluster."""
        from newsbert_ray.training.ray_group import GROUP_FOLDER, is_idle

        for spec in list(self._to_clear):
            if is_idle(spec.out) and (at_end or not self._at_end_only):
                self._trials.workdir.remove(f"{TRIALS}/{spec.name}/{CHECKPOINTS}")
                shutil.rmtree(spec.out / GROUP_FOLDER, ignore_errors=True)
                self._to_clear.remove(spec)
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
    front = set(undominated(scores)) if len(goals) > 1 else set()
    order = sorted(range(len(finished)), key=lambda i: (i not in front, -scores[i][0]))
    return [finished[i].name for i in order]


class NodeError(RuntimeError):
    """A machine that cannot read or write what a trial needs; the text names both, and the cure."""


def check_nodes(workdir: WorkDir, *, data: Sequence[str] = (), teachers: Sequence[str] = ()) -> None:
    """Raise NodeError unless every node of the cluster can write to the sweep's folder and finds shards and
    teachers, which are downloaded there from a bucket."""
    import ray
    from ray.exceptions import RayError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    probe = None
    if not workdir.is_remote:
        probe = workdir.path.absolute() / f".probe-{secrets.token_hex(8)}"
        probe.touch()
    task: Any = ray.remote(num_cpus=0, max_retries=0)(node_fault)
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        pins = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
        needed = (workdir.absolute(), probe, list(data), list(teachers))
        answers = [task.options(scheduling_strategy=pin).remote(*needed) for pin in pins]
        for node, answer in zip(nodes, answers, strict=True):
            try:
                fault = ray.get(answer)
            except RayTaskError:
                raise
            except RayError:
                continue  # the node has left
            if fault:
                raise NodeError(f"node {node['NodeManagerAddress']} ({node['NodeID'][:12]}): {fault}")
    finally:
        if probe:
            probe.unlink(missing_ok=True)


def node_fault(workdir: WorkDir, probe: Path | None, data: Sequence[str], teachers: Sequence[str]) -> str:
    """Why this machine cannot run the sweep's trials; empty where it can. `probe`: a file that the driver has
    written into a folder that is not in a bucket."""
    if probe and not probe.exists():
        return _not_visible(workdir.location, "--out")
    needed = [(folder, "--data", MANIFEST) for folder in data]
    needed += [(folder, "--teacher", "") for folder in teachers]
    try:
        workdir.check_writable()
        lacking = ((name, flag) for name, flag, file in needed if not (fetch(name) / file).exists())
        return next((_not_visible(folder, flag) for folder, flag in lacking), "")
    except StorageError as error:
        return str(error)


def require_seen(sweep: WorkDir | None) -> None:
    """Raise NodeError on a machine that does not see the sweep's local folder: results would be lost
    there."""
    if sweep and not sweep.is_remote and not (sweep.path / SWEEP).exists():
        raise NodeError(f"this node {_not_visible(sweep.location, '--out')}")


def _not_visible(location: str, flag: str) -> str:
    cure = "a folder that all nodes share, or a URL such as s3://bucket/folder"
    return f"does not see {location}: give as {flag} {cure}"
