"""Method `linear`: a run without gradients, epochs or a GPU, that leaves what every run leaves."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from newsbert_ray.config import TrainSettings
from newsbert_ray.data.shards import Manifest
from newsbert_ray.evaluation.metrics import topic_metrics
from newsbert_ray.model.linear import Floats, Ints, LinearModel, confusion_of, fit_linear, labelled_texts
from newsbert_ray.record import RunRecord, describe_hardware, installed_versions, write_record
from newsbert_ray.training.loop import Report
from newsbert_ray.training.worker import describe_data


def train_linear(settings: TrainSettings, manifest: Manifest, *, report: Report) -> None:
    """Fit the linear model, choose its strength on validation, and write student/ and record.json.

    Args:
        report: receives an evaluation for each strength; its `step` counts them.
    Raises:
        ShardError: no labelled titles in a split that is needed.
        SettingsError: all titles have the same topic, or `train_rows` is more than there are.
    """
    start = time.perf_counter()
    labels, curve = manifest.labels, list[dict[str, Any]]()
    texts, topics = labelled_texts(settings.data, manifest, "train", count=settings.train_rows)
    other = labelled_texts(settings.data, manifest, "validation")
    best: LinearModel | None = None
    for step, (model, scores) in enumerate(fit_linear(texts, topics, labels, other, seed=settings.seed), 1):
        metrics = score_topics(scores, other[1])
        if best is None or metrics["accuracy"] > max(e["validation"]["student"]["accuracy"] for e in curve):
            best, best_step = model, step
        curve.append(
            {
                "step": step,
                "epoch": step,
                "validation": {"student": metrics},
                "train": {"strength": model.strength},
            }
        )
        report({"kind": "evaluation", **curve[-1]})
    assert best is not None
    fitted = time.perf_counter()
    best.save(Path(settings.out) / "student")
    test = {}
    if manifest.rows("test", "topics"):
        titles, truth = labelled_texts(settings.data, manifest, "test")
        test = {"student": score_topics(best.scores(titles), truth)}
    seconds = {"train": fitted - start, "evaluate": time.perf_counter() - fitted}
    record = RunRecord(
        settings=settings.model_dump(),
        seed=settings.seed,
        versions=installed_versions(),
        hardware={**describe_hardware(), "device": "cpu", "workers": 1, "threads": 1},
        seconds={**seconds, "total": sum(seconds.values())},
        layer_map=[],
        metrics={
            "validation": curve[best_step - 1]["validation"],
            "test": test,
            "speed": {},
            "best_step": best_step,
            "train": {"strength": best.strength},
            "parameters": {"student": best.parameters},
        },
        curve=curve,
        data=describe_data(settings, manifest),
        steps=len(curve),
        titles_per_second=len(texts) * len(curve) / max(1e-9, seconds["train"]),
    )
    write_record(settings.out, record)


def score_topics(scores: Floats, topics: Ints) -> dict[str, float]:
    """Accuracy and macro-F1 of scores (M, Y) for topics (M,)."""
    return topic_metrics(confusion_of(scores, topics))
