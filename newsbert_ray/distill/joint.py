"""The losses of one step, each by its name: NewsBERT's (Eqs. 1-6, 3.3) and the other methods'. Knows no
optimiser, no Ray."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from newsbert_ray.config import DistillSettings, LossWeights
from newsbert_ray.data.batches import Batch
from newsbert_ray.distill import losses
from newsbert_ray.model.pair import Output


def joint_losses(
    teacher: Output | None,
    student: Output,
    batch: Batch,
    settings: DistillSettings,
    weights: LossWeights | None = None,
) -> dict[str, Tensor]:
    """Every loss with a weight above 0 that the batch's task has, unweighted, keyed as the weights are.

    Args:
        teacher, student: outputs on `batch`; gradients reach the teacher through `teacher_task` and
            `teacher_soft_labels` alone. None for a student that learns alone.
        weights: of the stage that the step is in; the settings' by default.
    """
    every: dict[str, Callable[[], Tensor]] = {
        "student_task": lambda: losses.cross_entropy(student.logits, batch.target.labels, rows=batch.rows)
    }
    if teacher is not None:
        every |= _with_teacher(teacher, student, batch, settings)
    factors = (weights or settings.weights).model_dump()
    return {name: loss() for name, loss in every.items() if factors[name] > 0}


def _with_teacher(
    teacher: Output, student: Output, batch: Batch, settings: DistillSettings
) -> dict[str, Callable[[], Tensor]]:
    rows, texts, tokens, buckets = batch.rows, batch.texts, batch.tokens, batch.buckets
    soft_labels = partial(
        losses.soft_label_loss,
        temperature=settings.temperature,
        rows=rows,
        t2=settings.soft_label_t2,
        kl=settings.soft_label_form == "kl",
    )
    found: dict[str, Callable[[], Tensor]] = {
        "teacher_task": lambda: losses.cross_entropy(teacher.logits, batch.target.labels, rows=rows),
        "embedding": lambda: losses.embedding_loss(
            student.compared, teacher.hidden_states, buckets, tokens=tokens
        ),
        "hidden": lambda: losses.hidden_loss(student.compared, teacher.hidden_states, buckets, tokens=tokens),
        "news_embedding": lambda: losses.vector_mse(
            student.news_embedding, teacher.news_embedding, rows=texts, uses=losses.uses_of(buckets)
        ),
        "soft_labels": lambda: soft_labels(student.logits, teacher.logits),
        "teacher_soft_labels": lambda: soft_labels(teacher.logits, student.logits),
        "logits": lambda: losses.logit_mse(student.logits, teacher.logits, rows=rows),
        "cls": lambda: losses.cls_loss(student.hidden_states, teacher.hidden_states, buckets, rows=texts),
        "cosine": lambda: losses.cosine_loss(
            student.hidden_states, teacher.hidden_states, buckets, tokens=tokens
        ),
        "attention_scores": lambda: losses.attention_score_loss(
            student.projections, teacher.projections, buckets, rows=texts
        ),
        "attention_maps": lambda: losses.relation_kl(
            [losses.attention_scores(layers[-1]) for layers in student.projections],
            [losses.attention_scores(layers[-1]) for layers in teacher.projections],
            buckets,
            rows=texts,
        ),
        "value_relations": lambda: losses.relation_kl(
            [losses.relation(layers[-1].value, layers[-1].value) for layers in student.projections],
            [losses.relation(layers[-1].value, layers[-1].value) for layers in teacher.projections],
            buckets,
            rows=texts,
        ),
    }
    ours, theirs = student.user_embedding, teacher.user_embedding
    if ours is not None and theirs is not None:
        found["user_embedding"] = lambda: losses.vector_mse(ours, theirs, rows=rows)
    return found
