"""What all settings have in common: frozen models, errors that name the cure, nested and dotted names laid
over one another. Knows no setting."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError


class SettingsError(ValueError):
    """A setting that cannot be; its text is one whole message for a person."""


class Settings(BaseModel):
    """Base of all settings: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


S = TypeVar("S", bound=Settings)


def build_settings(model: type[S], values: Mapping[str, Any], *, where: str = "settings") -> S:
    """A validated `model` from nested `values`.

    Args:
        values: nested mapping, keys as the fields of `model`.
        where: what the values came from (a file, "command line"), for the message.
    Raises:
        SettingsError: each wrong setting by its dotted name with its value, and the nearest name for an
            unknown one.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        names = sorted(dotted_names(model))
        lines = [_explain(e, names) for e in error.errors()]
        raise SettingsError(f"{where}: " + "; ".join(lines)) from error


def _explain(error: Any, names: list[str]) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = nearest(name, names)
        return f"unknown setting '{name}'" + (f", did you mean '{near}'?" if near else "")
    if error["type"] == "missing":
        return f"'{name}' is required"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "literal_error":
        near = nearest(str(error["input"]), re.findall(r"'([^']*)'", error["ctx"]["expected"]))
        message += f"; did you mean '{near}'?" if near else ""
    return f"{name} = {error['input']!r}: {message}" if name else message


def nearest(name: str, names: list[str]) -> str | None:
    """The name most like `name`, or None where none is near; a last part alone (`beta`) finds its dotted
    name."""
    tail = name.split(".")[-1]
    by_tail = {known.split(".")[-1]: known for known in reversed(names)}
    if tail in by_tail:
        return by_tail[tail]
    for word, known in ((name, {known: known for known in names}), (tail, by_tail)):
        if found := difflib.get_close_matches(word, known, n=1, cutoff=0.6):
            return known[found[0]]
    return None


def dotted_names(model: type[Settings], prefix: str = "") -> Iterator[str]:
    """Every leaf setting's dotted name (`distill.weights.hidden`)."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Settings):
            yield from dotted_names(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings laid over one another, later ones first; dotted keys (`distill.beta`) open into nested
    ones."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            head, _, tail = key.partition(".")
            new = {tail: value} if tail else value
            if isinstance(new, Mapping):
                old = result.get(head)
                result[head] = merge(old if isinstance(old, Mapping) else {}, new)
            else:
                result[head] = new
    return result


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one of dotted names: the reverse of `merge`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
