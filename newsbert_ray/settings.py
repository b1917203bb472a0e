"""Base class of all settings, their validation, their YAML files, and the one wording of errors about them.

The command line and the Python functions report wrong settings through this module, in the same words.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Location = Annotated[str | Path, AfterValidator(str)]
"""A path or URL; the functions inside the package receive it as a string."""

_OTHER_NAMES = {
    "learning_rate": "lr",
    "student.layers": "layers num_layers",
    "batch_size": "bs batch",
    "epochs": "num_epochs num_train_epochs",
    "workers": "num_workers",
    "teacher": "model model_name model_name_or_path",
    "out": "output output_dir",
    "data": "dataset",
    "distill.beta": "alpha",
    "max_tokens": "max_length",
    "precision": "fp16",
}
"""Our names, and those that other programs use."""
_HABITS = {other: ours for ours, others in _OTHER_NAMES.items() for other in others.split()}


class SettingsError(ValueError):
    """A wrong setting or argument; its text is a complete one-line message for a person."""


class Settings(BaseModel):
    """Base of all settings: frozen, and unknown names are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


S = TypeVar("S", bound=Settings)


def build_settings(model: type[S], values: Mapping[str, Any], *, where: str = "") -> S:
    """A validated `model` from nested `values`; a message begins with their source `where`, such as a file.
    SettingsError names every wrong setting with its value, every missing one, and names near unknown ones."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise SettingsError(_joined(error.errors(), dotted_names(model), where)) from error


def check_each(
    model: type[Settings], values: Mapping[str, Any], *, where: str = "", complete: bool = False
) -> None:
    """Check every value in nested `values` by itself: its name, type and range, not whether all fit together.
    As `build_settings`; with `complete` a missing setting is an error, too."""
    try:
        model.model_validate(merge(values))
    except ValidationError as error:
        faults = [e for e in error.errors() if not _is_joint(e) and (complete or e["type"] != "missing")]
        if faults:
            raise SettingsError(_joined(faults, dotted_names(model), where)) from error


def check_arguments(
    function: Callable[..., Any], positional: tuple[Any, ...], keywords: Mapping[str, Any]
) -> dict[str, Any]:
    """A call's arguments by name, with defaults, in the signature's types; errors as `build_settings`."""
    signature, model, others = inspect.signature(function), arguments_of(function), {}
    values = {**signature.bind_partial(*positional).arguments, **keywords}
    if any(p.kind == p.VAR_KEYWORD for p in signature.parameters.values()):
        others = {name: values.pop(name) for name in set(values) - model.model_fields.keys()}
    built = build_settings(model, values)
    return {**{name: getattr(built, name) for name in model.model_fields}, **others}


@cache
def arguments_of(function: Callable[..., Any]) -> type[Settings]:
    """The arguments of a public function as settings: names, types and defaults come from its signature,
    descriptions from its docstring."""
    from docstring_parser import parse

    texts = {part.arg_name: part.description for part in parse(function.__doc__ or "").params}
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind != p.VAR_KEYWORD]
    annotations = SimpleNamespace(__annotations__={p.name: p.annotation for p in parameters})
    names = {**globals(), **inspect.unwrap(function).__globals__}
    types = get_type_hints(annotations, names, include_extras=True)
    fields: dict[str, Any] = {}
    for parameter in parameters:
        default = ... if parameter.default is parameter.empty else parameter.default
        text = " ".join((texts.get(parameter.name) or "").split())
        fields[parameter.name] = (types[parameter.name], Field(default, description=text))
    return create_model(function.__name__, __base__=Settings, **fields)


def _joined(faults: Sequence[Any], names: list[str], where: str) -> str:
    """One line; missing settings are listed together."""
    by_setting: dict[tuple[Any, ...], Any] = {}  # one error of each: a union has one for each of its members
    for fault in faults:
        loc = fault["loc"]
        shorter = (loc[:end] for end in range(1, len(loc)))
        setting = next((part for part in shorter if ".".join(map(str, part)) in names), loc)
        by_setting.setdefault(setting, {**fault, "loc": setting})
    parts = [_explain(fault, names) for fault in by_setting.values() if fault["type"] != "missing"]
    missing = [".".join(map(str, loc)) for loc, fault in by_setting.items() if fault["type"] == "missing"]
    parts += [f"required and not given: {', '.join(missing)}"] if missing else []
    return (f"{where}: " if where else "") + "; ".join(dict.fromkeys(parts))


def _explain(error: Any, names: list[str]) -> str:
    name = ".".join(map(str, error["loc"]))
    value, message = error["input"], error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return unknown_setting(name, names)
    if not name or _is_joint(error):
        return str(message)
    if error["type"] == "literal_error":
        near = nearest(str(value), re.findall(r"'([^']*)'", error["ctx"]["expected"]))
        message += f"; did you mean '{near}'?" if near else ""
    return f"{name} = {value!r}: {message}"


def _is_joint(error: Any) -> bool:
    """Whether it is about settings that do not fit together; its message names them."""
    return error["type"] == "value_error" and isinstance(error["input"], Mapping | BaseModel)


def unknown_setting(name: str, names: list[str]) -> str:
    """Message for a name that does not exist, with the nearest one."""
    near = nearest(name, names)
    return f"unknown setting '{name}'" + (f", did you mean '{near}'?" if near else "")


def nearest(name: str, names: list[str]) -> str | None:
    """The one of `names` most like `name`, None where none is near. A name's last part (`beta`) finds it, and
    so does another program's name (`lr`)."""
    name = name.replace("-", "_")
    if (usual := _HABITS.get(name)) in names:
        return usual
    last_part = name.split(".")[-1]
    by_last_part = {known.split(".")[-1]: known for known in reversed(names)}
    if last_part in by_last_part:
        return by_last_part[last_part]
    for word, known in ((name, {known: known for known in names}), (last_part, by_last_part)):
        if close := difflib.get_close_matches(word, known, n=1, cutoff=0.6):
            return known[close[0]]
    return None


