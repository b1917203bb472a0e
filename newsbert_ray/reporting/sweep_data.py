"""A sweep as data: axes, goals, trials and points, and reading them back from the sweep's folder. `tune` and
`reporting` share these types. Does not import Ray, Optuna or matplotlib."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, cast

import numpy as np
from pydantic import Field

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
from newsbert_ray.reporting.records import distinct, grouped
from newsbert_ray.reporting.tables import Column, Mode, Summary, number, number_at, short, summarise
from newsbert_ray.settings import Settings, flatten

SWEEP = "sweep.json"
TRIALS, FAILURES = "trials", "failures"
"""Folders of a sweep: one folder for each trial, and a text file for each failure."""

_SPEEDS = {
    "student_titles_per_second": ("student's titles/s", 0),
    "times_teacher": ("speed, times the teacher's", 2),
}
State = Literal["finished", "stopped", "failed", "skipped", "under way"]
"""A trial is skipped when the point's first seed was stopped early and this seed had not started."""


def validation_metrics(*tasks: Task) -> tuple[str, ...]:
    """Metrics that a trial of these tasks reports at each evaluation, so early stopping can use them."""
    names = dict.fromkeys(metric.name for task in tasks for metric in task.metrics)
    return tuple(f"validation.{model}.{name}" for model in ("student", "teacher") for name in names)


def goal_metrics(*tasks: Task) -> tuple[str, ...]:
    """Metrics that can be a sweep's goal; `speed` is measured at a trial's end on texts of the test split."""
    validation = validation_metrics(*tasks)
    test = (name.replace("validation", "test") for name in validation)
    return (*validation, *test, "speed.student_titles_per_second", "speed.times_teacher")


class Goal(Settings):
    """A metric to maximise or minimise."""

    metric: str = ""
    """Metric to optimise; by default the task's main metric of the student on the validation split."""
    mode: Mode = "max"
    """Whether a larger value is better."""

    @property
    def sign(self) -> float:
        """1 where a larger value is better, -1 where a smaller one is."""
        return 1.0 if self.mode == "max" else -1.0

    @property
    def column(self) -> Column:
        """The goal as a table column: heading, factor and digits."""
        split, _, rest = self.metric.partition(".")
        if split == "speed":
            heading, digits = _SPEEDS.get(rest, (rest, 2))
            return Column(self.metric, heading, self.metric, digits=digits)
        model, _, kind = rest.partition(".")
        whose = "" if model == "student" else f"{model}'s "
        heading = f"{whose}{split} {HEADINGS.get(kind, kind)} (%)"
        return Column(self.metric, heading, self.metric, factor=100.0, digits=2)


