"""The linear model: what it learns, what it writes, and what it reads back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from newsbert_ray.config import SettingsError
from newsbert_ray.model.encoder import EncoderError
from newsbert_ray.model.linear import STRENGTHS, LinearModel, confusion_of, fit_linear

TEXTS = ["the cup final", "a cup match", "rain today", "rain and snow", "stocks rise", "stocks fall"] * 3
TOPICS = np.array([0, 0, 2, 2, 3, 3] * 3)
LABELS = ("sports", "unseen", "weather", "finance")


def fit(topics: np.ndarray = TOPICS) -> LinearModel:
    return [model for model, _ in fit_linear(TEXTS, topics, LABELS, (TEXTS, topics))][-1]


def test_it_learns_topics_and_never_predicts_one_without_texts() -> None:
    """A topic that no labelled text has must not take probability from the others."""
    model = fit()
    assert model.scores(["a cup in the rain", "the cup", "snow", "stocks"])[1:].argmax(1).tolist() == [
        0,
        2,
        3,
    ]
    assert np.isneginf(model.scores(["anything"])[0, 1])
    assert len(list(fit_linear(TEXTS, TOPICS, LABELS, (TEXTS, TOPICS)))) == len(STRENGTHS)


def test_two_topics_have_a_vector_each() -> None:
    """scikit-learn returns one vector for two topics; both sides of it are topics."""
    model = fit(np.where(TOPICS == 2, 2, 0))
    assert model.scores(["the cup", "snow and rain", "stocks rise"]).argmax(1).tolist() == [0, 2, 0]


def test_it_reads_back_what_it_wrote(tmp_path: Path) -> None:
    """Predictions of a saved model are those of training, bit for bit; nothing is pickled."""
    model = fit()
    model.save(tmp_path / "student")
    loaded = LinearModel.load(tmp_path / "student")
    texts = [*TEXTS, "unknown words only", "", "Größe und Æther"]
    assert loaded.labels == LABELS
    np.testing.assert_allclose(loaded.scores(texts), model.scores(texts), rtol=1e-5)
    assert sorted(path.suffix for path in (tmp_path / "student").iterdir()) == [".json", ".safetensors"]
    (tmp_path / "student" / "linear.json").write_text("{", encoding="utf-8")
    with pytest.raises(EncoderError, match="not a complete linear model"):
        LinearModel.load(tmp_path / "student")


def test_scores_are_probabilities_after_a_softmax() -> None:
    """On other texts of the same kind the scaled scores are sure; raw margins are not."""
    scores = fit().scores(TEXTS)[:, [0, 2, 3]].astype(float)
    shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    assert shares.max(1).min() > 0.9


def test_one_topic_cannot_be_learned() -> None:
    with pytest.raises(SettingsError, match="the same topic"):
        fit(np.zeros(len(TEXTS), np.int64))


def test_confusion() -> None:
    """Rows are true topics, columns predicted ones."""
    scores = np.array([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0]], np.float32)
    assert confusion_of(scores, np.array([0, 0, 1])).tolist() == [[1, 1], [0, 1]]
