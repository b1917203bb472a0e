"""What a sweep cost."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from newsbert_ray.reporting.costs import cost_figure, costs_of, duration
from newsbert_ray.reporting.figure_data import NothingToDraw
from newsbert_ray.reporting.page import Facts
from newsbert_ray.reporting.sweep_data import read_sweep
from newsbert_ray.reporting.sweep_page import sweep_page

MakeSweep = Callable[..., Path]


def _change(folder: Path, **changes: Any) -> None:
    path = folder / "sweep.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_costs_by_hand(make_sweep: MakeSweep) -> None:
    """Two points of four stopped after one of nine epochs, with one seed of two; a trial is 33 s or 4 s."""
    folder = make_sweep(points=5, stopped=0.5, failed=1, prices={"cpu_hour": 3.6, "gpu_hour": 36.0})
    costs = costs_of(read_sweep(folder))
    assert costs.wall_seconds == 1234.5
    assert costs.seconds == pytest.approx(4 * 33 + 2 * 4)
    assert costs.cpu_hours == pytest.approx(140 / 3600)
    assert costs.gpu_hours == 0.0
    assert costs.money == pytest.approx(0.14)
    assert costs.saved_epochs == 2 * (8 + 9)
    assert costs.seconds_per_epoch == pytest.approx(140 / (4 * 9 + 2))
    assert costs.saved_seconds == pytest.approx(34 * 140 / 38)
    assert costs.unknown == 1
    parts = {name: hours * 3600 for name, hours in costs.parts.items()}
    assert parts == pytest.approx({"train": 120.0, "evaluate": 12.0, "stopped early": 8.0})


def test_gpus_are_what_the_trials_were_given(make_sweep: MakeSweep) -> None:
    """A quarter of a GPU is a quarter of its price."""
    folder = make_sweep(points=1, seeds=(0,), prices={"gpu_hour": 2.0})
    _change(folder, place={"slots": 4, "cpus": 1.0, "gpus": 0.25})
    costs = costs_of(read_sweep(folder))
    assert costs.gpu_hours == pytest.approx(33 / 3600 / 4)
    assert costs.money == pytest.approx(33 / 3600 / 2)


def test_stopped_trials_ran_where_the_others_did(make_sweep: MakeSweep) -> None:
    """A trial that was stopped early leaves no record of its GPU, and has used it all the same."""
    folder = make_sweep(points=2, seeds=(0,), stopped=0.5, gpus=0.5)
    (path,) = (folder / "trials").glob("*/record.json")
    record = json.loads(path.read_text())
    record["hardware"]["device"] = "NVIDIA H200"
    path.write_text(json.dumps(record))
    assert costs_of(read_sweep(folder)).gpu_hours == pytest.approx(0.5 * (33 + 4) / 3600)


def test_threads_are_counted(make_sweep: MakeSweep) -> None:
    """Four threads for an hour are four CPU-hours."""
    folder = make_sweep(points=1, seeds=(0,))
    (path,) = (folder / "trials").glob("*/record.json")
    record = json.loads(path.read_text())
    record["hardware"] |= {"threads": 4, "workers": 2}
    path.write_text(json.dumps(record))
    assert costs_of(read_sweep(folder)).cpu_hours == pytest.approx(8 * 33 / 3600)


def test_runs_before_trials_cost_too(make_sweep: MakeSweep) -> None:
    """A teacher that was fine-tuned once for many trials, two threads for 33 s; one with a damaged record is
    left out."""
    folder = make_sweep(points=1, seeds=(0,), prices={"cpu_hour": 3600.0})
    (path,) = (folder / "trials").glob("*/record.json")
    record = json.loads(path.read_text())
    record["hardware"] |= {"threads": 2}
    for name, text in (("ab12", json.dumps(record)), ("cd34", "{")):
        (folder / "teachers" / name).mkdir(parents=True)
        (folder / "teachers" / name / "record.json").write_text(text)
    costs = costs_of(read_sweep(folder))
    assert (costs.firsts, costs.first_seconds, costs.seconds) == (1, 33.0, 33.0)
    assert costs.cpu_hours == pytest.approx(3 * 33 / 3600)
    assert costs.money == pytest.approx(99)
    assert costs.parts["runs before"] == pytest.approx(66 / 3600)
    page = sweep_page(read_sweep(folder), defaultdict(lambda: "none"))
    (facts,) = [block for block in page.sections[-2].blocks if isinstance(block, Facts)]
    assert dict(facts.rows)["in runs before"].startswith("33 s, 1 run that trials share")


def test_no_price_is_not_no_cost(make_sweep: MakeSweep) -> None:
    """`0.00` would be read as free."""
    assert costs_of(read_sweep(make_sweep(points=1))).money is None


def test_figure_takes_a_unit_in_which_numbers_are_readable(make_sweep: MakeSweep) -> None:
    """Bars of 0.0008 hours cannot be read."""
    (panel,) = cost_figure(read_sweep(make_sweep(points=1))).panels
    assert panel.x_label == "CPU-minutes"
    assert [(bar.name, bar.value) for bar in panel.bars] == [("train", 1.0), ("evaluate", pytest.approx(0.1))]


def test_no_time_makes_no_figure(make_sweep: MakeSweep) -> None:
    """Nothing has ended yet: no bars."""
    with pytest.raises(NothingToDraw, match="no trial has written down its time yet"):
        cost_figure(read_sweep(make_sweep(points=0, state="running")))


@pytest.mark.parametrize(
    ("seconds", "text"), [(42, "42 s"), (740, "12.3 min"), (5040, "84.0 min"), (6000, "1.7 h")]
)
def test_duration_is_short(seconds: float, text: str) -> None:
    """Nobody wants to read 6000 s."""
    assert duration(seconds) == text
