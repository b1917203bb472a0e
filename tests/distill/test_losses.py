"""Eqs. 1-6: worked by hand, and against what each must equal."""

from __future__ import annotations

import math

import pytest
import torch

from newsbert_ray.config import LossWeights
from newsbert_ray.data.batches import Bucket
from newsbert_ray.distill import losses


def whole(rows: int, tokens: int) -> Bucket:
    """A bucket without padding."""
    ids = torch.zeros(rows, tokens, dtype=torch.int64)
    return Bucket(ids, torch.ones_like(ids))


def test_cross_entropy_by_hand() -> None:
    """A loss summed over a part must be divided by the whole update's titles, not by the part's."""
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    found = losses.cross_entropy(logits, torch.tensor([1, 0]), rows=4)
    assert found.item() == pytest.approx((math.log(4 / 3) + math.log(2.0)) / 4)


def test_soft_labels_by_hand() -> None:
    """Eq. 3 is a cross-entropy of tempered predictions, without Hinton's t squared."""
    teacher = torch.tensor([[2.0 * math.log(3.0), 0.0]])
    student = torch.tensor([[0.0, 0.0]])
    found = losses.soft_label_loss(student, teacher, temperature=2.0, rows=1)
    assert found.item() == pytest.approx(math.log(2.0))
    student = torch.tensor([[0.0, 2.0 * math.log(4.0)]])  # tempered: 1/5, 4/5; the teacher's: 3/4, 1/4
    by_hand = -(0.75 * math.log(0.2) + 0.25 * math.log(0.8))
    assert losses.soft_label_loss(student, teacher, temperature=2.0, rows=1).item() == pytest.approx(by_hand)
    assert losses.soft_label_loss(student, teacher, temperature=2.0, rows=1, t2=True).item() == pytest.approx(
        4 * by_hand
    )


def test_soft_labels_are_kl_and_entropy() -> None:
    """The same number as KL(teacher || student) plus the teacher's entropy, found another way."""
    torch.manual_seed(0)
    teacher, student = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    p, log_q = torch.softmax(teacher / 3, -1), torch.log_softmax(student / 3, -1)
    kl = torch.nn.functional.kl_div(log_q, p, reduction="sum")
    entropy = -(p * p.log()).sum()
    found = losses.soft_label_loss(student, teacher, temperature=3.0, rows=5)
    assert found.item() == pytest.approx(float(kl + entropy) / 5, abs=1e-12)


def test_token_mse_by_hand_counts_real_tokens_only() -> None:
    """Padding must neither add error nor water it down (the paper leaves padding open)."""
    student = torch.tensor([[[1.0, 2.0], [5.0, 5.0], [9.0, 9.0]]])
    teacher = torch.tensor([[[0.0, 0.0], [5.0, 6.0], [0.0, 0.0]]])
    bucket = Bucket(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[1, 1, 0]]))
    found = losses.token_mse(student, teacher, bucket, tokens=2)
    assert found.item() == pytest.approx((1 + 4 + 0 + 1) / (2 * 2))


def test_a_text_counts_as_often_as_it_is_used() -> None:
    """Encoding a news once for three mentions must leave the loss that of three encodings."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    once = Bucket(torch.zeros_like(mask), mask, torch.tensor([3.0, 1.0]))
    rows = torch.tensor([0, 0, 0, 1])
    each = Bucket(torch.zeros_like(mask[rows]), mask[rows])
    found = losses.token_mse(student, teacher, once, tokens=9)
    torch.testing.assert_close(found, losses.token_mse(student[rows], teacher[rows], each, tokens=9))
    s, t = student[:, 0], teacher[:, 0]
    together = losses.vector_mse(s, t, rows=4, uses=losses.uses_of([once]))
    torch.testing.assert_close(together, losses.vector_mse(s[rows], t[rows], rows=4))
    mixed = losses.uses_of([each, once])
    assert mixed is not None
    assert mixed.tolist() == [1, 1, 1, 1, 3, 1]
    assert losses.uses_of([each]) is None


def test_hidden_loss_takes_the_blocks_last_layers() -> None:
    """Student layer i is matched to teacher layer iK, not to its neighbours and not to the embeddings."""
    teacher = [torch.full((1, 1, 1), float(i)) for i in range(5)]  # embeddings 0, layers 1 to 4
    student = [torch.zeros(1, 1, 1) for _ in range(3)]  # K = 2: layers 2 and 4
    found = losses.hidden_loss([student], [teacher], [whole(1, 1)], tokens=1)
    assert found.item() == pytest.approx(2.0**2 + 4.0**2)


def test_news_embedding_loss_is_mse() -> None:
    """Eq. 2 against torch's own mean squared error."""
    torch.manual_seed(1)
    student, teacher = torch.randn(6, 3), torch.randn(6, 3)
    found = losses.vector_mse(student, teacher, rows=6)
    assert found.item() == pytest.approx(torch.nn.functional.mse_loss(student, teacher).item(), rel=1e-6)


@pytest.mark.parametrize("name", ["token_mse", "news_embedding", "soft_labels"])
def test_teacher_is_a_constant(name: str) -> None:
    """A distillation loss that reached the teacher would pull it towards its student."""
    student = torch.randn(2, 3, 4, requires_grad=True)
    teacher = torch.randn(2, 3, 4, requires_grad=True)
    if name == "token_mse":
        loss = losses.token_mse(student, teacher, whole(2, 3), tokens=6)
    elif name == "news_embedding":
        loss = losses.vector_mse(student[0], teacher[0], rows=3)
    else:
        loss = losses.soft_label_loss(student[0], teacher[0], temperature=2.0, rows=3)
    loss.backward()  # type: ignore[no-untyped-call]
    assert teacher.grad is None
    assert student.grad is not None


def test_total_weights_each_loss() -> None:
    """Every loss has a factor of its own, 1 in the paper."""
    parts = {name: torch.tensor(float(2**i)) for i, name in enumerate(LossWeights.model_fields)}
    assert losses.weighted_total(parts, LossWeights()).item() == 127.0
    weights = LossWeights(teacher_task=0.5, hidden=3.0)
    assert losses.weighted_total(parts, weights).item() == 0.5 + 2 + 4 + 24 + 16 + 32 + 64
