"""Which method makes the best small student, at each amount of labels? Many short runs, several at once.

    python -m tests.benchmarks.study_student --data SHARDS --teacher NAME_OR_DIR --out DIR \
        [--plan main ...] [--processes 12] [--minutes 8] [--device cuda] [--dry-run]

Every run is `newsbert_ray.train` with one worker, in a process that does many runs. A finished run appends
one line to DIR/records.jsonl; a run whose line is there is skipped, so the same command goes on. A seed has
its own draw of labelled titles; the other training titles are unlabelled text. Teachers are fine-tuned first,
one for each amount of labels and seed, and kept in DIR/teachers. Rates are tuned at seed 0, on validation.
Runs are started in the order of the plan, and only while their expected time is left.

On a machine with one large GPU and 16 cores: `--processes 14 --minutes 8 --device cuda`, with `--out` and
`--scratch` in /dev/shm; neither Ray nor Optuna is needed there. On one CPU core, as in docs/results.md:

    --plan small --validation 0.35 --minutes 85 \
        --set '{"steps": 700, "batch_size": 64, "evaluate_every": 50, "precision": "bf16"}'
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing as mp
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

SIZES: tuple[int | None, ...] = (1000, 12000, 4000, None)
"""Amounts of labels; None is all."""
SEEDS = (0, 1, 2, 3, 4)
RATES = (1e-4, 2e-4, 4e-4, 8e-4)
UNLABELLED_SHARE = 0.75
TEACHER_RATE = 1e-4
ABLATIONS = ("no_momentum", "no_soft_labels", "no_hidden")
METHODS = ("finetune", "best", "twinbert", "newsbert", "newsbert_warm", "disjoint", "tinybert", *ABLATIONS)
TUNED_LIKE = {**dict.fromkeys(ABLATIONS, "newsbert")}
"""Methods that take another's rate."""
PARTS = (
    *("teachers", "tuning", "main", "variants", "sizes", "layers2", "layers0", "regime", "rates", "layers3"),
)
"""The parts of the plan in the order in which a cut would leave the most."""
RECIPE: dict[str, Any] = {
    "method": "twinbert",
    "distill": {"temperature": 2.0, "soft_label_form": "kl", "soft_label_t2": True},
}
"""Method `best` where the product has none: a fine-tuned teacher's soft labels on all texts, and labels."""
COMMON: dict[str, Any] = {
    "steps": 1000,
    "batch_size": 128,
    "evaluate_every": 50,
    "log_every": 500,
    "threads": 1,
    "optimizer": {"decay": "linear", "warmup_share": 0.05, "teacher_learning_rate": TEACHER_RATE},
    "checkpoint": {"every_minutes": None, "keep_finished": False, "at_evaluation": False},
}


@dataclass(frozen=True)
class Run:
    """One run of the plan.

    Attributes:
        labels: labelled titles; None is all.
        values: settings beyond COMMON, by dotted name.
        rate: learning rate of student and top; None is the tuned one.
        stage: the part of the plan.
        unlabelled: whether the other titles are read too.
    """

    stage: str
    method: str
    labels: int | None
    layers: int
    seed: int
    rate: float | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    unlabelled: bool = True

    @property
    def name(self) -> str:
        """The run's name; equal runs of different stages have the same."""
        changes = [f"{key.rpartition('.')[2]}={value}" for key, value in sorted(self.values.items())]
        rate = ["tuned" if self.rate is None else f"{self.rate:g}"]
        alone = [] if self.unlabelled else ["labelled"]
        parts = [self.method, f"L{self.labels or 'all'}", f"N{self.layers}", f"s{self.seed}"]
        return "_".join([*parts, *rate, *alone, *changes])

    @property
    def teacher(self) -> str | None:
        """Folder of the teacher that it needs, in DIR/teachers."""
        alone = self.method in ("finetune", "teacher", "linear")
        joint = self.method in ("newsbert", "mutual", *ABLATIONS)
        return None if alone or joint else teacher_name(self.labels, self.seed)


def teacher_name(labels: int | None, seed: int) -> str:
    """Folder of a fine-tuned teacher."""
    return f"L{labels or 'all'}_s{seed}"


