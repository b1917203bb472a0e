"""What a sweep searched and what became of each point, as `sweep_folder` read it. Pure; knows no figure."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from newsbert_ray.record import RunRecord
from newsbert_ray.reporting.tables import Column, Mode, Summary, summarise, summary_of
from newsbert_ray.tasks import HEADINGS, Task, task_of

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
