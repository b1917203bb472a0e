"""How teacher and student start."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from newsbert_ray.data.shards import read_manifest
from newsbert_ray.model.assemble import assemble_pair
from tests.conftest import topic_batch

if TYPE_CHECKING:
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