def make_plan(names: Sequence[str], *, depth: int) -> list[Run]:
    """The runs of some parts of the plan, in the order in which they are started."""
    deeper = ("finetune", "best", "newsbert", "twinbert")
    parts = {
        "teachers": [Run("teachers", "teacher", n, depth, s, TEACHER_RATE) for n in SIZES for s in SEEDS],
        "tuning": list(_tuning()),
        "main": [Run("main", m, n, 1, s) for n in SIZES[:2] for s in SEEDS for m in METHODS],
        "sizes": [Run("main", m, n, 1, s) for n in SIZES[2:] for s in SEEDS for m in METHODS],
        "layers2": [Run("layers", m, n, 2, s) for n in SIZES for s in SEEDS for m in deeper],
        "layers3": [Run("layers", m, n, 3, s) for n in SIZES for s in SEEDS for m in deeper],
        "layers0": [Run("layers", m, n, 0, s) for n in SIZES for s in SEEDS for m in deeper[:2]],
        "variants": list(_variants()),
        "regime": list(_regime(steps=3000, seeds=3)),
        "regime_small": list(_regime(steps=200, seeds=3)),
        "short": list(_short(5)),
        "base": list(_base(depth)),
        "rates": list(_rates(2)),
        # All labels are the same for each seed.
        "small": list(_small(depth)),
        "linear": [Run("linear", "linear", n, 0, s, 0.0) for n in SIZES for s in SEEDS[: 5 if n else 1]],
    }
    return list({run.name: run for name in names for run in parts[name]}.values())


def _tuning() -> Iterator[Run]:
    """Rates for each method, at seed 0."""
    for method in METHODS:
        for labels in SIZES[:2] if method not in TUNED_LIKE else ():
            yield from (Run("tuning", method, labels, 1, 0, rate) for rate in RATES)
    for labels in SIZES[:2]:
        for method in ("finetune", "best"):
            yield from (Run("tuning", method, labels, 0, 0, rate) for rate in (1e-3, 2e-3, 4e-3))


