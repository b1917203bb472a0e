"""The losses of one joint step, each by its name (NewsBERT Eqs. 1-6). Knows no optimiser, no Ray."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from newsbert_ray.config import DistillSettings
from newsbert_ray.data.batches import Batch
from newsbert_ray.distill import losses
from newsbert_ray.model.pair import Output


def joint_losses(
    teacher: Output, student: Output, batch: Batch, settings: DistillSettings
) -> dict[str, Tensor]:
    """Every loss with a weight above 0, unweighted, keyed as the weights are.

    Args:
        teacher, student: outputs on `batch`; gradients reach the teacher through `teacher_task` alone.
    """
    mask, rows, tokens = batch.attention_mask, batch.rows, batch.tokens
    every: dict[str, Callable[[], Tensor]] = {
        "teacher_task": lambda: losses.cross_entropy(teacher.logits, batch.labels, rows=rows),
        "student_task": lambda: losses.cross_entropy(student.logits, batch.labels, rows=rows),
        "embedding": lambda: losses.token_mse(
            student.hidden_states[0], teacher.hidden_states[0], mask, tokens=tokens
        ),
        "hidden": lambda: losses.hidden_loss(
            student.hidden_states, teacher.hidden_states, mask, tokens=tokens
        ),
        "news_embedding": lambda: losses.news_embedding_loss(
            student.news_embedding, teacher.news_embedding, rows=rows
        ),
        "soft_labels": lambda: losses.soft_label_loss(
            student.logits,
            teacher.logits,
            temperature=settings.temperature,
            rows=rows,
            t2=settings.soft_label_t2,
        ),
    }
    weights = settings.weights.model_dump()
    return {name: loss() for name, loss in every.items() if weights[name] > 0}
