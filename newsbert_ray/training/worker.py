"""One worker's whole run: assemble, resume, train, test the best student, write the record. Knows no Ray.

Updates and report are passed in, so that one process and a Ray Train group run the same code.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from newsbert_ray.config import SCRATCH, TrainSettings
from newsbert_ray.data import reading
from newsbert_ray.data.reading import SplitData, TrainingSchedule, Update, World
from newsbert_ray.data.shards import Manifest, Split, read_manifest
from newsbert_ray.evaluation.metrics import topic_metrics
from newsbert_ray.evaluation.scoring import Pace, Scores, device_name, encode_texts, map_titles, score_models
from newsbert_ray.files import replace_file, write_json
from newsbert_ray.model.assemble import assemble_pair
from newsbert_ray.model.encoder import on_cpu, save_tensors
from newsbert_ray.model.linear import confusion_of, fit_linear, labelled_texts
from newsbert_ray.model.pair import EmbeddingCache, Pair, block_map
from newsbert_ray.model.saved import CHECKPOINTS, load_best, write_student
from newsbert_ray.record import (
    MAP,
    RecordError,
    RunRecord,
    cpu_has_bf16,
    describe_hardware,
    installed_versions,
    read_record,
    write_record,
)
from newsbert_ray.telemetry import EventLog, RunMeters
from newsbert_ray.training.checkpoint import Progress, keep_best, learner_tensors, load_tensors, resume
from newsbert_ray.training.journal import Journal
from newsbert_ray.training.loop import Report, TrainingLoop
from newsbert_ray.training.step import Learner, build_learner, needs_states


def run_worker(
    settings: TrainSettings,
    world: World,
    *,
    updates: Callable[..., Iterator[Update]],
    report: Report,
    say: Callable[[str], object],
    leaving: Callable[[], str],
    deferred: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Everything that a worker does from its start to the run's record.json.

    Only rank 0 reads and writes the run's folder, and prints. The settings have local paths. `updates` reads
    this worker's updates of a schedule, after `done` steps; `report` receives every entry of the loop, on
    every worker; `leaving` as in TrainingLoop; signals wait in the block of `deferred`, which `leaving` ends.
    """
    settings = with_precision(settings, world)
    manifest, run, receivers = read_manifest(settings.data), Path(settings.out), [report]
    schedule = reading.make_schedule(settings, manifest, world)
    say = say if world.is_rank_zero else lambda _: None
    if settings.teacher != SCRATCH:
        say(f"loading the teacher {settings.teacher}")
    learner = build_worker_learner(settings, schedule, world)
    layers = _describe_layers(learner.pair, last=settings.distill.blocks == "last")
    say(f"{layers}; the encoders compute in {settings.precision}")
    if settings.unlabelled_share:
        say(_describe_unlabelled(schedule))
    progress = _resume(run / CHECKPOINTS, learner, world, say=say)
    if progress.step:
        say(f"continuing from step {progress.step} of {schedule.total_steps}")
    learner.pair.teacher_cache = cached_teacher(learner.pair, schedule, world, say)
    events = EventLog(run)
    journal = None
    if world.is_rank_zero:
        journal = Journal(run, done=progress.step)
        receivers = [journal, RunMeters(run), events.report, report]
        events("resume" if progress.step else "start", step=progress.step, workers=world.size)
    scorer = Scorer(learner.pair, settings, manifest, world)
    try:
        loop = TrainingLoop(
            learner,
            schedule,
            progress,
            world,
            evaluate=lambda: scorer.score("validation"),
            report=lambda entry: [receive(entry) for receive in receivers],
            checkpoints=run / CHECKPOINTS,
            leaving=leaving,
        )
        with deferred():
            loop.run(updates(schedule, done=progress.step))
        _load_best_everywhere(run / CHECKPOINTS, learner, progress, world)
        pace = Pace()
        test = scorer.score("test", pace) if manifest.rows("test", settings.task) else {}
    finally:
        if journal:
            journal.close()
    if world.is_rank_zero:
        _write_results(schedule, learner.pair, progress, test=test, pace=pace, world=world)
        if settings.checkpoint.keep_finished:
            keep_best(run / CHECKPOINTS, progress.best)
        else:
            shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)
        events("end", steps=progress.step, seconds=sum(progress.seconds.values()))


