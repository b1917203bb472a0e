"""A search space: axes, sampler, early stopping, limits and goals; the points of its grid; and how the
command line changes it. Does not read files and does not import Ray or Optuna."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import Field, ValidationInfo, field_validator

from newsbert_ray.config import Settings, SettingsError, TrainSettings, build_settings, dotted_names, merge
from newsbert_ray.methods import TASKS, Task
from newsbert_ray.reporting import sweep_data
from newsbert_ray.reporting.sweep_data import Axis, Goal, has_values
from newsbert_ray.secrets import mask_url
from newsbert_ray.settings import flatten, nearest, unknown_setting

MAX_POINTS = 100_000
"""A grid with more points is refused as a mistake."""

SWEEP_SETTINGS = {"seed": "use `seeds: [...]`", "out": "each trial's folder is inside the sweep's --out"}
"""Training settings that the sweep sets itself, with what to use instead."""
NOT_VARIED = {
    **SWEEP_SETTINGS,
    "task": "metrics of different tasks cannot be compared; use `settings: {task: ...}`, or --task",
}

PointValues = dict[str, Any]
"""The varied settings of one point, by dotted name; an axis that is not active there is left out."""


class Search(Settings):
    """How points are chosen."""

    sampler: Literal["tpe", "nsga2", "gp", "random", "grid"] = "tpe"
    """Optuna's multivariate tree-structured Parzen estimator, NSGA-II, Gaussian process, random, or every
    combination; in a file tpe where `trials` is given, grid otherwise."""
    trials: int | None = Field(None, ge=1)
    """Points to try; a grid has its own number."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the sampler."""
    storage: str | None = None
    """Optuna's storage as a URL (`sqlite:///study.db`); a journal file in the sweep's folder by default."""


class Stopping(Settings):
    """Which trials end before their last epoch; decided at the end of each epoch."""

    scheduler: Literal["asha", "median", "none"] | None = None
    """Asynchronous successive halving (Li et al. 2020), the median rule (Golovin et al. 2017), or none;
    asha by default, none for a grid and for several goals."""
    grace: int = Field(1, ge=1)
    """Epochs that every trial runs at least."""
    factor: int = Field(3, ge=2)
    """asha: one in so many trials continues after each rung (grace, grace x factor, ...)."""


class Limits(Settings):
    """When the sweep ends before its last point. No trial starts that, at the mean duration of the trials
    before it, would end past a limit."""

    hours: float | None = Field(None, gt=0.0)
    """Wall time since the sweep started, or was resumed."""
    cost: float | None = Field(None, gt=0.0)
    """Money for all trials, by `prices`."""
    target: float | None = None
    """The sweep ends once a point's first goal is as good as this."""


class Prices(Settings):
    """What an hour costs, in one currency."""

    cpu_hour: float = Field(0.0, ge=0.0)
    """One CPU for an hour."""
    gpu_hour: float = Field(0.0, ge=0.0)
    """One GPU for an hour."""


PARTS = ("search", "stopping", "limits", "prices", "gpus", "keep_students")
"""Parts of a search space that can be set over its file."""


def named_task(settings: Mapping[str, Any]) -> Task:
    """The task that training settings name; topics for an unknown name, which their own check refuses."""
    return TASKS.get(settings.get("task", "topics"), TASKS["topics"])


