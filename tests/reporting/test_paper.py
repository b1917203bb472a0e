"""Tables 1 and 2 of the paper beside our own numbers, and systems over depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from newsbert_ray.data.shards import read_manifest
from newsbert_ray.methods import METHODS
from newsbert_ray.record import RunRecord, write_record
from newsbert_ray.reporting.paper import depths_table, method_tables, table1, table1_of_runs, table2
from newsbert_ray.reporting.records import NAMES
from newsbert_ray.reporting.report import report, runs_page
from tests.reporting.conftest import MakeRecord


def _runs(make_record: MakeRecord, *rows: tuple[str, int], **more: Any) -> list[RunRecord]:
    return [
        make_record(method=method, seed=seed, **{"student.layers": layers, **more})
        for method, layers in rows
        for seed in (0, 1)
    ]


def test_every_method_has_a_displayed_name() -> None:
    """The tables show names, not identifiers."""
    assert set(NAMES) == set(METHODS)


def test_rows_have_the_papers_numbers(make_record: MakeRecord) -> None:
    """NewsBERT-1 and UniLM-2 get the paper's accuracy and macro-F1; other rows stay blank."""
    rows = (("newsbert", 1), ("finetune", 2), ("pkd", 1), ("bilstm_soft", 1))
    table = table2(_runs(make_record, *rows))
    assert table is not None
    found = {(row[0], row[1]): row for row in table.rows}
    assert list(found) == [("fine-tuned", "2"), ("NewsBERT", "1"), ("BERT-PKD", "1"), ("BiLSTM-soft", "1")]
    assert found["NewsBERT", "1"][-2:] == ("73.49", "50.65")
    assert found["fine-tuned", "2"][-2:] == ("72.96", "50.76")
    assert found["BERT-PKD", "1"][-2:] == ("", "")
    speed = table.head.index("speed-up by layers, from 12")
    assert [row[speed] for row in table.rows] == ["6.0", "12.0", "12.0", ""]
    assert table.head[-2:] == ("the paper's accuracy %", "the paper's macro-F1 %")
    assert found["NewsBERT", "1"][2] == "2"
    assert "only the order of the rows can be compared" in table.caption
    assert "synthetic_train (ab12cd34), trained on 1,800 titles, encoder scratch" in table.caption


def test_glove_is_comparable(make_record: MakeRecord) -> None:
    """GloVe implies other shards and another encoder; shards of another corpus are not comparable."""
    others = _runs(make_record, ("newsbert", 1), ("finetune", 1))
    glove = make_record(method="glove", described={"fingerprint": "77", "name": "synthetic_train"})
    encoder = {"teacher": "models/tiny"}
    moved = [record.model_copy(update={"settings": record.settings | encoder}) for record in others]
    table = table2([*moved, glove])
    assert table is not None
    assert [row[0] for row in table.rows] == ["fine-tuned", "NewsBERT", "GloVe"]
    assert table.rows[2][-2:] == ("71.13", "49.71")
    elsewhere = make_record(method="glove", described={"fingerprint": "77", "name": "other"})
    assert table2([*moved, elsewhere]) is None


def test_failed_runs_are_shown(make_record: MakeRecord) -> None:
    """A missing row would look as if nobody had tried it; one failed seed of several is counted too."""
    runs = _runs(make_record, ("newsbert", 1), ("finetune", 1))
    failed = [
        {"method": "pkd", "student.layers": 1},
        {"method": "pkd", "student.layers": 1},
        {"method": "newsbert", "student.layers": 1},
    ]
    table = table2(runs, failed)
    assert table is not None
    found = {row[0]: row for row in table.rows}
    assert found["BERT-PKD"][2] == "0 (2 failed)"
    assert found["BERT-PKD"][6:8] == ("failed", "failed")
    assert found["NewsBERT"][2] == "2 (1 failed)"
    assert found["fine-tuned"][2] == "2"
    alone = table2(_runs(make_record, ("newsbert", 1)), failed[:1])
    assert alone is not None
    assert [row[0] for row in alone.rows] == ["NewsBERT", "BERT-PKD"]
    assert table2(runs, [{"learning_rate": 1.0}]) is None


def test_each_method_may_have_its_own_rate(make_record: MakeRecord) -> None:
    """Separately tuned methods are comparable, and the caption lists their rates."""
    runs = [
        *_runs(make_record, ("newsbert", 1), learning_rate=2e-4),
        *_runs(make_record, ("finetune", 1), learning_rate=4e-4),
    ]
    table = table2(runs)
    assert table is not None
    assert "learning_rate 0.0002 (NewsBERT), 0.0004 (fine-tuned)" in table.caption
    (_, compared) = method_tables(runs, None)
    assert "all else equal except learning_rate, tuned for each method" in compared.caption
    assert [row[0] for row in compared.rows] == ["finetune"]
    assert table2([*runs, *_runs(make_record, ("finetune", 1), learning_rate=1e-4)]) is None


