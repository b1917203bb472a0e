"""Records that a repository keeps: reported like the runs, and silent about where they were made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from newsbert_ray.record import RecordError, RunRecord, write_record
from newsbert_ray.reporting.records import read_kept, write_kept
from newsbert_ray.reporting.report import report

MakeRecord = Callable[..., RunRecord]


def test_a_kept_file_makes_the_same_report(make_record: MakeRecord, tmp_path: Path) -> None:
    """Numbers of a page must be those of the runs, whoever makes them again."""
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


def test_a_damaged_or_wrong_file_is_said(make_record: MakeRecord, tmp_path: Path) -> None:
    """With the line that is wrong."""
    path = tmp_path / "kept.jsonl"
    write_kept(path, [make_record()])
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(RecordError, match=r"kept\.jsonl, line 2: no run record"):
        read_kept(path)
    with pytest.raises(RecordError, match="cannot be read"):
        read_kept(tmp_path / "none.jsonl")
    with pytest.raises(RecordError, match=r"give a file that ends in \.jsonl"):
        write_kept(tmp_path / "kept.json", [])