class SearchSpace(Settings):
    """A search space as read: fixed settings, axes, seeds and goals."""

    file: str
    """File that it was read from."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=80)
    """Short name; also the name of Optuna's study."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Training settings that all trials share, nested or dotted."""
    axes: tuple[Axis, ...] = ()
    """Settings that vary; in a grid the last one changes fastest."""
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    """Each point is run with each seed; its result is the mean."""
    skip: tuple[dict[str, tuple[Any, ...]], ...] = ()
    """Combinations that a grid leaves out: values of some axes."""
    start: tuple[PointValues, ...] = ()
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
    """GPUs of each worker of a trial, such as 0.25; by default an equal share where there are GPUs."""
    keep_students: int = Field(10, ge=1)
    """How many trained students are kept: those of the best trials."""
    goals: tuple[Goal, ...] = Field((Goal(),), min_length=1, validate_default=True)
    """What to optimise, the mean over the seeds; several goals give a Pareto front."""

    @field_validator("goals")
    @classmethod
    def _goals_have_a_metric(cls, goals: tuple[Goal, ...], info: ValidationInfo) -> tuple[Goal, ...]:
        """A metric that was not given follows the task, also when the task changes later."""
        default = f"validation.student.{named_task(info.data.get('settings', {})).primary.name}"
        own = [Goal.model_construct({"mode"}, metric=default, mode=goal.mode) for goal in goals]
        return tuple(g if "metric" in g.model_fields_set else o for g, o in zip(goals, own, strict=True))

    @field_validator("seeds")
    @classmethod
    def _seeds_are_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if any(not 0 <= seed < 2**31 for seed in seeds) or len(set(seeds)) < len(seeds):
            raise ValueError("expected different seeds from 0 to 2147483647")
        return seeds

    @property
    def task(self) -> Task:
        return named_task(self.settings)

    @property
    def metric(self) -> str:
        return self.goals[0].metric

    @property
    def scheduler(self) -> Literal["asha", "median", "none"]:
        """The early stopping in use."""
        if self.stopping.scheduler is not None:
            return self.stopping.scheduler
        early = self.search.sampler != "grid" and len(self.goals) == 1
        return "asha" if early and self.metric in sweep_data.validation_metrics(*TASKS.values()) else "none"

    @property
    def points(self) -> int:
        """How many points the sweep will try; at most MAX_POINTS + 1 of a grid are counted."""
        if self.search.sampler != "grid":
            return self.search.trials or 0
        return sum(1 for _ in itertools.islice(self.grid(), MAX_POINTS + 1))

    def samples_of(self, name: str, default: Any) -> list[Any]:
        """Values of the setting `name` to check; `default` where it does not vary."""
        return next((list(axis.samples()) for axis in self.axes if axis.name == name), [default])

    def grid(self) -> Iterator[PointValues]:
        """Every combination of the axes' values without those to skip, the last axis fastest."""
        points = iter([PointValues()])
        for axis in self.axes:
            points = _expand(points, axis)
        return (point for point in points if not any(has_values(point, skipped) for skipped in self.skip))


def _expand(points: Iterator[PointValues], axis: Axis) -> Iterator[PointValues]:
    for point in points:
        if axis.is_active(point):
            yield from ({**point, axis.name: value} for value in axis.values or ())
        else:
            yield point


Fault = tuple[tuple[str, ...], str]
"""The key path of a fault in the search space's file, and its message."""


def faults(space: SearchSpace) -> Iterator[Fault]:
    """Contradictions in `space`, the simplest first."""
    for axis in space.axes:
        if conditions(space.axes, axis) is None:
            why = "the values in its `when` never occur together; leave it out"
            yield ("space", axis.name, "when"), f"{axis.name} never varies: {why}"
    yield from _search_faults(space)
    yield from _goal_faults(space)
    yield from _limit_faults(space)


def conditions(axes: tuple[Axis, ...], axis: Axis) -> dict[str, tuple[object, ...]] | None:
    """The values that earlier axes must have for `axis` to vary; None where they can never all have them."""
    by_name = {other.name: other for other in axes}
    required: dict[str, tuple[object, ...]] = {}
    to_check = [axis]
    while to_check:
        for name, values in to_check.pop().when.items():
            parent = by_name[name]
            possible = [value for value in values if parent.values is None or value in parent.values]
            required[name] = tuple(value for value in required.get(name, possible) if value in possible)
            if not required[name]:
                return None
            to_check.append(parent)
    return required


def _search_faults(space: SearchSpace) -> Iterator[Fault]:
    search, at = space.search, ("search", "sampler")
    if search.sampler == "grid":
        yield from _grid_faults(space)
    elif space.skip:
        yield ("skip",), "only a grid can skip combinations; use `sampler: grid`, or leave `skip` out"
    elif search.trials is None:
        yield at, f"the {search.sampler} sampler needs a number of points: give `trials: N`"
    conditional = [axis.name for axis in space.axes if axis.when]
    if search.sampler == "gp" and conditional:
        why = f"the gp sampler would draw {conditional[0]} at random"
        yield at, f"{why}: it has a `when`; use `sampler: tpe`"
    if search.storage is not None and not re.match(r"[a-z][a-z0-9_+]*://", search.storage):
        what = f"storage = {mask_url(search.storage)!r}: expected a URL such as sqlite:///study.db"
        yield ("search", "storage"), f"{what}; leave it out for a journal file in the sweep's folder"


