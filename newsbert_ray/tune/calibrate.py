"""What the parts of a trial take, in seconds: timed on a few steps, with every slot of the sweep busy."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from newsbert_ray import inputs
from newsbert_ray.config import TrainSettings, build_settings

if TYPE_CHECKING:
    import torch

    from newsbert_ray.data.order import Ints
    from newsbert_ray.data.reading import Course
    from newsbert_ray.training.step import Learner
    from newsbert_ray.tune.place import Place

STEPS = 12
"""Updates that are timed, after WARM_UP more; they stand for SAMPLE updates by their sizes."""
WARM_UP = 3
SAMPLE = 60
EVALUATIONS = 4
"""Batches of the validation split that are timed."""


@dataclass(frozen=True)
class Parts:
    """Seconds of a trial's parts; with several workers those of each worker's share.

    Attributes:
        cold: what a process's first trial takes more: imports, the teacher's weights, the shards.
        start: from a trial's start to its first step in a process that has run another.
        step: one update, its batch included.
        title: one title evaluated with both models.
        checkpoint: one checkpoint written.
        best: the best model written.
        end: the best model read back, the student written, the checkpoints removed.
    """

    cold: float
    start: float
    step: float
    title: float
    checkpoint: float
    best: float
    end: float


@dataclass(frozen=True)
class Calibration:
    """Parts of each kind of trial that was timed, `process` seconds until a process is there at all, and how
    long all of it took."""

    settings: tuple[TrainSettings, ...]
    parts: tuple[Parts, ...]
    process: float
    seconds: float


def calibrate(kinds: Sequence[TrainSettings], place: Place, *, folder: Path) -> Calibration:
    """Time each kind of trial on as many workers at once as the sweep will have, where Ray places them.

    Call it inside a Ray session; its actors are gone when it returns.

    Args:
        kinds: settings that differ in their work.
        folder: for checkpoints, on the sweep's disk; all nodes must see it.
    Raises:
        ShardError, EncoderError, SettingsError, LossError: as the trials themselves would.
    """
    import ray
    from ray.exceptions import RayTaskError

    began = time.monotonic()
    options: dict[str, Any] = {"num_cpus": place.cpus, "num_gpus": place.gpus}
    actor: Any = ray.remote(**options)(_Timer)
    timers = [actor.remote() for _ in range(place.slots * place.workers)]
    try:
        ray.get([timer.ready.remote() for timer in timers])
        process = time.monotonic() - began
        folders = [str(folder.absolute() / f"slot-{number}") for number in range(len(timers))]
        parts = []
        for settings in kinds:
            calls = [t.time.remote(settings.model_dump(), f) for t, f in zip(timers, folders, strict=True)]
            parts.append(_mean(ray.get(calls)))
    except RayTaskError as error:
        raise error.cause from error
    finally:
        for timer in timers:
            ray.kill(timer)
    return Calibration(tuple(kinds), tuple(parts), process, time.monotonic() - began)


class _Timer:
    """An actor in a slot: like a sweep's, it keeps its process from one kind of trial to the next."""

    def ready(self) -> None:
        """Returns once the process is there."""

    def time(self, settings: dict[str, Any], folder: str) -> Parts:
        return time_parts(build_settings(TrainSettings, settings, where="calibration"), folder=Path(folder))


def _mean(found: Sequence[Parts]) -> Parts:
    names = [field.name for field in fields(Parts)]
    return Parts(**{name: statistics.fmean(getattr(parts, name) for parts in found) for name in names})


