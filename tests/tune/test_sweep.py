"""The whole sweep: its folder, its trials on Ray, its files, and resuming after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import newsbert_ray
from newsbert_ray import sweep
from newsbert_ray.config import SettingsError, TrainSettings
from newsbert_ray.data.shards import ShardError
from newsbert_ray.data.tokenizer import TokenizerError
from newsbert_ray.model.encoder import EncoderError
from newsbert_ray.ray_session import ConnectError, RaySession
from newsbert_ray.record import RECORD, TEACHERS, RunRecord, find_records, read_record
from newsbert_ray.reporting.report import report
from newsbert_ray.storage import bucket as lease
from newsbert_ray.storage.bucket import Remote
from newsbert_ray.storage.workdir import WorkDir
from newsbert_ray.tune import sweep as sweep_module
from newsbert_ray.tune.space import steer
from newsbert_ray.tune.space_file import Changes, read_space, restore_changes
from newsbert_ray.tune.study import JOURNAL, SweepStudy
from newsbert_ray.tune.sweep import OpenSweep, SweepError, SweepResult
from newsbert_ray.tune.trial import check_space, trial_settings
from newsbert_ray.tune.trials import Trials, metric_value
from tests.conftest import change_json

if TYPE_CHECKING:
    from tests.conftest import S3


WriteSpace = Callable[..., Path]


def skip_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on sweeps write no report: its figures take seconds."""
    monkeypatch.setattr("newsbert_ray.reporting.report.report", lambda folders, *, out: [])


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps write no report."""
    skip_report(monkeypatch)


@pytest.mark.ray
def test_a_sweep_runs_each_trial_once_and_survives_a_failure(
    ray: RaySession,
    write_space: WriteSpace,
    make_train: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One trial that raises ends the sweep, or is lost; the user does not learn what to do next."""
    file, out = write_space(), tmp_path / "sweep"
    failing = make_train(fails={"distill.beta": 0.2, "student.layers": 2})
    result = sweep(file, out=out, train=failing)
    output = capsys.readouterr().out
    assert result.best is not None
    assert result.best.label == "beta=0.2,layers=1"
    assert result.best.means == pytest.approx((0.71,))
    assert result.failures == {"beta=0.2,layers=2,seed=0": "ValueError: the loss is not a number"}
    assert "--distill.beta 0.2 --student.layers 1 --seed 0" in result.command
    assert f"newsbert-ray sweep {file} --out {out} --resume" in output
    assert "beta=0.2,layers=2,seed=0: ValueError: the loss is not a number" in output
    assert result.command in output
    assert [read_record(folder).settings["distill"]["beta"] for folder in find_records(out)] == [
        0.0,
        0.0,
        0.2,
    ]
    assert "the loss is not a number" in (out / "failures" / "beta=0.2,layers=2,seed=0.txt").read_text()
    assert (out / "report" / "report.md").exists()
    plan = json.loads((out / "sweep.json").read_text())
    assert (plan["state"], plan["trials"], plan["varied"]) == (
        "finished with failures",
        4,
        ["distill.beta", "student.layers"],
    )
    assert not (out / ".tune").exists()

    skip_report(monkeypatch)
    again = sweep(file, out=out, resume=True, train=make_train())
    assert again.failures == {}
    assert json.loads((out / "sweep.json").read_text())["state"] == "finished"
    assert list((out / "failures").iterdir()) == []
    assert len(again.points) == 4
    starts = {path.parent.name: len(path.read_text().splitlines()) for path in out.rglob("starts.txt")}
    assert starts == {
        "beta=0,layers=1,seed=0": 1,
        "beta=0,layers=2,seed=0": 1,
        "beta=0.2,layers=1,seed=0": 1,
        "beta=0.2,layers=2,seed=0": 2,
    }
    assert len(SweepStudy(read_space(file), out).ended) == 4


KILLED = """
import sys
from pathlib import Path
from newsbert_ray import sweep

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

sweep(sys.argv[1], out=sys.argv[2], concurrency=1, train=make())
"""


