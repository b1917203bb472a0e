"""Rows, cells and CSV of runs, and the table for a terminal."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest

from newsbert_ray.methods import TASKS
from newsbert_ray.reporting import records as compared
from newsbert_ray.reporting.page import Table
from newsbert_ray.reporting.records import distinct, teacher_name, varying_settings
from newsbert_ray.reporting.sweep_data import Goal
from newsbert_ray.reporting.tables import (
    columns_of,
    csv_text,
    number,
    results_table,
    rows_of,
    summarise,
    to_csv,
    topic_tables,
)
from newsbert_ray.training.run import NEUTRAL_SETTINGS
from tests.reporting.conftest import MakeRecord

ACCURACY = columns_of(TASKS["topics"])[0]
GOAL = Goal(metric="validation.student.accuracy").column


def test_one_seed_has_no_spread(make_record: MakeRecord) -> None:
    """± 0.0 after a single run would claim a certainty that nobody measured."""
    assert summarise([0.6, 0.7, 0.8]).sd == pytest.approx(0.1)  # of a sample: n - 1
    (row,) = rows_of([make_record(accuracy=0.712)])
    assert row.columns["accuracy"].sd is None
    assert ACCURACY.show(row.columns["accuracy"]) == "71.2"


def test_seeds_are_averaged_and_settings_are_not(make_record: MakeRecord) -> None:
    """Runs of two betas in one mean would be meaningless."""
    records = [
        make_record(accuracy=accuracy, seed=seed, **{"distill.beta": beta})
        for beta, seed, accuracy in [(0.2, 0, 0.5), (0.2, 1, 0.7), (0.1, 0, 0.8), (0.1, 1, 0.9)]
    ]
    rows = rows_of(records)
    assert [row.settings for row in rows] == [{"distill.beta": 0.1}, {"distill.beta": 0.2}]
    assert [row.seeds for row in rows] == [(0, 1), (0, 1)]
    assert [row.columns["accuracy"].mean for row in rows] == pytest.approx([0.85, 0.6])


def test_settings_without_effect_do_not_vary(make_record: MakeRecord) -> None:
    """A seed that was trained on a GPU, or logged more often, belongs in the same row."""
    other = {
        "threads": 4,
        "device": "cuda",
        "log_every": 7,
        "checkpoint.every_steps": 3,
        "checkpoint.keep_finished": False,
    }
    records = [make_record(seed=0), make_record(seed=1, **other)]
    assert varying_settings(records) == []
    assert [row.seeds for row in rows_of(records)] == [(0, 1)]
    # `data` counts by its content.
    assert {*NEUTRAL_SETTINGS} - {"data"} <= compared.IGNORED


def test_moved_shards_are_the_same_data(make_record: MakeRecord) -> None:
    """A moved folder must not split a row; other content under the same name must."""
    here, there = make_record(seed=0, **{"data": "a/shards"}), make_record(seed=1)
    assert len(rows_of([here, there])) == 1
    other = make_record(seed=1, described={"name": "synthetic_train", "fingerprint": "ffff0000"})
    assert varying_settings([here, other]) == ["data"]


def test_repeat_of_a_run_counts_once(make_record: MakeRecord) -> None:
    """The same run in two folders would reduce the spread."""
    records = [make_record(seed=0), make_record(seed=0), make_record(seed=1)]
    assert len(distinct(records)) == 2
    (row,) = rows_of(records)
    assert row.columns["accuracy"].n == 2


def test_unknown_numbers_stay_blank(make_record: MakeRecord) -> None:
    """A metric that was not measured is not zero."""
    record = make_record().model_copy(update={"metrics": {"test": {"student": {"accuracy": 0.5}}}})
    (row,) = rows_of([record])
    assert "macro_f1" not in row.columns
    assert number(record, "test.student.accuracy.deeper") is None
    assert "macro-F1 %" not in results_table([row]).head


def _cells(table: Table) -> list[list[str]]:
    return [list(table.head), *map(list, table.rows)]


def test_cells_by_hand(make_record: MakeRecord) -> None:
    """The cells that people copy into papers."""
    records = [make_record(accuracy=a, seed=s, **{"student.layers": 1}) for a, s in [(0.70, 0), (0.72, 1)]]
    records.append(make_record(accuracy=0.75, **{"student.layers": 2}))
    head, one, two = _cells(results_table(rows_of(records)))
    assert head[:5] == ["student.layers", "seeds", "accuracy %", "macro-F1 %", "teacher's accuracy %"]
    assert one[:5] == ["1", "2", "71.0 ± 1.4", "50.0 ± 0.0", "80.0 ± 0.0"]
    assert two[:5] == ["2", "1", "75.0", "50.0", "80.0"]


def test_csv_keeps_full_precision_and_leaves_blanks(make_record: MakeRecord) -> None:
    """Rounded numbers cannot be tested for significance; a blank is not 0."""
    records = [make_record(accuracy=1 / 3), make_record(accuracy=2 / 3, **{"distill.beta": 0.2})]
    found = list(csv.DictReader(io.StringIO(to_csv(rows_of(records)))))
    assert [float(row["accuracy"]) for row in found] == [1 / 3, 2 / 3]
    assert [row["accuracy_sd"] for row in found] == ["", ""]
    assert [row["n_seeds"] for row in found] == ["1", "1"]


def test_teacher_by_another_path_is_the_same(make_record: MakeRecord) -> None:
    """A sweep writes absolute paths, a user relative ones; their seeds belong in one row.

    Reports are passed on and must not show local paths.
    """
    assert teacher_name(make_record(**{"teacher": "microsoft/mpnet-base"})) == "mpnet-base"
    ways = ("/somewhere/models/bert6", "models/bert6", "./models/bert6/", "../bert6")
    records = [make_record(seed=seed, **{"teacher": way}) for seed, way in enumerate(ways)]
    assert rows_of(records)[0].seeds == (0, 1, 2, 3)
    other = make_record(**{"teacher": "bert-base-uncased"})
    teachers = [row.settings for row in rows_of([records[0], other])]
    assert teachers == [{"teacher": "bert-base-uncased"}, {"teacher": "bert6"}]


def test_mixed_values_can_be_sorted(make_record: MakeRecord) -> None:
    """None (all layers) and numbers occur in one column."""
    records = [make_record(**{"model.teacher_layers": n}) for n in (None, 8, 4)]
    assert [row.settings["model.teacher_layers"] for row in rows_of(records)] == [None, 4, 8]


def test_columns_are_the_tasks_own(make_record: MakeRecord) -> None:
    """A recommendation's AUC under the heading of accuracy would be read as one."""
    head, row = _cells(
        results_table(rows_of([make_record(task="recommendation", auc=0.6234, teacher_auc=0.7)]))
    )
    assert head[:6] == ["seeds", "AUC %", "MRR %", "nDCG@5 %", "nDCG@10 %", "teacher's AUC %"]
    assert head[-2:] == ["clicks/s in training", "seconds per run"]
    assert row[1:3] == ["62.3 (± 0.8)", "30.3 (± 0.8)"]
    assert results_table(rows_of([make_record(task="retrieval")])).head == (
        "seeds",
        "AUC %",
        "teacher's AUC %",
        "pairs/s in training",
        "seconds per run",
    )


