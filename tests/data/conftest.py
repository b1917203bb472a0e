"""A small synthetic corpus and a tokeniser learned from it, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from newsbert_ray.data.synthetic import synthesize
from newsbert_ray.data.tokens import learn_tokenizer


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders for training (240 news, 60 impressions) and test (60 new, 30 old news, 30 impressions)."""
    train, dev = synthesize(
        tmp_path_factory.mktemp("corpus"), news=240, users=30, impressions_per_user=2, topics=3
    )
    return train, dev


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, corpus: tuple[Path, Path]) -> Path:
    """A folder with a tokeniser only: all that `prepare` wants of a teacher."""
    folder = tmp_path_factory.mktemp("encoders") / "tiny"
    lines = (corpus[0] / "news.tsv").read_text(encoding="utf-8").splitlines()
    titles = [line.split("\t")[3] for line in lines]
    learn_tokenizer(lambda: iter(titles), vocabulary=400).save(folder)
    return folder