class Setting(NamedTuple):
    """A setting: dotted name (`distill.weights.hidden`), type, default, description, and whether required."""

    name: str
    type: Any
    default: Any
    text: str
    required: bool

    @property
    def is_list(self) -> bool:
        """Whether it takes several values."""
        return any(get_origin(part) in (list, Sequence) for part in self._parts)

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that it takes, if it takes only some."""
        parts = [get_args(part)[0] if get_origin(part) in (list, Sequence) else part for part in self._parts]
        words = [get_args(part) for part in parts if get_origin(part) is Literal]
        return sum(words, ()) if len(words) == len(parts) else ()

    @property
    def _parts(self) -> list[Any]:
        """The members of a union, without None."""
        kind = get_args(self.type)[0] if get_origin(self.type) is Annotated else self.type
        parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        return [part for part in parts if part is not NoneType]


def settings_in(model: type[Settings], prefix: str = "") -> Iterator[Setting]:
    """Every single setting of a settings class and of those nested in it."""
    for name, field in model.model_fields.items():
        inner, text = field.annotation, field.description or ""
        if isinstance(inner, type) and issubclass(inner, Settings):
            yield from settings_in(inner, f"{prefix}{name}.")
        else:
            default = None if field.is_required() else field.get_default()
            yield Setting(f"{prefix}{name}", inner, default, text, field.is_required())


def dotted_names(model: type[Settings]) -> list[str]:
    """Dotted name of every single setting (`distill.weights.hidden`)."""
    return [setting.name for setting in settings_in(model)]


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings merged into one; later ones win. A dotted key (`distill.beta`) becomes a nested one."""
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
    """The mapping in a YAML file. SettingsError: no file, not text, not YAML, no mapping, or a key twice."""
    try:
        loader = _Loader(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: cannot be read ({error})") from error
    lines: dict[KeyPath, int] = {}
    try:
        node = loader.get_single_node()
        if _collect_lines(node, (), lines, {}, str(path)) > MAX_NODES:
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
        raise SettingsError(f"{path}:1: expected names with values, got {str(values)[:60]}")
    return YamlFile(file=str(path), values=values, lines=lines)


def parse_scalar(text: str) -> Any:
    """One value as YAML reads it: `0.1` a number, `true` a boolean, `linear` a string."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def _collect_lines(
    node: Any, at: KeyPath, lines: dict[KeyPath, int], sizes: dict[int, int], file: str
) -> int:
    """Fill in the line of each key in `node`; return how many values it has once aliases are replaced. Each
    node is visited once; `sizes` holds the values of those that were."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = 1  # an alias to a node inside itself
    is_list = isinstance(node, yaml.SequenceNode)
    for index, item in enumerate(node.value):
        key, value = (None, item) if is_list else item
        if isinstance(key, yaml.CollectionNode):
            continue  # refused when the values are built
        path = (*at, str(index if key is None else key.value))
        line = (key or value).start_mark.line + 1
        if path in lines:
            raise SettingsError(f"{file}:{line}: '{path[-1]}' is given twice, first in line {lines[path]}")
        lines[path] = line
        sizes[id(node)] += _collect_lines(value, path, lines, sizes, file) + (not is_list)
    return sizes[id(node)]
