"""What a run or sweep reports while it works: events.jsonl in its folder, and metrics for Prometheus."""

from __future__ import annotations

import json
import os
import string
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args
from urllib.parse import quote

from newsbert_ray.files import locked
from newsbert_ray.methods import HEADINGS
from newsbert_ray.record import read_entries
from newsbert_ray.secrets import mask_fields

EVENTS = "events.jsonl"
Event = Literal[
    "start",
    "resume",
    "checkpoint",
    "evaluation",
    "trial_start",
    "trial_end",
    "trial_broke_off",
    "trial_retry",
    "worker_restart",
    "preemption",
    "node_came",
    "node_gone",
    "interrupted",
    "end",
    "error",
]
"""Every event; `start`, `resume`, `end` and `error` belong to the run or the sweep as a whole."""


class EventLog:
    """Appends events to folder/events.jsonl, one JSON object a line; several processes may share the file.
    What cannot be written (a full disk) is dropped: a log must not end the run, nor hide its error."""

    def __init__(self, folder: str | Path) -> None:
        """`folder`: the run's or sweep's; must exist before the first event. Its name is in each line."""
        self.path = Path(folder) / EVENTS
        self._run = Path(folder).absolute().name

    def __call__(self, event: Event, **fields: Any) -> None:
        """Append a line: `time` (UTC), `event`, `run` and the fields, with secrets masked."""
        assert event in get_args(Event), event
        assert not fields.keys() & {"time", "run"}, fields
        time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"time": time, "event": event, "run": self._run, **mask_fields(fields)}
        with suppress(OSError):
            _append(self.path, json.dumps(line, default=str))

    def report(self, entry: Mapping[str, Any]) -> None:
        """A training report: logs evaluations and checkpoints."""
        if entry["kind"] == "evaluation":
            self("evaluation", step=entry["step"], epoch=entry["epoch"], validation=entry["validation"])
        elif entry["kind"] == "checkpoint":
            self("preemption" if entry["preempted"] else "checkpoint", step=entry["step"])


def read_events(folder: str | Path) -> list[dict[str, Any]]:
    """The events in a folder, in the order of writing; damaged lines are skipped."""
    return [event for event in read_entries(Path(folder) / EVENTS) if isinstance(event, dict)]


def _append(path: Path, line: str) -> None:
    """Append a line in one write; the last line of the file may have been cut short by a kill."""
    with path.open("ab+", buffering=0) as file, ExitStack() as stack:
        with suppress(OSError):  # a file system without locks: at worst an empty line
            stack.enter_context(locked(path.with_name(f".{path.name}.lock"), wait_seconds=5.0))
        size = file.seek(0, os.SEEK_END)
        is_cut = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
        file.write((("\n" if is_cut else "") + line + "\n").encode())


STATES = ("running", "finished", "stopped_early", "failed", "waiting")
"""States of a sweep's trial."""
REFRESH_SECONDS = 2.0
"""An unchanged state is reported again after this time."""


class Meter(NamedTuple):
    """A Prometheus metric: a counter only grows; one series for each combination of tags."""

    description: str
    tags: tuple[str, ...]
    counter: bool = False


METERS: Mapping[str, Meter] = {
    "newsbert_titles_per_second": Meter("Training examples per second, since the last log", ("run", "trial")),
    "newsbert_titles": Meter("Training examples", ("run",), counter=True),
    "newsbert_loss": Meter("Losses of the last logged step", ("run", "trial", "loss")),
    "newsbert_step": Meter("Optimiser steps", ("run", "trial")),
    "newsbert_epoch": Meter("Epochs, the current one in part", ("run", "trial")),
    "newsbert_validation": Meter("Metrics of the last evaluation", ("run", "trial", "model", "metric")),
    "newsbert_seconds": Meter(
        "Seconds by activity: train, data (waiting for it), evaluate, checkpoint, report",
        ("run", "part"),
        counter=True,
    ),
    "newsbert_trials": Meter("Trials of a sweep by state", ("run", "state")),
    "newsbert_best": Meter("Best value of the sweep's first goal so far", ("run",)),
}
"""By their names in Ray; the tag `run` is the name of the run's or the sweep's folder."""


