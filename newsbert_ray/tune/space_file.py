"""Reads search spaces from YAML files, with a command's changes; every error in a file names its line."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError

from newsbert_ray.config import SCRATCH, Settings, SettingsError, TrainSettings, build_settings, merge
from newsbert_ray.methods import Task
from newsbert_ray.reporting.sweep_data import Axis, Goal, goal_metrics, validation_metrics
from newsbert_ray.settings import KeyPath, YamlFile, flatten, nearest, parse_scalar, read_yaml
from newsbert_ray.tune import space as spaces
from newsbert_ray.tune.space import PointValues, SearchSpace, absolute_folders, conditions, distinct_values
from newsbert_ray.tune.study import absolute_storage
from newsbert_ray.tune.trial import check_space, resolve_depths

_AXIS_KEYS = ("grid", "choice", "float", "int", "log", "step", "when")
DIVISORS = "divisors"
"""Given instead of a list of depths: those that divide the teacher's."""

S = TypeVar("S", bound=Settings)


def find_space_file(name: str | Path) -> Path:
    """The file `name`, or the search space of this name that comes with the package."""
    path = Path(name)
    if not path.exists() and str(path.parent) in (".", "search_spaces"):
        package = Path(__file__).parents[1]
        for folder in (package / "search_spaces", package.parent / "search_spaces"):  # wheel, checkout
            if (packaged := folder / f"{path.stem}.yaml").exists():
                return packaged
    return path


def read_space(path: str | Path, *, task: str | None = None) -> SearchSpace:
    """The search space in a YAML file; `task` replaces its own. SettingsError names a fault's line."""
    text = read_yaml(find_space_file(path))
    known = sorted(SearchSpace.model_fields.keys() - {"file", "axes"} | {"space", "metric", "mode"})
    for key in text.values:
        _require(text, (key,), "key", key, known)
    settings = text.mapping(("settings",)) | ({} if task is None else {"task": task})
    for name in spaces.SWEEP_SETTINGS.keys() & settings:
        text.fail(("settings", name), f"'{name}' cannot be in settings: {spaces.SWEEP_SETTINGS[name]}")
    _build(text, ("settings",), TrainSettings, merge(_REQUIRED, settings))
    axes: list[Axis] = []
    for name in text.mapping(("space",)):
        axes.append(_read_axis(text, str(name), settings, axes))
    as_they_are = {"name", "seeds", "gpus", "keep_students"}
    parts: dict[str, Any] = {name: value for name, value in text.values.items() if name in as_they_are}
    parts |= {"file": text.file, "axes": tuple(axes), "settings": settings}
    parts |= {"start": _read_start(text, axes), "skip": _read_skip(text, axes)}
    parts |= {name: text.mapping((name,)) for name in ("search", "stopping", "limits", "prices")}
    parts["search"] = {"sampler": "tpe" if "trials" in parts["search"] else "grid"} | parts["search"]
    if goals := _read_goals(text, spaces.named_task(settings)):
        parts["goals"] = goals
    space = _build(text, (), SearchSpace, parts)
    for at, message in spaces.faults(space):
        text.fail(("metric",) if at[0] == "goals" and "metric" in text.values else at, message)
    return space


_REQUIRED = {"data": "-", "teacher": SCRATCH, "out": "-"}
"""Values for the required training settings, while a file is checked."""


@dataclass(frozen=True)
class Changes:
    """What is given besides the search space's file: settings, other values for axes, parts of the space."""

    overrides: Mapping[str, Any] = field(default_factory=dict)
    vary: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    control: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Mapping[str, Any], vary: Any) -> Changes:
        """From training settings and parts of the search space, nested or dotted, and `vary` as a mapping or
        as words NAME=VALUE,VALUE; SettingsError for another form."""
        overrides = absolute_folders(merge(settings))
        control = {name: overrides.pop(name) for name in spaces.PARTS if name in overrides}
        if url := control.get("search", {}).get("storage"):
            control["search"]["storage"] = absolute_storage(url)
        axes = vary if isinstance(vary, Mapping) else dict(map(parse_vary, vary or ()))
        return cls(overrides, {name: list(values) for name, values in axes.items()}, control)


