"""Losses, methods and tasks: each method's losses, and which model it trains."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest
import torch

from newsbert_ray.config import SettingsError, TrainSettings
from newsbert_ray.data.reading import make_schedule, read_updates
from newsbert_ray.data.shards import read_manifest
from newsbert_ray.methods import (
    ATTENTION_LOSSES,
    LOSSES,
    METHODS,
    STATE_LOSSES,
    STUDENT_LOSSES,
    TEACHER_LOSSES,
    MethodName,
    losses_where,
)
from newsbert_ray.model.assemble import assemble_pair
from newsbert_ray.model.encoder import Encoder
from newsbert_ray.model.pair import Output, Pair
from newsbert_ray.record import read_record
from newsbert_ray.training.run import train
from newsbert_ray.training.step import Learner, build_learner, train_step

if TYPE_CHECKING:
    from tests.conftest import MakeSettings

FROZEN = ("disjoint", "twinbert", "tinybert", "pkd", "distilbert", "minilm", "bilstm_soft", "best")
EXPECTED = {
    "newsbert": "teacher_task student_task embedding hidden news_embedding soft_labels",
    "finetune": "student_task",
    "no_momentum": "teacher_task student_task embedding hidden news_embedding soft_labels",
    "no_soft_labels": "teacher_task student_task embedding hidden news_embedding",
    "no_hidden": "teacher_task student_task soft_labels",
    "no_embedding": "teacher_task student_task hidden news_embedding soft_labels",
    "no_layers": "teacher_task student_task embedding news_embedding soft_labels",
    "no_news_embedding": "teacher_task student_task embedding hidden soft_labels",
    "disjoint": "student_task embedding hidden news_embedding soft_labels",
    "mutual": "teacher_task student_task soft_labels teacher_soft_labels",
    "twinbert": "student_task soft_labels",
    "pkd": "student_task soft_labels cls",
    "distilbert": "student_task soft_labels cosine",
    "bilstm_soft": "student_task logits",
    "glove": "student_task",
    "newsbert_warm": "teacher_task student_task hidden news_embedding soft_labels",
    "best": "student_task soft_labels",
}
"""Losses of each method on topics, the same in every step; methods with two stages follow."""
STAGES = {
    "tinybert": ("embedding hidden attention_scores", "soft_labels"),
    "minilm": ("attention_maps value_relations", "soft_labels"),
}


def learner_of(settings: TrainSettings, total_steps: int = 4) -> Learner:
    """A learner; a frozen teacher in it was not fine-tuned."""
    pair = assemble_pair(settings, read_manifest(settings.data), stand_in=True)
    return build_learner(pair, settings, total_steps=total_steps)


def steps(learner: Learner, count: int) -> list[set[str]]:
    """Train some steps; returns the names of the losses in each."""
    schedule = make_schedule(learner.settings, read_manifest(learner.settings.data))
    found = []
    for update, _ in zip(read_updates(schedule), range(count), strict=False):
        numbers = train_step(learner, update.parts, step=update.step)
        found.append(set(numbers) - {"total", "learning_rate_factor"})
    return found


def encoders(pair: Pair) -> dict[str, dict[str, torch.Tensor]]:
    """Copies of both encoders' weights."""
    return {
        name: {key: value.clone() for key, value in encoder.state_dict().items()}
        for name, encoder in (("teacher", pair.teacher), ("student", pair.student))
    }


def test_every_loss_and_method_is_tested() -> None:
    """A new method needs its losses in the tables above, a new loss its properties."""
    assert {*STUDENT_LOSSES, *TEACHER_LOSSES, *losses_where(trains="part")} == {*LOSSES}
    assert len(losses_where(reads="predictions")) + len(STATE_LOSSES) == len(LOSSES)
    assert losses_where(reads="attention") == ATTENTION_LOSSES
    assert set(METHODS) == set(get_args(MethodName)) == EXPECTED.keys() | STAGES.keys() | {"linear"}