def _small(depth: int) -> Iterator[Run]:
    """What one CPU core can do in some hours: short teachers, one rate, few seeds where a run is long.
    With all labels a teacher reads them twice, and students have the length that was best at seed 0."""
    rates = {("finetune", 1): 4e-4, ("finetune", 0): 5e-3, ("best", 1): 8e-4, ("best", 0): 5e-3}
    longer = {"steps": 2800, "evaluate_every": 400}, {"steps": 5600, "evaluate_every": 700}
    chosen = {("finetune", 1): longer[0], ("finetune", 0): {}, ("best", 1): longer[1], ("best", 0): longer[1]}
    steps: dict[int | None, int] = {1000: 315, 4000: 500, 12000: 750, None: 2500}

    def block(labels: int | None, seed: int) -> Iterator[Run]:
        length = {"batch_size": 32, "steps": steps[labels], "evaluate_every": steps[labels] // 5}
        yield Run("teachers", "teacher", labels, depth, seed, TEACHER_RATE, length)
        for (method, layers), rate in rates.items():
            lengths = ({}, *longer) if seed == 0 else (chosen[method, layers],)
            for values in ({},) if labels else lengths:
                yield Run("main", method, labels, layers, seed, rate, values)

    yield from block(1000, 0)
    yield from block(12000, 0)
    for seed in SEEDS[1:]:
        yield from block(1000, seed)
    for seed in SEEDS[1:3]:
        yield from block(12000, seed)
    for labels in (1000, 12000):
        yield Run("main", "twinbert", labels, 1, 0, 4e-4, {}, unlabelled=False)
    for seed in SEEDS:
        for layers in (2, 3):
            yield Run("layers", "finetune", 1000, layers, seed, 2e-4)
            yield Run("layers", "best", 1000, layers, seed, 4e-4)
    later = [*((12000, seed) for seed in SEEDS[3:]), *((4000, seed) for seed in SEEDS)]
    for size, seed in (*later, *((None, seed) for seed in SEEDS)):
        yield from block(size, seed)
    for method in ("newsbert_warm", "newsbert"):
        yield Run("main", method, 1000, 1, 0, 4e-4)


def _variants() -> Iterator[Run]:
    """Changes to the recipe, and the other methods without unlabelled text."""
    changes: list[dict[str, Any]] = [
        *({"distill.temperature": t} for t in (1.0, 4.0)),
        *({"unlabelled_share": share} for share in (0.5, 0.9)),
        {"steps": 3000},
        {"distill.weights.student_task": 0.0},
        {"distill.weights.hidden": 1.0},
        {"distill.weights.news_embedding": 1.0},
    ]
    for seed in SEEDS[:3]:
        for labels in SIZES[:2]:
            yield from (Run("variants", "best", labels, 1, seed, None, change) for change in changes)
            for method in ("twinbert", "newsbert", "best"):
                yield Run("variants", method, labels, 1, seed, None, {}, unlabelled=False)
            for steps in (100, 300):  # does fine-tuning want a shorter schedule?
                values = {"steps": steps, "evaluate_every": steps // 20}
                yield Run("variants", "finetune", labels, 1, seed, None, values)


def _regime(*, steps: int, seeds: int) -> Iterator[Run]:
    """The paper's rates (19.7): does momentum, in any form, matter where the student moves slowly?"""
    base = {
        "steps": steps,
        "evaluate_every": steps,
        "optimizer.teacher_learning_rate": None,
        "optimizer.decay": "none",
    }
    forms: list[dict[str, Any]] = [{"distill.beta": beta} for beta in (0.0, 0.1, 0.3)]
    forms += [{"distill.beta": 0.3, "distill.momentum": form} for form in ("rescaled", "update")]
    for seed in SEEDS[:seeds]:
        for rate in (3e-5, 3e-6):
            for form in forms:
                yield Run("regime", "newsbert", 12000, 1, seed, rate, {**base, **form}, unlabelled=False)


def _short(seeds: int) -> Iterator[Run]:
    """All methods at 1,000 labels in fewer updates: what a CPU can do for those with a learning teacher."""
    for seed in SEEDS[:seeds]:
        for method in METHODS:
            rate = 8e-4 if method == "best" else 4e-4
            yield Run("short", method, 1000, 1, seed, rate, {"steps": 400, "evaluate_every": 100})


def _base(depth: int) -> Iterator[Run]:
    """The paper's shape (19.8): a teacher of 8 layers, 768 wide, students of 1, 2 and 4, few updates."""
    length = {"steps": 250, "evaluate_every": 125}
    yield Run("teachers", "teacher", 1000, depth, 0, 5e-5, length)
    for method, layers, rate in (
        *(("finetune", layers, 2e-4) for layers in (1, 2, 4)),
        *(("best", layers, rate) for layers, rate in ((1, 4e-4), (2, 4e-4), (4, 2e-4))),
        ("newsbert", 1, 2e-4),
    ):
        yield Run("base", method, 1000, layers, 0, rate)


def _rates(layers: int) -> Iterator[Run]:
    """Rates at three sizes, with the default method, depth, batch and epochs, as a first look has them."""
    default = {"batch_size": 32, "steps": None, "epochs": 2, "evaluate_every": None}
    old = {"optimizer.decay": "none", "optimizer.warmup_share": 0.0, "optimizer.teacher_learning_rate": None}
    for labels in (1500, 4000, 12000):
        yield Run("rates", "newsbert", labels, layers, 0, 5e-5, {**default, **old}, unlabelled=False)
        for teacher in (1e-4, 5e-5):
            own = {**default, "optimizer.teacher_learning_rate": teacher}
            for rate in (3e-4, 6e-4, 1e-4):
                yield Run("rates", "newsbert", labels, layers, 0, rate, own, unlabelled=False)


# Data: a folder of shards for each draw of labels.


def draw_shards(data: Path, out: Path, *, seed: int, labels: int | None, validation: float = 1.0) -> Path:
    """Shards in which `labels` training titles, drawn by `seed`, are labelled and the others are not.

    The titles and their order are those of `data`; other files are links. `validation` cuts each of the
    validation split's shards to a share, to save time, and with them the table of texts.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from newsbert_ray.data.shards import MANIFEST, TextWriter, read_manifest, read_texts, write_shard

    folder = out / teacher_name(labels, seed)
    if (folder / MANIFEST).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(data)
    total = manifest.rows("train")
    labelled = np.zeros(total, bool)
    labelled[np.random.default_rng(seed).permutation(total)[: labels or total]] = True
    shards, start = [], 0
    for shard in manifest.splits["train"]:
        table = pq.read_table(data / shard.file)
        own = labelled[start : start + len(table)]
        values = np.where(own, table.column("label").to_numpy(), -1).astype(np.int32)
        index = table.schema.get_field_index("label")
        table = table.set_column(index, table.schema.field(index), pa.array(values))
        shards.append(write_shard(folder, shard.file, table, examples=int(own.sum())))
        start += len(table)
    chosen, kept = [], [np.arange(total)]
    for shard in manifest.splits["validation"]:
        table = pq.read_table(data / shard.file)
        rows = round(validation * len(table))
        chosen.append(write_shard(folder, shard.file, table.slice(0, rows)))
        kept.append(start + np.arange(rows))
        start += len(table)
    texts = read_texts(data, manifest)
    kept.append(np.arange(start, len(texts)))
    with TextWriter(folder) as writer:
        parts = texts.split(np.concatenate(kept))
        writer.add(np.concatenate(parts), np.array([len(part) for part in parts]))
    own_texts = writer.describe()  # before the links, so that no link is written through
    for path in data.iterdir():
        if path.name != MANIFEST and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path.absolute(), target_is_directory=path.is_dir())
    key = f"{manifest.fingerprint} {seed} {labels} {validation}".encode()
    drawn = manifest.model_copy(
        update={
            "splits": {**manifest.splits, "train": shards, "validation": chosen},
            "texts": own_texts,
            "behaviors": {},
            "fingerprint": hashlib.sha256(key).hexdigest(),
        }
    )
    (folder / MANIFEST).write_text(drawn.model_dump_json(indent=1), encoding="utf-8")
    return folder


# One run, in a worker process.


def train_run(run: Run, options: Mapping[str, str], rate: float) -> dict[str, Any]:
    """Train, and return the record's line. Everything else that the run wrote is deleted, except teachers."""
    import newsbert_ray

    out, start = Path(options["out"]), time.perf_counter()
    settings = run_settings(run, options, rate)
    try:
        record = newsbert_ray.train(quiet=True, **settings)
    except BaseException:
        shutil.rmtree(settings["out"], ignore_errors=True)
        raise
    if run.stage != "teachers":
        shutil.rmtree(settings["out"], ignore_errors=True)
    else:
        shutil.rmtree(out / "teachers" / settings["out"] / "tensorboard", ignore_errors=True)
    best = record.metrics["validation"]
    return {
        "name": run.name,
        "stage": run.stage,
        "method": run.method,
        "labels": run.labels,
        "layers": run.layers,
        "seed": run.seed,
        "rate": rate,
        "unlabelled": run.unlabelled,
        "values": dict(run.values),
        "validation": _accuracies(best["student"]),
        "test": _accuracies(record.metrics["test"]["student"]),
        "teacher_validation": _accuracies(best.get("teacher")),
        "teacher_test": _accuracies(record.metrics["test"].get("teacher")),
        "best_step": record.metrics["best_step"],
        "steps": record.steps,
        "batch_size": record.settings["batch_size"],
        "curve": [[e["step"], round(e["validation"]["student"]["accuracy"], 4)] for e in record.curve],
        "seconds": round(time.perf_counter() - start, 2),
        "parts": {name: round(seconds, 2) for name, seconds in record.seconds.items()},
        "texts_per_second": round(record.titles_per_second),
        "device": record.hardware["device"],
        "settings": settings if run.stage == "teachers" else None,
    }


def _accuracies(scores: Mapping[str, float] | None) -> dict[str, float] | None:
    return {name: round(scores[name], 5) for name in ("accuracy", "macro_f1")} if scores else None


def run_settings(run: Run, options: Mapping[str, str], rate: float) -> dict[str, Any]:
    """All settings of a run, nested, as `newsbert_ray.train` takes them."""
    from newsbert_ray.methods import METHODS as KNOWN
    from newsbert_ray.settings import merge

    out = Path(options["out"])
    alone = run.method in ("teacher", "finetune", "linear")
    data = draw_shards(
        Path(options["data"]),
        out / "draws",
        seed=run.seed,
        labels=run.labels,
        validation=float(options["validation"]),
    )
    values: dict[str, Any] = merge(
        COMMON,
        {
            "method": "finetune" if run.method == "teacher" else run.method,
            "data": str(data),
            "teacher": options["teacher"],
            "student": {"layers": run.layers},
            "seed": run.seed,
            "device": options["device"],
        },
    )
    if run.stage == "teachers":
        values["out"] = str(out / "teachers" / teacher_name(run.labels, run.seed))
    else:
        values["out"] = str(Path(options["scratch"]) / run.name)
    if run.method == "best" and run.method not in KNOWN:
        values = merge(values, RECIPE)
    if run.method == "linear":
        return {name: values[name] for name in ("method", "data", "teacher", "seed", "out")}
    values["learning_rate"] = rate
    if run.method == "best":  # it has rates of its own
        own = {f"optimizer.{name}_learning_rate": rate for name in ("student", "top")}
        values = merge(values, own)
    if run.teacher is not None:
        values = merge(values, {"distill.teacher_run": str(out / "teachers" / run.teacher)})
    if not alone and run.unlabelled and run.labels is not None:
        values["unlabelled_share"] = UNLABELLED_SHARE
    return merge(values, json.loads(options["set"]), run.values)


def work(connection: Connection, options: Mapping[str, str]) -> None:
    """A worker process: receives (run, rate), answers with its record or the error, until it gets None."""
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    while (job := connection.recv()) is not None:
        run, rate = job
        try:
            connection.send(train_run(run, options, rate))
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            where = traceback.extract_tb(error.__traceback__)[-1]
            connection.send({"name": run.name, "error": text, "at": f"{where.filename}:{where.lineno}"})


# The parent: starts what is ready, appends records.


@dataclass
class Study:
    """The plan's state: what is finished, failed, running and left.

    Attributes:
        kept: folder of records.jsonl and failures.jsonl.
        times: seconds of finished runs by kind of run.
    """

    plan: list[Run]
    out: Path
    kept: Path
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    times: dict[tuple[str, int], list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        path = self.kept / "records.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            self._add(json.loads(line))

    def finish(self, record: dict[str, Any]) -> None:
        """Keep a record, or a failure, at once."""
        name = "records.jsonl" if "error" not in record else "failures.jsonl"
        with (self.kept / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._add(record)

    def next(self, running: Iterable[str], *, seconds_left: float) -> tuple[Run, float] | None:
        """The first run of the plan that is ready and whose time is left, with its rate."""
        busy = set(running)
        for run in self.plan:
            if run.name in self.records or run.name in self.failed or run.name in busy:
                continue
            rate = self.rate_of(run)
            if rate is None or not self._has_teacher(run) or self.expected(run) > seconds_left:
                continue
            tuning = self.records.get(replace(run, rate=rate).name)
            if run.rate is None and tuning is not None:  # the same run
                self.finish({**tuning, "name": run.name, "stage": run.stage})
                continue
            return run, rate
        return None

    def rate_of(self, run: Run) -> float | None:
        """The run's rate: its own, or the best of the tuning runs on validation; None before that."""
        if run.rate is not None:
            return run.rate
        method = TUNED_LIKE.get(run.method, run.method)
        labels = 1000 if run.labels == 1000 else 12000
        mine = [
            other
            for other in self.plan + self._tuning_records()
            if other.stage == "tuning"
            and (other.method, other.labels) == (method, labels)
            and (other.layers == 0) == (run.layers == 0)
        ]
        done = [self.records[other.name] for other in mine if other.name in self.records]
        settled = [other for other in mine if other.name in self.records or other.name in self.failed]
        if not done or len(settled) < len(mine):
            return None
        return float(max(done, key=lambda record: record["validation"]["accuracy"])["rate"])

    def expected(self, run: Run) -> float:
        """Seconds of a run like this: the slowest so far, or a guess."""
        times = self.times.get((run.method, run.layers)) or self.times.get((run.method, 1)) or [20.0]
        steps = run.values.get("steps") or COMMON["steps"]
        return max(times[-20:]) * float(max(1.0, steps / COMMON["steps"]))

    def left(self) -> int:
        """Runs that are neither finished nor failed."""
        return sum(run.name not in self.records and run.name not in self.failed for run in self.plan)

    def _has_teacher(self, run: Run) -> bool:
        return run.teacher is None or (self.out / "teachers" / run.teacher / "record.json").exists()

    def _tuning_records(self) -> list[Run]:
        """Tuning runs that an earlier call has finished and this plan does not hold."""
        known = {run.name for run in self.plan}
        return [run for run in _tuning() if run.name in self.records and run.name not in known]

    def _add(self, record: dict[str, Any]) -> None:
        if "error" in record:
            self.failed[record["name"]] = record["error"]
            return
        self.records[record["name"]] = record
        steps = record["values"].get("steps") or COMMON["steps"]
        kind = (record["method"], record["layers"])
        self.times.setdefault(kind, []).append(record["seconds"] * min(1.0, COMMON["steps"] / steps))


class Worker:
    """A process and the run that it works on."""

    def __init__(self, options: Mapping[str, str]) -> None:
        context = mp.get_context("spawn")
        self.connection, child = context.Pipe()
        self.process = context.Process(target=work, args=(child, options), daemon=True)
        self.process.start()
        child.close()
        self.run: Run | None = None

    def start(self, run: Run, rate: float) -> None:
        """Hand over a run."""
        self.run = run
        self.connection.send((run, rate))


def run_all(study: Study, options: Mapping[str, str], *, processes: int, minutes: float) -> None:
    """Keep `processes` workers busy until the plan is done or the time is over."""
    end = time.monotonic() + 60 * minutes
    workers = [Worker(options) for _ in range(processes)]
    done, began = 0, time.monotonic()
    try:
        while True:
            left = end - time.monotonic()
            running = [worker.run.name for worker in workers if worker.run]
            for worker in workers:
                if worker.run is None and (job := study.next(running, seconds_left=left)):
                    worker.start(*job)
                    running.append(job[0].name)
            if not running or left <= 0:
                break
            busy = {worker.connection: worker for worker in workers if worker.run}
            for connection in wait(list(busy), timeout=min(left, 30.0)):
                worker = busy[connection]  # type: ignore[index]
                assert worker.run is not None
                try:
                    record = worker.connection.recv()
                except (EOFError, OSError):
                    record = {"name": worker.run.name, "error": f"process ended: {worker.process.exitcode}"}
                    workers[workers.index(worker)] = Worker(options)
                worker.run = None
                study.finish(record)
                done += 1
                _say(record, done=done, left=study.left(), seconds=time.monotonic() - began)
    finally:
        for worker in workers:
            worker.process.kill()


def _say(record: Mapping[str, Any], *, done: int, left: int, seconds: float) -> None:
    told = record.get("error") or f"test {record['test']['accuracy']:.4f} in {record['seconds']:.1f} s"
    print(f"{seconds:6.1f} s  {done} done, {left} left: {record['name']}: {told}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts of the plan that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="shards of all titles")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--records", help="folder of records.jsonl; by default DIR")
    parser.add_argument("--plan", nargs="+", default=PARTS, help="parts of the plan")
    parser.add_argument("--only", nargs="+", default=[], help="NAME=VALUE,...: runs with these values only")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scratch", help="folder of runs at work; by default DIR/scratch")
    parser.add_argument("--validation", type=float, default=1.0, help="share of the validation titles to use")
    parser.add_argument("--set", default="{}", help="further settings of all runs, as JSON")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and end")
    options = parser.parse_args(arguments)
    out = Path(options.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    from newsbert_ray.config import ModelSettings, ScratchSettings
    from newsbert_ray.model.families import encoder_depth

    model = ModelSettings(**json.loads(options.set).get("model", {}))
    depth = encoder_depth(options.teacher, model, ScratchSettings())
    plan = [run for run in make_plan(options.plan, depth=depth) if _is_wanted(run, options.only)]
    kept = Path(options.records or out).absolute()
    kept.mkdir(parents=True, exist_ok=True)
    study = Study(plan, out, kept)
    if options.dry_run:
        for run in plan:
            print("done" if run.name in study.records else "    ", run.stage, run.name)
        print(f"{len(plan)} runs, {study.left()} left")
        return
    values = {
        "data": str(Path(options.data).absolute()),
        "teacher": str(Path(options.teacher).absolute()),
        "out": str(out),
        "scratch": options.scratch or str(out / "scratch"),
        "device": options.device,
        "set": options.set,
        "validation": str(options.validation),
    }
    run_all(study, values, processes=options.processes, minutes=options.minutes)
    shutil.rmtree(values["scratch"], ignore_errors=True)
    print(f"{study.left()} of {len(plan)} runs are left, {len(study.failed)} failed")
    for name, error in study.failed.items():
        print(f"failed: {name}: {error}", file=sys.stderr)


def _is_wanted(run: Run, only: Sequence[str]) -> bool:
    """Whether a run has one of the values of each NAME=VALUE,..."""
    for condition in only:
        name, _, values = condition.partition("=")
        if str(getattr(run, name)) not in values.split(","):
            return False
    return True


if __name__ == "__main__":
    main()
