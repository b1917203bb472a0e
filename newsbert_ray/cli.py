"""newsbert-ray VERB: reads flags, calls one public function, and prints its result.

Flags come from the functions' signatures and docstrings. Imports are late, so that --help answers at once.
"""

from __future__ import annotations

import difflib
import errno
import inspect
import json
import logging
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir
from functools import cache
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import newsbert_ray
from newsbert_ray import screens

if TYPE_CHECKING:
    from newsbert_ray.settings import Setting, Settings


class Verb(NamedTuple):
    """Words of an example, and the settings that --help shows (all if there are none here)."""

    example: str
    basics: str = ""


GROUPS: Mapping[str, Mapping[str, Verb]] = {
    "Prepare data": {
        "prepare": Verb(
            "--source MINDsmall_train --source MINDsmall_dev --teacher bert-base-uncased --out shards",
            "source columns.text columns.label teacher out max_tokens validation_share test_share workers"
            " overwrite config",
        ),
        "synthesize": Verb("--out corpus"),
        "synthesize-pairs": Verb("--out tables"),
    },
    "Train": {
        "train": Verb(
            "--data shards --teacher bert-base-uncased --student.layers 2 --out runs/first",
            "data teacher out task method student.layers distill.beta epochs batch_size learning_rate seed"
            " workers overwrite config",
        ),
        "sweep": Verb(
            "search_spaces/paper_beta.yaml --data shards --teacher bert-base-uncased --out runs/beta",
            "space out data teacher plan resume overwrite concurrency vary search.trials limits.hours epochs"
            " gpus config",
        ),
    },
    "Look at results": {
        "evaluate": Verb("runs/first --split test"),
        "report": Verb("runs/beta --out report"),
        "bench": Verb("runs/first random:12x768 random:2x768 --out speed"),
    },
    "Use a student": {
        "export": Verb("runs/first --to sentence-transformers --out encoder"),
        "predict": Verb("runs/first --input titles.txt --out topics.csv"),
        "embed": Verb("runs/first --input MINDsmall_dev/news.tsv --out vectors"),
        "similar": Verb("vectors --to N55528"),
    },
    "Machine and cluster": {
        "doctor": Verb("--data shards --teacher bert-base-uncased --out runs"),
        "submit": Verb(
            "--address http://127.0.0.1:8265 -- sweep search_spaces/cloud.yaml --data s3://BUCKET/shards"
            " --teacher bert-base-uncased --out s3://BUCKET/cloud",
            "address working_dir include env pip id wait logs stop list",
        ),
    },
}
VERBS = {name: verb for verbs in GROUPS.values() for name, verb in verbs.items()}
_PYTHON_ONLY = ("say", "train", "overrides", "control")
_EXTRA = {
    "plan": (bool, ("sweep",), "Only measure a few steps, and print what the sweep will take."),
    "overwrite": (bool, ("train",), "Replace an earlier run in `out`."),
    "json": (bool, ("evaluate", "similar", "doctor"), "Print JSON instead of text."),
    "config": (str, tuple(VERBS), "YAML file of settings; flags override it."),
}
"""Flags that only the command line has: their types, verbs and descriptions."""
_BOOL = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 done, 1 failed, 2 wrong command, 130 stopped by Ctrl-C, 143 by
    SIGTERM; of a submitted job its own."""
    try:
        code = _main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _main(words: list[str]) -> int:
    end = words.index("--") if "--" in words else len(words)  # a submitted job's own command comes after it
    words, job_words = words[:end], words[end:]
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    verb, *rest = words or [""]
    if verb in VERBS:
        if {"-h", "--help", "--help-all"} & {*rest}:
            print(_help(verb, everything="--help-all" in rest))
            return 0
        return _run(verb, [*rest, *job_words], debug=debug)
    sentences = {title: {verb: _sentence(verb) for verb in verbs} for title, verbs in GROUPS.items()}
    option, _, shell = verb.partition("=")
    shell = shell or "".join(rest)
    if verb in ("-h", "--help", "--help-all", "help"):
        print(screens.overview(sentences))
    elif verb == "--version":
        print(f"newsbert-ray {newsbert_ray.__version__}")
    elif option == "--print_completion" and shell in ("bash", "zsh"):
        print(screens.completion(shell, {verb: list(_flags(verb).values()) for verb in VERBS}))
    else:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f", did you mean '{near[0]}'?" if near else f"; one of {', '.join(VERBS)}"
        wrong = f"newsbert-ray: unknown verb '{verb}'{hint}"
        if option == "--print_completion":
            wrong = "newsbert-ray: --print_completion needs bash or zsh"
        print(wrong if verb else screens.overview(sentences), file=sys.stderr)
        return 2
    return 0


def _run(verb: str, words: list[str], *, debug: bool) -> int:
    """Run a verb and return its exit code; print an exception as one line, with `debug` as a traceback."""
    from newsbert_ray.ray_session import StopSignals

    _configure_logging(debug=debug)
    try:
        with StopSignals():
            return _call(verb, parse(verb, words))
    except KeyboardInterrupt as stop:
        print(f"\nnewsbert-ray {verb}: stopped{f'; {stop}' if str(stop) else ''}", file=sys.stderr)
        return 128 + getattr(stop, "number", signal.SIGINT)
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug:
            raise
        failure, message = _describe(error)
        hint = f" (all settings: newsbert-ray {verb} --help-all)" if failure == 2 else ""
        print(f"newsbert-ray {verb}: {message}{hint}", file=sys.stderr)
        return failure


def _call(verb: str, values: dict[str, Any]) -> int:
    """Call the verb's function, print its result, and return the exit code."""
    as_json, plan, curves = (values.pop(name, None) for name in ("json", "plan", "curves"))
    if plan:
        values.pop("resume", None)
        newsbert_ray.preview(**values, curves=curves)
        return 0
    if verb in ("bench", "predict"):
        values["say"] = lambda line: print(line, file=sys.stderr)
    result = _function(verb)(**values)
    if verb == "submit":
        return int(result)
    if verb not in ("prepare", "train", "embed", "predict"):  # these print their own results
        screens.print_result(verb, result, values, as_json=bool(as_json))
    return 0


