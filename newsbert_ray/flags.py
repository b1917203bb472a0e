"""Words of the command line -> checked values, one clear message where a word cannot be.

Loads jsonargparse, so that the command line imports it only once a verb is known. Knows no tensor and no Ray.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

from jsonargparse import ArgumentError
from pydantic import TypeAdapter, ValidationError

from newsbert_ray.arguments import CONTROL, SETTINGS, parser_for
from newsbert_ray.config import Settings, build_settings, nearest

S = TypeVar("S", bound=Settings)


class UsageError(Exception):
    """Words that no verb understands; the text is one whole message for a person."""


def settings_from(verb: str, model: type[S], words: list[str]) -> S:
    """The settings that `words` ask of `verb`, defaults filled in.

    Raises:
        UsageError, SettingsError: a flag or value that cannot be, by its name, with the nearest one that can.
    """
    return build_settings(model, values_from(verb, words), where="command line")


def values_from(verb: str, words: list[str]) -> dict[str, Any]:
    """Only the values that `words` (or the file behind `--config`) give, nested as in the settings.

    Raises:
        UsageError: an unknown flag, a value of the wrong kind or out of range, something missing.
    """
    if verb == "submit" and "--" in words:
        cut = words.index("--")
        return {**values_from(verb, words[:cut]), "command": words[cut + 1 :]}
    parser = parser_for(verb)
    words = _join_repeated(words, "--source") if verb == "prepare" else words
    whole = any(word.startswith("--print_config") for word in words)
    try:
        values = parser.parse_args(words, defaults=whole).as_dict()
    except ArgumentError as error:
        flags = sorted(flag.removeprefix("--") for flag in parser._option_string_actions)
        raise UsageError(_explain(str(error), words, flags=flags, model=SETTINGS.get(verb))) from error
    return {name: value for name, value in values.items() if name != "config"}


def sweep_from(words: list[str]) -> dict[str, Any]:
    """The words of `sweep`: space, out, resume, plan, curves; under `asked` what goes over the file.

    Raises:
        UsageError, SettingsError: as `values_from`; an axis that is none.
    """
    from newsbert_ray.tune.space_file import parse_vary

    values = values_from("sweep", words)
    control = {name: values.pop(name) for name in CONTROL if values.get(name) is not None}
    found = {name: values.pop(name, None) for name in ("space", "out", "resume", "plan", "curves")}
    concurrency, changes = values.pop("concurrency", None), values.pop("vary", None) or []
    vary = dict(map(parse_vary, changes))
    asked = {"overrides": values, "vary": vary, "control": control, "concurrency": concurrency}
    return {**found, "asked": asked}


def named_by(verb: str, words: list[str]) -> dict[str, Any]:
    """What a command names, by the setting's name, once all is checked that needs no data and no teacher.

    Raises:
        UsageError, SettingsError: what would end the command on a cluster ends it here.
    """
    if verb in ("prepare", "train"):
        named = settings_from(verb, SETTINGS[verb], words).model_dump()
    elif verb == "sweep":
        named = _named_by_sweep(words)
    else:
        named = values_from(verb, words)
    return {**named, "config": _following(words, "--config")}


def _named_by_sweep(words: list[str]) -> dict[str, Any]:
    from newsbert_ray.tune import space as spaces
    from newsbert_ray.tune.space_file import read_space
    from newsbert_ray.tune.trial import check_space

    given = sweep_from(words)
    asked, overrides = given["asked"], given["asked"]["overrides"]
    space = read_space(given["space"], task=overrides.get("task"))
    named = {**space.settings, **overrides}
    if not given["resume"]:  # which goes on with what stands in its folder
        space, _ = spaces.fix(spaces.vary(spaces.steer(space, asked["control"]), asked["vary"]), overrides)
        if all(axis.values is not None or not axis.divisors for axis in space.axes):
            check_space(space, out=Path(given["out"]), overrides=overrides)
    return {**given, **{name: named.get(name) for name in ("data", "teacher")}}


def _following(words: list[str], flag: str) -> str | None:
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word == flag or word.startswith(f"{flag}="):
            return word.partition("=")[2] or after
    return None


def help_text(verb: str) -> str:
    """Every flag of `verb` with its type, default and meaning."""
    return parser_for(verb).format_help()


def _join_repeated(words: list[str], flag: str) -> list[str]:
    """A flag that is given once for each value, as the one list that the parser reads."""
    values: list[str] = []
    others: list[str] = []
    position = 0
    while position < len(words):
        name, equals, value = words[position].partition("=")
        if name == flag and not equals and position + 1 < len(words):
            position += 1
            value = words[position]
        elif name != flag or not equals:
            others.append(words[position])
            position += 1
            continue
        values.append(value)
        position += 1
    return [*others, flag, json.dumps(values)] if values else others


_UNKNOWN = (
    r"unrecognized arguments: ([^\s=]+)",
    r"Group '(\S+)' does not accept option '(\S+)'",
    r"Option '(\S+)' is not accepted",
)


def _explain(message: str, words: list[str], *, flags: list[str], model: type[Settings] | None) -> str:
    """The parser's message as one line for a person: what is wrong, the value, what was expected."""
    for pattern in _UNKNOWN:
        if found := re.search(pattern, message):
            return _unknown(".".join(found.groups()), flags, given=words)
    if found := re.search(r"arguments are required: (.+)", message):
        return f"required and not given: {found[1]}"
    if found := re.search(r"argument (\S+): expected one argument", message):
        return f"{found[1]} needs a value"
    names = re.findall(r'Parser key "([^"]+)"', message)
    values = re.findall(r"(?:Got|Given) value: (.*)", message)
    if names and values:
        name, value = names[-1], values[-1]
        given = any(word.partition("=")[0] == f"--{name}" for word in words)
        where = "" if given or "--config" not in words else " (from the file of --config)"
        expected = _expected(model, name, value) if model else None
        return f"{name} = {value!r}{where}: {expected or _one_line(message)}"
    return _one_line(message)


def _one_line(message: str) -> str:
    text = " ".join(re.sub(r'Parser key "([^"]+)":', r"--\1:", message).split())
    return re.sub(r"<class '(\w+)'>", r"\1", text)


def _unknown(word: str, flags: list[str], *, given: list[str]) -> str:
    if word in given and not word.startswith("-"):
        return f"unexpected word '{word}'"
    near = nearest(word.lstrip("-"), flags)
    return f"unknown setting '{word}'" + (f", did you mean '--{near}'?" if near else "")


def _expected(model: type[Settings], name: str, value: str) -> str | None:
    """What the setting `name` takes, in the settings' own words; None where they find no fault."""
    *parts, last = name.split(".")
    for part in parts:
        inner = model.model_fields[part].annotation
        assert isinstance(inner, type)
        assert issubclass(inner, Settings)
        model = inner
    if last not in model.model_fields:
        return None
    field = model.model_fields[last]
    kind: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        return str(error.errors()[0]["msg"])
    return None
