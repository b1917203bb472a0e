"""Where the loop's entries go: metrics.jsonl and TensorBoard in the run's folder, and the screen."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from newsbert_ray.files import format_duration, write_text
from newsbert_ray.methods import HEADINGS, Task, task_of
from newsbert_ray.record import METRICS, RunRecord, read_entries
from newsbert_ray.settings import flatten
from newsbert_ray.storage.workdir import WorkDir

_PLAIN_SECONDS = 10.0


class Journal:
    """Appends entries to metrics.jsonl and TensorBoard; a resume first deletes later entries."""

    def __init__(self, folder: Path, *, done: int) -> None:
        """`folder` is the run's, `done` the step to continue from."""
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS
        # An evaluation at step `done` goes too: the loop reports it again.
        kept = [e for e in read_entries(self.path) if (e["step"], e["kind"] == "evaluation") < (done, True)]
        write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)

    def __call__(self, entry: Mapping[str, Any]) -> None:
        if entry["kind"] not in ("log", "evaluation"):
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        for name, value in flatten(entry).items():
            if isinstance(value, int | float) and name not in ("step", "steps", "epochs"):
                self.board.add_scalar(name.replace(".", "/"), value, entry["step"])
        for name, value in overview(entry):
            self.board.add_scalar(f"0_overview/{name}", value, entry["step"])
        if entry["kind"] == "evaluation":
            self.board.flush()

    def close(self) -> None:
        self.board.close()


def overview(entry: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The loss, or each model's main metric: TensorBoard opens on them, because it sorts groups by name."""
    if entry["kind"] == "log":
        return [("loss", entry["train"]["total"])] if "total" in entry["train"] else []
    named = {model: [m for m in HEADINGS if m in scores] for model, scores in entry["validation"].items()}
    return [(f"{k}_{m[0]}", entry["validation"][k][m[0]]) for k, m in named.items() if m]


class Display:
    """Shows entries on the screen: a progress bar on a terminal, otherwise a line every ten seconds."""

    def __init__(self, *, total: int, quiet: bool = False) -> None:
        """`total` is the number of steps; `quiet` shows nothing."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(file=sys.stdout, highlight=False, quiet=quiet)
        self.live = self.console.is_terminal and not quiet
        self.total = total
        self._is_wide = self.console.width >= 120
        self._start: tuple[int, float] | None = None  # step and time of the first entry
        self._last_line = 0.0
        self._numbers = ""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24 if self._is_wide else 10),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=self.console, disable=not self.live)
        self.task = self.bar.add_task("training", total=total, numbers="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.bar.update(self.task, completed=self.total)
        self.bar.stop()

    def __call__(self, entry: Mapping[str, Any]) -> None:
        if entry["kind"] == "log":
            self._numbers = _log_numbers(entry)
            numbers = self._numbers if self._is_wide else _log_numbers(entry, short=True)
            epoch = f"epoch {entry['epoch']}/{entry['epochs']}"
            self.bar.update(self.task, description=epoch, numbers=numbers)
            self._move(entry["step"])
        elif entry["kind"] == "evaluation":
            self.say(_evaluation_line(entry))
        elif entry["kind"] == "step":
            self._move(entry["step"])
        elif entry["kind"] == "note":
            self.say(entry["text"])
        elif entry["preempted"]:
            self.say(f"step {entry['step']}: this machine is being taken away; checkpoint written")

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)
        if not self.live:
            sys.stdout.flush()

    def _move(self, step: int) -> None:
        if self._start is None:
            self._start = (step, time.monotonic())
            self.bar.reset(self.task, total=self.total, completed=step)
        self.bar.update(self.task, completed=step)
        now = time.monotonic()
        if not self.live and now - self._last_line >= _PLAIN_SECONDS:
            self._last_line = now
            left, (first, began) = "", self._start
            if step > first:
                seconds = int((now - began) / (step - first) * (self.total - step))
                left = f"left {seconds // 60}:{seconds % 60:02d}"
            self.say("  ".join(filter(None, (f"step {step}/{self.total}", self._numbers, left))))


def closing_lines(record: RunRecord, workdir: WorkDir) -> str:
    """A finished run's metrics, where its files are, and which commands to run next."""
    run, task = shlex.quote(workdir.location), task_of(record.settings)
    test = record.metrics.get("test") or {}
    split, scores = ("test", test) if test else ("validation", record.metrics["validation"])
    left_out = int(scores["student"].get("left_out", 0))
    rows = f"{int(scores['student']['rows'])} {task.rows}" + (f" ({left_out} left out)" if left_out else "")
    files = "record, student/, checkpoints/ and TensorBoard events"
    board = [f"tensorboard --logdir {shlex.quote(str(workdir.path))}"]
    if record.settings["student"]["kind"] == "linear":
        files, board = "record and student/", []
    report = "report" if workdir.is_remote else shlex.quote(f"{workdir.location}/report")
    commands = [f"newsbert-ray evaluate {run}", f"newsbert-ray report {run} --out {report}", *board]
    lines = [f"{split}, {rows}, best step {record.metrics['best_step']} of {record.steps}:"]
    lines += [_score_line(model, scores[model], task) for model in ("teacher", "student") if model in scores]
    if not test:
        lines.append(
            f"the test split has no labels: newsbert-ray evaluate {run} --submission prediction.zip ranks it"
        )
    speed = f"{record.titles_per_second:.0f} {task.examples}/s"
    lines.append(f"{speed}, {format_duration(record.seconds['total'])}; {files} are in {workdir.location}")
    return "\n".join([*lines, "next: " + "\n      ".join(commands)])


def _score_line(model: str, scores: Mapping[str, float], task: Task) -> str:
    metrics = []
    for metric in task.metrics:
        error = scores.get(f"{metric.name}_error")
        spread = "" if error is None else f" ± {error:.4f}"
        metrics.append(f"{metric.heading} {scores[metric.name]:.4f}{spread}")
    return f"  {model:<8} {'  '.join(metrics)}"


def _log_numbers(entry: Mapping[str, Any], *, short: bool = False) -> str:
    losses = entry["train"]
    models = ("teacher", "student")
    tasks = [f"{model} {losses[f'{model}_task']:.3f}" for model in models if f"{model}_task" in losses]
    speed = f"{entry['titles_per_second']:.0f} {entry.get('examples', 'titles')}/s"
    seconds = entry.get("seconds", {})
    training = seconds.get("train", 0.0) + seconds.get("data", 0.0)
    waits = seconds.get("data") and entry.get("step") != 1  # the first batch is not read ahead
    waiting = [f"waiting for data {seconds['data'] / training:.0%}"] if waits else []
    loss = f"loss {losses['total']:.3f}"
    return "  ".join([loss, speed] if short else [loss, *tasks, speed, *waiting])


def _evaluation_line(entry: Mapping[str, Any]) -> str:
    """Validation metrics of each model; a student that learns alone has no teacher."""
    models = []
    for model in ("teacher", "student"):
        if scores := entry["validation"].get(model):
            metrics = [f"{HEADINGS[name]} {scores[name]:.4f}" for name in HEADINGS if name in scores]
            models.append(" ".join([model, *metrics]))
    return f"epoch {entry['epoch']:g} (step {entry['step']}): validation " + ", ".join(models)
