"""The Ray Train shell: a group of workers, each with its part of every batch. No arithmetic here."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from newsbert_ray import ray_private
from newsbert_ray.config import SettingsError, TrainSettings
from newsbert_ray.data.reading import make_schedule
from newsbert_ray.data.shards import Manifest
from newsbert_ray.files import is_locked, locked
from newsbert_ray.ray_session import RaySession, environment, initialised, ray_session
from newsbert_ray.record import RECORD
from newsbert_ray.storage import workdir as storage
from newsbert_ray.storage.workdir import restore_urls, with_local_paths
from newsbert_ray.telemetry import EventLog
from newsbert_ray.training.journal import Display
from newsbert_ray.training.loop import PreemptedError, Report

LOCK = ".group"
"""File in a run's folder that a group's rank 0 holds locked; the system releases it however that ends."""
GROUP_FOLDER = "ray"
"""Folder in a run's folder for Ray Train's own files, while the group works."""
LOCK_SECONDS = 60.0
"""How long to wait for the workers of an earlier start to end: they outlive a driver that is killed."""
WATCH_SECONDS = 1.0
"""Between two checks for a preemption notice: a small part of a spot warning's 30 to 120 s."""
READ_WINDOWS = 1
"""Windows of an epoch that workers read themselves: one is in memory anyway, and Ray Data, which streams more
of them, takes half a minute to start."""
ENDING_SECONDS = 20.0
"""How long a group that is stopped may take to end; ordinarily it is one."""
_MAX_FAILURES = 3
"""Deaths without a step further than before; whoever gets on may die as often as machines are taken away."""
_LOOK_SECONDS = 0.5
_ENVIRONMENT = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
"""Ray's own 2 s would pass after every trial of a sweep."""
_ELASTIC = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"}
"""A group that may be smaller does not wait longer than that for the nodes of all its workers."""
_ONE_MACHINE = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""A process less where nothing is left to go on with when the machine is taken away."""


class GroupError(RuntimeError):
    """A group of workers that failed for good; the text holds the first worker's reason."""


def train_group(
    settings: TrainSettings,
    manifest: Manifest,
    *,
    report: Report | None,
    quiet: bool = False,
    gpus: float | None = None,
) -> None:
    """Train with `settings.workers` Ray Train workers, in the cluster at hand or a private one, to a record.

    A worker that dies takes its group back to the last checkpoint, and so does a machine that is taken away,
    after one more checkpoint; with `settings.min_workers` the group then goes on with fewer. The run's folder
    must be one that all nodes see, or in a bucket. Whatever ends this function (a report that raises, Ctrl-C)
    ends the group first.

    Args:
        report: gets each evaluation's entry once.
        quiet: print nothing, and be brief: a sweep's trial. Its workers take a CPU for each of their threads,
            and always read the shards themselves, the same batches: Ray Data takes 1.5 GB too.
        gpus: share of a GPU for each worker, where the caller has made sure of the room; found out from the
            cluster by default.
    Raises:
        SettingsError: the cluster has not the resources.
        GroupError: the workers died more than three times without getting on, or one raised an error that
            would come again.
    """
    with ExitStack() as stack:
        session = stack.enter_context(ray_session(dashboard=not quiet))
        # A run of its own takes a CPU for each worker: its threads may be more than this machine's cores.
        cpus = float(settings.threads or 1) if quiet else 1.0
        if gpus is None:
            _check_resources(settings, session, cpus=cpus)
            ready = session.gpus >= (settings.min_workers or settings.workers)
            ready = ready or (session.growing and settings.device == "cuda")
            gpus = 1.0 if settings.device != "cpu" and ready else 0.0
        display = None
        if not quiet:
            display = stack.enter_context(Display(total=_total_steps(settings, manifest)))
            link = f", dashboard {session.dashboard}" if session.dashboard else ""
            display.say(f"Ray Train group of {settings.workers} at {session.address}{link}")
        stream = not quiet and len(make_schedule(settings, manifest).windows(0)) > READ_WINDOWS
        group = _Group(settings, session, trial=quiet, stream=stream, resources={"CPU": cpus, "GPU": gpus})
        try:
            group.follow(display=display, report=report)
        finally:
            group.end()
    if group.failure:
        raise GroupError(f"the training group failed: {_reason(group.failure)}") from group.failure


