"""`newsbert-ray train`: prepares the run's folder and trains in this process or in a Ray Train group.

Runs that must finish first (a frozen teacher, the student to start from) are trained once for all runs that
need the same one.
"""

from __future__ import annotations

import hashlib
import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from newsbert_ray.config import SCRATCH, SettingsError, TrainSettings, build_settings
from newsbert_ray.data.shards import Manifest, read_manifest, require_tokenizer
from newsbert_ray.files import locked, write_json
from newsbert_ray.model.saved import CHECKPOINTS
from newsbert_ray.ray_session import Stopped, StopSignals, inside_cluster
from newsbert_ray.record import BEFORE, RECORD, TEACHER, RunRecord, read_record
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
from newsbert_ray.trackers import TrackedRun, Tracker, require_tracker, tracked
from newsbert_ray.training.checkpoint import step_folders
from newsbert_ray.training.journal import Display, closing_lines
from newsbert_ray.training.loop import Report

SETTINGS = "settings.json"
"""The run's settings and its shards' fingerprint, written at its first start."""
LOCK = ".lock"
NEUTRAL_SETTINGS = ("data", "out", "threads", "log_every", "checkpoint", "device", "min_workers", "track")
"""Settings that do not affect results; data is compared by the fingerprint of its shards."""


class RunFolderError(ValueError):
    """The run's folder belongs to another run or is in use; the message names it and the remedy."""


def train(
    settings: TrainSettings,
    *,
    report: Report | None = None,
    quiet: bool = False,
    gpus: float | None = None,
    teachers: str | Path | None = None,
    overwrite: bool = False,
    parent: TrackedRun | None = None,
) -> RunRecord:
    """Distil a student from a teacher on prepared shards.

    One worker trains in this process; several workers, or one inside a Ray cluster, form a Ray Train group.
    With `quiet` (a sweep's trial) one worker never forms a group: the sweep has reserved its resources.
    Arguments, result and errors are those of `newsbert_ray.train`; `parent` is the sweep's tracked run.
    """
    require_tracker(settings.track)
    say: Callable[[str], object] = (lambda _: None) if quiet else print
    location, settings = settings.out, _with_absolute_locations(settings)
    is_alone = settings.workers == 1 and (quiet or not inside_cluster())
    in_process = is_alone or settings.student.kind == "linear"
    # A trial's folder is locked by its sweep; a group's rank 0 has its own copy.
    with open_workdir(
        settings.out, markers=(SETTINGS, RECORD), small=not in_process, exclusive=not quiet
    ) as workdir:
        manifest = read_manifest(download_input(settings.data))
        if settings.unlabelled is not None:
            other = read_manifest(download_input(settings.unlabelled))
            require_tokenizer(other, manifest, folder=settings.unlabelled)
        with (
            _lock_run(workdir, settings, manifest, overwrite=overwrite),
            _stop_explained(workdir, quiet=quiet),
        ):
            finished = (workdir.path / RECORD).exists()
            if not finished:
                workdir.publish()
                train_first = partial(train, quiet=quiet, gpus=gpus, teachers=teachers, parent=parent)
                ready = train_prerequisite(settings, shared=teachers, train=train_first, say=say)
                values, kind = settings.model_dump(), "trial" if parent else "train"
                with tracked(settings.track, workdir.path, values, parent=parent, kind=kind) as tracker:
                    receive = partial(_receive, tracker, report)
                    if in_process:
                        _train_in_process(ready, manifest, workdir, report=receive, quiet=quiet)
                    else:
                        from newsbert_ray.training.ray_group import train_group

                        train_group(ready, manifest, report=receive, quiet=quiet, gpus=gpus)
                        workdir.download(small=True)
                    record = read_record(workdir.path)
                    tracker.log({"test": record.metrics.get("test") or {}}, record.steps)
            elif not settings.checkpoint.keep_finished:
                workdir.remove(CHECKPOINTS)
            restore_urls(workdir.path, settings)
            workdir.publish()
            record = read_record(workdir.path)
    if finished:
        say(f"already finished: {location}; give another --out, or --overwrite, to train again")
    else:
        say(closing_lines(record, WorkDir.at(location)))
    return record


