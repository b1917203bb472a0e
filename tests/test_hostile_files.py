"""Files from strangers: none writes elsewhere, none runs code, each is named in one message.

Each hostile file is first shown to be live: what an unguarded reader would do with it is done once.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from newsbert_ray import cli
from newsbert_ray.config import TrainSettings
from newsbert_ray.data.shards import MANIFEST
from newsbert_ray.training.run import train
from tests.conftest import MakeSettings


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """The command line silences libraries through the environment; other tests keep theirs."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


class Payload:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self._marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The folder that hostile code would make."""
    return tmp_path / "code-has-run"


@pytest.fixture
def pickled(marker: Path) -> bytes:
    """A pickle that makes the marker, as it has just proven."""
    content = pickle.dumps(Payload(marker))
    pickle.loads(content)
    assert marker.is_dir(), "the payload is a dud and would prove nothing"
    marker.rmdir()
    return content


@pytest.fixture
def teacher(tmp_path: Path, shards: Path) -> Path:
    """An encoder's folder with the shards' tokeniser and whole weights."""
    folder = tmp_path / "teacher"
    shutil.copytree(shards / "tokenizer", folder)
    vocabulary = json.loads((shards / MANIFEST).read_text())["tokenizer"]["vocabulary"]
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def words(settings: TrainSettings, **changes: str) -> list[str]:
    """The command that trains so."""
    values = {"data": settings.data, "teacher": settings.teacher, "out": settings.out, "epochs": "1"}
    values |= {"student.layers": "1", "threads": "1", "train_rows": "64"} | changes
    return ["train", *(f"--{name}={value}" for name, value in values.items())]


def message_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command fails; an `internal error` is none."""
    capsys.readouterr()
    assert cli.main(command) in (1, 2)
    said = capsys.readouterr().err
    assert "internal error" not in said
    return said


def test_control_the_teacher_is_good(teacher: Path, make_settings: MakeSettings) -> None:
    """A teacher that fails for another reason would let every refusal below pass."""
    assert cli.main(words(make_settings(teacher=str(teacher)))) == 0