def parse_vary(text: str) -> tuple[str, list[Any]]:
    """`student.layers=1,2,3` -> ("student.layers", [1, 2, 3]); values as in YAML. Raises SettingsError."""
    name, equals, values = text.partition("=")
    parts = [part.strip() for part in values.strip().removeprefix("[").removesuffix("]").split(",")]
    if not equals or not name.strip() or not all(parts):
        raise SettingsError(f"--vary {text}: expected NAME=VALUE,VALUE, such as student.layers=1,2,3")
    return name.strip(), [parse_scalar(part) for part in parts]


def restore_changes(changes: Changes, before: Mapping[str, Any]) -> Changes:
    """The changes of a resumed sweep: those of `before`, its sweep.json, unless others are given."""
    if not before:
        return changes
    control = merge(before["control"], changes.control)
    url = control.get("search", {}).get("storage")
    if url and "***" in url:
        why = "a sweep's folder does not keep the password"
        raise SettingsError(f"search.storage = {url}: {why}; give the whole URL again as --search.storage")
    given = changes if changes.overrides or changes.vary else Changes(before["overrides"], before["vary"])
    return Changes(given.overrides, given.vary, control)


def build_space(file: str | Path, changes: Changes) -> tuple[SearchSpace, list[str]]:
    """The search space of a file with the changes applied and its depths known, and messages to show."""
    space, messages = _change(read_space(file, task=changes.overrides.get("task")), changes)
    storage = space.search.storage and absolute_storage(space.search.storage)
    search = space.search.model_copy(update={"storage": storage})
    space = space.model_copy(update={"search": search, "settings": absolute_folders(space.settings)})
    return resolve_depths(space, changes.overrides), messages


def _change(space: SearchSpace, changes: Changes) -> tuple[SearchSpace, list[str]]:
    steered = spaces.steer(space, changes.control)
    return spaces.fix(spaces.vary(steered, changes.vary), changes.overrides)


def check_sweep(space: str | Path, *, out: str, resume: bool = False, **settings: Any) -> dict[str, Any]:
    """Check a sweep's arguments without its data and teacher, and return the locations of these two."""
    axes, *_ = [settings.pop(name, None) for name in ("vary", "plan", "curves", "concurrency")]
    changes = Changes.of(settings, axes)
    file = read_space(space, task=changes.overrides.get("task"))
    if not resume:  # a resumed sweep uses the search space in its folder
        varied, _ = _change(file, changes)
        if all(axis.values is not None or not axis.divisors for axis in varied.axes):
            check_space(varied, out=out, overrides=changes.overrides)
    named = {**file.settings, **changes.overrides}
    return {name: named.get(name) for name in ("data", "teacher")}


def _read_axis(text: YamlFile, name: str, settings: Mapping[str, Any], before: Sequence[Axis]) -> Axis:
    at = ("space", name)
    spaces.require_name(name, partial(text.fail, at))
    if isinstance(values := text.mapping(("space",))[name], list):
        grid = f"{{grid: {json.dumps(values, default=str)}}}"
        text.fail(at, f"{name} is a list; write `{name}: {grid}` to try each of its values")
    spec = text.mapping(at)
    for key in spec:
        _require(text, (*at, key), f"key of {name}", key, _AXIS_KEYS)
    kinds = [key for key in _AXIS_KEYS[:4] if key in spec]
    if len(kinds) != 1:
        forms = "`grid: [..]`, `choice: [..]`, `float: [low, high]`, `int: [low, high]`"
        text.fail(at, f"{name} needs one of {forms}")
    read = _read_list if kinds[0] in ("grid", "choice") else _read_range
    axis = read(text, at, name, spec, kinds[0]).model_copy(update={"when": _read_when(text, at, before)})
    required = {other: values[0] for other, values in (conditions((*before, axis), axis) or {}).items()}
    for value in axis.samples():
        _build(text, at, TrainSettings, merge(_REQUIRED, settings, required, {name: value}))
    return axis