def _grid_faults(space: SearchSpace) -> Iterator[Fault]:
    for axis in space.axes:
        if axis.values is None and not axis.divisors:
            cure = f"give {axis.name} a `grid: [...]`, or use `sampler: tpe` with `trials:`"
            yield ("space", axis.name), f"the grid sampler needs values: {cure}"
            return
    if space.search.trials is not None:
        points = f"its {space.points} points" if space.points else "its points"
        what = f"trials = {space.search.trials}: a grid tries each of {points} once"
        yield ("search", "trials"), f"{what}; leave trials out, or use another sampler, such as tpe"
    if space.points > MAX_POINTS:
        yield ("space",), f"the grid has more than {MAX_POINTS:,} points; use fewer values"
    if space.start:
        yield ("start",), "a grid tries all its points in order; leave `start` out, or use another sampler"


def _goal_faults(space: SearchSpace) -> Iterator[Fault]:
    metrics = [goal.metric for goal in space.goals]
    known, every = sweep_data.goal_metrics(space.task), sweep_data.goal_metrics(*TASKS.values())
    for index, metric in enumerate(metrics):
        at = ("goals", str(index), "metric")
        if metric not in known:
            near = metric if metric in every else nearest(metric, list(every))
            if near and near not in known:  # another task's
                near = f"{near.rpartition('.')[0]}.{space.task.primary.name}"
            what = f"no trial of task {space.settings.get('task', 'topics')} reports it"
            hint = f", did you mean '{near}'?" if near else ""
            yield at, f"metric = {metric!r}: {what}{hint} (known: {', '.join(known)})"
        if metric in metrics[:index]:
            yield at, f"goals: {metric} is given twice; leave one out"
    scheduler, why = space.stopping.scheduler, ""
    if len(metrics) > 1:
        why = "early stopping needs one goal, because one number must say which trial is worse"
        why += "; leave the scheduler out, or give one goal"
    elif space.metric not in sweep_data.validation_metrics(*TASKS.values()):
        why = f"{space.metric} is known only at a trial's end, so it cannot stop trials early"
        why += f"; use `scheduler: none`, or one of {', '.join(sweep_data.validation_metrics(space.task))}"
    if why and scheduler not in (None, "none"):
        yield ("stopping", "scheduler"), f"scheduler = {scheduler!r}: {why}"


def _limit_faults(space: SearchSpace) -> Iterator[Fault]:
    cost, target, gpus, prices = space.limits.cost, space.limits.target, space.gpus, space.prices
    if gpus is not None and gpus > 1 and gpus != int(gpus):
        yield ("gpus",), f"gpus = {gpus:g}: a worker has a share of one GPU, or whole GPUs; give 0.5 or 2"
    if cost is not None and not (prices.cpu_hour or prices.gpu_hour):
        cure = "give `prices: {cpu_hour: ..., gpu_hour: ...}`"
        yield ("limits", "cost"), f"cost = {cost:g}: a limit on the cost needs prices; {cure}"
    if target is not None and len(space.goals) > 1:
        why = "a target needs one goal; leave it out, or give one goal"
        yield ("limits", "target"), f"target = {target:g}: {why}"


def steer(space: SearchSpace, control: Mapping[str, Any]) -> SearchSpace:
    """`space` with other `search`, `limits` and so on, nested or dotted; SettingsError for a wrong one."""
    current = space.model_dump(include={"search", "stopping", "limits", "prices"})
    changes = merge(control)
    if changes.get("search", {}).get("sampler") == "grid":
        # The file's number of trials and its starting points belong to the file's own sampler.
        current["search"]["trials"] = None
        changes["start"] = ()
    return build_settings(SearchSpace, {**dict(space), **merge(current, changes)}, where="command line")