class _Group:
    """A Ray Train run in a thread of its own, because it cannot be interrupted where it waits."""

    def __init__(
        self,
        settings: TrainSettings,
        session: RaySession,
        *,
        trial: bool,
        stream: bool,
        resources: dict[str, float],
    ) -> None:
        self.failure: BaseException | None = None
        self._settings = settings
        self._loopback = session.address.startswith("127.0.0.1")
        self._resources = resources
        self._storage = str(storage.join(settings.out, GROUP_FOLDER))
        # Workers of an earlier start may still send to theirs.
        self._name = uuid.uuid4().hex
        self._furthest = 0
        self._notes: SimpleQueue[str] = SimpleQueue()
        self._config = {
            "settings": settings.model_dump(),
            "threads": _threads(settings, session),
            "trial": trial,
            "stream": stream,
            "group": self._name,
            "after": "",
        }
        self._ending = threading.Event()
        self._clear()
        if not storage.is_url(settings.out):
            Path(self._storage).mkdir(parents=True)
        self._fit = threading.Thread(target=self._train, daemon=True)
        self._fit.start()

    def follow(self, *, display: Display | None, report: Report | None) -> None:
        """Show and pass on what the first worker reports until the group ends."""
        reported: set[int] = set()
        alive = True
        while alive:
            self._fit.join(_LOOK_SECONDS)
            alive = self._fit.is_alive()
            while display and not self._notes.empty():
                display.say(self._notes.get())
            for entry in take_entries(self._name):
                self._furthest = max(self._furthest, entry["step"])
                evaluation = entry["kind"] == "evaluation"
                if evaluation and entry["step"] in reported:
                    continue  # a restarted group comes by its last evaluations again
                if display:
                    display(entry)
                if evaluation:
                    reported.add(entry["step"])
                    if report:
                        report(entry)

    def end(self) -> None:
        """End the group wherever it stands, and wait until nothing of it writes; not longer than it may."""
        self._ending.set()
        end = time.monotonic() + ENDING_SECONDS
        stopped = self._fit.is_alive()
        while self._fit.is_alive() and time.monotonic() < end:
            ray_private.end_controllers()
            self._fit.join(0.2)
        if stopped:
            ray_private.release_orphans()
        while stopped and not is_idle(storage.local(self._settings.out)) and time.monotonic() < end:
            time.sleep(0.1)
        forget_entries(self._name)
        self._clear()

    def _clear(self) -> None:
        """Remove what Ray Train has left; it is of no use to another start."""
        with suppress(storage.StorageError):
            storage.remove(self._settings.out, GROUP_FOLDER)

    def _train(self) -> None:
        failures = attempt = furthest = 0
        while not self._ending.is_set():
            try:
                self._fit_once(attempt)
                return
            except BaseException as error:
                failures = 1 if self._furthest > furthest else failures + 1
                furthest, attempt = self._furthest, attempt + 1
                if failures > _MAX_FAILURES or self._ending.is_set() or _own_reason(error):
                    self.failure = error
                    return
                reason = _reason(error)
                self._config["after"] = reason
                self._notes.put(f"{reason}; the group goes on from its last checkpoint")
                # Where it was the controller that died, its CPUs are still taken.
                ray_private.release_orphans()

    def _fit_once(self, attempt: int) -> None:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig

        gpus = self._resources["GPU"]
        # NCCL refuses two workers on one GPU.
        torch_config = (ray_private.loopback_config() if self._loopback else TorchConfig)(
            backend="gloo" if 0 < gpus < 1 else None
        )
        elastic = self._settings.min_workers not in (None, self._settings.workers)
        more = {**(_ONE_MACHINE if self._loopback else {}), **(_ELASTIC if elastic else {})}
        with environment({**_ENVIRONMENT, **more}):
            ray_private.group_trainer()(
                _work,
                train_loop_config=self._config,
                torch_config=torch_config,
                scaling_config=ScalingConfig(
                    num_workers=_group_size(self._settings),
                    use_gpu=gpus > 0,
                    resources_per_worker={name: amount for name, amount in self._resources.items() if amount},
                ),
                run_config=RunConfig(name=f"{self._name}-{attempt}", storage_path=self._storage),
            ).fit()


def _work(config: dict[str, Any]) -> None:
    """One worker of the group."""
    import ray.train
    import torch
    from ray.train.torch import get_device

    from newsbert_ray.training.worker import run_worker
    from newsbert_ray.world import World

    given = TrainSettings.model_validate(config["settings"])
    settings = with_local_paths(given)
    torch.set_num_threads(config["threads"])
    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size(), get_device())
    run = Path(settings.out)

    def report(entry: dict[str, Any]) -> None:
        if world.is_rank_zero:
            if entry["kind"] in ("evaluation", "checkpoint"):
                storage.publish(given.out)
            send_entry(config["group"], entry)

    with ExitStack() as stack:
        if world.is_rank_zero:
            storage.bring(given.out)
            stack.enter_context(rank_zero_lock(run))
            if config["after"]:
                EventLog(run)("worker_restart", reason=config["after"])
        # The others wait here for the first one; an earlier start's workers may have finished meanwhile.
        if world.sum_values({"finished": float(world.is_rank_zero and (run / RECORD).exists())})["finished"]:
            return
        leaving = stack.enter_context(watch_for_preemption())
        run_worker(
            settings,
            world,
            updates=_updates(stream=config["stream"]),
            report=report,
            say=lambda line: report({"kind": "note", "step": 0, "text": line}),
            preempted=leaving,
        )
        if world.is_rank_zero:
            restore_urls(run, given)
            storage.publish(given.out)
            if config["trial"]:
                storage.discard(given.out)  # a trial's: its node may see hundreds of them


