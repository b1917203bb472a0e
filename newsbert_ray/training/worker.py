"""One worker's whole run: assemble, resume, train, test the best student, leave the record. Knows no Ray.

The updates come from outside (this process's reading or Ray Data's) and so does the report; the rest is the
same alone and in a group.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from newsbert_ray.config import TrainSettings
from newsbert_ray.data.reading import TrainingSchedule, Update, make_schedule
from newsbert_ray.data.shards import Manifest, Split, read_manifest
from newsbert_ray.evaluation.encoding import Pace, Scores, device_name, map_titles
from newsbert_ray.evaluation.scoring import score_pair
from newsbert_ray.files import write_json
from newsbert_ray.model.assemble import assemble_pair
from newsbert_ray.model.pair import Pair, block_map
from newsbert_ray.model.saved import CHECKPOINTS, load_best, write_student
from newsbert_ray.record import MAP, RunRecord, describe_hardware, installed_versions, write_record
from newsbert_ray.telemetry import EventLog, RunMeters
from newsbert_ray.training.checkpoint import Progress, learner_tensors, load_tensors, resume
from newsbert_ray.training.journal import Journal, both
from newsbert_ray.training.loop import Report, never, run_loop
from newsbert_ray.training.prerequisites import cached_teacher, teacher_scores
from newsbert_ray.training.step import Learner, build_learner
from newsbert_ray.world import World

Updates = Callable[[TrainingSchedule, int], Iterator[Update]]
"""(schedule, steps done) -> this worker's updates after them."""


def run_worker(
    settings: TrainSettings,
    world: World,
    *,
    updates: Updates,
    report: Report,
    say: Callable[[str], None],
    leaving: Callable[[], bool] = never,
) -> None:
    """Everything a worker does between its start and the run's record.json; only the first worker reads and
    writes in the run's folder.

    Args:
        updates: gives this worker's updates.
        report: gets every entry of the loop, on every worker.
        say: prints a line for a person; called on the first worker only.
        leaving: whether this worker's machine is about to be taken away.
    """
    manifest = read_manifest(settings.data)
    schedule = make_schedule(settings, manifest, rank=world.rank, world_size=world.size)
    run = Path(settings.out)
    tell = say if world.is_rank_zero else _silent
    learner = build_worker_learner(settings, manifest, schedule, world)
    blocks = block_map(len(learner.pair.teacher.layers), settings.student.layers)
    tell(f"{settings.student.layers} layers learn alone" if learner.pair.alone else describe_layers(blocks))
    progress = _resume(run / CHECKPOINTS, learner, world, say=tell)
    if progress.step:
        tell(f"going on from step {progress.step} of {schedule.total_steps}")
    if not world.is_rank_zero:
        progress.sums = dict.fromkeys(progress.sums, 0.0)
    learner.pair.teacher_cache = cached_teacher(learner.pair, settings, manifest, schedule, world)
    journal = Journal(run, done=progress.step) if world.is_rank_zero else None
    log, meters = EventLog(run), RunMeters(run)
    if world.is_rank_zero:
        log("resume" if progress.step else "start", step=progress.step, workers=world.size)

    score = _scorer(learner.pair, settings, manifest, world)

    try:
        run_loop(
            learner,
            updates(schedule, progress.step),
            schedule=schedule,
            progress=progress,
            world=world,
            evaluate=lambda: score("validation"),
            report=both(journal, meters, log.report, report) if journal else report,
            checkpoints=run / CHECKPOINTS,
            leaving=leaving,
        )
        if world.is_rank_zero:
            load_best(run / CHECKPOINTS, progress.best, learner.pair)
        if world.size > 1:
            learner.pair.load_state_dict(world.broadcast(_on_cpu(learner.pair.state_dict())))
        pace = Pace()
        tested = manifest.rows("test", settings.task) > 0
        test = score("test", pace) if tested else {}
    finally:
        if journal:
            journal.close()
    if world.is_rank_zero:
        _finish(settings, manifest, learner, progress, test, pace, world)
        log("end", steps=progress.step, seconds=sum(progress.seconds.values()))


class _Score(Protocol):
    def __call__(self, split: Split, pace: Pace | None = None) -> Scores: ...


def _scorer(pair: Pair, settings: TrainSettings, manifest: Manifest, world: World) -> _Score:
    """Metrics of the pair's models on a split; a frozen teacher's are found once, for they do not change, or
    on validation not at all, where its own run has them."""
    read = pair.frozen and world.is_rank_zero
    kept: dict[Split, Scores] = world.broadcast(teacher_scores(settings, manifest) if read else {})

    def score(split: Split, pace: Pace | None = None) -> Scores:
        known = kept.get(split, {}) if pace is None else {}
        models = {name: model for name, model in pair.models().items() if name not in known}
        found = score_pair(pair, settings, manifest, split, world=world, pace=pace, models=models)
        if pair.frozen:
            kept[split] = known or {"teacher": found["teacher"]}
        return {**known, **found}

    return score


