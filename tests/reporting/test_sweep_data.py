"""What a sweep's folder tells, finished or not."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest

from newsbert_ray.record import RecordError
from newsbert_ray.reporting.sweep_data import (
    Axis,
    Goal,
    Point,
    Sweep,
    Trial,
    best_point,
    is_sweep,
    listed,
    read_sweep,
)
from newsbert_ray.reporting.tables import Mode
from tests.reporting.conftest import MakeSweep, change_plan


def test_points_by_what_became_of_them(make_sweep: MakeSweep) -> None:
    """A point counted in the wrong pile changes what a reader believes about the search."""
    folder = make_sweep(points=10, stopped=0.5, failed=1, under_way=1, seeds=(0, 1))
    assert is_sweep(folder)
    sweep = read_sweep(folder)
    states = [point.state for point in sweep.points]
    assert sorted(states) == ["failed", *["finished"] * 4, *["stopped"] * 4, "under way"]
    assert sweep.planned_points == 10
    assert all(len(point.trials) == 2 for point in sweep.of("finished"))
    (failed,) = sweep.of("failed")
    assert failed.trials[0].reason == "LossError: the loss is <nan> at step 10"
    stopped = sweep.of("stopped")[0].trials[0]
    assert (stopped.epoch, stopped.epochs, stopped.seconds) == (1.0, 9, 4.0)
    assert stopped.values == (stopped.entries[-1]["validation"]["student"]["accuracy"],)


def test_point_is_finished_only_with_every_seed(make_sweep: MakeSweep) -> None:
    """One lucky seed of three must not look like a point among whole ones."""
    folder = make_sweep(points=2, seeds=(0, 1, 2))
    trial = read_sweep(folder).points[0].trials[2].name
    (folder / "trials" / trial / "record.json").unlink()
    assert [point.state for point in read_sweep(folder).points] == ["under way", "finished"]


def test_setting_that_did_not_vary_is_not_there(make_sweep: MakeSweep) -> None:
    """A warm-up of a schedule without one would be a value that nobody chose."""
    folder = make_sweep(axes=["optimizer.decay", "optimizer.warmup_share"], points=8, seeds=(0,))
    for point in read_sweep(folder).points:
        assert ("optimizer.warmup_share" in point.values) == (point.values["optimizer.decay"] != "none")


def test_failure_of_a_running_sweep_has_its_reason(make_sweep: MakeSweep) -> None:
    """Until the sweep ends only the frames know why a trial failed."""
    folder = make_sweep(points=2, seeds=(0,), state="running")
    name = read_sweep(folder).points[0].trials[0].name
    (folder / "failures").mkdir()
    (folder / "failures" / f"{name}.txt").write_text("Traceback:\n  x\nnewsbert_ray.a.LossError: is nan\n\n")
    sweep = read_sweep(folder)
    assert sweep.failures == {name: "LossError: is nan"}
    assert sorted(point.state for point in sweep.points) == ["failed", "finished"]
    # Once it has ended, sweep.json alone says what failed: a trial may have finished since, and an impossible
    # combination never gets a folder.
    change_plan(folder, failures={"beta=9,seed=0": "SettingsError: beta"})
    sweep = read_sweep(folder)
    assert sweep.failures == {"beta=9,seed=0": "SettingsError: beta"}
    assert [point.state for point in sweep.points] == ["finished"] * 2


def test_record_without_the_goal_is_no_finished_trial(make_sweep: MakeSweep) -> None:
    """A number that was never measured must not be averaged."""
    folder = make_sweep(points=1, seeds=(0,))
    plan = json.loads((folder / "sweep.json").read_text())
    plan["space"]["goals"] = [{"metric": "speed.times_student", "mode": "max"}]
    change_plan(folder, space=plan["space"])
    assert [point.state for point in read_sweep(folder).points] == ["failed"]


def test_sweep_that_was_killed_is_told_from_one_that_runs(make_sweep: MakeSweep) -> None:
    """`running` in a file that nobody holds would keep somebody waiting for ever."""
    folder = make_sweep(points=1, state="running")
    assert not read_sweep(folder).held
    with (folder / ".lock").open("w") as lock:
        assert not read_sweep(folder).held
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert read_sweep(folder).held


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"space": {"axes": []}}', '{"space": {"axes": [1], "goals": [], "seeds": []}}']
)
def test_damaged_sweep_is_named(make_sweep: MakeSweep, damage: str) -> None:
    """A file that says nothing of use must be named, with a way to what is there."""
    folder = make_sweep(points=1)
    (folder / "sweep.json").write_text(damage)
    with pytest.raises(RecordError, match=r"sweep\.json: damaged, or written by another version .*trials"):
        read_sweep(folder)


def test_damaged_record_ends_the_report(make_sweep: MakeSweep) -> None:
    """A point left out because its record is damaged would change the best without a word."""
    folder = make_sweep(points=1, seeds=(0,))
    name = read_sweep(folder).points[0].trials[0].name
    (folder / "trials" / name / "record.json").write_text("{")
    with pytest.raises(RecordError, match=r"record\.json: not a complete run record"):
        read_sweep(folder)


def test_folder_of_a_trial_in_which_nothing_began_is_no_trial(make_sweep: MakeSweep) -> None:
    """A trial that was handed out a moment ago has a folder and no settings yet."""
    folder = make_sweep(points=1, seeds=(0,))
    (folder / "trials" / "beta=0.1,seed=0").mkdir()
    (folder / "trials" / "a file").touch()
    assert len(read_sweep(folder).trials) == 1


def _point(label: str, *values: tuple[float, ...], **settings: object) -> Point:
    trials = tuple(
        Trial(f"{label},seed={seed}", {}, seed, "finished", {}, 2, 2.0, (), values=found)
        for seed, found in enumerate(values)
    )
    return Point(label, settings, trials, range(len(values)))


def _sweep(points: list[Point], *modes: Mode, **plan: object) -> Sweep:
    goals = tuple(Goal(metric="validation.student.accuracy", mode=mode) for mode in modes)
    return Sweep(Path("x"), {"trials": 4, **plan}, (), goals, (0, 1), tuple(points), {}, False)


@pytest.mark.parametrize(("mode", "order"), [("max", "bca"), ("min", "acb")])
def test_best_comes_first(mode: Mode, order: str) -> None:
    """The first point is the one whose command people run; the mean over seeds decides."""
    points = [_point("a", (0.1,), (0.2,)), _point("b", (0.9,), (0.5,)), _point("c", (0.9,), (0.4,))]
    assert "".join(point.label for point in _sweep(points, mode).finished) == order


def test_of_equals_the_one_in_the_command_is_best() -> None:
    """The settings on the page and the command below them must be the same point's."""
    points = [_point("b", (0.5,)), _point("a", (0.5,)), _point("c", (0.4,))]
    best = best_point(points, Goal(metric="validation.student.accuracy"))
    assert best == _sweep(points, "max").finished[0] == points[1]


