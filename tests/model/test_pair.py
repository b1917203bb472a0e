"""Teacher, student and their tops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from newsbert_ray.config import TrainSettings
from newsbert_ray.data.shards import read_manifest
from newsbert_ray.model.assemble import assemble_pair
from newsbert_ray.model.pair import block_map
from tests.conftest import topic_batch

MakeSettings = Callable[..., TrainSettings]


def test_block_map() -> None:
    """Blocks are [(i - 1)K + 1, ..., iK]; another cut would mix gradients of the wrong layers."""
    assert block_map(6, 2) == [[1, 2, 3], [4, 5, 6]]
    assert block_map(4, 4) == [[1], [2], [3], [4]]


def test_a_depth_that_does_not_divide_names_those_that_do() -> None:
    """The message must list the depths that work."""
    with pytest.raises(
        ValueError, match="8 teacher layers do not divide into 3 student layers; choose 1, 2, 4 or 8"
    ):
        block_map(8, 3)


def test_both_models_train_with_dropout(make_settings: MakeSettings) -> None:
    """`from_pretrained` returns a model in evaluation mode: dropout would silently be off."""
    settings = make_settings()
    pair = assemble_pair(settings, read_manifest(settings.data))
    batch = topic_batch(torch.tensor([[2, 9, 8, 7, 3]]))
    first, second = pair(batch), pair(batch)
    for a, b in zip(first, second, strict=True):
        assert not torch.equal(a.hidden_states[0][1], b.hidden_states[0][1])
    rates = {m.p for m in pair.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.2}


def test_a_teacher_without_dropout_still_learns(
    make_settings: MakeSettings,
) -> None:
    """Without teacher dropout the targets are those of evaluation mode, and the teacher is trained."""
    settings = make_settings(**{"distill.teacher_dropout": False})
    pair = assemble_pair(settings, read_manifest(settings.data))
    batch = topic_batch(torch.tensor([[2, 9, 8, 7, 3]]))
    (teacher, student), (again, other) = pair(batch), pair(batch)
    assert torch.equal(teacher.logits, again.logits)
    assert not torch.equal(student.logits, other.logits)
    assert teacher.logits.requires_grad
    assert not pair.eval().student.training
    assert pair.train().student.training
    assert not pair.teacher.training