def build_worker_learner(
    settings: TrainSettings, schedule: TrainingSchedule, world: World, *, stand_in: bool = False
) -> Learner:
    """The learner on this worker's device, in DDP if there are several; `stand_in` as in `assemble_pair`."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    torch.set_float32_matmul_precision("high" if settings.precision == "tf32" else "highest")
    pair = assemble_pair(settings, schedule.manifest, stand_in=stand_in).to(world.device)
    if settings.compile:
        pair.teacher.compile_layers()
        pair.student.compile_layers()
    words = reading.training_texts(schedule).words(schedule.manifest.tokenizer.pad_id)
    learner = build_learner(
        pair, settings, total_steps=schedule.total_steps, world_size=world.size, words=words
    )
    if world.size > 1:
        tables = {id(embedding.weight) for embedding in learner.sparse_embedding.embeddings}
        # As DDP's own _set_params_and_buffers_to_ignore_for_model does.
        learner.model._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment]
            name for name, parameter in learner.model.named_parameters() if id(parameter) in tables
        ]
        learner.model = nn.parallel.DistributedDataParallel(
            learner.model,
            device_ids=[world.device] if world.device.type == "cuda" else None,
            find_unused_parameters=not _uses_all_parameters(settings, pair),
        )
    return learner


def _uses_all_parameters(settings: TrainSettings, pair: Pair) -> bool:
    """Whether every learned parameter surely takes part in every update's loss."""
    distill = settings.distill
    return (
        len(distill.stages) == 1
        and distill.weights.student_task > 0
        and pair.state_map is None
        and (pair.alone or pair.frozen or distill.weights.teacher_task > 0)
    )


class Scorer:
    """Metrics of the pair's models on a split. Those of a frozen teacher do not change: they are computed
    once, or taken from its own run's record."""

    def __init__(self, pair: Pair, settings: TrainSettings, manifest: Manifest, world: World) -> None:
        self._pair, self._settings, self._manifest, self._world = pair, settings, manifest, world
        known = _teacher_scores(settings, manifest) if pair.frozen and world.is_rank_zero else {}
        self._teacher: dict[Split, Scores] = world.broadcast(known)

    def score(self, split: Split, pace: Pace | None = None) -> Scores:
        """Metrics of each model; with `pace` every model is computed, to measure its speed."""
        pair = self._pair
        known = self._teacher.get(split, {}) if pace is None else {}
        models = {name: model for name, model in pair.models().items() if name not in known}
        data = SplitData.of(self._settings, self._manifest, split)
        pair.eval()
        with encoder_precision(self._settings, self._world):
            scores = score_models(models, data, world=self._world, pace=pace)
        pair.train()
        if pair.frozen:
            self._teacher[split] = known or {"teacher": scores["teacher"]}
        return {**known, **scores}


def _teacher_scores(settings: TrainSettings, manifest: Manifest) -> dict[Split, Scores]:
    """A frozen teacher's metrics on validation from its own record; empty if it used other shards."""
    assert settings.distill.teacher_run is not None
    with suppress(RecordError):
        record = read_record(settings.distill.teacher_run)
        if record.data.get("fingerprint") == manifest.fingerprint:
            return {"validation": {"teacher": record.metrics["validation"]["student"]}}
    return {}


def cached_teacher(
    pair: Pair, schedule: TrainingSchedule, world: World, say: Callable[[str], object] = print
) -> EmbeddingCache | None:
    """A frozen teacher's embeddings of every text in training; None if losses of every stage read its layers.

    They are computed once and kept in the teacher's folder for other runs. The texts are encoded in a fixed
    order, so that the bits do not depend on who computes them.
    """
    if not pair.frozen or all(map(needs_states, schedule.settings.distill.stages)):
        return None
    table, rows = reading.training_texts(schedule), reading.trained_texts(schedule)
    path = _cache_file(schedule, rows)
    embeddings = world.broadcast(_read_cache(path, len(rows)) if world.is_rank_zero else None)
    if embeddings is None:
        say(f"computing what the teacher says of {len(rows):,} texts, once")
        teacher = {"teacher": pair.models()["teacher"]}
        pad_id = schedule.manifest.tokenizer.pad_id
        with encoder_precision(schedule.settings, world):
            embeddings = encode_texts(teacher, table, rows, pad_id=pad_id, world=world)["teacher"].clone()
        if world.is_rank_zero:
            # For the next run; not being able to write them is no error.
            with suppress(OSError, SafetensorError), replace_file(path) as partial:
                save_tensors({"embeddings": embeddings}, partial)
    positions = torch.zeros(len(table), dtype=torch.int64)
    positions[torch.from_numpy(rows)] = torch.arange(len(rows))
    return EmbeddingCache(positions.to(world.device), embeddings.to(world.device))