def vary(space: SearchSpace, changes: Mapping[str, Sequence[Any]]) -> SearchSpace:
    """`space` with other values for axes, new axes, or other `seeds`; SettingsError for a wrong one."""
    axes = {axis.name: axis for axis in space.axes}
    seeds: Sequence[Any] = space.seeds
    for name, values in changes.items():
        if not values or isinstance(values, str):
            _fail(f"--vary {name}", f"give at least one value, such as {name}=1,2")
        if name == "seeds":
            seeds = values
            continue
        require_name(name, partial(_fail, "--vary"))
        distinct = distinct_values(values, partial(_fail, f"--vary {name}"))
        axes[name] = Axis(name=name, values=distinct, when=axes[name].when if name in axes else {})
    changed = {**dict(space), "axes": tuple(axes.values()), "seeds": tuple(seeds)}
    return build_settings(SearchSpace, changed, where="--vary")


def fix(space: SearchSpace, overrides: Mapping[str, Any]) -> tuple[SearchSpace, list[str]]:
    """`space` without the axes that `overrides` fixes, and one message for each change. An axis that varies
    only with some values of a fixed one always varies or is dropped. SettingsError for `out`."""
    fixed = flatten(merge(overrides))
    if "out" in fixed:
        raise SettingsError(f"out = {fixed['out']!r}: {SWEEP_SETTINGS['out']}")
    axes: list[Axis] = []
    messages = []
    for axis in space.axes:
        if axis.name in fixed:
            messages.append(f"{axis.name} is {fixed[axis.name]!r}, not varied")
            continue
        when = {name: values for name, values in axis.when.items() if name not in fixed}
        changed_axis = axis.model_copy(update={"when": when})
        met = all(fixed[name] in axis.when[name] for name in axis.when if name in fixed)
        parents_vary = when.keys() <= {other.name for other in axes}
        if met and parents_vary and conditions((*axes, changed_axis), changed_axis) is not None:
            axes.append(changed_axis)
        else:
            messages.append(f"{axis.name} is not varied: it varies only where {axis.condition}")
    skip = (
        {name: values for name, values in skipped.items() if name not in fixed}
        for skipped in space.skip
        if all(fixed[name] in values for name, values in skipped.items() if name in fixed)
    )
    changes: dict[str, Any] = {"axes": tuple(axes), "skip": tuple(filter(None, skip))}
    changes["start"] = _start_points(space.start, axes, messages)
    if "task" in fixed:
        changes["settings"] = merge(space.settings, {"task": fixed["task"]})
    if "seed" in fixed:
        changes["seeds"] = (fixed["seed"],)
        if space.seeds != changes["seeds"]:
            messages.append(f"seed is {fixed['seed']!r} in every trial")
    return build_settings(SearchSpace, {**dict(space), **changes}, where="command line"), messages


def _start_points(
    start: Sequence[PointValues], axes: Sequence[Axis], messages: list[str]
) -> tuple[PointValues, ...]:
    """The distinct starting points over the axes that still vary, without those off an axis."""
    by_name = {axis.name: axis for axis in axes}
    points: list[PointValues] = []
    for point in start:
        try:
            varied = {name: by_name[name].convert(value) for name, value in point.items() if name in by_name}
        except ValueError as error:
            messages.append(f"starting point {sweep_data.point_label(point)} is left out: {error}")
            continue
        if varied and varied not in points:
            points.append(varied)
    return tuple(points)


def absolute_folders(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `data`, `teacher` and `unlabelled` as absolute paths where they are folders here."""
    result = dict(values)
    for name in ("data", "teacher", "unlabelled"):
        if isinstance(result.get(name), str) and Path(result[name]).is_dir():
            result[name] = str(Path(result[name]).absolute())
    return result


def distinct_values(values: Sequence[Any], fail: Callable[[str], NoReturn]) -> tuple[Any, ...]:
    """`values` as a tuple; `fail` is called with a message for one that is nested or repeated."""
    for index, value in enumerate(values):
        if not isinstance(value, str | int | float | bool | None):
            fail(f"{value!r} is not a single value (a number, a word, true, false or null)")
        if value in values[:index]:
            fail(f"{value!r} is given twice")
    return tuple(values)


def require_name(name: str, fail: Callable[[str], NoReturn]) -> None:
    """Call `fail` with a message where `name` is not a setting that can vary."""
    if name in NOT_VARIED:
        fail(f"'{name}' cannot vary: {NOT_VARIED[name]}")
    names = sorted(dotted_names(TrainSettings))
    if name not in names:
        fail(unknown_setting(name, names))


def _fail(where: str, message: str) -> NoReturn:
    raise SettingsError(f"{where}: {message}")
