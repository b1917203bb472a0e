"""Exported students: the same outputs after loading, and damage is detected."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from newsbert_ray.data.shards import read_manifest
from newsbert_ray.model.assemble import assemble_pair
from newsbert_ray.model.encoder import EncoderError
from newsbert_ray.model.saved import load_student, write_best, write_student
from tests.conftest import change_json, topic_batch

if TYPE_CHECKING:
    from tests.conftest import MakeSettings


def test_exported_student_computes_the_same(make_settings: MakeSettings, tmp_path: Path) -> None:
    """A loaded student must give the logits that the run measured."""
    settings = make_settings()
    manifest = read_manifest(settings.data)
    pair = assemble_pair(settings, manifest).eval()
    write_student(tmp_path / "student", pair, manifest, tokenizer=Path(settings.data) / "tokenizer")
    encoder, top, described = load_student(tmp_path / "student")
    ids, mask = torch.tensor([[2, 9, 8, 3]]), torch.ones(1, 4, dtype=torch.int64)
    with torch.inference_mode():
        batch = topic_batch(ids)
        assert torch.equal(pair(batch)[1].logits, top([encoder(ids, mask)], batch).logits)
    assert described["labels"] == manifest.labels


@pytest.mark.parametrize("name", ["top.safetensors", "model.safetensors", "top.json"])
def test_a_truncated_student_is_refused(make_settings: MakeSettings, tmp_path: Path, name: str) -> None:
    """A truncated file must give one clear message, not a library's traceback."""
    settings = make_settings()
    manifest = read_manifest(settings.data)
    write_student(tmp_path / "student", assemble_pair(settings, manifest), manifest, tokenizer=tmp_path)
    content = (tmp_path / "student" / name).read_bytes()
    (tmp_path / "student" / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(EncoderError, match=r"student|safetensors"):
        load_student(tmp_path / "student")


@pytest.mark.parametrize("name", ["top.safetensors", "model.safetensors", "top.json", "tokenizer.json"])
def test_a_changed_student_is_refused(make_settings: MakeSettings, tmp_path: Path, name: str) -> None:
    """Other weights, topics or tokens would give other numbers without a word."""
    settings = make_settings()
    manifest, folder = read_manifest(settings.data), tmp_path / "student"
    pair = assemble_pair(settings, manifest)
    write_student(folder, pair, manifest, tokenizer=Path(settings.data) / "tokenizer")
    content = (folder / name).read_bytes()
    digit = next(i for i in range(len(content) - 1, 0, -1) if chr(content[i]) in "12")
    changed = b"2" if content[digit : digit + 1] == b"1" else b"1"
    (folder / name).write_bytes(content[:digit] + changed + content[digit + 1 :])
    with pytest.raises(EncoderError, match=f"{name}: damaged: its content has changed; train the run again"):
        load_student(folder)
    write_student(folder, pair, manifest, tokenizer=Path(settings.data) / "tokenizer")
    change_json(folder / "top.json")
    assert load_student(folder)  # as an earlier version wrote it


def test_exported_student_opens_in_transformers_alone(make_settings: MakeSettings, tmp_path: Path) -> None:
    """The folder must work for people without this package."""
    from transformers import AutoModel, AutoTokenizer

    settings = make_settings()
    manifest = read_manifest(settings.data)
    pair = assemble_pair(settings, manifest).eval()
    write_student(tmp_path / "student", pair, manifest, tokenizer=Path(settings.data) / "tokenizer")
    assert "transformers loads the encoder alone" in (tmp_path / "student" / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    model = AutoModel.from_pretrained(tmp_path / "student").eval()
    tokens = tokenizer("bado kelu", return_tensors="pt")
    with torch.inference_mode():
        ours = pair.student(tokens["input_ids"], tokens["attention_mask"])[-1]
        torch.testing.assert_close(model(**tokens).last_hidden_state, ours)


def test_files_have_the_modes_of_the_umask(make_settings: MakeSettings, tmp_path: Path) -> None:
    """Weights that only their owner can read cannot be served by another account."""
    settings = make_settings()
    manifest = read_manifest(settings.data)
    (tmp_path / "any").write_text("")
    mode = (tmp_path / "any").stat().st_mode
    pair = assemble_pair(settings, manifest)
    write_student(tmp_path / "student", pair, manifest, tokenizer=Path(settings.data) / "tokenizer")
    write_best(tmp_path, pair, step=1)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.stat().st_mode for path in files} == {mode}