def time_parts(settings: TrainSettings, *, folder: Path) -> Parts:
    """Time the parts of a trial of `settings` in this process: WARM_UP + STEPS updates of its first epoch, a
    few batches evaluated, files written into `folder`, where nothing stays.

    Of several workers one's share is timed, without what they say to each other.
    """
    import shutil

    from newsbert_ray.evaluation.place import device_seconds
    from newsbert_ray.training.run import pick_device

    if settings.workers > 1:
        share = max(settings.optimizer.accumulate, settings.batch_size // settings.workers)
        settings = settings.model_copy(update={"workers": 1, "batch_size": share})
    settings = inputs.at_hand(settings)
    device, run = pick_device(settings), folder / "run"
    try:
        marks = [time.perf_counter()]
        for _ in range(2):  # the second start is that of a process that has run a trial before
            learner, plan = _start(settings, device, run)
            marks.append(device_seconds(device))
        warm = marks[2] - marks[1]
        first, step = _steps(learner, plan, device)
        title = _title(learner, plan, device)
        checkpoint, best, end = _files(learner, plan, run, device)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Parts(
        cold=max(0.0, marks[1] - marks[0] - warm),
        start=warm + max(0.0, first - step),
        step=step,
        title=title,
        checkpoint=checkpoint,
        best=best,
        end=end,
    )


def _start(settings: TrainSettings, device: torch.device, run: Path) -> tuple[Learner, Course]:
    """What a trial does before its first step."""
    from newsbert_ray.data.reading import course_of, read_updates
    from newsbert_ray.data.shards import read_manifest
    from newsbert_ray.training.journal import Journal
    from newsbert_ray.training.loop import World
    from newsbert_ray.training.work import build_worker_learner

    manifest = read_manifest(settings.data)
    plan = course_of(settings, manifest)
    learner = build_worker_learner(settings, manifest, plan, World(0, 1, device), stand_in=True)
    Journal(run, done=0).close()
    next(read_updates(plan))
    return learner, plan


def _steps(learner: Learner, plan: Course, device: torch.device) -> tuple[float, float]:
    """Seconds of a trial's first update, and of a later one with its batch's making.

    Updates differ by the length of their titles: those timed lie evenly between the smallest and the largest
    of a sample.
    """
    from newsbert_ray.data.reading import read_updates
    from newsbert_ray.evaluation.place import device_seconds
    from newsbert_ray.training.step import train_step

    count = min(SAMPLE, plan.steps(0))
    began = time.perf_counter()
    sample = list(itertools.islice(read_updates(plan), count))
    reading = (time.perf_counter() - began) / count
    sample.sort(key=lambda update: sum(part.padded_tokens for part in update.parts))
    chosen = [sample[-1]] * WARM_UP + [sample[int((i + 0.5) * count / STEPS)] for i in range(STEPS)]
    marks = [device_seconds(device)]
    for number, update in enumerate(chosen, 1):
        train_step(learner, [part.to(device) for part in update.parts], step=number)
        marks.append(device_seconds(device))
    later = (marks[-1] - marks[WARM_UP]) / STEPS
    return marks[1] - marks[0], later + reading


def _title(learner: Learner, plan: Course, device: torch.device) -> float:
    """Seconds to evaluate one row of validation with all models that learn, by a sample all over it.

    In recommendation and retrieval that is the encoding of the different texts that its rows name, shared
    out among them; scoring and metrics are small beside it.
    """
    from newsbert_ray.data.reading import evaluation_batches
    from newsbert_ray.data.texts import read_texts
    from newsbert_ray.evaluation.encoding import encode_texts
    from newsbert_ray.evaluation.place import Place, device_seconds
    from newsbert_ray.evaluation.scoring import BATCH, score_topics

    pair, place = learner.pair, Place(device)
    models = {name: model for name, model in pair.models().items() if not (pair.frozen and name == "teacher")}
    pair.eval()
    if plan.task == "topics":
        shards = plan.manifest.splits["validation"]
        count = sum(-(-shard.rows // BATCH) for shard in shards)
        wanted = {int((i + 0.5) * count / EVALUATIONS) for i in range(EVALUATIONS)}
        batches = evaluation_batches(plan.folder, plan.manifest, "validation", batch_size=BATCH)
        chosen = [batch for number, batch in enumerate(batches) if number in wanted]
        began = device_seconds(device)
        score_topics(models, chosen, topics=len(plan.manifest.labels), place=place)
        seconds = (device_seconds(device) - began) / sum(batch.rows for batch in chosen)
    else:
        named, rows = _named(plan)
        table = read_texts(plan.folder, plan.manifest)
        sample = named[np.linspace(0, len(named) - 1, min(len(named), EVALUATIONS * BATCH)).astype(np.int64)]
        began = device_seconds(device)
        encode_texts(models, table, sample, pad_id=plan.manifest.tokenizer.pad_id, place=place)
        seconds = (device_seconds(device) - began) / len(sample) * len(named) / rows
    pair.train()
    return seconds


def _named(plan: Course) -> tuple[Ints, int]:
    """The different texts that rows of validation name, and how many rows: all impressions, or a shard's
    pairs."""
    from newsbert_ray.data.reading import read_pairs
    from newsbert_ray.evaluation.ranking import find_named

    folder, manifest = Path(plan.folder), plan.manifest
    if plan.task == "recommendation":
        rows = manifest.rows("validation", plan.task)
        return find_named(folder, manifest, "validation", history=plan.history), rows
    first = next(read_pairs(folder, manifest, "validation"))
    return np.unique(np.concatenate([first.queries, first.texts])), len(first)


def _files(learner: Learner, plan: Course, run: Path, device: torch.device) -> tuple[float, float, float]:
    """Seconds of a checkpoint, of a best model, and of a trial's end."""
    import shutil

    from newsbert_ray.evaluation.place import device_seconds
    from newsbert_ray.model.assemble import write_student
    from newsbert_ray.training.checkpoint import (
        CHECKPOINTS,
        Progress,
        load_best,
        write_best,
        write_checkpoint,
    )

    folder = run / CHECKPOINTS
    marks = [device_seconds(device)]
    name = write_best(folder, learner.pair, step=1)
    marks.append(time.perf_counter())
    write_checkpoint(folder, learner, Progress(step=1, best=name, best_step=1), keep=1)
    marks.append(time.perf_counter())
    load_best(folder, name, learner.pair)
    tokenizer = Path(plan.folder) / "tokenizer"
    write_student(run / "student", learner.pair, plan.manifest, tokenizer=tokenizer, task=plan.task)
    shutil.rmtree(folder)
    marks.append(device_seconds(device))
    best, checkpoint, end = (after - before for before, after in itertools.pairwise(marks))
    return checkpoint, best, end
