"""Words of the command line -> checked values: each verb's parser, one clear message where a word cannot be.

Loads jsonargparse, so that the command line imports it only once a verb is known. Knows no tensor and no Ray.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse.typing import PositiveFloat, PositiveInt
from pydantic import TypeAdapter, ValidationError

from newsbert_ray.config import PrepareSettings, Settings, TrainSettings, build_settings, nearest

S = TypeVar("S", bound=Settings)

_SETTINGS: dict[str, type[Settings]] = {
    "prepare": PrepareSettings,
    "train": TrainSettings,
    "sweep": TrainSettings,
}


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
        raise UsageError(_explain(str(error), words, flags=flags, model=_SETTINGS.get(verb))) from error
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
        named = settings_from(verb, _SETTINGS[verb], words).model_dump()
    elif verb == "sweep":
        named = _named_by_sweep(words)
    else:
        named = values_from(verb, words)
    return {**named, "config": _following(words, "--config")}


def _named_by_sweep(words: list[str]) -> dict[str, Any]:
    from newsbert_ray.tune import space as spaces
    from newsbert_ray.tune.space_file import read_space

    given = sweep_from(words)
    asked, overrides = given["asked"], given["asked"]["overrides"]
    space = read_space(given["space"], task=overrides.get("task"))
    named = {**space.settings, **overrides}
    if not given["resume"]:  # which goes on with what stands in its folder
        space, _ = spaces.fix(spaces.vary(spaces.steer(space, asked["control"]), asked["vary"]), overrides)
        if all(axis.values is not None or not axis.divisors for axis in space.axes):
            spaces.check_space(space, out=Path(given["out"]), overrides=overrides)
    return {**given, **{name: named.get(name) for name in ("data", "teacher")}}


def _following(words: list[str], flag: str) -> str | None:
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word == flag or word.startswith(f"{flag}="):
            return word.partition("=")[2] or after
    return None


def help_text(verb: str) -> str:
    """Every flag of `verb` with its type, default and meaning."""
    return parser_for(verb).format_help()


def parser_for(verb: str) -> ArgumentParser:
    """The parser of one verb; building the others would cost start-up time."""
    parser = ArgumentParser(
        prog=f"newsbert-ray {verb}",
        usage=argparse.SUPPRESS,
        exit_on_error=False,
        allow_abbrev=False,
        default_env=False,
    )
    if verb in ("prepare", "train"):
        parser.add_argument("--config", action="config", help="YAML file of settings; flags go over it.")
        parser.add_class_arguments(_SETTINGS[verb])
    elif verb == "sweep":
        _add_sweep(parser)
    elif verb == "evaluate":
        _add_evaluate(parser)
    elif verb == "report":
        parser.add_argument(
            "folders",
            nargs="+",
            type=str,
            help="Runs or sweeps, every record at or below; files of --keep; or shards.",
        )
        parser.add_argument("--out", type=str, required=True, help="Folder for the tables and figures.")
        parser.add_argument(
            "--against",
            type=str,
            metavar="SETTING=VALUE",
            help="Rows that the others are compared with by a t-test over seeds, such as distill.beta=0; of "
            "several methods newsbert by default.",
        )
        parser.add_argument(
            "--keep",
            type=str,
            metavar="FILE.jsonl",
            help="Also keep the records in one small file, without this machine's places, to report again.",
        )
    elif verb == "export":
        _add_export(parser)
    elif verb == "embed":
        _add_embed(parser)
    elif verb == "similar":
        _add_similar(parser)
    elif verb == "bench":
        _add_bench(parser)
    elif verb == "doctor":
        _add_doctor(parser)
    elif verb == "submit":
        _add_submit(parser)
    elif verb == "synthesize-pairs":
        from newsbert_ray.data.synthetic_pairs import synthesize_pairs

        parser.add_function_arguments(synthesize_pairs)
    else:
        from newsbert_ray.data.synthetic import synthesize

        parser.add_function_arguments(synthesize)
    return parser


def _add_sweep(parser: ArgumentParser) -> None:
    parser.add_argument("space", type=str, help="Search space: a file as those in search_spaces/.")
    parser.add_argument(
        "--out", type=str, required=True, help="Folder of the sweep, with a folder for each run."
    )
    parser.add_argument("--resume", action="store_true", help="Go on with the sweep that stands in --out.")
    parser.add_argument(
        "--concurrency",
        type=PositiveInt,
        help="Trials at once; as many as there are cores by default. A cluster with Ray's autoscaler (v2) is "
        "asked for so many from the start.",
    )
    parser.add_argument(
        "--vary",
        action="append",
        help="NAME=VALUE,VALUE: other values for an axis, or a new one; may be repeated.",
    )
    parser.add_argument(
        "--plan", action="store_true", help="Only measure a few steps and print what the sweep will take."
    )
    parser.add_argument(
        "--curves", type=str, help="With --plan: an earlier sweep, to replay early stopping on its curves."
    )
    parser.add_argument("--data", type=str, help="Folder of shards; overrides the search space's.")
    parser.add_argument("--teacher", type=str, help="Encoder; overrides the search space's.")
    parser.add_class_arguments(TrainSettings, skip={"data", "teacher", "out"})
    _add_control(parser)


CONTROL = ("search", "stopping", "limits", "prices", "gpus", "keep_students")
"""Parts of a search space that the command line may set over its file."""


def _add_control(parser: ArgumentParser) -> None:
    from newsbert_ray.tune.space import Limits, Prices, Search, Stopping

    for name, model in zip(CONTROL, (Search, Stopping, Limits, Prices), strict=False):
        parser.add_class_arguments(model, name)
    parser.add_argument("--gpus", type=PositiveFloat, help="GPUs of each worker of a trial, such as 0.25.")
    parser.add_argument(
        "--keep_students", type=PositiveInt, help="Students kept: those of the best trials; 10 by default."
    )


def _add_evaluate(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=str, help="Folder of a finished run.")
    parser.add_argument("--data", type=str, help="Folder of shards; the run's own by default.")
    parser.add_argument(
        "--split", choices=["train", "validation", "test"], default="test", help="Which split."
    )
    parser.add_argument(
        "--submission",
        type=str,
        metavar="FILE",
        help="Of a recommendation run: also write MIND's prediction file (.zip or .txt), and check it.",
    )
    parser.add_argument(
        "--show", type=str, metavar="USER", help="Instead: what this user read, and the candidates as ranked."
    )
    parser.add_argument(
        "--model", choices=["student", "teacher"], default="student", help="Whose ranking those are."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")


def _add_export(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=str, help="Folder of a finished run, or its URL.")
    parser.add_argument(
        "--to",
        choices=["hf", "sentence-transformers", "onnx"],
        required=True,
        help="For which library: transformers (hf), Sentence Transformers, or onnxruntime.",
    )
    parser.add_argument("--out", type=str, required=True, help="Folder for the exported model.")
    parser.add_argument(
        "--int8", action="store_true", help="Of onnx: also a model of 8-bit weights, model_int8.onnx."
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace an earlier export.")


def _add_embed(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=str, help="Folder of a finished run, or its URL.")
    parser.add_argument(
        "--input",
        type=str,
        nargs="+",
        required=True,
        help="MIND's news.tsv, or .jsonl or .parquet with news_id or id, and title or text.",
    )
    parser.add_argument("--out", type=str, required=True, help="Folder for the shards of embeddings.")
    parser.add_argument(
        "--workers",
        type=int,
        help="Pieces embedded at once, a core each; all cores by default, 0 works in this process.",
    )
    parser.add_argument(
        "--max_rejected_share", type=float, default=0.01, help="More bad rows than this share is an error."
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace embeddings of other texts.")


def _add_similar(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("vectors", type=str, help="Folder that `newsbert-ray embed` wrote.")
    add("--to", type=str, metavar="ID_OR_TEXT", help="Texts like this one: an id among them, or any text.")
    add(
        "--read",
        type=str,
        nargs="+",
        default=[],
        metavar="ID",
        help="For a user who read these, oldest first.",
    )
    add("--user", type=str, help="For a user of MIND's behaviors.tsv, after the last of their histories.")
    add("--behaviors", type=str, help="That file.")
    add("--run", type=str, help="The run that embedded them, where it has moved since.")
    add("--top", type=PositiveInt, default=10, help="How many.")
    add("--json", action="store_true", help="Print JSON instead of a table.")


def _add_bench(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "models",
        type=str,
        nargs="+",
        help="Finished runs, each its student and teacher; or random:LAYERSxWIDTH, a BERT of random weights.",
    )
    add(
        "--input",
        type=str,
        help="news.tsv, .jsonl or .parquet to take titles from; else invented ones.",
    )
    add("--titles", type=PositiveInt, default=2000, help="Titles of a round.")
    add("--alone", type=PositiveInt, default=200, help="So many also one at a time, for percentiles.")
    add("--rounds", type=PositiveInt, default=5, help="Rounds, in which all models take turns.")
    add("--threads", type=PositiveInt, nargs="+", default=[1], help="Numbers of CPU threads to try.")
    add("--out", type=str, help="Folder for bench.json, a page and a figure.")


def _add_doctor(parser: ArgumentParser) -> None:
    parser.add_argument("--data", type=str, help="Folder of shards to look at.")
    parser.add_argument("--out", type=str, help="Where results are to go: a folder or a URL such as s3://...")
    parser.add_argument(
        "--address",
        type=str,
        help="Cluster: its dashboard's http(s)://HOST:PORT or its head's HOST:PORT; RAY_ADDRESS or "
        "RAY_API_SERVER_ADDRESS by default.",
    )
    parser.add_argument(
        "--teacher", type=str, help="Encoder that is to teach: a name, a folder or `scratch`."
    )
    parser.add_argument("--deep", action="store_true", help="Compare each shard's hash too; reads them all.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of lines.")


def _add_submit(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--address",
        type=str,
        help="Cluster's dashboard, http(s)://HOST:PORT; RAY_API_SERVER_ADDRESS by default.",
    )
    add(
        "--token_file",
        type=str,
        metavar="FILE",
        help="File with the cluster's token; RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token by "
        "default. It is shown only to a cluster that asks for one.",
    )
    add(
        "--working_dir",
        type=str,
        default=".",
        help="Folder that is sent (at most 100 MB on disk), and that the verb's relative paths start from; "
        "runs, data, caches, weights and what .gitignore or .rayignore names stay here. newsbert_ray itself "
        "goes along from anywhere.",
    )
    add("--include", action="append", metavar="PATTERN", help="Send this too, such as /shards/; repeatable.")
    add(
        "--exclude",
        action="append",
        metavar="PATTERN",
        help="Leave this here, as in a .gitignore; repeatable.",
    )
    add(
        "--env",
        action="append",
        metavar="NAME=VALUE",
        help="Variable of the job and its workers; repeatable. No secret: all who see the cluster see it.",
    )
    add(
        "--pip",
        type=str,
        metavar="FILE",
        help="Requirements that each node installs first, such as constraints.txt: for clusters without our "
        "image. Takes minutes.",
    )
    add("--id", type=str, metavar="JOB", help="The job's name; made of verb and time by default.")
    add(
        "--no_wait",
        action="store_true",
        help="Return once it is sent, without following its log; results are in the verb's own --out.",
    )
    add("--logs", type=str, metavar="JOB", help="Instead: follow a job's log from its beginning.")
    add(
        "--stop", type=str, metavar="JOB", help="Instead: stop a job, as Ctrl-C would, and wait until it has."
    )
    add("--list", action="store_true", help="Instead: show the cluster's jobs.")


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
