"""Each loss as a function of tensors. Equation numbers without a reference are NewsBERT's (Wu et al. 2021).

A mean is the sum over the given tensors divided by a count of the whole update (`rows`, `tokens`), so that
the losses of workers and of accumulated parts add up to the loss of the whole batch. A text that several
examples mention is encoded once and counted once for each mention. The teacher is always detached. K is the
number of teacher layers per student layer.
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

States = Sequence[Sequence[Tensor]]
"""For each bucket the hidden states (B, L, D) of all levels, embeddings first."""
_PADDED_SCORE = -1e9
"""Score of a padded key. Finite, because 0 times infinity is NaN."""


def cross_entropy(logits: Tensor, labels: Tensor, *, rows: int) -> Tensor:
    """Classification loss: L_t (Eq. 6) and the task term of L_s (Eq. 5).

    Args:
        logits: (S, Y) over topics, over candidates, or over (no click, click).
        labels: (S,) index of the correct class; -1 where there is no label.
        rows: examples with a label in the whole update.
    """
    return F.cross_entropy(logits, labels, reduction="sum", ignore_index=-1) / rows


def token_mse(student: Tensor, teacher: Tensor, bucket: Bucket, *, tokens: int) -> Tensor:
    """MSE of hidden states over real tokens and D (Eq. 1).

    The paper does not say whether padding counts; here it does not.

    Args:
        student, teacher: (B, L, D) of the bucket's texts.
        tokens: real tokens of all mentions in the whole update.
    """
    weight = bucket.attention_mask.to(student.dtype)  # (B, L)
    if bucket.uses is not None:
        weight = weight * bucket.uses.unsqueeze(-1)
    difference = (student - teacher.detach()).square().sum(-1)
    return (difference * weight).sum() / (tokens * student.shape[-1])


def embedding_loss(student: States, teacher: States, buckets: Sequence[Bucket], *, tokens: int) -> Tensor:
    """MSE(E_t, E_s) of the embedding layers' outputs (first term of Eq. 1). Arguments as in `hidden_loss`."""
    parts = [
        token_mse(s[0], t[0], bucket, tokens=tokens)
        for s, t, bucket in zip(student, teacher, buckets, strict=True)
    ]
    return torch.stack(parts).sum()


