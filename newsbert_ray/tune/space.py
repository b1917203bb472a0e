"""A search space as it is stated: axes, sampler, early stopping, limits, goals; and the points of its grid.
Knows no file format, no training setting's own range, no Ray and no Optuna."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import Field, ValidationInfo, field_validator

from newsbert_ray.config import (
    SCRATCH,
    Settings,
    SettingsError,
    TrainSettings,
    build_settings,
    dotted_names,
    merge,
    nearest,
)
from newsbert_ray.methods import TASKS, Task
from newsbert_ray.storage import inputs
from newsbert_ray.storage import workdir as storage
from newsbert_ray.storage.workdir import absolute
from newsbert_ray.tune.storage import shown_storage

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


Fault = tuple[tuple[str, ...], str]
"""Where in a search space's file, by its keys, and what is wrong there with its cure."""


def check_search(space: SearchSpace) -> None:
    """Raise SettingsError for the first parts of `space` that do not go together."""
    for _, message in faults(space):
        raise SettingsError(message)


def faults(space: SearchSpace) -> Iterator[Fault]:
    """What does not go together, the plainest first."""
    yield from _conditional(space)
    yield from _sampling(space)
    yield from _judging(space)
    yield from _ending(space)


def _conditional(space: SearchSpace) -> Iterator[Fault]:
    for axis in space.axes:
        if conditions(space.axes, axis) is None:
            yield (
                ("space", axis.name, "when"),
                f"{axis.name} never varies: what its `when` asks for never comes together; leave it out",
            )


def conditions(axes: tuple[Axis, ...], axis: Axis) -> dict[str, tuple[object, ...]] | None:
    """The values that the axes before it must have for `axis` to vary; None where they never all do."""
    known = {other.name: other for other in axes}
    wanted: dict[str, tuple[object, ...]] = {}
    due = [axis]
    while due:
        for name, values in due.pop().when.items():
            parent = known[name]
            left = [value for value in values if parent.values is None or value in parent.values]
            wanted[name] = tuple(value for value in wanted.get(name, left) if value in left)
            if not wanted[name]:
                return None
            due.append(parent)
    return wanted


def _sampling(space: SearchSpace) -> Iterator[Fault]:
    search, at = space.search, ("search", "sampler")
    if search.sampler == "grid":
        for axis in space.axes:
            if axis.values is None and not axis.divisors:
                yield (
                    ("space", axis.name),
                    f"the grid sampler needs values: give {axis.name} a `grid: [...]`, "
                    "or take `sampler: tpe` with `trials:`",
                )
                return
        if search.trials is not None:
            points = f"its {space.points} points" if space.points else "its points"
            why = f"trials = {search.trials}: a grid tries each of {points} once"
            yield ("search", "trials"), f"{why}; leave trials out, or take another sampler, such as tpe"
        if space.points > MAX_POINTS:
            yield ("space",), f"the grid has more than {MAX_POINTS:,} points; thin it out"
        if space.start:
            yield (
                ("start",),
                "a grid tries all its points in order; leave `start` out, or take another sampler",
            )
    elif space.skip:
        yield ("skip",), "only a grid leaves combinations out; take `sampler: grid`, or leave `skip` out"
    elif search.trials is None:
        yield at, f"the {search.sampler} sampler needs to know when to end: give `trials: N`"
    conditional = [axis.name for axis in space.axes if axis.when]
    if search.sampler == "gp" and conditional:
        yield (
            at,
            f"the gp sampler would draw {conditional[0]} by chance, as it has a `when`; take `sampler: tpe`",
        )
    if search.storage is not None and not re.match(r"[a-z][a-z0-9_+]*://", search.storage):
        shown = shown_storage(search.storage)
        yield (
            ("search", "storage"),
            f"storage = {shown!r}: expected a URL such as sqlite:///study.db; leave it out for a journal "
            "file in the sweep's folder",
        )


