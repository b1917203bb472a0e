"""Runs that must finish first: the student to start from, trained once for all that need it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from newsbert_ray.config import SettingsError
from newsbert_ray.data.shards import read_manifest
from newsbert_ray.evaluation.evaluate import evaluate
from newsbert_ray.model.assemble import assemble_pair
from newsbert_ray.model.saved import load_student
from newsbert_ray.record import find_records, read_record
from newsbert_ray.training.run import all_prerequisites, before_settings, train, train_prerequisite

if TYPE_CHECKING:
    from tests.conftest import MakeSettings

CHAIN = {"method": "finetune", "before.method": "twinbert", "student.layers": 1, "epochs": 1}


def test_settings_of_the_run_before(make_settings: MakeSettings) -> None:
    """Momentum, losses and rate are its own; depth and seed are those of the run that needs it."""
    settings = make_settings(
        **{**CHAIN, "before.method": "newsbert", "before.learning_rate": 0.5, "seed": 3, "epochs": 2}
    )
    own = before_settings(settings, "there")
    assert (own.task, own.method, own.distill.beta) == ("recommendation", "newsbert", 0.15)
    assert (own.student.layers, own.seed, own.learning_rate, own.epochs) == (1, 3, 0.5, 2)
    assert (own.before.method, own.data, own.out) == ("none", settings.data, "there")
    twin = make_settings(**CHAIN)
    assert [(run.task, run.method) for run in all_prerequisites(twin)] == [
        ("recommendation", "twinbert"),
        ("recommendation", "finetune"),
    ]


def test_a_run_starts_from_the_student_of_the_one_before(
    make_settings: MakeSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command trains everything; the record names the encoder that the user gave."""
    settings = make_settings(**CHAIN)
    record = train(settings)
    said = capsys.readouterr().out
    assert f"first training the student to start from, into {settings.out}/before" in said
    before = Path(settings.out) / "before"
    first = read_record(before)
    assert (first.settings["task"], first.settings["method"]) == ("recommendation", "twinbert")
    assert read_record(before / "teacher").settings["student"]["layers"] == 4
    assert (record.settings["task"], record.settings["teacher"]) == ("topics", "scratch")
    assert find_records(settings.out) == [Path(settings.out)]

    ready = train_prerequisite(settings, shared=None, train=lambda _: None, say=lambda _: None)
    started = assemble_pair(ready, read_manifest(settings.data)).student.state_dict()
    left, top, _ = load_student(before / "student")
    assert all(torch.equal(started[name], value) for name, value in left.state_dict().items())
    pooled = assemble_pair(ready, read_manifest(settings.data)).top.pooling.state_dict()
    assert all(torch.equal(pooled[name], value) for name, value in top.pooling.state_dict().items())
    fresh = assemble_pair(make_settings(**{**CHAIN, "before.method": "none"}), read_manifest(settings.data))
    assert any(not torch.equal(started[n], value) for n, value in fresh.student.state_dict().items())


def test_a_warm_teacher_is_fine_tuned_first(
    make_settings: MakeSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it learns then, whatever learns later; it goes on learning, and can be evaluated."""
    settings = make_settings(method="newsbert_warm", epochs=1, **{"distill.teacher_epochs": 2})
    record = train(settings)
    assert f"first training the teacher, into {settings.out}/teacher" in capsys.readouterr().out
    first = read_record(Path(settings.out) / "teacher")
    assert (first.settings["epochs"], first.settings["model"]["trainable"]) == (2, None)
    assert record.settings["distill"]["teacher_run"] is None
    assert record.layer_map == [[3], [4]]
    assert record.metrics["test"]["teacher"] != first.metrics["test"]["student"]
    found = evaluate(settings.out)
    assert found["teacher"] == pytest.approx(record.metrics["test"]["teacher"])


def test_runs_share_their_prerequisites(make_settings: MakeSettings, tmp_path: Path) -> None:
    """Two learning rates after one distillation; its teacher is shared as well."""
    teachers = tmp_path / "teachers"
    for number, rate in enumerate((1e-3, 2e-3)):
        values: dict[str, Any] = {**CHAIN, "learning_rate": rate, "before.learning_rate": 2e-3}
        settings = make_settings(out=str(tmp_path / f"run{number}"), **values)
        train(settings, quiet=True, teachers=teachers)
    kinds = sorted(read_record(path.parent).settings["method"] for path in teachers.glob("*/record.json"))
    assert kinds == ["finetune", "twinbert"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"before.method": "newsbert"}, "set method finetune"),
        ({"before.method": "glove", "method": "finetune"}, "its student is not a Transformer"),
        ({"before.method": "nothing"}, "before.method"),
    ],
)
def test_impossible_prerequisites_are_refused(
    make_settings: MakeSettings, values: dict[str, Any], message: str
) -> None:
    """Combinations that cannot work get a message with the remedy."""
    with pytest.raises(SettingsError, match=message):
        make_settings(**values)