@pytest.mark.parametrize("task", ["topics", "recommendation"])
@pytest.mark.parametrize("method", sorted(EXPECTED))
def test_method_uses_its_losses(make_settings: MakeSettings, method: str, task: str) -> None:
    """Every step has the losses of the table; only a joint teacher changes."""
    values = {} if method in ("bilstm_soft", "glove") else {"student.layers": 2}
    small = {"batch_size": 8, "recommendation.history": 5}
    settings = make_settings(**{"method": method, "task": task, "student.layers": 1, **values, **small})
    learner = learner_of(settings)
    before = encoders(learner.pair)
    expected = set(EXPECTED[method].split())
    if task == "recommendation" and method == "best":
        expected.add("news_embedding")
    elif task == "recommendation" and "news_embedding" in expected:
        expected.add("user_embedding")
    assert steps(learner, 2) == [expected] * 2
    after = encoders(learner.pair)
    changed = {
        name: any(not torch.equal(value, after[name][key]) for key, value in weights.items())
        for name, weights in before.items()
    }
    assert changed == {"student": True, "teacher": method not in (*FROZEN, "finetune", "glove")}
    assert (method in FROZEN) == settings.distill.frozen


@pytest.mark.parametrize("method", sorted(STAGES))
def test_two_stages_have_different_losses(make_settings: MakeSettings, method: str) -> None:
    """Half of the steps learn the teacher's layers, the rest its predictions."""
    first, second = (set(names.split()) for names in STAGES[method])
    assert steps(learner_of(make_settings(method=method)), 4) == [first, first, second, second]


def test_mutual_learning_trains_both_tops(
    make_settings: MakeSettings,
) -> None:
    """Both models learn, each with its own top."""
    learner = learner_of(make_settings(method="mutual"))
    assert learner.pair.teacher_top is not None
    before = {n: p.clone() for n, p in learner.pair.teacher_top.named_parameters()}
    steps(learner, 1)
    assert any(not torch.equal(before[n], p) for n, p in learner.pair.teacher_top.named_parameters())
    assert not set(map(id, learner.pair.top.parameters())) & set(
        map(id, learner.pair.teacher_top.parameters())
    )


def test_a_frozen_teacher_is_not_in_the_state(make_settings: MakeSettings) -> None:
    """Otherwise every checkpoint would contain it. It has no dropout, and follows the pair's type."""
    pair = learner_of(make_settings(method="twinbert")).pair.train()
    assert not any(name.startswith("teacher") for name in pair.state_dict())
    assert not pair.teacher.training
    assert pair.student.training
    moved = pair.to(torch.float64)
    assert next(moved.teacher.parameters()).dtype == torch.float64


def test_distilbert_starts_from_the_last_layer_of_each_block(make_settings: MakeSettings) -> None:
    """Layers 2 and 4 of a teacher with 4 layers."""
    pair = learner_of(make_settings(method="distilbert")).pair
    for own, number in zip(pair.student.layers, (1, 3), strict=True):
        for a, b in zip(own.parameters(), pair.teacher.layers[number].parameters(), strict=True):
            assert torch.equal(a, b)


def test_another_encoder_may_be_narrower(make_settings: MakeSettings, tmp_path: Path) -> None:
    """A released TinyBERT has width 312, its teacher 768."""
    narrow = make_settings(**{"scratch.hidden": 8, "student.layers": 4, "method": "finetune"})
    encoder = assemble_pair(narrow, read_manifest(narrow.data)).student
    (tmp_path / "narrow").mkdir()
    encoder.save(tmp_path / "narrow")
    shutil.copytree(Path(narrow.data) / "tokenizer", tmp_path / "narrow", dirs_exist_ok=True)
    given = {"student.encoder": str(tmp_path / "narrow"), "student.layers": 2}
    pair = learner_of(make_settings(method="tinybert", **given)).pair
    assert (pair.student.hidden_size, pair.teacher.hidden_size) == (8, 16)
    learner = learner_of(make_settings(method="tinybert", **given))
    assert steps(learner, 1) == [set(STAGES["tinybert"][0].split())]
    with pytest.raises(SettingsError, match=r"8 wide and the teacher 16: cosine cannot compare"):
        learner_of(make_settings(method="distilbert", **given))
    with pytest.raises(SettingsError, match=r"8 wide .* set\ntheir|embedding"):
        learner_of(make_settings(method="newsbert", **given))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"distill.teacher": "frozen"}, "a frozen teacher does not learn"),
        ({"method": "twinbert", "distill.beta": 0.1}, "the teacher is frozen; set distill.beta to 0"),
        ({"method": "bilstm_soft", "student.layers": 2}, "student.kind bilstm needs student.layers 1"),
        (
            {"method": "tinybert", "distill.first.attention_scores": 0.0, "distill.first.hidden": 0.0},
            "no loss",
        ),
    ],
)
def test_impossible_combinations_are_refused(
    make_settings: MakeSettings, values: dict[str, object], message: str
) -> None:
    """The settings are refused, instead of a shape error in the first step."""
    with pytest.raises(SettingsError, match=message):
        make_settings(**values)


