"""Search spaces as files: YAML -> SearchSpace, each slip named by file and line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError

from newsbert_ray.config import (
    SCRATCH,
    Settings,
    SettingsError,
    TrainSettings,
    build_settings,
    merge,
    nearest,
)
from newsbert_ray.tune.lined_yaml import Lined, read_lined, scalar
from newsbert_ray.tune.rules import check_search
from newsbert_ray.tune.space import (
    OWN_NAMES,
    Axis,
    Goal,
    Search,
    SearchSpace,
    distinct_values,
    require_name,
)

_AXIS_KEYS = ("grid", "choice", "float", "int", "log", "step")

S = TypeVar("S", bound=Settings)


def read_space(path: str | Path) -> SearchSpace:
    """The search space in a YAML file, every name, type and range checked.

    Raises:
        SettingsError: anything wrong, with file and line, and the nearest name for an unknown one.
    """
    text = read_lined(path)
    known = sorted(SearchSpace.model_fields.keys() - {"file", "axes"} | {"space", "metric", "mode"})
    for key in text.values:
        if key not in known:
            _unknown(text, (key,), "key", key, known)
    settings = text.mapping(("settings",))
    _check_fixed(text, settings)
    axes = tuple(_read_axis(text, str(name), settings) for name in text.mapping(("space",)))
    asked = text.mapping(("search",))
    search = _build(text, ("search",), Search, {"sampler": "tpe" if "trials" in asked else "grid", **asked})
    read = {"settings", "space", "search", "metric", "mode"}
    rest = {key: value for key, value in text.values.items() if key not in read}
    goal: dict[str, Any] = {k: text.values[k] for k in ("metric", "mode") if k in text.values}
    if goal:
        if "goals" in rest:
            text.fail((next(iter(goal)),), "give `goals: [...]` or `metric:` and `mode:`, not both")
        rest["goals"] = [_build(text, (), Goal, goal)]
    found = {**rest, "file": str(path), "settings": settings, "axes": axes, "search": search}
    space = _build(text, (), SearchSpace, found)
    try:
        check_search(space)
    except SettingsError as error:
        text.fail(("search",) if "search" in text.values else ("space",), str(error))
    return space


def parse_vary(text: str) -> tuple[str, list[Any]]:
    """`student.layers=1,2,3` -> ("student.layers", [1, 2, 3]); values are read as YAML reads them.

    Raises:
        SettingsError: no `=`, or nothing after it.
    """
    name, equals, values = text.partition("=")
    parts = [part.strip() for part in values.strip().removeprefix("[").removesuffix("]").split(",")]
    if not equals or not name.strip() or not all(parts):
        raise SettingsError(f"--vary {text}: expected NAME=VALUE,VALUE, such as student.layers=1,2,3")
    return name.strip(), [scalar(part) for part in parts]


def _read_axis(text: Lined, name: str, settings: Mapping[str, Any]) -> Axis:
    at = ("space", name)
    require_name(name, partial(text.fail, at))
    spec = text.mapping(at)
    for key in spec:
        if key not in _AXIS_KEYS:
            _unknown(text, (*at, key), f"key of {name}", key, list(_AXIS_KEYS))
    kinds = [key for key in ("grid", "choice", "float", "int") if key in spec]
    if len(kinds) != 1:
        text.fail(
            at,
            f"{name} needs one of `grid: [..]`, `choice: [..]`, `float: [low, high]`, `int: [low, high]`",
        )
    kind = kinds[0]
    axis = (
        _listed(text, at, name, spec, kind)
        if kind in ("grid", "choice")
        else _ranged(text, at, name, spec, kind)
    )
    for value in axis.samples():
        built = merge({"data": "-", "teacher": SCRATCH, "out": "-"}, settings, {name: value})
        _build(text, at, TrainSettings, built)
    return axis


def _listed(text: Lined, at: tuple[str, ...], name: str, spec: Mapping[str, Any], kind: str) -> Axis:
    values = spec[kind]
    if not isinstance(values, list) or not values:
        text.fail((*at, kind), f"{name}: {kind} = {values!r}, expected a list of values")
    if "log" in spec or "step" in spec:
        text.fail(at, f"{name}: log and step belong to float and int, not to {kind}")
    return Axis(
        name=name,
        values=distinct_values(values, lambda message: text.fail((*at, kind), f"{name}: {message}")),
    )


def _ranged(text: Lined, at: tuple[str, ...], name: str, spec: Mapping[str, Any], kind: str) -> Axis:
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
    return Axis(name=name, low=low, high=high, integer=kind == "int", log=log, step=step)


def _is_number(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)  # type: ignore[arg-type]


def _check_fixed(text: Lined, settings: Mapping[str, Any]) -> None:
    for name, cure in OWN_NAMES.items():
        if name in settings:
            text.fail(("settings", name), f"'{name}' does not belong into settings: {cure}")
    _build(text, ("settings",), TrainSettings, merge({"data": "-", "teacher": SCRATCH, "out": "-"}, settings))


def _build(text: Lined, at: tuple[str, ...], model: type[S], values: Mapping[str, Any]) -> S:
    """build_settings, with the line of the first thing that is wrong."""
    try:
        return build_settings(model, values, where="")
    except SettingsError as error:
        cause = error.__cause__
        inner = cause.errors()[0]["loc"] if isinstance(cause, ValidationError) else ()
        text.fail((*at, *map(str, inner)), str(error).removeprefix(": "))


def _unknown(text: Lined, at: tuple[str, ...], what: str, name: Any, known: list[str]) -> NoReturn:
    near = nearest(str(name), known)
    hint = f", did you mean '{near}'?" if near else ""
    text.fail(at, f"unknown {what} '{name}'{hint} (known: {', '.join(known)})")