def _resume(folder: Path, learner: Learner, world: World, *, say: Callable[[str], None]) -> Progress:
    """The progress to go on from, its tensors in every worker's learner; the first alone reads the folder,
    which the others' machines need not see."""
    progress = world.broadcast(resume(folder, learner, say=say) if world.is_rank_zero else Progress())
    if world.size > 1 and progress.step:
        tensors = world.broadcast(_on_cpu(learner_tensors(learner)) if world.is_rank_zero else {})
        load_tensors(learner, tensors)
    return progress


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in tensors.items()}


def build_worker_learner(
    settings: TrainSettings,
    manifest: Manifest,
    schedule: TrainingSchedule,
    world: World,
    *,
    stand_in: bool = False,
) -> Learner:
    """The learner on this worker's device, wrapped for gradient averaging where there are several workers;
    `stand_in` as for `assemble_pair`."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    pair = assemble_pair(settings, manifest, stand_in=stand_in).to(world.device)
    learner = build_learner(pair, settings, total_steps=schedule.total_steps, world_size=world.size)
    if world.size > 1:
        tables = {id(table.weight) for table in learner.tables.tables}
        # What DDP's own `_set_params_and_buffers_to_ignore_for_model` sets.
        pair._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment]
            name for name, parameter in pair.named_parameters() if id(parameter) in tables
        ]
        learner.model = nn.parallel.DistributedDataParallel(
            pair,
            device_ids=[world.device] if world.device.type == "cuda" else None,
            # A first stage leaves the top without a gradient.
            find_unused_parameters=settings.distill.first_share > 0,
        )
    return learner


def describe_layers(layer_map: list[list[int]]) -> str:
    """The layer map as a line: which teacher layers stand behind each student layer."""
    blocks = [
        f"{i} <- {block[0]}-{block[-1]}" if len(block) > 1 else f"{i} <- {block[0]}"
        for i, block in enumerate(layer_map, 1)
    ]
    return "student layer <- teacher layers: " + ", ".join(blocks)


def _finish(
    settings: TrainSettings,
    manifest: Manifest,
    learner: Learner,
    progress: Progress,
    test: Scores,
    pace: Pace,
    world: World,
) -> None:
    run = Path(settings.out)
    write_student(
        run / "student",
        learner.pair,
        manifest,
        tokenizer=Path(settings.data) / "tokenizer",
        task=settings.task,
    )
    if settings.task == "topics":
        encoder, top = learner.pair.eval().models()["student"]
        split: Split = "test" if test else "validation"
        device = world.device
        write_json(run / MAP, map_titles(encoder, top, settings.data, manifest, split, device=device))
    best = next(entry for entry in progress.curve if entry["step"] == progress.best_step)
    teacher, student = len(learner.pair.teacher.layers), settings.student.layers
    write_record(
        run,
        RunRecord(
            settings=settings.model_dump(),
            seed=settings.seed,
            versions=installed_versions(),
            hardware={
                **describe_hardware(),
                "device": device_name(world.device),
                "workers": world.size,
                "threads": torch.get_num_threads(),
            },
            seconds={**progress.seconds, "total": sum(progress.seconds.values())},
            layer_map=block_map(teacher, student),
            metrics={
                "validation": best["validation"],
                "test": test,
                "speed": pace.speed if pace.seconds else {},
                "best_step": progress.best_step,
                "train": progress.curve[-1]["train"],
                "parameters": _parameters(learner),
            },
            curve=progress.curve,
            data=_data(settings, manifest),
            steps=progress.step,
            titles_per_second=progress.titles
            / max(1e-9, progress.seconds["train"] + progress.seconds["data"]),
        ),
    )
    if not settings.checkpoint.keep_finished:
        shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)


def _data(settings: TrainSettings, manifest: Manifest) -> dict[str, Any]:
    return {
        "name": " + ".join(dict.fromkeys(source.folder for source in manifest.sources)),
        "fingerprint": manifest.fingerprint,
        "tokenizer": manifest.tokenizer.sha256,
        "train_rows": settings.train_rows or manifest.examples("train", settings.task),
        "validation_rows": manifest.rows("validation", settings.task),
        "test_rows": manifest.rows("test", settings.task),
        "labels": len(manifest.labels),
        "statistics": dict(manifest.statistics),
    }


def _parameters(learner: Learner) -> dict[str, int]:
    pair = learner.pair
    parts: dict[str, nn.Module] = {
        **{name: encoder for name, (encoder, _) in pair.models().items()},
        "top": pair.top,
    }
    return {name: sum(p.numel() for p in module.parameters()) for name, module in parts.items()}


def _silent(_: str) -> None:
    pass
