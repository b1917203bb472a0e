"""The paper's Table 2 beside ours: its own numbers, in its rows, and plainly not ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from newsbert_ray.methods import METHODS
from newsbert_ray.record import RunRecord
from newsbert_ray.reporting.paper import table2
from newsbert_ray.reporting.records import NAMES
from newsbert_ray.reporting.runs_page import method_tables

if TYPE_CHECKING:
    from tests.conftest import MakeRecord


def _runs(make_record: MakeRecord, *rows: tuple[str, int], **more: Any) -> list[RunRecord]:
    return [
        make_record(method=method, seed=seed, **{"student.layers": layers, **more})
        for method, layers in rows
        for seed in (0, 1)
    ]


def test_every_method_has_a_name_for_people() -> None:
    """A table of internal names is no table of systems."""
    assert set(NAMES) == set(METHODS)


def test_rows_stand_beside_the_papers(make_record: MakeRecord) -> None:
    """Accuracy and macro-F1 of NewsBERT-1, UniLM-2; nothing where the paper has no such row."""
    rows = (("newsbert", 1), ("finetune", 2), ("pkd", 1), ("bilstm_soft", 1))
    table = table2(_runs(make_record, *rows))
    assert table is not None
    found = {(row[0], row[1]): row for row in table.rows}
    assert list(found) == [("fine-tuned", "2"), ("NewsBERT", "1"), ("BERT-PKD", "1"), ("BiLSTM-soft", "1")]
    assert found["NewsBERT", "1"][-2:] == ("73.49", "50.65")
    assert found["fine-tuned", "2"][-2:] == ("72.96", "50.76")
    assert found["BERT-PKD", "1"][-2:] == ("", "")
    speed = table.head.index("speed-up by layers, of 12")
    assert [row[speed] for row in table.rows] == ["6.0", "12.0", "12.0", ""]
    assert table.head[-2:] == ("the paper's accuracy %", "the paper's macro-F1 %")
    assert found["NewsBERT", "1"][2] == "2"
    assert "only the order of the rows compares" in table.caption
    assert "synthetic_train (ab12cd34), trained on 1,800 titles, encoder scratch" in table.caption


def test_glove_stands_among_the_others(make_record: MakeRecord) -> None:
    """Its shards and encoder are others because of what it is; shards of another corpus are no row."""
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


def test_what_failed_stands_there_as_failed(make_record: MakeRecord) -> None:
    """A row that is missing looks as if nobody had tried it; one seed of several is said too."""
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
    """Tuned fairly, methods differ in their rates: the table stands and says them; two rates of one method
    are a search."""
    runs = [
        *_runs(make_record, ("newsbert", 1), learning_rate=2e-4),
        *_runs(make_record, ("finetune", 1), learning_rate=4e-4),
    ]
    table = table2(runs)
    assert table is not None
    assert "learning_rate 0.0002 (NewsBERT), 0.0004 (fine-tuned)" in table.caption
    (_, compared) = method_tables(runs, None)
    assert "all else equal but learning_rate, which each method has its own of" in compared.caption
    assert [row[0] for row in compared.rows] == ["finetune"]
    assert table2([*runs, *_runs(make_record, ("finetune", 1), learning_rate=1e-4)]) is None


def test_recommendation_has_its_own_half(make_record: MakeRecord) -> None:
    """AUC, MRR, nDCG@5, nDCG@10."""
    table = table2(_runs(make_record, ("newsbert", 4), ("tinybert", 4), task="recommendation"))
    assert table is not None
    assert table.rows[0][-4:] == ("70.31", "34.89", "38.32", "43.95")
    assert table.rows[1][-4:] == ("69.90", "34.52", "37.77", "43.48")


@pytest.mark.parametrize("varied", ["distill.temperature", "learning_rate"])
def test_other_tables_are_none_of_it(make_record: MakeRecord, varied: str) -> None:
    """A search over rates has no rows of the paper's; nor has a single method, nor retrieval."""
    runs = _runs(make_record, ("newsbert", 1), ("finetune", 1))
    assert table2([*runs, *_runs(make_record, ("newsbert", 1), **{varied: 0.5})]) is None
    assert table2(_runs(make_record, ("newsbert", 1), ("newsbert", 2))) is None
    assert table2(_runs(make_record, ("newsbert", 1), ("finetune", 1), task="retrieval")) is None
