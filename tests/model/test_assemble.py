"""How teacher and student start."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from newsbert_ray.config import TrainSettings
from newsbert_ray.data.shards import read_manifest
from newsbert_ray.model.assemble import _cached_student, assemble_pair
from newsbert_ray.model.pair import Pair
from newsbert_ray.model.saved import load_student
from newsbert_ray.training.run import teacher_settings, train
from tests.conftest import topic_batch

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import MakeSettings


def test_student_starts_as_the_teachers_first_layers(make_settings: MakeSettings) -> None:
    """The student starts as a copy of the teacher's first layers and shares no tensor with it."""
    settings = make_settings()
    pair = assemble_pair(settings, read_manifest(settings.data)).eval()
    assert len(pair.teacher.layers) == 4
    assert len(pair.student.layers) == 2
    teacher, student = pair(topic_batch(torch.tensor([[2, 9, 3]])))
    for level in range(3):
        assert torch.equal(teacher.hidden_states[0][level], student.hidden_states[0][level])
    own = {p.data_ptr() for p in pair.student.parameters()}
    assert not own & {p.data_ptr() for p in pair.teacher.parameters()}


def equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Whether both have the same weights."""
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_teacher_that_was_fine_tuned_first(make_settings: MakeSettings, tmp_path: Path) -> None:
    """A warm teacher starts from it with its top; the student starts from whom it is told."""
    train(teacher_settings(make_settings(epochs=1, train_rows=64), tmp_path / "first"), quiet=True)
    tuned, tuned_top, _ = load_student(tmp_path / "first" / "student")

    def assemble(**values: object) -> tuple[TrainSettings, Pair]:
        settings = make_settings(**{"distill.teacher_run": str(tmp_path / "first"), **values})
        return settings, assemble_pair(settings, read_manifest(settings.data))

    for method in ("newsbert", "newsbert_warm"):
        settings, pair = assemble(method=method)
        assert settings.distill.warm
        assert equal(pair.teacher, tuned)
        assert equal(pair.top, tuned_top)
        assert pair.teacher_top is None
        assert equal(pair.student.layers, tuned.layers[:2])
        assert any(parameter.requires_grad for parameter in pair.teacher.parameters())
    start = assemble_pair(make_settings(), read_manifest(settings.data)).student
    for values, expected in (
        ({"method": "newsbert", "student.start_from": "encoder"}, start.layers),
        ({"method": "twinbert"}, start.layers),
        ({"method": "twinbert", "student.start_from": "teacher"}, tuned.layers[:2]),
    ):
        _, pair = assemble(**values)
        assert equal(pair.teacher, tuned)
        assert equal(pair.student.layers, expected)
        assert all(parameter.requires_grad for parameter in pair.student.parameters())
    # The same teacher learns on after it was frozen in an earlier trial of this process.
    for method, learns in (("twinbert", False), ("newsbert", True)):
        _, pair = assemble(method=method, **{"student.start_from": "teacher"})
        assert all(parameter.requires_grad for parameter in pair.student.parameters())
        assert all(parameter.requires_grad == learns for parameter in pair.teacher.parameters())
    # A seed draws the same map, whether an earlier trial has loaded the teacher or not.
    _cached_student.cache_clear()
    first, second = (assemble(method="tinybert")[1].state_map for _ in range(2))
    assert first is not None
    assert second is not None
    assert equal(first, second)
    _, pair = assemble(method="mutual")
    assert pair.teacher_top is not None
    assert equal(pair.teacher_top, tuned_top)
    assert not equal(pair.top, tuned_top)
    assert not assemble(method="finetune")[0].distill.warm


def test_only_the_last_layers_learn(make_settings: MakeSettings) -> None:
    """Of each encoder; embeddings stay as they start, pooling and head learn."""
    settings = make_settings(**{"model.trainable": 1})
    pair = assemble_pair(settings, read_manifest(settings.data))
    for encoder in (pair.teacher, pair.student):
        learned = {id(p) for p in encoder.parameters() if p.requires_grad}
        assert learned == {id(p) for p in encoder.layers[-1].parameters()}
    assert all(parameter.requires_grad for parameter in pair.top.parameters())
