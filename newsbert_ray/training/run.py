"""`newsbert-ray train`: prepares the run's folder and trains in this process or in a Ray Train group."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from newsbert_ray.config import SCRATCH, SettingsError, TrainSettings, build_settings
from newsbert_ray.data.shards import Manifest, read_manifest, require_tokenizer
from newsbert_ray.files import locked, write_json
from newsbert_ray.model.saved import CHECKPOINTS
from newsbert_ray.ray_session import inside_cluster
from newsbert_ray.record import RECORD, RunRecord, read_record
from newsbert_ray.settings import flatten
from newsbert_ray.storage.workdir import (
    HUB_NAMES,
    WorkDir,
    absolute,
    download_input,
    locations_of,
    open_workdir,
    restore_urls,
    with_local_paths,
    with_locations,
)
from newsbert_ray.training.journal import Display, closing_lines
from newsbert_ray.training.loop import Report
from newsbert_ray.training.prerequisites import NEUTRAL_SETTINGS, train_prerequisite

SETTINGS = "settings.json"
"""The run's settings and its shards' fingerprint, written at its first start."""
LOCK = ".lock"


class RunFolderError(ValueError):
    """The run's folder belongs to another run or is in use; the message names it and the remedy."""


def train(
    settings: TrainSettings,
    *,
    report: Report | None = None,
    quiet: bool = False,
    gpus: float | None = None,
    teachers: str | Path | None = None,
) -> RunRecord:
    """Distil a student from a teacher on prepared shards.

    One worker trains in this process; several workers, or one inside a Ray cluster, form a Ray Train group.
    With `quiet` (a sweep's trial) one worker never forms a group: the sweep has reserved its resources.
    Arguments, result and errors are those of `newsbert_ray.train`.
    """
    say = _silent if quiet else print
    location, settings = settings.out, _with_absolute_locations(settings)
    in_process = settings.workers == 1 and (quiet or not inside_cluster())
    # A trial's folder is locked by its sweep; a group's rank 0 has its own copy.
    with open_workdir(
        settings.out, markers=(SETTINGS, RECORD), small=not in_process, exclusive=not quiet
    ) as workdir:
        manifest = read_manifest(download_input(settings.data))
        if settings.unlabelled is not None:
            other = read_manifest(download_input(settings.unlabelled))
            require_tokenizer(other, manifest, folder=settings.unlabelled)
        with _lock_run(workdir, settings, manifest):
            finished = (workdir.path / RECORD).exists()
            if not finished:
                workdir.publish()
                train_first = partial(train, quiet=quiet, gpus=gpus, teachers=teachers)
                ready = train_prerequisite(settings, shared=teachers, train=train_first, say=say)
                if settings.student.kind == "linear":
                    _train_linear(with_local_paths(ready), manifest, report=report, quiet=quiet)
                elif in_process:
                    _train_in_process(with_local_paths(ready), manifest, workdir, report=report, quiet=quiet)
                else:
                    from newsbert_ray.training.ray_group import train_group

                    train_group(ready, manifest, report=report, quiet=quiet, gpus=gpus)
                    workdir.download(small=True)
            elif not settings.checkpoint.keep_finished:
                workdir.remove(CHECKPOINTS)
            restore_urls(workdir.path, settings)
            workdir.publish()
            record = read_record(workdir.path)
    if finished:
        say(f"already finished: {location}; give another --out to train again")
    else:
        say(closing_lines(record, WorkDir.at(location)))
    return record


def _with_absolute_locations(settings: TrainSettings) -> TrainSettings:
    """Settings with absolute paths: workers and readers of the record have other working directories."""
    return with_locations(
        settings,
        {
            name: absolute(location)
            for name, location in locations_of(settings).items()
            if name not in HUB_NAMES or (location != SCRATCH and Path(location).is_dir())
        },
    )


def _train_in_process(
    settings: TrainSettings, manifest: Manifest, workdir: WorkDir, *, report: Report | None, quiet: bool
) -> None:
    """Train in this process; each checkpoint is published before it is reported."""
    from newsbert_ray.data.reading import World, make_schedule, read_updates
    from newsbert_ray.ray_session import watch_for_preemption
    from newsbert_ray.training.worker import WorkerContext, run_worker

    display = None if quiet else Display(total=make_schedule(settings, manifest).total_steps)

    def receive(entry: dict[str, Any]) -> None:
        if entry["kind"] in ("evaluation", "checkpoint"):
            workdir.publish()
        if display:
            display(entry)
        if report is not None and entry["kind"] == "evaluation":
            report(entry)

    with display or nullcontext(), watch_for_preemption() as preempted:
        say = display.say if display else _silent
        world = World(device=pick_device(settings))
        run_worker(settings, WorkerContext(world, read_updates, receive, say, preempted))


def _train_linear(settings: TrainSettings, manifest: Manifest, *, report: Report | None, quiet: bool) -> None:
    """Fit the linear model in this process, whatever the number of workers."""
    from newsbert_ray.training.linear import train_linear

    def receive(entry: dict[str, Any]) -> None:
        metrics, strength = entry["validation"]["student"], entry["train"]["strength"]
        if not quiet:
            print(f"C {strength:g}: validation accuracy {metrics['accuracy']:.4f}", flush=True)
        if report is not None:
            report(entry)

    train_linear(settings, manifest, report=receive)


def pick_device(settings: TrainSettings) -> Any:
    """The torch device for these settings.

    Raises:
        SettingsError: device is cuda and there is no GPU.
    """
    import torch

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device cuda: no GPU is visible here; use --device auto or cpu")
    return torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def _lock_run(workdir: WorkDir, settings: TrainSettings, manifest: Manifest) -> Iterator[None]:
    """Lock the run's folder for this process and check that it belongs to this run."""
    run, location = workdir.path, workdir.location
    if run.exists() and not run.is_dir():
        raise RunFolderError(f"{location}: is a file; give another --out")
    if run.is_dir() and any(run.iterdir()) and not (run / SETTINGS).exists() and not (run / LOCK).exists():
        raise RunFolderError(
            f"{location}: holds other files and no run; give an empty or new folder as --out"
        )
    run.mkdir(parents=True, exist_ok=True)
    busy = RunFolderError(f"{location}: another process trains in it; wait for it, or give another --out")
    with locked(run / LOCK, error=busy):
        _check_settings(workdir, settings, manifest)
        yield


def _check_settings(workdir: WorkDir, settings: TrainSettings, manifest: Manifest) -> None:
    """Write settings.json or, if it exists, compare it with these settings."""
    path, location = workdir.path / SETTINGS, workdir.location
    values = settings.model_dump(mode="json")
    current = {"settings": values, "fingerprint": manifest.fingerprint}
    if not path.exists():
        write_json(path, current)
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        # A run of an earlier version lacks the settings that are new.
        before = flatten(build_settings(TrainSettings, stored["settings"]).model_dump(mode="json"))
        differences = [
            f"{name} was {before.get(name)!r}, now {value!r}"
            for name, value in flatten(values).items()
            if name.partition(".")[0] not in NEUTRAL_SETTINGS and before.get(name) != value
        ]
        if stored["fingerprint"] != manifest.fingerprint:
            differences.append("the shards were prepared again")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise RunFolderError(
            f"{workdir.child(SETTINGS).location}: damaged; give another --out, or delete {location}"
        ) from error
    if differences:
        raise RunFolderError(f"{location}: holds another run ({'; '.join(differences)}); give another --out")


def _silent(_: str) -> None:
    pass
