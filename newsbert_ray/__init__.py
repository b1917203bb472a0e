"""Distil a pretrained language model into a fast news encoder (NewsBERT, Wu et al. 2021).

Every verb of the command line is a function here, with the same names, defaults and error messages. The
command line is built from these signatures and docstrings. A Location is a path or URL (str or Path).
Importing the package loads neither torch nor Ray.
"""

# mypy: disable-error-code="empty-body"
# A function with `_calls` has only a signature and a docstring.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, wraps
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

if TYPE_CHECKING:
    from newsbert_ray.config import PrepareSettings, TrainSettings
    from newsbert_ray.data.shards import Manifest
    from newsbert_ray.deploy.doctor import Finding
    from newsbert_ray.evaluation.evaluate import RankedImpression
    from newsbert_ray.evaluation.metrics import TopicRow
    from newsbert_ray.record import RunRecord, read_record
    from newsbert_ray.serving.bench import Timing
    from newsbert_ray.serving.embed import Answer
    from newsbert_ray.serving.predictor import load
    from newsbert_ray.settings import (
        Location,
        NonNegativeFloat,
        NonNegativeInt,
        PositiveInt,
        SettingsError,
        Share,
    )
    from newsbert_ray.tune.estimate import Estimate
    from newsbert_ray.tune.space_file import Changes
    from newsbert_ray.tune.sweep import SweepResult

__version__ = "0.2.0"

__all__ = [
    "PrepareSettings",
    "RunRecord",
    "SettingsError",
    "TrainSettings",
    "__version__",
    "bench",
    "doctor",
    "embed",
    "evaluate",
    "export",
    "load",
    "predict",
    "prepare",
    "preview",
    "read_record",
    "report",
    "similar",
    "submit",
    "sweep",
    "synthesize",
    "synthesize_pairs",
    "train",
]

_LAZY = {
    "PrepareSettings": "config",
    "TrainSettings": "config",
    "SettingsError": "settings",
    "RunRecord": "record",
    "read_record": "record",
    "load": "serving.predictor",
}

P = ParamSpec("P")
R = TypeVar("R")


