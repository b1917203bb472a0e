"""The sweep as a whole: its folder, its trials on Ray, what it leaves behind, what a kill costs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from newsbert_ray.config import SettingsError, TrainSettings, build_settings
from newsbert_ray.connect import RaySession
from newsbert_ray.record import find_records, read_record
from newsbert_ray.tune.memory import Memory
from newsbert_ray.tune.search import SweepError, place_of, sweep
from newsbert_ray.tune.space_file import read_space

WriteSpace = Callable[..., Path]


@pytest.mark.ray
def test_a_sweep_runs_each_trial_once_and_one_failure_stays_alone(
    ray: RaySession,
    write_space: WriteSpace,
    make_train: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One trial that raises ends the sweep, or vanishes from it; a person does not learn what to do next."""
    file, out = write_space(), tmp_path / "sweep"
    failing = make_train(fails={"distill.beta": 0.2, "student.layers": 2})
    result = sweep(file, out=out, train=failing)
    said = capsys.readouterr().out
    assert result.best is not None
    assert result.best.label == "beta=0.2,layers=1"
    assert result.best.mean == pytest.approx(0.71)
    assert result.failures == {"beta=0.2,layers=2,seed=0": "ValueError: the loss is not a number"}
    assert "--distill.beta 0.2 --student.layers 1 --seed 0" in result.command
    assert f"newsbert-ray sweep {file} --out {out} --resume" in said
    assert "beta=0.2,layers=2,seed=0: ValueError: the loss is not a number" in said
    assert result.command in said
    assert [read_record(folder).settings["distill"]["beta"] for folder in find_records(out)] == [
        0.0,
        0.0,
        0.2,
    ]
    assert "the loss is not a number" in (out / "failures" / "beta=0.2,layers=2,seed=0.txt").read_text()
    assert (out / "report" / "report.md").exists()
    plan = json.loads((out / "sweep.json").read_text())
    assert (plan["state"], plan["trials"], plan["varied"]) == (
        "finished",
        4,
        ["distill.beta", "student.layers"],
    )
    assert not (out / ".tune").exists()

    again = sweep(file, out=out, resume=True, train=make_train())
    assert again.failures == {}
    assert len(again.points) == 4
    starts = {path.parent.name: len(path.read_text().splitlines()) for path in out.rglob("starts.txt")}
    assert starts == {
        "beta=0,layers=1,seed=0": 1,
        "beta=0,layers=2,seed=0": 1,
        "beta=0.2,layers=1,seed=0": 1,
        "beta=0.2,layers=2,seed=0": 2,
    }
    assert len(Memory(again.space, out).completed) == 4


