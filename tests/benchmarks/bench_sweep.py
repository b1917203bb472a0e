"""Overhead of a sweep: the same short trials by `newsbert-ray sweep`, a plain process, and an Optuna pool.

    python -m tests.benchmarks.bench_sweep [--data SHARDS --teacher NAME_OR_DIR] [--trials 16] [--steps 20]

The sweep and the Optuna pool have two slots. All three train the same settings on the same shards with one
thread per trial, in processes that stay warm. The first trial of a process, with imports and loading of the
teacher, is reported separately. `start` is the time from the call of a trial to its first step, `between` the
time from the end of a trial to the next call in the same process. The rounds of `--repeats` take turns, and
the table has their medians.

Two trials side by side may slow each other down, which cannot happen in one plain process. The pool shows how
much that is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from newsbert_ray.config import TrainSettings, build_settings, merge
from newsbert_ray.ray_session import ray_session
from newsbert_ray.record import RunRecord
from tests.benchmarks.subject import add_subject, say, subject

SLOTS = 2
STAMP = "stamp.json"
SPACE = """\
name: bench_sweep
settings: {{}}
space:
  distill.beta: {{grid: [{betas}]}}
seeds: [0]
"""


@dataclass(frozen=True)
class Stamp:
    """When a trial was called, took its first step and ended (system clock, seconds), and its process."""

    process: int
    called: float
    stepped: float
    ended: float


@dataclass(frozen=True)
class Round:
    """One way of running all trials: its start, the stamps of the trials, and the time of Ray's start."""

    began: float
    stamps: tuple[Stamp, ...]
    processes: int
    ray: float = 0.0

    def figures(self) -> dict[str, float]:
        """The seconds in the table."""
        ordered = sorted(self.stamps, key=lambda stamp: stamp.called)
        by_process: dict[int, list[Stamp]] = {}
        for stamp in ordered:
            by_process.setdefault(stamp.process, []).append(stamp)
        later = [stamp for stamps in by_process.values() for stamp in stamps[1:]]
        gaps = [b.called - a.ended for s in by_process.values() for a, b in itertools.pairwise(s)]
        ended = max(stamp.ended for stamp in ordered)
        return {
            "before": ordered[0].called - self.began,
            "wall": ended - ordered[0].called,
            "slot_seconds": self.processes * (ended - ordered[0].called),
            "own_seconds": sum(stamp.ended - stamp.called for stamp in ordered),
            "later_own": statistics.fmean(stamp.ended - stamp.called for stamp in later),
            "later_slot": sum(s[-1].ended - s[0].ended for s in by_process.values()) / len(later),
            "start_first": statistics.fmean(s[0].stepped - s[0].called for s in by_process.values()),
            "start_later": statistics.median(stamp.stepped - stamp.called for stamp in later),
            "start_worst": max(stamp.stepped - stamp.called for stamp in later),
            "between": statistics.median(gaps),
            "ray": self.ray,
        }


def main() -> None:
    """Print a JSON line for each round, then the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_subject(parser)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20, help="updates of 32 titles in a trial, one epoch")
    parser.add_argument("--repeats", type=int, default=1, help="rounds of all three, in turn")
    options = parser.parse_args()
    common = {
        **subject(options, news=2_000),  # a trial also evaluates; that must not take most of its time
        "student.layers": 1,
        "epochs": 1,
        "batch_size": 32,
        "train_rows": options.steps * 32,
        "threads": 1,
        "checkpoint.keep_finished": False,
    }
    betas = [round(0.3 * index / max(1, options.trials - 1), 4) for index in range(options.trials)]
    rounds_by_way: dict[str, list[dict[str, float]]] = {"plain process": [], "Optuna, pool": [], "sweep": []}
    ways = dict(zip(rounds_by_way, (in_one_process, in_a_pool, in_a_sweep), strict=True))
    for repeat in range(options.repeats):
        for name, way in ways.items():
            with tempfile.TemporaryDirectory(prefix="bench-") as folder:
                figures = way(common, betas, Path(folder)).figures()
            say(name, round=repeat, **{key: round(value, 3) for key, value in figures.items()})
            rounds_by_way[name].append(figures)
    print(table(rounds_by_way))


def stamped(settings: TrainSettings, *, report: Any, quiet: bool) -> RunRecord:
    """`train` that writes a Stamp into the run's folder. Self-contained: it is sent to other processes."""
    import json
    import os
    import time
    from pathlib import Path
    from unittest.mock import patch

    called = time.time()
    from newsbert_ray.training.run import train
    from newsbert_ray.training.step import train_step

    stepped: list[float] = []

    def noting(*args: Any, **options: Any) -> Any:
        stepped.append(time.time())
        return train_step(*args, **options)

    with patch("newsbert_ray.training.loop.train_step", noting):
        record = train(settings, report=report, quiet=quiet)
    stamp = {"process": os.getpid(), "called": called, "stepped": stepped[0], "ended": time.time()}
    (Path(settings.out) / "stamp.json").write_text(json.dumps(stamp), encoding="utf-8")
    return record