@contextmanager
def _stop_explained(workdir: WorkDir, *, quiet: bool) -> Iterator[None]:
    """Ctrl-C or SIGTERM in the block names the checkpoint from which the same command goes on."""
    try:
        yield
    except KeyboardInterrupt as error:
        if quiet or str(error):  # a run that is needed first has named its own
            raise
        steps = [int(path.name.rpartition("-")[2]) for path in step_folders(workdir.path / CHECKPOINTS)]
        text = "there is no checkpoint yet; the same command starts again"
        if steps:
            text = f"the checkpoint of step {max(steps)} is kept; the same command goes on from there"
        elif workdir.is_remote:  # a group's checkpoints are not copied to this machine
            text = "the same command goes on from its last checkpoint"
        number = getattr(error, "number", signal.SIGINT)
        raise Stopped(number, f"{workdir.location}: {text}") from error


def _receive(tracker: Tracker, report: Report | None, entry: dict[str, Any]) -> None:
    tracker(entry)
    if report is not None and entry["kind"] == "evaluation":
        report(entry)


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
    settings: TrainSettings, manifest: Manifest, workdir: WorkDir, *, report: Report, quiet: bool
) -> None:
    """Train in this process; each checkpoint is published before it is reported."""
    from newsbert_ray.data.reading import World, make_schedule, read_updates
    from newsbert_ray.ray_session import watch_for_end
    from newsbert_ray.training.worker import run_worker, train_linear

    settings = with_local_paths(settings)
    if settings.student.kind == "linear":
        say = partial(print, flush=True)
        train_linear(settings, manifest, report=report, say=(lambda _: None) if quiet else say)
        return
    display = Display(total=make_schedule(settings, manifest).total_steps, quiet=quiet)

    def receive(entry: dict[str, Any]) -> None:
        if entry["kind"] in ("evaluation", "checkpoint"):
            workdir.publish()
        display(entry)
        report(entry)

    with display, StopSignals(active=not quiet) as signals, watch_for_end() as leaving:
        run_worker(
            settings,
            World(device=pick_device(settings)),
            updates=read_updates,
            report=receive,
            say=display.say,
            leaving=lambda: "stopped" if signals.number else leaving(),
            deferred=signals.deferred,
        )


def pick_device(settings: TrainSettings) -> Any:
    """The torch device for these settings; SettingsError if it is cuda and there is no GPU."""
    import torch

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device cuda: no GPU is visible here; use --device auto or cpu")
    return torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def _lock_run(
    workdir: WorkDir, settings: TrainSettings, manifest: Manifest, *, overwrite: bool
) -> Iterator[None]:
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
        if overwrite:
            workdir.clear()
        _check_settings(workdir, settings, manifest)
        yield