KILLED = """
import sys
from pathlib import Path
from newsbert_ray.tune.search import sweep

def make():
    def train(settings, *, report, quiet):
        import time
        from pathlib import Path
        Path(settings.out).mkdir(parents=True, exist_ok=True)
        (Path(settings.out) / "started").touch()
        if settings.distill.beta > 0:
            time.sleep(600)
        return stand_in(settings, report=report, quiet=quiet)
    stand_in = __import__("conftest").stand_in()
    return train

sweep(sys.argv[1], out=sys.argv[2], train=make())
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("with_signal", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_a_sweep_that_was_ended_goes_on_with_each_trial_counted_once(
    with_signal: signal.Signals, ray: RaySession, write_space: WriteSpace, make_train: Any, tmp_path: Path
) -> None:
    """A night's sweep is lost with the terminal it ran in; or what had finished runs again."""
    file, out = write_space(), tmp_path / "sweep"
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    paths = [str(Path(__file__).parent), *sys.path]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, str(script), str(file), str(out)],
        env={**clean, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        end = time.monotonic() + 120
        while not list(out.glob("trials/beta=0.2,*/started")) and time.monotonic() < end:
            time.sleep(0.1)
            assert process.poll() is None, process.communicate()[0]
        process.send_signal(with_signal)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    finished = len(find_records(out))
    assert 1 <= finished <= 2
    if with_signal is signal.SIGINT:
        assert f"interrupted with {4 - finished} of 4 trials to go" in said
        assert f"newsbert-ray sweep {file} --out {out} --resume" in said
        assert json.loads((out / "sweep.json").read_text())["state"] == "interrupted"
    result = sweep(file, out=out, resume=True, train=make_train())
    starts = {path.parent.name: len(path.read_text().splitlines()) for path in out.rglob("starts.txt")}
    assert set(starts.values()) == {1}
    assert len(starts) == 4
    assert len(Memory(result.space, out).completed) == 4
    assert result.best is not None
    assert result.best.label == "beta=0.2,layers=2"


def test_a_folder_of_something_else_is_left_alone(
    write_space: WriteSpace, make_train: Any, tmp_path: Path
) -> None:
    """A sweep writes into somebody's photographs, or into another sweep."""
    file, out = write_space(), tmp_path / "sweep"
    out.mkdir()
    (out / "photo.jpg").touch()
    with pytest.raises(SweepError, match="holds other files and no sweep"):
        sweep(file, out=out, train=make_train())
    assert sorted(path.name for path in out.iterdir()) == ["photo.jpg"]
    with pytest.raises(SweepError, match="is a file"):
        sweep(file, out=out / "photo.jpg", train=make_train())


def test_nothing_is_begun_where_a_setting_cannot_be(
    write_space: WriteSpace, make_train: Any, tmp_path: Path
) -> None:
    """A slip on the command line leaves a folder that the right command then refuses."""
    file, out = write_space(), tmp_path / "sweep"
    with pytest.raises(SettingsError, match="epochs = 0"):
        sweep(file, out=out, overrides={"epochs": 0}, train=make_train())
    assert not (out / "sweep.json").exists()
    with pytest.raises(SettingsError, match="concurrency = 0"):
        sweep(file, out=out, concurrency=0, train=make_train())


def finished_sweep(file: Path, out: Path, make_train: Any) -> None:
    """A sweep whose trials have all finished, made without Ray: the records are there before it starts."""
    from newsbert_ray.tune.jobs import Jobs
    from newsbert_ray.tune.space import trial_settings

    space = read_space(file)
    (out / ".lock").parent.mkdir(exist_ok=True)
    (out / ".lock").touch()
    jobs = Jobs(space, Memory(space, out), out)
    train = make_train()
    while (job := jobs.next_job()) is not None:
        settings = trial_settings(space, job.point, seed=job.seed, out=job.out, overrides={})
        train(settings, report=lambda entry: None, quiet=True)
        jobs.finish(job, value=read_record(job.out).metrics["validation"]["student"]["accuracy"])
    sweep(file, out=out, train=train)


def test_a_finished_sweep_is_never_overwritten_and_says_what_to_type(
    write_space: WriteSpace, make_train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command twice doubles or mixes the results; another space takes over the folder."""
    file, out = write_space(), tmp_path / "sweep"
    finished_sweep(file, out, make_train)
    capsys.readouterr()
    with pytest.raises(SweepError, match=r"holds this sweep already \(finished\); go on with --resume"):
        sweep(file, out=out, train=make_train())
    result = sweep(file, out=out, resume=True, train=make_train())
    assert result.best is not None
    assert "4 of them had finished before" in capsys.readouterr().out
    with pytest.raises(SweepError, match=r"holds another sweep \(overrides.epochs was null, now 7\)"):
        sweep(file, out=out, overrides={"epochs": 7}, resume=True, train=make_train())
    other = write_space(**{"[1, 2]": "[1, 4]"})
    with pytest.raises(SweepError, match=r"holds another sweep \(space.axes was "):
        sweep(other, out=out, resume=True, train=make_train())
    (out / "sweep.json").write_text("{")
    with pytest.raises(SweepError, match="damaged, or written by another version"):
        sweep(file, out=out, resume=True, train=make_train())


def test_two_sweeps_in_one_folder_are_refused(
    write_space: WriteSpace, make_train: Any, tmp_path: Path
) -> None:
    """Two processes write one journal."""
    import fcntl

    out = tmp_path / "sweep"
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SweepError, match="another sweep runs in it"):
            sweep(write_space(), out=out, train=make_train())


@pytest.mark.parametrize(
    ("cpus", "gpus", "values", "asked", "jobs", "expected"),
    [
        (8, 0, {}, None, 100, (8, 1, 0)),
        (8, 0, {}, 3, 100, (3, 1, 0)),
        (8, 0, {}, 30, 100, (8, 1, 0)),
        (8, 0, {}, None, 5, (5, 1, 0)),
        (8, 0, {"threads": 3}, None, 100, (2, 3, 0)),
        (16, 1, {}, None, 100, (4, 1, 0.25)),
        (16, 1, {}, 8, 100, (8, 1, 0.125)),
        (16, 4, {}, 2, 100, (2, 1, 1)),
        (16, 1, {"device": "cpu"}, None, 100, (16, 1, 0)),
    ],
)
def test_trials_at_once_follow_the_resources(
    cpus: int, gpus: int, values: dict[str, Any], asked: int | None, jobs: int, expected: tuple[float, ...]
) -> None:
    """Trials wait for ever for a place that is not there, or leave the machine idle."""
    needed = {"data": "d", "teacher": "scratch", "out": "o", **values}
    session = RaySession(True, "", float(cpus), float(gpus), None, None)
    place = place_of(build_settings(TrainSettings, needed), session, jobs=jobs, concurrency=asked)
    assert (place.slots, place.cpus, place.gpus) == expected


def test_not_even_one_trial_fits_is_said_at_once() -> None:
    """Ray waits for ever for a machine that never comes."""
    for values, message in (
        ({"threads": 4}, "needs 4 CPUs, Ray has 2"),
        ({"device": "cuda"}, "Ray has no GPU"),
    ):
        settings = build_settings(TrainSettings, {"data": "d", "teacher": "scratch", "out": "o", **values})
        with pytest.raises(SettingsError, match=message):
            place_of(settings, RaySession(True, "", 2.0, 0.0, None, None), jobs=1, concurrency=None)
