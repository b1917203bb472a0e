"""Losses of joint learning as functions of tensors. "NewsBERT" is Wu et al. 2021, equation numbers its own.

Every mean is a sum over what is at hand divided by a count given from outside (`rows`, `tokens` of the whole
update), so that workers and accumulated parts add up to the loss of the undivided batch. A text that is
encoded once for several mentions counts once for each of them. Knows no model, no Ray.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from newsbert_ray.config import LossWeights
from newsbert_ray.data.batches import Bucket


def cross_entropy(logits: Tensor, labels: Tensor, *, rows: int) -> Tensor:
    """Classification loss: L_t (Eq. 6) and the task term of L_s (Eq. 5).

    Args:
        logits: (S, Y) of topics, of a click's candidates, or of no click and click.
        labels: (S,) which of them is right.
        rows: examples of the whole update; the sum over S is divided by it.
    """
    return F.cross_entropy(logits, labels, reduction="sum") / rows


def token_mse(student: Tensor, teacher: Tensor, bucket: Bucket, *, tokens: int) -> Tensor:
    """Mean squared difference of hidden states over real tokens and D (Eq. 1; padding is left open there:
    not counted), each text as often as it is used.

    Args:
        student, teacher: (B, L, D) of the bucket's texts; the teacher is taken as a constant.
        tokens: real tokens of all mentions in the whole update.
    """
    weight = bucket.attention_mask.to(student.dtype)  # (B, L)
    if bucket.uses is not None:
        weight = weight * bucket.uses.unsqueeze(-1)
    difference = (student - teacher.detach()).square().sum(-1)
    return (difference * weight).sum() / (tokens * student.shape[-1])


def embedding_loss(
    student: Sequence[Sequence[Tensor]],
    teacher: Sequence[Sequence[Tensor]],
    buckets: Sequence[Bucket],
    *,
    tokens: int,
) -> Tensor:
    """MSE(E_t, E_s) of the embedding layers' outputs (first term of Eq. 1); arguments as in `hidden_loss`."""
    parts = [
        token_mse(s[0], t[0], bucket, tokens=tokens)
        for s, t, bucket in zip(student, teacher, buckets, strict=True)
    ]
    return torch.stack(parts).sum()


def hidden_loss(
    student: Sequence[Sequence[Tensor]],
    teacher: Sequence[Sequence[Tensor]],
    buckets: Sequence[Bucket],
    *,
    tokens: int,
) -> Tensor:
    """Sum over student layers i of MSE(H_t[iK], H_s[i]) (second term of Eq. 1).

    Args:
        student: for each bucket N + 1 tensors (B, L, D), embeddings first.
        teacher: for each bucket NK + 1 tensors (B, L, D), embeddings first.
    """
    parts = []
    for s, t, bucket in zip(student, teacher, buckets, strict=True):
        depth = len(s) - 1
        size = (len(t) - 1) // depth
        parts += [token_mse(s[i], t[i * size], bucket, tokens=tokens) for i in range(1, depth + 1)]
    return torch.stack(parts).sum()


def vector_mse(student: Tensor, teacher: Tensor, *, rows: int, uses: Tensor | None = None) -> Tensor:
    """MSE of pooled embeddings: of news (Eq. 2), of users (3.3); the teacher is taken as a constant.

    Args:
        student, teacher: (M, D).
        rows: mentions of them in the whole update.
        uses: (M,) mentions of each; once each where None.
    """
    difference = (student - teacher.detach()).square().sum(-1)
    counted = difference if uses is None else difference * uses
    return counted.sum() / (rows * student.shape[-1])


def uses_of(buckets: Sequence[Bucket]) -> Tensor | None:
    """Mentions of each text of all buckets in order (M,); None where once each."""
    if all(bucket.uses is None for bucket in buckets):
        return None
    return torch.cat(
        [
            bucket.input_ids.new_ones(len(bucket.input_ids), dtype=torch.float32)
            if bucket.uses is None
            else bucket.uses
            for bucket in buckets
        ]
    )


def soft_label_loss(
    student: Tensor, teacher: Tensor, *, temperature: float, rows: int, t2: bool = False
) -> Tensor:
    """Cross-entropy of tempered predictions, CE(softmax(z_t / t), softmax(z_s / t)) (Eq. 3).

    Args:
        student, teacher: (S, Y) logits; the teacher is taken as a constant.
        t2: multiply by t squared (the paper does not).
    """
    target = torch.softmax(teacher.detach() / temperature, dim=-1)
    loss = -(target * torch.log_softmax(student / temperature, dim=-1)).sum() / rows
    return loss * temperature**2 if t2 else loss


def weighted_total(losses: dict[str, Tensor], weights: LossWeights) -> Tensor:
    """L_t + L_s (Eqs. 4-6): one backward of it gives the teacher L_t's gradient and the student L_s's."""
    factors = weights.model_dump()
    return torch.stack([factors[name] * loss for name, loss in losses.items()]).sum()
