"""A small synthetic corpus and a tokeniser learned from it, made once; prepared behaviours by their ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from newsbert_ray.data.examples import Titles
from newsbert_ray.data.shards import SPLITS, TextTable, offsets_of, read_manifest, read_shard
from newsbert_ray.data.synthetic import synthesize
from newsbert_ray.data.tokenizer import learn_tokenizer


def news_ids(out: Path) -> list[str]:
    """The news id of each row of the table of texts."""
    manifest = read_manifest(out)
    shards = [*(shard for split in SPLITS for shard in manifest.splits[split]), *manifest.others]
    return [name for shard in shards for name in read_shard(out, shard, ["news_id"])["news_id"].to_pylist()]


def read_impressions_by_id(out: Path) -> dict[str, dict[str, Any]]:
    """Each impression by its split and id, with the ids of its news for their rows."""
    names = news_ids(out)
    impressions: dict[str, dict[str, Any]] = {}
    for split, shards in read_manifest(out).behaviors.items():
        for row in (row for shard in shards for row in read_shard(out, shard).to_pylist()):
            lists = {
                kind: [names[at] if at >= 0 else None for at in row[kind]]
                for kind in ("history", "candidates")
            }
            impressions[f"{split} {row['impression_id']}"] = {**row, **lists}
    return impressions


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


def titles(count: int, seed: int = 0) -> Titles:
    """Random titles of 3 to 12 tokens; title i has label i, so that it can be followed."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(3, 13, count)
    tokens = generator.integers(5, 99, lengths.sum()).astype(np.int32)
    return Titles(TextTable(tokens, offsets_of(lengths)), np.arange(count), np.arange(count))
