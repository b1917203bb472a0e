"""Training with a group of Ray Train workers, each of which trains on its part of every batch.

No arithmetic here: a worker runs `training.worker.run_worker`, as a process without Ray does.
"""

from __future__ import annotations

import threading
import time
import uuid
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from newsbert_ray import ray_private
from newsbert_ray.config import SettingsError, TrainSettings
from newsbert_ray.data.reading import make_schedule
from newsbert_ray.data.shards import Manifest
from newsbert_ray.files import is_locked, locked
from newsbert_ray.ray_session import RaySession, StopSignals, environment, ray_session, watch_for_end
from newsbert_ray.record import RECORD
from newsbert_ray.storage.bucket import StorageError
from newsbert_ray.storage.workdir import WorkDir, restore_urls, with_local_paths
from newsbert_ray.telemetry import EventLog
from newsbert_ray.training.journal import Display
from newsbert_ray.training.loop import PreemptedError, Report

LOCK = ".group"
"""File in a run's folder that a group's rank 0 holds locked; the system releases it however that ends."""
GROUP_FOLDER = "ray"
"""Folder in a run's folder for Ray Train's own files, while the group runs."""
MAX_WINDOWS_READ = 1
"""Epochs of more windows are streamed by Ray Data, which takes half a minute to start; workers read the
others themselves, since one window is in memory anyway."""
STEP_SECONDS = 0.5
"""Shortest time between two entries that only move the progress."""
END_SECONDS = 20.0
"""How long a group that is stopped may take to end; usually it takes one."""
_MAX_FAILURES = 3
"""Failures in a row without a step further than before."""


class GroupError(RuntimeError):
    """A group of workers that failed for good."""


@dataclass(frozen=True)
class GroupJob:
    """What every worker of a group receives.

    Attributes:
        settings: with locations as the user gave them; each machine downloads what it reads.
        group: unique name of this start; workers of an earlier one may still send entries under theirs.
        is_trial: a sweep's trial: its copy on a node is deleted at the end.
        stream: let Ray Data read the shards.
        restart_reason: why the group was started again; empty at the first start.
    """

    settings: TrainSettings
    group: str
    threads: int
    is_trial: bool
    stream: bool
    restart_reason: str = ""


