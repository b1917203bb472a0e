"""Topic metrics by hand and against scikit-learn's definition."""

from __future__ import annotations

import numpy as np
import pytest

from newsbert_ray.evaluation.metrics import topic_metrics


def test_by_hand() -> None:
    """3 of 5 right; F1 of the topics 2*2/(3+3), 2*1/(2+1) and 0/(0+1); a topic nobody has or gives does not
    count."""
    confusion = np.array([[2, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    found = topic_metrics(confusion)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["macro_f1"] == pytest.approx((4 / 6 + 2 / 3 + 0) / 3)
    assert found["rows"] == 5


def test_against_precision_and_recall() -> None:
    """F1 written as the harmonic mean of precision and recall, on random predictions."""
    generator = np.random.default_rng(0)
    truth, predicted = generator.integers(0, 6, 500), generator.integers(0, 6, 500)
    confusion = np.zeros((6, 6), dtype=np.int64)
    np.add.at(confusion, (truth, predicted), 1)
    scores = []
    for topic in range(6):
        hits = int(((truth == topic) & (predicted == topic)).sum())
        precision, recall = hits / (predicted == topic).sum(), hits / (truth == topic).sum()
        scores.append(2 * precision * recall / (precision + recall))
    found = topic_metrics(confusion)
    assert found["accuracy"] == pytest.approx((truth == predicted).mean())
    assert found["macro_f1"] == pytest.approx(np.mean(scores))


def test_empty_split() -> None:
    """A metric of nothing is no number."""
    with pytest.raises(ValueError, match="empty"):
        topic_metrics(np.zeros((3, 3), dtype=np.int64))
