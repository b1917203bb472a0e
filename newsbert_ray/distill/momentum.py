"""Momentum distillation on gradients (NewsBERT Eqs. 7-8). Knows no model and no Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

Parameters = dict[str, nn.Parameter]
"""The parameters of a layer, by name."""


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


def apply_momentum(
    student: nn.ModuleList, teacher: nn.ModuleList, *, beta: float, last: bool = False, rescaled: bool = False
) -> None:
    """Mix each teacher block into its student layer, on `.grad`, after backward and all-reduce.

    Transformer layers only: embeddings and the shared top keep their own gradients. Of a block only the
    layers that learn count; a layer that does not learn, or whose block does not, keeps its gradient.

    Args:
        student: N layers with gradients; without layers there is nothing to mix.
        teacher: NK layers of the same architecture with gradients.
        last: the block of a student layer is one of the teacher's last N layers, not K consecutive ones.
        rescaled: scale the block's mean gradient to the norm of the student layer's (not in the paper).
    """
    if beta == 0.0:
        return
    for layer, block in _blocks(student, teacher, last=last):
        if not block:
            continue
        gradients, means = _gradients(layer), [_gradients(one) for one in block]
        if rescaled:
            mean = [torch.stack(same).mean(0) for same in zip(*means, strict=True)]
            factor = _norm(gradients) / _norm(mean).clamp_min(torch.finfo(mean[0].dtype).tiny)
            means = [[gradient * factor for gradient in mean]]
        mix_gradients_(gradients, means, beta=beta)


@contextmanager
def mixed_updates(
    student: nn.ModuleList, teacher: nn.ModuleList, *, beta: float, scale: float = 1.0, last: bool = False
) -> Iterator[None]:
    """Mix what the optimiser adds to each teacher block, not its gradient, into its student layer's update.

    Wraps the optimiser's step: u_s <- beta * scale * mean_j(u_t[j]) + (1 - beta) * u_s. Not in the paper.
    `scale`: learning rate of the student divided by the teacher's.
    """
    pairs = [(layer, block) for layer, block in _blocks(student, teacher, last=last) if block and beta]
    before = [[_copies(one) for one in (layer, *block)] for layer, block in pairs]
    yield
    with torch.no_grad():
        for (layer, block), starts in zip(pairs, before, strict=True):
            own, *others = (
                torch._foreach_sub(list(one.values()), start)
                for one, start in zip((layer, *block), starts, strict=True)
            )
            mix_gradients_(own, [torch._foreach_mul(update, scale) for update in others], beta=beta)
            for parameter, start, update in zip(layer.values(), starts[0], own, strict=True):
                parameter.copy_(start + update)


def _blocks(
    student: nn.ModuleList, teacher: nn.ModuleList, *, last: bool
) -> Iterator[tuple[Parameters, list[Parameters]]]:
    """Each student layer that learns, and the layers of its teacher block that do; none for another. What
    parameters some of them lack is left out: ModernBERT's first layer has one norm less."""
    size, first = len(teacher) // max(1, len(student)), len(teacher) - len(student)
    for i, layer in enumerate(student):
        block = [teacher[first + i]] if last else [teacher[i * size + j] for j in range(size)]
        learning = [one for one in block if _learns(one)] if _learns(layer) else []
        named = [dict(one.named_parameters()) for one in (layer, *learning)]
        names = [name for name in named[0] if all(name in one for one in named)]
        own, *others = ({name: one[name] for name in names} for one in named)
        yield own, others


def _learns(layer: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters())


class BlockStatistics(NamedTuple):
    """Norm ratio (block / student) and cosine of a block's mean gradient and its student layer's."""

    ratio: float
    cosine: float


def block_statistics(
    student: nn.ModuleList, teacher: nn.ModuleList, *, last: bool = False
) -> list[BlockStatistics]:
    """Norm ratio and cosine of each block before mixing: how far momentum can turn an update.

    Arguments as in `apply_momentum`; 0 and 0 for a block that does not learn.
    """
    statistics = []
    for layer, block in _blocks(student, teacher, last=last):
        if not block:
            statistics.append(BlockStatistics(0.0, 0.0))
            continue
        gradients = _gradients(layer)
        means = [torch.zeros_like(gradient) for gradient in gradients]
        for one in block:
            torch._foreach_add_(means, _gradients(one), alpha=1 / len(block))
        dot = torch.stack([(a * b).sum() for a, b in zip(gradients, means, strict=True)]).sum()
        own, theirs, tiny = _norm(gradients), _norm(means), torch.finfo(dot.dtype).tiny
        ratio, cosine = theirs / own.clamp_min(tiny), dot / (own * theirs).clamp_min(tiny)
        statistics.append(BlockStatistics(float(ratio), float(cosine)))
    return statistics


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients))))
    return norm


def _copies(layer: Parameters) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in layer.values()]


def _gradients(layer: Parameters) -> list[Tensor]:
    gradients = [parameter.grad for parameter in layer.values()]
    missing = [name for name, parameter in layer.items() if parameter.grad is None]
    if missing:
        raise ValueError(f"no gradient for {', '.join(missing[:3])}; momentum is mixed after backward")
    return [gradient for gradient in gradients if gradient is not None]