def test_spread_and_error_are_kept_apart(make_record: MakeRecord) -> None:
    """± is the standard deviation over seeds; a single seed has its standard error in brackets."""
    records = [make_record(task="recommendation", auc=a, seed=s) for a, s in ((0.60, 0), (0.62, 1))]
    (row,) = rows_of(records)
    assert results_table([row]).rows[0][1] == "61.0 ± 1.4"
    assert row.columns["auc"].error == pytest.approx(0.008)
    assert results_table(rows_of(records[:1])).rows[0][1] == "60.0 (± 0.8)"


def test_student_that_learns_alone_has_blank_teacher_cells(make_record: MakeRecord) -> None:
    """Fine-tuning has no teacher: its cells are blank, not zero."""
    records = [make_record(task="recommendation", method=m) for m in ("finetune", "newsbert")]
    head, alone, joint = _cells(results_table(rows_of(records)))
    place = head.index("teacher's AUC %")
    assert (alone[0], alone[place]) == ("finetune", "")
    assert (joint[0], joint[place]) == ("newsbert", "66.0 (± 0.8)")


def test_test_split_without_labels_has_no_numbers(make_record: MakeRecord) -> None:
    """A run on MIND's test set has a row without metrics."""
    head, row = _cells(results_table(rows_of([make_record(task="recommendation", labelled=False)])))
    assert head == ["seeds", "clicks/s in training", "seconds per run"]
    assert row == ["1", "800", "33"]


def test_topics_by_hand() -> None:
    """Three titles of a, of which one is taken for b, and one of b, which is recognised."""
    points: dict[str, Any] = {"split": "test", "labels": ["a", "b", "c"], "mistakes": []}
    points |= {"confusion": [[2, 1, 0], [0, 1, 0], [0, 0, 0]]}
    by_topic, confusion = topic_tables(points)
    assert by_topic.rows == (
        ("a", "b", "3", "100.0", "66.7", "80.0"),
        ("b", "", "1", "50.0", "100.0", "66.7"),
    )
    assert (confusion.head, confusion.rows) == (("topic", "a", "b"), (("a", "2", "1"), ("b", "", "1")))
    mistake = {"title": "Rain", "topic": 0, "predicted": 1, "probability": 0.987}
    whole = {**points, "confusion": [[4, 2, 0], [0, 1, 0], [0, 0, 0]], "mistakes": [mistake]}
    by_topic, confusion, mistakes = topic_tables(whole)
    assert "7 titles of test" in confusion.caption
    assert confusion.rows[0] == ("a", "4", "2")
    assert mistakes.rows == (("Rain", "a", "b", "98.7"),)
    older = {name: value for name, value in points.items() if name != "confusion"}
    assert topic_tables(older) == []


def test_csv_has_no_formulas() -> None:
    """A spreadsheet would run a text cell that begins like a formula; numbers stay numbers."""
    assert csv_text(["name", "value"], [["=1+1", -0.5], ["@x", None], ["a-b", 1]]) == (
        "name,value\n'=1+1,-0.5\n'@x,\na-b,1\n"
    )


def test_csv_of_several_tasks_keeps_them_apart(make_record: MakeRecord) -> None:
    """One column for the metrics of two tasks would be averaged by its reader."""
    groups = [[make_record(accuracy=0.75)], [make_record(task="recommendation", auc=0.625)]]
    rows = [row for group in groups for row in rows_of(group)]
    topics, clicks = csv.DictReader(io.StringIO(to_csv(rows)))
    assert (topics["task"], topics["accuracy"], topics["auc"]) == ("topics", "0.75", "")
    assert (clicks["task"], clicks["accuracy"], clicks["auc"]) == ("recommendation", "", "0.625")
    assert (clicks["auc_error"], clicks["clicks_per_second"], clicks["titles_per_second"]) == (
        "0.008",
        "800.0",
        "",
    )
    assert "task" not in to_csv(rows[:1]).split("\n")[0].split(",")
