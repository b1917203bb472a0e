"""The one training loop: updates in, steps, evaluations and checkpoints, an injected report. Knows no Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from newsbert_ray.data.reading import TrainingSchedule, Update
from newsbert_ray.evaluation.encoding import Scores
from newsbert_ray.methods import TASKS
from newsbert_ray.model.saved import best_name, write_best
from newsbert_ray.training.checkpoint import Progress, write_checkpoint
from newsbert_ray.training.step import BLOCK, Learner, LossError, train_step
from newsbert_ray.world import World

Report = Callable[[dict[str, Any]], None]

LOOK_STEPS = 5
"""Updates between two looks of a group at the clock and at its machines' fate, for each costs an exchange."""


class LeavingError(RuntimeError):
    """The machine is about to be taken away; the checkpoint behind this is newer than the last update."""


def never() -> bool:
    """For a machine that nobody takes away."""
    return False


def run_loop(
    learner: Learner,
    updates: Iterable[Update],
    *,
    schedule: TrainingSchedule,
    progress: Progress,
    world: World,
    evaluate: Callable[[], Scores],
    report: Report,
    checkpoints: Path,
    leaving: Callable[[], bool] = never,
) -> Progress:
    """Train over `updates` and keep `progress`.

    At each epoch's end, and every `evaluate_every` steps, the pair is evaluated, the best student kept, a
    checkpoint written and then the entry reported, so that whoever stops a run at its report finds it
    resumable. A checkpoint is also written every so many steps and minutes, and before the machine goes.

    Args:
        updates: this worker's updates after `progress.step`, in order.
        evaluate: metrics of both models on validation, the same on all workers.
        report: gets {"kind": "log", ...} every `log_every` steps, {"kind": "evaluation", ...}, and for a
            checkpoint without one {"kind": "checkpoint", ...}, on every worker.
        checkpoints: the run's checkpoint folder; only the first worker writes.
        leaving: whether this worker's machine is about to be taken away.
    Raises:
        LeavingError: one worker's machine is; on every worker, with the checkpoint behind it.
    """
    settings = learner.settings
    ends = _epoch_ends(schedule)
    clock = _Clock(progress)
    calls = _Calls(settings.checkpoint.every_minutes, world, leaving)
    if progress.curve and progress.curve[-1]["step"] == progress.step:
        # A kill may have come between the checkpoint and the report.
        report({"kind": "evaluation", **progress.curve[-1]})
    since = (progress.titles, progress.seconds.get("train", 0.0) + progress.seconds.get("data", 0.0))
    for update in updates:
        clock.charge("data")
        step = update.step
        log = step % settings.log_every == 0 or step == 1
        parts = [part.to(world.device) for part in update.parts]
        numbers = train_step(learner, parts, step=step, statistics=log)
        progress.step = step
        progress.titles += parts[0].rows
        _add(progress, numbers)
        clock.charge("train")
        if log:
            spent = progress.seconds["train"] + progress.seconds["data"]
            speed = (progress.titles - since[0]) / max(1e-9, spent - since[1])
            since = (progress.titles, spent)
            report(_log_entry(numbers, update, schedule, world, speed=speed, seconds=progress.seconds))
        every = settings.checkpoint.every_steps
        evaluated = step in ends or (
            settings.evaluate_every is not None and step % settings.evaluate_every == 0
        )
        due, last = calls.look(step)
        written = evaluated or due or last or (every is not None and step % every == 0)
        if written:
            _require_finite(learner, step)
        if evaluated:
            entry = _evaluation_entry(evaluate(), update, progress, ends, world)
            progress.curve.append(entry)
            progress.sums, progress.count = {}, 0
            progress.blocks, progress.looks = {}, 0
            judged = entry["validation"]["student"][TASKS[settings.task].primary.name]
            if judged > progress.best_metric:
                progress.best_metric, progress.best_step, progress.best = judged, step, best_name(step)
                if world.is_rank_zero:
                    write_best(checkpoints, learner.pair, step=step)
            clock.charge("evaluate")
        if written:
            # The checkpoint holds all workers' sums; the first worker goes on with them.
            total = world.sum_values(progress.sums)
            progress.sums = total if world.is_rank_zero else dict.fromkeys(total, 0.0)
            if world.is_rank_zero:
                write_checkpoint(checkpoints, learner, progress, keep=settings.checkpoint.keep)
            calls.written()
            clock.charge("checkpoint")
        if evaluated:
            report({"kind": "evaluation", **progress.curve[-1]})
        elif written:
            report({"kind": "checkpoint", "step": step, "leaving": last})
        clock.charge("report")
        if last and step < schedule.total_steps:
            raise LeavingError(f"the machine is about to be taken away; step {step} is in its checkpoint")
    return progress


