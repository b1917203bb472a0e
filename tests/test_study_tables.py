"""The study's tables: what is paired with what, and the words for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.study_tables import (
    TABLES,
    accuracies,
    accuracy_table,
    base_table,
    by_seed,
    compare,
    goals_table,
    keep,
    learning_curve,
    orderings_table,
    quality_speed,
    read_records,
    regime_table,
    setup,
    short_table,
    study,
    variants_table,
)


def record(method: str, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    """One line as the driver writes it."""
    scores = {"accuracy": accuracy, "macro_f1": accuracy / 2}
    layers = {"linear": 0, "teacher": 6}.get(method, 1)
    usual = {
        "name": f"{method}{seed}{more}",
        "stage": {"linear": "linear", "teacher": "teachers"}.get(method, "main"),
        "method": method,
        "labels": 1000,
        "layers": layers,
        "seed": seed,
        "unlabelled": True,
        "values": {},
        "test": scores,
        "validation": scores,
        "teacher_test": {"accuracy": 0.7, "macro_f1": 0.5},
        "parts": {"train": 1.0},
        "rate": 4e-4,
        "steps": 700,
    }
    return {**usual, **more}


RECORDS = [
    *(record("finetune", seed, 0.64 + seed / 1000) for seed in range(5)),
    *(record("best", seed, 0.69 + seed / 900) for seed in range(5)),
    *(record("best", seed, 0.68, layers=0, name=f"words{seed}") for seed in range(5)),
    *(record("newsbert", seed, 0.66 + seed / 1100) for seed in range(5)),
    *(record("linear", seed, 0.57 + seed / 1000) for seed in range(5)),
    *(record("teacher", seed, 0.70, values={"steps": 5}) for seed in range(5)),
    record("best", 7, 0.1, stage="tuning"),
    record("twinbert", 0, 0.67, unlabelled=False),
    *(
        record("best", seed, 0.65 + seed / 2000, stage="variants", values={"distill.temperature": 9})
        for seed in range(3)
    ),
]


def test_the_length_that_validation_prefers_counts() -> None:
    """A size was repeated with more updates; a variant with other settings is never a result."""
    values = {"steps": 2800, "evaluate_every": 400}
    better = record("best", 0, 0.72, values=values, steps=2800)
    worse = record("best", 1, 0.5, values=values, steps=2800)
    other = record("best", 0, 0.9, values={"steps": 9000, "distill.temperature": 9}, steps=9000)
    found = by_seed([better, worse, *RECORDS, other], "best", 1000, 1)
    assert (found[0]["steps"], found[1]["steps"]) == (2800, 700)


def test_only_final_runs_count() -> None:
    """Tuning looks at validation; a variant is another method."""
    assert sorted(by_seed(RECORDS, "best", 1000, 1)) == [0, 1, 2, 3, 4]


def test_runs_are_paired_by_seed() -> None:
    """Seeds that only one method has do not count."""
    test = compare({0: 0.6, 1: 0.7, 2: 0.65, 9: 0.1}, {0: 0.59, 1: 0.68, 2: 0.64, 8: 0.9})
    assert test is not None
    assert test.mean == pytest.approx(4 / 3)
    assert test.pairs == 3
    assert test.p == pytest.approx(0.0572, abs=1e-3)
    assert test.verdict == "cannot be told"
    assert compare({0: 0.5}, {1: 0.6}) is None
    alone = compare({0: 0.5}, {0: 0.6})
    assert alone is not None
    assert alone.verdict == "cannot be told"


def test_tables_say_what_was_measured() -> None:
    rows = {row[0]: row for row in accuracy_table(RECORDS).rows}
    assert rows["fine-tuned"][1:] == ("1", "64.2 ± 0.2 / 32.1")
    assert rows["6-layer teacher"][2] == "70.0 ± 0.0 / 35.0"
    assert rows["TwinBERT, labelled text only"][1:] == ("1", "67.0 / 33.5 (1)")
    (only,) = orderings_table(RECORDS).rows
    assert only[0] == "NewsBERT above fine-tuned"
    assert only[1].endswith("holds")
    goals = {row[0]: row for row in goals_table(RECORDS).rows}
    points, p, reached = goals["1,000 labels: 4.0 points above fine-tuning"][1:]
    assert (points, reached) == ("+5.0 points", "yes")
    assert float(p) < 1e-4
    assert goals["12,000 labels: 2.5 points above fine-tuning"][-1] == "cannot be told"
    (change,) = variants_table(RECORDS).rows
    assert change == (
        "recipe, 1 layer",
        "1,000",
        "distill.temperature 9",
        "0.0004",
        "700",
        "65.0",
        "65.0",
        "3",
    )
    assert setup(RECORDS).startswith("Updates: students 700; teachers 700 at 1,000 labels. Learning rates: ")


def test_one_linear_run_of_all_labels_stands_for_every_seed() -> None:
    records = [record("linear", 0, 0.73, labels=None)]
    records += [record("best", seed, 0.76 + seed / 1000, labels=None) for seed in range(3)]
    goals = {row[0]: row for row in goals_table(records).rows}
    points, p, reached = goals["all labels: 2 points above the linear model"][1:]
    assert (points, reached) == ("+3.1 points", "yes")
    assert float(p) < 0.01
    assert by_seed(records, "linear", 1000, 0) == {}


def test_every_table_and_figure_is_made(tmp_path: Path) -> None:
    """Also of a study that has measured a part only."""
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS), encoding="utf-8")
    keep([tmp_path / "records.jsonl"], tmp_path / "kept.jsonl")
    kept = read_records(tmp_path / "kept.jsonl")
    assert len(kept) == len(RECORDS)
    assert "parts" not in kept[0]
    assert all(study(name, tmp_path / "kept.jsonl") for name in TABLES)
    assert "5.0 points more" in study("headline", tmp_path / "kept.jsonl")
    assert len(learning_curve(kept).panels[0].lines) == 7
    more = [{**record, "labels": 4000} for record in kept if record["method"] == "finetune"]
    assert len(learning_curve([*kept, *more]).panels[0].lines) == 1
    speeds = {"0": 9000.0, "1": 900.0, "6": 150.0, "linear": 5000.0}
    assert len(quality_speed(kept, speeds).panels[0].lines) == 4
    assert accuracies(by_seed(kept, "best", 1000, 1))[0] == 0.69


def test_few_updates_and_forms_of_momentum() -> None:
    """Runs of few updates are compared with each other only; a form of momentum has a column of its own."""
    short = [
        record(
            method, seed, accuracy + seed / 500, stage="short", values={"steps": 400}, steps=400, seconds=9.0
        )
        for method, accuracy in (("newsbert", 0.66), ("finetune", 0.62))
        for seed in range(2)
    ]
    assert [row[:2] for row in short_table(short).rows] == [
        ("NewsBERT", "66.1 ± 0.1 / 33.0 (2)"),
        ("fine-tuned", "62.1 ± 0.1 / 31.1 (2)"),
    ]
    table = orderings_table([*RECORDS, *short])
    assert table.head[1:] == ("1,000 labels", "1,000 labels, few updates")
    assert table.rows[0][2].startswith("+4.0, p 0: holds")
    forms = [{"distill.beta": 0.0}, {"distill.beta": 0.3, "distill.momentum": "update"}]
    runs = [record("newsbert", 0, 0.4 + i / 10, stage="regime", values=form) for i, form in enumerate(forms)]
    assert regime_table(runs).head == ("learning rate", "beta 0", "beta 0.3, update")
    assert regime_table(runs).rows == (("0.0004", "40.0", "50.0"),)


def test_the_paper_s_shape(tmp_path: Path) -> None:
    """Quality beside measured speed, as a share and a multiple of the teacher's."""
    runs = [record("teacher", 0, 0.8, layers=8), record("best", 0, 0.72)]
    speeds = [
        {"name": "teacher", "layers": 8, "titles_per_second": 50.0},
        {"name": "1 layer", "layers": 1, "titles_per_second": 400.0},
    ]
    (tmp_path / "speed.json").write_text(json.dumps({"timings": speeds}), encoding="utf-8")
    rows = base_table(runs, tmp_path / "speed.json").rows
    assert rows == (
        ("recipe", "1", "72.0", "36.0", "90.0%", "400", "8.0"),
        ("8-layer teacher", "8", "80.0", "40.0", "100.0%", "50", "1.0"),
    )
