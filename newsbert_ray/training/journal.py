"""Where a run's entries go: metrics.jsonl and TensorBoard in its folder, and a person's screen."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from newsbert_ray.files import write_text
from newsbert_ray.methods import HEADINGS
from newsbert_ray.record import METRICS, read_entries

_PLAIN_SECONDS = 10.0


class Journal:
    """Appends entries to metrics.jsonl and TensorBoard; on a resume, entries after the resumed step go
    first."""

    def __init__(self, folder: Path, *, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS
        # The loop reports an evaluation at the resumed step once more.
        kept = [e for e in read_entries(self.path) if (e["step"], e["kind"] == "evaluation") < (done, True)]
        write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)

    def __call__(self, entry: Mapping[str, Any]) -> None:
        if entry["kind"] not in ("log", "evaluation"):
            return
        append_entry(self.path, entry)
        for name, value in flatten(entry):
            if name not in ("step", "steps", "epochs"):
                self.board.add_scalar(name, value, entry["step"])
        if entry["kind"] == "evaluation":
            self.board.flush()

    def close(self) -> None:
        """Flush and end the TensorBoard file."""
        self.board.close()


def append_entry(path: Path, entry: Mapping[str, Any]) -> None:
    """Add a line to a metrics.jsonl."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def flatten(entry: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of a nested mapping by their path, as TensorBoard wants them
    (`validation/student/accuracy`)."""
    for key, value in entry.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", float(value)


class Display:
    """A run's entries on the screen: a live bar on a terminal, otherwise a plain line every ten seconds."""

    def __init__(self, *, total: int, live: bool | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(file=sys.stdout, highlight=False)
        self.live = self.console.is_terminal if live is None else live
        self.total = total
        self.first: tuple[int, float] | None = None  # step and time of this start's first entry
        self.last_line = 0.0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.bar.update(self.task, completed=self.total)
        self.bar.stop()

    def __call__(self, entry: Mapping[str, Any]) -> None:
        if entry["kind"] == "checkpoint":
            if entry["leaving"]:
                self.say(f"step {entry['step']}: this machine is about to be taken away; checkpoint written")
            return
        if entry["kind"] != "log":
            self.say(entry["text"] if entry["kind"] == "note" else _evaluation_line(entry))
            return
        numbers = _log_numbers(entry)
        if self.first is None:
            self.first = (entry["step"], time.monotonic())
            self.bar.reset(self.task, total=self.total, completed=entry["step"])
        self.bar.update(
            self.task,
            completed=entry["step"],
            numbers=numbers,
            description=f"epoch {entry['epoch']}/{entry['epochs']}",
        )
        now = time.monotonic()
        if not self.live and now - self.last_line >= _PLAIN_SECONDS:
            self.last_line = now
            self.say(f"step {entry['step']}/{self.total}  {numbers}  left {self._left(entry['step'])}")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.console.print(line, markup=False, soft_wrap=True)
        if not self.live:
            sys.stdout.flush()

    def _left(self, step: int) -> str:
        if self.first is None or step <= self.first[0]:
            return "-"
        speed = (time.monotonic() - self.first[1]) / (step - self.first[0])
        seconds = int(speed * (self.total - step))
        return f"{seconds // 60}:{seconds % 60:02d}"


def both(*reports: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """One report that gives an entry to each of several, in order."""

    def report(entry: dict[str, Any]) -> None:
        for one in reports:
            one(entry)

    return report


def _log_numbers(entry: Mapping[str, Any]) -> str:
    losses = entry["train"]
    tasks = [
        f"{name.split('_')[0]} {losses[name]:.3f}"
        for name in ("teacher_task", "student_task")
        if name in losses
    ]
    speed = f"{entry['titles_per_second']:.0f} {entry.get('examples', 'titles')}/s"
    return "  ".join([f"loss {losses['total']:.3f}", *tasks, speed])


def _evaluation_line(entry: Mapping[str, Any]) -> str:
    """The metrics of each model that is there; a student that learns alone has no teacher beside it."""
    scores = entry["validation"]
    models = [
        " ".join(
            [
                model,
                *(
                    f"{HEADINGS[name]} {scores[model][name]:.4f}"
                    for name in HEADINGS
                    if name in scores[model]
                ),
            ]
        )
        for model in ("teacher", "student")
        if model in scores
    ]
    return f"epoch {entry['epoch']:g} (step {entry['step']}): validation " + ", ".join(models)
