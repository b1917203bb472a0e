"""Which parts of a search space do not go together: sampler, trials, goals, early stopping, limits. Knows no
file and no training setting's own range."""

from __future__ import annotations

import re
from collections.abc import Iterator

from newsbert_ray.config import SettingsError
from newsbert_ray.tune.schema import CURVES, MAX_POINTS, Axis, SearchSpace, curves_of, metrics_of
from newsbert_ray.tune.storage import shown_storage

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