def with_precision(settings: TrainSettings, world: World) -> TrainSettings:
    """The settings with precision auto decided by rank 0's device, for all workers."""
    if settings.precision != "auto":
        return settings
    is_bf16 = world.broadcast(world.device.type == "cpu" and cpu_has_bf16())
    return settings.model_copy(update={"precision": "bf16" if is_bf16 else "fp32"})


def encoder_precision(settings: TrainSettings, world: World) -> torch.autocast:
    """The arithmetic of the encoders where nothing is learned."""
    return torch.autocast(world.device.type, torch.bfloat16, enabled=settings.precision == "bf16")


def _cache_file(schedule: TrainingSchedule, rows: npt.NDArray[np.integer]) -> Path:
    """File of the embeddings of these texts by these teacher weights."""
    settings = schedule.settings
    assert settings.distill.teacher_run is not None
    folder = Path(settings.distill.teacher_run)
    weights = (folder / "student" / "model.safetensors").stat()
    others = f"{read_manifest(settings.unlabelled).fingerprint} " if settings.unlabelled else ""
    texts = f"{others}{schedule.manifest.fingerprint} {weights.st_size} {weights.st_mtime_ns} "
    numbers = settings.precision if settings.precision != "fp32" else ""
    key = (texts + numbers).encode() + rows.tobytes()
    return folder / "texts" / f"{hashlib.sha256(key).hexdigest()[:16]}.safetensors"


def _read_cache(path: Path, rows: int) -> Tensor | None:
    with suppress(OSError, SafetensorError, KeyError):
        embeddings = load_file(path)["embeddings"]
        return embeddings if len(embeddings) == rows else None
    return None


def _resume(folder: Path, learner: Learner, world: World, *, say: Callable[[str], object]) -> Progress:
    """Load the newest checkpoint on every worker. Only rank 0's machine needs to see the folder."""
    progress = world.broadcast(resume(folder, learner, say=say) if world.is_rank_zero else Progress())
    if world.size > 1 and progress.step:
        tensors = on_cpu(learner_tensors(learner)) if world.is_rank_zero else {}
        load_tensors(learner, world.broadcast(tensors))
    if not world.is_rank_zero:
        progress.sums = dict.fromkeys(progress.sums, 0.0)  # rank 0 has the sums of all workers
    return progress


def _load_best_everywhere(folder: Path, learner: Learner, progress: Progress, world: World) -> None:
    if world.is_rank_zero:
        load_best(folder, progress.best, learner.pair)
    if world.size > 1:
        learner.pair.load_state_dict(world.broadcast(on_cpu(learner.pair.state_dict())))


def _describe_layers(pair: Pair, *, last: bool) -> str:
    """Which teacher layers form the block of each student layer, on one line."""
    student = len(pair.student.layers)
    if not student:
        return "word vectors without layers: no momentum, no loss on layers"
    if pair.alone:
        return f"{student} layers learn without a teacher"
    blocks = [
        f"{i} <- {block[0]}-{block[-1]}" if len(block) > 1 else f"{i} <- {block[0]}"
        for i, block in enumerate(block_map(len(pair.teacher.layers), student, last=last), 1)
    ]
    return "student layer <- teacher layers: " + ", ".join(blocks)


def _describe_unlabelled(schedule: TrainingSchedule) -> str:
    size, more = schedule.order.batch_size, schedule.order.beside
    if not more:
        return "no texts without labels: every text of a batch has one"
    texts = len(reading.unlabelled_texts(schedule).rows)
    return f"texts without labels: {texts:,}; a batch has {more} of them, and {size} labelled"


