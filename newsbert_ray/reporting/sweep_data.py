"""What a sweep searched and what became of each point, as `sweep_folder` read it. Pure; knows no figure."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from newsbert_ray.files import is_locked
from newsbert_ray.methods import HEADINGS, Task, task_of
from newsbert_ray.record import (
    METRICS,
    RECORD,
    TEACHERS,
    RecordError,
    RunRecord,
    read_entries,
    read_record,
    read_stop,
)
from newsbert_ray.reporting.records import flat_values
from newsbert_ray.reporting.tables import Column, Mode, Summary, number, summarise, summary_of

State = Literal["finished", "stopped", "failed", "under way"]


@dataclass(frozen=True)
class Goal:
    """What a point is judged by."""

    metric: str
    mode: Mode

    @property
    def column(self) -> Column:
        """The goal as people read it: heading, factor and digits."""
        split, _, rest = self.metric.partition(".")
        if split == "speed":
            name = {
                "student_titles_per_second": "student's titles/s",
                "times_teacher": "speed, times the teacher's",
            }
            digits = 0 if rest == "student_titles_per_second" else 2
            return Column(self.metric, name.get(rest, rest), self.metric, digits=digits)
        model, _, kind = rest.partition(".")
        whose = "" if model == "student" else f"{model}'s "
        heading = f"{whose}{split} {HEADINGS.get(kind, kind)} (%)"
        return Column(self.metric, heading, self.metric, factor=100.0, digits=2)


@dataclass(frozen=True)
class Axis:
    """A varied setting as the search space states it; `values`, or `low` to `high`."""

    name: str
    values: tuple[Any, ...] | None = None
    low: float | None = None
    high: float | None = None
    integer: bool = False
    log: bool = False
    step: float | None = None
    when: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def active(self, point: Mapping[str, Any]) -> bool:
        """Whether the setting varies in `point`, which holds the axes before it."""
        return all(name in point and point[name] in values for name, values in self.when.items())


@dataclass(frozen=True)
class Trial:
    """One point with one seed. `epoch` is the last one evaluated, `epochs` what was planned."""

    name: str
    point: Mapping[str, Any]
    seed: int
    state: State
    settings: Mapping[str, Any]
    epochs: int
    epoch: float
    entries: tuple[Mapping[str, Any], ...]
    values: tuple[float, ...] = ()
    """A number for each goal where it finished; the first goal's last one where it was stopped."""
    seconds: float | None = None
    """Time in its training loop; None where nobody wrote it down."""
    reason: str = ""
    record: RunRecord | None = None

    def curve(self, metric: str) -> list[tuple[float, float]]:
        """(epoch, value) of each evaluation that knows `metric`."""
        pairs = [(entry.get("epoch"), _at(entry, metric)) for entry in self.entries]
        return [(float(x), y) for x, y in pairs if isinstance(x, int | float) and y is not None]


@dataclass(frozen=True)
class Point:
    """Settings that were tried, with each seed; `state` says what became of them."""

    label: str
    values: Mapping[str, Any]
    trials: tuple[Trial, ...]
    state: State

    def summary(self, goal: int = 0) -> Summary | None:
        """Mean and standard deviation of a goal over the seeds that know it."""
        found = [trial.values[goal] for trial in self.trials if len(trial.values) > goal]
        return summarise(found) if found else None

    def mean(self, goal: int = 0) -> float:
        """Mean of a goal over the seeds; NaN where none knows it."""
        summary = self.summary(goal)
        return summary.mean if summary else math.nan

    @property
    def records(self) -> list[RunRecord]:
        """Records of its finished trials."""
        return [trial.record for trial in self.trials if trial.record]


