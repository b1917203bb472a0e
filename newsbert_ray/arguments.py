"""The flags of every verb: names, kinds, defaults, and the sentence that `--help` has for each.

Loads jsonargparse, so that the command line imports it only once a verb is known. Knows no tensor and no Ray.
"""

from __future__ import annotations

import argparse

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveFloat, PositiveInt

from newsbert_ray.config import PrepareSettings, Settings, TrainSettings

SETTINGS: dict[str, type[Settings]] = {
    "prepare": PrepareSettings,
    "train": TrainSettings,
    "sweep": TrainSettings,
}
"""The settings behind a verb's flags."""
CONTROL = ("search", "stopping", "limits", "prices", "gpus", "keep_students")
"""Parts of a search space that the command line may set over its file."""


def parser_for(verb: str) -> ArgumentParser:
    """The parser of one verb; building the others would cost start-up time."""
    parser = ArgumentParser(
        prog=f"newsbert-ray {verb}",
        usage=argparse.SUPPRESS,
        exit_on_error=False,
        allow_abbrev=False,
        default_env=False,
    )
    _ADD[verb](parser)
    return parser


def _add_prepare(parser: ArgumentParser) -> None:
    _add_settings(parser, PrepareSettings)


def _add_train(parser: ArgumentParser) -> None:
    _add_settings(parser, TrainSettings)


def _add_settings(parser: ArgumentParser, model: type[Settings]) -> None:
    parser.add_argument("--config", action="config", help="YAML file of settings; flags go over it.")
    parser.add_class_arguments(model)


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
        "--by_topic",
        action="store_true",
        help="Instead, of a topics run: precision, recall and F1 of each topic, and what it is taken for.",
    )
    parser.add_argument(
        "--model",
        choices=["student", "teacher"],
        default="student",
        help="Whose ranking or topics those are.",
    )
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")


def _add_report(parser: ArgumentParser) -> None:
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
        help="MIND's news.tsv, or .jsonl or .parquet with news_id or id, and title or text; URLs too.",
    )
    parser.add_argument(
        "--out",
        type=str,
        required=True,
        help="Folder or URL (s3://...) for the shards of embeddings. On a cluster of several machines all of "
        "them reach run, input and this by these names: a shared disk, or URLs.",
    )
    parser.add_argument(
        "--workers",
        type=int,
        help="Pieces embedded at once, a core each; all cores by default, 0 works in this process.",
    )
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each worker, such as 0.25.")
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        default="fp32",
        help="The encoder's numbers; bf16 pays where the hardware has it, which `newsbert-ray doctor` says.",
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
    add(
        "--precision",
        choices=["fp32", "bf16"],
        nargs="+",
        default=["fp32"],
        help="The encoders' numbers; of several, the first is what the others are held against.",
    )
    add("--device", choices=["cpu", "cuda"], help="Where they work; a GPU by default, where there is one.")
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


def _add_synthesize(parser: ArgumentParser) -> None:
    from newsbert_ray.data.synthetic import synthesize

    parser.add_function_arguments(synthesize)


def _add_synthesize_pairs(parser: ArgumentParser) -> None:
    from newsbert_ray.data.synthetic import synthesize_pairs

    parser.add_function_arguments(synthesize_pairs)


_ADD = {
    "prepare": _add_prepare,
    "train": _add_train,
    "sweep": _add_sweep,
    "submit": _add_submit,
    "evaluate": _add_evaluate,
    "report": _add_report,
    "export": _add_export,
    "embed": _add_embed,
    "similar": _add_similar,
    "bench": _add_bench,
    "doctor": _add_doctor,
    "synthesize": _add_synthesize,
    "synthesize-pairs": _add_synthesize_pairs,
}