def _check_settings(workdir: WorkDir, settings: TrainSettings, manifest: Manifest) -> None:
    """Write settings.json or, if it exists, compare it with these settings."""
    path, location = workdir.path / SETTINGS, workdir.location
    values = settings.model_dump(mode="json")
    current = {"settings": values, "fingerprint": manifest.fingerprint}
    differences = []
    if path.exists():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            # A run of an earlier version lacks the settings that are new.
            before = build_settings(TrainSettings, stored["settings"]).model_dump(mode="json")
            differences = _differences(before, values)
            if stored["fingerprint"] != manifest.fingerprint:
                differences.append("shards that have been prepared again since")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise RunFolderError(
                f"{workdir.child(SETTINGS).location}: damaged; give another --out, or --overwrite"
            ) from error
    if differences and any("/step-" in name or name.endswith(RECORD) for name in workdir.sizes()):
        raise RunFolderError(
            f"{location}: holds another run, with {', '.join(differences)}; give its settings to go on with "
            "it, another --out for a new run, or --overwrite to replace it"
        )
    if differences:  # it ended before its first checkpoint
        workdir.clear()
    if differences or not path.exists():
        write_json(path, current)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`--epochs 3 instead of 5` for each setting that affects results and differs."""
    before, now = flatten(old), flatten(new)
    return [
        f"--{name} {before.get(name)} instead of {value}"
        for name, value in now.items()
        if name.partition(".")[0] not in NEUTRAL_SETTINGS and before.get(name) != value
    ]


_PURPOSES = {BEFORE: "the student to start from", TEACHER: "the teacher"}


def prerequisite_of(settings: TrainSettings) -> tuple[str, TrainSettings] | None:
    """The run that must finish before this one, if any: the name of its folder inside this run, and its
    settings with an empty `out`. It may have a prerequisite itself."""
    if settings.before.method != "none":
        return BEFORE, before_settings(settings, "")
    distill = settings.distill
    if (distill.frozen or distill.warm) and distill.teacher_run is None:
        return TEACHER, teacher_settings(settings, "")
    return None


def all_prerequisites(settings: TrainSettings) -> Iterator[TrainSettings]:
    """Settings of all runs that must finish before this one, the last of them first."""
    if (prerequisite := prerequisite_of(settings)) is not None:
        yield prerequisite[1]
        yield from all_prerequisites(prerequisite[1])


def teacher_settings(settings: TrainSettings, out: str | Path) -> TrainSettings:
    """The run into `out` that fine-tunes a frozen or warm teacher: method finetune with the teacher's depth,
    learning rate and epochs, on labelled texts; all of the encoder learns; everything else as in `settings`.
    """
    from newsbert_ray.model.families import encoder_depth

    values = settings.model_dump(exclude={"distill", "student", "method"})
    no_rates = {"teacher_learning_rate": None, "student_learning_rate": None, "top_learning_rate": None}
    depth = encoder_depth(download_input(settings.teacher), settings.model, settings.scratch)
    changes = {
        "out": str(out),
        "method": "finetune",
        "student": {"layers": depth},
        "learning_rate": settings.learning_rates["teacher"],
        "epochs": settings.distill.teacher_epochs or settings.epochs,
        "steps": None if settings.distill.teacher_epochs else settings.steps,
        "unlabelled": None,
        "unlabelled_share": 0.0,
        "model": {**values["model"], "trainable": None},
        "optimizer": {**values["optimizer"], **no_rates},
        "checkpoint": {**values["checkpoint"], "keep_finished": False},
    }
    return build_settings(TrainSettings, {**values, **changes}, where="the teacher's fine-tuning")


def before_settings(settings: TrainSettings, out: str | Path) -> TrainSettings:
    """The run into `out` whose student this one starts from: what `before` gives, and the task's own
    momentum; everything else as in `settings`."""
    before = settings.before
    values = settings.model_dump(exclude={"distill", "student", "method", "task", "before"})
    changes = {
        **before.model_dump(exclude_none=True),
        "steps": None if before.epochs else settings.steps,
        "out": str(out),
        "student": {"layers": settings.student.layers},
        "checkpoint": {**values["checkpoint"], "keep_finished": False},
    }
    return build_settings(TrainSettings, {**values, **changes}, where="the run before")


def train_prerequisite(
    settings: TrainSettings,
    *,
    shared: str | Path | None,
    train: Callable[[TrainSettings], object],
    say: Callable[[str], object],
) -> TrainSettings:
    """Train the run that must finish first, unless it is finished, and return settings that use its result.
    It is in the local folder `shared`, where other processes that need the same one wait for it, or beside
    this run."""
    prerequisite = prerequisite_of(settings)
    if prerequisite is None:
        return settings
    name, needed = prerequisite
    if shared is None:
        location = WorkDir(settings.out).companion(name).location
        say(f"first training {_PURPOSES[name]}, into {location}")
        train(needed.model_copy(update={"out": location}))
    else:
        folder = Path(shared) / _shared_name(needed)
        folder.parent.mkdir(parents=True, exist_ok=True)
        location = str(folder)
        with locked(folder.with_name(f"{folder.name}.lock"), wait_seconds=math.inf):
            if not (folder / RECORD).exists():
                train(needed.model_copy(update={"out": location}))
    if name == TEACHER:
        return with_locations(settings, {"distill.teacher_run": location})
    return with_locations(settings, {"teacher": f"{location.rstrip('/')}/student"})


def _shared_name(settings: TrainSettings) -> str:
    """A hash of everything that affects the run's result, its own prerequisites included."""
    runs = (settings, *all_prerequisites(settings))
    fingerprints = [read_manifest(download_input(run.data)).fingerprint for run in runs]
    values = [settings.model_dump(mode="json", exclude=set(NEUTRAL_SETTINGS)), *fingerprints]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
