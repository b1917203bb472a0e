"""Methods over depth in one small table: each number in its place, and only what may stand side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from newsbert_ray.record import RunRecord
from newsbert_ray.reporting.paper import depths_table
from newsbert_ray.reporting.runs_page import runs_page

if TYPE_CHECKING:
    from tests.conftest import MakeRecord


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


def test_by_hand(make_record: MakeRecord) -> None:
    """A system a row, a depth and metric a column; what was learned from differs by depth and is said."""
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
        ("the teacher beside NewsBERT", "80.0 ± 0.0", "80.0 ± 0.0"),
    ]
    assert "differs from NewsBERT (p < 0.01" in table.caption


def test_a_method_that_is_not_at_every_depth_has_a_gap(make_record: MakeRecord) -> None:
    """No other depth's number slips into its place."""
    table = depths_table(grid(make_record)[3:])
    assert table is not None
    assert [row[1:] for row in table.rows if row[0] == "fine-tuned"] == [("", "", "71.0 ± 2.0", "50.0 ± 0.0")]


@pytest.mark.parametrize(
    "chosen", [slice(0, 6), slice(3, 6), slice(0, 0)], ids=["one depth", "one row", "another setting too"]
)
def test_no_table_of_what_does_not_compare(make_record: MakeRecord, chosen: slice) -> None:
    """One depth is Table 2's; rows that differ in more would be read as the methods' difference."""
    another = make_record(method="finetune", **{"student.layers": 1, "train_rows": 1000, "batch_size": 64})
    records = grid(make_record)
    assert depths_table(records[chosen] or [*records, another]) is None


def test_it_opens_the_report(make_record: MakeRecord) -> None:
    """Beside Table 2, where that can be."""
    page = runs_page(grid(make_record), {})
    captions = [getattr(block, "caption", "") for block in page.sections[0].blocks]
    assert any(caption.startswith("Systems over student depth") for caption in captions)