def has_values(point: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> bool:
    """Whether each of these settings varies at `point` and has one of its values."""
    return all(name in point and point[name] in values for name, values in allowed.items())


class Axis(Settings):
    """One varied setting: a list of `values`, or a range from `low` to `high`, both included."""

    name: str
    """Dotted name of a training setting."""
    values: tuple[Any, ...] | None = None
    """Values to try, in order."""
    low: float | None = None
    """Lower end of a range."""
    high: float | None = None
    """Upper end of a range."""
    integer: bool = False
    """Whole numbers only."""
    log: bool = False
    """Sampled evenly on a logarithmic scale."""
    step: float | None = None
    """Distance between two values of a range."""
    divisors: bool = False
    """The depths that divide the teacher's layers; `values` holds them once the teacher's depth is known."""
    when: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """The axis varies only where each of these earlier axes has one of these values."""

    def is_active(self, point: Mapping[str, Any]) -> bool:
        """Whether the axis varies at `point`, which holds the values of the axes before it."""
        return has_values(point, self.when)

    @property
    def condition(self) -> str:
        """Where the axis varies: `method is newsbert or mutual and student.layers is 2`."""
        return " and ".join(f"{name} is {' or '.join(map(short, v))}" for name, v in self.when.items())

    def samples(self) -> tuple[Any, ...]:
        """Values to check: every value of a list or of a short integer range, else the ends of the range."""
        if self.values is not None:
            return self.values
        if self.divisors:
            return (1,)
        low, high = cast(float, self.low), cast(float, self.high)
        if not self.integer:
            return (low, high)
        every = range(int(low), int(high) + 1, int(self.step or 1))
        return tuple(every) if len(every) <= 100 else (every[0], every[-1])

    def convert(self, value: Any) -> Any:
        """`value` in the type of this axis (1 becomes 1.0 in a range of floats). Raises ValueError, with what
        was expected, where it is not on the axis."""
        if self.values is not None:
            for known in self.values:
                if known == value and isinstance(known, bool) == isinstance(value, bool):
                    return known
            raise ValueError(f"expected one of {', '.join(map(str, self.values))}")
        low, high = (1.0, math.inf) if self.low is None or self.high is None else (self.low, self.high)
        whole = self.integer or self.divisors
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or (whole and value != round(value)):
            raise ValueError(f"expected a {'whole ' if whole else ''}number")
        if not low <= value <= high:
            raise ValueError(f"expected {low:g} to {high:g}")
        steps = (value - low) / self.step if self.step else 0.0
        if abs(steps - round(steps)) > 1e-8:
            raise ValueError(f"expected {low:g} plus a whole number of steps of {self.step:g}")
        return int(value) if whole else float(value)


@dataclass(frozen=True)
class Trial:
    """One point with one seed."""

    name: str
    point: Mapping[str, Any]
    seed: int
    state: State
    settings: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 0
    """Epochs that were planned."""
    epoch: float = 0.0
    """Epoch of the last evaluation."""
    entries: tuple[Mapping[str, Any], ...] = ()
    """Its evaluations, as metrics.jsonl holds them."""
    values: tuple[float, ...] = ()
    """One number for each goal where it finished; the first goal's last value where it was stopped."""
    seconds: float | None = None
    """Wall time, where it is known."""
    reason: str = ""
    """Why it failed, or which scheduler stopped it."""
    record: RunRecord | None = None

    @property
    def label(self) -> str:
        return self.name.removesuffix(f",seed={self.seed}")


@dataclass(frozen=True)
class Point:
    """One combination of settings, with its trials (one for each seed that has ended or started)."""

    label: str
    values: Mapping[str, Any]
    trials: tuple[Trial, ...]
    seeds: Sequence[int]
    """All seeds that it is to be run with."""

    @cached_property
    def state(self) -> State:
        """Failed or stopped if one of its trials is, finished if those of all seeds are."""
        states = {trial.state for trial in self.trials}
        whole = states == {"finished"} and {trial.seed for trial in self.trials} >= set(self.seeds)
        ends: tuple[State, ...] = ("failed", "stopped")
        return next((end for end in ends if end in states), "finished" if whole else "under way")

    def of_state(self, state: State) -> list[Trial]:
        return [trial for trial in self.trials if trial.state == state]

    def summary(self, goal: int = 0) -> Summary | None:
        """Mean and standard deviation of a goal over the seeds that have a value."""
        values = [trial.values[goal] for trial in self.trials if len(trial.values) > goal]
        return summarise(values) if values else None

    def mean(self, goal: int = 0) -> float:
        """Mean of a goal over the seeds that have a value; NaN without any."""
        summary = self.summary(goal)
        return summary.mean if summary else math.nan

    @property
    def means(self) -> tuple[float, ...]:
        """Each goal's mean over the finished trials; empty without any."""
        columns = zip(*(trial.values for trial in self.of_state("finished")), strict=True)
        return tuple(fmean(column) for column in columns)

    @property
    def records(self) -> list[RunRecord]:
        """Records of its finished trials."""
        return [trial.record for trial in self.trials if trial.record]


@dataclass(frozen=True)
class Sweep:
    """A sweep as its folder describes it."""

    folder: Path
    plan: Mapping[str, Any]
    axes: tuple[Axis, ...]
    goals: tuple[Goal, ...]
    seeds: tuple[int, ...]
    points: tuple[Point, ...]
    failures: Mapping[str, str]
    """Reason of each failed trial, by name; some of them have no folder."""
    held: bool
    """Whether a process works in the folder."""
    prerequisites: tuple[RunRecord, ...] = ()
    """Runs that several trials share: fine-tuned teachers, students to start from."""

    @property
    def space(self) -> dict[str, Any]:
        """The search space as sweep.json holds it."""
        return dict(self.plan["space"])

    @property
    def task(self) -> Task:
        return task_of(self.plan.get("settings") or {})

    @property
    def resources(self) -> dict[str, float]:
        """CPUs and GPUs that a trial occupies; one CPU where no trial has started."""
        return {"cpus": 1.0, "gpus": 0.0} | dict(self.plan.get("place") or {})

    @property
    def planned_points(self) -> int:
        """How many points the sweep was started with."""
        return int(self.plan["trials"]) // max(1, len(self.seeds))

    @cached_property
    def trials(self) -> tuple[Trial, ...]:
        """Every trial that has started."""
        return tuple(trial for point in self.points for trial in point.trials)

    @property
    def records(self) -> list[RunRecord]:
        """Records of the finished trials, each run once."""
        return distinct([trial.record for trial in self.trials if trial.record])

    def of(self, *states: State) -> list[Point]:
        return [point for point in self.points if point.state in states]

    def varied(self, points: Sequence[Point]) -> list[Axis]:
        """The axes that have two values among the points."""
        return [axis for axis in self.axes if len({repr(p.values.get(axis.name)) for p in points}) > 1]

    @property
    def failed_rows(self) -> list[Mapping[str, Any]]:
        """The axis values of every failed trial; read from its name where it has no folder."""
        started = {trial.name: trial.point for trial in self.trials}
        return [started.get(name) or self._values_in(name) for name in self.failures]

    def _values_in(self, name: str) -> dict[str, Any]:
        words = dict(part.partition("=")[::2] for part in name.split(",") if "=" in part)
        values: dict[str, Any] = {}
        for axis in self.axes:
            word = words.get(axis.name, words.get(axis.name.rsplit(".", 1)[-1]))
            if word is not None:
                values[axis.name] = {str(value): value for value in axis.values or ()}.get(word, word)
        return values

    @cached_property
    def finished(self) -> list[Point]:
        """Points that every seed finished, the best by the first goal first, as `best_point` sees it."""
        sign = self.goals[0].sign
        return sorted(self.of("finished"), key=lambda point: (-sign * point.mean(), point.label))

    @cached_property
    def front(self) -> list[Point]:
        """Finished points that no other equals in every goal and beats in one, in their order."""
        means = [[goal.sign * point.mean(i) for i, goal in enumerate(self.goals)] for point in self.finished]
        return [self.finished[i] for i in undominated(means)]


def undominated(scores: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the scores that no other equals everywhere and beats somewhere; larger is better."""
    table = np.array(scores)
    beaten = (((table >= one).all(1) & (table > one).any(1)).any() for one in table)
    return [index for index, is_beaten in enumerate(beaten) if not is_beaten]


def best_point(points: Sequence[Point], goal: Goal) -> Point | None:
    """The best of the points that all seeds finished, else of those with any value; ties: first by label."""
    with_values = [point for point in points if point.means]
    whole = [point for point in with_values if point.state == "finished"]
    return min(whole or with_values, key=lambda p: (-goal.sign * p.means[0], p.label), default=None)


def point_label(point: Mapping[str, Any], *, seed: int | None = None) -> str:
    """Folder name of a point (and seed): `beta=0.1,layers=2,seed=0`; no two points share one."""
    tails = [name.rsplit(".", 1)[-1] for name in point]
    short = {name: tail if tails.count(tail) == 1 else name for name, tail in zip(point, tails, strict=True)}
    exact, rounded = (
        ",".join(f"{short[name]}={_value_text(value, digits)}" for name, value in point.items()) or "only"
        for digits in (None, 6)
    )
    safe = re.sub(r"[^A-Za-z0-9_.,=+-]", "_", rounded)[:150]
    if safe != exact:
        safe += "~" + hashlib.sha256(exact.encode()).hexdigest()[:6]
    return safe if seed is None else f"{safe},seed={seed}"


def _value_text(value: Any, digits: int | None) -> str:
    if isinstance(value, float):
        return f"{value:.{digits}g}" if digits else repr(value).removesuffix(".0")
    return str(value)


def curve_of(entries: Sequence[Mapping[str, Any]], metric: str) -> list[tuple[float, float]]:
    """(epoch, value) of each entry of metrics.jsonl that has `metric` as a finite number."""
    pairs = [(entry.get("epoch"), number_at(entry, metric)) for entry in entries]
    return [(float(x), y) for x, y in pairs if isinstance(x, int | float) and y is not None]


def trial_curve(folder: Path, metric: str) -> list[tuple[float, float]]:
    """The values of `metric` that the trial in a folder has reported so far."""
    return curve_of(read_entries(folder / METRICS), metric)


def read_curves(sweep: Path, metric: str) -> dict[str, list[tuple[float, float]]]:
    """The curve of every trial in a sweep's folder that has reported, by name."""
    folders = sorted((sweep / TRIALS).glob("*"))
    return {folder.name: curve for folder in folders if (curve := trial_curve(folder, metric))}


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else "".join(names)


def resume_command(file: str, location: str | Path) -> str:
    """The command that continues a sweep; its folder holds the other arguments."""
    return shlex.join(["newsbert-ray", "sweep", file, "--out", str(location), "--resume"])


def is_sweep(folder: str | Path) -> bool:
    return (Path(folder) / SWEEP).is_file()


def read_sweep(folder: str | Path) -> Sweep:
    """The sweep in `folder`, finished or not. Raises RecordError where sweep.json, or the record of a trial
    that has not failed, is damaged."""
    folder = Path(folder)
    path, known = folder / SWEEP, Axis.model_fields
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        space = plan["space"]
        values = [{k: v for k, v in axis.items() if k in known and v is not None} for axis in space["axes"]]
        axes = tuple(Axis(**axis) for axis in values)
        # Not validated: a sweep of another version may have a metric that this one does not know.
        goals = tuple(Goal.model_construct(metric=g["metric"], mode=g["mode"]) for g in space["goals"])
        seeds = tuple(int(seed) for seed in space["seeds"])
        failures = plan["failures"] if "failures" in plan else _failure_notes(folder / FAILURES)
        failures = {name: str(reason) for name, reason in failures.items()}
        int(plan["trials"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(
            f"{path}: damaged, or written by another version ({type(error).__name__}: {error}); "
            f"its finished trials alone: newsbert-ray report {folder / TRIALS}"
        ) from error
    folders = [path for path in sorted((folder / TRIALS).glob("*")) if path.is_dir()]
    trials = [trial for path in folders if (trial := _read_trial(path, axes, goals, failures))]
    groups = grouped(trials, lambda trial: trial.label)
    points = tuple(Point(label, group[0].point, tuple(group), seeds) for label, group in groups.items())
    prerequisites = []
    for path in sorted((folder / TEACHERS).glob(f"*/{RECORD}")):
        with suppress(RecordError):  # the trial that needs a damaged one reports it
            prerequisites.append(read_record(path.parent))
    held = is_locked(folder / ".lock")
    return Sweep(folder, plan, axes, goals, seeds, points, failures, held, tuple(prerequisites))


def _failure_notes(folder: Path) -> dict[str, str]:
    """The last line of each failure's stack trace, by trial."""
    reasons = {}
    for path in sorted(folder.glob("*.txt")):
        lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line]
        reason = re.sub(r"^[\w.]+\.(\w+:)", r"\1", lines[-1]) if lines else "unknown reason"
        reasons[path.name.removesuffix(".txt")] = reason
    return reasons


def _read_trial(
    folder: Path, axes: Sequence[Axis], goals: Sequence[Goal], failures: Mapping[str, str]
) -> Trial | None:
    """The trial in a folder; None where nothing has started in it."""
    failed = folder.name in failures
    record = read_record(folder) if (folder / RECORD).exists() and not failed else None
    settings = record.settings if record else {}
    if not record:
        with suppress(OSError, ValueError, KeyError, TypeError):
            settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))["settings"]
    if not isinstance(settings, dict) or not settings:
        return None
    flat = flatten(settings)
    point: dict[str, Any] = {}
    for axis in axes:
        if axis.is_active(point):
            point[axis.name] = flat.get(axis.name)
    entries = record.curve if record else read_entries(folder / METRICS)
    evaluations = tuple(entry for entry in entries if "validation" in entry)
    trial = Trial(
        name=folder.name,
        point=point,
        seed=int(settings.get("seed", 0)),
        state="failed" if failed else "under way",
        settings=settings,
        epochs=int(settings.get("epochs", 0)),
        epoch=max((float(entry.get("epoch", 0.0)) for entry in evaluations), default=0.0),
        entries=evaluations,
        reason=failures.get(folder.name, ""),
        record=record,
    )
    if record:
        values = tuple(v for goal in goals if (v := number(record, goal.metric)) is not None)
        if len(values) < len(goals):
            return replace(trial, state="failed")
        return replace(trial, state="finished", values=values, seconds=number(record, "seconds"))
    stop = None if failed else read_stop(folder)
    return replace(trial, state="stopped", values=(stop.value,), seconds=stop.seconds) if stop else trial