def _read_when(text: YamlFile, at: KeyPath, before: Sequence[Axis]) -> dict[str, tuple[Any, ...]]:
    known = {axis.name: axis for axis in before}
    when = {}
    for name, values in text.mapping((*at, "when")).items():
        where, what = (*at, "when", str(name)), f"{at[-1]}: when {name}"
        if name not in known and name in text.mapping(("space",)):
            text.fail(where, f"{what}: it must come before {at[-1]} in `space`")
        _require(text, where, f"axis in {at[-1]}'s when", name, known)
        axis = known[name]
        if axis.values is None and not axis.divisors:
            text.fail(where, f"{what}: that is a range; `when` needs a grid or choice")
        if values == []:
            text.fail(where, f"{what} = []: give at least one of its values")
        when[str(name)] = _convert_all(text, where, axis, values, what)
    return when


def _convert_all(text: YamlFile, at: KeyPath, axis: Axis, values: Any, what: str) -> tuple[Any, ...]:
    """A value of the axis, or a list of them, in its type."""
    distinct = distinct_values(values if isinstance(values, list) else [values], partial(text.fail, at))
    return tuple(_convert(text, at, axis, value, what) for value in distinct)


def _convert(text: YamlFile, at: KeyPath, axis: Axis, value: Any, what: str) -> Any:
    try:
        return axis.convert(value)
    except ValueError as error:
        near = nearest(value, [str(known) for known in axis.values or ()]) if isinstance(value, str) else None
        text.fail(at, f"{what} = {value!r}, {error}" + (f"; did you mean '{near}'?" if near else ""))


def _read_goals(text: YamlFile, task: Task) -> list[Goal]:
    single: dict[str, Any] = {key: text.values[key] for key in ("metric", "mode") if key in text.values}
    if "goals" not in text.values:
        return [_build(text, (), Goal, single)] if single else []
    if single:
        text.fail((next(iter(single)),), "give `goals: [...]` or `metric:` and `mode:`, not both")
    goals = []
    for at, item in _items(text, "goals", "{metric: ..., mode: max}"):
        if "metric" not in item:
            text.fail(at, f"goals: {item!r} has no `metric:`; give one of {', '.join(goal_metrics(task))}")
        goals.append(_build(text, at, Goal, item))
    if not goals:
        text.fail(("goals",), f"goals: the list is empty; leave it out for {validation_metrics(task)[0]}")
    return goals


def _read_start(text: YamlFile, axes: Sequence[Axis]) -> tuple[PointValues, ...]:
    points: list[PointValues] = []
    for at, item in _items(text, "start", "{distill.beta: 0.1}"):
        values = flatten(item)
        for name in values:
            _require(text, (*at, name), "axis in start", name, [axis.name for axis in axes])
        point = PointValues()
        for axis in axes:
            if axis.name not in values:
                continue
            where = (*at, axis.name)
            point[axis.name] = _convert(text, where, axis, values[axis.name], f"start: {axis.name}")
            for parent, allowed in axis.when.items():
                if parent in point and point[parent] not in allowed:
                    what = f"{axis.name} does not vary where {parent} is {point[parent]}"
                    text.fail(where, f"start: {what}; leave it out")
        if not point or point in points:
            text.fail(at, f"start: {item!r} " + ("is given twice" if point else "names no axis"))
        points.append(point)
    return tuple(points)


