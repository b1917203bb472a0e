"""The teacher of a method that only reads it: fine-tuned before the student starts, once for all runs that
need the same one."""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from newsbert_ray import storage
from newsbert_ray.config import TrainSettings, build_settings
from newsbert_ray.inputs import brought, moved
from newsbert_ray.record import RECORD, TEACHER

NO_NUMBER = ("data", "out", "threads", "log_every", "checkpoint", "device", "min_workers")
"""Settings of which no number of a run depends (of the data the shards' fingerprint does)."""
_LOOK_SECONDS = 0.5


def teacher_settings(settings: TrainSettings, out: str | Path) -> TrainSettings:
    """The run into `out` that fine-tunes a frozen teacher: method finetune, as deep as the teacher, with its
    learning rate and epochs; data, seed and all else are the student's."""
    from newsbert_ray.model.loading import encoder_depth

    values = settings.model_dump(exclude={"distill", "student", "method"})
    rate = settings.optimizer.teacher_learning_rate or settings.learning_rate
    own = {"teacher_learning_rate": None, "student_learning_rate": None, "top_learning_rate": None}
    depth = encoder_depth(brought(settings.teacher), settings.model, settings.scratch)
    changed = {
        "out": str(out),
        "method": "finetune",
        "student": {"layers": depth},
        "learning_rate": rate,
        "epochs": settings.distill.teacher_epochs or settings.epochs,
        "optimizer": {**values["optimizer"], **own},
        "checkpoint": {**values["checkpoint"], "keep_finished": False},
    }
    return build_settings(TrainSettings, {**values, **changed}, where="the teacher's fine-tuning")


def needs_teacher(settings: TrainSettings) -> bool:
    """Whether a run has to fine-tune its teacher, or to wait for another that does."""
    return settings.distill.frozen and settings.distill.teacher_run is None


def taught_first(
    settings: TrainSettings,
    fingerprint: str,
    *,
    teachers: str | Path | None,
    train: Callable[[TrainSettings], object],
    say: Callable[[str], None],
) -> TrainSettings:
    """The same settings with the frozen teacher's run, after it has been trained if need be; other runs that
    need the same one wait for it.

    Args:
        settings: the student's; a `distill.teacher_run` of theirs is taken as it is.
        fingerprint: of the shards.
        teachers: folder of this machine where many runs' teachers lie; beside the run's own by default.
        train: trains a run that is not finished.
    """
    if not needs_teacher(settings):
        return settings
    if teachers is None:
        beside = f"{settings.out.rstrip('/')}-teacher" if storage.is_url(settings.out) else None
        place = beside or str(Path(settings.out) / TEACHER)
        say(f"the teacher comes first, fine-tuned into {place}")
        train(teacher_settings(settings, place))
        return moved(settings, {"distill.teacher_run": place})
    own = teacher_settings(settings, "")
    told = json.dumps([own.model_dump(mode="json", exclude=set(NO_NUMBER)), fingerprint], sort_keys=True)
    folder = Path(teachers) / hashlib.sha256(told.encode()).hexdigest()[:16]
    with _alone(folder.with_name(f"{folder.name}.lock")):
        if not (folder / RECORD).exists():
            train(own.model_copy(update={"out": str(folder)}))
    return moved(settings, {"distill.teacher_run": str(folder)})


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until nobody else of this machine is in here; a trial that is stopped meanwhile wakes up."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_LOOK_SECONDS)
        yield