def __getattr__(name: str) -> Any:
    """Load a name when it is first used, so that importing the package stays fast."""
    if name in _LAZY:
        return getattr(import_module(f"newsbert_ray.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'newsbert_ray' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__


def _checked(function: Callable[P, R], *, call: str = "", replaces: str = "") -> Callable[P, R]:
    """Check the arguments by the signature (SettingsError in the words of the command line), then call
    `function`, or the function whose name is `call`. Without its argument `overwrite`, files of the pattern
    `replaces` in `out` are not replaced."""

    @wraps(function)
    def checked(*positional: P.args, **keywords: P.kwargs) -> R:
        from newsbert_ray.settings import SettingsError, check_arguments

        target: Callable[..., R] = function
        if call:
            module, _, name = f"newsbert_ray.{call}".rpartition(".")
            target = getattr(import_module(module), name)
        values = check_arguments(function, positional, keywords)
        if replaces and not values.pop("overwrite") and values["out"]:
            for file in Path(values["out"]).glob(replaces):
                raise SettingsError(f"{file}: exists; give another out, or overwrite")
        return target(**values)

    return checked


def _calls(name: str, *, replaces: str = "") -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declares a public function: `name` is the function that receives its checked arguments."""
    return partial(_checked, call=name, replaces=replaces)


@_calls("data.synthetic.synthesize", replaces="synthetic_*")
def synthesize(
    out: Location,
    *,
    news: PositiveInt = 2000,
    users: PositiveInt = 200,
    impressions_per_user: PositiveInt = 5,
    topics: PositiveInt = 8,
    seed: NonNegativeInt = 0,
    folders: Sequence[str] = ("train", "dev"),
    history: NonNegativeInt = 10,
    candidates: PositiveInt = 6,
    unlabelled: Sequence[str] = (),
    popularity: NonNegativeFloat = 0.0,
    overwrite: bool = True,
) -> list[Path]:
    """Write a small synthetic corpus in MIND's file format, to try things out.

    The first folder has `news` news. Each later one has a quarter as many new ones, and shares an eighth with
    the folder before it. The same arguments give the same bytes.

    Args:
        out: folder to write; it gets a folder synthetic_NAME with news.tsv and behaviors.tsv for each NAME.
        news: news in the first folder, at least 8.
        users: readers, the same in all folders.
        impressions_per_user: impressions of each reader in the first folder; the others have a quarter.
        topics: categories, 2 to 40.
        seed: random seed.
        folders: names of the folders, in the order of time.
        history: longest history of an impression.
        candidates: news offered in each impression.
        unlabelled: folders whose behaviours do not say what was clicked, like MIND's test set.
        popularity: exponent of Zipf's law for how often news are offered; 0 offers all equally often.
        overwrite: replace an earlier corpus.
    Returns:
        The folders written.
    Raises:
        SettingsError: an argument out of range.
    """


@_calls("data.synthetic.synthesize_pairs", replaces="synthetic_*")
def synthesize_pairs(
    out: Location,
    *,
    pairs: PositiveInt = 2000,
    queries: PositiveInt | None = None,
    topics: PositiveInt = 8,
    words: PositiveInt = 600,
    seed: NonNegativeInt = 0,
    tables: Sequence[str] = ("train", "dev"),
    overwrite: bool = True,
) -> list[Path]:
    """Write small synthetic tables of query, text and clicked, to try retrieval.

    The first table has `pairs` rows. Each later one has a quarter as many, with new queries and half of its
    texts new. The same arguments give the same bytes.

    Args:
        out: folder to write; it gets a file synthetic_pairs_NAME.tsv for each NAME.
        pairs: rows of the first table, at least 8.
        queries: queries of the first table; by default a fifth of `pairs`.
        topics: 2 to 40.
        words: mean length of a text; a query has about 12 words.
        seed: random seed.
        tables: names of the tables, in the order of time.
        overwrite: replace earlier tables.
    Returns:
        The files written.
    Raises:
        SettingsError: an argument out of range.
    """


def prepare(
    settings: PrepareSettings | None = None, *, say: Callable[[str], None] = print, **values: Any
) -> Manifest:
    """Turn MIND's files, labelled texts or query-text pairs into tokenised Parquet shards.

    Shards that were made from the same sources and settings are kept as they are.

    Args:
        settings: all settings in one object; `values` override it.
        say: receives progress and the closing summary, line by line.
        values: settings by name, nested or dotted, as in `PrepareSettings`.
    Returns:
        The manifest of the shards.
    Raises:
        SettingsError: a wrong setting.
        PrepareError: the sources, the output folder or the disk do not allow it; nothing in the output folder
            has changed.
        TokenizerError: the teacher's tokeniser cannot be loaded.
        StorageError: a bucket cannot be read or written, or another process works in the output folder.
    """
    from newsbert_ray.config import PrepareSettings
    from newsbert_ray.data import prepare as module

    return module.prepare(_settings(PrepareSettings, settings, values), say=say)


def train(
    settings: TrainSettings | None = None,
    *,
    report: Callable[[dict[str, Any]], None] | None = None,
    quiet: bool = False,
    gpus: float | None = None,
    teachers: Location | None = None,
    overwrite: bool = False,
    **values: Any,
) -> RunRecord:
    """Distil one student: teacher and student learn together.

    Writes the student and a record of the run. Ctrl-C or SIGTERM writes a checkpoint first, and an
    interrupted run continues from its last one. A run that the method needs first (a fine-tuned teacher, a
    student to start from) is trained first. Several workers form a Ray Train group.

    Args:
        settings: all settings in one object; `values` override it.
        report: receives every evaluation: {"step", "epoch", "validation", "train", "kind"}. It stops the run
            by raising; the next call continues there.
        quiet: print nothing.
        gpus: GPUs of each worker, such as 0.25; by default what the cluster has.
        teachers: folder where several runs share the runs they need first; by default each has its own.
        overwrite: replace an earlier run in `out`.
        values: settings by name, nested or dotted, as in `TrainSettings`.
    Returns:
        The record of the finished run; at once if the folder holds it already.
    Raises:
        SettingsError: a wrong setting.
        RunFolderError: the folder belongs to another run, or another process works in it.
        Stopped: a KeyboardInterrupt after Ctrl-C or SIGTERM; its text names the checkpoint.
        StorageError: a bucket cannot be read or written.
        ShardError, EncoderError, CheckpointError, LossError, GroupError: see there.
    """
    from newsbert_ray.config import TrainSettings
    from newsbert_ray.training import run

    chosen = _settings(TrainSettings, settings, values)
    return run.train(chosen, report=report, quiet=quiet, gpus=gpus, teachers=teachers, overwrite=overwrite)


def _settings(model: type[Any], settings: Any, values: Mapping[str, Any]) -> Any:
    """A settings object from another one, or from nothing, with `values` over it."""
    from newsbert_ray.settings import build_settings, merge

    if settings is not None and not values:
        return settings
    start = {} if settings is None else settings.model_dump(exclude_unset=True)
    return build_settings(model, merge(start, values))


@_checked
def sweep(
    space: Location,
    *,
    out: Location,
    resume: bool = False,
    overwrite: bool = False,
    concurrency: PositiveInt | None = None,
    vary: Mapping[str, Sequence[Any]] | Sequence[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    control: Mapping[str, Any] | None = None,
    train: Callable[..., Any] | None = None,
    **values: Any,
) -> SweepResult:
    """Run every trial of a search space, on this machine or a cluster.

    Prints the table of trials and writes the report with its figures.

    Args:
        space: YAML file of the search space, such as those in search_spaces/.
        out: folder of the sweep, with a folder for each run; a disk that all nodes share, or a URL.
        resume: continue the sweep in `out`. Finished trials are kept, others continue from their checkpoints,
            failed ones are repeated.
        overwrite: replace an earlier sweep in `out`.
        concurrency: most trials at once; by default as many as CPUs and GPUs allow.
        vary: other values for an axis, a new axis, or other seeds: NAME=VALUE,VALUE.
        overrides: training settings by name; the same as `values`.
        control: `search`, `stopping`, `limits`, `prices`, `gpus`, `keep_students`; the same as `values`.
        train: function that trains a trial; by default `train`.
        values: training settings and the parts of the search space in `control`, nested or dotted. They
            override the file; an axis that is set this way no longer varies.
    Raises:
        SettingsError: a wrong setting or search space.
        SweepError: the folder belongs to another sweep, needs `resume`, or is in use.
        StudyError: Optuna's storage cannot be used, or its study belongs to another sweep.
        StorageError, NodeError: a bucket, or a node's disk, cannot be read or written.
        ConnectError: Ray cannot be started or reached.
        KeyboardInterrupt: stopped by Ctrl-C; finished trials are kept, and `resume` continues.
    """
    from newsbert_ray.tune import sweep as module

    changes = _changes(vary, overrides, control, values)
    return module.sweep(
        space, changes, out=out, resume=resume, overwrite=overwrite, concurrency=concurrency, train=train
    )


@_checked
def preview(
    space: Location,
    *,
    out: Location,
    concurrency: PositiveInt | None = None,
    curves: Location | None = None,
    vary: Mapping[str, Sequence[Any]] | Sequence[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    control: Mapping[str, Any] | None = None,
    **values: Any,
) -> Estimate:
    """Estimate what a sweep will take: trials, time, cost, and what early stopping saves.

    Measures a few training steps of each kind of trial, as many at once as the sweep would run.

    Args:
        space: YAML file of the search space.
        out: folder that the sweep will use; plan.json there is later compared with what the sweep took.
        concurrency: most trials at once; by default as many as CPUs and GPUs allow.
        curves: an earlier sweep, to replay early stopping on its learning curves; without one, curves that
            never cross are assumed.
        vary: as for `sweep`.
        overrides: as for `sweep`.
        control: as for `sweep`.
        values: as for `sweep`.
    Raises:
        SettingsError, SweepError, ConnectError, ShardError: as `sweep`.
    """
    from newsbert_ray.tune import estimate as module

    changes = _changes(vary, overrides, control, values)
    return module.plan_sweep(space, changes, out=out, concurrency=concurrency, curves=curves)


def _changes(vary: Any, *settings: Mapping[str, Any] | None) -> Changes:
    """The changes to a search space, checked."""
    from newsbert_ray.cli import settings_of
    from newsbert_ray.settings import check_each, merge
    from newsbert_ray.tune.space_file import Changes

    merged = merge(*(layer for layer in settings if layer))
    check_each(settings_of("sweep"), merged)
    return Changes.of(merged, vary)


@_calls("evaluation.evaluate.evaluate")
def evaluate(
    run: Location,
    *,
    data: Location | None = None,
    split: Literal["train", "validation", "test"] = "test",
    submission: Location | None = None,
    model: Literal["student", "teacher"] = "student",
    by_topic: bool = False,
    show: str | None = None,
) -> dict[str, Any] | list[TopicRow] | list[RankedImpression]:
    """Measure a finished run's models; write MIND's prediction file; show a user's ranking.

    Args:
        run: folder of a finished run, or its URL.
        data: folder of shards; by default the run's own.
        split: split to evaluate.
        submission: also write MIND's prediction file here (.zip or .txt), and check it; recommendation only.
        model: model of the submission, of `by_topic` and of `show`.
        by_topic: instead: precision, recall and F1 of each topic, and the topic it is most often taken for.
        show: instead: this user's history, and the candidates as the model ranks them.
    Returns:
        {"split", "data", "student": metrics, "teacher": metrics if its weights were kept}; for recommendation
        also "popularity", "tfidf" and "random"; with a submission {"file", "model", "lines"}. No metrics if
        the split has no labels. With `by_topic` a row for each topic, with `show` the user's impressions.
    Raises:
        SettingsError: options that do not fit the run's task, or a model that was not kept.
        RecordError: no finished run there.
        ShardError: no such split, or shards with other topics than the run's.
        EncoderError, CheckpointError: the student or the teacher cannot be loaded.
        SubmissionError: the prediction file cannot be written, or did not pass its check.
        StorageError: a bucket cannot be read.
    """


@_calls("reporting.report.report", replaces="report.*")
def report(
    folders: Sequence[Location],
    *,
    out: Location,
    against: str | None = None,
    keep: Location | None = None,
    overwrite: bool = True,
) -> list[Path]:
    """Write a page with tables and figures from the records of runs and sweeps, or about shards.

    Writes report.md, report.html (the same, in one file), report.csv, tables.tex and each figure as PNG and
    SVG.

    Args:
        folders: one sweep; or runs and sweeps, with every record at or below them; or files written by
            `keep`; or shards. URLs too.
        out: folder for the tables and figures.
        against: SETTING=VALUE of the rows that others are compared with, by a t-test over seeds, such as
            distill.beta=0; by default method newsbert.
        keep: also write the records to this .jsonl file, without this machine's paths, to report again later.
        overwrite: replace an earlier report.
    Returns:
        The written files, report.md first.
    Raises:
        RecordError, SettingsError, ShardError: see there.
    """


@_calls("serving.export.export")
def export(
    run: Location,
    *,
    to: Literal["hf", "sentence-transformers", "onnx"],
    out: Location,
    int8: bool = False,
    overwrite: bool = False,
) -> list[Path]:
    """Write a run's student as a folder for transformers, Sentence Transformers or onnxruntime.

    Args:
        run: folder of a finished run, or its URL.
        to: library that will load it. hf: AutoModel, and with trust_remote_code the pooled news embedding and
            pipeline("text-classification"). onnx: model.onnx, from input_ids and attention_mask (B, L) to
            news_embedding (B, D), and logits (B, topics) for a topics run.
        out: folder for the exported model.
        int8: onnx only: also write a model with 8-bit weights, model_int8.onnx.
        overwrite: replace an earlier export.
    Returns:
        The written files, README.md first.
    Raises:
        ExportError: `out` holds something else, the student has a form of its own, or a package is missing.
        RecordError, EncoderError: no complete finished run there.
    """


@_calls("serving.embed.embed")
def embed(
    run: Location,
    *,
    input: Sequence[Location],
    out: Location,
    workers: NonNegativeInt | None = None,
    gpus: NonNegativeFloat = 0,
    columns: Mapping[str, Any] = {},
    precision: Literal["fp32", "bf16", "int8"] = "fp32",
    max_rejected_share: Share = 0.01,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Embed files of texts with a run's student, on all cores or a cluster.

    Restarted, it continues where it stopped. On a cluster of several machines, all of them must reach run,
    input and out by these names: on a shared disk, or as URLs.

    Args:
        run: folder of a finished run, or its URL.
        input: files of texts, or their URLs: MIND's news.tsv; .tsv or .csv with a header, .jsonl or .parquet
            with title or text, and news_id, id or nid if there is an id; or .txt with one text a line.
        out: folder or URL (s3://...) for the embeddings: part-NNNNN.parquet (id, text, embedding of D
            floats) in the order of the input, and embedded.json.
        workers: parts embedded at once, each on one core; by default all cores; 0 uses this process only.
        gpus: GPUs of each worker, such as 0.25.
        columns: of tables: the names `text` and `id` of their columns, their `delimiter` and `encoding`.
        precision: arithmetic of the encoder; bf16 is faster where `newsbert-ray doctor` says so, int8 faster
            still, on processors only.
        max_rejected_share: a larger share of bad rows is an error.
        overwrite: replace embeddings of other texts or another model.
        say: receives progress, line by line.
    Returns:
        The content of embedded.json: rows, dimensions, parts, hashes of the model and the files.
    Raises:
        EmbedError, TextsError: see there.
        RecordError, EncoderError: no complete finished run there.
        StorageError: a bucket cannot be read or written.
    """


@_calls("serving.texts.predict")
def predict(
    run: Location,
    *,
    input: Location = "-",
    out: Location = "-",
    top_k: PositiveInt = 1,
    columns: Mapping[str, Any] = {},
    precision: Literal["fp32", "bf16", "int8"] = "fp32",
    overwrite: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Predict the topics of texts with a topics run's student, in constant memory.

    Args:
        run: folder of a finished run, or its URL.
        input: file of texts, as for `embed`, or `-`: standard input, one text a line.
        out: .jsonl, .csv or .parquet file for id, text, topic and probability of each text, or `-`: standard
            output, as JSON lines. Rows have the order of the input; a text without an id has its line number.
        top_k: number of topics of a text; the further ones are topic_2 and probability_2, and so on.
        columns: of a table: the names `text` and `id` of its columns, its `delimiter` and `encoding`.
        precision: arithmetic of the encoder; bf16 is faster where `newsbert-ray doctor` says so, int8 faster
            still, on processors only.
        overwrite: replace an existing file.
        say: receives progress, line by line.
    Returns:
        {"out", "rows": texts with a prediction, "left_out": bad rows}.
    Raises:
        SettingsError: a run of another task, or an `out` of another format or that exists.
        TextsError: no text, or a file that cannot be read.
        RecordError, EncoderError: no complete finished run there.
    """


@_calls("serving.embed.similar")
def similar(
    vectors: Location,
    *,
    to: str | None = None,
    read: Sequence[str] = (),
    user: str | None = None,
    behaviors: Location | None = None,
    run: Location | None = None,
    top: PositiveInt = 10,
) -> Answer:
    """Find the texts among embeddings that are most like a text, or that a user would read.

    Args:
        vectors: folder that `embed` wrote.
        to: id of one of these texts, or any other text.
        read: instead of `to`: ids of the texts that a user read, oldest first; unknown ones are left out.
        user: instead of `to`: a user of MIND's behaviors.tsv, with the last of their histories.
        behaviors: file that has the histories of `user`.
        run: run whose student made the embeddings, if it has moved.
        top: number of texts.
    Returns:
        The texts by descending cosine; for a user by the model's click score if it learned recommendation,
        otherwise by cosine to the mean of what they read.
    Raises:
        SettingsError: not exactly one of `to`, `read` and `user`, or one that these embeddings cannot answer.
        EmbedError: no complete embeddings there.
    """


@_calls("serving.bench.bench", replaces="bench.*")
def bench(
    models: Sequence[str],
    *,
    input: Location | None = None,
    titles: PositiveInt = 2000,
    alone: PositiveInt = 200,
    rounds: PositiveInt = 5,
    threads: Sequence[PositiveInt] = (1,),
    precision: Sequence[Literal["fp32", "bf16"]] = ("fp32",),
    device: Literal["cpu", "cuda"] | None = None,
    out: Location | None = None,
    overwrite: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> list[Timing]:
    """Measure the speed of students, their teachers and random encoders, side by side on the same titles.

    Args:
        models: finished runs (each gives its student and its teacher), or random:LAYERSxWIDTH for an encoder
            with random weights.
        input: file of titles: news.tsv, .jsonl or .parquet; by default invented titles.
        titles: titles in a round.
        alone: number of titles that are also encoded one at a time, for percentiles.
        rounds: rounds, in which all models take turns; the first is not counted.
        threads: numbers of CPU threads to try.
        precision: arithmetic of the encoders to try; the first is the reference for the others.
        device: device of the encoders; by default a GPU if there is one.
        out: folder for bench.json, a table and a figure; by default none.
        overwrite: replace earlier measurements.
        say: receives progress, line by line.
    Returns:
        A timing for each model, number of threads and precision.
    Raises:
        SettingsError: a model that cannot be measured, or a device that is missing.
        RecordError, EncoderError, TextsError: see there.
    """


@_calls("deploy.doctor.doctor")
def doctor(
    *,
    data: Location | None = None,
    out: Location | None = None,
    address: str | None = None,
    teacher: str | None = None,
    deep: bool = False,
) -> Iterator[Finding]:
    """Check versions, devices, storage, shards, teacher and cluster, and say how to fix problems.

    Changes nothing.

    Args:
        data: folder of shards to check.
        out: folder or URL (s3://...) for results; by default the current folder.
        address: address of the cluster: http(s)://HOST:PORT of its dashboard, or HOST:PORT of its head node;
            by default RAY_ADDRESS or RAY_API_SERVER_ADDRESS.
        teacher: encoder to check: a Hugging Face name, a folder or `scratch`.
        deep: also compare the hash of every shard, which reads them all.
    Returns:
        The findings, one by one as they are made.
    """


@_checked
def submit(
    command: Sequence[str] = (),
    *,
    address: str | None = None,
    token_file: Location | None = None,
    working_dir: Location = ".",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    env: Sequence[str] = (),
    pip: Location | None = None,
    id: str | None = None,
    wait: bool = True,
    logs: str | None = None,
    stop: str | None = None,
    list: bool = False,
) -> int:
    """Run another verb on a Ray cluster, as a job.

    Sends this folder, follows the log and returns the job's exit code.

    Args:
        command: verb and settings as on the command line: ["sweep", "search_spaces/cloud.yaml", ...].
        address: cluster's dashboard, http(s)://HOST:PORT; by default RAY_API_SERVER_ADDRESS.
        token_file: file with the cluster's token; by default RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or
            ~/.ray/auth_token. It is sent only to a cluster that asks for one.
        working_dir: folder to send (at most 100 MB), and start of the command's relative paths. Runs, data,
            caches, weights and what .gitignore or .rayignore lists stay here. The package itself is sent from
            anywhere.
        include: send this too, such as /shards/; may be repeated.
        exclude: do not send this, a pattern as in .gitignore; may be repeated.
        env: NAME=VALUE for the job and its workers; may be repeated. Everybody on the cluster can read it, so
            give no secret.
        pip: requirements file that each node installs first, for clusters without our image; takes minutes.
        id: name of the job; by default made from the verb and the time.
        wait: follow the log until the job ends.
        logs: instead: follow the log of this job from its beginning.
        stop: instead: stop this job as Ctrl-C would, and wait until it has ended.
        list: instead: list the cluster's jobs.
    Returns:
        0: done, or sent with `wait` off; 130: Ctrl-C, the job goes on; otherwise the job's own exit code.
    Raises:
        SettingsError: a wrong command, a path that the cluster cannot see, or a secret in the command.
        PackageError: the folder cannot be sent.
        DashboardError, SubmitError: the cluster does not answer, or refuses.
    """
    from newsbert_ray.cli import check_command
    from newsbert_ray.deploy import submit as module
    from newsbert_ray.settings import SettingsError

    if sum(map(bool, (command, logs, stop, list))) != 1:
        raise SettingsError("give one of: -- VERB SETTINGS, --logs JOB, --stop JOB, --list")
    if not command:
        cluster = module.Cluster(address, token_file)
        if list:
            return cluster.list_jobs()
        return cluster.show_log(logs) if logs else cluster.stop(stop or "")
    options: Any = {"address": address, "token_file": token_file, "env": env, "pip": pip, "id": id}
    options |= {"working_dir": working_dir, "include": include, "exclude": exclude, "wait": wait}
    return module.submit(command, settings=check_command(command, folder=Path(working_dir)), **options)
