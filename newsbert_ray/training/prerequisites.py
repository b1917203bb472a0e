"""Runs that come before another, which needs what they leave: a frozen teacher, or the student that the other
starts from. Each is trained once for all runs that need the same one."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from newsbert_ray.config import TrainSettings, build_settings
from newsbert_ray.data.shards import read_manifest
from newsbert_ray.files import locked, replace_file
from newsbert_ray.record import BEFORE, RECORD, TEACHER, RecordError, read_record
from newsbert_ray.storage import workdir as storage
from newsbert_ray.storage.inputs import brought, moved

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from newsbert_ray.data.reading import TrainingSchedule
    from newsbert_ray.data.shards import Manifest, Split
    from newsbert_ray.evaluation.encoding import Scores
    from newsbert_ray.model.pair import EmbeddingCache, Pair
    from newsbert_ray.world import World


NO_NUMBER = ("data", "out", "threads", "log_every", "checkpoint", "device", "min_workers")
"""Settings of which no number of a run depends (of the data the shards' fingerprint does)."""
_LOOK_SECONDS = 0.5


class First(NamedTuple):
    """A run that comes first: its settings, and what it makes for the other, under which name beside it."""

    settings: TrainSettings
    makes: str
    name: str


def first_run(settings: TrainSettings) -> First | None:
    """The run that has to come before this one, with an empty folder; None where none has to. It may need
    another itself."""
    if settings.before.method != "none":
        return First(before_settings(settings, ""), "the student to start from", BEFORE)
    if settings.distill.frozen and settings.distill.teacher_run is None:
        return First(teacher_settings(settings, ""), "the teacher", TEACHER)
    return None


def first_runs(settings: TrainSettings) -> Iterator[TrainSettings]:
    """All runs that have to come before this one, the last of them first."""
    first = first_run(settings)
    if first is not None:
        yield first.settings
        yield from first_runs(first.settings)


def teacher_settings(settings: TrainSettings, out: str | Path) -> TrainSettings:
    """The run into `out` that fine-tunes a frozen teacher: method finetune, as deep as the teacher, with its
    learning rate and epochs; data, seed and all else are the student's."""
    from newsbert_ray.model.families import encoder_depth

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


def before_settings(settings: TrainSettings, out: str | Path) -> TrainSettings:
    """The run into `out` whose student this one starts from: the method, task and shards that `before` names,
    with the task's own momentum; the student's depth, the seed and what `before` leaves open are this
    run's."""
    before = settings.before
    values = settings.model_dump(exclude={"distill", "student", "method", "task", "before"})
    given = {
        "method": before.method,
        "task": before.task,
        "data": before.data,
        "epochs": before.epochs,
        "learning_rate": before.learning_rate,
        "train_rows": before.train_rows,
    }
    changed = {
        **{name: value for name, value in given.items() if value is not None},
        "out": str(out),
        "student": {"layers": settings.student.layers},
        "checkpoint": {**values["checkpoint"], "keep_finished": False},
    }
    return build_settings(TrainSettings, {**values, **changed}, where="the run before")


def after_first(
    settings: TrainSettings,
    *,
    shared: str | Path | None,
    train: Callable[[TrainSettings], object],
    say: Callable[[str], None],
) -> TrainSettings:
    """The same settings with what an earlier run left, after that has been trained if need be; other runs
    that need the same one wait for it.

    Args:
        shared: folder of this machine where such runs of many others lie; beside the run's own by default.
        train: trains a run that is not finished.
    """
    first = first_run(settings)
    if first is None:
        return settings
    if shared is None:
        beside = f"{settings.out.rstrip('/')}-{first.name}" if storage.is_url(settings.out) else None
        place = beside or str(Path(settings.out) / first.name)
        say(f"{first.makes} comes first, trained into {place}")
        train(first.settings.model_copy(update={"out": place}))
        return _with(settings, first, place)
    told = [first.settings.model_dump(mode="json", exclude=set(NO_NUMBER)), *_fingerprints(first.settings)]
    name = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(shared) / name
    with _alone(folder.with_name(f"{name}.lock")):
        if not (folder / RECORD).exists():
            train(first.settings.model_copy(update={"out": str(folder)}))
    return _with(settings, first, str(folder))


def _with(settings: TrainSettings, first: First, place: str) -> TrainSettings:
    """The same settings that go on from the run at `place`."""
    if first.name == TEACHER:
        return moved(settings, {"distill.teacher_run": place})
    return moved(settings, {"teacher": f"{place.rstrip('/')}/student"})


def _fingerprints(settings: TrainSettings) -> list[str]:
    """Of the shards of a run that comes first, and of those before it."""
    runs = (settings, *first_runs(settings))
    return [read_manifest(brought(run.data)).fingerprint for run in runs]


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until nobody else of this machine is in here; a trial that is stopped meanwhile wakes up."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path, wait_seconds=math.inf):
        yield


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


def cached_teacher(
    pair: Pair, settings: TrainSettings, manifest: Manifest, schedule: TrainingSchedule, world: World
) -> EmbeddingCache | None:
    """A frozen teacher's embeddings of every text that training may name, each made once, and kept beside the
    teacher for other runs; None where every stage looks into the teacher, or none is frozen.

    The texts go through the teacher in an order of their own, so that the same bits come out whoever makes
    them, and an interrupted run goes on with what it had.
    """
    from newsbert_ray.data.reading import trained_texts
    from newsbert_ray.data.shards import read_texts
    from newsbert_ray.evaluation.encoding import encode_texts
    from newsbert_ray.model.pair import EmbeddingCache
    from newsbert_ray.training.step import needs_states

    if not pair.frozen or all(map(needs_states, settings.distill.stages)):
        return None
    import torch

    rows, table = trained_texts(schedule), read_texts(settings.data, manifest)
    kept = _kept_file(settings, manifest, rows)
    found = world.broadcast(_read_kept(kept, len(rows)) if world.is_rank_zero else None)
    if found is None:
        teacher = {"teacher": pair.models()["teacher"]}
        pad_id = manifest.tokenizer.pad_id
        found = encode_texts(teacher, table, rows, pad_id=pad_id, world=world)["teacher"].clone()
        if world.is_rank_zero:
            _keep(kept, found)
    places = torch.zeros(len(table), dtype=torch.int64)
    places[torch.from_numpy(rows)] = torch.arange(len(rows))
    return EmbeddingCache(places.to(world.device), found.to(world.device))


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

    with suppress(OSError, SafetensorError), replace_file(path) as partial:
        save_file({"embeddings": embeddings.cpu().contiguous()}, partial)
