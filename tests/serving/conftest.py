"""Finished topics runs, made once for all tests of what a student does at work."""

from __future__ import annotations

from pathlib import Path

import pytest

from newsbert_ray.config import TrainSettings, build_settings, merge
from newsbert_ray.training.run import train


def _train(shards: Path, out: Path, layers: int, method: str = "newsbert") -> Path:
    values = {
        "data": str(shards),
        "teacher": "scratch",
        "out": str(out),
        "method": method,
        "scratch": {"layers": 4, "hidden": 16, "heads": 2, "feed_forward": 32},
        "model.query_size": 8,
        "student.layers": layers,
        "epochs": 1,
        "threads": 1,
    }
    train(build_settings(TrainSettings, merge({}, values)), quiet=True)
    return out


@pytest.fixture(scope="session")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch of two layers, 16 wide."""
    return _train(shards, tmp_path_factory.mktemp("serving") / "run", 2)


@pytest.fixture(scope="session")
def static_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch of word vectors, 16 wide."""
    return _train(shards, tmp_path_factory.mktemp("serving") / "static", 0, "finetune")


@pytest.fixture(scope="session")
def linear_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TF-IDF and a linear SVM."""
    return _train(shards, tmp_path_factory.mktemp("serving") / "linear", 0, "linear")
