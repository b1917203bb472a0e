"""A search space made ready: steered, varied and fixed from the command line, its depths known; and what its
trials' settings are, checked before one starts. Knows no file format, no Ray and no Optuna."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from newsbert_ray.config import SettingsError, TrainSettings, build_settings, dotted_names, merge, nearest
from newsbert_ray.storage import absolute
from newsbert_ray.tune.depths import check_depth, divisors, teacher_depth
from newsbert_ray.tune.rules import check_search, conditions
from newsbert_ray.tune.schema import (
    NOT_VARIED,
    OWN_NAMES,
    Axis,
    Goal,
    Limits,
    Point,
    Prices,
    Search,
    SearchSpace,
    Stopping,
)

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
