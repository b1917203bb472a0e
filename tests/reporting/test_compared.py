from __future__ import annotations

from collections.abc import Callable

import pytest

from newsbert_ray.methods import TASKS
from newsbert_ray.record import RunRecord
from newsbert_ray.reporting.records import by_task, one_task, units_of, varying_settings
from newsbert_ray.reporting.tables import rows_of

MakeRecord = Callable[..., RunRecord]


def _older(record: RunRecord) -> RunRecord:
    """As a run left it when there were topics alone."""
    later = ("task", "method", "recommendation", "token_budget")
    return record.model_copy(
        update={"settings": {n: v for n, v in record.settings.items() if n not in later}}
    )


def test_tasks_are_told_apart(make_record: MakeRecord) -> None:
    """An AUC averaged with an accuracy is a number of nothing."""
    records = [make_record(task="retrieval"), make_record(), make_record(task="recommendation")]
    groups = by_task(records)
    assert list(groups) == ["topics", "recommendation", "retrieval"]
    assert [[r.settings["task"] for r in group] for group in groups.values()] == [[name] for name in groups]
    with pytest.raises(ValueError, match=r"several tasks \(topics, recommendation, retrieval\)"):
        rows_of(records)


def test_older_record_learned_topics(make_record: MakeRecord) -> None:
    """A run of last year must stand in one row with its seeds of today."""
    records = [_older(make_record(seed=0)), make_record(seed=1)]
    assert "task" not in records[0].settings
    assert one_task(records) is TASKS["topics"]
    assert varying_settings(records) == []
    assert rows_of(records)[0].seeds == (0, 1)


def test_what_a_method_sets_is_told_by_its_name(make_record: MakeRecord) -> None:
    """Seven columns of weights 0 beside `finetune` would bury the one thing that differs."""
    alone, joint = make_record(method="finetune"), make_record()
    assert alone.settings["distill"]["weights"]["hidden"] == 0.0
    assert varying_settings([alone, joint]) == ["method"]
    other = make_record(**{"distill.beta": 0.3})
    assert varying_settings([alone, joint, other]) == ["method", "distill.beta"]
    assert varying_settings([joint, other]) == ["distill.beta"]
    assert [row.settings for row in rows_of([alone, joint, other])] == [
        {"method": "finetune", "distill.beta": 0.0},
        {"method": "newsbert", "distill.beta": 0.1},
        {"method": "newsbert", "distill.beta": 0.3},
    ]


def test_counts_have_their_units() -> None:
    """1,800 clicks and 400 impressions are not 2,200 titles."""
    assert units_of(TASKS["topics"]) == {"train": "", "validation": "", "test": "", "all": " titles"}
    found = units_of(TASKS["recommendation"])
    assert (found["train"], found["test"], found["all"]) == ("clicks of ", "impressions of ", "")