def _judging(space: SearchSpace) -> Iterator[Fault]:
    metrics = [goal.metric for goal in space.goals]
    known = metrics_of(space.task)
    for index, metric in enumerate(metrics):
        if metric not in known:
            near = f"{metric.rpartition('.')[0]}.{space.task.primary.name}"
            yield (
                ("goals", str(index), "metric"),
                f"metric = {metric!r}: no trial of task {space.settings.get('task', 'topics')} reports it, "
                f"did you mean '{near}'? (known: {', '.join(known)})",
            )
        if metric in metrics[:index]:
            yield ("goals", str(index), "metric"), f"goals: {metric} stands there twice; leave one out"
    scheduler, at = space.stopping.scheduler, ("stopping", "scheduler")
    if scheduler in (None, "none"):
        return
    if len(metrics) > 1:
        yield (
            at,
            f"scheduler = {scheduler!r}: several goals run without early stopping, since no one number says "
            "which trial is worse; leave it out, or give one goal",
        )
    elif space.metric not in CURVES:
        early = ", ".join(curves_of(space.task))
        yield (
            at,
            f"scheduler = {scheduler!r}: {space.metric} is not known before a trial's end, so none can be "
            f"ended early by it; take `scheduler: none`, or judge by one of {early}",
        )


def _ending(space: SearchSpace) -> Iterator[Fault]:
    limits, prices = space.limits, space.prices
    if space.gpus is not None and space.gpus > 1 and space.gpus != int(space.gpus):
        yield (
            ("gpus",),
            f"gpus = {space.gpus:g}: a worker has a share of one GPU, or whole ones; give 0.5 or 2",
        )
    if limits.cost is not None and not (prices.cpu_hour or prices.gpu_hour):
        yield (
            ("limits", "cost"),
            f"cost = {limits.cost:g}: without prices nothing costs anything; give "
            "`prices: {cpu_hour: ..., gpu_hour: ...}`",
        )
    if limits.target is not None and len(space.goals) > 1:
        yield (
            ("limits", "target"),
            f"target = {limits.target:g}: several goals have no one target; leave it out, or give one goal",
        )


def divisors(depth: int) -> tuple[int, ...]:
    """Whole numbers that divide `depth`, itself included: the students that it can teach."""
    return tuple(n for n in range(1, depth + 1) if depth % n == 0)


def check_depth(settings: TrainSettings) -> None:
    """Raise SettingsError where the student's layers do not divide the teacher's, or where one that learns
    alone has more than the encoder, as far as those are known."""
    student = settings.student.layers
    if settings.before.method != "none":
        from newsbert_ray.training.prerequisites import before_settings

        check_depth(before_settings(settings, ""))
        return
    if settings.distill.alone:
        whole = _encoder_depth(settings)
        if whole is not None and student > whole:
            raise SettingsError(f"student.layers {student}: {settings.teacher} has {whole} layers")
        return
    depth = teacher_depth(settings)
    if depth is None or depth % student == 0:
        return
    choices = [str(n) for n in divisors(depth)]
    choice = f"{', '.join(choices[:-1])} or {choices[-1]}" if len(choices) > 1 else choices[0]
    raise SettingsError(
        f"{depth} teacher layers do not divide into {student} student layers; choose {choice}"
    )


def teacher_depth(settings: TrainSettings, *, fetch: bool = False) -> int | None:
    """Layers of the teacher (NK); None where only its configuration at Hugging Face would tell.

    Args:
        fetch: read that configuration, from the local cache or over the network.
    Raises:
        SettingsError: more layers asked than there are; or, with `fetch`, no way to know them.
    """
    asked = settings.model.teacher_layers
    whole = _encoder_depth(settings)
    if whole is None and asked is None and fetch:
        whole = _fetched_depth(settings.teacher)
    if whole is not None and asked is not None and asked > whole:
        raise SettingsError(
            f"model.teacher_layers = {asked}: {settings.teacher} has {whole} layers; "
            f"give --model.teacher_layers {whole} or fewer"
        )
    return whole if asked is None else asked