@pytest.mark.ray
@pytest.mark.usefixtures("no_report")
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("with_signal", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_an_interrupted_sweep_resumes_with_each_trial_counted_once(
    with_signal: signal.Signals, ray: RaySession, write_space: WriteSpace, make_train: Any, tmp_path: Path
) -> None:
    """A long sweep is lost with its terminal; or finished trials run again."""
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
        end = time.monotonic() + 240
        while not list(out.glob("trials/beta=0.2,*/started")) and time.monotonic() < end:
            time.sleep(0.1)
            assert process.poll() is None, process.communicate()[0]
        process.send_signal(with_signal)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert len(find_records(out)) == 2
    if with_signal is signal.SIGINT:
        assert "interrupted: 2 trials finished, 0 stopped early. Continue with:" in output
        assert f"newsbert-ray sweep {file} --out {out} --resume" in output
        assert json.loads((out / "sweep.json").read_text())["state"] == "interrupted"
    result = sweep(file, out=out, resume=True, train=make_train())
    starts = {path.parent.name: len(path.read_text().splitlines()) for path in out.rglob("starts.txt")}
    assert set(starts.values()) == {1}
    assert len(starts) == 4
    assert len(SweepStudy(read_space(file), out).ended) == 4
    assert result.best is not None
    assert result.best.label == "beta=0.2,layers=2"


def test_a_folder_with_other_files_is_refused(
    write_space: WriteSpace, make_train: Any, tmp_path: Path
) -> None:
    """A sweep writes into a folder of photographs, or into another sweep."""
    file, out = write_space(), tmp_path / "sweep"
    out.mkdir()
    (out / "photo.jpg").touch()
    with pytest.raises(SweepError, match="holds other files and no sweep"):
        sweep(file, out=out, train=make_train())
    assert sorted(path.name for path in out.iterdir()) == ["photo.jpg"]
    with pytest.raises(SweepError, match="is a file"):
        sweep(file, out=out / "photo.jpg", train=make_train())


def test_an_impossible_setting_writes_nothing(
    write_space: WriteSpace, make_train: Any, tmp_path: Path
) -> None:
    """A mistake on the command line leaves a folder that the corrected command refuses."""
    file, out = write_space(), tmp_path / "sweep"
    with pytest.raises(SettingsError, match="epochs = 0"):
        sweep(file, out=out, overrides={"epochs": 0}, train=make_train())
    assert not (out / "sweep.json").exists()
    with pytest.raises(SettingsError, match="concurrency = 0"):
        sweep(file, out=out, concurrency=0, train=make_train())
    assert not (out / "sweep.json").exists()


def test_wrong_data_or_teacher_is_found_before_anything_is_written(
    write_space: WriteSpace, shards: Path, tmp_path: Path
) -> None:
    """Every trial fails for the same reason, and then the folder refuses the corrected command."""
    file, out, teacher = write_space(), tmp_path / "sweep", tmp_path / "teacher"
    shutil.copytree(shards / "tokenizer", teacher)
    tokenizer = teacher / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"lowercase":true', '"lowercase":false'))
    for overrides, error, message in (
        ({"data": str(tmp_path)}, ShardError, "no prepared shards there"),
        ({"data": str(shards), "teacher": str(teacher)}, EncoderError, "another tokeniser"),
        ({"data": str(shards), "teacher": str(tmp_path / "none")}, TokenizerError, "no such folder"),
    ):
        with pytest.raises(error, match=message):
            sweep(file, out=out, overrides=overrides)
        assert not (out / "sweep.json").exists()


@pytest.mark.usefixtures("no_report")
def test_a_sweep_that_fails_before_its_first_trial_leaves_the_folder_free(
    write_space: WriteSpace, make_train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The corrected command is refused because the folder holds another sweep."""

    def refuse() -> None:
        raise ConnectError("no Ray")

    monkeypatch.setattr(sweep_module, "ray_session", refuse)
    file, out = write_space(), tmp_path / "sweep"
    with pytest.raises(ConnectError):
        sweep(file, out=out, overrides={"threads": 64}, train=make_train())
    assert [path.name for path in out.iterdir()] == [".lock"]
    finished_sweep(file, out, make_train)
    next(out.rglob(RECORD)).unlink()
    with pytest.raises(ConnectError):
        sweep(file, out=out, resume=True, train=make_train())
    assert {"sweep.json", "optuna.journal"} <= {path.name for path in out.iterdir()}


@pytest.mark.usefixtures("no_report")
def test_other_shards_are_refused(
    write_space: WriteSpace, make_train: Any, shards: Path, tmp_path: Path
) -> None:
    """Half of a sweep's trials were trained on another corpus than the other half."""
    data, out = tmp_path / "shards", tmp_path / "sweep"
    data.mkdir()
    (data / "manifest.json").write_text((shards / "manifest.json").read_text())
    change_json(data / "manifest.json", tokenizer_files={})
    text = (data / "manifest.json").read_text()
    file = write_space(nowhere=str(data))
    finished_sweep(file, out, make_train)
    sweep(file, out=out, resume=True)
    fingerprint = json.loads(text)["fingerprint"]
    assert json.loads((out / "sweep.json").read_text())["corpora"] == [fingerprint]
    (data / "manifest.json").write_text(text.replace(fingerprint, "f" * 64))
    with pytest.raises(SweepError, match="the shards were prepared again; give another --out"):
        sweep(file, out=out, resume=True)
    (data / "manifest.json").write_text(text)
    sweep(file, out=out, resume=True)


@pytest.mark.usefixtures("no_report")
def test_relative_folders_are_saved_as_absolute_ones(
    write_space: WriteSpace, make_train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume, or the best point's command, from another folder finds no shards."""
    (tmp_path / "here" / "shards").mkdir(parents=True)
    (tmp_path / "here" / "bert").mkdir()
    file, out = write_space(nowhere="shards"), tmp_path / "sweep"
    monkeypatch.chdir(tmp_path / "here")
    finished_sweep(file, out, make_train, overrides={"teacher": "bert"})
    plan = json.loads((out / "sweep.json").read_text())
    assert plan["overrides"] == {"teacher": str(tmp_path / "here" / "bert")}
    assert plan["space"]["settings"]["data"] == str(tmp_path / "here" / "shards")
    result = sweep(file, out=out, resume=True, train=make_train())
    assert f"--data {tmp_path / 'here' / 'shards'} --teacher {tmp_path / 'here' / 'bert'}" in result.command


def test_the_report_ignores_the_record_of_a_failed_trial(
    write_space: WriteSpace, make_train: Any, tmp_path: Path
) -> None:
    """A damaged record of one failed trial ends a long sweep without its table."""
    file, out = write_space(), tmp_path / "sweep"
    finished_sweep(file, out, make_train)
    space = read_space(file)
    trials = Trials(space, SweepStudy(space, out), WorkDir.at(out))
    trials.collect()
    name = "beta=0,layers=2,seed=0"
    trials.ended[name] = replace(trials.ended[name], state="failed", values=(), reason="its process died")
    (out / "trials" / name / RECORD).write_text("{")
    points = tuple(trials.points.values())
    result = SweepResult(out, out, points, trials.best(), "", seconds=1.0)
    plan = json.loads((out / "sweep.json").read_text())
    (out / "sweep.json").write_text(json.dumps({**plan, "failures": result.failures}))
    report([result.out], out=out / "report")
    assert "3 finished, 1 failed" in (out / "report" / "report.md").read_text()
    assert list(result.failures) == [name]


def finished_sweep(file: Path, out: Path, make_train: Any, overrides: dict[str, Any] | None = None) -> None:
    """A sweep whose trials have all finished, made without Ray: the records are there before it starts."""
    space = read_space(file)
    (out / ".lock").parent.mkdir(exist_ok=True)
    (out / ".lock").touch()
    trials = Trials(space, SweepStudy(space, out), WorkDir.at(out))
    train = make_train()
    while (spec := trials.next_trial()) is not None:
        folder = trials.out(spec.name)
        settings = trial_settings(space, spec.point, seed=spec.seed, out=folder, overrides=overrides or {})
        train(settings, report=lambda entry: None, quiet=True)
        trials.finish(spec, (metric_value(read_record(folder), space.metric),))
    (out / JOURNAL).unlink()  # it names no sweep
    sweep(file, out=out, overrides=overrides, train=train)


@pytest.mark.ray
@pytest.mark.usefixtures("no_report")
def test_a_finished_sweep_is_never_overwritten(
    write_space: WriteSpace, make_train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command twice mixes the results; another space takes over the folder."""
    file, out = write_space(), tmp_path / "sweep"
    finished_sweep(file, out, make_train)
    capsys.readouterr()
    with pytest.raises(SweepError, match=r"holds this sweep already \(finished\); continue with --resume"):
        sweep(file, out=out, train=make_train())
    result = sweep(file, out=out, resume=True, train=make_train())
    assert result.best is not None
    assert "4 of them have ended before" in capsys.readouterr().out
    with pytest.raises(SweepError, match=r"holds another sweep, with --epochs null instead of 7; give its"):
        sweep(file, out=out, overrides={"epochs": 7}, resume=True, train=make_train())
    other = write_space(**{"[1, 2]": "[1, 4]"})
    with pytest.raises(SweepError, match=r"holds another sweep, with axes "):
        sweep(other, out=out, resume=True, train=make_train())
    replaced = sweep(other, out=out, overwrite=True, train=make_train())
    assert len(replaced.points) == len(result.points)
    (out / "sweep.json").write_text("{")
    with pytest.raises(SweepError, match="damaged, or written by another version"):
        sweep(file, out=out, resume=True, train=make_train())


@pytest.mark.usefixtures("no_report")
def test_a_resume_may_ask_for_more_and_widen_limits(
    write_space: WriteSpace, make_train: Any, tmp_path: Path
) -> None:
    """More trials need a new sweep; or a resume changes the scheduler half-way."""
    text = (
        "name: more\nsettings: {data: nowhere, teacher: scratch}\n"
        "space:\n  distill.beta: {float: [0.0, 0.3]}\nsearch: {trials: 2}\n"
    )
    file, out = write_space(text), tmp_path / "sweep"
    finished_sweep(file, out, make_train)
    before = json.loads((out / "sweep.json").read_text())
    assert (before["state"], before["trials"]) == ("finished", 2)
    wider = {"limits": {"hours": 9}, "keep_students": 3, "search": {"trials": 2}}
    sweep(file, out=out, control=wider, resume=True, train=make_train())
    after = json.loads((out / "sweep.json").read_text())
    assert after["control"] == wider
    assert after["identity"] == before["identity"]
    with pytest.raises(SweepError, match=r"holds another sweep, with stopping.scheduler "):
        sweep(file, out=out, control={"stopping.scheduler": "none"}, resume=True, train=make_train())


def test_a_sweep_of_an_earlier_version_goes_on_with_its_defaults(
    write_space: WriteSpace, make_train: Any, tmp_path: Path
) -> None:
    """Half of its trials have other learning rates than the others, and nothing says so."""
    text = (
        "name: old\nsettings: {data: nowhere, teacher: scratch}\nspace:\n  distill.beta: {grid: [0.0, 0.3]}\n"
    )
    file, out = write_space(text), tmp_path / "sweep"
    finished_sweep(file, out, make_train)
    plan = json.loads((out / "sweep.json").read_text())
    assert (plan.pop("defaults"), plan["settings"]["optimizer"]["decay"]) == ("0.2", "linear")
    (out / "sweep.json").write_text(json.dumps(plan))
    for _ in range(2):
        sweep(file, out=out, resume=True, train=make_train())
        plan = json.loads((out / "sweep.json").read_text())
        optimizer, rate = plan["settings"]["optimizer"], plan["settings"]["learning_rate"]
        assert (rate, optimizer["decay"], optimizer["warmup_share"]) == (5e-5, "none", 0.0)


def test_a_storage_password_is_never_written(
    write_space: WriteSpace, make_train: Any, tmp_path: Path
) -> None:
    """Everybody who reads the results could write to the database."""
    file, out = write_space(), tmp_path / "sweep"
    url = f"sqlite:///{tmp_path}/study.db?password=hush"
    space = steer(read_space(file), {"search.storage": url})
    changes, first = Changes(control={"search": {"storage": url}}), check_space(space, out=out, overrides={})
    plan = OpenSweep(WorkDir.at(out), space, changes, first, (), {}, (), 0.0).plan
    assert "hush" not in json.dumps(plan)
    assert plan["control"]["search"]["storage"].endswith("password=***")
    with pytest.raises(SettingsError, match=r"does not keep the password; give the whole URL again"):
        restore_changes(Changes(), plan)
    again = restore_changes(changes, plan)
    assert again.control["search"]["storage"] == url


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


@pytest.mark.ray
@pytest.mark.usefixtures("no_report")
def test_a_trial_whose_process_is_killed_starts_again(
    ray: RaySession, write_space: WriteSpace, make_train: Any, tmp_path: Path
) -> None:
    """One kill for lack of memory costs the trial, or the sweep."""
    whole = make_train()

    def train(settings: TrainSettings, *, report: Any, quiet: bool) -> RunRecord:
        import os
        import signal
        from pathlib import Path

        killed = Path(settings.out) / "killed"
        if settings.distill.beta > 0 and not killed.exists():
            killed.parent.mkdir(parents=True, exist_ok=True)
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        record: RunRecord = whole(settings, report=report, quiet=quiet)
        return record

    out = tmp_path / "sweep"
    result = sweep(write_space(**{"[1, 2]": "[1]"}), out=out, train=train)
    assert [path.parent.name for path in out.rglob("killed")] == ["beta=0.2,layers=1,seed=0"]
    assert result.failures == {}
    assert len(find_records(out)) == 2


@pytest.mark.ray
def test_a_resume_with_only_impossible_points_left_ends_with_its_table(
    ray: RaySession,
    write_space: WriteSpace,
    make_train: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An impossible combination is due at each resume, and ends it with a stack trace."""
    text = (
        "name: deep\nsettings: {data: nowhere, teacher: scratch, scratch: {layers: 8}}\n"
        "space:\n  student.layers: {choice: [1, 4]}\n  model.teacher_layers: {choice: [8, 6]}\n"
        "search: {sampler: random, trials: 12}\nstopping: {scheduler: none}\n"
    )
    file, out = write_space(text), tmp_path / "sweep"
    with monkeypatch.context() as first:
        skip_report(first)
        results = [sweep(file, out=out, train=make_train())]
    results.append(sweep(file, out=out, resume=True, train=make_train()))
    for result in results:
        assert list(result.failures) == ["layers=4,teacher_layers=6,seed=0"]
    assert len(find_records(out)) == 3
    assert (out / "report" / "report.md").exists()


def small_space(shards: Path, axis: str) -> str:
    """A grid over one axis whose trials take a second."""
    return (
        f"name: real\nsettings: {{data: {shards}, teacher: scratch, epochs: 1, batch_size: 32, "
        "learning_rate: 0.002, student.layers: 1, model.query_size: 8, "
        "scratch: {layers: 2, hidden: 16, heads: 2, feed_forward: 32}}\n"
        f"space:\n  {axis}\n"
    )


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_trial_equals_a_run_of_train_and_trials_share_frozen_teachers(
    ray: RaySession, write_space: WriteSpace, shards: Path, tmp_path: Path
) -> None:
    """The best point trained again has other numbers; or each trial fine-tunes its own teacher."""
    file = write_space(small_space(shards, "method: {grid: [newsbert, twinbert, pkd, minilm]}"))
    out = tmp_path / "sweep"
    result = sweep(file, out=out)
    assert result.failures == {}
    assert not list(out.rglob("checkpoints"))
    settings = trial_settings(
        read_space(file), {"method": "newsbert"}, seed=0, out=tmp_path / "alone", overrides={}
    )
    assert settings.threads == 1
    newsbert_ray.train(settings, quiet=True)
    students = [out / "trials" / "method=newsbert,seed=0" / "student", tmp_path / "alone" / "student"]
    for name in ("model.safetensors", "top.safetensors"):
        in_sweep, alone = ((folder / name).read_bytes() for folder in students)
        assert in_sweep == alone
    (teacher,) = (out / TEACHERS).glob("*/record.json")
    records = {record.settings["method"]: record for record in map(read_record, find_records(out / "trials"))}
    assert set(records) == {"newsbert", "twinbert", "pkd", "minilm"}
    frozen = {name: record.metrics["test"]["teacher"] for name, record in records.items()}
    assert frozen["twinbert"] == frozen["pkd"] == frozen["minilm"] != frozen["newsbert"]
    taught = read_record(teacher.parent).metrics["test"]["student"]
    assert frozen["pkd"]["accuracy"] == pytest.approx(taught["accuracy"])
    assert "Table 2. Ours: " in (out / "report" / "report.md").read_text()


NEIGHBOUR = """
import sys
from newsbert_ray.ray_session import ray_session
with ray_session(cpus=1):
    print("there", flush=True)
    sys.stdin.read()
"""


@pytest.mark.ray
@pytest.mark.usefixtures("no_report")
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_stopped_groups_release_everything_next_to_another_ray(
    ray: RaySession, write_space: WriteSpace, shards: Path, tmp_path: Path
) -> None:
    """Later groups would wait for ever for what a stopped group still holds."""
    import ray as cluster
    from ray._private.state import actors

    small = (
        f"name: groups\nsettings: {{data: {shards}, teacher: scratch, epochs: 2, batch_size: 32, workers: 2, "
        "student.layers: 1, model.query_size: 8, scratch: {layers: 2, hidden: 16, heads: 2, "
        "feed_forward: 32}}\n"
        "space:\n  learning_rate: {grid: [0.003, 0.00000001]}\n"
        "search: {sampler: grid}\nstopping: {scheduler: asha}\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen(
        [sys.executable, "-c", NEIGHBOUR],
        env=clean,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as neighbour:
        assert neighbour.stdout is not None
        assert neighbour.stdout.readline() == "there\n"
        result = sweep(write_space(small), out=tmp_path / "sweep")
        assert neighbour.poll() is None
        neighbour.communicate("")
    assert result.failures == {}
    assert sorted(point.state for point in result.points) == ["finished", "stopped"]
    assert {group["state"] for group in cluster.util.placement_group_table().values()} == {"REMOVED"}
    alive = {one["ActorClassName"] for one in actors().values() if one["State"] != "DEAD"}
    assert alive <= {"_AutoscalingCoordinatorActor"}  # Ray keeps one in a cluster, whatever runs in it
    end = time.monotonic() + 20
    while cluster.available_resources().get("CPU") != 2.0:  # type: ignore[no-untyped-call]
        assert time.monotonic() < end, "CPUs are held still"
        time.sleep(0.2)
    assert not list(tmp_path.rglob("checkpoints"))


SPACE = """\
name: small
settings:
  data: {data}
  teacher: scratch
  scratch: {{layers: 2, hidden: 16, heads: 2, feed_forward: 32}}
  model.query_size: 8
  student.layers: 1
  learning_rate: 2.0e-3
  epochs: 1
space:
  distill.beta: {{grid: [0.0, 0.2]}}
seeds: [0]
keep_students: 1
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("no_ray")
def test_a_sweep_in_a_bucket_resumes_on_another_machine(
    bucket: S3,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A dead machine's disk is lost: its trials would be trained again, or counted twice."""
    place = f"{bucket.url}/sweep"
    names = [path.relative_to(shards).as_posix() for path in shards.rglob("*") if path.is_file()]
    Remote(f"{bucket.url}/shards").upload(shards, names)
    (tmp_path / "space.yaml").write_text(SPACE.format(data=f"{bucket.url}/shards"))
    finish = Trials.finish

    def interrupted(self: Trials, *args: object, **values: object) -> None:
        finish(self, *args, **values)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as first:
        first.setattr(Trials, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep(tmp_path / "space.yaml", out=place, concurrency=1)
    assert f"--out {place} --resume" in capsys.readouterr().out
    there = Remote(place).files()
    assert [name.split("/")[1] for name in there if name.endswith(RECORD)] == ["beta=0,seed=0"]
    monkeypatch.setenv("NEWSBERT_CACHE", str(tmp_path / "another machine"))
    monkeypatch.setattr(lease, "WAIT_SECONDS", 1.0)
    result = sweep(tmp_path / "space.yaml", out=place, concurrency=1, resume=True)
    output = capsys.readouterr().out
    assert "1 of them have ended before" in output
    assert "checkpoints 0 B now" in output
    assert "at most 0 B" not in output
    assert result.failures == {}
    assert len([point for point in result.points if point.state == "finished"]) == 2
    there = Remote(place).files()
    assert {"sweep.json", "optuna.journal", "report/report.html", "events.jsonl"} <= there.keys()
    assert len([name for name in there if name.endswith("student/top.json")]) == 1
    assert not [name for name in there if "/checkpoints/" in name]
    for trial in ("beta=0,seed=0", "beta=0.2,seed=0"):
        record = json.loads(Remote(place).read(f"trials/{trial}/{RECORD}") or b"")
        assert record["settings"]["out"] == f"{place}/trials/{trial}"
        assert record["settings"]["data"] == f"{bucket.url}/shards"
        assert not WorkDir(f"{place}/trials/{trial}").path.exists()
    plan = json.loads(Remote(place).read("sweep.json") or b"")
    assert plan["state"] == "finished"