class RunMeters:
    """A training report that sends a run's numbers to Prometheus; does nothing in a process without Ray."""

    def __init__(self, folder: str | Path) -> None:
        """`folder`: the run's; in a sweep's `trials` folder the run is a trial."""
        folder = Path(folder).absolute()
        of_sweep = folder.parent.name == "trials"
        self._run = _tag(folder.parent.parent.name if of_sweep else folder.name)
        self._trial = _tag(folder.name) if of_sweep else ""
        self._active = _is_connected()
        self._gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._seconds: dict[str, float] | None = None

    def __call__(self, entry: Mapping[str, Any]) -> None:
        """Report an entry of the training loop; `seconds` of a log entry cover all starts of the run."""
        if not self._active or entry["kind"] not in ("log", "evaluation"):
            return
        if entry["kind"] == "log":
            self._keep("newsbert_titles_per_second", entry["titles_per_second"])
            for loss, value in entry["train"].items():
                self._keep("newsbert_loss", value, loss=loss)
        else:
            for model, metrics in entry["validation"].items():
                for metric in metrics.keys() & HEADINGS.keys():
                    self._keep("newsbert_validation", metrics[metric], model=model, metric=metric)
        self._keep("newsbert_step", entry["step"])
        self._keep("newsbert_epoch", entry["epoch"])
        # All of them each time: Ray drops a metric that is not set again.
        for (name, tags), value in self._gauges.items():
            _metric(name).set(value, {**dict(tags), "run": self._run, "trial": self._trial})
        if "seconds" in entry:
            self._count(entry["seconds"], speed=entry["titles_per_second"], fresh=entry["step"] == 1)

    def _keep(self, name: str, value: float, **tags: str) -> None:
        self._gauges[name, tuple(tags.items())] = float(value)

    def _count(self, seconds: Mapping[str, float], *, speed: float, fresh: bool) -> None:
        """Add the seconds since the last log; an earlier start has counted its own."""
        before = self._seconds if self._seconds is not None else {} if fresh else seconds
        passed = {part: value - before.get(part, 0.0) for part, value in seconds.items()}
        counter = _metric("newsbert_seconds")
        for part, value in passed.items():
            if value > 0:
                counter.inc(value, {"run": self._run, "part": part})
        # The entry's throughput is over the seconds of these two parts.
        if (titles := speed * (passed.get("train", 0.0) + passed.get("data", 0.0))) > 0:
            _metric("newsbert_titles").inc(titles, {"run": self._run})
        self._seconds = dict(seconds)


class SweepMeters:
    """Sends the number of a sweep's trials in each state to Prometheus; does nothing without Ray."""

    def __init__(self, folder: str | Path) -> None:
        """`folder`: the sweep's."""
        self._run, self._active = _tag(Path(folder).absolute().name), _is_connected()
        self._last: tuple[dict[str, int], float | None] = ({}, None)
        self._sent_at = 0.0

    def update(self, states: Mapping[str, int], *, best: float | None = None) -> None:
        """Report the number of trials in each of STATES (0 for those left out), and the first goal's best
        value. Call it often: an unchanged state is sent every two seconds only."""
        assert states.keys() <= set(STATES), f"states {sorted(states)}, known are {STATES}"
        now = time.monotonic()
        if not self._active or ((dict(states), best) == self._last and now - self._sent_at < REFRESH_SECONDS):
            return
        self._last, self._sent_at = (dict(states), best), now
        trials = _metric("newsbert_trials")
        for state in STATES:
            trials.set(states.get(state, 0), {"run": self._run, "state": state})
        if best is not None:
            _metric("newsbert_best").set(best, {"run": self._run})


def _tag(name: str) -> str:
    """A folder's name as the value of a tag: Ray takes ASCII only (ray #18517), so the rest is quoted."""
    return quote(name, safe=string.printable)


def _is_connected() -> bool:
    # Not at load: reports read events, and are written where Ray is not installed.
    from newsbert_ray.ray_session import initialised

    return initialised()


def _metric(name: str) -> Any:
    """Ray's Counter or Gauge of this name."""
    from ray.util import metrics

    kind = metrics.Counter if METERS[name].counter else metrics.Gauge
    return kind(name, description=METERS[name].description, tag_keys=METERS[name].tags)