def _updates(*, stream: bool) -> Any:
    from newsbert_ray.data.reading import read_updates
    from newsbert_ray.data.stream import stream_updates

    source = stream_updates if stream else read_updates
    return lambda schedule, done: source(schedule, done=done)


def _group_size(settings: TrainSettings) -> Any:
    """How many workers Ray Train is to start: from the least to all where fewer will do."""
    least = settings.min_workers or settings.workers
    return settings.workers if least == settings.workers else (least, settings.workers)


def _total_steps(settings: TrainSettings, manifest: Manifest) -> int:
    return make_schedule(settings, manifest).total_steps


def _check_resources(settings: TrainSettings, session: RaySession, *, cpus: float) -> None:
    if session.growing:
        return  # Ray's autoscaler brings what is asked for
    least = settings.min_workers or settings.workers
    if session.cpus < least * cpus:
        raise SettingsError(
            f"workers {settings.workers}: the cluster has {session.cpus:g} CPUs and each worker takes "
            f"{cpus:g}; use --workers {max(1, int(session.cpus / cpus))} or add nodes"
        )
    if settings.device == "cuda" and session.gpus < settings.workers:
        raise SettingsError(
            f"workers {settings.workers} on device cuda: the cluster has {session.gpus:g} GPUs; use "
            "fewer workers"
        )


def _threads(settings: TrainSettings, session: RaySession) -> int:
    if settings.threads is not None:
        return settings.threads
    return max(1, int(session.cpus) // settings.workers) if session.private else 1


def _reason(error: BaseException) -> str:
    """What a person should read of a group's failure: our own message where a worker raised one."""
    lines = str(error).strip().splitlines()
    return _own_reason(error) or (lines[-1] if lines else type(error).__name__)


def _own_reason(error: BaseException) -> str | None:
    """The message of an error of this package that a worker raised: it would come again on every start."""
    for one in (getattr(error, "worker_failures", None) or {}).values():
        if type(one).__module__.startswith("newsbert_ray.") and not isinstance(one, PreemptedError):
            return str(one)
    return None


_NAMESPACE = b"newsbert-entries"


def send_entry(group: str, entry: dict[str, Any]) -> None:
    """Send `entry` (JSON values) to the process that called `group`."""
    ray_private.put_value(f"{group}/{time.time_ns():020d}", json.dumps(entry), namespace=_NAMESPACE)


def take_entries(group: str) -> list[dict[str, Any]]:
    """The entries that `group` has sent since the last call, in order; none while the head is away."""
    return [json.loads(value) for value in ray_private.take_values(f"{group}/", namespace=_NAMESPACE)]


def forget_entries(group: str) -> None:
    """Remove the entries of `group` that nobody has taken."""
    ray_private.remove_values(f"{group}/", namespace=_NAMESPACE)


@contextmanager
def watch_for_preemption() -> Iterator[Callable[[], bool]]:
    """A function that tells whether this machine is about to be taken away (spot warning, drained node).

    The function costs nothing: a thread asks. Outside a cluster it always returns False.
    """
    if not initialised():
        yield lambda: False
        return
    import ray

    node = ray.get_runtime_context().get_node_id()
    leaving, over = threading.Event(), threading.Event()

    def watch() -> None:
        while not over.wait(WATCH_SECONDS) and not leaving.is_set():
            with suppress(Exception):  # the head may be away for a while; the next check asks again
                if node in ray_private.draining_nodes():
                    leaving.set()

    thread = threading.Thread(target=watch, name="watch-for-preemption", daemon=True)
    thread.start()
    try:
        yield leaving.is_set
    finally:
        over.set()
        thread.join(WATCH_SECONDS)


@contextmanager
def rank_zero_lock(run: Path, *, wait_seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold the run's folder for this group's rank 0, once the one of an earlier start has ended.

    Raises:
        GroupError: it has not ended within `wait_seconds`.
    """
    busy = GroupError(
        f"{run}: workers of an earlier start still train in it after {wait_seconds:g} s; end them, "
        "or wait, then run the same command again"
    )
    with locked(run / LOCK, wait_seconds=wait_seconds, error=busy):
        yield


def is_idle(run: Path) -> bool:
    """Whether no group trains in the run's folder."""
    return not is_locked(run / LOCK)
