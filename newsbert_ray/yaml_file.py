"""Reads YAML files of settings: errors name the file and the line, and hostile files are refused at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from newsbert_ray.settings import SettingsError

MAX_NODES = 100_000
"""A file with more values is refused: a few lines of aliases can expand to billions."""

KeyPath = tuple[str, ...]
"""Keys from the top of the file; in a list the index (`("goals", "0", "metric")`)."""


@dataclass(frozen=True)
class YamlFile:
    """The values of a file, and the line of each key by its path (`("space", "distill.beta")`)."""

    file: str
    values: dict[str, Any]
    lines: Mapping[KeyPath, int]

    def fail(self, at: KeyPath, message: str) -> NoReturn:
        """Raise SettingsError with the file and the line of `at`, or of the nearest key above it."""
        while at and at not in self.lines:
            at = at[:-1]
        raise SettingsError(f"{self.file}:{self.lines.get(at, 1)}: {message}")

    def mapping(self, at: KeyPath) -> dict[str, Any]:
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
    """The safe loader, which also reads 1e-3 as a number (YAML 1.1 requires 1.0e-3)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: str | Path) -> YamlFile:
    """The mapping in the YAML file at `path`.

    Raises:
        SettingsError: no such file, not text, not YAML, not a mapping, or a key that is given twice.
    """
    try:
        loader = _Loader(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: cannot be read ({error})") from error
    try:
        node = loader.get_single_node()
        if _expanded_size(node, {}) > MAX_NODES:
            raise SettingsError(f"{path}: its aliases expand to more than {MAX_NODES:,} values")
        values = loader.construct_document(node) if node is not None else None
    except RecursionError:
        raise SettingsError(f"{path}: not YAML (nested too deeply)") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise SettingsError(f"{where}: not YAML ({getattr(error, 'problem', None) or error})") from error
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        shown = str(values)[:60]
        raise SettingsError(f"{path}:1: expected names with values, got {shown}")
    lines: dict[KeyPath, int] = {}
    _collect(node, (), lines, set(), str(path))
    return YamlFile(file=str(path), values=values, lines=lines)


def _expanded_size(node: Any, known: dict[int, int]) -> int:
    """How many values a node has once its aliases are replaced; each node is counted once."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = 1  # an alias to a node inside itself
        items = (
            node.value if isinstance(node, yaml.SequenceNode) else [v for pair in node.value for v in pair]
        )
        known[id(node)] = 1 + sum(_expanded_size(item, known) for item in items)
    return known[id(node)]


def parse_scalar(text: str) -> Any:
    """One value as YAML reads it: `0.1` a number, `true` a boolean, `linear` a string."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError:
        return text
    finally:
        loader.dispose()


def _collect(node: Any, at: KeyPath, lines: dict[KeyPath, int], seen: set[int], file: str) -> None:
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
            raise SettingsError(f"{file}:{line}: '{key.value}' is given twice, first in line {lines[path]}")
        lines[path] = line
        _collect(value, path, lines, seen, file)
