"""The training loop: updates in; steps, evaluations, checkpoints and reports out. Knows no Ray."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from newsbert_ray.data.reading import TrainingSchedule, Update, World
from newsbert_ray.evaluation.scoring import Scores
from newsbert_ray.methods import TASKS
from newsbert_ray.model.saved import best_name, write_best
from newsbert_ray.training.checkpoint import Progress, write_checkpoint
from newsbert_ray.training.step import BLOCK, TOTAL, Learner, train_step

Report = Callable[[dict[str, Any]], object]

READ_AHEAD = 2
"""Updates that are read before they are needed."""
TRIGGER_STEPS = 5
"""Steps between two checks of the timer and of preemption notices in a group; each costs an exchange."""


class PreemptedError(RuntimeError):
    """The run has to end here; the last update is in a checkpoint."""


class LossError(ValueError):
    """The loss or a weight is NaN or infinite."""


@dataclass
class TrainingLoop:
    """One worker's loop over its updates.

    Attributes:
        evaluate: metrics of both models on validation, the same on all workers.
        report: called on every worker with {"kind": "log", ...} every `log_every` steps,
            {"kind": "step", ...} for the other steps, {"kind": "evaluation", ...}, and {"kind": "checkpoint",
            ...} for a checkpoint without evaluation.
        checkpoints: the run's checkpoint folder; only rank 0 writes.
        leaving: why this worker has to end soon (`stopped`, `preempted`); empty while it has not.
    """

    learner: Learner
    schedule: TrainingSchedule
    progress: Progress
    world: World
    evaluate: Callable[[], Scores]
    report: Report
    checkpoints: Path
    leaving: Callable[[], str]
    _unread: list[tuple[int, dict[str, Tensor]]] = field(default_factory=list, init=False)
    """Step and losses, on the device, of the updates since the last log entry or checkpoint."""

    def run(self, updates: Iterable[Update]) -> None:
        """Train over `updates`, the worker's updates after `progress.step`.

        At an evaluation the best student is kept, a checkpoint written (unless `checkpoint.at_evaluation` is
        off) and then the entry reported: whoever stops a run in its report can resume it. PreemptedError on
        every worker where some worker has to end, after a checkpoint. LossError where the loss or a weight is
        not finite; noticed at the next log entry or checkpoint, before it is written.
        """
        with closing(read_ahead(updates, self.world.device)) as ahead:
            self._run(ahead)

    def _run(self, updates: Iterable[Update]) -> None:
        progress, settings = self.progress, self.learner.settings
        evaluations = self.schedule.evaluations(settings.evaluate_every)
        clock = _Clock(progress)
        triggers = CheckpointTriggers(settings.checkpoint.every_minutes, self.world, self.leaving)
        if progress.curve and progress.curve[-1]["step"] == progress.step:
            # The process may have been killed between the checkpoint and the report.
            self.report({"kind": "evaluation", **progress.curve[-1]})
        for update in updates:
            clock.charge("data")
            step = update.step
            is_log_step = step % settings.log_every == 0 or step == 1
            numbers = self._train(update, statistics=is_log_step)
            losses = self._read_losses() if is_log_step else {}
            clock.charge("train")
            if is_log_step:
                self.report(self._log_entry(losses, numbers, update, clock.titles_per_second()))
            else:
                self.report({"kind": "step", "step": step})
            is_evaluation = step in evaluations
            timer, leaving = triggers.check(step)
            every = settings.checkpoint.every_steps
            is_due = timer or bool(leaving) or (every is not None and step % every == 0)
            is_checkpoint = is_due or (is_evaluation and settings.checkpoint.at_evaluation)
            if is_checkpoint or is_evaluation:
                self._read_losses()
                _require_finite(self.learner, step)
            if is_evaluation:
                self._evaluate(update)
                clock.charge("evaluate")
            if is_checkpoint:
                self._write_checkpoint()
                triggers.restart_timer()
                clock.charge("checkpoint")
            if is_evaluation:
                self.report({"kind": "evaluation", **progress.curve[-1]})
            elif is_checkpoint:
                self.report({"kind": "checkpoint", "step": step, "preempted": leaving == "preempted"})
            clock.charge("report")
            if leaving == "stopped" or (leaving and step < self.schedule.total_steps):
                raise PreemptedError(f"{leaving}; step {step} is in a checkpoint")

    def _train(self, update: Update, *, statistics: bool) -> dict[str, Tensor | float]:
        numbers = train_step(self.learner, update.parts, step=update.step, statistics=statistics)
        progress = self.progress
        progress.step = update.step
        progress.titles += update.parts[0].rows
        losses = {name: value for name, value in numbers.items() if isinstance(value, Tensor)}
        self._unread.append((update.step, losses))
        blocks = {name: float(value) for name, value in numbers.items() if name.startswith(BLOCK)}
        _add(progress.blocks, blocks)
        progress.log_steps += bool(blocks)
        return numbers

    def _read_losses(self) -> dict[str, float]:
        """Add the unread losses to the progress and return the last update's; waits once for the device."""
        progress, losses = self.progress, dict[str, float]()
        tensors = [value for _, losses in self._unread for value in losses.values()]
        values = iter(torch.stack(tensors).tolist() if tensors else [])
        for step, names in self._unread:
            losses = {name: next(values) for name in names}
            if not math.isfinite(losses[TOTAL]):
                text = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
                raise LossError(
                    f"the loss is not finite at step {step} ({text}); use a lower learning_rate or "
                    "optimizer.clip_norm, and another --out"
                )
            _add(progress.sums, losses)
            progress.count += 1
        self._unread.clear()
        return losses

    def _evaluate(self, update: Update) -> None:
        progress, step, ends = self.progress, update.step, self.schedule.ends
        scores = self.evaluate()
        previous = max((end for end in ends if end < step), default=0)
        following = min(end for end in ends if end >= step)
        entry: dict[str, Any] = {
            "step": step,
            "epoch": update.epoch + (step - previous) / (following - previous),
            "validation": scores,
            "train": {n: value / progress.count for n, value in self.world.sum_values(progress.sums).items()},
        }
        if progress.blocks:
            entry["blocks"] = {n: value / progress.log_steps for n, value in progress.blocks.items()}
        progress.curve.append(entry)
        progress.sums, progress.count = {}, 0
        progress.blocks, progress.log_steps = {}, 0
        metric = scores["student"][TASKS[self.schedule.settings.task].primary.name]
        if metric > progress.best_metric:
            progress.best_metric, progress.best_step, progress.best = metric, step, best_name(step)
            if self.world.is_rank_zero:
                write_best(self.checkpoints, self.learner.pair, step=step)

    def _write_checkpoint(self) -> None:
        # The checkpoint holds the sums of all workers; rank 0 continues with them.
        total = self.world.sum_values(self.progress.sums)
        self.progress.sums = total if self.world.is_rank_zero else dict.fromkeys(total, 0.0)
        if self.world.is_rank_zero:
            keep = self.learner.settings.checkpoint.keep
            write_checkpoint(self.checkpoints, self.learner, self.progress, keep=keep)

    def _log_entry(
        self, losses: dict[str, float], numbers: Mapping[str, Any], update: Update, speed: float
    ) -> dict[str, Any]:
        return {
            "kind": "log",
            "step": update.step,
            "steps": self.schedule.total_steps,
            "epoch": update.epoch + 1,
            "epochs": len(self.schedule.ends),
            "titles_per_second": speed,
            "examples": TASKS[self.schedule.settings.task].examples,
            "seconds": dict(self.progress.seconds),
            "train": self.world.sum_values(losses),
            **{name: value for name, value in numbers.items() if name not in losses},
        }


