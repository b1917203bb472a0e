"""What students keep of their teachers' quality, over how much faster they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from newsbert_ray.record import RunRecord, write_record
from newsbert_ray.reporting.figure_data import NothingToDraw
from newsbert_ray.reporting.figures import best_at_each_depth, quality_figure
from newsbert_ray.reporting.report import report
from newsbert_ray.reporting.sweep_data import read_sweep

MakeRecord = Callable[..., RunRecord]
MakeSweep = Callable[..., Path]


def timed(record: RunRecord, times: float) -> RunRecord:
    """With the speed that a run measures at its end."""
    return record.model_copy(update={"metrics": {**record.metrics, "speed": {"times_teacher": times}}})


def runs(make_record: MakeRecord, method: str = "newsbert") -> list[RunRecord]:
    """Students of 1 and 3 layers with two seeds, beside teachers of 80 %."""
    return [
        timed(
            make_record(
                accuracy=(0.76 if depth == 3 else 0.72) + 0.04 * seed,
                teacher_accuracy=0.8,
                seed=seed,
                method=method,
                **{"student.layers": depth},
            ),
            (2.0 if depth == 3 else 5.0) + 0.2 * seed,
        )
        for depth in (1, 3)
        for seed in (0, 1)
    ]


def test_shares_by_hand(make_record: MakeRecord) -> None:
    """Each seed's student against its own teacher, in per cent; the slower first."""
    figure = quality_figure(runs(make_record) + runs(make_record, "disjoint"))
    (panel,) = figure.panels
    assert [line.label for line in panel.lines] == ["NewsBERT", "NewsBERT, disjoint"]
    line = panel.lines[0]
    assert line.x == pytest.approx((2.1, 5.1))
    assert line.y == pytest.approx((97.5, 92.5))
    assert line.sd == pytest.approx((5 / 2**0.5, 5 / 2**0.5))
    assert line.n == (2, 2)
    assert line.notes == ("3 layers", "1 layer")
    assert not panel.lines[1].notes
    assert figure.caption.endswith("from left to right: students of 3, 1 layers.")
    assert "NewsBERT keeps 97.5 % at 2.1 times the speed, 92.5 % at 5.1" in figure.alt


def test_what_makes_no_curve_is_said(make_record: MakeRecord) -> None:
    """One depth, no teacher, no measured speed; or runs that differ in more."""
    both = runs(make_record)
    alone = [make_record(method="finetune", **{"student.layers": depth}) for depth in (1, 2)]
    for records in (
        both[:2],
        alone,
        [r.model_copy(update={"metrics": {"test": r.metrics["test"]}}) for r in both],
    ):
        with pytest.raises(NothingToDraw, match="two depths"):
            quality_figure(records)
    mixed = [*both, timed(make_record(**{"student.layers": 1, "distill.temperature": 2.0}), 5.0)]
    with pytest.raises(NothingToDraw, match=r"distill\.temperature vary too"):
        quality_figure(mixed)
    assert quality_figure(mixed, chosen=True).caption.endswith("the search's best on validation.")


def test_a_search_shows_its_best_at_each_depth(make_sweep: MakeSweep) -> None:
    """By the goal, which is on validation; all its seeds and no other point's."""
    sweep = read_sweep(make_sweep(axes=["learning_rate", "student.layers"], points=9, seeds=(0, 1)))
    best = best_at_each_depth(sweep)
    for depth in {record.settings["student"]["layers"] for record in best}:
        mine = [record for record in best if record.settings["student"]["layers"] == depth]
        points = [p for p in sweep.finished if p.records[0].settings["student"]["layers"] == depth]
        assert mine == max(points, key=lambda point: point.mean()).records
        assert {record.seed for record in mine} == {0, 1}
    assert len(best) == 2 * len({record.settings["student"]["layers"] for record in best}) > 2


def test_it_stands_in_the_report(make_record: MakeRecord, tmp_path: Path) -> None:
    """Where the runs have several depths."""
    for number, record in enumerate(runs(make_record)):
        write_record(tmp_path / "runs" / str(number), record)
    written = report([tmp_path / "runs"], out=tmp_path / "out")
    assert tmp_path / "out" / "quality_kept.png" in written
    assert "(quality_kept.png)" in (tmp_path / "out" / "report.md").read_text()
