"""The teacher of a method that only reads it: fine-tuned before the student starts, once for all runs that
need the same one."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from newsbert_ray import storage
from newsbert_ray.config import TrainSettings, build_settings
from newsbert_ray.inputs import brought, moved
from newsbert_ray.record import RECORD, TEACHER, RecordError, read_record

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from newsbert_ray.data.reading import Course
    from newsbert_ray.data.shards import Manifest, Split
    from newsbert_ray.evaluation.place import Scores
    from newsbert_ray.model.pair import Pair, Remembered
    from newsbert_ray.training.loop import World

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


def teacher_scores(settings: TrainSettings, manifest: Manifest) -> dict[Split, Scores]:
    """A frozen teacher's metrics on validation as its own run has them; nothing where it saw other shards."""
    assert settings.distill.teacher_run is not None
    try:
        record = read_record(settings.distill.teacher_run)
    except RecordError:
        return {}
    if record.data.get("fingerprint") != manifest.fingerprint:
        return {}
    return {"validation": {"teacher": record.metrics["validation"]["student"]}}


def remembered(
    pair: Pair, settings: TrainSettings, manifest: Manifest, course: Course, world: World
) -> Remembered | None:
    """A frozen teacher's embeddings of every text that training may name, each made once, and kept beside the
    teacher for other runs; None where every stage looks into the teacher, or none is frozen.

    The texts go through the teacher in an order of their own, so that the same bits come out whoever makes
    them, and an interrupted run goes on with what it had.
    """
    from newsbert_ray.data.reading import trained_texts
    from newsbert_ray.data.texts import read_texts
    from newsbert_ray.evaluation.encoding import encode_texts
    from newsbert_ray.model.pair import Remembered
    from newsbert_ray.training.step import needs_states

    if not pair.frozen or all(map(needs_states, settings.distill.stages)):
        return None
    import torch

    rows, table = trained_texts(course), read_texts(settings.data, manifest)
    kept = _kept_file(settings, manifest, rows)
    found = world.share(_read_kept(kept, len(rows)) if world.first else None)
    if found is None:
        teacher = {"teacher": pair.models()["teacher"]}
        pad_id = manifest.tokenizer.pad_id
        found = encode_texts(teacher, table, rows, pad_id=pad_id, place=world.place)["teacher"].clone()
        if world.first:
            _keep(kept, found)
    places = torch.zeros(len(table), dtype=torch.int64)
    places[torch.from_numpy(rows)] = torch.arange(len(rows))
    return Remembered(places.to(world.device), found.to(world.device))


def _kept_file(settings: TrainSettings, manifest: Manifest, rows: npt.NDArray[np.integer]) -> Path:
    """Where the embeddings of these texts by this very teacher lie, if they do."""
    assert settings.distill.teacher_run is not None
    folder = Path(settings.distill.teacher_run)
    weights = (folder / "student" / "model.safetensors").stat()
    told = f"{manifest.fingerprint} {weights.st_size} {weights.st_mtime_ns} ".encode() + rows.tobytes()
    return folder / "texts" / f"{hashlib.sha256(told).hexdigest()[:16]}.safetensors"


def _read_kept(path: Path, rows: int) -> Tensor | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)["embeddings"]
    except (OSError, SafetensorError, KeyError):
        return None
    return found if len(found) == rows else None


def _keep(path: Path, embeddings: Tensor) -> None:
    """Write them for the next run; a teacher's folder that cannot be written to is no reason to end."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with suppress(OSError, SafetensorError):
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        save_file({"embeddings": embeddings.cpu().contiguous()}, partial)
        os.replace(partial, path)


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
