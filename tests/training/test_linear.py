"""Method `linear` leaves what every run leaves, and every verb reads it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import newsbert_ray
from newsbert_ray.config import SettingsError
from newsbert_ray.model.encoder import EncoderError

if TYPE_CHECKING:
    from tests.conftest import MakeSettings


@pytest.fixture
def run(make_settings: MakeSettings) -> Path:
    settings = make_settings(method="linear", **{"student.layers": 0})
    newsbert_ray.train(settings, quiet=True)
    return Path(settings.out)


def test_a_linear_run_is_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is recorded, evaluated, predicts and is reported like the others."""
    record = newsbert_ray.read_record(run)
    best = max(entry["validation"]["student"]["accuracy"] for entry in record.curve)
    assert record.metrics["validation"]["student"]["accuracy"] == best > 0.3
    evaluated = newsbert_ray.evaluate(run)
    assert evaluated["student"] == record.metrics["test"]["student"]  # type: ignore[call-overload]
    rows: Any = newsbert_ray.evaluate(run, by_topic=True)
    assert sum(row.titles for row in rows) == record.metrics["test"]["student"]["rows"]
    model = newsbert_ray.load(run)
    (first,) = model.predict(["goal match team"], top=3)
    assert len(first.topics) == 3
    assert 0 < first.probability <= 1
    with pytest.raises(SettingsError, match="no embeddings"):
        model.embed(["goal"])
    with pytest.raises(EncoderError, match="no encoder and no embeddings"):
        newsbert_ray.export(run, to="hf", out=run / "export")
    texts = run / "texts.jsonl"
    texts.write_text('{"id": "1", "text": "Rain"}\n', encoding="utf-8")
    with pytest.raises(EncoderError, match="no encoder and no embeddings"):
        newsbert_ray.embed(run, input=[texts], out=run / "vectors", workers=0)
    newsbert_ray.predict(run, input=texts, out=run / "predicted.jsonl")
    assert '"probability"' in (run / "predicted.jsonl").read_text(encoding="utf-8")
    newsbert_ray.report([run], out=run / "report")
    assert "linear SVM" in (run / "report" / "report.md").read_text(encoding="utf-8")


def test_train_rows_and_reports(make_settings: MakeSettings) -> None:
    """It learns from as many titles as another method would, and reports each strength."""
    entries: list[dict[str, Any]] = []
    settings = make_settings(method="linear", train_rows=100, **{"student.layers": 0})
    record = newsbert_ray.train(settings, report=entries.append, quiet=True)
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5]
    assert record.data["train_rows"] == 100
    assert newsbert_ray.train(settings, quiet=True) == record  # finished


@pytest.mark.parametrize("wrong", [{"task": "recommendation"}, {"distill.weights.soft_labels": 1.0}])
def test_it_learns_topics_from_labels_only(make_settings: MakeSettings, wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="topics from labels only"):
        make_settings(method="linear", **{"student.layers": 0}, **wrong)
