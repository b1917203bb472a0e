"""Speed of a distillation step in this package and in others, and of a sweep's trials and Optuna's.

    python -m tests.benchmarks.bench_peers [--data SHARDS --teacher NAME_OR_DIR] [--layers 1] [--out FILE]

In each job the programs have the same starting weights, batches, padding, losses, Adam (fused, fp32, no
dropout) and threads, but for what `differs` says. Batches are tensors before the clock starts.

- joint: teacher and student learn together (method newsbert); of the others only a Trainer can
- layers: a frozen teacher is read at every step; labels, soft labels, embedding layer and hidden states
- random batches: the same, but the others read the titles in random batches, as a DataLoader draws them,
  padded to the longest; ours puts like lengths together
- soft labels: a frozen teacher is read at every step; labels and soft labels (method twinbert)
- stored: the same with the teacher's outputs stored before, as the method does it
- embeddings: MSE of text embeddings to the teacher's stored ones, as Sentence Transformers' example of layer
  reduction does it
- sweep: short trials of a small encoder, two at once: our sweep, and Optuna with a pool of warm processes

Each program runs its own training loop in a thread; a step is the time from one batch to the next. They take
turns, step by step. A round has each batch once, and `times slower` compares rounds. `loss after` is the
task's loss on these batches at the end; it is equal where the mathematics is.

`pip install -e '.[peers]'` installs what is compared, but for torchdistill, whose torchvision must be of
torch's own build. With the CPU build: `pip install torchdistill torchvision --extra-index-url
https://download.pytorch.org/whl/cpu`. A package that is missing is left out.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import Semaphore, Thread
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from newsbert_ray.data.shards import read_manifest
from tests.benchmarks import peers
from tests.benchmarks.bench_sweep import in_a_pool, in_a_sweep
from tests.benchmarks.peers import Classifier, Given, Wait
from tests.benchmarks.subject import add_subject, say, subject

SMALL = {"layers": 2, "hidden": 64, "heads": 4, "feed_forward": 128}
"""The encoder of a sweep's trials: what is around the training must show."""


@dataclass(frozen=True)
class Entry:
    """A program of a job; `needs`: packages, besides ours, that it is installed by."""

    name: str
    loop: Callable[..., None]
    needs: str = ""
    differs: str = ""


OURS, TRAINER, BREWER = "newsbert_ray", "transformers' Trainer", "TextBrewer"
NO_NEWS: dict[str, Any] = {"distill.weights.news_embedding": 0.0, "distill.weights.user_embedding": 0.0}
ONLY_NEWS: dict[str, Any] = {
    "distill.weights.student_task": 0.0,
    "distill.weights.soft_labels": 0.0,
    "distill.weights.news_embedding": 1.0,
}
RANDOM = "random batches"
LAYERS = [
    Entry(OURS, partial(peers.ours, method="disjoint", **NO_NEWS)),
    Entry(TRAINER, partial(peers.trainer, hidden=True), "accelerate"),
    Entry(BREWER, partial(peers.textbrewer, hidden=True), "textbrewer"),
    Entry(
        "torchdistill",
        partial(peers.torchdistill, hidden=True),
        "torchdistill",
        "padding counts in the losses of layers",
    ),
]
JOBS = {
    "joint": [
        Entry(OURS, peers.ours),
        Entry(TRAINER, partial(peers.trainer, joint=True), "accelerate", "no momentum"),
    ],
    "layers": LAYERS,
    RANDOM: [LAYERS[0], *(replace(entry, differs="random batches") for entry in LAYERS[1:])],
    "soft labels": [
        Entry(OURS, partial(peers.ours, method="twinbert")),
        Entry(TRAINER, peers.trainer, "accelerate"),
        Entry(BREWER, peers.textbrewer, "textbrewer"),
        Entry("torchdistill", peers.torchdistill, "torchdistill"),
    ],
    "stored": [
        Entry(OURS, partial(peers.ours, method="twinbert", stored=True)),
        Entry(TRAINER, partial(peers.trainer, stored=True), "accelerate"),
        Entry(BREWER, partial(peers.textbrewer, stored=True), "textbrewer", "order of the batches"),
    ],
    "embeddings": [
        Entry(OURS, partial(peers.ours, method="twinbert", stored=True, **ONLY_NEWS)),
        Entry(
            "Sentence Transformers",
            peers.sentence_transformers,
            "sentence-transformers accelerate",
            "mean pooling, not attentive",
        ),
    ],
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a JSON line for each program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_subject(parser)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=8, help="batches of a round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after one that does not count")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", nargs="+", default=[*JOBS, "sweep"], choices=[*JOBS, "sweep"])
    parser.add_argument("--trials", type=int, default=12, help="of a sweep")
    parser.add_argument("--sweeps", type=int, default=3, help="rounds of the sweep")
    parser.add_argument("--out", type=Path, help="also write the JSON lines to this file")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    shown: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        values = {
            **subject(options),
            "student.layers": options.layers,
            "batch_size": options.batch_size,
            "threads": options.threads,
        }
        given = Given.make(values, Path(folder), batches=options.batches)
        for job in options.jobs:
            found = (
                sweep_figures(given, options) if job == "sweep" else step_figures(job, given, options.rounds)
            )
            for name, figures in found:
                say(f"{job}: {name}", **figures)
                shown[f"{job}: {name}"] = figures
    if options.out:
        lines = [json.dumps({"figure": name, **figures}) + "\n" for name, figures in shown.items()]
        options.out.write_text("".join(lines), encoding="utf-8")


