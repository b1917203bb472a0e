"""Momentum on gradients (Eqs. 7-8)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from newsbert_ray.distill.momentum import apply_momentum, block_statistics, mix_gradients_, mixed_updates


def layers(count: int, seed: int) -> nn.ModuleList:
    """Small layers with random gradients."""
    torch.manual_seed(seed)
    made = nn.ModuleList(nn.Linear(3, 2) for _ in range(count))
    for parameter in made.parameters():
        parameter.grad = torch.randn_like(parameter)
    return made


def test_by_hand() -> None:
    """beta = 0.25, K = 2: 0.25 * mean(4, 8) + 0.75 * 2 = 3."""
    student = [torch.tensor([2.0])]
    mix_gradients_(student, [[torch.tensor([4.0])], [torch.tensor([8.0])]], beta=0.25)
    assert student[0].item() == 3.0


def test_beta_one_is_the_block_mean() -> None:
    """At beta = 1 nothing of the student's own gradient may be left."""
    student, teacher = layers(2, 0), layers(6, 1)
    apply_momentum(student, teacher, beta=1.0)
    for i in range(2):
        for name, parameter in student[i].named_parameters():
            block = torch.stack([teacher[3 * i + j].get_parameter(name).grad for j in range(3)])  # type: ignore[misc]
            torch.testing.assert_close(parameter.grad, block.mean(0))


def test_beta_zero_touches_nothing() -> None:
    """beta = 0 is plain training, bit for bit, even where the teacher's gradient is not finite."""
    student, teacher = layers(1, 0), layers(2, 1)
    before = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    for parameter in teacher.parameters():
        assert parameter.grad is not None
        parameter.grad.fill_(float("inf"))
    apply_momentum(student, teacher, beta=0.0)
    after = [p.grad for p in student.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_linear_in_beta() -> None:
    """Half of beta moves the gradient half as far."""
    whole, half = layers(1, 0), layers(1, 0)
    start = [p.grad.clone() for p in whole.parameters() if p.grad is not None]
    apply_momentum(whole, layers(3, 1), beta=0.4)
    apply_momentum(half, layers(3, 1), beta=0.2)
    for s, w, h in zip(start, whole.parameters(), half.parameters(), strict=True):
        assert w.grad is not None
        torch.testing.assert_close(h.grad, (s + w.grad) / 2)


def test_teacher_keeps_its_gradients() -> None:
    """Momentum must not change the teacher's update."""
    teacher = layers(2, 1)
    before = [p.grad.clone() for p in teacher.parameters() if p.grad is not None]
    apply_momentum(layers(1, 0), teacher, beta=0.3)
    assert all(torch.equal(b, p.grad) for b, p in zip(before, teacher.parameters(), strict=True))  # type: ignore[arg-type]


def test_other_shape_is_an_error() -> None:
    """A narrower teacher gradient would broadcast silently over the student's."""
    with pytest.raises(ValueError, match="do not match the student's"):
        mix_gradients_([torch.ones(3, 2)], [[torch.ones(1, 2)]], beta=0.1)


def test_missing_gradient_is_an_error() -> None:
    """Mixing before backward would silently do nothing."""
    teacher = layers(2, 1)
    next(iter(teacher.parameters())).grad = None
    with pytest.raises(ValueError, match="no gradient for weight"):
        apply_momentum(layers(1, 0), teacher, beta=0.1)


def test_statistics_by_hand() -> None:
    """Ratio 5 / 10 and cosine 0.6."""
    student, teacher = (
        nn.ModuleList([nn.Linear(2, 1, bias=False)]),
        nn.ModuleList([nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)]),
    )
    student[0].weight.grad = torch.tensor([[10.0, 0.0]])
    teacher[0].weight.grad = torch.tensor([[6.0, 0.0]])
    teacher[1].weight.grad = torch.tensor([[0.0, 8.0]])
    (found,) = block_statistics(student, teacher)
    assert found.ratio == pytest.approx(0.5)
    assert found.cosine == pytest.approx(0.6)


def test_last_layers_by_hand() -> None:
    """N = 1: the teacher's last layer alone, 0.25 * 8 + 0.75 * 2 = 3.5; N = 2 of 4: layers 3 and 4."""
    student, teacher = numbers(2.0), numbers(4.0, 8.0)
    apply_momentum(student, teacher, beta=0.25, last=True)
    assert gradients(student) == [3.5]
    student = numbers(0.0, 0.0)
    apply_momentum(student, numbers(1.0, 2.0, 3.0, 4.0), beta=0.5, last=True)
    assert gradients(student) == [1.5, 2.0]


def test_layers_that_do_not_learn_are_left_out() -> None:
    """Of the blocks (1, 2) and (3, 4) only layer 4 learns: the first layer keeps its gradient."""
    student, teacher = numbers(2.0, 2.0), numbers(1.0, 1.0, 1.0, 6.0)
    for layer in teacher[:3]:
        layer.requires_grad_(False)
    apply_momentum(student, teacher, beta=0.5)
    assert gradients(student) == [2.0, 4.0]
    assert [found.ratio for found in block_statistics(student, teacher)] == [0.0, 1.5]
    student[1].requires_grad_(False)
    apply_momentum(student, teacher, beta=0.5)
    assert gradients(student) == [2.0, 4.0]


def test_rescaled_by_hand() -> None:
    """The block's mean (0, 4) is scaled to the student's norm 2: 0.25 * (0, 2) + 0.75 * (2, 0)."""
    student, teacher = (nn.ModuleList([nn.Linear(2, 1, bias=False)]) for _ in range(2))
    student[0].weight.grad = torch.tensor([[2.0, 0.0]])
    teacher[0].weight.grad = torch.tensor([[0.0, 4.0]])
    apply_momentum(student, teacher, beta=0.25, rescaled=True)
    assert student[0].weight.grad.tolist() == [[1.5, 0.5]]
    teacher[0].weight.grad = torch.zeros(1, 2)
    apply_momentum(student, teacher, beta=0.5, rescaled=True)
    assert student[0].weight.grad.tolist() == [[0.75, 0.25]]


def test_mixed_updates_by_hand() -> None:
    """SGD at rates 1 and 2: updates -2, and -8 and -16; 0.25 * 0.5 * -12 + 0.75 * -2 = -3."""
    student, teacher = numbers(2.0), numbers(4.0, 8.0)
    before = [layer.weight.item() for layer in (*student, *teacher)]
    groups = [{"params": student.parameters(), "lr": 1.0}, {"params": teacher.parameters(), "lr": 2.0}]
    with mixed_updates(student, teacher, beta=0.25, scale=0.5):
        torch.optim.SGD(groups).step()
    moved = [layer.weight.item() - start for layer, start in zip((*student, *teacher), before, strict=True)]
    assert moved == pytest.approx([-3.0, -8.0, -16.0], abs=1e-5)


def numbers(*gradients: float) -> nn.ModuleList:
    """Layers of one weight each, with these gradients."""
    made = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in gradients)
    for layer, gradient in zip(made, gradients, strict=True):
        layer.weight.grad = torch.tensor([[gradient]])
    return made


def gradients(layers: nn.ModuleList) -> list[float]:
    """The gradients of such layers."""
    return [float(parameter.grad) for parameter in layers.parameters() if parameter.grad is not None]
