"""Topic by topic: counts by hand, the same macro-F1 as everywhere, and what the command line shows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from newsbert_ray import cli
from newsbert_ray.config import SettingsError
from newsbert_ray.data.shards import ShardError
from newsbert_ray.evaluation.evaluate import TopicRow, by_topic, evaluate, topic_rows
from newsbert_ray.evaluation.metrics import topic_metrics
from newsbert_ray.training.run import train

if TYPE_CHECKING:
    from tests.conftest import MakeSettings


def test_by_hand() -> None:
    """Most titles first; a topic that nobody predicts has no precision, one without titles no recall, one
    with neither no row."""
    confusion = np.array(
        [[3, 1, 0, 0, 2], [0, 8, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    )
    rows = topic_rows(confusion, ["tv", "news", "kids", "none", "autos"])
    assert rows == [
        TopicRow("news", 8, 10, 0.8, 1.0, 16 / 18, None),
        TopicRow("tv", 6, 3, 1.0, 0.5, 6 / 9, "autos"),
        TopicRow("kids", 1, 0, None, 0.0, 0.0, "news"),
        TopicRow("autos", 0, 2, 0.0, None, 0.0, None),
    ]
    mean = sum(row.f1 for row in rows) / 4
    assert topic_metrics(confusion)["macro_f1"] == pytest.approx(mean)


def test_a_run_by_topic(make_settings: MakeSettings, capsys: pytest.CaptureFixture[str]) -> None:
    """What `evaluate` sums up, and what it prints."""
    settings = make_settings(epochs=1)
    train(settings, quiet=True)
    for model in ("student", "teacher"):
        rows = by_topic(settings.out, model=model)
        whole = evaluate(settings.out)[model]
        assert sum(row.titles for row in rows) == sum(row.predicted for row in rows) == whole["rows"]
        assert sum(row.f1 for row in rows) / len(rows) == pytest.approx(whole["macro_f1"])
        assert [row.titles for row in rows] == sorted((row.titles for row in rows), reverse=True)
    with pytest.raises(ShardError, match="expected one of train"):
        by_topic(settings.out, split="all")
    capsys.readouterr()
    assert cli.main(["evaluate", settings.out, "--by_topic", "--split", "validation"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("precision", "recall", "F1", "most often taken for", "macro-F1"))
    assert cli.main(["evaluate", settings.out, "--by_topic", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == [row._asdict() for row in by_topic(settings.out)]
    assert cli.main(["evaluate", settings.out, "--by_topic", "--show", "U1"]) == 2
    assert "give only one of submission, by_topic and show" in capsys.readouterr().err


def test_clicks_have_no_topics(make_settings: MakeSettings) -> None:
    """Another task is named."""
    settings = make_settings(task="recommendation", epochs=1, **{"recommendation.history": 5})
    train(settings, quiet=True)
    with pytest.raises(SettingsError, match="needs a run of task topics"):
        by_topic(settings.out)
