"""Losses of joint learning as functions of tensors. "NewsBERT" is Wu et al. 2021, equation numbers its own.

Every mean is a sum over what is at hand divided by a count given from outside (`rows`, `tokens` of the whole
update), so that workers and accumulated parts add up to the loss of the undivided batch. A text that is
encoded once for several mentions counts once for each of them. K is the teacher's layers over the student's.
Knows no Ray.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from newsbert_ray.config import LossWeights
from newsbert_ray.data.batches import Bucket
from newsbert_ray.model.encoder import Projections

_NO_KEY = -1e9
"""Score of a key that is padding; finite, because a probability of 0 times infinity is no number."""


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
    student: Tensor, teacher: Tensor, *, temperature: float, rows: int, t2: bool = False, kl: bool = False
) -> Tensor:
    """Cross-entropy of tempered predictions, CE(softmax(z_t / t), softmax(z_s / t)) (Eq. 3).

    Args:
        student, teacher: (S, Y) logits; the teacher is taken as a constant.
        t2: multiply by t squared (Hinton et al. 2015; the paper does not).
        kl: less the teacher's entropy: the divergence KL(teacher || student), with the same gradient.
    """
    target = torch.softmax(teacher.detach() / temperature, dim=-1)
    loss = -(target * torch.log_softmax(student / temperature, dim=-1)).sum() / rows
    if kl:
        loss = loss + (target * torch.log_softmax(teacher.detach() / temperature, dim=-1)).sum() / rows
    return loss * temperature**2 if t2 else loss


def logit_mse(student: Tensor, teacher: Tensor, *, rows: int) -> Tensor:
    """MSE of logits (S, Y), the teacher's taken as constants (Tang et al. 2019, 3.2)."""
    return (student - teacher.detach()).square().sum() / (rows * student.shape[-1])


def cls_loss(
    student: Sequence[Sequence[Tensor]],
    teacher: Sequence[Sequence[Tensor]],
    buckets: Sequence[Bucket],
    *,
    rows: int,
) -> Tensor:
    """MSE of the first token's states, each divided by its norm, at layers i and iK for i < N (Sun et al.
    2019, Eq. 7, PKD-skip; the mean over layers and D as in their code). 0 for a student of one layer.

    Args:
        student, teacher: as in `hidden_loss`.
        rows: mentions of texts in the whole update.
    """
    parts = [student[0][0].new_zeros(())]
    for s, t, bucket in zip(student, teacher, buckets, strict=True):
        depth = len(s) - 1
        size = (len(t) - 1) // depth
        for i in range(1, depth):
            own, other = (F.normalize(state[:, 0], dim=-1) for state in (s[i], t[i * size].detach()))
            difference = (own - other).square().mean(-1)
            parts.append(_mentions(difference, bucket) / (rows * (depth - 1)))
    return torch.stack(parts).sum()


def cosine_loss(
    student: Sequence[Sequence[Tensor]],
    teacher: Sequence[Sequence[Tensor]],
    buckets: Sequence[Bucket],
    *,
    tokens: int,
) -> Tensor:
    """1 - cosine of the last layers' states, mean over real tokens (Sanh et al. 2019, 3); arguments as in
    `hidden_loss`."""
    parts = []
    for s, t, bucket in zip(student, teacher, buckets, strict=True):
        distance = 1.0 - F.cosine_similarity(s[-1], t[-1].detach(), dim=-1)  # (B, L)
        parts.append(_mentions((distance * bucket.attention_mask).sum(-1), bucket) / tokens)
    return torch.stack(parts).sum()


def attention_score_loss(
    student: Sequence[Sequence[Projections]],
    teacher: Sequence[Sequence[Projections]],
    buckets: Sequence[Bucket],
    *,
    rows: int,
) -> Tensor:
    """Sum over student layers i of the MSE of attention scores before the softmax at layers i and iK (Jiao et
    al. 2020, Eq. 7): for each text the mean over heads and pairs of real tokens, then the mean over mentions.

    Args:
        student: for each bucket N layers' projections; teacher: NK.
        rows: mentions of texts in the whole update.
    """
    parts = []
    for s, t, bucket in zip(student, teacher, buckets, strict=True):
        size = len(t) // len(s)
        real = bucket.attention_mask.to(s[0].query.dtype)
        pairs = real[:, None, :, None] * real[:, None, None, :]  # (B, 1, L, L)
        count = real.sum(-1).square()
        for i, own in enumerate(s):
            other = t[(i + 1) * size - 1]
            difference = attention_scores(own) - attention_scores(other).detach()
            each = (difference.square() * pairs).sum((1, 2, 3)) / (count * difference.shape[1])
            parts.append(_mentions(each, bucket) / rows)
    return torch.stack(parts).sum()


def attention_scores(layer: Projections) -> Tensor:
    """A layer's attention scores (B, heads, L, L) before mask and softmax."""
    scores = relation(layer.query, layer.key)
    return scores if layer.bias is None else scores + layer.bias


def relation(left: Tensor, right: Tensor) -> Tensor:
    """Scaled products (B, heads, L, L) of projections (B, heads, L, d): of queries and keys the attention
    scores, of values and values their relations."""
    return left @ right.transpose(-1, -2) / math.sqrt(left.shape[-1])


def relation_kl(
    student: Sequence[Tensor], teacher: Sequence[Tensor], buckets: Sequence[Bucket], *, rows: int
) -> Tensor:
    """KL(teacher || student) of a softmax over keys: of the last layers' attention scores, or of their value
    relations (Wang et al. 2020, Eqs. 4-8). For each text the mean over heads and real tokens, then the mean
    over mentions.

    Args:
        student, teacher: for each bucket scores (B, heads, L, L).
        rows: mentions of texts in the whole update.
    """
    parts = []
    for s, t, bucket in zip(student, teacher, buckets, strict=True):
        hidden = bucket.attention_mask[:, None, None, :] == 0
        own, other = (
            torch.log_softmax(scores.masked_fill(hidden, _NO_KEY), dim=-1) for scores in (s, t.detach())
        )
        real = bucket.attention_mask.to(own.dtype)
        divergence = (other.exp() * (other - own)).sum(-1).mean(1)  # (B, L)
        each = (divergence * real).sum(-1) / real.sum(-1)
        parts.append(_mentions(each, bucket) / rows)
    return torch.stack(parts).sum()


def _mentions(each: Tensor, bucket: Bucket) -> Tensor:
    """Values (B,) of texts, added up over their mentions."""
    return (each if bucket.uses is None else each * bucket.uses).sum()


def weighted_total(losses: dict[str, Tensor], weights: LossWeights) -> Tensor:
    """L_t + L_s (Eqs. 4-6): one backward of it gives the teacher L_t's gradient and the student L_s's."""
    factors = weights.model_dump()
    return torch.stack([factors[name] * loss for name, loss in losses.items()]).sum()
