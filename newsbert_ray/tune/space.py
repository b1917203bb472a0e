"""What a sweep varies, how, with which seeds, judged by what; checks what can be checked before it starts.
Knows no file format, no Ray and no Optuna."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import Field, field_validator

from newsbert_ray.config import (
    Settings,
    SettingsError,
    TrainSettings,
    build_settings,
    dotted_names,
    merge,
    nearest,
)
from newsbert_ray.tune.depths import check_depth, divisors, teacher_depth
from newsbert_ray.tune.rules import MAX_POINTS, check_search, conditions

CURVES = tuple(
    f"validation.{model}.{metric}" for model in ("student", "teacher") for metric in ("accuracy", "macro_f1")
)
"""What is known at each evaluation, so that a trial can be stopped early by it."""

METRICS = (
    *CURVES,
    *(name.replace("validation", "test") for name in CURVES),
    "speed.student_titles_per_second",
    "speed.times_teacher",
)
"""What a point may be judged by: names inside a record's `metrics`. `speed` is measured by a trial on the
titles of the test split: titles/s of the student, and how many times the teacher's that is."""

OWN_NAMES = {"seed": "use `seeds: [...]`", "out": "each trial's folder lies in the sweep's --out"}


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

    metric: str = "validation.student.accuracy"
    """One of METRICS."""
    mode: Literal["max", "min"] = "max"
    """Whether more is better."""

    @field_validator("metric")
    @classmethod
    def _metric_is_reported(cls, metric: str) -> str:
        if metric not in METRICS:
            near = nearest(metric, list(METRICS))
            hint = f", did you mean '{near}'?" if near else ""
            raise ValueError(f"no trial reports it{hint} (known: {', '.join(METRICS)})")
        return metric


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
    goals: tuple[Goal, ...] = Field((Goal(),), min_length=1)
    """What a point is judged by, the mean over its seeds; several make a Pareto front."""

    @field_validator("seeds")
    @classmethod
    def _seeds_are_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if any(not 0 <= seed < 2**31 for seed in seeds) or len(set(seeds)) < len(seeds):
            raise ValueError("each once, from 0 to 2147483647")
        return seeds

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
        """Every combination of the axes' values, the last axis fastest; each axis only where it varies."""
        points = iter([Point()])
        for axis in self.axes:
            points = _spread(points, axis)
        return points


def _spread(points: Iterator[Point], axis: Axis) -> Iterator[Point]:
    for point in points:
        if axis.is_active(point):
            for value in axis.values or ():
                yield {**point, axis.name: value}
        else:
            yield point


def steer(space: SearchSpace, control: Mapping[str, Any]) -> SearchSpace:
    """`space` with other `search`, `stopping`, `limits`, `prices`, `gpus`, `keep_students`, nested or dotted.

    Raises:
        SettingsError: no such part, or a value that it cannot take.
    """
    now = space.model_dump(include={"search", "stopping", "limits", "prices"})
    changes = merge(control)
    if changes.get("search", {}).get("sampler") == "grid":
        # The file's number of trials and starting points are for its own sampler.
        now["search"]["trials"] = None
        changes["start"] = ()
    return build_settings(SearchSpace, {**dict(space), **merge(now, changes)}, where="command line")


def vary(space: SearchSpace, changes: Mapping[str, Sequence[Any]]) -> SearchSpace:
    """`space` with other values for some axes, with new axes, or with other `seeds`.

    Raises:
        SettingsError: no such setting, or a value that it cannot take.
    """
    axes = {axis.name: axis for axis in space.axes}
    seeds: Sequence[Any] = space.seeds
    for name, values in changes.items():
        if not values or isinstance(values, str):
            raise SettingsError(f"--vary {name}: give at least one value, such as {name}=1,2")
        if name == "seeds":
            seeds = values
            continue
        require_name(name, partial(_refuse, "--vary"))
        distinct = distinct_values(values, partial(_refuse, f"--vary {name}"))
        axes[name] = Axis(name=name, values=distinct, when=axes[name].when if name in axes else {})
    changed = {**dict(space), "axes": tuple(axes.values()), "seeds": tuple(seeds)}
    return build_settings(SearchSpace, changed, where="--vary")


