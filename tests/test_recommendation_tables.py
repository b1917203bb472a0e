"""The tables of the study of recommendation: differences are paired over impressions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.recommendation_tables import (
    METRICS,
    Array,
    compare,
    difference,
    impressions_file,
    keep,
    means,
    name_of,
    recommendation,
)


def test_an_impression_without_metric_counts_nowhere() -> None:
    """By hand: the mean of 0.5, 0.7 and 0.9, and sd 0.2 over the root of 3."""
    scores = means({"auc": np.array([0.5, np.nan, 0.7, 0.9])})
    assert scores == {"auc": 0.7, "auc_error": round(0.2 / 3**0.5, 5), "rows": 3.0}


def test_differences_are_paired() -> None:
    """Two systems that move together differ by far less than their own errors."""
    theirs = np.array([0.1, 0.9, 0.5, 0.3, np.nan])
    ours = theirs + np.array([0.01, 0.03, 0.02, 0.02, 0.5])
    test = compare(ours, theirs)
    assert test["points"] == 2.0
    assert test["error"] == pytest.approx(100 * np.std([0.01, 0.03, 0.02, 0.02], ddof=1) / 2, abs=1e-3)
    assert test["p"] == pytest.approx(0.016, abs=1e-3)
    assert compare(ours, ours) == {"points": 0.0, "error": 0.0, "p": 1.0}


def test_only_common_seeds_are_compared() -> None:
    """A baseline has no seed and is compared with all."""
    low, high = np.array([0.4, 0.6, 0.5]), np.array([0.7, 0.8, 0.6])
    both = difference({0: high, 1: low}, {1: low, 2: high})
    assert both is not None
    assert (both["points"], both["seeds"]) == (0.0, 1)
    baseline = difference({0: high, 1: low}, {None: low})
    assert baseline is not None
    assert (baseline["points"], baseline["seeds"]) == (10.0, 2)
    assert difference({0: high}, {1: low}) is None


def write_study(out: Path) -> None:
    """What the driver leaves: records and each impression's metrics."""
    (out / "impressions").mkdir(parents=True)
    generator = np.random.default_rng(0)
    hard, lines = generator.normal(0.55, 0.2, 200), []

    def add(system: str, seed: int | None, gain: float, **more: Any) -> None:
        arrays: Array = np.tile(hard + gain + generator.normal(0, 0.02, 200), (len(METRICS), 1))
        scores = means(dict(zip(METRICS, arrays, strict=True)))
        record = {"system": system, "seed": seed, "layers": None, "rate": None, **more}
        lines.append(json.dumps({**record, "validation": scores, "test": scores}))
        np.save(impressions_file(out, record), arrays)

    length = {"steps": 58, "history": 10}
    add("popularity", None, -0.05)
    for seed in (0, 1):
        add("finetune", seed, 0.0, layers=1, rate=6e-4, batch_size=32, clicks=32, **length)
        add("best", seed, 0.03, layers=1, rate=8e-4, batch_size=128, clicks=32, **length)
    add("best, unlabelled_share 0.0", 0, 0.03, layers=1, rate=8e-4, batch_size=32, clicks=32, **length)
    (out / "records.jsonl").write_text("\n".join(lines), encoding="utf-8")


def test_tables_say_what_was_measured(tmp_path: Path) -> None:
    write_study(tmp_path)
    keep(tmp_path, tmp_path / "kept.jsonl")
    scores = recommendation("scores", tmp_path / "kept.jsonl").splitlines()
    assert "58 updates of 32 clicks, histories of 10. AUC ± its standard error over the 200 test" in scores[0]
    (best,) = (line for line in scores if line.startswith("| recipe |"))
    cells = [cell.strip() for cell in best.split("|")][1:-1]
    assert cells[:4] == ["recipe", "1", "0.0008", "96"]
    assert cells[-1] == "2"
    rows = recommendation("differences", tmp_path / "kept.jsonl").splitlines()
    (best,) = (line for line in rows if line.startswith("| recipe |"))
    above, _, _ = best.split("|")[2].partition("(")
    points, _, error = above.partition("±")
    assert float(points) == pytest.approx(3.0, abs=0.5)
    assert float(error) < 0.5, "paired: far below the error of either AUC"
    assert "| recipe, no news |" in "\n".join(rows)


@pytest.mark.parametrize(
    ("system", "words"),
    [
        ("newsbert", "NewsBERT"),
        ("finetune, learning_rate 0.0002", "fine-tuned, rate 0.0002"),
        ("newsbert's teacher", "6-layer teacher of NewsBERT"),
    ],
)
def test_systems_have_names(system: str, words: str) -> None:
    assert name_of(system) == words