def train_group(
    settings: TrainSettings,
    manifest: Manifest,
    *,
    report: Report,
    quiet: bool = False,
    gpus: float | None = None,
) -> None:
    """Train with `settings.workers` Ray Train workers, in the cluster joined or a private one, to a record.

    After the death of a worker the group continues from the last checkpoint, with `settings.min_workers` also
    with fewer workers. Before a machine is taken away, and after Ctrl-C or SIGTERM, it writes one more. All
    nodes must see the run's folder, or it is in a bucket. SettingsError where the cluster has too few CPUs or
    GPUs; GroupError after too many failures without progress, or one that would come again.

    Args:
        report: called with the entries of rank 0, each evaluation's once.
        quiet: print nothing, and start fast: a sweep's trial. Each worker reserves a CPU for each of its
            threads, and reads the shards itself, in the same batches: Ray Data takes another 1.5 GB.
        gpus: share of a GPU for each worker, reserved by the caller; by default taken from the cluster.
    """
    with ExitStack() as stack:
        session = stack.enter_context(ray_session(dashboard=not quiet))
        # Outside a sweep a worker reserves one CPU: its threads may be more than this machine's cores.
        cpus = float(settings.threads or 1) if quiet else 1.0
        if gpus is None:
            gpus = _gpus_per_worker(settings, session, cpus=cpus)
        schedule = make_schedule(settings, manifest)
        display = stack.enter_context(Display(total=schedule.total_steps, quiet=quiet))
        link = f", dashboard {session.dashboard}" if session.dashboard else ""
        display.say(f"Ray Train group of {settings.workers} at {session.address}{link}")
        job = GroupJob(
            settings,
            group=uuid.uuid4().hex,
            threads=settings.threads
            or (max(1, int(session.cpus) // settings.workers) if session.private else 1),
            is_trial=quiet,
            stream=not quiet and len(schedule.windows(0)) > MAX_WINDOWS_READ,
        )
        is_local = session.address.startswith("127.0.0.1")
        signals = stack.enter_context(StopSignals(active=not quiet))
        group = _Group(job, is_local=is_local, resources={"CPU": cpus, "GPU": gpus})
        try:
            with signals.deferred():
                group.follow(display=display, report=report, signals=signals)
        finally:
            group.end()
    if group.failure:
        raise GroupError(f"the training group failed: {_reason(group.failure)}") from group.failure


class _Group:
    """A Ray Train run in its own thread, because Ray Train's `fit` cannot be interrupted."""

    def __init__(self, job: GroupJob, *, is_local: bool, resources: dict[str, float]) -> None:
        """`is_local`: all workers run on this machine; `resources`: CPUs and GPUs of each worker."""
        self.failure: BaseException | None = None
        self._job = job
        self._is_local = is_local
        self._resources = resources
        self._workdir = WorkDir(job.settings.out)
        self._furthest_step = 0
        self._notes: SimpleQueue[str] = SimpleQueue()
        self._ending = threading.Event()
        self._remove_files()
        if not self._workdir.is_remote:
            (self._workdir.path / GROUP_FOLDER).mkdir(parents=True)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def follow(self, *, display: Display, report: Report, signals: StopSignals) -> None:
        """Show and pass on the entries of rank 0 until the group ends; a signal asks it to end."""
        evaluated, running = set[int](), True
        while running:
            self._thread.join(0.5)
            running = self._thread.is_alive()
            if signals.number and not self._ending.is_set():
                self._ending.set()
                if not self._furthest_step:
                    return  # nothing to keep: the workers have not begun
                ray_private.request_stop(self._job.group)
            while not self._notes.empty():
                display.say(self._notes.get())
            for entry in ray_private.take_entries(self._job.group):
                self._furthest_step = max(self._furthest_step, entry["step"])
                is_evaluation = entry["kind"] == "evaluation"
                if is_evaluation and entry["step"] in evaluated:
                    continue  # a restarted group repeats its last evaluations
                display(entry)
                if is_evaluation:
                    evaluated.add(entry["step"])
                report(entry)

    def end(self) -> None:
        """End the group and wait until none of its workers writes any more, at most END_SECONDS."""
        self._ending.set()
        end = time.monotonic() + END_SECONDS
        stopped = self._thread.is_alive()
        while self._thread.is_alive() and time.monotonic() < end:
            ray_private.end_controllers()
            self._thread.join(0.2)
        if stopped:
            ray_private.release_orphans()
        while stopped and not is_idle(self._workdir.path) and time.monotonic() < end:
            time.sleep(0.1)
        ray_private.forget_entries(self._job.group)
        self._remove_files()

    def _remove_files(self) -> None:
        """Another start does not use Ray Train's own files."""
        with suppress(StorageError):
            self._workdir.remove(GROUP_FOLDER)

    def _run(self) -> None:
        failures = attempt = furthest_step = 0
        while not self._ending.is_set():
            try:
                self._fit(attempt)
                return
            except BaseException as error:
                failures = 1 if self._furthest_step > furthest_step else failures + 1
                furthest_step, attempt = self._furthest_step, attempt + 1
                if failures > _MAX_FAILURES or self._ending.is_set() or _own_reason(error):
                    self.failure = error
                    return
                reason = _reason(error)
                self._job = replace(self._job, restart_reason=reason)
                self._notes.put(f"{reason}; the group continues from its last checkpoint")
                # If it was the controller that died, Ray still holds the CPUs of its workers.
                ray_private.release_orphans()

    def _fit(self, attempt: int) -> None:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig

        settings, gpus = self._job.settings, self._resources["GPU"]
        fewest = settings.min_workers or settings.workers
        is_elastic = fewest != settings.workers
        workers: Any = (fewest, settings.workers) if is_elastic else settings.workers
        config_type = ray_private.loopback_config() if self._is_local else TorchConfig
        variables = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}  # each trial would wait for Ray's own 2 s
        if self._is_local:  # after a preemption no other machine is left: one process less
            variables["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
        if is_elastic:  # after this time it starts without the nodes that are missing
            variables["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "20"
        with environment(variables):
            ray_private.group_trainer()(
                _work,
                train_loop_config={"job": self._job},
                # Counts are exchanged between the CPUs. NCCL refuses two workers on one GPU.
                torch_config=config_type(backend="cpu:gloo,cuda:nccl" if gpus >= 1 else "gloo"),
                scaling_config=ScalingConfig(
                    num_workers=workers,
                    use_gpu=gpus > 0,
                    resources_per_worker={name: amount for name, amount in self._resources.items() if amount},
                ),
                run_config=RunConfig(
                    name=f"{self._job.group}-{attempt}",
                    storage_path=self._workdir.child(GROUP_FOLDER).location,
                ),
            ).fit()


def _work(config: dict[str, Any]) -> None:
    import ray.train
    import torch
    from ray.train.torch import get_device

    from newsbert_ray.data.reading import World, read_updates
    from newsbert_ray.data.stream import stream_updates
    from newsbert_ray.training.worker import run_worker

    job: GroupJob = config["job"]
    workdir, settings = WorkDir(job.settings.out), with_local_paths(job.settings)
    torch.set_num_threads(job.threads)
    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size(), get_device())
    run, sent = workdir.path, 0.0

    def report(entry: dict[str, Any]) -> None:
        nonlocal sent
        is_due = entry["kind"] != "step" or time.monotonic() - sent > STEP_SECONDS
        if world.is_rank_zero and is_due:
            if entry["kind"] in ("evaluation", "checkpoint"):
                workdir.publish()
            ray_private.send_entry(job.group, entry)
            sent = time.monotonic()

    with ExitStack() as stack:
        if world.is_rank_zero:
            workdir.download()
            stack.enter_context(rank_zero_lock(run))
            if job.restart_reason:
                EventLog(run)("worker_restart", reason=job.restart_reason)
        # The others wait here for rank 0; workers of an earlier start may have finished in the meantime.
        if world.sum_values({"finished": float(world.is_rank_zero and (run / RECORD).exists())})["finished"]:
            return
        run_worker(
            settings,
            world,
            updates=stream_updates if job.stream else read_updates,
            report=report,
            say=lambda line: report({"kind": "note", "step": 0, "text": line}),
            leaving=stack.enter_context(watch_for_end(lambda: ray_private.stop_requested(job.group))),
        )
        if world.is_rank_zero:
            restore_urls(run, job.settings)
            workdir.publish()
            if job.is_trial:
                workdir.discard()  # a node may run hundreds of trials


def _gpus_per_worker(settings: TrainSettings, session: RaySession, *, cpus: float) -> float:
    """0 or 1; SettingsError where the cluster has too few CPUs or GPUs and starts no more nodes."""
    fewest, wants_gpus = settings.min_workers or settings.workers, settings.device == "cuda"
    if session.has_autoscaler:
        return float(settings.device != "cpu" and (wants_gpus or session.gpus >= fewest))
    if session.cpus < fewest * cpus:
        raise SettingsError(
            f"workers {settings.workers}: the cluster has {session.cpus:g} CPUs and each worker takes "
            f"{cpus:g}; use --workers {max(1, int(session.cpus / cpus))} or add nodes"
        )
    if wants_gpus and session.gpus < settings.workers:
        raise SettingsError(
            f"workers {settings.workers} on device cuda: the cluster has {session.gpus:g} GPUs; use "
            "fewer workers"
        )
    return float(settings.device != "cpu" and session.gpus >= fewest)


def _reason(error: BaseException) -> str:
    """A group's failure in one line: the message of this package's error where a worker raised one."""
    lines = str(error).strip().splitlines()
    return _own_reason(error) or (lines[-1] if lines else type(error).__name__)


def _own_reason(error: BaseException) -> str | None:
    """The message of this package's error that a worker raised: it would come again on every start."""
    for failure in (getattr(error, "worker_failures", None) or {}).values():
        if type(failure).__module__.startswith("newsbert_ray.") and not isinstance(failure, PreemptedError):
            return str(failure)
    return None


def rank_zero_lock(run: Path, *, wait_seconds: float = 60.0) -> AbstractContextManager[None]:
    """Hold the run's folder for this group's rank 0. Workers of an earlier start, which outlive a driver that
    is killed, must end within `wait_seconds`; otherwise GroupError."""
    busy = GroupError(
        f"{run}: workers of an earlier start still train in it after {wait_seconds:g} s; end them, "
        "or wait, then run the same command again"
    )
    return locked(run / LOCK, wait_seconds=wait_seconds, error=busy)


def is_idle(run: Path) -> bool:
    return not is_locked(run / LOCK)
