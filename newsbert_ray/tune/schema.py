"""A search space as it is stated: axes, sampler, early stopping, limits, goals; and the points of its grid.
Knows no file format, no training setting's own range, no Ray and no Optuna."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from newsbert_ray.config import Settings, nearest
from newsbert_ray.tasks import TASKS, Task

MAX_POINTS = 100_000
"""A grid with more points is taken for a slip."""


def curves_of(*tasks: Task) -> tuple[str, ...]:
    """What trials of these tasks know at each evaluation, so that one can be stopped early by it."""
    names = dict.fromkeys(metric.name for task in tasks for metric in task.metrics)
    return tuple(f"validation.{model}.{name}" for model in ("student", "teacher") for name in names)


def metrics_of(*tasks: Task) -> tuple[str, ...]:
    """What a point of these tasks may be judged by: names inside a record's `metrics`. `speed` is measured by
    a trial on the texts of the test split: titles/s of the student, and how many times the teacher's that
    is."""
    curves = curves_of(*tasks)
    test = (name.replace("validation", "test") for name in curves)
    return (*curves, *test, "speed.student_titles_per_second", "speed.times_teacher")


CURVES = curves_of(*TASKS.values())
METRICS = metrics_of(*TASKS.values())

OWN_NAMES = {"seed": "use `seeds: [...]`", "out": "each trial's folder lies in the sweep's --out"}
"""Settings that belong to the sweep itself."""
NOT_VARIED = {
    **OWN_NAMES,
    "task": "its metrics do not compare with another's; use `settings: {task: ...}`, or --task",
}


Point = dict[str, Any]
"""The varied settings of one point, by dotted name; an axis that its `when` rules out is not there."""


class Axis(Settings):
    """One varied setting: either `values`, or a range from `low` to `high`, both included."""

    name: str
    """Dotted name of a training setting."""
    values: tuple[Any, ...] | None = None
    """What it takes, in order."""
    low: float | None = None
    """Least value of a range."""
    high: float | None = None
    """Greatest value of a range."""
    integer: bool = False
    """Whole numbers only."""
    log: bool = False
    """Drawn evenly over the logarithm."""
    step: float | None = None
    """Distance between neighbours of a range."""
    divisors: bool = False
    """The depths that divide the teacher's layers, below the teacher's own; `values` once that is known."""
    when: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Varies only where each of these axes, which stand before it, has one of these values."""

    def is_active(self, point: Point) -> bool:
        """Whether it varies at `point`, in which the axes before it have their values."""
        return all(name in point and point[name] in values for name, values in self.when.items())

    def samples(self) -> tuple[Any, ...]:
        """Values that stand for all: every one, or the ends of a range (each whole number of a short one)."""
        if self.values is not None:
            return self.values
        if self.divisors:
            return (1,)
        assert self.low is not None
        assert self.high is not None
        if not self.integer:
            return (self.low, self.high)
        every = range(int(self.low), int(self.high) + 1, int(self.step or 1))
        return tuple(every) if len(every) <= 100 else (every[0], every[-1])

    def find(self, value: Any) -> Any:
        """`value` as this axis takes it (1 as 1.0 in a range of floats).

        Raises:
            ValueError: it lies outside; the text says what was expected.
        """
        if self.values is not None:
            for known in self.values:
                if known == value and isinstance(known, bool) == isinstance(value, bool):
                    return known
            raise ValueError(f"expected one of {', '.join(map(str, self.values))}")
        low, high = (1.0, math.inf) if self.low is None or self.high is None else (self.low, self.high)
        whole = self.integer or self.divisors
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or (whole and value != round(value)):
            raise ValueError(f"expected a {'whole ' if whole else ''}number")
        if not low <= value <= high:
            raise ValueError(f"expected {low:g} to {high:g}")
        steps = (value - low) / self.step if self.step else 0.0
        if abs(steps - round(steps)) > 1e-8:
            raise ValueError(f"expected {low:g} plus a whole number of steps of {self.step:g}")
        return int(value) if whole else float(value)


class Search(Settings):
    """How points are chosen."""

    sampler: Literal["tpe", "nsga2", "gp", "random", "grid"] = "tpe"
    """Optuna's multivariate tree-structured Parzen estimator, NSGA-II, Gaussian process, chance, or every
    combination; in a file tpe where `trials` is given, grid otherwise."""
    trials: int | None = Field(None, ge=1)
    """Points to try; a grid has its own number."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the sampler."""
    storage: str | None = None
    """Optuna's storage as a URL (`sqlite:///study.db`); a journal file in the sweep's folder by default."""


class Stopping(Settings):
    """Which trials end before their last epoch, judged at each epoch's end."""

    scheduler: Literal["asha", "median", "none"] | None = None
    """Asynchronous successive halving (Li et al. 2020), the median rule (Golovin et al. 2017), or none;
    asha by default, none for a grid and for several goals."""
    grace: int = Field(1, ge=1)
    """Epochs that every trial may have."""
    factor: int = Field(3, ge=2)
    """asha: one in so many goes on from each rung (grace, grace x factor, ...)."""


