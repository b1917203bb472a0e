"""newsbert-ray VERB: parse, call one function of the package, print. Each verb loads only what it needs."""

from __future__ import annotations

import difflib
import errno
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Verb(NamedTuple):
    """A word of the command line: what it does in one sentence, an example, and the function that does it,
    which may return an exit code."""

    sentence: str
    example: str
    run: Callable[[list[str]], int | None]


def main(argv: list[str] | None = None) -> int:
    """Run one verb.

    Returns:
        The exit code: 0 done, 1 failed, 2 a command that cannot be, 130 stopped by Ctrl-C; of a submitted
        job its own.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)  # behind it stand a submitted job's words
    words, sent = words[:cut], words[cut:]
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words:
        print(_overview(), file=sys.stderr)
        return 2
    if words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        from newsbert_ray import __version__

        print(f"newsbert-ray {__version__}")
        return 0
    name, *rest = words
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1)
        hint = f", did you mean '{near[0]}'?" if near else f"; one of {', '.join(VERBS)}"
        print(f"newsbert-ray: unknown verb '{name}'{hint}", file=sys.stderr)
        return 2
    if "--help" in rest or "-h" in rest:
        _print_help(name)
        return 0
    return _run(name, [*rest, *sent], debug=debug)


def _run(name: str, words: list[str], *, debug: bool) -> int:
    """The verb's exit code; what it raises becomes one message, with `debug` its frames."""
    _configure_logging(debug=debug)
    try:
        code = VERBS[name].run(words)
        sys.stdout.flush()
    except KeyboardInterrupt:
        again = _GO_ON.get(name, "the same command")
        print(f"\nnewsbert-ray {name}: stopped; {again} goes on where it was", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        failure, message = _describe(error)
        hint = f" (every setting: newsbert-ray {name} --help)" if failure == 2 else ""
        print(f"newsbert-ray {name}: {message}{hint}", file=sys.stderr)
        return failure
    return code or 0


def _describe(error: BaseException) -> tuple[int, str]:
    """Exit code and message: our own errors and the system's as they are, the rest as ours to mend."""
    from newsbert_ray.config import SettingsError
    from newsbert_ray.flags import UsageError

    for cause in _causes(error):
        if isinstance(cause, UsageError | SettingsError):
            return 2, str(cause)
        if type(cause).__module__.startswith("newsbert_ray."):
            return 1, str(cause)
    if isinstance(error, OSError):
        return 1, _describe_system(error)
    first = next(iter(str(error).splitlines()), "")
    return 1, f"internal error: {type(error).__name__}: {first}; run it again with --debug for the frames"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and those below it; of Ray's wrappers only what they wrap, their text is a whole trace."""
    current: BaseException | None = error
    for _ in range(10):
        if current is None:
            return
        below = getattr(current, "cause", None)
        if not isinstance(below, BaseException):
            yield current
            below = current.__cause__
        current = below


def _describe_system(error: OSError) -> str:
    if error.errno is None:
        return " ".join(str(error).split())
    where = f"{error.filename}: " if error.filename else ""
    cure = "; free some space and run the same command again" if error.errno == errno.ENOSPC else ""
    return f"{where}{error.strerror}{cure}"


def _configure_logging(*, debug: bool) -> None:
    """Our own lines plain on stderr; the libraries speak only of trouble, and not at all in progress bars."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("newsbert_ray").setLevel(logging.DEBUG if debug else logging.INFO)
    if debug:
        return
    warnings.simplefilter("ignore")
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


_GO_ON = {"sweep": "the same command with --resume"}

_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
}


def _prepare(words: list[str]) -> None:
    from newsbert_ray.config import PrepareSettings
    from newsbert_ray.flags import settings_from

    settings = settings_from("prepare", PrepareSettings, words)
    from newsbert_ray.data.prepare import prepare

    prepare(settings)


def _train(words: list[str]) -> None:
    from newsbert_ray.config import TrainSettings
    from newsbert_ray.flags import settings_from

    settings = settings_from("train", TrainSettings, words)
    from newsbert_ray.training.run import train

    train(settings)


def _sweep(words: list[str]) -> None:
    from newsbert_ray.flags import sweep_from

    given = sweep_from(words)
    space, out, asked = given["space"], given["out"], given["asked"]
    if given["plan"]:
        from newsbert_ray.tune.preview import preview

        preview(space, out=out, curves=given["curves"], **asked)
        return
    from newsbert_ray.tune.plan import SweepError
    from newsbert_ray.tune.search import sweep

    result = sweep(space, out=out, resume=bool(given["resume"]), **asked)
    if result.best is None:
        raise SweepError(f"{out}: no trial finished; the reasons stand above")
    if result.failures:
        raise SweepError(f"{out}: {len(result.failures)} trials failed; the reasons stand above")


def _evaluate(words: list[str]) -> None:
    from newsbert_ray.flags import values_from

    values = values_from("evaluate", words)
    as_json, user = values.pop("json", False), values.pop("show", None)
    if user is not None:
        _show(values.pop("run"), user, as_json=as_json, **values)
        return
    from newsbert_ray.evaluation.evaluate import evaluate
    from newsbert_ray.screens import print_metrics

    metrics = evaluate(values.pop("run"), **values)
    if as_json:
        print(json.dumps(metrics, indent=1))
    else:
        print_metrics(metrics)


def _show(run: str, user: str, *, as_json: bool, **values: Any) -> None:
    from dataclasses import asdict

    from newsbert_ray.config import SettingsError

    if values.pop("submission", None) is not None:
        raise SettingsError("--show prints one user and writes no file; give --submission without it")
    from newsbert_ray.evaluation.showing import show
    from newsbert_ray.screens import print_shown

    found = show(run, user, **values)
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=1))
    else:
        print_shown(found, model=values.get("model", "student"))


def _report(words: list[str]) -> None:
    from newsbert_ray.flags import values_from

    values = values_from("report", words)
    from newsbert_ray.reporting.report import report

    for path in report(**values):
        print(path)


def _export(words: list[str]) -> None:
    from newsbert_ray.flags import values_from

    values = values_from("export", words)
    from newsbert_ray.serving.export import export

    written = export(**values)
    for path in written:
        print(path)
    print(f"{written[0]} says how to load it")


def _embed(words: list[str]) -> None:
    from newsbert_ray.flags import values_from

    values = values_from("embed", words)
    from newsbert_ray.serving.embed import embed

    embed(**values)


def _similar(words: list[str]) -> None:
    from newsbert_ray.flags import values_from

    values = values_from("similar", words)
    as_json = values.pop("json", False)
    from newsbert_ray.screens import print_answer
    from newsbert_ray.serving.similar import similar

    answer = similar(**values)
    if as_json:
        print(json.dumps([one._asdict() for one in answer.found], indent=1))
    else:
        print_answer(answer)


def _bench(words: list[str]) -> None:
    from newsbert_ray.flags import values_from

    values = values_from("bench", words)
    from newsbert_ray.screens import print_table
    from newsbert_ray.serving.latency import bench
    from newsbert_ray.serving.timings import timings_table

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    print_table(timings_table(bench(**values, say=say), narrow=True))
    if values.get("out"):
        print(f"bench.md, bench.json and the figure are in {values['out']}")


def _synthesize(words: list[str]) -> None:
    from newsbert_ray.config import SettingsError
    from newsbert_ray.flags import values_from

    values = values_from("synthesize", words)
    from newsbert_ray.data.synthetic import synthesize

    try:
        folders = synthesize(**values)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    print("\n".join(str(folder) for folder in folders))


def _synthesize_pairs(words: list[str]) -> None:
    from newsbert_ray.config import SettingsError
    from newsbert_ray.flags import values_from

    values = values_from("synthesize-pairs", words)
    from newsbert_ray.data.synthetic_pairs import synthesize_pairs

    try:
        tables = synthesize_pairs(**values)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    print("\n".join(str(table) for table in tables))


def _doctor(words: list[str]) -> None:
    from newsbert_ray.flags import values_from

    values = values_from("doctor", words)
    as_json = values.pop("json", False)
    from newsbert_ray.deploy.doctor import DoctorError, doctor
    from newsbert_ray.screens import print_finding

    findings = []
    for finding in doctor(**values):
        findings.append(finding)
        if not as_json:
            print_finding(finding)
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings], indent=1))
    if ill := sum(finding.state == "mend" for finding in findings):
        raise DoctorError(f"{ill} to mend; what to do stands {'under cure' if as_json else 'below each'}")


def _submit(words: list[str]) -> int:
    from contextlib import chdir

    from newsbert_ray.flags import UsageError, named_by, values_from

    values = values_from("submit", words)
    command = values.pop("command", [])
    from newsbert_ray.config import SettingsError
    from newsbert_ray.deploy.job import Parcel, read_variables
    from newsbert_ray.deploy.submit import Cluster, list_jobs, show_log, stop_job, submit

    cluster = Cluster(values.get("address"), values.get("token_file"))
    job, log, ended = values.get("id"), values.get("logs"), values.get("stop")
    if sum(map(bool, (command, log, ended, values.get("list")))) != 1:
        raise SettingsError("give one of: -- VERB SETTINGS, --logs JOB, --stop JOB, --list")
    if log:
        return show_log(log, cluster=cluster)
    if ended:
        return stop_job(ended, cluster=cluster)
    if not command:
        return list_jobs(cluster=cluster)
    verb, *rest = command
    able = [name for name in VERBS if name != "submit"]
    if verb not in able:
        raise SettingsError(f"-- {verb}: no verb to submit; one of {', '.join(able)}")
    folder = values.get("working_dir", ".")
    parcel = Parcel(
        folder=folder,
        include=tuple(values.get("include") or ()),
        exclude=tuple(values.get("exclude") or ()),
        variables=read_variables(values.get("env") or ()),
        pip=values.get("pip"),
    )
    if not os.path.isdir(folder):
        raise SettingsError(f"--working_dir {folder}: no folder there")
    try:
        with chdir(folder):
            named = named_by(verb, [word for word in rest if word != "--debug"])
    except (UsageError, SettingsError) as error:
        raise SettingsError(f"{verb}: {error}") from error
    wait = not values.get("no_wait")
    return submit(command, cluster=cluster, parcel=parcel, named=named, job=job, wait=wait)


VERBS = {
    "prepare": Verb(
        "Turn MIND's files, or tables of pairs, into tokenised Parquet shards, once for every run and sweep.",
        "newsbert-ray prepare --source MINDsmall_train --source MINDsmall_dev --teacher bert-base-uncased"
        " --out shards",
        _prepare,
    ),
    "train": Verb(
        "Distil one student: teacher and student learn together, and a record of the run is left behind.",
        "newsbert-ray train --data shards --teacher bert-base-uncased --student.layers 2 --out runs/first",
        _train,
    ),
    "sweep": Verb(
        "Search how best to distil: every run of a search space, shared out over the machine or the cluster.",
        "newsbert-ray sweep search_spaces/paper_beta.yaml --data shards --teacher bert-base-uncased"
        " --out runs/beta",
        _sweep,
    ),
    "submit": Verb(
        "Send one of these verbs to a Ray cluster as a job, follow its log, hand its exit code back.",
        "newsbert-ray submit --address http://127.0.0.1:8265 -- sweep search_spaces/cloud.yaml"
        " --data s3://BUCKET/shards --teacher bert-base-uncased --out s3://BUCKET/cloud",
        _submit,
    ),
    "evaluate": Verb(
        "Measure a finished run's models on a split; write MIND's prediction file; show a user's ranking.",
        "newsbert-ray evaluate runs/first --split test",
        _evaluate,
    ),
    "report": Verb(
        "Draw tables and figures from the records of runs and sweeps; of shards, what is in them.",
        "newsbert-ray report runs/beta --out report",
        _report,
    ),
    "export": Verb(
        "Write a run's student as a folder for transformers, Sentence Transformers or onnxruntime.",
        "newsbert-ray export runs/first --to sentence-transformers --out encoder",
        _export,
    ),
    "embed": Verb(
        "Embed a file of texts by a run's student, in shards, over a cluster; restartable.",
        "newsbert-ray embed runs/first --input MINDsmall_dev/news.tsv --out vectors",
        _embed,
    ),
    "similar": Verb(
        "Among embedded texts: those like one, or what a user would read.",
        "newsbert-ray similar vectors --to N55528",
        _similar,
    ),
    "bench": Verb(
        "Titles/s and milliseconds a title of students, their teachers, and random encoders, side by side.",
        "newsbert-ray bench runs/first random:12x768 random:2x768 --out speed",
        _bench,
    ),
    "doctor": Verb(
        "Check versions, devices, storage, ports, shards, teacher and cluster, and say what to mend.",
        "newsbert-ray doctor --data shards --teacher bert-base-uncased --out runs",
        _doctor,
    ),
    "synthesize": Verb(
        "Write a small learnable corpus in MIND's own files, for trying things out.",
        "newsbert-ray synthesize --out corpus",
        _synthesize,
    ),
    "synthesize-pairs": Verb(
        "Write small learnable tables of query, text and clicked, for trying retrieval out.",
        "newsbert-ray synthesize-pairs --out tables",
        _synthesize_pairs,
    ),
}


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.sentence}" for name, verb in VERBS.items())
    return (
        "Distil a pretrained language model into a fast news encoder (NewsBERT), and sweep for the best.\n"
        f"\nusage: newsbert-ray VERB [settings] [--debug]\n\n{verbs}\n\n"
        "newsbert-ray VERB --help lists the verb's settings; --debug shows the frames behind an error."
    )


def _print_help(name: str) -> None:
    from newsbert_ray.flags import help_text

    print(f"{VERBS[name].sentence}\n\n  {VERBS[name].example}\n\n{help_text(name)}", end="")


if __name__ == "__main__":
    sys.exit(main())
