"""The joint losses together: which model receives which gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from newsbert_ray.config import DistillSettings, LossWeights, TrainSettings
from newsbert_ray.data.batches import Batch, Bucket, Topics
from newsbert_ray.data.reading import make_schedule, read_updates
from newsbert_ray.data.shards import read_manifest
from newsbert_ray.distill.joint import joint_losses
from newsbert_ray.distill.losses import weighted_total
from newsbert_ray.model.assemble import assemble_pair
from newsbert_ray.model.pair import Pair

MakeSettings = Callable[..., TrainSettings]


def pair_and_batch(settings: TrainSettings) -> tuple[Pair, Batch]:
    """A fresh pair without dropout and the first batch."""
    manifest = read_manifest(settings.data)
    schedule = make_schedule(settings, manifest)
    return assemble_pair(settings, manifest).eval(), next(read_updates(schedule)).parts[0]


def forward(pair: Pair, batch: Batch, settings: DistillSettings | None = None) -> dict[str, Tensor]:
    """Every loss of a batch."""
    teacher, student = pair(batch)
    return joint_losses(teacher, student, batch, settings or DistillSettings())


def gradients(pair: Pair, batch: Batch, names: set[str]) -> dict[str, Tensor]:
    """Gradients of the sum of the named losses alone."""
    pair.zero_grad(set_to_none=True)
    losses = forward(pair, batch)
    weighted_total({name: loss for name, loss in losses.items() if name in names}, LossWeights()).backward()  # type: ignore[no-untyped-call]
    return {n: p.grad.clone() for n, p in pair.named_parameters() if p.grad is not None}


def test_one_backward_equals_two(make_settings: MakeSettings) -> None:
    """The teacher's gradient must come from L_t alone, the student's from L_s alone, the top's from both."""
    pair, batch = pair_and_batch(make_settings())
    every = set(LossWeights.model_fields)  # user_embedding is recommendation's
    both = gradients(pair, batch, every)
    teacher = gradients(pair, batch, {"teacher_task"})
    student = gradients(pair, batch, every - {"teacher_task"})
    assert not any(name.startswith("teacher.") for name in student)
    assert not any(name.startswith("student.") for name in teacher)
    for name, gradient in both.items():
        parts = [part[name] for part in (teacher, student) if name in part]
        assert len(parts) == (2 if name.startswith("top.") else 1)
        torch.testing.assert_close(gradient, sum(parts[1:], parts[0]), rtol=1e-5, atol=1e-8)


def test_masked_positions_change_nothing(make_settings: MakeSettings) -> None:
    """More padding, or other ids in it, must not change any loss or gradient."""
    pair, batch = pair_and_batch(make_settings())
    every = set(LossWeights.model_fields)
    (bucket,) = batch.buckets
    wide = torch.nn.functional.pad(bucket.input_ids, (0, 5), value=7)
    mask = torch.nn.functional.pad(bucket.attention_mask, (0, 5))
    padded = replace(batch, buckets=(Bucket(wide, mask),))
    first, second = gradients(pair, batch, every), gradients(pair, padded, every)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-7)
    a, b = forward(pair, batch), forward(pair, padded)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-7)


def test_only_task_losses_leave_out_texts_without_a_label(make_settings: MakeSettings) -> None:
    """Task losses are those of the labelled texts alone; every other loss is that of all texts."""
    pair, batch = pair_and_batch(make_settings(**{"distill.weights.logits": 1.0}))
    settings = DistillSettings(weights=LossWeights(logits=1.0))
    labels = batch.target.labels.clone()
    labels[8:] = -1
    masked = replace(batch, target=Topics(labels), labelled=8)
    teacher, student = pair(batch)
    assert teacher is not None
    whole, found = forward(pair, batch, settings), forward(pair, masked, settings)
    for name, output in (("student_task", student), ("teacher_task", teacher)):
        by_hand = torch.nn.functional.cross_entropy(output.logits[:8], labels[:8])
        torch.testing.assert_close(found.pop(name), by_hand)
    assert len(found) == 5
    assert all(torch.equal(value, whole[name]) for name, value in found.items())
    all_labelled = forward(pair, replace(batch, labelled=batch.rows), settings)
    assert all(torch.equal(value, whole[name]) for name, value in all_labelled.items())


def test_a_loss_without_weight_is_left_out(make_settings: MakeSettings) -> None:
    """An ablation must neither compute nor log the loss that it removes."""
    pair, batch = pair_and_batch(make_settings())
    settings = DistillSettings(weights=LossWeights(hidden=0.0, soft_labels=0.0))
    found = forward(pair, batch, settings)
    assert set(found) == {"teacher_task", "student_task", "embedding", "news_embedding"}