def fix(space: SearchSpace, overrides: Mapping[str, Any]) -> tuple[SearchSpace, list[str]]:
    """`space` without the axes that `overrides` fixes, and a line to show for each change.

    An axis that varies only with certain values of a fixed one varies always, or not at all. Starting points
    keep what still varies.

    Raises:
        SettingsError: an override that belongs to the sweep itself.
    """
    flat = flatten(merge(overrides))
    if "out" in flat:
        raise SettingsError(f"out = {flat['out']!r}: {OWN_NAMES['out']}")
    axes: list[Axis] = []
    said = []
    for axis in space.axes:
        if axis.name in flat:
            said.append(f"{axis.name} is {flat[axis.name]!r}, not varied")
            continue
        when = {name: values for name, values in axis.when.items() if name not in flat}
        left = axis.model_copy(update={"when": when})
        met = all(flat[name] in axis.when[name] for name in axis.when if name in flat)
        if met and when.keys() <= {a.name for a in axes} and conditions((*axes, left), left) is not None:
            axes.append(left)
        else:
            said.append(f"{axis.name} is not varied: it would be only where {_stated(axis.when)}")
    changed: dict[str, Any] = {"axes": tuple(axes), "start": _still_varied(space.start, axes, said)}
    if "seed" in flat:
        changed["seeds"] = (flat["seed"],)
        if space.seeds != changed["seeds"]:
            said.append(f"seed is {flat['seed']!r} in every trial")
    return build_settings(SearchSpace, {**dict(space), **changed}, where="command line"), said


def _still_varied(start: Sequence[Point], axes: Sequence[Axis], said: list[str]) -> tuple[Point, ...]:
    """Starting points as far as they still vary, each once; one with a value that is none any more is left
    out."""
    known = {axis.name: axis for axis in axes}
    points: list[Point] = []
    for point in start:
        left = {name: value for name, value in point.items() if name in known}
        try:
            left = {name: known[name].find(value) for name, value in left.items()}
        except ValueError as error:
            said.append(f"starting point {point_label(point)} is left out: {error}")
            continue
        if left and left not in points:
            points.append(left)
    return tuple(points)


def _stated(when: Mapping[str, Sequence[Any]]) -> str:
    return " and ".join(f"{name} is {' or '.join(map(str, values))}" for name, values in when.items())


def resolve_depths(space: SearchSpace, overrides: Mapping[str, Any]) -> SearchSpace:
    """`space` with the values of `choice: divisors`: the depths that divide the teacher's, below its own.

    Raises:
        SettingsError: the teacher's depth is not known, or varies; a starting point or a `when` names a depth
            that does not divide it.
    """
    axis = next((axis for axis in space.axes if axis.divisors and axis.values is None), None)
    if axis is None:
        return space
    for other in space.axes:
        if other.name in ("teacher", "model.teacher_layers", "scratch.layers"):
            raise SettingsError(
                f"{axis.name}: the divisors of what, where {other.name} varies? List the depths "
                f"(`choice: [1, 2]`, --vary {axis.name}=1,2), or fix --{other.name}"
            )
    settings = build_settings(
        TrainSettings, merge({"data": "-", "out": "-"}, space.settings, overrides), where=space.file
    )
    depth = teacher_depth(settings, fetch=True)
    assert depth is not None
    known = axis.model_copy(update={"values": divisors(depth)[:-1] or (1,)})
    whose = f"the {depth} teacher layers' divisors are {', '.join(map(str, known.values or ()))}"
    axes = tuple(known if other is axis else other for other in space.axes)
    for other in axes:
        if conditions(axes, other) is None:
            raise SettingsError(
                f"{other.name} would vary only where {_stated(other.when)}, and {whose}; fix --{other.name}"
            )
    for point in space.start:
        if axis.name in point and point[axis.name] not in (known.values or ()):
            raise SettingsError(
                f"start: {axis.name} = {point[axis.name]}, and {whose}; take one of them, or leave it out"
            )
    return build_settings(SearchSpace, {**dict(space), "axes": axes}, where=space.file)


_TRIAL: Mapping[str, Any] = {"threads": 1, "checkpoint": {"keep": 1, "keep_finished": False}}
"""What differs in a trial from a run of its own, unless the space says otherwise: one core, bounded disk."""


