"""The words of the command line: each loads what it needs, calls one function of the package, prints."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple


class Verb(NamedTuple):
    """A word of the command line: what it does in one sentence, an example, and the function that does it,
    which may return an exit code."""

    sentence: str
    example: str
    run: Callable[[list[str]], int | None]


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
        from newsbert_ray.tune.estimate import plan_sweep

        plan_sweep(space, out=out, curves=given["curves"], **asked)
        return
    from newsbert_ray.tune.sweep import SweepError, sweep

    result = sweep(space, out=out, resume=bool(given["resume"]), **asked)
    if result.best is None:
        raise SweepError(f"{out}: no trial finished; the reasons stand above")
    if result.failures:
        raise SweepError(f"{out}: {len(result.failures)} trials failed; the reasons stand above")


def _evaluate(words: list[str]) -> None:
    from newsbert_ray.flags import values_from

    values = values_from("evaluate", words)
    as_json, user = values.pop("json", False), values.pop("show", None)
    if values.pop("by_topic", False):
        _by_topic(values.pop("run"), user, as_json=as_json, **values)
        return
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
    from newsbert_ray.evaluation.evaluate import show
    from newsbert_ray.screens import print_shown

    found = show(run, user, **values)
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=1))
    else:
        print_shown(found, model=values.get("model", "student"))


def _by_topic(run: str, user: str | None, *, as_json: bool, **values: Any) -> None:
    from newsbert_ray.config import SettingsError

    if user is not None or values.pop("submission", None) is not None:
        raise SettingsError("--by_topic is of a topics run; --show and --submission are of another task's")
    from newsbert_ray.evaluation.evaluate import by_topic
    from newsbert_ray.screens import print_topics

    rows = by_topic(run, **values)
    if as_json:
        print(json.dumps([row._asdict() for row in rows], indent=1))
    else:
        print_topics(rows)


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
    from newsbert_ray.serving.bench import SPARE, bench, timings_table

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    print_table(timings_table(bench(**values, say=say)), spare=SPARE)
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
    from newsbert_ray.data.synthetic import synthesize_pairs

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
    if problems := sum(finding.state == "fix" for finding in findings):
        raise DoctorError(f"{problems} problem{'s' if problems > 1 else ''}; each has its cure")


def _submit(words: list[str]) -> int:
    from contextlib import chdir

    from newsbert_ray.flags import UsageError, named_by, values_from

    values = values_from("submit", words)
    command = values.pop("command", [])
    from newsbert_ray.config import SettingsError
    from newsbert_ray.deploy.submit import list_jobs, show_log, stop_job, submit

    cluster = {name: values.pop(name, None) for name in ("address", "token_file")}
    log, stopped, listed = values.pop("logs", None), values.pop("stop", None), values.pop("list", False)
    if sum(map(bool, (command, log, stopped, listed))) != 1:
        raise SettingsError("give one of: -- VERB SETTINGS, --logs JOB, --stop JOB, --list")
    if log:
        return show_log(log, **cluster)
    if stopped:
        return stop_job(stopped, **cluster)
    if not command:
        return list_jobs(**cluster)
    verb, *rest = command
    able = [name for name in VERBS if name != "submit"]
    if verb not in able:
        raise SettingsError(f"-- {verb}: no verb to submit; one of {', '.join(able)}")
    folder = values.get("working_dir") or "."
    if not os.path.isdir(folder):
        raise SettingsError(f"--working_dir {folder}: no such folder")
    try:
        with chdir(folder):
            settings = named_by(verb, [word for word in rest if word != "--debug"])
    except (UsageError, SettingsError) as error:
        raise SettingsError(f"{verb}: {error}") from error
    chosen = {name: value for name, value in values.items() if value is not None}
    return submit(command, **cluster, **chosen, settings=settings)


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
