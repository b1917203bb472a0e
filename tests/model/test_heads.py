"""Heads: click scores and pair scores computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from newsbert_ray.data.batches import ClickChoices, PairChoices
from newsbert_ray.methods import TASKS
from newsbert_ray.model.heads import NO_CHOICE, ClickHead, PairHead, Prediction, build_head


def choices(history: list[list[int]], mask: list[list[int]], candidates: list[list[int]]) -> ClickChoices:
    """Clicks over the batch's texts; candidate -1 is padding."""
    offered = torch.tensor(candidates)
    return ClickChoices(
        torch.tensor(history), torch.tensor(mask), offered.clamp_min(0), offered >= 0,
        torch.zeros(len(history), dtype=torch.int64),
    )  # fmt: skip


def test_click_scores_by_hand() -> None:
    """A score is the inner product of a candidate with the user's own pooled history."""
    head = ClickHead(2, query_size=3)
    torch.nn.init.zeros_(head.user.query.weight)  # even weights: pooling is the mean
    news = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [9.0, 9.0]])
    found: Prediction = head(news, choices([[0, 1], [2, 3]], [[1, 1], [1, 0]], [[2, 0], [1, -1]]))
    assert found.user_embedding is not None
    assert found.user_embedding.tolist() == [[0.5, 0.5], [2.0, 2.0]]
    assert found.logits.tolist() == [[2.0, 0.5], [2.0, NO_CHOICE]]


def test_a_newcomer_has_a_learned_embedding() -> None:
    """A user without a history needs an embedding, and it must be trained."""
    head = ClickHead(2, query_size=3)
    with torch.no_grad():
        head.newcomer.copy_(torch.tensor([3.0, -1.0]))
    found = head(torch.eye(2), choices([[0], [1]], [[0], [1]], [[0, 1], [0, 1]]))
    assert found.logits[0].tolist() == [3.0, -1.0]
    assert torch.isfinite(found.logits).all()
    found.logits[0, 0].backward()
    assert head.newcomer.grad is not None
    assert head.newcomer.grad.tolist() == [1.0, 0.0]
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in head.parameters())


def test_a_newcomers_candidates_do_not_tie() -> None:
    """Where no newcomer was trained on, a tie is an AUC of 0.5 here and the order of the file for MIND."""
    torch.manual_seed(5)
    head = ClickHead(4, query_size=3)
    drawn = torch.rand(1)
    found = head(torch.eye(4), choices([[0]], [[0]], [[0, 1, 2, 3]]))
    assert len(found.logits.unique()) == 4
    torch.manual_seed(5)
    ClickHead(4, query_size=3)
    assert torch.equal(torch.rand(1), drawn)


def test_a_padded_candidate_has_no_probability() -> None:
    """Padding with a probability would be trained as a negative; with -inf the soft label is NaN."""
    logits = torch.tensor([[1.0, 0.0, NO_CHOICE]])
    two = torch.softmax(logits[:, :2], -1)
    assert torch.equal(torch.softmax(logits, -1)[:, :2], two)
    target = torch.softmax(logits, -1)
    assert torch.isfinite(-(target * torch.log_softmax(logits, -1)).sum())


def test_pair_scores_are_logistic() -> None:
    """The cross-entropy over (no click, click) must equal the binary one of the score."""
    head = PairHead()
    with torch.no_grad():
        head.threshold.fill_(0.5)
    texts = torch.tensor([[1.0, 2.0, 0.0, 0.0], [3.0, -0.5, 9.0, 0.0], [1.0, 2.0, 0.0, 7.0]])
    target = PairChoices(torch.tensor([0, 2]), torch.tensor([1, 1]), torch.tensor([1, 0]))
    logits = head(texts, target).logits
    assert logits.tolist() == [[0.0, 0.5], [0.0, 0.5]]
    loss = torch.nn.functional.cross_entropy(logits, target.labels, reduction="none")
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(0.5))])


def test_each_task_has_its_head() -> None:
    """Each task needs its own head."""
    heads = [build_head(task, 4, query_size=2, topics=3) for task in TASKS]
    names = [type(head).__name__ for head in heads]
    assert names == ["TopicHead", "ClickHead", "PairHead"]