def matched_layer(i: int, student_layers: int, teacher_layers: int, *, last: bool = False) -> int:
    """The teacher layer (from 1) that student layer i is compared with: iK, or with `last` N(K - 1) + i."""
    return teacher_layers - student_layers + i if last else i * (teacher_layers // student_layers)


def hidden_loss(
    student: States, teacher: States, buckets: Sequence[Bucket], *, tokens: int, last: bool = False
) -> Tensor:
    """Sum over student layers i of MSE(H_t[iK], H_s[i]) (second term of Eq. 1).

    Args:
        student: for each bucket N + 1 tensors (B, L, D), embeddings first; without layers the loss is 0.
        teacher: for each bucket NK + 1 tensors (B, L, D), embeddings first.
        last: compare with the teacher's last N layers in order instead.
    """
    parts = []
    for s, t, bucket in zip(student, teacher, buckets, strict=True):
        depth = len(s) - 1
        for i in range(1, depth + 1):
            theirs = t[matched_layer(i, depth, len(t) - 1, last=last)]
            parts.append(token_mse(s[i], theirs, bucket, tokens=tokens))
    return torch.stack(parts).sum() if parts else student[0][0].new_zeros(())


def vector_mse(student: Tensor, teacher: Tensor, *, rows: int, uses: Tensor | None = None) -> Tensor:
    """MSE of pooled embeddings: of news (Eq. 2), of users (section 3.3).

    Args:
        student, teacher: (M, D).
        rows: mentions in the whole update.
        uses: (M,) mentions of each; None if each is mentioned once.
    """
    difference = (student - teacher.detach()).square().sum(-1)
    weighted = difference if uses is None else difference * uses
    return weighted.sum() / (rows * student.shape[-1])


def uses_of(buckets: Sequence[Bucket]) -> Tensor | None:
    """(M,) mentions of each text, buckets in order; None if each text is mentioned once."""
    if all(bucket.uses is None for bucket in buckets):
        return None
    pairs = [(bucket.attention_mask, bucket.uses) for bucket in buckets]
    return torch.cat([mask.new_ones(len(mask)).float() if uses is None else uses for mask, uses in pairs])


def soft_label_loss(
    student: Tensor, teacher: Tensor, *, temperature: float, rows: int, t2: bool = False, kl: bool = False
) -> Tensor:
    """Cross-entropy of tempered predictions, CE(softmax(z_t / t), softmax(z_s / t)) (Eq. 3).

    Args:
        student, teacher: (S, Y) logits.
        temperature: t; both models' logits are divided by it.
        t2: multiply by t squared (Hinton et al. 2015; NewsBERT does not).
        kl: subtract the teacher's entropy, which gives KL(teacher || student) with the same gradient.
    """
    target = torch.softmax(teacher.detach() / temperature, dim=-1)
    loss = -(target * torch.log_softmax(student / temperature, dim=-1)).sum() / rows
    if kl:
        loss = loss + (target * torch.log_softmax(teacher.detach() / temperature, dim=-1)).sum() / rows
    return loss * temperature**2 if t2 else loss


def logit_mse(student: Tensor, teacher: Tensor, *, rows: int) -> Tensor:
    """MSE of logits (S, Y) (Tang et al. 2019, section 3.2)."""
    return (student - teacher.detach()).square().sum() / (rows * student.shape[-1])


def cls_loss(
    student: States, teacher: States, buckets: Sequence[Bucket], *, rows: int, last: bool = False
) -> Tensor:
    """MSE of normalised [CLS] states at layers i and iK for i < N (Sun et al. 2019, Eq. 7, PKD-skip).

    The mean is over layers and D, as in their code. 0 for a student of at most one layer.

    Args:
        student, teacher: as in `hidden_loss`.
        rows: mentions of texts in the whole update.
    """
    parts = [student[0][0].new_zeros(())]
    for s, t, bucket in zip(student, teacher, buckets, strict=True):
        depth = len(s) - 1
        for i in range(1, depth):
            matched = t[matched_layer(i, depth, len(t) - 1, last=last)].detach()
            ours, theirs = (F.normalize(state[:, 0], dim=-1) for state in (s[i], matched))
            difference = (ours - theirs).square().mean(-1)
            parts.append(_sum_mentions(difference, bucket) / (rows * (depth - 1)))
    return torch.stack(parts).sum()


def cosine_loss(student: States, teacher: States, buckets: Sequence[Bucket], *, tokens: int) -> Tensor:
    """1 - cosine of the last layers' states, mean over real tokens (Sanh et al. 2019, section 3). Arguments
    as in `hidden_loss`."""
    parts = []
    for s, t, bucket in zip(student, teacher, buckets, strict=True):
        distance = 1.0 - F.cosine_similarity(s[-1], t[-1].detach(), dim=-1)  # (B, L)
        parts.append(_sum_mentions((distance * bucket.attention_mask).sum(-1), bucket) / tokens)
    return torch.stack(parts).sum()


def attention_score_loss(
    student: Sequence[Sequence[Projections]],
    teacher: Sequence[Sequence[Projections]],
    buckets: Sequence[Bucket],
    *,
    rows: int,
    last: bool = False,
) -> Tensor:
    """Sum over student layers i of the MSE of attention scores at layers i and iK (Jiao et al. 2020, Eq. 7).

    Scores before the softmax. For each text the mean over heads and pairs of real tokens, then over mentions.

    Args:
        student: for each bucket N layers' projections.
        teacher: for each bucket NK layers' projections.
        rows: mentions of texts in the whole update.
    """
    parts = []
    for s, t, bucket in zip(student, teacher, buckets, strict=True):
        real = bucket.attention_mask.to(s[0].query.dtype)
        pairs = real[:, None, :, None] * real[:, None, None, :]  # (B, 1, L, L)
        count = real.sum(-1).square()
        for i, ours in enumerate(s):
            theirs = t[matched_layer(i + 1, len(s), len(t), last=last) - 1]
            difference = attention_scores(ours) - attention_scores(theirs).detach()
            per_text = (difference.square() * pairs).sum((1, 2, 3)) / (count * difference.shape[1])
            parts.append(_sum_mentions(per_text, bucket) / rows)
    return torch.stack(parts).sum()


def attention_scores(layer: Projections) -> Tensor:
    """Attention scores (B, heads, L, L) of a layer, before mask and softmax."""
    scores = relation(layer.query, layer.key)
    return scores if layer.bias is None else scores + layer.bias


def relation(left: Tensor, right: Tensor) -> Tensor:
    """Scaled dot products (B, heads, L, L) of projections (B, heads, L, d).

    Queries with keys give attention scores; values with values give value relations.
    """
    return left @ right.transpose(-1, -2) / math.sqrt(left.shape[-1])


def relation_kl(
    student: Sequence[Tensor], teacher: Sequence[Tensor], buckets: Sequence[Bucket], *, rows: int
) -> Tensor:
    """KL(teacher || student) of softmax over keys (Wang et al. 2020, Eqs. 4-8).

    Applied to the last layers' attention scores and to their value relations. For each text the mean over
    heads and real tokens, then the mean over mentions.

    Args:
        student, teacher: for each bucket scores (B, heads, L, L).
        rows: mentions of texts in the whole update.
    """
    parts = []
    for s, t, bucket in zip(student, teacher, buckets, strict=True):
        padded = bucket.attention_mask[:, None, None, :] == 0
        ours, theirs = (
            torch.log_softmax(scores.masked_fill(padded, _PADDED_SCORE), dim=-1) for scores in (s, t.detach())
        )
        real = bucket.attention_mask.to(ours.dtype)
        divergence = (theirs.exp() * (theirs - ours)).sum(-1).mean(1)  # (B, L)
        per_text = (divergence * real).sum(-1) / real.sum(-1)
        parts.append(_sum_mentions(per_text, bucket) / rows)
    return torch.stack(parts).sum()


def _sum_mentions(per_text: Tensor, bucket: Bucket) -> Tensor:
    """Values (B,) of texts, summed over all mentions."""
    return (per_text if bucket.uses is None else per_text * bucket.uses).sum()


def weighted_total(losses: dict[str, Tensor], weights: LossWeights) -> Tensor:
    """L_t + L_s (Eqs. 4-6).

    Every loss of the student detaches the teacher. So one backward pass gives the teacher the gradient of L_t
    and the student that of L_s.
    """
    return torch.stack([getattr(weights, name) * loss for name, loss in losses.items()]).sum()