def _describe(error: BaseException) -> tuple[int, str]:
    """Exit code and message: our own errors and the system's as they are, others as internal errors."""
    from newsbert_ray.settings import SettingsError

    for cause in _causes(error):
        if type(cause).__module__.startswith("newsbert_ray."):
            return 2 if isinstance(cause, SettingsError) else 1, str(cause)
    if isinstance(error, OSError) and error.errno is None:
        return 1, " ".join(str(error).split())
    if isinstance(error, OSError):
        file = f"{error.filename}: " if error.filename else ""
        cure = "; free some space and run the same command again" if error.errno == errno.ENOSPC else ""
        return 1, f"{file}{error.strerror}{cure}"
    line = next(iter(str(error).splitlines()), "")
    return 1, f"internal error: {type(error).__name__}: {line}; run it again with --debug for the traceback"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and its causes; Ray's wrappers are left out, because their text is a whole traceback."""
    while error is not None:
        wrapped = getattr(error, "cause", None)
        if isinstance(wrapped, BaseException):
            error = wrapped
        else:
            yield error
            error = error.__cause__


def _configure_logging(*, debug: bool) -> None:
    """Print our own log lines on stderr; silence the libraries' progress bars and advice."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("newsbert_ray").setLevel(logging.DEBUG if debug else logging.INFO)
    if debug:
        return
    warnings.simplefilter("ignore")
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def _function(verb: str) -> Callable[..., Any]:
    """The public function behind a verb."""
    return cast(Callable[..., Any], getattr(newsbert_ray, verb.replace("-", "_")))


@cache
def settings_of(verb: str) -> type[Settings]:
    """Everything that the function of a verb takes, as one settings class."""
    from pydantic import create_model
    from pydantic.fields import FieldInfo

    from newsbert_ray.config import PrepareSettings, TextColumns, TrainSettings
    from newsbert_ray.settings import Settings, arguments_of

    if verb in ("prepare", "train"):
        return PrepareSettings if verb == "prepare" else TrainSettings
    fields = {**arguments_of(_function(verb)).model_fields}
    if verb == "sweep":
        from newsbert_ray.tune.space import PARTS, SearchSpace

        training = TrainSettings.model_fields
        fields |= {name: field for name, field in training.items() if name != "out"}
        fields |= {name: SearchSpace.model_fields[name] for name in PARTS}
        fields["curves"] = arguments_of(newsbert_ray.preview).model_fields["curves"]
        for name in ("data", "teacher"):
            text = f"{training[name].description} By default the search space's."
            fields[name] = FieldInfo(annotation=cast(Any, str | None), default=None, description=text)
    if verb in ("embed", "predict"):
        fields["columns"] = FieldInfo(annotation=TextColumns, default=TextColumns())
    typed: Any = {name: (field.annotation, field) for name, field in fields.items()}
    return create_model(verb, __base__=Settings, **{n: typed[n] for n in typed if n not in _PYTHON_ONLY})


def _flags(verb: str) -> dict[str, Setting]:
    """The flags of a verb by their names: its settings, and what only the command line has."""
    from newsbert_ray.settings import Setting, settings_in

    flags = {setting.name: setting for setting in settings_in(settings_of(verb))}
    for name, (kind, verbs, text) in _EXTRA.items():
        if verb in verbs:
            flags[name] = Setting(name, kind, None, text, False)
    return flags


def _positionals(verb: str) -> list[str]:
    """Settings of a verb that are given as words without a flag."""
    parameters = inspect.signature(_function(verb)).parameters.values()
    words = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
    return [name for name in words if name not in ("settings", "command", "out")]


def parse(verb: str, words: Sequence[str]) -> dict[str, Any]:
    """The values that `words` (and the file of --config) set, nested as in the settings, without defaults.
    SettingsError for one that is wrong, unknown or missing, in the words of the Python functions."""
    from jsonargparse import ArgumentError, ArgumentParser

    from newsbert_ray.settings import SettingsError, check_each, merge, parse_scalar

    model = settings_of(verb)
    end = words.index("--") if "--" in words else len(words)
    values = _read_words(verb, words[:end])
    extra = {name: values.pop(name) for name in _EXTRA if name in values}
    print_config = [word for word in words[:end] if word.startswith("--print_config")]
    if verb == "submit" and words[end + 1 :]:
        values["command"] = list(words[end + 1 :])
    config = extra.pop("config", None)
    file_values = {} if config is None else _read_config(config, model)
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, default_env=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(model)
    flags = [f"--{name}={v if isinstance(v, str) else json.dumps(v)}" for name, v in values.items()]
    before = [] if config is None else [f"--config={config}"]
    try:
        parsed = parser.parse_args([*before, *flags, *print_config], defaults=bool(print_config)).as_dict()
    except ArgumentError as error:
        numbers = {name: parse_scalar(value) for name, value in values.items() if isinstance(value, str)}
        typed = {name: value for name, value in numbers.items() if isinstance(value, int | float | NoneType)}
        check_each(model, merge(file_values, values, typed), complete=True)
        raise SettingsError(" ".join(str(error).split())) from error
    parsed.pop("config", None)
    check_each(model, parsed)  # ranges, which the parser does not check everywhere
    return parsed | {name: value == "true" for name, value in extra.items()}


def _read_words(verb: str, words: Sequence[str]) -> dict[str, Any]:
    """The text of each value by its setting's name; a list for a setting that takes several."""
    from newsbert_ray.settings import SettingsError

    flags, positionals = _flags(verb), _positionals(verb)
    values: dict[str, Any] = {}
    waiting = deque(word for word in words if not word.startswith("--print_config"))
    while waiting:
        word = waiting.popleft()
        if not word.startswith("--"):
            free = [name for name in positionals if flags[name].is_list or name not in values]
            if not free:
                raise SettingsError(f"unexpected word '{word}'")
            values[free[0]] = [*values.get(free[0], []), word] if flags[free[0]].is_list else word
            continue
        name, equals, value = word[2:].partition("=")
        flag, negated = _find_flag(name, value if equals else next(iter(waiting), ""), flags)
        if flag.type is bool:
            if not equals:
                value = waiting.popleft() if waiting and waiting[0].lower() in _BOOL else "true"
            switch = _BOOL.get(value.lower())
            if switch is None and flag.name in _EXTRA:
                raise SettingsError(f"{flag.name} = {value!r}: expected true or false")
            values[flag.name] = value if switch is None else str(switch != negated).lower()
            continue
        if not equals:
            if not waiting or waiting[0].startswith("--"):
                raise SettingsError(f"--{name} needs a value")
            value = waiting.popleft()
        if not flag.is_list:
            values[name] = value
            continue
        values[name] = [*values.get(name, []), *_items(value)]
        while not equals and waiting and waiting[0][:2] != "--" and values.keys() >= {*positionals}:
            values[name].append(waiting.popleft())
    return values


