"""What the benchmarks run on: shards and a teacher that are given, or an invented corpus and a BERT of the
size of a small pretrained one (6 layers, 384 wide), which for speed is as good."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from newsbert_ray.config import PrepareSettings, build_settings
from newsbert_ray.data.prepare import prepare
from newsbert_ray.data.synthetic import synthesize

FOLDER = Path("bench")
SIZE = {"layers": 6, "hidden": 384, "heads": 12, "feed_forward": 1536, "vocabulary": 30_000}


def add_subject(parser: argparse.ArgumentParser) -> None:
    """The flags that name shards and teacher."""
    parser.add_argument("--data", help="prepared shards; an invented corpus by default")
    parser.add_argument("--teacher", help="name or folder of the shards' encoder; needed with --data")


def subject(options: argparse.Namespace) -> dict[str, Any]:
    """`data`, `teacher` and `scratch` for TrainSettings; the invented corpus is prepared once, in bench/."""
    if options.data:
        return {"data": options.data, "teacher": options.teacher}
    sources = synthesize(FOLDER / "corpus", news=20_000, users=100)
    values = {
        "source": [str(source) for source in sources],
        "teacher": "scratch",
        "out": str(FOLDER / "shards"),
        "scratch": SIZE,
        "workers": 0,
    }
    prepare(build_settings(PrepareSettings, values))
    return {"data": str(FOLDER / "shards"), "teacher": "scratch", "scratch": SIZE}


def say(name: str, **figures: object) -> None:
    """One JSON line."""
    print(json.dumps({"figure": name, **figures}), flush=True)