def read_ahead(updates: Iterable[Update], device: torch.device) -> Generator[Update, None, None]:
    """The same updates, on `device`; a thread reads and copies the next READ_AHEAD while the last one trains.
    What reading raises is raised in its place."""
    source = iter(updates)

    def read() -> Update | None:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            update = next(source, None)
            return update and replace(update, parts=tuple(part.to(device) for part in update.parts))

    reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    try:
        ready = deque(reader.submit(read) for _ in range(READ_AHEAD))
        while (update := ready.popleft().result()) is not None:
            ready.append(reader.submit(read))
            yield update
    finally:
        reader.shutdown(cancel_futures=True)


class CheckpointTriggers:
    """Triggers besides the step count: a timer, and a worker that has to end. All workers agree on them."""

    def __init__(self, minutes: float | None, world: World, leaving: Callable[[], str]) -> None:
        self._seconds = math.inf if minutes is None else 60 * minutes
        self._world = world
        self._leaving = leaving
        self._last = time.monotonic()

    def check(self, step: int) -> tuple[bool, str]:
        """Whether the timer asks for a checkpoint, and why some worker has to end; empty if none has to."""
        if self._world.size > 1 and step % TRIGGER_STEPS:
            return False, ""
        own, reasons = self._leaving(), ("stopped", "preempted")
        timer = self._world.is_rank_zero and time.monotonic() - self._last >= self._seconds
        numbers = {"timer": float(timer), **{reason: float(own == reason) for reason in reasons}}
        workers = self._world.sum_values(numbers)
        return workers["timer"] > 0, next((reason for reason in reasons if workers[reason]), "")

    def restart_timer(self) -> None:
        self._last = time.monotonic()


class _Clock:
    """Adds the time since the last call to an entry of progress.seconds."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._last = time.perf_counter()
        self._logged = self._trained()

    def charge(self, name: str) -> None:
        now = time.perf_counter()
        _add(self._progress.seconds, {name: now - self._last})
        self._last = now

    def titles_per_second(self) -> float:
        (titles, seconds), before = self._trained(), self._logged
        self._logged = titles, seconds
        return (titles - before[0]) / max(1e-9, seconds - before[1])

    def _trained(self) -> tuple[int, float]:
        seconds = self._progress.seconds
        return self._progress.titles, seconds.get("train", 0.0) + seconds.get("data", 0.0)


def _add(sums: dict[str, float], values: Mapping[str, float]) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value


def _require_finite(learner: Learner, step: int) -> None:
    """Refuse to write weights that are not finite: every resume would end on them."""
    finite = [torch.isfinite(parameter).all() for parameter in learner.pair.parameters()]
    if not torch.stack(finite).all():
        raise LossError(
            f"weights are not finite at step {step}; use a lower learning_rate or optimizer.clip_norm, and "
            "another --out"
        )