@dataclass(frozen=True)
class Sweep:
    """A sweep as its folder tells it."""

    folder: Path
    plan: Mapping[str, Any]
    axes: tuple[Axis, ...]
    goals: tuple[Goal, ...]
    seeds: tuple[int, ...]
    points: tuple[Point, ...]
    failures: Mapping[str, str]
    """Why trials failed, by name; some never had a folder."""
    held: bool
    """Whether a process works in the folder."""
    firsts: tuple[RunRecord, ...] = ()
    """Runs that came before trials and are shared by them: teachers, students to start from."""

    @property
    def space(self) -> Mapping[str, Any]:
        """The search space as sweep.json holds it."""
        space: Mapping[str, Any] = self.plan["space"]
        return space

    @property
    def task(self) -> Task:
        """What all its trials learn."""
        return task_of(self.plan.get("settings") or {})

    @property
    def asked(self) -> int:
        """Points that were asked for."""
        return int(self.plan["trials"]) // max(1, len(self.seeds))

    @cached_property
    def trials(self) -> tuple[Trial, ...]:
        """Every trial that began."""
        return tuple(trial for point in self.points for trial in point.trials)

    def of(self, *states: State) -> list[Point]:
        """Points in one of these states."""
        return [point for point in self.points if point.state in states]

    @property
    def failed_rows(self) -> list[Mapping[str, Any]]:
        """The axes' values of every trial that failed; of one without a folder as its name tells them."""
        begun = {trial.name: trial.point for trial in self.trials}
        return [begun.get(name) or self._told(name) for name in self.failures]

    def _told(self, name: str) -> dict[str, Any]:
        words = dict(part.partition("=")[::2] for part in name.split(",") if "=" in part)
        found: dict[str, Any] = {}
        for axis in self.axes:
            word = words.get(axis.name, words.get(axis.name.rsplit(".", 1)[-1]))
            if word is not None:
                shown = {str(value): value for value in axis.values or ()}
                found[axis.name] = shown.get(word, word)
        return found

    @cached_property
    def finished(self) -> list[Point]:
        """Points that every seed has finished, the best by the first goal first, of equals the one that the
        sweep's command for its best point trains."""
        sign = -1.0 if self.goals[0].mode == "max" else 1.0
        words = shlex.split(str(self.plan.get("best", "")))
        given = dict(pairwise(words))
        return sorted(self.of("finished"), key=lambda p: (sign * p.mean(), not _is_asked(p, given)))

    @cached_property
    def front(self) -> list[Point]:
        """Finished points that no other beats in one goal without losing in another, by the first goal."""
        return [p for p in self.finished if not any(self._beats(other, p) for other in self.finished)]

    def _beats(self, one: Point, other: Point) -> bool:
        signs = [1.0 if goal.mode == "max" else -1.0 for goal in self.goals]
        gains = [sign * (one.mean(i) - other.mean(i)) for i, sign in enumerate(signs)]
        return min(gains) >= 0 and max(gains) > 0


def _is_asked(point: Point, given: Mapping[str, str]) -> bool:
    """Whether a command's words, each with the one after it, ask for the point."""
    return all(
        given.get(f"--{name}") in (str(value), json.dumps(value)) for name, value in point.values.items()
    )


def _at(entry: Mapping[str, Any], path: str) -> float | None:
    value: Any = entry
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def teacher_summary(point: Point, metric: str) -> Summary | None:
    """The teacher's number beside a student's `metric`, over the seeds; None where there is none."""
    beside = metric.replace("student", "teacher")
    return summary_of(point.records, beside) if beside != metric else None


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else "".join(names)


SWEEP = "sweep.json"


def is_sweep(folder: str | Path) -> bool:
    """Whether `folder` is a sweep's."""
    return (Path(folder) / SWEEP).is_file()


