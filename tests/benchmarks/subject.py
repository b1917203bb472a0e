"""What the benchmarks run on: given shards and teacher, or a synthetic corpus and a BERT from random weights.

The BERT has the size of a small pretrained one (6 layers, 384 wide); its speed is the same.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from newsbert_ray.config import PrepareSettings, TrainSettings, build_settings
from newsbert_ray.data.prepare import prepare
from newsbert_ray.data.synthetic import synthesize
from newsbert_ray.record import RECORD
from newsbert_ray.training.run import train

FOLDER = Path("bench")
SIZE = {"layers": 6, "hidden": 384, "heads": 12, "feed_forward": 1536, "vocabulary": 30_000}


def add_subject(parser: argparse.ArgumentParser) -> None:
    """Add the flags for shards and teacher."""
    parser.add_argument("--data", help="prepared shards; an invented corpus by default")
    parser.add_argument("--teacher", help="name or folder of the shards' encoder; needed with --data")


CONSTANT = {"learning_rate": 5e-5, "precision": "fp32", "optimizer": {"decay": "none", "warmup_share": 0.0}}
"""Another program's loop has the same rate at each step and computes in fp32, whatever the defaults are."""


def subject(options: argparse.Namespace, **corpus: Any) -> dict[str, Any]:
    """`data`, `teacher`, `scratch` and a constant rate; the invented corpus is prepared once, in bench/.

    Args:
        corpus: arguments of `synthesize` that a benchmark wants otherwise; it then has a folder of its own.
    """
    if options.data:
        return {"data": options.data, "teacher": options.teacher, **CONSTANT}
    name = "-".join(f"{key}{value}" for key, value in corpus.items())
    sources = synthesize(FOLDER / f"corpus{name}", **{"news": 20_000, "users": 100, **corpus})
    values = {
        "source": [str(source) for source in sources],
        "teacher": "scratch",
        "out": str(FOLDER / f"shards{name}"),
        "scratch": SIZE,
        "workers": 0,
    }
    prepare(build_settings(PrepareSettings, values))
    return {"data": str(FOLDER / f"shards{name}"), "teacher": "scratch", "scratch": SIZE, **CONSTANT}


def finished_run(run: str | None, options: argparse.Namespace) -> Path:
    """The given run, or a short run with a one-layer student, trained once in bench/."""
    if run is not None:
        return Path(run)
    out = FOLDER / "run"
    if not (out / RECORD).is_file():
        values = {"out": str(out), "student": {"layers": 1}, "train_rows": 2000, "epochs": 1}
        train(build_settings(TrainSettings, {**subject(options), **values}), quiet=True)
    return out


def say(name: str, **figures: object) -> None:
    """One JSON line."""
    print(json.dumps({"figure": name, **figures}), flush=True)
