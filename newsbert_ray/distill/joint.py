"""The losses of one step by name: NewsBERT's (Eqs. 1-6, section 3.3) and those of the other methods.

To add a loss: its name and default weight in `LossWeights`, its formula in `losses`, and one entry here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from newsbert_ray.config import DistillSettings, LossWeights
from newsbert_ray.data.batches import Batch, Bucket
from newsbert_ray.distill import losses
from newsbert_ray.model.encoder import Projections
from newsbert_ray.model.pair import Output

Formulas = dict[str, Callable[[], Tensor]]


def joint_losses(
    teacher: Output | None,
    student: Output,
    batch: Batch,
    settings: DistillSettings,
    weights: LossWeights | None = None,
) -> dict[str, Tensor]:
    """Every loss with a weight above 0 that the task has, by name, not yet weighted.

    Args:
        teacher: output on `batch`; None for a student that learns alone. Gradients reach the teacher only
            through `teacher_task` and `teacher_soft_labels`.
        weights: weights of the current stage; by default those of `settings`.
    """
    weights = weights or settings.weights
    formulas: Formulas = {"student_task": lambda: _task_loss(student, batch)}
    if teacher is not None:
        formulas |= _distillation_losses(teacher, student, batch, settings)
    return {name: formula() for name, formula in formulas.items() if getattr(weights, name) > 0}


def _task_loss(output: Output, batch: Batch) -> Tensor:
    """The mean over examples with a label; the other losses count all."""
    labelled = batch.rows if batch.labelled is None else batch.labelled
    return losses.cross_entropy(output.logits, batch.target.labels, rows=labelled)


def _distillation_losses(
    teacher: Output, student: Output, batch: Batch, settings: DistillSettings
) -> Formulas:
    rows, texts, tokens, buckets = batch.rows, batch.texts, batch.tokens, batch.buckets
    last = settings.blocks == "last"
    soft_labels = partial(
        losses.soft_label_loss,
        temperature=settings.temperature,
        rows=rows,
        t2=settings.soft_label_t2,
        kl=settings.soft_label_form == "kl",
    )
    states = (student.hidden_states, teacher.hidden_states, buckets)
    compared = (student.mapped_states or student.hidden_states, teacher.hidden_states, buckets)
    layers = (student.projections, teacher.projections, buckets)

    def last_layers(
        relate: Callable[[Projections], Tensor],
    ) -> tuple[list[Tensor], list[Tensor], tuple[Bucket, ...]]:
        own, theirs = ([relate(bucket[-1]) for bucket in model.projections] for model in (student, teacher))
        return own, theirs, buckets

    formulas: Formulas = {
        "teacher_task": lambda: _task_loss(teacher, batch),
        "embedding": lambda: losses.embedding_loss(*compared, tokens=tokens),
        "hidden": lambda: losses.hidden_loss(*compared, tokens=tokens, last=last),
        "news_embedding": lambda: losses.vector_mse(
            student.news_embedding, teacher.news_embedding, rows=texts, uses=losses.uses_of(buckets)
        ),
        "soft_labels": lambda: soft_labels(student.logits, teacher.logits),
        "teacher_soft_labels": lambda: soft_labels(teacher.logits, student.logits),
        "logits": lambda: losses.logit_mse(student.logits, teacher.logits, rows=rows),
        "cls": lambda: losses.cls_loss(*states, rows=texts, last=last),
        "cosine": lambda: losses.cosine_loss(*states, tokens=tokens),
        "attention_scores": lambda: losses.attention_score_loss(*layers, rows=texts, last=last),
        "attention_maps": lambda: losses.relation_kl(*last_layers(losses.attention_scores), rows=texts),
        "value_relations": lambda: losses.relation_kl(
            *last_layers(lambda layer: losses.relation(layer.value, layer.value)), rows=texts
        ),
    }
    student_user, teacher_user = student.user_embedding, teacher.user_embedding
    if student_user is not None and teacher_user is not None:
        formulas["user_embedding"] = lambda: losses.vector_mse(student_user, teacher_user, rows=rows)
    return formulas