def _find_flag(name: str, value: str, flags: Mapping[str, Setting]) -> tuple[Setting, bool]:
    """The flag that a word names, and whether the word negates it (--no-resume). A group of settings is one,
    too, for a mapping or a YAML file: --distill '{beta: 0.2}'."""
    from newsbert_ray.settings import Setting, SettingsError, unknown_setting

    if name in flags:
        return flags[name], False
    if any(known.startswith(f"{name}.") for known in flags) and (value[:1] == "{" or os.path.isfile(value)):
        return Setting(name, str, None, "", False), False
    if name[:3] in ("no-", "no_") and (flag := flags.get(name[3:])) and flag.type is bool:
        return flag, True
    raise SettingsError(unknown_setting(name, list(flags)))


def _items(value: str) -> list[str]:
    """One value of a list, or several that are written as a YAML list ([a, b])."""
    from newsbert_ray.settings import parse_scalar

    items = parse_scalar(value) if value.startswith("[") else value
    return [str(item) for item in items] if isinstance(items, list) else [value]


def _read_config(path: str, model: type[Settings]) -> dict[str, Any]:
    """The settings in the file of --config, each checked by itself."""
    from newsbert_ray.settings import SettingsError, check_each, read_yaml

    try:
        values = read_yaml(path).values
    except SettingsError as error:
        raise SettingsError(f"--config {error}") from error
    check_each(model, values, where=path)
    return values