def _read_skip(text: YamlFile, axes: Sequence[Axis]) -> tuple[dict[str, tuple[Any, ...]], ...]:
    known = {axis.name: axis for axis in axes}
    skip = []
    for at, item in _items(text, "skip", "{method: bilstm_soft, student.layers: [2, 4]}"):
        skipped = {}
        for name, values in flatten(item).items():
            _require(text, (*at, name), "axis in skip", name, known)
            skipped[name] = _convert_all(text, (*at, name), known[name], values, f"skip: {name}")
        if not skipped:
            text.fail(at, "skip: {} would leave out every point; name values of some axes")
        skip.append(skipped)
    return tuple(skip)


def _items(text: YamlFile, key: str, example: str) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    """The mappings in the list under `key`, each with its key path."""
    items = text.values.get(key) or []
    if not isinstance(items, list):
        text.fail((key,), f"{key} = {items!r}, expected a list such as `{key}: [{example}]`")
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            text.fail((key, str(index)), f"{key}: {item!r}, expected names with values such as {example}")
        yield (key, str(index)), item


def _read_list(text: YamlFile, at: KeyPath, name: str, spec: Mapping[str, Any], kind: str) -> Axis:
    values, depths = spec[kind], name == "student.layers"
    if "log" in spec or "step" in spec:
        text.fail(at, f"{name}: log and step belong to float and int, not to {kind}")
    if values == DIVISORS and depths:
        return Axis(name=name, divisors=True)
    if values == DIVISORS:
        text.fail((*at, kind), f"{name}: only student.layers has divisors; give a list of values")
    if not isinstance(values, list) or not values:
        word = f" or the word {DIVISORS}" if depths else ""
        text.fail((*at, kind), f"{name}: {kind} = {values!r}, expected a list of values{word}")
    distinct = distinct_values(values, lambda message: text.fail((*at, kind), f"{name}: {message}"))
    return Axis(name=name, values=distinct)


def _read_range(text: YamlFile, at: KeyPath, name: str, spec: Mapping[str, Any], kind: str) -> Axis:
    def wrong(what: str) -> NoReturn:
        text.fail((*at, kind), f"{name}: {kind} = {spec[kind]!r}, {what}")

    ends, step, log = spec[kind], spec.get("step"), spec.get("log", False)
    number: tuple[type, ...] = (int,) if kind == "int" else (int, float)
    if not isinstance(ends, list) or len(ends) != 2 or not all(_is_number(end, number) for end in ends):
        wrong(f"expected [low, high], two {'whole numbers' if kind == 'int' else 'numbers'}")
    low, high = ends
    if not low < high:
        wrong(f"low must be less than high; did you mean [{high}, {low}]?")
    if not isinstance(log, bool):
        wrong(f"log = {log!r}, expected true or false")
    if log and low <= 0:
        wrong("with log the low end must be above 0")
    if step is not None and (not _is_number(step, number) or not 0 < step <= high - low):
        wrong(f"step = {step!r}, expected more than 0 and at most {high - low:g}")
    if log and step is not None:
        wrong("log and step do not go together; leave one out")
    if step is not None and (over := Decimal(str(high - low)) % Decimal(str(step))):
        wrong(f"step = {step!r} does not end there; did you mean [{low}, {Decimal(str(high)) - over}]?")
    return Axis(name=name, low=low, high=high, integer=kind == "int", log=log, step=step)


def _is_number(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)  # type: ignore[arg-type]


def _build(text: YamlFile, at: KeyPath, model: type[S], values: Mapping[str, Any]) -> S:
    """build_settings, with the line of the first error."""
    try:
        return build_settings(model, values, where="")
    except SettingsError as error:
        cause = error.__cause__
        inner = cause.errors()[0]["loc"] if isinstance(cause, ValidationError) else ()
        text.fail((*at, *map(str, inner)), str(error).removeprefix(": "))


def _require(text: YamlFile, at: KeyPath, what: str, name: Any, known: Collection[str]) -> None:
    """Fail, with the nearest name, where `name` is not known."""
    if name not in known:
        near = nearest(str(name), list(known))
        hint = f", did you mean '{near}'?" if near else ""
        text.fail(at, f"unknown {what} '{name}'{hint} (known: {', '.join(known)})")