def test_runs_share_one_fine_tuned_teacher(make_settings: MakeSettings, tmp_path: Path) -> None:
    """Otherwise a sweep of seven methods would fine-tune seven teachers per seed."""
    seen = []
    for number, (method, seed) in enumerate([("twinbert", 0), ("pkd", 0), ("twinbert", 1)]):
        settings = make_settings(method=method, seed=seed, epochs=1, out=str(tmp_path / f"run{number}"))
        record = train(settings, quiet=True, teachers=tmp_path / "teachers")
        assert record.settings["distill"]["teacher_run"] is None
        seen.append(record)
        assert set(record.metrics["test"]) == set(record.metrics["validation"]) == {"teacher", "student"}
    teachers = sorted((tmp_path / "teachers").glob("*/record.json"))
    assert len(teachers) == 2
    assert seen[0].metrics["test"]["teacher"] == seen[1].metrics["test"]["teacher"]
    own = {read_record(path.parent).seed: read_record(path.parent) for path in teachers}
    for record in (seen[0], seen[2]):
        taught = own[record.seed].metrics["test"]["student"]
        assert record.metrics["test"]["teacher"]["accuracy"] == pytest.approx(taught["accuracy"])
    assert all(read_record(path.parent).settings["student"]["layers"] == 4 for path in teachers)


def test_a_single_run_keeps_its_teacher(
    make_settings: MakeSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fine-tuned teacher is in the run's folder, and another run can use it."""
    settings = make_settings(method="bilstm_soft", epochs=1, **{"student.layers": 1})
    record = train(settings)
    assert f"first training the teacher, into {settings.out}/teacher" in capsys.readouterr().out
    assert record.metrics["parameters"]["teacher"] > 0
    again = make_settings(
        method="disjoint",
        epochs=1,
        out=str(tmp_path / "second"),
        **{"distill.teacher_run": f"{settings.out}/teacher"},
    )
    second = train(again, quiet=True)
    assert second.metrics["test"]["teacher"] == record.metrics["test"]["teacher"]
    assert second.settings["distill"]["teacher_run"] == f"{settings.out}/teacher"


@pytest.mark.parametrize("task", ["topics", "recommendation"])
def test_a_frozen_teacher_encodes_each_text_once(
    make_settings: MakeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    """Stored outputs serve all epochs and trials, and give the same losses as computing them again."""
    settings = make_settings(method="twinbert", epochs=2, task=task)
    teachers = tmp_path / "teachers"
    kept = train(settings, quiet=True, teachers=teachers)
    assert len(list(teachers.glob("*/texts/*.safetensors"))) == 1

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the texts were encoded again")

    with monkeypatch.context() as patch:
        patch.setattr("newsbert_ray.training.worker.encode_texts", refuse)
        patch.setattr("newsbert_ray.training.worker.score_models", lambda *a, **k: SCORES[task])
        patch.setattr("newsbert_ray.model.pair.Pair._outputs", _student_alone)
        train(settings.model_copy(update={"out": str(tmp_path / "second")}), quiet=True, teachers=teachers)

    (teacher,) = filter(Path.is_dir, teachers.iterdir())
    rough = {"precision": "bf16", "epochs": 1, "distill.teacher_run": str(teacher)}
    train(make_settings(method="twinbert", task=task, out=str(tmp_path / "rough"), **rough), quiet=True)
    assert len(list(teachers.glob("*/texts/*.safetensors"))) == 2, "bf16 used the outputs of fp32"

    monkeypatch.setattr("newsbert_ray.training.worker.cached_teacher", lambda *_: None)
    plain = train(settings.model_copy(update={"out": str(tmp_path / "plain")}), quiet=True, teachers=teachers)
    for mine, theirs in zip(kept.curve, plain.curve, strict=True):
        assert mine["train"] == pytest.approx(theirs["train"], rel=1e-4)


SCORES = {
    "topics": {name: {"accuracy": 0.5, "macro_f1": 0.5, "rows": 1} for name in ("teacher", "student")},
    "recommendation": {
        name: {"auc": 0.5, "mrr": 0.5, "ndcg5": 0.5, "ndcg10": 0.5, "rows": 1}
        for name in ("teacher", "student")
    },
}
_OUTPUTS = Pair._outputs


def _student_alone(self: Pair, encoder: Encoder, *rest: Any) -> Output:
    assert encoder is self.student, "the teacher was computed"
    return _OUTPUTS(self, encoder, *rest)