def _write_results(
    schedule: TrainingSchedule, pair: Pair, progress: Progress, *, test: Scores, pace: Pace, world: World
) -> None:
    settings, manifest, models = schedule.settings, schedule.manifest, pair.eval().models()
    run = Path(settings.out)
    tokenizer = Path(settings.data) / "tokenizer"
    write_student(run / "student", pair, manifest, tokenizer=tokenizer, task=settings.task)
    if settings.task == "topics":
        data = SplitData.of(settings, manifest, "test" if test else "validation")
        write_json(run / MAP, map_titles(*models["student"], data, device=world.device))
    threads, last = torch.get_num_threads(), settings.distill.blocks == "last"
    modules = {**{name: encoder for name, (encoder, _) in models.items()}, "top": pair.top}
    record = _record(
        settings,
        manifest,
        progress,
        hardware={"device": device_name(world.device), "workers": world.size, "threads": threads},
        metrics={
            "test": test,
            "speed": pace.speed if pace.seconds else {},
            "parameters": {
                name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()
            },
        },
        layer_map=block_map(len(pair.teacher.layers), settings.student.layers, last=last),
        unlabelled=len(reading.unlabelled_texts(schedule).rows) if schedule.order.beside else 0,
    )
    write_record(run, record)


def _record(
    settings: TrainSettings,
    manifest: Manifest,
    progress: Progress,
    *,
    hardware: Mapping[str, Any],
    metrics: Mapping[str, Any],
    layer_map: list[list[int]],
    unlabelled: int = 0,
) -> RunRecord:
    """The record of a run that ended with this progress; `unlabelled` counts its texts without labels."""
    best = next(entry for entry in progress.curve if entry["step"] == progress.best_step)
    seconds, last = progress.seconds, best if settings.student.kind == "linear" else progress.curve[-1]
    return RunRecord(
        settings=settings.model_dump(),
        seed=settings.seed,
        versions=installed_versions(),
        hardware={**describe_hardware(), **hardware},
        seconds={**seconds, "total": sum(seconds.values())},
        layer_map=layer_map,
        metrics={
            "validation": best["validation"],
            "best_step": progress.best_step,
            "train": last["train"],
            **metrics,
        },
        curve=progress.curve,
        data={
            "name": " + ".join(dict.fromkeys(source.folder for source in manifest.sources)),
            "fingerprint": manifest.fingerprint,
            "tokenizer": manifest.tokenizer.sha256,
            "train_rows": settings.train_rows or manifest.examples("train", settings.task),
            "validation_rows": manifest.rows("validation", settings.task),
            "test_rows": manifest.rows("test", settings.task),
            "labels": len(manifest.labels),
            "statistics": dict(manifest.statistics),
            **({"unlabelled_rows": unlabelled} if unlabelled else {}),
        },
        steps=progress.step,
        titles_per_second=progress.titles / max(1e-9, seconds["train"] + seconds.get("data", 0.0)),
    )


def train_linear(
    settings: TrainSettings, manifest: Manifest, *, report: Report, say: Callable[[str], object]
) -> None:
    """A whole run of method `linear`: of the models for each strength of the SVM the best one on validation.

    `report` receives an evaluation of each, whose `step` counts them. ShardError where a split has no
    labelled titles, SettingsError where all have the same topic or `train_rows` is more than there are.
    """
    start, progress = time.perf_counter(), Progress()
    texts, topics = labelled_texts(settings.data, manifest, "train", count=settings.train_rows)
    other = labelled_texts(settings.data, manifest, "validation")
    for model, scores in fit_linear(texts, topics, manifest.labels, other, seed=settings.seed):
        progress.step += 1
        metrics, train = topic_metrics(confusion_of(scores, other[1])), {"strength": model.strength}
        validation = {"student": metrics}
        progress.curve.append(
            {"step": progress.step, "epoch": progress.step, "validation": validation, "train": train}
        )
        if metrics["accuracy"] > progress.best_metric:
            best, progress.best_metric, progress.best_step = model, metrics["accuracy"], progress.step
        say(f"C {model.strength:g}: validation accuracy {metrics['accuracy']:.4f}")
        report({"kind": "evaluation", **progress.curve[-1]})
    progress.titles = len(texts) * progress.step
    progress.seconds["train"] = time.perf_counter() - start
    best.save(Path(settings.out) / "student")
    test = {}
    if manifest.rows("test", "topics"):
        titles, truth = labelled_texts(settings.data, manifest, "test")
        test["student"] = topic_metrics(confusion_of(best.scores(titles), truth))
    progress.seconds["evaluate"] = time.perf_counter() - start - progress.seconds["train"]
    hardware = {"device": "cpu", "workers": 1, "threads": 1}
    parts = {"test": test, "speed": {}, "parameters": {"student": best.parameters}}
    record = _record(settings, manifest, progress, hardware=hardware, metrics=parts, layer_map=[])
    write_record(settings.out, record)