@pytest.mark.parametrize("kind", ["up", "absolute", "windows", "link"])
def test_zip_that_would_write_outside(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Unpacked by its members' names, each of these would overwrite a file beside or above --out."""
    outside = tmp_path / "outside"
    outside.mkdir()
    names = {
        "up": "../outside/news.tsv",
        "absolute": str(outside / "news.tsv"),
        "windows": "..\\outside\\news.tsv",
        "link": "corpus",
    }
    path = tmp_path / "evil.zip"
    with zipfile.ZipFile(path, "w") as archive:
        member = zipfile.ZipInfo(names[kind])
        if kind == "link":  # then corpus/news.tsv would be written through it
            member.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(member, str(outside))
            archive.writestr("corpus/news.tsv", "N1\tnews\tx\ttitle\t\t\t\t\n")
        else:
            archive.writestr(member, "N1\tnews\tx\ttitle\t\t\t\t\n")
    target = (tmp_path / "in" / names[kind].replace("\\", "/")).resolve()
    assert target.is_relative_to(outside) or kind == "link", "the member is harmless and would prove nothing"
    command = ["prepare", "--source", str(path), "--teacher", "scratch", "--out", str(tmp_path / "out")]
    message_of([*command, "--workers", "0"], capsys)
    assert list(outside.iterdir()) == []
    assert sorted(found.name for found in tmp_path.iterdir()) == ["evil.zip", "outside"]


def test_pickled_teacher(
    teacher: Path,
    pickled: bytes,
    marker: Path,
    make_settings: MakeSettings,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """torch.load of a pytorch_model.bin runs whatever its author liked."""
    (teacher / "model.safetensors").unlink()
    (teacher / "pytorch_model.bin").write_bytes(pickled)
    said = message_of(words(make_settings(teacher=str(teacher))), capsys)
    assert f"teacher '{teacher}': its weights cannot be loaded as safetensors" in said
    assert not marker.exists()


def test_teacher_that_is_a_pickle_by_another_name(
    teacher: Path,
    pickled: bytes,
    marker: Path,
    make_settings: MakeSettings,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A loader that goes by content, as torch.load does, would not care what the file is called."""
    (teacher / "model.safetensors").write_bytes(pickled)
    said = message_of(words(make_settings(teacher=str(teacher))), capsys)
    assert "cannot be loaded as safetensors" in said
    assert not marker.exists()


def _as_checkpoint(folder: Path, weights: bytes) -> None:
    """A checkpoint whose hashes are right: whoever forges the weights forges them too."""
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(weights)
    body = {
        "progress": {"step": 3},
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    check = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    (folder / "state.json").write_text(json.dumps({"body": body, "check": check}))


@pytest.mark.parametrize("kind", ["weights", "pt"])
def test_pickled_checkpoint(
    kind: str, pickled: bytes, marker: Path, make_settings: MakeSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's folder on shared storage may be written by others; its resume must not run what they left."""
    settings = make_settings()
    train(settings.model_copy(update={"epochs": 1}), quiet=True)
    run = Path(settings.out)
    shutil.rmtree(run / "checkpoints")
    (run / "record.json").unlink()
    (run / "checkpoints").mkdir()
    if kind == "pt":
        (run / "checkpoints/step-000000003.pt").write_bytes(pickled)
    else:
        _as_checkpoint(run / "checkpoints/step-000000003", pickled)
    own = json.loads((run / "settings.json").read_text())["settings"]
    config = run.parent / "same.yaml"
    config.write_text(yaml.safe_dump(own))
    said = message_of(["train", "--config", str(config)], capsys)
    assert f"{run / 'checkpoints'}: none of the 1 checkpoints is intact" in said
    assert not marker.exists()


def test_pickled_student(
    pickled: bytes, marker: Path, make_settings: MakeSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run that somebody handed on is evaluated without a second look."""
    settings = make_settings(epochs=1)
    train(settings, quiet=True)
    for name in ("top.safetensors", "model.safetensors"):
        good = (Path(settings.out) / "student" / name).read_bytes()
        (Path(settings.out) / "student" / name).write_bytes(pickled)
        said = message_of(["evaluate", settings.out], capsys)
        assert f"{Path(settings.out) / 'student'}" in said
        assert not marker.exists()
        (Path(settings.out) / "student" / name).write_bytes(good)
    assert cli.main(["evaluate", settings.out]) == 0


def test_pickled_table_of_texts(
    shards: Path,
    marker: Path,
    tmp_path: Path,
    make_settings: MakeSettings,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An .npy file of objects is a pickle; numpy unpickles it where it is allowed to."""
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    held = io.BytesIO()
    np.save(held, np.array([Payload(marker)], dtype=object), allow_pickle=True)
    held.seek(0)
    np.load(held, allow_pickle=True)
    assert marker.is_dir(), "the payload is a dud and would prove nothing"
    marker.rmdir()
    for part in ("tokens", "offsets"):
        path = folder / manifest["texts"][part]["file"]
        path.write_bytes(held.getvalue())
        digest = hashlib.sha256(held.getvalue()).hexdigest()
        manifest["texts"][part] |= {"bytes": path.stat().st_size, "sha256": digest}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    said = message_of(words(make_settings(data=str(folder)), task="recommendation"), capsys)
    assert str(folder) in said
    assert not marker.exists()


@pytest.mark.parametrize("verb", ["sweep", "train", "prepare"])
@pytest.mark.parametrize("tag", ["object/apply:os.mkdir", "object/new:os.mkdir"])
def test_yaml_with_a_python_tag(
    verb: str, tag: str, marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """yaml.load with its full loader calls what a tag names; settings files are passed around."""
    text = f"epochs: !!python/{tag} ['{marker}']\n"
    if tag.startswith("object/apply"):
        yaml.unsafe_load(text)
        assert marker.is_dir(), "the payload is a dud and would prove nothing"
        marker.rmdir()
    path = tmp_path / "evil.yaml"
    path.write_text(f"name: evil\nsettings: {{{text.strip()}}}\n" if verb == "sweep" else text)
    file = [str(path)] if verb == "sweep" else ["--config", str(path)]
    said = message_of([verb, *file, "--out", str(tmp_path / "out")], capsys)
    assert "python/object" in said
    assert not marker.exists()
    assert not list((tmp_path / "out").glob("[!.]*"))


def _bring_code(folder: Path, marker: Path, *, model_type: str) -> None:
    """Files that transformers would import where it trusts them, as their config.json asks it to."""
    code = f"import os\nos.mkdir({str(marker)!r})\nclass Evil: pass\n"
    exec(compile(code, "evil.py", "exec"), {})
    assert marker.is_dir(), "the payload is a dud and would prove nothing"
    marker.rmdir()
    (folder / "evil.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    names = {name: "evil.Evil" for name in ("AutoConfig", "AutoModel", "AutoTokenizer")}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type, "auto_map": names}))
    file = folder / "tokenizer_config.json"
    tokenizer = json.loads(file.read_text()) if file.exists() else {}
    asked = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    file.write_text(json.dumps({**tokenizer, **asked}))


def test_code_beside_a_known_encoder_is_not_run(
    teacher: Path, marker: Path, make_settings: MakeSettings
) -> None:
    """trust_remote_code=True would import evil.py; a BERT with such a file is a BERT like any other."""
    _bring_code(teacher, marker, model_type="bert")
    assert cli.main(words(make_settings(teacher=str(teacher)))) == 0
    assert not marker.exists()


def test_code_of_an_unknown_encoder_is_not_run(
    teacher: Path, marker: Path, make_settings: MakeSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where only the foreign code knows the model, it is refused, and nobody is asked at the terminal."""
    _bring_code(teacher, marker, model_type="evil")
    said = message_of(words(make_settings(teacher=str(teacher))), capsys)
    assert f"teacher '{teacher}': no encoder found" in said
    assert not marker.exists()


def test_code_of_a_tokeniser_is_not_run(
    teacher: Path, marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a tokenizer.json transformers decides what to load, by what the folder says."""
    _bring_code(teacher, marker, model_type="evil")
    for name in ("tokenizer.json", "vocab.txt"):
        (teacher / name).unlink()
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    lines = [f"N{n}\t{'news' if n % 2 else 'sports'}\tx\ttitle {n}\t\t\t[]\t[]\n" for n in range(40)]
    (corpus / "news.tsv").write_text("".join(lines))
    command = ["prepare", "--source", str(corpus), "--teacher", str(teacher)]
    said = message_of([*command, "--out", str(tmp_path / "out"), "--workers", "0"], capsys)
    assert f"teacher {str(teacher)!r}: no tokeniser in this folder" in said
    assert not marker.exists()


def test_safetensors_hold_no_code(tmp_path: Path) -> None:
    """What all of the above rests on: the format we write is numbers and a JSON header, nothing that runs."""
    import torch

    path = tmp_path / "weights.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert json.loads(content[8 : 8 + length])["x"] == {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    assert len(content) == 8 + length + 8