def _encoder_depth(settings: TrainSettings) -> int | None:
    if settings.teacher == SCRATCH:
        return settings.scratch.layers
    place = settings.teacher
    folder = _fetch(place) if storage.is_url(place) else Path(place)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = [config[key] for key in ("num_hidden_layers", "n_layers", "num_layers") if key in config]
    except (OSError, ValueError, TypeError):
        return None
    return found[0] if found and isinstance(found[0], int) and found[0] > 0 else None


_fetch = lru_cache(maxsize=8)(inputs.fetch)
"""A teacher in a bucket: asked for once, and not again for each point of a grid."""


def _fetched_depth(teacher: str) -> int:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(teacher, trust_remote_code=False)
        return int(config.num_hidden_layers)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise SettingsError(
            f"teacher = {teacher!r}: its depth is not known here ({reason}), and `choice: divisors` needs "
            "it; give --model.teacher_layers N, or list the depths"
        ) from error


__all__ = [
    "Axis",
    "Goal",
    "Limits",
    "Point",
    "Prices",
    "Search",
    "SearchSpace",
    "Stopping",
    "absolute_folders",
    "check_space",
    "distinct_values",
    "fix",
    "flatten",
    "point_label",
    "require_name",
    "resolve_depths",
    "steer",
    "trial_settings",
    "vary",
]


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
    changed: dict[str, Any] = {
        "axes": tuple(axes),
        "start": _still_varied(space.start, axes, said),
        "skip": _still_skipped(space.skip, flat),
    }
    if "task" in flat:
        changed["settings"] = merge(space.settings, {"task": flat["task"]})
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


def _still_skipped(
    skip: Sequence[Mapping[str, tuple[Any, ...]]], fixed: Mapping[str, Any]
) -> tuple[dict[str, tuple[Any, ...]], ...]:
    """Combinations to leave out as far as they still vary; one that a fixed setting rules out is none."""
    return tuple(
        left
        for skipped in skip
        if all(fixed[name] in values for name, values in skipped.items() if name in fixed)
        and (left := {name: values for name, values in skipped.items() if name not in fixed})
    )


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
    space: SearchSpace, point: Point, *, seed: int, out: str | Path, overrides: Mapping[str, Any]
) -> TrainSettings:
    """Settings of one trial: the space's own, then `overrides`, the point, the seed and the trial's folder.

    Raises:
        SettingsError: a combination that cannot be.
    """
    # Relative folders would mean something else to a worker that Ray starts elsewhere.
    own = {"seed": seed, "out": absolute(out)}
    values = absolute_folders(merge(_TRIAL, space.settings, overrides, point, own))
    settings = build_settings(TrainSettings, values, where=f"{space.file}, point {point_label(point)}")
    check_depth(settings)
    return settings


def absolute_folders(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `data` and `teacher` as absolute paths where they are folders here."""
    result = dict(values)
    for name in ("data", "teacher"):
        if isinstance(result.get(name), str) and Path(result[name]).is_dir():
            result[name] = str(Path(result[name]).absolute())
    return result


def check_space(space: SearchSpace, *, out: str | Path, overrides: Mapping[str, Any]) -> TrainSettings:
    """Build the settings of every grid point, or of each axis's values in turn; returns the first trial's.

    Raises:
        SettingsError: the first combination that cannot be, or nothing to run.
    """
    check_search(space)
    points = list(space.grid() if space.search.sampler == "grid" else _samples(space))
    built = [trial_settings(space, p, seed=space.seeds[0], out=out, overrides=overrides) for p in points]
    beside = [goal.metric for goal in space.goals if "teacher" in goal.metric]
    if beside and any(settings.method == "finetune" for settings in built):
        raise SettingsError(
            f"{space.file}: metric = {beside[0]!r}: a student of method finetune has no teacher beside it; "
            "judge by the student, or take another method"
        )
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
    if name in NOT_VARIED:
        fail(f"'{name}' is not varied like a setting: {NOT_VARIED[name]}")
    names = sorted(dotted_names(TrainSettings))
    if name not in names:
        near = nearest(name, names)
        fail(f"unknown setting '{name}'" + (f", did you mean '{near}'?" if near else ""))


def _refuse(where: str, message: str) -> NoReturn:
    raise SettingsError(f"{where}: {message}")
