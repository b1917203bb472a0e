"""What a sweep's folder tells, finished or not."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from newsbert_ray.record import RecordError
from newsbert_ray.reporting.sweep_data import is_sweep, read_sweep

MakeSweep = Callable[..., Path]


def _change(folder: Path, **changes: Any) -> None:
    path = folder / "sweep.json"
    plan = json.loads(path.read_text())
    path.write_text(json.dumps({**plan, **changes}))


def test_points_by_what_became_of_them(make_sweep: MakeSweep) -> None:
    """A point counted in the wrong pile changes what a reader believes about the search."""
    folder = make_sweep(points=10, stopped=0.5, failed=1, under_way=1, seeds=(0, 1))
    assert is_sweep(folder)
    sweep = read_sweep(folder)
    states = [point.state for point in sweep.points]
    assert sorted(states) == ["failed", *["finished"] * 4, *["stopped"] * 4, "under way"]
    assert sweep.asked == 10
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


def test_ended_sweep_alone_says_what_failed(make_sweep: MakeSweep) -> None:
    """Frames of an earlier start lie there still when the trial has finished since."""
    folder = make_sweep(points=1, seeds=(0,))
    name = read_sweep(folder).points[0].trials[0].name
    (folder / "failures").mkdir()
    (folder / "failures" / f"{name}.txt").write_text("ValueError: earlier\n")
    assert read_sweep(folder).failures == {}


def test_failed_trial_without_a_folder_counts(make_sweep: MakeSweep) -> None:
    """A combination that cannot be never gets a folder, and must not vanish."""
    folder = make_sweep(points=1, seeds=(0,))
    _change(folder, failures={"beta=9,seed=0": "SettingsError: beta"})
    sweep = read_sweep(folder)
    assert sweep.failures == {"beta=9,seed=0": "SettingsError: beta"}
    assert [point.state for point in sweep.points] == ["finished"]


def test_record_without_the_goal_is_no_finished_trial(make_sweep: MakeSweep) -> None:
    """A number that was never measured must not be averaged."""
    folder = make_sweep(points=1, seeds=(0,))
    plan = json.loads((folder / "sweep.json").read_text())
    plan["space"]["goals"] = [{"metric": "speed.times_student", "mode": "max"}]
    _change(folder, space=plan["space"])
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
    with pytest.raises(RecordError, match=r"record\.json: not a whole run record"):
        read_sweep(folder)


def test_folder_of_a_trial_in_which_nothing_began_is_no_trial(make_sweep: MakeSweep) -> None:
    """A trial that was handed out a moment ago has a folder and no settings yet."""
    folder = make_sweep(points=1, seeds=(0,))
    (folder / "trials" / "beta=0.1,seed=0").mkdir()
    (folder / "trials" / "a file").touch()
    assert len(read_sweep(folder).trials) == 1
