"""Shards and their manifest as a reader meets them: trusted only when whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from newsbert_ray.config import PrepareSettings
from newsbert_ray.data.prepare import prepare
from newsbert_ray.data.shards import (
    BEHAVIORS_SCHEMA,
    MANIFEST,
    NEWS_SCHEMA,
    OFFSETS,
    TOKENS,
    Manifest,
    ShardError,
    TextTable,
    TextWriter,
    Tokenizer,
    read_manifest,
    read_shard,
    read_texts,
)
from tests.conftest import change_json


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
    with pytest.raises(ShardError, match=rf"{shard.file}: damaged.*--overwrite"):
        read_shard(folder, shard)


@pytest.mark.parametrize("kept", [0, 10, -1])
def test_a_cut_shard_is_noticed(prepared: tuple[Path, Manifest], kept: int) -> None:
    """A copy that broke off must not look like a smaller corpus."""
    folder, manifest = prepared
    shard = manifest.splits["train"][0]
    path = folder / shard.file
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ShardError, match="damaged"):
        read_shard(folder, shard)
    path.unlink()
    with pytest.raises(ShardError, match="missing"):
        read_shard(folder, shard)


def test_a_changed_tokeniser_is_refused(prepared: tuple[Path, Manifest]) -> None:
    """A student would learn other tokens than its shards hold."""
    folder, _ = prepared
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace("a", "b", 1), encoding="utf-8")
    with pytest.raises(ShardError, match=r"tokenizer\.json: damaged: its content has changed; prepare again"):
        read_manifest(folder)
    change_json(folder / MANIFEST, tokenizer_files={})
    assert read_manifest(folder).tokenizer_files == {}


def test_a_manifest_that_cannot_be_trusted(prepared: tuple[Path, Manifest]) -> None:
    """A half-written or foreign manifest must say what to do, not raise a key error later."""
    folder, _ = prepared
    path = folder / MANIFEST
    whole = path.read_text(encoding="utf-8")
    for text in ("", whole[:100], whole.replace('"labels"', '"label"'), "[]"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ShardError, match="damaged manifest"):
            read_manifest(folder)
    path.write_text(whole.replace('"format": 2', '"format": 1'), encoding="utf-8")
    with pytest.raises(ShardError, match=r"damaged manifest \(.*changed since it was written"):
        read_manifest(folder)
    path.write_text(whole, encoding="utf-8")
    texts = json.loads(whole)["texts"]
    change_json(path, texts={**texts, "rows": texts["rows"] - 1})
    with pytest.raises(
        ShardError, match=rf"shards of {texts['rows']} news, but {texts['rows'] - 1} tokenised"
    ):
        read_manifest(folder)
    change_json(path, format=99)
    with pytest.raises(ShardError, match="format 99, this version reads 2"):
        read_manifest(folder)
    path.unlink()
    with pytest.raises(ShardError, match="no prepared shards there; make them with: newsbert-ray prepare"):
        read_manifest(folder / "none")
    (folder / "label").mkdir(exist_ok=True)  # a folder of LABEL/*.txt, which must not become --out
    with pytest.raises(ShardError, match=f"prepare --source {folder} --teacher NAME_OR_DIR --out SHARDS"):
        read_manifest(folder)
    path.touch()
    with pytest.raises(ShardError, match=f"a file of prepared shards; give its folder, {folder}"):
        read_manifest(path)


BLOCKS = [([5, 6, 7, 8, 9], [2, 3]), ([], []), ([1], [1]), ([2, 3], [2])]


def written(folder: Path) -> Manifest:
    """A manifest that holds nothing but a table of four texts."""
    with TextWriter(folder) as writer:
        for ids, lengths in BLOCKS:
            writer.add(np.array(ids, np.int32), np.array(lengths, np.int64))
    texts = writer.describe()
    return Manifest(
        format=2,
        fingerprint="",
        settings={},
        sources=[],
        tokenizer=Tokenizer(name="", sha256="", vocabulary=10, pad_id=0),
        labels=[],
        splits={},
        others=[],
        behaviors={},
        pairs={},
        texts=texts,
        statistics={},
        rejected={},
    )


def test_what_is_written_is_mapped(tmp_path: Path) -> None:
    """Offsets wrong by one would give every news its neighbour's words."""
    table = read_texts(tmp_path, written(tmp_path))
    assert isinstance(table.tokens, np.memmap)
    assert len(table) == 4
    assert table.lengths(np.array([3, 0])).tolist() == [2, 2]
    ids, mask = table.ids(np.array([1, 2, 0, 1]), pad_id=99)
    assert ids.tolist() == [[7, 8, 9], [1, 99, 99], [5, 6, 99], [7, 8, 9]]
    assert mask.tolist() == [[True] * 3, [True, False, False], [True, True, False], [True] * 3]
    assert np.load(tmp_path / TOKENS).tolist() == [5, 6, 7, 8, 9, 1, 2, 3]


def test_no_texts_asked(tmp_path: Path) -> None:
    """A batch without a history must not end in numpy's frames."""
    ids, mask = TextTable(np.arange(3, dtype=np.int32), np.array([0, 3])).ids(np.zeros(0, np.int64), pad_id=0)
    assert ids.shape == mask.shape == (0, 1)


@pytest.mark.parametrize("name", [TOKENS, OFFSETS])
def test_a_damaged_table_is_refused(tmp_path: Path, name: str) -> None:
    """One bit of a token id would train on another word, in silence."""
    manifest = written(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ShardError, match=rf"{name}: damaged .*; prepare again"):
        read_texts(tmp_path, manifest)
    (tmp_path / name).unlink()
    with pytest.raises(ShardError, match=rf"{name}: missing; prepare again"):
        read_texts(tmp_path, manifest)
