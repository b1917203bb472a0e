"""Which runs can be compared, and kept records."""

from __future__ import annotations

from pathlib import Path

import pytest

from newsbert_ray.methods import TASKS
from newsbert_ray.record import RecordError, RunRecord, write_record
from newsbert_ray.reporting.records import (
    by_task,
    count_units,
    one_task,
    read_kept,
    varying_settings,
    write_kept,
)
from newsbert_ray.reporting.report import report
from newsbert_ray.reporting.tables import rows_of
from tests.reporting.conftest import MakeRecord


def _older(record: RunRecord) -> RunRecord:
    """As a run left it when there were topics alone."""
    later = ("task", "method", "recommendation", "token_budget")
    return record.model_copy(
        update={"settings": {n: v for n, v in record.settings.items() if n not in later}}
    )


def test_tasks_are_told_apart(make_record: MakeRecord) -> None:
    """An AUC must not be averaged with an accuracy."""
    records = [make_record(task="retrieval"), make_record(), make_record(task="recommendation")]
    groups = by_task(records)
    assert list(groups) == ["topics", "recommendation", "retrieval"]
    assert [[r.settings["task"] for r in group] for group in groups.values()] == [[name] for name in groups]
    with pytest.raises(ValueError, match=r"several tasks \(topics, recommendation, retrieval\)"):
        rows_of(records)


def test_older_record_learned_topics(make_record: MakeRecord) -> None:
    """A record from before there were tasks belongs in one row with today's seeds."""
    records = [_older(make_record(seed=0)), make_record(seed=1)]
    assert "task" not in records[0].settings
    assert one_task(records) is TASKS["topics"]
    assert varying_settings(records) == []
    assert rows_of(records)[0].seeds == (0, 1)


def test_settings_implied_by_a_method_do_not_vary(make_record: MakeRecord) -> None:
    """Seven columns of zero weights beside `finetune` would hide the real difference."""
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
    assert count_units(TASKS["topics"]) == {"train": "", "validation": "", "test": "", "all": " titles"}
    found = count_units(TASKS["recommendation"])
    assert (found["train"], found["test"], found["all"]) == ("clicks of ", "impressions of ", "")


@pytest.mark.usefixtures("_undrawn")
def test_a_kept_file_makes_the_same_report(make_record: MakeRecord, tmp_path: Path) -> None:
    """The numbers of a page must not depend on where the report is made."""
    for seed in (0, 1):
        values = {
            "data": f"{tmp_path}/shards",
            "teacher": f"{tmp_path}/models/tiny",
            "out": f"{tmp_path}/{seed}",
        }
        write_record(
            tmp_path / "runs" / str(seed), make_record(seed=seed, accuracy=0.6 + 0.1 * seed, **values)
        )
    kept = tmp_path / "kept.jsonl"
    first = report([tmp_path / "runs"], out=tmp_path / "first", keep=str(kept))
    assert first[-1] == kept
    second = report([kept], out=tmp_path / "second")
    for name in ("report.md", "report.csv", "tables.tex"):
        assert (tmp_path / "first" / name).read_text() == (tmp_path / "second" / name).read_text()
    assert len(second) == len(first) - 1
    text = kept.read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    assert len(text.splitlines()) == 2
    assert [record.settings["teacher"] for record in read_kept(kept)] == ["tiny", "tiny"]


def test_damaged_file_is_named(make_record: MakeRecord, tmp_path: Path) -> None:
    """The message names the line."""
    path = tmp_path / "kept.jsonl"
    write_kept(path, [make_record()])
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(RecordError, match=r"kept\.jsonl, line 2: not a run record"):
        read_kept(path)
    with pytest.raises(RecordError, match="cannot be read"):
        read_kept(tmp_path / "none.jsonl")
    with pytest.raises(RecordError, match=r"the file name must end in \.jsonl"):
        write_kept(tmp_path / "kept.json", [])
