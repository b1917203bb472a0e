"""Shards and their manifest as a reader meets them: trusted only when whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from newsbert_ray.config import PrepareSettings
from newsbert_ray.data.prepare import prepare
from newsbert_ray.data.shards import (
    BEHAVIORS_SCHEMA,
    MANIFEST,
    NEWS_SCHEMA,
    Manifest,
    ShardError,
    read_manifest,
    read_shard,
)


@pytest.fixture
def prepared(tmp_path: Path, corpus: tuple[Path, Path], teacher: Path) -> tuple[Path, Manifest]:
    """Shards of the small corpus."""
    settings = PrepareSettings(
        source=[str(folder) for folder in corpus], teacher=str(teacher), out=str(tmp_path / "out"), workers=0
    )
    return tmp_path / "out", prepare(settings, say=lambda line: None)


def test_what_is_written_is_read(prepared: tuple[Path, Manifest]) -> None:
    """A reader that sees another schema than the writer wrote shifts columns in silence."""
    folder, manifest = prepared
    assert read_manifest(folder) == manifest
    for splits, schema in ((manifest.splits, NEWS_SCHEMA), (manifest.behaviors, BEHAVIORS_SCHEMA)):
        for shards in splits.values():
            for shard in shards:
                table = read_shard(folder, shard)
                assert (table.schema, len(table)) == (schema, shard.rows)
    shard = manifest.splits["test"][0]
    assert read_shard(folder, shard, columns=["label"]).column_names == ["label"]


@pytest.mark.parametrize("position", [0, 100, -1, -30])
def test_a_flipped_byte_is_noticed(prepared: tuple[Path, Manifest], position: int) -> None:
    """One bit of a token id would train on another word."""
    folder, manifest = prepared
    shard = manifest.splits["train"][0]
    content = bytearray((folder / shard.file).read_bytes())
    content[position] ^= 1
    (folder / shard.file).write_bytes(content)
    with pytest.raises(ShardError, match=rf"{shard.file}: shard is damaged.*--overwrite true"):
        read_shard(folder, shard)


@pytest.mark.parametrize("kept", [0, 10, -1])
def test_a_cut_shard_is_noticed(prepared: tuple[Path, Manifest], kept: int) -> None:
    """A copy that broke off must not look like a smaller corpus."""
    folder, manifest = prepared
    shard = manifest.splits["train"][0]
    path = folder / shard.file
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ShardError, match="shard is damaged"):
        read_shard(folder, shard)
    path.unlink()
    with pytest.raises(ShardError, match="shard is missing"):
        read_shard(folder, shard)


def test_a_manifest_that_cannot_be_trusted(prepared: tuple[Path, Manifest]) -> None:
    """A half-written or foreign manifest must say what to do, not raise a key error later."""
    folder, _ = prepared
    path = folder / MANIFEST
    whole = path.read_text(encoding="utf-8")
    for text in ("", whole[:100], whole.replace('"labels"', '"label"'), "[]"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ShardError, match="damaged manifest"):
            read_manifest(folder)
    path.write_text(json.dumps({**json.loads(whole), "format": 99}), encoding="utf-8")
    with pytest.raises(ShardError, match="format 99, this version reads 2"):
        read_manifest(folder)
    path.unlink()
    with pytest.raises(ShardError, match="no prepared shards there; make them with: newsbert-ray prepare"):
        read_manifest(folder)