def trial_settings(
    space: SearchSpace, point: Point, *, seed: int, out: Path, overrides: Mapping[str, Any]
) -> TrainSettings:
    """Settings of one trial: the space's own, then `overrides`, the point, the seed and the trial's folder.

    Raises:
        SettingsError: a combination that cannot be.
    """
    # Relative folders would mean something else to a worker that Ray starts elsewhere.
    own = {"seed": seed, "out": str(out.absolute())}
    values = absolute_folders(merge(_TRIAL, space.settings, overrides, point, own))
    settings = build_settings(TrainSettings, values, where=f"{space.file}, point {point_label(point)}")
    if settings.workers > 1:
        raise SettingsError(
            f"workers = {settings.workers}: a sweep's trials use one worker for now; leave --workers out, "
            "or run the best point alone with `newsbert-ray train`"
        )
    check_depth(settings)
    return settings


def absolute_folders(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `data` and `teacher` as absolute paths where they are folders here."""
    result = dict(values)
    for name in ("data", "teacher"):
        if isinstance(result.get(name), str) and Path(result[name]).is_dir():
            result[name] = str(Path(result[name]).absolute())
    return result


def check_space(space: SearchSpace, *, out: Path, overrides: Mapping[str, Any]) -> TrainSettings:
    """Build the settings of every grid point, or of each axis's values in turn; returns the first trial's.

    Raises:
        SettingsError: the first combination that cannot be, or nothing to run.
    """
    check_search(space)
    points = list(space.grid() if space.search.sampler == "grid" else _samples(space))
    built = [trial_settings(space, p, seed=space.seeds[0], out=out, overrides=overrides) for p in points]
    return built[0]


def _samples(space: SearchSpace) -> Iterator[Point]:
    """The first point, and for each axis a point with each of its values in turn; all else at its first."""
    for axis in (None, *space.axes):
        wanted = dict(conditions(space.axes, axis) or {}) if axis else {}
        for value in axis.samples() if axis else (None,):
            point = Point()
            for other in space.axes:
                if other.is_active(point):
                    point[other.name] = value if other is axis else wanted.get(other.name, other.samples())[0]
            yield point


def point_label(point: Point, *, seed: int | None = None) -> str:
    """A folder name for a point (and seed): `beta=0.1,layers=2,seed=0`; distinct for distinct points."""
    tails = [name.rsplit(".", 1)[-1] for name in point]
    short = {name: tail if tails.count(tail) == 1 else name for name, tail in zip(point, tails, strict=True)}
    exact = ",".join(f"{short[name]}={_shown(value)}" for name, value in point.items()) or "only"
    rounded = ",".join(f"{short[name]}={_shown(value, digits=6)}" for name, value in point.items()) or "only"
    safe = re.sub(r"[^A-Za-z0-9_.,=+-]", "_", rounded)[:150]
    if safe != exact:
        safe += "~" + hashlib.sha256(exact.encode()).hexdigest()[:6]
    return safe if seed is None else f"{safe},seed={seed}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> dotted names."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result.update(flatten(value, f"{prefix}{key}."))
        else:
            result[f"{prefix}{key}"] = value
    return result


def _shown(value: Any, digits: int | None = None) -> str:
    if isinstance(value, float):
        return f"{value:.{digits}g}" if digits else repr(value).removesuffix(".0")
    return str(value)


def distinct_values(values: Sequence[Any], fail: Callable[[str], NoReturn]) -> tuple[Any, ...]:
    """`values`, each a single one and each there once; else `fail` is called with the reason."""
    for index, value in enumerate(values):
        if not isinstance(value, str | int | float | bool | None):
            fail(f"{value!r} is no single value (a number, a word, true, false or null)")
        if value in values[:index]:
            fail(f"{value!r} stands there twice")
    return tuple(values)


def require_name(name: str, fail: Callable[[str], NoReturn]) -> None:
    """Call `fail` with the reason where `name` is no setting that can vary."""
    if name in OWN_NAMES:
        fail(f"'{name}' is not varied like a setting: {OWN_NAMES[name]}")
    names = sorted(dotted_names(TrainSettings))
    if name not in names:
        near = nearest(name, names)
        fail(f"unknown setting '{name}'" + (f", did you mean '{near}'?" if near else ""))


def _refuse(where: str, message: str) -> NoReturn:
    raise SettingsError(f"{where}: {message}")
