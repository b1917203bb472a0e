"""YAML that remembers its lines, so that a message can say where a value stands. Knows no search space."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from newsbert_ray.config import SettingsError


@dataclass(frozen=True)
class Lined:
    """The values of a file, and the line of each key by its path (`("space", "distill.beta")`); in a list
    the key is the place (`("goals", "0", "metric")`)."""

    file: str
    values: dict[str, Any]
    lines: Mapping[tuple[str, ...], int]

    def fail(self, at: tuple[str, ...], message: str) -> NoReturn:
        """Raise SettingsError with file and line of `at`, or of the nearest key around it."""
        while at and at not in self.lines:
            at = at[:-1]
        raise SettingsError(f"{self.file}:{self.lines.get(at, 1)}: {message}")

    def mapping(self, at: tuple[str, ...]) -> dict[str, Any]:
        """The mapping at `at`, empty where there is none."""
        value: Any = self.values
        for key in at:
            value = value.get(key, {})
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.fail(at, f"{at[-1]} = {value!r}, expected names with values under it")
        return value


class _Loader(yaml.SafeLoader):
    """The safe loader, reading 1e-3 as the number it is (YAML 1.1 asks for 1.0e-3)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_lined(path: str | Path) -> Lined:
    """The mapping in the YAML file at `path`.

    Raises:
        SettingsError: no such file, no text, no YAML, no mapping, or a key that stands there twice.
    """
    try:
        loader = _Loader(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: cannot be read ({error})") from error
    try:
        node = loader.get_single_node()
        values = loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise SettingsError(f"{where}: not YAML ({getattr(error, 'problem', None) or error})") from error
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        raise SettingsError(
            f"{path}:1: expected names with values (name, settings, space, ...), got {values!r}"
        )
    lines: dict[tuple[str, ...], int] = {}
    _collect(node, (), lines, set(), str(path))
    return Lined(file=str(path), values=values, lines=lines)


def scalar(text: str) -> Any:
    """One value as YAML reads it: `0.1` a number, `true` a truth, `linear` a word."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError:
        return text
    finally:
        loader.dispose()


def _collect(
    node: Any, at: tuple[str, ...], lines: dict[tuple[str, ...], int], seen: set[int], file: str
) -> None:
    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*at, str(index))] = item.start_mark.line + 1
            _collect(item, (*at, str(index)), lines, seen, file)
        return
    for key, value in node.value:
        path = (*at, str(key.value))
        line = key.start_mark.line + 1
        if path in lines:
            raise SettingsError(
                f"{file}:{line}: '{key.value}' stands there twice, first in line {lines[path]}"
            )
        lines[path] = line
        _collect(value, path, lines, seen, file)