class _Calls:
    """Reasons to write a checkpoint that no step number tells, agreed on by all workers."""

    def __init__(self, minutes: float | None, world: World, leaving: Callable[[], bool]) -> None:
        self._seconds = math.inf if minutes is None else 60 * minutes
        self._world = world
        self._leaving = leaving
        self._last = time.monotonic()

    def look(self, step: int) -> tuple[bool, bool]:
        """Whether a checkpoint is due by the clock, and whether it is the last one here."""
        if self._world.size > 1 and step % LOOK_STEPS:
            return False, False
        due = self._world.is_rank_zero and time.monotonic() - self._last >= self._seconds
        found = self._world.sum_values({"due": float(due), "leaving": float(self._leaving())})
        return found["due"] > 0, found["leaving"] > 0

    def written(self) -> None:
        """One has just been."""
        self._last = time.monotonic()


class _Clock:
    """Charges the time since the last charge to a name in progress.seconds."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.last = time.perf_counter()

    def charge(self, name: str) -> None:
        now = time.perf_counter()
        seconds = self.progress.seconds
        seconds[name] = seconds.get(name, 0.0) + now - self.last
        self.last = now


def _epoch_ends(schedule: TrainingSchedule) -> dict[int, int]:
    """Last step of each epoch -> epochs done then."""
    ends: dict[int, int] = {}
    step = 0
    for epoch in range(schedule.epochs):
        step += schedule.steps(epoch)
        ends[step] = epoch + 1
    return ends


def _require_finite(learner: Learner, step: int) -> None:
    """A checkpoint of weights that are no numbers would end every resume."""
    if not all(bool(torch.isfinite(parameter).all()) for parameter in learner.pair.parameters()):
        raise LossError(
            f"weights are no longer finite at step {step}; use a lower learning_rate or optimizer.clip_norm, "
            "and another --out"
        )


def _add(progress: Progress, numbers: Mapping[str, Tensor | float]) -> None:
    losses = {name: value for name, value in numbers.items() if isinstance(value, Tensor)}
    for name, value in zip(losses, torch.stack(list(losses.values())).tolist(), strict=True):
        progress.sums[name] = progress.sums.get(name, 0.0) + value
    progress.count += 1
    blocks = {name: float(value) for name, value in numbers.items() if name.startswith(BLOCK)}
    for name, value in blocks.items():
        progress.blocks[name] = progress.blocks.get(name, 0.0) + value
    progress.looks += bool(blocks)


def _log_entry(
    numbers: Mapping[str, Tensor | float],
    update: Update,
    schedule: TrainingSchedule,
    world: World,
    *,
    speed: float,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    losses = {name: float(value) for name, value in numbers.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in numbers.items() if not isinstance(value, Tensor)}
    return {
        "kind": "log",
        "step": update.step,
        "steps": schedule.total_steps,
        "epoch": update.epoch + 1,
        "epochs": schedule.epochs,
        "titles_per_second": speed,
        "examples": TASKS[schedule.task].examples,
        "seconds": dict(seconds),
        "train": world.sum_values(losses),
        **others,
    }


def _evaluation_entry(
    scores: Scores, update: Update, progress: Progress, ends: Mapping[int, int], world: World
) -> dict[str, Any]:
    previous = max((end for end in ends if end < update.step), default=0)
    following = min(end for end in ends if end >= update.step)
    share = (update.step - previous) / (following - previous)
    means = {name: value / progress.count for name, value in world.sum_values(progress.sums).items()}
    entry = {"step": update.step, "epoch": update.epoch + share, "validation": scores, "train": means}
    blocks = {name: value / progress.looks for name, value in progress.blocks.items()}
    return {**entry, "blocks": blocks} if blocks else entry
