"""Momentum distillation on gradients (NewsBERT Eqs. 7-8). Knows no model and no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def mix_gradients_(
    student: Sequence[Tensor], teacher_block: Sequence[Sequence[Tensor]], *, beta: float
) -> None:
    """Mix the mean gradient of a teacher block into the student layer's gradients, in place (Eqs. 7-8).

    g_s <- beta * mean_j(g_t[j]) + (1 - beta) * g_s

    Args:
        student: gradients of one student layer's parameters, any shapes.
        teacher_block: K lists, one per teacher layer of the block; the same shapes in the same order.
        beta: share of the teacher, 0 to 1 (paper: 0.1 topics, 0.15 recommendation); 0 changes nothing.
    Raises:
        ValueError: a teacher gradient has another shape (it would broadcast silently), or the block is empty.
    """
    if not teacher_block:
        raise ValueError("a block needs at least one teacher layer")
    shapes = [tuple(gradient.shape) for gradient in student]
    for layer in teacher_block:
        teacher_shapes = [tuple(gradient.shape) for gradient in layer]
        if teacher_shapes != shapes:
            raise ValueError(
                f"teacher gradients of shapes {teacher_shapes} do not match the student's {shapes}"
            )
    if beta == 0.0:
        return
    torch._foreach_mul_(list(student), 1.0 - beta)
    for layer in teacher_block:
        torch._foreach_add_(list(student), list(layer), alpha=beta / len(teacher_block))


def apply_momentum(student: nn.ModuleList, teacher: nn.ModuleList, *, beta: float) -> None:
    """Mix each teacher block into its student layer, on `.grad`, after backward and all-reduce.

    Transformer layers only: embeddings and the shared top keep their own gradients.

    Args:
        student: N layers with gradients.
        teacher: NK layers of the same architecture with gradients.
    """
    if beta == 0.0:
        return
    size = len(teacher) // len(student)
    for i, layer in enumerate(student):
        block = [_gradients(teacher[i * size + j]) for j in range(size)]
        mix_gradients_(_gradients(layer), block, beta=beta)


@dataclass(frozen=True)
class BlockStatistics:
    """Norm ratio (block / student) and cosine of a block's mean gradient and its student layer's."""

    ratio: float
    cosine: float


def block_statistics(student: nn.ModuleList, teacher: nn.ModuleList) -> list[BlockStatistics]:
    """Norm ratio and cosine of each block before mixing: how far momentum can turn an update.

    Arguments as in `apply_momentum`.
    """
    size = len(teacher) // len(student)
    statistics = []
    for i, layer in enumerate(student):
        gradients = _gradients(layer)
        means = [torch.zeros_like(gradient) for gradient in gradients]
        for j in range(size):
            torch._foreach_add_(means, _gradients(teacher[i * size + j]), alpha=1 / size)
        dot = torch.stack([(a * b).sum() for a, b in zip(gradients, means, strict=True)]).sum()
        norm_student = torch.stack(torch._foreach_norm(gradients)).norm()
        norm_mean = torch.stack(torch._foreach_norm(means)).norm()
        tiny = torch.finfo(dot.dtype).tiny
        statistics.append(
            BlockStatistics(
                ratio=float(norm_mean / norm_student.clamp_min(tiny)),
                cosine=float(dot / (norm_student * norm_mean).clamp_min(tiny)),
            )
        )
    return statistics


def _gradients(layer: nn.Module) -> list[Tensor]:
    gradients = [parameter.grad for parameter in layer.parameters()]
    missing = [name for name, parameter in layer.named_parameters() if parameter.grad is None]
    if missing:
        raise ValueError(f"no gradient for {', '.join(missing[:3])}; momentum is mixed after backward")
    return [gradient for gradient in gradients if gradient is not None]