def test_front_by_hand() -> None:
    """A point that another beats in everything is no choice; one that is equal in one goal may be beaten."""
    points = [
        _point("a", (0.9, 1.0)),
        _point("b", (0.8, 3.0)),
        _point("c", (0.7, 2.0)),
        _point("d", (0.9, 0.5)),
        _point("e", (0.8, 3.0)),
    ]
    assert [point.label for point in _sweep(points, "max", "max").front] == ["a", "b", "e"]
    assert [point.label for point in _sweep(points, "max", "min").front] == ["d"]
    assert [point.label for point in _sweep(points, "max").front] == ["a", "d"]


def test_spread_over_seeds_by_hand() -> None:
    """Mean and sample standard deviation are what stands behind every ±."""
    summary = _point("a", (0.6, 1.0), (0.8, 3.0)).summary(1)
    assert summary is not None
    assert (summary.mean, summary.n) == (2.0, 2)
    assert summary.sd == pytest.approx(2**0.5)
    assert _point("a").summary() is None


@pytest.mark.parametrize(
    ("metric", "heading"),
    [
        ("validation.student.accuracy", "validation accuracy (%)"),
        ("test.teacher.macro_f1", "teacher's test macro-F1 (%)"),
        ("speed.student_titles_per_second", "student's titles/s"),
        ("speed.times_teacher", "speed, times the teacher's"),
    ],
)
def test_goal_in_words(metric: str, heading: str) -> None:
    """A dotted name on an axis tells a reader of a paper nothing; a share in per cent says so."""
    column = Goal(metric=metric, mode="max").column
    assert column.heading == heading
    assert column.factor == (100.0 if "%" in heading else 1.0)


def test_condition_hangs_on_a_setting_that_varies() -> None:
    """An axis below another that is itself ruled out does not vary either."""
    axis = Axis(name="b", low=0, high=1, when={"a": (1, 2)})
    assert axis.is_active({"a": 2})
    assert not axis.is_active({"a": 3})
    assert not axis.is_active({})


def test_list_reads_like_a_sentence() -> None:
    """`a, b and c`, whatever their number."""
    assert [listed(["a", "b", "c"][:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]
