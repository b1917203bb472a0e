"""A finished topics run, made once for all tests of what a student does at work."""

from __future__ import annotations

from pathlib import Path

import pytest

from newsbert_ray.config import TrainSettings, build_settings, merge
from newsbert_ray.training.run import train


@pytest.fixture(scope="session")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch of two layers, 16 wide."""
    out = tmp_path_factory.mktemp("serving") / "run"
    values = {
        "data": str(shards),
        "teacher": "scratch",
        "out": str(out),
        "scratch": {"layers": 4, "hidden": 16, "heads": 2, "feed_forward": 32},
        "model.query_size": 8,
        "student.layers": 2,
        "epochs": 1,
        "threads": 1,
    }
    train(build_settings(TrainSettings, merge({}, values)), quiet=True)
    return out
