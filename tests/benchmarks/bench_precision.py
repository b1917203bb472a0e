"""The gain of each setting that makes a step cheaper: bf16 and compiled layers, alone and together.

    python -m tests.benchmarks.bench_precision [--data SHARDS --teacher NAME_OR_DIR] [--steps 20]

Each method's steps in fp32 and in the other settings take turns, over the same batches, with the default
dropout. A frozen teacher's outputs are computed in each step where a loss reads its layers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from itertools import islice
from typing import Any

from newsbert_ray.config import TrainSettings, build_settings, merge
from newsbert_ray.data.reading import World, make_schedule, read_updates
from newsbert_ray.data.shards import read_manifest
from newsbert_ray.training.step import Learner, train_step
from newsbert_ray.training.worker import build_worker_learner
from tests.benchmarks.subject import add_subject, say, subject

WARM_UP = 3
RUNS: Mapping[str, Mapping[str, Any]] = {  # method-layers
    "newsbert-1": {"method": "newsbert"},
    "newsbert-3": {"method": "newsbert", "student": {"layers": 3}},
    "tinybert-1": {"method": "tinybert"},
    "disjoint-1": {"method": "disjoint"},
    "finetune-6": {"method": "finetune", "student": {"layers": 6}},
    "finetune-1": {"method": "finetune"},
    "finetune-0": {"method": "finetune", "student": {"layers": 0}},
    "recommendation-1": {"method": "newsbert", "task": "recommendation"},
}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "compile": {"compile": True},
    "bf16+compile": {"precision": "bf16", "compile": True},
}


def main() -> None:
    """Print one JSON line per method."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_subject(parser)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["fp32", "bf16"])
    options = parser.parse_args()
    common = {
        "out": "unused",
        "student": {"layers": 1},
        "batch_size": options.batch_size,
        "threads": options.threads,
        "precision": "fp32",
        "epochs": 100,
    }
    for name in options.runs:
        values = merge(subject(options), merge(common, RUNS[name]))
        seconds = step_seconds(values, options.settings, steps=options.steps)
        reference = seconds[options.settings[0]]
        for other in options.settings[1:]:
            ratios = sorted(a / b for a, b in zip(reference, seconds[other], strict=True))
            say(
                f"{name}: {other}",
                times_fp32=statistics.median(ratios),
                quartiles=[ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
            )


def step_seconds(values: Mapping[str, Any], names: list[str], *, steps: int) -> dict[str, list[float]]:
    """Seconds of each step in each of the settings, in turns over the same updates."""
    learners: dict[str, Learner] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        settings = build_settings(TrainSettings, merge(values, SETTINGS[name]))
        schedule = make_schedule(settings, read_manifest(settings.data))
        learners[name] = build_worker_learner(settings, schedule, World(), stand_in=True)
    for update in islice(read_updates(schedule), WARM_UP + steps):
        for name, learner in learners.items():
            start = time.perf_counter()
            train_step(learner, update.parts, step=update.step)
            seconds[name].append(time.perf_counter() - start)
    return {name: each[WARM_UP:] for name, each in seconds.items()}


if __name__ == "__main__":
    main()