def test_recommendation_has_its_own_half(make_record: MakeRecord) -> None:
    """AUC, MRR, nDCG@5, nDCG@10."""
    table = table2(_runs(make_record, ("newsbert", 4), ("tinybert", 4), task="recommendation"))
    assert table is not None
    assert table.rows[0][-4:] == ("70.31", "34.89", "38.32", "43.95")
    assert table.rows[1][-4:] == ("69.90", "34.52", "37.77", "43.48")


@pytest.mark.parametrize("varied", ["distill.temperature", "learning_rate"])
def test_other_runs_have_no_table2(make_record: MakeRecord, varied: str) -> None:
    """A search over rates, a single method and retrieval have no row in the paper."""
    runs = _runs(make_record, ("newsbert", 1), ("finetune", 1))
    assert table2([*runs, *_runs(make_record, ("newsbert", 1), **{varied: 0.5})]) is None
    assert table2(_runs(make_record, ("newsbert", 1), ("newsbert", 2))) is None
    assert table2(_runs(make_record, ("newsbert", 1), ("finetune", 1), task="retrieval")) is None


def test_each_corpus_has_a_column() -> None:
    """What a corpus lacks is blank; what all corpora lack is not a row."""
    table = table1({"a": {"users": 12, "clicks": 0, "words_per_title": 10.5}, "b": {"queries": 3}, "c": {}})
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
    assert "the paper used other corpora" in page
    assert f"{shards},words_per_title,{numbers['words_per_title']}" in written[2].read_text(encoding="utf-8")
    assert "11.52" in written[3].read_text(encoding="utf-8")


@pytest.mark.usefixtures("_undrawn")
def test_table1_of_runs(make_record: MakeRecord, tmp_path: Path) -> None:
    """A record knows its corpus after the shards are gone; an older record does not."""
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


def grid(make: MakeRecord, **more: object) -> list[RunRecord]:
    """Two methods at two depths, three seeds, accuracies by hand; NewsBERT is clearly better at one layer."""
    found = {("finetune", 1): 0.60, ("newsbert", 1): 0.70, ("finetune", 2): 0.71, ("newsbert", 2): 0.72}
    return [
        make(
            accuracy=accuracy + 0.01 * (seed - 1) * layers,
            teacher_accuracy=0.8,
            seed=seed,
            described={"name": "mind", "fingerprint": f"a{layers}", "train_rows": 1000 * layers},
            **{"method": method, "student.layers": layers, "train_rows": 1000 * layers, **more},
        )
        for (method, layers), accuracy in found.items()
        for seed in range(3)
    ]


def test_depths_by_hand(make_record: MakeRecord) -> None:
    """One row for each system, one column for each depth and metric; the head shows the amount of data."""
    table = depths_table(grid(make_record))
    assert table is not None
    assert table.head == (
        "system",
        "1 layer (1,000 titles): accuracy %",
        "1 layer (1,000 titles): macro-F1 %",
        "2 layers (2,000 titles): accuracy %",
        "2 layers (2,000 titles): macro-F1 %",
    )
    assert [(row[0], row[1], row[3]) for row in table.rows] == [
        ("fine-tuned", "60.0 ± 1.0*", "71.0 ± 2.0"),
        ("NewsBERT", "70.0 ± 1.0", "72.0 ± 2.0"),
        ("teacher of NewsBERT", "80.0 ± 0.0", "80.0 ± 0.0"),
    ]
    assert "differs from NewsBERT (p < 0.01" in table.caption


def test_missing_depth_is_a_blank_cell(make_record: MakeRecord) -> None:
    """Another depth's number must not move into the gap."""
    table = depths_table(grid(make_record)[3:])
    assert table is not None
    assert [row[1:] for row in table.rows if row[0] == "fine-tuned"] == [("", "", "71.0 ± 2.0", "50.0 ± 0.0")]


@pytest.mark.parametrize(
    "chosen", [slice(0, 6), slice(3, 6), slice(0, 0)], ids=["one depth", "one row", "another setting too"]
)
def test_depths_need_all_else_equal(make_record: MakeRecord, chosen: slice) -> None:
    """One depth belongs to Table 2; other varying settings would look like a difference of the methods."""
    another = make_record(method="finetune", **{"student.layers": 1, "train_rows": 1000, "batch_size": 64})
    records = grid(make_record)
    assert depths_table(records[chosen] or [*records, another]) is None


@pytest.mark.usefixtures("_undrawn")
def test_depths_come_before_table2(make_record: MakeRecord) -> None:
    """The page has both tables where both are possible."""
    page = runs_page(grid(make_record), {})
    captions = [getattr(block, "caption", "") for block in page.sections[0].blocks]
    assert any(caption.startswith("Systems over student depth") for caption in captions)
