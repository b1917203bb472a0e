"""What early stopping leaves, on curves."""

from __future__ import annotations

from pathlib import Path

import pytest

from newsbert_ray.files import write_text
from newsbert_ray.record import METRICS
from newsbert_ray.tune.replay import early_stopping, recorded_curves
from newsbert_ray.tune.space import Axis, Search, SearchSpace, Stopping


def space(scheduler: str, **stopping: int) -> SearchSpace:
    """A search of 30 points with this early stopping."""
    return SearchSpace(
        file="space.yaml",
        name="saving",
        axes=(Axis(name="distill.beta", low=0.0, high=0.3),),
        search=Search(sampler="random", trials=30),
        stopping=Stopping.model_validate({"scheduler": scheduler, **stopping}),
    )


def test_without_early_stopping_everything_is_paid() -> None:
    """A saving that nothing makes must not stand in a plan."""
    saving = early_stopping(space("none"), [4] * 30, slots=2)
    assert (saving.epochs, saving.finished) == (1.0, 1.0)


def test_asha_leaves_what_its_rungs_let_through() -> None:
    """With ranks that never change, about one in three goes on from each rung (1 and 3 of 9 epochs: 5/9 of a
    third of a third and so on), more while the rungs are still empty."""
    found = early_stopping(space("asha"), [9] * 300, slots=1)
    ideal = (1 + (1 / 3) * 2 + (1 / 9) * 6) / 9
    assert ideal < found.epochs < 1.25 * ideal
    assert 1 / 9 < found.finished < 0.2
    assert "assumed" in found.source


def test_recorded_curves_decide() -> None:
    """Curves that cross cost more than those that do not: the saving has to come from what was seen."""
    calm = [[(float(e), 0.01 * i) for e in range(1, 10)] for i in range(30)]
    assert early_stopping(space("asha"), [9] * 30, slots=1, curves=calm).epochs < 0.5
    rising = [[(float(e), e + 0.01 * i) for e in range(1, 10)] for i in range(30)]
    found = early_stopping(space("median", grace=1), [9] * 30, slots=30, curves=rising)
    assert 0.5 < found.epochs < 1.0
    assert "30 recorded curves" in found.source


def test_curves_of_an_earlier_sweep_are_found(tmp_path: Path) -> None:
    """Trials that were stopped early left their curve too; without them only winners would be replayed."""
    line = '{"kind": "evaluation", "epoch": 1.0, "validation": {"student": {"accuracy": 0.5}}}\n'
    write_text(tmp_path / "trials" / "a" / METRICS, line)
    write_text(tmp_path / "trials" / "b" / METRICS, line + '{"kind": "log", "epoch": 2}\n')
    write_text(tmp_path / "trials" / "c" / METRICS, "")
    found = recorded_curves(tmp_path, "validation.student.accuracy")
    assert found == [[(1.0, 0.5)], [(1.0, 0.5)]]
    saving = early_stopping(space("asha"), [4] * 6, slots=2, curves=found)
    assert saving.epochs == pytest.approx(1.0)  # equal curves: nobody is worse than the rung
