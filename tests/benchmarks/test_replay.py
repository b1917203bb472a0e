"""A search replayed on recorded curves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from newsbert_ray.record import RecordError, write_record
from newsbert_ray.reporting.sweep_data import Axis, point_label
from newsbert_ray.tune.space import Search, Stopping
from tests.benchmarks.replay import RecordedTrial, Table, TableError, read_table, replay
from tests.conftest import MakeRecord

BETAS = (0.0, 0.1, 0.2, 0.3)


def table(finals: dict[float, float], *, epochs: int = 4, seeds: tuple[int, ...] = (0,)) -> Table:
    """A grid over beta whose curves rise in a straight line; seed s ends s hundredths higher."""
    trials = {}
    for beta, final in finals.items():
        for seed in seeds:
            name = point_label({"distill.beta": beta}, seed=seed)
            end = final + 0.01 * seed
            curve = [(float(epoch), end * epoch / epochs) for epoch in range(1, epochs + 1)]
            trials[name] = RecordedTrial(name, curve, end)
    axis = Axis(name="distill.beta", values=tuple(finals))
    return Table((axis,), seeds, "validation.student.accuracy", trials)


def in_order(*betas: float) -> list[dict[str, float]]:
    """Points to be tried in this order."""
    return [{"distill.beta": beta} for beta in betas]


def test_one_slot_pays_each_trial_in_turn() -> None:
    """A best point that counted before it was paid for would flatter every search."""
    known = table(dict(zip(BETAS, (0.5, 0.8, 0.7, 0.9), strict=True)))
    space = known.space(Search(sampler="random", trials=4), start=in_order(0.0, 0.1, 0.2, 0.3))
    result = replay(known, space, slots=1)
    assert result.progress == ((4.0, 0.5), (8.0, 0.8), (16.0, 0.9))
    assert (result.epochs, result.trials, result.stopped) == (known.epochs, 4, 0)
    assert result.best_at(15.9) == 0.8
    assert math.isnan(result.best_at(3.9))
    assert [result.epochs_to(value) for value in (0.5, 0.6, 0.95)] == [4.0, 8.0, math.inf]


def test_slots_share_the_budget() -> None:
    """Trials side by side spend together: the first of two ends when almost both are paid."""
    known = table(dict(zip(BETAS, (0.5, 0.8, 0.7, 0.9), strict=True)))
    space = known.space(Search(sampler="random", trials=4), start=in_order(0.0, 0.1, 0.2, 0.3))
    assert replay(known, space, slots=2).progress == ((7.0, 0.5), (8.0, 0.8), (16.0, 0.9))
    assert replay(known, space, slots=2, epochs=7.0).epochs == 7.0


def test_a_stopped_trial_is_paid_and_never_found() -> None:
    """A point that early stopping ended has no final number; taking its last one would compare unequals."""
    known = table(dict(zip(BETAS, (0.9, 0.3, 0.2, 0.1), strict=True)))
    search = Search(sampler="random", trials=4)
    space = known.space(search, stopping=Stopping(scheduler="asha"), start=in_order(0.0, 0.1, 0.2, 0.3))
    result = replay(known, space, slots=1)
    assert result.progress == ((4.0, 0.9),)
    assert result.stopped == 3
    assert result.epochs == 4.0 + 3 * 1.0  # the first goes through, the others end at the first rung


def test_a_point_chosen_again_costs_nothing() -> None:
    """A sampler that converges asks for known points; a sweep runs each once, and so must a replay."""
    known = table({0.1: 0.6, 0.2: 0.7}, epochs=3)
    result = replay(known, known.space(Search(sampler="random", trials=20)), slots=2)
    assert (result.epochs, result.trials) == (6.0, 2)


def test_seeds_are_judged_by_their_mean() -> None:
    """One lucky seed must not make a point the best, nor count before its others are paid."""
    known = table({0.1: 0.6, 0.2: 0.7}, epochs=2, seeds=(0, 1))
    space = known.space(Search(sampler="random", trials=2), start=in_order(0.1, 0.2))
    progress = replay(known, space, slots=1).progress
    assert [spent for spent, _ in progress] == [4.0, 8.0]
    assert [value for _, value in progress] == pytest.approx([0.605, 0.705])


@pytest.mark.parametrize("scheduler", ["none", "asha", "median"])
def test_the_same_seed_gives_the_same_search(scheduler: str) -> None:
    """A study over seeds of the sampler means nothing if a seed does not fix the search."""
    known = table({0.02 * index: 0.5 + 0.1 * math.sin(index) for index in range(16)})
    stopping = Stopping.model_validate({"scheduler": scheduler})
    result = [
        replay(known, known.space(Search(sampler="tpe", trials=20, seed=seed), stopping=stopping))
        for seed in (3, 3, 4)
    ]
    assert result[0] == result[1]
    assert result[0] != result[2]


def test_a_grid_sweeps_records_are_the_table(tmp_path: Path, make_record: MakeRecord) -> None:
    """The study reads points, curves and the metric from the files of the sweep."""
    grid(tmp_path, make_record, betas=(0.1, 0.2))
    result = read_table(tmp_path)
    assert result.points == [{"distill.beta": beta} for beta in (0.1, 0.2)]
    assert result.seeds == (0, 1)
    trial = result.trials["beta=0.1,seed=1"]
    assert [epoch for epoch, _ in trial.curve] == [1.0, 2.0]
    assert [value for _, value in trial.curve] == pytest.approx([0.3, 0.6])
    assert trial.value == pytest.approx(0.6)
    assert result.epochs == 8.0


def test_a_grid_with_holes_is_refused(tmp_path: Path, make_record: MakeRecord) -> None:
    """A point that never finished would be one that no search can find."""
    grid(tmp_path, make_record, betas=(0.1, 0.2))
    (tmp_path / "trials" / "beta=0.2,seed=1" / "record.json").unlink()
    with pytest.raises(TableError, match=r"1 of the grid's 4 trials.*beta=0.2,seed=1"):
        read_table(tmp_path)
    with pytest.raises(TableError, match="no finished trials"):
        read_table(tmp_path / "elsewhere")


def grid(folder: Path, make_record: MakeRecord, *, betas: tuple[float, ...]) -> None:
    """A finished grid sweep over beta with two seeds, in its files."""
    for beta in betas:
        for seed in (0, 1):
            record = make_record(accuracy=0.5 + beta, seed=seed, **{"distill.beta": beta})
            write_record(folder / "trials" / point_label({"distill.beta": beta}, seed=seed), record)
    (folder / "sweep.json").write_text(json.dumps({"varied": ["distill.beta"]}))


def test_a_table_of_clicks_is_read_by_their_own_metric(tmp_path: Path, make_record: MakeRecord) -> None:
    """A recorded recommendation sweep has no accuracy to replay."""
    for beta, auc in ((0.0, 0.6), (0.1, 0.65)):
        name = point_label({"distill.beta": beta}, seed=0)
        record = make_record(task="recommendation", auc=auc, **{"distill.beta": beta})
        write_record(tmp_path / "trials" / name, record)
    (tmp_path / "sweep.json").write_text(json.dumps({"varied": ["distill.beta"]}))
    result = read_table(tmp_path)
    assert result.metric == "validation.student.auc"
    assert [trial.value for trial in result.trials.values()] == [0.6, 0.65]
    with pytest.raises(RecordError, match=r"no finite number validation\.student\.accuracy"):
        read_table(tmp_path, metric="validation.student.accuracy")
