"""The Ray Train shell: a group of workers, each with its part of every batch from Ray Data. No arithmetic
here."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

from newsbert_ray.config import SettingsError, TrainSettings
from newsbert_ray.connect import RaySession, ray_session
from newsbert_ray.data.batches import Order
from newsbert_ray.data.reading import Course
from newsbert_ray.data.shards import Manifest
from newsbert_ray.record import METRICS, read_entries
from newsbert_ray.training.journal import Display, append_entry
from newsbert_ray.training.loop import Report

_MAX_FAILURES = 3
_TAIL_SECONDS = 0.5


class GroupError(RuntimeError):
    """A group of workers that failed for good; the text holds the first worker's reason."""


def train_group(settings: TrainSettings, manifest: Manifest, *, report: Report | None) -> None:
    """Train with `settings.workers` Ray Train workers, in the cluster at hand or a private one, to a record.

    A worker that dies takes its group back to the last checkpoint, three times at most; entries reach this
    process through the run's metrics.jsonl, so the run's folder must be one that all nodes see.

    Raises:
        SettingsError: the cluster has not the resources.
        GroupError: the workers died more than three times, or one raised an error that would come again.
    """
    with ray_session(dashboard=True) as session:
        _check_resources(settings, session)
        failure: list[BaseException] = []
        fit = threading.Thread(target=_fit, args=(settings, session, failure), daemon=True)
        fit.start()
        _follow(fit, settings, manifest, report, session)
        if failure:
            raise GroupError(f"the training group failed: {_reason(failure[0])}") from failure[0]


def _fit(settings: TrainSettings, session: RaySession, failure: list[BaseException]) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    storage = Path(settings.out) / "ray"
    torch_config = None
    if session.address.startswith("127.0.0.1"):
        from newsbert_ray.training.rendezvous import LoopbackConfig

        torch_config = LoopbackConfig()
    gpu = _use_gpu(settings, session)
    for attempt in range(_MAX_FAILURES + 1):
        try:
            TorchTrainer(
                _work,
                train_loop_config={
                    "settings": settings.model_dump(),
                    "threads": _threads(settings, session),
                },
                torch_config=torch_config,
                scaling_config=ScalingConfig(
                    num_workers=settings.workers,
                    use_gpu=gpu,
                    resources_per_worker={"CPU": 1, **({"GPU": 1} if gpu else {})},
                ),
                run_config=RunConfig(name=f"group-{attempt}", storage_path=str(storage)),
            ).fit()
        except BaseException as error:
            if attempt == _MAX_FAILURES or _own_reason(error):
                failure.append(error)
                break
        else:
            break
    shutil.rmtree(storage, ignore_errors=True)


def _work(config: dict[str, Any]) -> None:
    """One worker of the group."""
    import ray.train
    import torch
    from ray.train.torch import get_device

    from newsbert_ray.data.stream import stream_updates
    from newsbert_ray.training.loop import World
    from newsbert_ray.training.work import run_worker

    settings = TrainSettings.model_validate(config["settings"])
    torch.set_num_threads(config["threads"])
    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size(), get_device())

    def say(line: str) -> None:
        append_entry(Path(settings.out) / METRICS, {"kind": "note", "step": 0, "text": line})

    def report(entry: dict[str, Any]) -> None:
        if entry["kind"] == "evaluation":
            ray.train.report({"step": entry["step"], "epoch": entry["epoch"], **entry["validation"]})

    run_worker(
        settings, world, updates=lambda plan, done: stream_updates(plan, done=done), report=report, say=say
    )


def _follow(
    fit: threading.Thread,
    settings: TrainSettings,
    manifest: Manifest,
    report: Report | None,
    session: RaySession,
) -> None:
    """Show and pass on what the first worker writes to metrics.jsonl until the group ends."""
    plan = Course(
        settings.data,
        manifest,
        Order(settings.seed, settings.batch_size),
        settings.epochs,
        settings.train_rows,
    )
    path = Path(settings.out) / METRICS
    seen = len(read_entries(path))
    with Display(total=plan.total_steps) as display:
        link = f", dashboard {session.dashboard}" if session.dashboard else ""
        display.say(f"Ray Train group of {settings.workers} at {session.address}{link}")
        alive = True
        while alive:
            fit.join(_TAIL_SECONDS)
            alive = fit.is_alive()
            entries = read_entries(path)
            # A restarted group first drops the entries after its checkpoint.
            for entry in entries[min(seen, len(entries)) :]:
                display(entry)
                if report is not None and entry["kind"] == "evaluation":
                    report(entry)
            seen = len(entries)


def _check_resources(settings: TrainSettings, session: RaySession) -> None:
    if session.cpus < settings.workers:
        raise SettingsError(
            f"workers {settings.workers}: the cluster has {session.cpus:g} CPUs and each worker takes one; "
            f"use --workers {max(1, int(session.cpus))} or add nodes"
        )
    if settings.device == "cuda" and session.gpus < settings.workers:
        raise SettingsError(
            f"workers {settings.workers} on device cuda: the cluster has {session.gpus:g} GPUs; use "
            "fewer workers"
        )


def _use_gpu(settings: TrainSettings, session: RaySession) -> bool:
    return settings.device != "cpu" and session.gpus >= settings.workers


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
    workers = getattr(error, "worker_failures", None) or {}
    for one in workers.values():
        lines = str(one).strip().splitlines()
        if lines and lines[-1].startswith("newsbert_ray."):
            return lines[-1].partition(": ")[2]
    return None