class Limits(Settings):
    """When the sweep ends before its last point; no trial starts that would, at the mean of those before, end
    past a limit."""

    hours: float | None = Field(None, gt=0.0)
    """Wall time from the sweep's start, or from that of its resume."""
    cost: float | None = Field(None, gt=0.0)
    """Money for all trials, by `prices`."""
    target: float | None = None
    """Ends once a point's first goal is as good as this."""


class Prices(Settings):
    """What an hour costs, in one currency."""

    cpu_hour: float = Field(0.0, ge=0.0)
    """One CPU for an hour."""
    gpu_hour: float = Field(0.0, ge=0.0)
    """One GPU for an hour."""


class Goal(Settings):
    """A number to make large or small."""

    metric: str = ""
    """One of METRICS, of the space's own task; where none is given the task's first one, of the student on
    validation."""
    mode: Literal["max", "min"] = "max"
    """Whether more is better."""

    @field_validator("metric")
    @classmethod
    def _metric_is_reported(cls, metric: str) -> str:
        if metric and metric not in METRICS:
            near = nearest(metric, list(METRICS))
            hint = f", did you mean '{near}'?" if near else ""
            raise ValueError(f"no trial reports it{hint} (known: {', '.join(METRICS)})")
        return metric


def named_task(settings: Mapping[str, Any]) -> Task:
    """The task that training settings name; a name that is none is left to them to refuse."""
    return TASKS.get(settings.get("task", "topics"), TASKS["topics"])


class SearchSpace(Settings):
    """A search space as read: fixed settings, axes, seeds, and what a point is judged by."""

    file: str
    """Where it was read from."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=80)
    """Short name; Optuna's study is called so."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Training settings that all trials share, nested or dotted."""
    axes: tuple[Axis, ...] = ()
    """What varies; the last axis fastest."""
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    """Each point is run with each seed and judged by the mean."""
    skip: tuple[dict[str, tuple[Any, ...]], ...] = ()
    """Combinations that a grid leaves out: of each, the values of some axes."""
    start: tuple[Point, ...] = ()
    """Points to try first, such as the paper's values; not for a grid."""
    search: Search = Search()
    """How points are chosen."""
    stopping: Stopping = Stopping()
    """Which trials end early."""
    limits: Limits = Limits()
    """When the sweep ends before its last point."""
    prices: Prices = Prices()
    """What an hour costs."""
    gpus: float | None = Field(None, gt=0.0)
    """GPUs of each worker of a trial, such as 0.25; where there are GPUs, an equal share by default."""
    keep_students: int = Field(10, ge=1)
    """Students (the folders to use a model from) that are kept: those of the best trials."""
    goals: tuple[Goal, ...] = Field((Goal(),), min_length=1, validate_default=True)
    """What a point is judged by, the mean over its seeds; several make a Pareto front."""

    @field_validator("goals")
    @classmethod
    def _goals_have_a_metric(cls, goals: tuple[Goal, ...], info: ValidationInfo) -> tuple[Goal, ...]:
        """A metric that was not given follows the task, also when that changes later."""
        first = f"validation.student.{named_task(info.data.get('settings', {})).primary.name}"
        return tuple(
            goal
            if "metric" in goal.model_fields_set
            else Goal.model_construct({"mode"}, metric=first, mode=goal.mode)
            for goal in goals
        )

    @field_validator("seeds")
    @classmethod
    def _seeds_are_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if any(not 0 <= seed < 2**31 for seed in seeds) or len(set(seeds)) < len(seeds):
            raise ValueError("each once, from 0 to 2147483647")
        return seeds

    @property
    def task(self) -> Task:
        """What its trials learn."""
        return named_task(self.settings)

    @property
    def metric(self) -> str:
        """The first goal's metric."""
        return self.goals[0].metric

    @property
    def mode(self) -> Literal["max", "min"]:
        """Whether more of the first goal's metric is better."""
        return self.goals[0].mode

    @property
    def scheduler(self) -> Literal["asha", "median", "none"]:
        """What ends trials early."""
        if self.stopping.scheduler is not None:
            return self.stopping.scheduler
        early = self.search.sampler != "grid" and len(self.goals) == 1 and self.metric in CURVES
        return "asha" if early else "none"

    @property
    def points(self) -> int:
        """How many points the sweep will try; of a grid that is taken for a slip, one more than may be."""
        if self.search.sampler != "grid":
            return self.search.trials or 0
        return sum(1 for _ in itertools.islice(self.grid(), MAX_POINTS + 1))

    def grid(self) -> Iterator[Point]:
        """Every combination of the axes' values but those to skip, the last axis fastest; each axis only
        where it varies."""
        points = iter([Point()])
        for axis in self.axes:
            points = _spread(points, axis)
        return (point for point in points if not any(_fits(point, skipped) for skipped in self.skip))


def _fits(point: Point, skipped: Mapping[str, tuple[Any, ...]]) -> bool:
    return all(name in point and point[name] in values for name, values in skipped.items())


def _spread(points: Iterator[Point], axis: Axis) -> Iterator[Point]:
    for point in points:
        if axis.is_active(point):
            for value in axis.values or ():
                yield {**point, axis.name: value}
        else:
            yield point
