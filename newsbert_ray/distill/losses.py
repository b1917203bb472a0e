"""Losses of joint learning as functions of tensors. "NewsBERT" is Wu et al. 2021, equation numbers its own.

Every mean is a sum over what is at hand divided by a count given from outside (`rows`, `tokens` of the whole
update), so that workers and accumulated parts add up to the loss of the undivided batch. Knows no model, no
Ray.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from newsbert_ray.config import LossWeights


def cross_entropy(logits: Tensor, labels: Tensor, *, rows: int) -> Tensor:
    """Classification loss: L_t (Eq. 6) and the task term of L_s (Eq. 5).

    Args:
        logits: (B, Y).
        labels: (B,) topic indices.
        rows: titles of the whole update; the sum over B is divided by it.
    """
    return F.cross_entropy(logits, labels, reduction="sum") / rows


def token_mse(student: Tensor, teacher: Tensor, attention_mask: Tensor, *, tokens: int) -> Tensor:
    """Mean squared difference of hidden states over real tokens and D (Eq. 1; padding is left open there:
    not counted).

    Args:
        student, teacher: (B, L, D); the teacher is taken as a constant.
        attention_mask: (B, L) 1 where a token is real.
        tokens: real tokens of the whole update.
    """
    difference = (student - teacher.detach()) * attention_mask.unsqueeze(-1)
    return difference.square().sum() / (tokens * student.shape[-1])


def hidden_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], attention_mask: Tensor, *, tokens: int
) -> Tensor:
    """Sum over student layers i of MSE(H_t[iK], H_s[i]) (second term of Eq. 1).

    Args:
        student: N + 1 tensors (B, L, D), embeddings first.
        teacher: NK + 1 tensors (B, L, D), embeddings first.
    """
    depth = len(student) - 1
    size = (len(teacher) - 1) // depth
    parts = [
        token_mse(student[i], teacher[i * size], attention_mask, tokens=tokens) for i in range(1, depth + 1)
    ]
    return torch.stack(parts).sum()


def news_embedding_loss(student: Tensor, teacher: Tensor, *, rows: int) -> Tensor:
    """MSE of pooled news embeddings (B, D) (Eq. 2); the teacher is taken as a constant."""
    return (student - teacher.detach()).square().sum() / (rows * student.shape[-1])


def soft_label_loss(
    student: Tensor, teacher: Tensor, *, temperature: float, rows: int, t2: bool = False
) -> Tensor:
    """Cross-entropy of tempered predictions, CE(softmax(z_t / t), softmax(z_s / t)) (Eq. 3).

    Args:
        student, teacher: (B, Y) logits; the teacher is taken as a constant.
        t2: multiply by t squared (the paper does not).
    """
    target = torch.softmax(teacher.detach() / temperature, dim=-1)
    loss = -(target * torch.log_softmax(student / temperature, dim=-1)).sum() / rows
    return loss * temperature**2 if t2 else loss


def weighted_total(losses: dict[str, Tensor], weights: LossWeights) -> Tensor:
    """L_t + L_s (Eqs. 4-6): one backward of it gives the teacher L_t's gradient and the student L_s's."""
    factors = weights.model_dump()
    return torch.stack([factors[name] * loss for name, loss in losses.items()]).sum()
