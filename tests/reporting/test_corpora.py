"""Table 1: a corpus's numbers beside the paper's, from shards and from records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from newsbert_ray.data.shards import read_manifest
from newsbert_ray.record import RunRecord, write_record
from newsbert_ray.reporting.paper import table1, table1_of_runs
from newsbert_ray.reporting.report import report

MakeRecord = Callable[..., RunRecord]


def test_each_corpus_has_a_column() -> None:
    """What a corpus has not is blank, and what no corpus has is no row."""
    table = table1({"a": {"users": 12, "words_per_title": 10.5}, "b": {"queries": 3}, "c": {}})
    assert table is not None
    assert table.head == ("", "a", "b", "the paper's")
    assert table.rows == (
        ("users", "12", "", "1,000,000"),
        ("words per title", "10.50", "", "11.52"),
        ("queries", "", "3", "1,990,942"),
    )
    assert table1({"c": {}}) is None


def test_shards_have_a_report(shards: Path, tmp_path: Path) -> None:
    """`newsbert-ray report SHARDS`: Table 1 in every form."""
    written = report([shards], out=tmp_path / "out")
    assert [path.name for path in written] == ["report.md", "report.html", "report.csv", "tables.tex"]
    numbers = read_manifest(shards).statistics
    page = written[0].read_text(encoding="utf-8")
    assert f"| users | {numbers['users']:,.0f} | 1,000,000 |" in page
    assert "the paper's corpora are others" in page
    assert f"{shards},words_per_title,{numbers['words_per_title']}" in written[2].read_text(encoding="utf-8")
    assert "11.52" in written[3].read_text(encoding="utf-8")


def test_runs_tell_their_corpus(make_record: MakeRecord, tmp_path: Path) -> None:
    """A run's record knows what it learned from when the shards are gone; an older one does not."""
    known = {"name": "mine", "fingerprint": "0123456789", "statistics": {"news": 77}}
    records = [make_record(described=known), make_record(described={"name": "old"}, learning_rate=1.0)]
    table = table1_of_runs(records)
    assert table is not None
    assert table.head == ("", "mine (01234567)", "the paper's")
    assert table.rows == (("news", "77", "161,013"),)
    for number, record in enumerate(records):
        write_record(tmp_path / str(number), record)
    page = report([tmp_path], out=tmp_path / "out")[0].read_text(encoding="utf-8")
    assert "| news | 77 | 161,013 |" in page