def check_command(command: Sequence[str], *, folder: Path) -> dict[str, Any]:
    """Check a job's command as far as possible without its data and teacher: SettingsError for what would
    fail on the cluster. Relative paths start from `folder`. Returns the command's settings by name."""
    from newsbert_ray.settings import SettingsError, build_settings

    verb, *words = command
    possible = [name for name in VERBS if name != "submit"]
    if verb not in possible:
        raise SettingsError(f"-- {verb}: cannot be submitted; one of {', '.join(possible)}")
    if not folder.is_dir():
        raise SettingsError(f"--working_dir {folder}: no such folder")
    words = [word for word in words if word != "--debug"]
    try:
        with chdir(folder):
            values = parse(verb, words)
            values = {name: value for name, value in values.items() if name not in _EXTRA or verb == "sweep"}
            if verb in ("prepare", "train"):
                values = build_settings(settings_of(verb), values).model_dump()
            elif verb == "sweep":
                from newsbert_ray.tune.space_file import check_sweep

                values |= check_sweep(**values)
            return {**values, "config": _read_words(verb, words).get("config")}
    except SettingsError as error:
        raise SettingsError(f"{verb}: {error}") from error


def _sentence(verb: str) -> str:
    """What a verb does: the first paragraph of its function's docstring."""
    return " ".join((_function(verb).__doc__ or "").partition("\n\n")[0].split())


def _help(verb: str, *, everything: bool) -> str:
    flags, basics = _flags(verb), VERBS[verb].basics.split()
    shown = [flags[name] for name in (basics if basics and not everything else flags)]
    notes = ["The search space may set other defaults for training settings."] if verb == "sweep" else []
    if len(shown) < len(flags):
        notes.append(f"newsbert-ray {verb} --help-all shows all {len(flags)} settings.")
    example = f"newsbert-ray {verb} {VERBS[verb].example}"
    words = _positionals(verb)
    text = screens.help_text(_sentence(verb), example, shown, positionals=words, grouped=everything)
    return "\n\n".join([text, *notes])


if __name__ == "__main__":
    sys.exit(main())