def train_one(values: Mapping[str, Any]) -> float:
    """A trial in a process of its own: its validation accuracy."""
    settings = build_settings(TrainSettings, values)
    metrics = stamped(settings, report=None, quiet=True).metrics
    return float(metrics["validation"]["student"]["accuracy"])


def train_all(every: Sequence[Mapping[str, Any]]) -> None:
    """All trials, one after the other."""
    for values in every:
        train_one(values)


def in_one_process(common: Mapping[str, Any], betas: Sequence[float], folder: Path) -> Round:
    """Nothing but `train` in a loop."""
    began = time.time()
    with _pool(1) as pool:
        pool.submit(train_all, [_values(common, beta, folder) for beta in betas]).result()
    return Round(began, _stamps(folder), processes=1)


def in_a_pool(common: Mapping[str, Any], betas: Sequence[float], folder: Path) -> Round:
    """Optuna in this process, with as many trials at once as the sweep has slots."""
    began = time.time()
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    for beta in betas:
        study.enqueue_trial({"beta": beta})
    running: dict[Any, optuna.Trial] = {}
    started = 0
    with _pool(SLOTS) as pool:
        while started < len(betas) or running:
            while started < len(betas) and len(running) < SLOTS:
                trial = study.ask()
                values = _values(common, trial.suggest_float("beta", 0.0, 0.3), folder)
                running[pool.submit(train_one, values)] = trial
                started += 1
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                study.tell(running.pop(future), future.result())
    return Round(began, _stamps(folder), processes=SLOTS)


def in_a_sweep(common: Mapping[str, Any], betas: Sequence[float], folder: Path) -> Round:
    """The sweep, in a Ray session of this process, so that Ray's start is measured separately."""
    from newsbert_ray import sweep

    space = folder / "space.yaml"
    space.write_text(SPACE.format(betas=", ".join(map(str, betas))), encoding="utf-8")
    opened = time.time()
    with ray_session(cpus=SLOTS):
        began = time.time()
        sweep(space, out=folder / "sweep", overrides=common, train=stamped)
    return Round(began, _stamps(folder), processes=SLOTS, ray=began - opened)


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))


def _values(common: Mapping[str, Any], beta: float, folder: Path) -> dict[str, Any]:
    return merge(common, {"distill.beta": beta, "out": str(folder / f"beta={beta}")})


def _stamps(folder: Path) -> tuple[Stamp, ...]:
    return tuple(Stamp(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.rglob(STAMP))


def table(rounds_by_way: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Medians over the rounds, as Markdown; ratios are to the plain process."""
    middle = {
        name: {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        for name, rounds in rounds_by_way.items()
    }
    plain = middle["plain process"]
    rows = {
        "seconds until the first trial is called (without Ray's start)": "before",
        "Ray's start": "ray",
        "first trial's call to the last one's end": "wall",
        "the same times slots: seconds of slots": "slot_seconds",
        "the trials' own seconds": "own_seconds",
        "a later trial of a process, its own seconds": "later_own",
        "a later trial of a process, seconds of its slot": "later_slot",
        "call to first step, a process's first trial": "start_first",
        "call to first step, later trials, median": "start_later",
        "call to first step, later trials, worst": "start_worst",
        "between two trials of a process, median": "between",
    }
    lines = [f"| | {' | '.join(middle)} |", "|---" * (len(middle) + 1) + "|"]
    for label, key in rows.items():
        lines.append(f"| {label} | {' | '.join(f'{one[key]:.2f}' for one in middle.values())} |")
    for label, key in (
        ("own seconds", "own_seconds"),
        ("seconds of slots", "slot_seconds"),
        ("a later trial's own seconds", "later_own"),
        ("a later trial's seconds of its slot", "later_slot"),
    ):
        ratios = " | ".join(f"{one[key] / plain[key]:.2f}" for one in middle.values())
        lines.append(f"| {label}, to the plain process | {ratios} |")
    for label, keys in (("trials alone", ("wall",)), ("with starts", ("wall", "before", "ray"))):
        walls = {name: sum(one[key] for key in keys) for name, one in middle.items()}
        ratios = " | ".join(f"{wall / walls['Optuna, pool']:.2f}" for wall in walls.values())
        lines.append(f"| wall time to Optuna's, {label} | {ratios} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
