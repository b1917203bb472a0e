"""Writes the reference pages: settings from config.py, flags from the command line, Python from __all__.

The pages are generated so that they cannot disagree with the code. Sphinx calls this at each build.
"""

from __future__ import annotations

import contextlib
import io
import os
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import newsbert_ray
from newsbert_ray.cli import VERBS, main
from newsbert_ray.config import PrepareSettings, Settings, TrainSettings

_SETTINGS = """\
# Settings

Every setting is a flag (`--distill.beta 0.1`), a key in a YAML file (`--config run.yaml`) and an argument of
the settings classes in Python. Defaults are the paper's values where the paper gives one. This page is
generated from `newsbert_ray/config.py`.
"""
_COMMAND_LINE = """\
# Command line

The text below is what `newsbert-ray VERB --help-all` prints; `--help` prints the settings that most people
need. Add `--debug` to any command to see the Python traceback of an error.
"""
_PYTHON = """\
# Python

Every verb of the command line is a function of the package `newsbert_ray`. This page is generated from the
docstrings.
"""


def write_pages(folder: Path) -> None:
    """Write settings.md, command_line.md and python.md into `folder`; unchanged pages are not touched."""
    folder.mkdir(exist_ok=True)
    pages = {
        "settings.md": settings_page(),
        "command_line.md": command_line_page(),
        "python.md": python_page(),
    }
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def settings_page() -> str:
    """Every setting with its type, default and meaning, from the fields of the settings classes."""
    train, prepare = _tables(TrainSettings, ""), _tables(PrepareSettings, "")
    return _page(_SETTINGS, "## train and sweep", *train, "## prepare", *prepare)


def command_line_page() -> str:
    """The help text of every verb, as the command line prints it."""
    parts = [_text_block(_printed(["--help"]))]
    for verb in VERBS:
        parts += [f"## {verb}", _text_block(_printed([verb, "--help-all"]))]
    return _page(_COMMAND_LINE, *parts)


def python_page() -> str:
    """Autodoc directives for every public name, functions first."""
    names = [name for name in newsbert_ray.__all__ if not name.startswith("__")]
    classes = [name for name in names if isinstance(getattr(newsbert_ray, name), type)]
    functions = [name for name in names if name not in classes]
    return _page(
        _PYTHON,
        "## Functions",
        *(_directive("autofunction", name) for name in functions),
        "## Classes",
        *(_directive("autoclass", name) for name in classes),
    )


def _page(*parts: str) -> str:
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _tables(model: type[Settings], prefix: str) -> Iterator[str]:
    """A table of a class's own fields, then a section for each nested class."""
    rows, nested = [], []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Settings):
            nested.append((f"{prefix}{name}", inner))
            continue
        default = "required" if field.is_required() else f"`{_yaml(field.default)}`"
        kind = ", ".join([_type_name(inner), *_limits(field.metadata)])
        rows.append(f"| `{prefix}{name}` | {kind} | {default} | {_cell(field.description or '')} |")
    yield "\n".join(["| setting | type | default | meaning |", "| --- | --- | --- | --- |", *rows])
    for name, inner in nested:
        yield f"{'####' if '.' in name else '###'} {name}"
        yield _cell(inner.__doc__ or "")
        yield from _tables(inner, f"{name}.")


def _type_name(kind: Any) -> str:
    """For people: `integer`, `number or none`, the choices of a Literal."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(argument) for argument in arguments)
    if origin is list:
        return f"list of {_type_name(arguments[0])}"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "none"}
    return names.get(kind) or str(getattr(kind, "__name__", kind))


def _limits(metadata: list[Any]) -> list[str]:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return [
        f"{sign} {getattr(part, name)}"
        for part in metadata
        for name, sign in signs.items()
        if hasattr(part, name)
    ]


def _yaml(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _cell(text: str) -> str:
    """One line that a Markdown table accepts."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _text_block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"


def _printed(words: list[str]) -> str:
    """What `newsbert-ray WORDS` prints."""
    os.environ.update(COLUMNS="100", NO_COLOR="1")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(words)
    if code:
        raise RuntimeError(f"newsbert-ray {' '.join(words)}: exit code {code}")
    return out.getvalue()


def _directive(kind: str, name: str) -> str:
    return f"```{{eval-rst}}\n.. {kind}:: newsbert_ray.{name}\n```"


if __name__ == "__main__":
    write_pages(Path(__file__).parent / "reference")
