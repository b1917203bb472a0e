"""A run's lines on the screen, with the metrics of its task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from newsbert_ray.record import RunRecord
from newsbert_ray.storage.workdir import WorkDir
from newsbert_ray.training.journal import (
    Display,
    _evaluation_line,
    _log_numbers,
    closing_lines,
    overview,
)

MakeRecord = Callable[..., RunRecord]


def _finished(record: RunRecord, **student: float) -> RunRecord:
    """The record with the metrics that a finished run adds."""
    test = {model: {**scores, **student} for model, scores in record.metrics["test"].items()}
    return record.model_copy(update={"metrics": {**record.metrics, "test": test, "best_step": 20}})


def test_evaluation_line(make_record: MakeRecord) -> None:
    """The line shows the task's metrics; a student that learns alone has no teacher."""
    topics = make_record(epochs=1).curve[0]
    assert _evaluation_line(topics) == (
        "epoch 1 (step 10): validation teacher accuracy 0.8000 macro-F1 0.8000, "
        "student accuracy 0.7000 macro-F1 0.5000"
    )
    clicks = make_record(epochs=1, task="recommendation", method="finetune", auc=0.62).curve[0]
    assert _evaluation_line(clicks) == (
        "epoch 1 (step 10): validation student AUC 0.6200 MRR 0.3000 nDCG@5 0.3200 nDCG@10 0.3800"
    )


def test_log_line_names_its_unit() -> None:
    """412 clicks per second must not be shown as titles per second."""
    entry: dict[str, Any] = {"train": {"total": 1.5, "student_task": 0.5}, "titles_per_second": 412.3}
    assert _log_numbers(entry) == "loss 1.500  student 0.500  412 titles/s"
    entry["examples"] = "clicks"
    assert _log_numbers(entry) == "loss 1.500  student 0.500  412 clicks/s"


def test_log_line_shows_what_waiting_for_data_costs() -> None:
    """A GPU that waits for its shards looks busy otherwise."""
    entry: dict[str, Any] = {"train": {"total": 1.5}, "titles_per_second": 412.3}
    entry["seconds"] = {"train": 9.0, "data": 1.0}
    assert _log_numbers({**entry, "step": 2}) == "loss 1.500  412 titles/s  waiting for data 10%"
    assert _log_numbers({**entry, "step": 1}) == "loss 1.500  412 titles/s"


def test_closing_lines_of_topics(make_record: MakeRecord) -> None:
    """Scripts read these lines: their format must not change."""
    first, teacher, student, speed, *_ = closing_lines(
        _finished(make_record(), rows=400.0), WorkDir("runs/a")
    ).split("\n")
    assert first == "test, 400 titles, best step 20 of 20:"
    assert teacher == "  teacher  accuracy 0.8000  macro-F1 0.8000"
    assert student == "  student  accuracy 0.7000  macro-F1 0.5000"
    assert speed.startswith("800 titles/s, 33 s; record, ")


def test_closing_lines_of_recommendation(make_record: MakeRecord) -> None:
    """Few impressions have large standard errors, which must be shown."""
    first, teacher, student, speed, *_ = closing_lines(
        _finished(make_record(task="recommendation", auc=0.62, teacher_auc=0.6712)), WorkDir("runs/a")
    ).split("\n")
    assert first == "test, 397 impressions (3 left out), best step 20 of 20:"
    assert teacher == (
        "  teacher  AUC 0.6712 ± 0.0080  MRR 0.3512 ± 0.0080  nDCG@5 0.3712 ± 0.0080  nDCG@10 0.4312 ± 0.0080"
    )
    assert student.startswith("  student  AUC 0.6200 ± 0.0080  MRR 0.3000")
    assert speed.startswith("800 clicks/s, ")


def test_a_run_without_test_labels_says_what_to_do(make_record: MakeRecord) -> None:
    """MIND's test set has no labels: the run must end with a hint, not a KeyError."""
    record = _finished(make_record(task="recommendation", method="finetune", labelled=False))
    first, student, hint, *_ = closing_lines(record, WorkDir("runs/a")).split("\n")
    assert first == "validation, 397 impressions (3 left out), best step 20 of 20:"
    assert student.startswith("  student  AUC 0.6200")
    assert hint == (
        "the test split has no labels: newsbert-ray evaluate runs/a --submission prediction.zip ranks it"
    )


def test_progress_moves_at_every_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run whose steps take seconds looks as if it hangs between two log entries."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    display = Display(total=10)
    log = {
        "kind": "log",
        "step": 1,
        "epoch": 1,
        "epochs": 1,
        "titles_per_second": 3.0,
        "train": {"total": 2.0},
    }
    for entry in (log, {"kind": "step", "step": 2}, {"kind": "step", "step": 3}):
        now[0] += 12.0
        display(entry)
    assert capsys.readouterr().out.splitlines() == [
        "step 1/10  loss 2.000  3 titles/s",
        "step 2/10  loss 2.000  3 titles/s  left 1:36",
        "step 3/10  loss 2.000  3 titles/s  left 1:24",
    ]
    assert display.bar.tasks[0].completed == 3


def test_tensorboard_opens_on_loss_and_main_metric(make_record: MakeRecord) -> None:
    """A user scrolls past gradient norms and seconds to see whether the run learns."""
    clicks = make_record(epochs=1, task="recommendation", method="finetune", auc=0.62).curve[0]
    assert overview({"kind": "evaluation", **clicks}) == [("student_auc", 0.62)]
    topics = overview({"kind": "evaluation", **make_record(epochs=1).curve[0]})
    assert dict(topics) == {"teacher_accuracy": 0.8, "student_accuracy": 0.7}
    assert overview({"kind": "log", "train": {"total": 1.5, "hidden": 0.5}}) == [("loss", 1.5)]