class FinishedError(Exception):
    """Ends a program's loop."""


class Program:
    """A training loop in a thread of its own, that waits for its turn before each step."""

    def __init__(self, loop: Callable[[Wait], object]) -> None:
        self._turn, self._done = Semaphore(0), Semaphore(0)
        self._over = False
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, args=(loop,), daemon=True)
        self._thread.start()
        self._await()

    def step(self) -> float:
        """Let it do one step; its seconds."""
        began = time.perf_counter()
        self._turn.release()
        self._await()
        return time.perf_counter() - began

    def end(self) -> None:
        self._over = True
        self._turn.release()
        self._thread.join()

    def _await(self) -> None:
        self._done.acquire()
        if self._error is not None:
            raise self._error

    def _run(self, loop: Callable[[Wait], object]) -> None:
        try:
            loop(self._wait)
            raise RuntimeError("a program's loop has ended by itself")
        except FinishedError:
            pass
        except BaseException as error:
            self._error = error
            self._done.release()

    def _wait(self) -> None:
        self._done.release()
        self._turn.acquire()
        if self._over:
            raise FinishedError


def step_figures(job: str, given: Given, rounds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and figures of each program of a job that is installed."""
    given = shuffled(given) if job == RANDOM else given
    programs: dict[Entry, Program] = {}
    students: dict[Entry, Classifier] = {}
    for entry in JOBS[job]:
        if missing := [name for name in entry.needs.split() if find_spec(name.replace("-", "_")) is None]:
            print(f"{entry.name} is left out: pip install {' '.join(missing)}", file=sys.stderr)
            continue
        programs[entry] = Program(partial(entry.loop, given, keep=partial(students.__setitem__, entry)))
    seconds = {entry: [0.0] * (1 + rounds) for entry in programs}
    for number in range(1 + rounds):
        for _ in given.batches:
            for entry, program in programs.items():
                seconds[entry][number] += program.step()
    for program in programs.values():
        program.end()
    titles = sum(len(batch["labels"]) for batch in given.batches)
    first = seconds[JOBS[job][0]][1:]
    for entry, own in seconds.items():
        yield (
            entry.name,
            {
                **spread("titles_per_second", [titles / one for one in own[1:]]),
                **spread("times_slower", [one / other for one, other in zip(own[1:], first, strict=True)]),
                "loss_after": None if job == "embeddings" else task_loss(students[entry], given),
                "differs": entry.differs,
            },
        )


def shuffled(given: Given) -> Given:
    """The same titles in random batches of the same size, each padded to its longest."""
    pad_id = read_manifest(given.values["data"]).tokenizer.pad_id
    titles = [
        (ids[mask.bool()], label)
        for batch in given.batches
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ]
    random.Random(0).shuffle(titles)
    size, batches = len(given.batches[0]["labels"]), []
    for start in range(0, len(titles), size):
        ids, labels = zip(*titles[start : start + size], strict=True)
        masks = [torch.ones_like(one) for one in ids]
        batches.append(
            {
                "input_ids": pad_sequence([*ids], batch_first=True, padding_value=pad_id),
                "attention_mask": pad_sequence(masks, batch_first=True),
                "labels": torch.stack(labels),
            }
        )
    return replace(given, batches=batches)


def sweep_figures(given: Given, options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Trials a minute from the first trial's call to the last one's end, and with what comes before."""
    common = {
        "data": given.values["data"], "teacher": "scratch", "scratch": SMALL, "student.layers": 1,
        "epochs": 1, "batch_size": 32, "train_rows": 640, "threads": 1, "checkpoint.keep_finished": False,
    }  # fmt: skip
    betas = [round(0.3 * index / max(1, options.trials - 1), 4) for index in range(options.trials)]
    ways = {OURS: in_a_sweep, "Optuna, pool": in_a_pool}
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(options.sweeps):
        for name, way in ways.items():
            with tempfile.TemporaryDirectory(dir=given.folder) as folder:
                figures[name].append(way(common, betas, Path(folder)).figures())
    for name, rounds in figures.items():
        pairs = zip(rounds, figures[OURS], strict=True)
        whole = [one["wall"] + one["before"] + one["ray"] for one in rounds]
        yield (
            name,
            {
                **spread("trials_per_minute", [60 * len(betas) / one["wall"] for one in rounds]),
                **spread("times_longer", [one["wall"] / other["wall"] for one, other in pairs]),
                "trials_per_minute_with_start": 60 * len(betas) / statistics.median(whole),
            },
        )


def spread(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if values[1:] else 3 * [*values]
    return {name: middle, f"{name}_quartiles": [low, high]}


@torch.no_grad()
def task_loss(student: Classifier, given: Given) -> float:
    """The mean loss of the labels over the batches."""
    return statistics.fmean(float(student(**batch)["loss"]) for batch in given.batches)


if __name__ == "__main__":
    main()
