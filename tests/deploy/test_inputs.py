"""Shards and teachers that a run would fail on are found before it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel

from newsbert_ray.data.shards import MANIFEST
from newsbert_ray.deploy.doctor import check_shards, check_teacher
from tests.deploy.conftest import ill, the_one_to_mend


def test_whole_shards(shards: Path) -> None:
    """What `prepare` has just written is fit, with all its bytes."""
    (found,) = check_shards(str(shards), deep=True)
    assert found.state == "ok"
    assert "each hash is right" in found.found


@pytest.fixture
def copied(shards: Path, tmp_path: Path) -> Path:
    """Shards to damage."""
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    return folder


def test_no_shards(tmp_path: Path) -> None:
    """The wrong folder is the commonest slip of all."""
    assert "no prepared shards there" in the_one_to_mend(check_shards(str(tmp_path))).found


def test_shards_of_another_format(copied: Path) -> None:
    """Shards of an older version were copied to a newer cluster."""
    manifest = json.loads((copied / MANIFEST).read_text())
    (copied / MANIFEST).write_text(json.dumps(manifest | {"format": 1}))
    assert "format 1" in the_one_to_mend(check_shards(str(copied))).found


@pytest.mark.parametrize("kind", ["missing", "cut", "tokenizer"])
def test_shards_that_are_not_all_there(copied: Path, kind: str) -> None:
    """A copy to the cluster that broke off is found by the trial that reads the last shard."""
    shard = copied / json.loads((copied / MANIFEST).read_text())["texts"]["tokens"]["file"]
    if kind == "missing":
        shard.unlink()
    elif kind == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        shutil.rmtree(copied / "tokenizer")
    found = the_one_to_mend(check_shards(str(copied)))
    assert {"missing": "(missing)", "cut": "bytes instead of", "tokenizer": "tokenizer.json"}[
        kind
    ] in found.found
    assert "--overwrite true" in found.cure


def test_shards_with_other_bytes(copied: Path) -> None:
    """A flipped byte has the right size; only --deep finds it, and only then says so."""
    shard = copied / json.loads((copied / MANIFEST).read_text())["splits"]["train"][0]["file"]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert ill(check_shards(str(copied))) == []
    assert "other bytes" in the_one_to_mend(check_shards(str(copied), deep=True)).found


@pytest.fixture
def teacher(tmp_path: Path, shards: Path) -> Path:
    """An encoder's folder with the shards' tokeniser."""
    folder = tmp_path / "teacher"
    shutil.copytree(shards / "tokenizer", folder)
    config = BertConfig(
        vocab_size=400, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    BertModel(config).save_pretrained(folder)
    return folder


def test_a_fit_teacher(teacher: Path, shards: Path) -> None:
    """`scratch` and a folder that made the shards are fit."""
    assert [found.state for found in check_teacher("scratch", str(shards))] == ["ok"]
    assert [found.state for found in check_teacher(str(teacher), str(shards))] == ["ok"]
    assert [found.state for found in check_teacher(str(teacher), None)] == ["ok"]


def test_a_teacher_with_only_pickled_weights(teacher: Path, shards: Path) -> None:
    """Most folders of older encoders are such; the run refuses them, after it has read the shards."""
    (teacher / "model.safetensors").rename(teacher / "pytorch_model.bin")
    found = the_one_to_mend(check_teacher(str(teacher), str(shards)))
    assert "only pickled weights (pytorch_model.bin)" in found.found
    (teacher / "pytorch_model.bin").unlink()
    assert "no weights" in the_one_to_mend(check_teacher(str(teacher), str(shards))).found


@pytest.mark.parametrize("text", [None, "{", '{"model_type": "evil"}'])
def test_a_teacher_without_a_usable_config(teacher: Path, text: str | None) -> None:
    """A folder above or below the right one, a cut download, a model of another library."""
    (teacher / "config.json").unlink()
    if text is not None:
        (teacher / "config.json").write_text(text)
    assert "config.json" in the_one_to_mend(check_teacher(str(teacher), None)).found


def test_a_teacher_that_reads_other_tokens(teacher: Path, shards: Path) -> None:
    """The same ids would mean other words: the run would train on noise if it did not refuse."""
    path = teacher / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["normalizer"]["lowercase"] = False
    path.write_text(json.dumps(tokenizer))
    found = the_one_to_mend(check_teacher(str(teacher), str(shards)))
    assert "has another tokeniser" in found.found
    assert "newsbert-ray prepare" in found.cure


def test_a_teacher_by_a_name_that_is_nowhere(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slip in a name, or a machine without network: known before the run, not after the shards."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = the_one_to_mend(check_teacher("./no/such/teacher", str(shards)))
    assert "no such folder" in found.found
