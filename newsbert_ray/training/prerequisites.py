"""Runs that must finish before another: a frozen teacher, or the student that the other starts from.

Each is trained once for all runs that need the same one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from newsbert_ray.config import TrainSettings, build_settings
from newsbert_ray.data.shards import read_manifest
from newsbert_ray.files import locked
from newsbert_ray.record import BEFORE, RECORD, TEACHER
from newsbert_ray.storage.workdir import WorkDir, download_input, with_locations

NEUTRAL_SETTINGS = ("data", "out", "threads", "log_every", "checkpoint", "device", "min_workers", "track")
"""Settings that do not affect results; data is compared by the fingerprint of its shards."""


class Prerequisite(NamedTuple):
    """A run that must finish first: its settings with an empty `out`, what it is for, as shown to people, and
    the name of its folder inside the run that needs it."""

    settings: TrainSettings
    purpose: str
    name: str


def prerequisite_of(settings: TrainSettings) -> Prerequisite | None:
    """The run that must finish before this one, if any; it may have a prerequisite itself."""
    if settings.before.method != "none":
        return Prerequisite(before_settings(settings, ""), "the student to start from", BEFORE)
    distill = settings.distill
    if (distill.frozen or distill.warm) and distill.teacher_run is None:
        return Prerequisite(teacher_settings(settings, ""), "the teacher", TEACHER)
    return None


def all_prerequisites(settings: TrainSettings) -> Iterator[TrainSettings]:
    """Settings of all runs that must finish before this one, the last of them first."""
    prerequisite = prerequisite_of(settings)
    if prerequisite is not None:
        yield prerequisite.settings
        yield from all_prerequisites(prerequisite.settings)


def teacher_settings(settings: TrainSettings, out: str | Path) -> TrainSettings:
    """The run into `out` that fine-tunes a frozen or warm teacher.

    Method finetune with the teacher's depth, learning rate and epochs, on labelled texts; all of the encoder
    learns; everything else as in `settings`.
    """
    from newsbert_ray.model.families import encoder_depth

    values = settings.model_dump(exclude={"distill", "student", "method"})
    no_rates = {"teacher_learning_rate": None, "student_learning_rate": None, "top_learning_rate": None}
    depth = encoder_depth(download_input(settings.teacher), settings.model, settings.scratch)
    changes = {
        "out": str(out),
        "method": "finetune",
        "student": {"layers": depth},
        "learning_rate": settings.optimizer.teacher_learning_rate or settings.learning_rate,
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
    """The run into `out` whose student this one starts from.

    Method, task, data, epochs, learning rate and examples are those of `before` where it gives them, and the
    task's own momentum; everything else as in `settings`.
    """
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
    say: Callable[[str], None],
) -> TrainSettings:
    """Train the run that must finish first, unless it is finished, and return settings that use its result.

    Other processes on this machine that need the same one wait for it.

    Args:
        shared: local folder where many runs share their prerequisites; None puts it beside this run.
        train: trains a run, or returns at once if it is finished.
    """
    prerequisite = prerequisite_of(settings)
    if prerequisite is None:
        return settings
    if shared is None:
        location = WorkDir(settings.out).companion(prerequisite.name).location
        say(f"first training {prerequisite.purpose}, into {location}")
        train(prerequisite.settings.model_copy(update={"out": location}))
        return _use_result(settings, prerequisite, location)
    folder = Path(shared) / _shared_name(prerequisite.settings)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f"{folder.name}.lock"), wait_seconds=math.inf):
        if not (folder / RECORD).exists():
            train(prerequisite.settings.model_copy(update={"out": str(folder)}))
    return _use_result(settings, prerequisite, str(folder))


def _shared_name(settings: TrainSettings) -> str:
    """A hash of everything that affects the run's result, its own prerequisites included."""
    runs = (settings, *all_prerequisites(settings))
    fingerprints = [read_manifest(download_input(run.data)).fingerprint for run in runs]
    values = [settings.model_dump(mode="json", exclude=set(NEUTRAL_SETTINGS)), *fingerprints]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _use_result(settings: TrainSettings, prerequisite: Prerequisite, location: str) -> TrainSettings:
    if prerequisite.name == TEACHER:
        return with_locations(settings, {"distill.teacher_run": location})
    return with_locations(settings, {"teacher": f"{location.rstrip('/')}/student"})
