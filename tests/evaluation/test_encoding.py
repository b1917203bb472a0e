"""The map of titles: its plane and its titles."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from newsbert_ray.data.shards import read_manifest
from newsbert_ray.evaluation.encoding import MISTAKES, SplitData, between_topics, map_titles
from newsbert_ray.model.saved import load_student
from newsbert_ray.record import MAP, RunRecord, write_record
from newsbert_ray.reporting.figures import OTHERS, NothingToDraw, map_figure
from newsbert_ray.reporting.report import report
from newsbert_ray.serving.predictor import load
from newsbert_ray.training.run import train

if TYPE_CHECKING:
    from tests.conftest import MakeSettings

MakeRecord = Callable[..., RunRecord]


def test_the_plane_is_that_of_the_topics_means() -> None:
    """Noise in a hundred dimensions is larger than the distance between topics and must not define the
    axes."""
    generator = np.random.default_rng(0)
    topics = np.repeat([0, 1, 2], 40)
    means = np.zeros((3, 100))
    means[0, 3], means[1, 7] = 5.0, 4.0
    embeddings = means[topics] + generator.normal(size=(120, 100)) * np.where(np.arange(100) == 50, 9.0, 0.3)
    places, share = between_topics(embeddings, topics)
    middle = np.stack([places[topics == topic].mean(0) for topic in range(3)])
    apart = np.linalg.norm(middle[:, None] - middle[None], axis=-1)
    assert apart[0, 1] == pytest.approx(np.hypot(5, 4), rel=0.2)
    assert apart[0, 2] == pytest.approx(5, rel=0.2)
    assert share == pytest.approx(1.0, abs=0.05)


def test_one_topic_or_one_dimension_is_still_a_map() -> None:
    """Without differences between topics all points are at 0."""
    places, _ = between_topics(np.ones((4, 3)), np.zeros(4, dtype=np.int64))
    assert np.allclose(places, 0.0)
    places, share = between_topics(np.array([[0.0], [1.0], [2.0]]), np.array([0, 1, 1]))
    assert (places.shape, share) == ((3, 2), 1.0)


def test_a_run_leaves_its_map(make_settings: MakeSettings) -> None:
    """Test titles of all lengths are on the map, and the report draws it."""
    settings = make_settings(epochs=1)
    train(settings, quiet=True)
    found = json.loads((Path(settings.out) / MAP).read_text())
    manifest = read_manifest(settings.data)
    assert found["split"] == "test"
    assert len(found["topic"]) == len(found["x"]) == len(found["y"]) == manifest.rows("test", "topics")
    assert max(found["topic"]) < len(found["labels"]) == len(manifest.labels)
    encoder, top, _ = load_student(Path(settings.out) / "student")
    device = torch.device("cpu")
    data = SplitData.of(settings, manifest, "train")
    few = map_titles(encoder, top, data, device=device, count=100)
    assert 100 <= len(few["topic"]) < manifest.rows("train", "topics")
    assert np.trace(found["confusion"]) / np.sum(found["confusion"]) == pytest.approx(
        train(settings, quiet=True).metrics["test"]["student"]["accuracy"]
    )
    mistakes = found["mistakes"]
    assert 0 < len(mistakes) <= MISTAKES
    predictions = load(settings.out).predict([one["title"] for one in mistakes])
    for one, prediction in zip(mistakes, predictions, strict=True):
        assert prediction.topic == found["labels"][one["predicted"]] != found["labels"][one["topic"]]
        assert prediction.probability == pytest.approx(one["probability"], abs=1e-3)
    assert mistakes == sorted(mistakes, key=lambda one: -one["probability"])
    figure = map_figure(Path(settings.out))
    assert sum(len(dots.x) for dots in figure.panels[0].lines) == len(found["x"])
    assert (Path(settings.out) / "report" / "map_of_titles.png") in report(
        [settings.out], out=Path(settings.out) / "report"
    )


def test_eight_topics_have_colours(tmp_path: Path) -> None:
    """Only the largest topics have a colour; more cannot be told apart."""
    topic = [number for number in range(10) for _ in range(20 - number)]
    told = {"split": "test", "labels": [f"t{n}" for n in range(10)], "topic": topic, "share": 0.5}
    (tmp_path / MAP).write_text(json.dumps({**told, "x": [0.0] * len(topic), "y": [1.0] * len(topic)}))
    figure = map_figure(tmp_path)
    (panel,) = figure.panels
    assert [dots.label for dots in panel.lines] == [OTHERS, *(f"t{n}" for n in range(8))]
    assert [dots.colour for dots in panel.lines] == [None, *range(8)]
    assert len(panel.lines[0].x) == 12 + 11
    assert "155 titles of test" in figure.caption


def test_runs_without_a_map(tmp_path: Path, make_record: MakeRecord) -> None:
    """Runs of earlier versions have no map; their report works without it."""
    with pytest.raises(NothingToDraw, match="has none"):
        map_figure(tmp_path)
    write_record(tmp_path / "old", make_record())
    assert not any("map" in path.name for path in report([tmp_path / "old"], out=tmp_path / "out"))
