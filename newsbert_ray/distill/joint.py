"""The losses of one joint step, each by its name (NewsBERT Eqs. 1-6, 3.3). Knows no optimiser, no Ray."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from newsbert_ray.config import DistillSettings
from newsbert_ray.data.batches import Batch
from newsbert_ray.distill import losses
from newsbert_ray.model.pair import Output


def joint_losses(
    teacher: Output | None, student: Output, batch: Batch, settings: DistillSettings
) -> dict[str, Tensor]:
    """Every loss with a weight above 0 that the batch's task has, unweighted, keyed as the weights are.

    Args:
        teacher, student: outputs on `batch`; gradients reach the teacher through `teacher_task` alone. None
            for a student that learns alone.
    """
    every: dict[str, Callable[[], Tensor]] = {
        "student_task": lambda: losses.cross_entropy(student.logits, batch.target.labels, rows=batch.rows)
    }
    if teacher is not None:
        every |= _with_teacher(teacher, student, batch, settings)
    weights = settings.weights.model_dump()
    return {name: loss() for name, loss in every.items() if weights[name] > 0}


def _with_teacher(
    teacher: Output, student: Output, batch: Batch, settings: DistillSettings
) -> dict[str, Callable[[], Tensor]]:
    rows, buckets = batch.rows, batch.buckets
    found: dict[str, Callable[[], Tensor]] = {
        "teacher_task": lambda: losses.cross_entropy(teacher.logits, batch.target.labels, rows=rows),
        "embedding": lambda: losses.embedding_loss(
            student.hidden_states, teacher.hidden_states, buckets, tokens=batch.tokens
        ),
        "hidden": lambda: losses.hidden_loss(
            student.hidden_states, teacher.hidden_states, buckets, tokens=batch.tokens
        ),
        "news_embedding": lambda: losses.vector_mse(
            student.news_embedding, teacher.news_embedding, rows=batch.texts, uses=losses.uses_of(buckets)
        ),
        "soft_labels": lambda: losses.soft_label_loss(
            student.logits,
            teacher.logits,
            temperature=settings.temperature,
            rows=rows,
            t2=settings.soft_label_t2,
        ),
    }
    ours, theirs = student.user_embedding, teacher.user_embedding
    if ours is not None and theirs is not None:
        found["user_embedding"] = lambda: losses.vector_mse(ours, theirs, rows=rows)
    return found