def read_sweep(folder: str | Path) -> Sweep:
    """The sweep in `folder`, finished or not.

    Raises:
        RecordError: sweep.json, or the record of a trial that has not failed, is damaged.
    """
    folder = Path(folder)
    path = folder / SWEEP
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        space = plan["space"]
        axes = tuple(_axis(values) for values in space["axes"])
        goals = tuple(Goal(goal["metric"], goal["mode"]) for goal in space["goals"])
        seeds = tuple(int(seed) for seed in space["seeds"])
        failures = {**_notes(folder / "failures"), **{n: str(r) for n, r in plan.get("failures", {}).items()}}
        if "failures" in plan:
            failures = {name: reason for name, reason in failures.items() if name in plan["failures"]}
        int(plan["trials"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(
            f"{path}: damaged, or written by another version ({type(error).__name__}: {error}); "
            f"its finished trials alone: newsbert-ray report {folder / 'trials'}"
        ) from error
    trials = [
        trial
        for found in sorted((folder / "trials").glob("*"))
        if found.is_dir() and (trial := _trial(found, axes, goals, failures)) is not None
    ]
    points = _points(trials, seeds)
    held, firsts = _held(folder / ".lock"), _firsts(folder / TEACHERS)
    return Sweep(folder, plan, axes, goals, seeds, points, failures, held, firsts)


def _axis(values: Mapping[str, Any]) -> Axis:
    given = values.get("values")
    names = ("low", "high", "integer", "log", "step", "when")
    rest = {name: values[name] for name in names if values.get(name) is not None}
    return Axis(values["name"], None if given is None else tuple(given), **rest)


def _firsts(folder: Path) -> tuple[RunRecord, ...]:
    """The finished runs that trials share; a damaged record is its own trial's business."""
    found = []
    for path in sorted(folder.glob(f"*/{RECORD}")):
        with suppress(RecordError):
            found.append(read_record(path.parent))
    return tuple(found)


def _notes(folder: Path) -> dict[str, str]:
    """The last line of each failure's frames, by trial."""
    found = {}
    for path in sorted(folder.glob("*.txt")):
        lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line]
        reason = re.sub(r"^[\w.]+\.(\w+:)", r"\1", lines[-1]) if lines else "unknown reason"
        found[path.name.removesuffix(".txt")] = reason
    return found


def _trial(
    folder: Path, axes: Sequence[Axis], goals: Sequence[Goal], failures: Mapping[str, str]
) -> Trial | None:
    """What a trial's folder tells; None for one in which nothing has begun."""
    failed = folder.name in failures
    record = read_record(folder) if (folder / RECORD).exists() and not failed else None
    settings = record.settings if record else _settings(folder)
    if settings is None:
        return None
    flat = flat_values(settings)
    point: dict[str, Any] = {}
    for axis in axes:
        if axis.active(point):
            point[axis.name] = flat.get(axis.name)
    entries = record.curve if record else read_entries(folder / METRICS)
    evaluations = tuple(entry for entry in entries if "validation" in entry)
    return Trial(
        name=folder.name,
        point=point,
        seed=int(settings.get("seed", 0)),
        settings=settings,
        epochs=int(settings.get("epochs", 0)),
        entries=evaluations,
        epoch=max((float(entry.get("epoch", 0.0)) for entry in evaluations), default=0.0),
        reason=failures.get(folder.name, ""),
        record=record,
        **({"state": "failed"} if failed else _finish(record, goals) if record else _stop(folder)),
    )


def _finish(record: RunRecord, goals: Sequence[Goal]) -> dict[str, Any]:
    values = [number(record, goal.metric) for goal in goals]
    if None in values:
        return {"state": "failed"}
    return {"state": "finished", "values": tuple(values), "seconds": number(record, "seconds")}


def _stop(folder: Path) -> dict[str, Any]:
    stop = read_stop(folder)
    if stop is None:
        return {"state": "under way"}
    return {"state": "stopped", "values": (stop.value,), "seconds": stop.seconds}


def _settings(folder: Path) -> Mapping[str, Any] | None:
    try:
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return settings if isinstance(settings, dict) else None


def _points(trials: Sequence[Trial], seeds: Sequence[int]) -> tuple[Point, ...]:
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.name.removesuffix(f",seed={trial.seed}"), []).append(trial)
    points = []
    for label, group in groups.items():
        states = {trial.state for trial in group}
        state: State = "under way"
        if "failed" in states:
            state = "failed"
        elif "stopped" in states:
            state = "stopped"
        elif states == {"finished"} and {trial.seed for trial in group} >= set(seeds):
            state = "finished"
        points.append(Point(label, group[0].point, tuple(group), state))
    return tuple(points)


def _held(lock: Path) -> bool:
    """Whether a process holds the sweep's folder; the system frees it however that ends."""
    return is_locked(lock)
