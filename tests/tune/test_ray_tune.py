"""Running trials with Ray Tune: which trials start, why one failed, and what a worker group leaves behind."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import RayActorError
from ray.tune.experiment import Trial
from ray.tune.search import Searcher
from rich.console import Console

from newsbert_ray.config import TrainSettings
from newsbert_ray.ray_session import RaySession, environment
from newsbert_ray.record import METRICS, read_entries, read_record
from newsbert_ray.reporting.sweep_data import Trial as SweepTrial
from newsbert_ray.storage.workdir import WorkDir
from newsbert_ray.training.loop import PreemptedError
from newsbert_ray.training.ray_group import GROUP_FOLDER, rank_zero_lock
from newsbert_ray.tune import ray_tune
from newsbert_ray.tune.ray_tune import (
    SweepCallback,
    TrialSearcher,
    _failure_reason,
    _machine_lost,
    _read_error,
    release_groups,
    wait_for_groups,
)
from newsbert_ray.tune.space_file import read_space
from newsbert_ray.tune.study import SweepStudy
from newsbert_ray.tune.trial import CONFIG, TrialConfig, trial_settings
from newsbert_ray.tune.trials import Budget, Resources, Retention, Trials

WriteSpace = Callable[..., Path]
MakeSearcher = Callable[..., tuple[TrialSearcher, list[str]]]

SPACE = """\
name: deep
settings: {data: nowhere, teacher: scratch, scratch: {layers: 8}}
space:
  student.layers: {choice: [1, 2, 4]}
  model.teacher_layers: {choice: [8, 6]}
search: {sampler: random, trials: 30}
"""


@pytest.fixture
def make_searcher(write_space: WriteSpace, tmp_path: Path) -> MakeSearcher:
    """make_searcher(text) -> a searcher over this search space, and the names it shows as ended."""

    def make(text: str = SPACE, *, slots: int = 2, cpus: float = 1) -> tuple[TrialSearcher, list[str]]:
        space = read_space(write_space(text))
        trials = Trials(space, SweepStudy(space, tmp_path), WorkDir.at(tmp_path))
        shown: list[str] = []
        resources = Resources(slots=slots, cpus=cpus, gpus=0)

        def config(trial: SweepTrial) -> TrialConfig:
            out = trials.out(trial.name)
            settings = trial_settings(space, trial.point, seed=trial.seed, out=out, overrides={})
            return TrialConfig(settings, metrics=(space.metric,), failures=WorkDir("failures"))

        sweep: Any = SimpleNamespace(
            trials=trials,
            resources=resources,
            budget=Budget(trials, resources),
            display=SimpleNamespace(ended=lambda trial: shown.append(trial.name)),
            to_restart={},
        )
        return TrialSearcher(cast(SweepCallback, sweep), config), shown

    return make


def finish(searcher: TrialSearcher, name: str, value: float, seconds: float | None = None) -> None:
    """End a running trial with this value."""
    searcher._sweep.trials.finish(searcher._sweep.trials.running.pop(name).trial, (value,), seconds=seconds)


def test_an_impossible_combination_fails_alone(make_searcher: MakeSearcher) -> None:
    """The sampler joins 4 student layers with 6 of the teacher, and the sweep ends there at every resume."""
    searcher, shown = make_searcher(slots=1)
    started = 0
    while (config := searcher.suggest(str(started))) != Searcher.FINISHED:
        assert config[CONFIG].settings.out.endswith(searcher._sweep.trials.running[str(started)].trial.name)
        finish(searcher, str(started), 0.5)
        started += 1
    assert started == 5
    (failed,) = [point for point in searcher._sweep.trials.points.values() if point.state == "failed"]
    assert failed.values == {"student.layers": 4, "model.teacher_layers": 6}
    assert shown == [failed.trials[0].name]
    assert "6 teacher layers do not divide into 4 student layers" in failed.trials[0].reason
    assert searcher._sweep.trials.unfinished == 0


def test_no_trial_starts_past_a_limit(make_searcher: MakeSearcher) -> None:
    """A sweep spends twice its limit overnight; or it ends while a running trial could still make room."""
    searcher, _ = make_searcher(SPACE + "limits: {cost: 10}\nprices: {cpu_hour: 3}\n", cpus=2)
    assert searcher.suggest("a") is not None
    finish(searcher, "a", 0.5, seconds=1800.0)
    assert searcher._sweep.budget.spent() == pytest.approx(3.0)
    assert searcher.suggest("b") is not None
    assert searcher.suggest("c") is not None  # 3 spent, 3 expected of each
    finish(searcher, "b", 0.5, seconds=1800.0)
    assert searcher.suggest("d") is None
    assert searcher._sweep.trials.end_reason == ""
    finish(searcher, "c", 0.5, seconds=1800.0)
    assert searcher.suggest("d") == Searcher.FINISHED
    assert searcher._sweep.trials.end_reason == "limits.cost = 10 leaves no money for another trial"


def test_the_sweep_ends_at_its_target(make_searcher: MakeSearcher) -> None:
    """A good enough point is found in the first hour, and the sweep goes on all night."""
    searcher, _ = make_searcher(SPACE + "limits: {target: 0.6}\n")
    for name, value in (("a", 0.5), ("b", 0.7)):
        assert searcher.suggest(name) not in (None, Searcher.FINISHED)
        finish(searcher, name, value)
    assert searcher.suggest("c") == Searcher.FINISHED
    assert "reached limits.target = 0.6 (0.7000)" in searcher._sweep.trials.end_reason


def test_only_a_dead_process_is_called_one() -> None:
    """A person buys memory for a fault in the settings."""
    died = "its process died 3 times, perhaps out of memory"
    assert _failure_reason(RayActorError(error_msg="The actor died.\nIts frames")).startswith(died)
    assert _failure_reason(None) == died
    raised = RuntimeError("a whole trace")
    raised.cause = OSError("no space left\nand more")  # type: ignore[attr-defined]
    assert _failure_reason(raised) == "OSError: no space left"


class Unreadable(Exception):
    """An exception that cannot be unpickled, like many."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(one + other)


def test_an_unreadable_error_is_reported_as_one(tmp_path: Path) -> None:
    """Whatever a trial raises, the sweep goes on."""
    path = tmp_path / "error.pkl"
    path.write_bytes(pickle.dumps(Unreadable("a", "b")))
    assert isinstance(_read_error(cast(Trial, SimpleNamespace(pickled_error_file=str(path)))), TypeError)
    path.write_bytes(pickle.dumps(OSError("no space left")))
    assert str(_read_error(cast(Trial, SimpleNamespace(pickled_error_file=str(path))))) == "no space left"


def test_a_lost_machine_is_not_the_trials_fault() -> None:
    """Three spot machines taken away, and a sound trial counts as failed."""
    warned = RuntimeError("a trace")
    warned.cause = PreemptedError("about to be taken away")  # type: ignore[attr-defined]
    assert _machine_lost(warned)
    assert _machine_lost(RayActorError(error_msg="The actor died because its node has died."))
    assert not _machine_lost(RayActorError(error_msg="The actor died: worker exit by SIGKILL"))
    assert not _machine_lost(None)


def test_a_trial_is_retried_as_often_as_it_may(make_searcher: MakeSearcher) -> None:
    """A trial that kills its process each time must end; one whose machines go must not, and must not be
    forgotten when all others have been handed out."""
    searcher, _ = make_searcher(SPACE.replace("trials: 30", "trials: 1"))
    for number, machine_lost in enumerate([True, False, True, False, True]):
        assert isinstance(searcher.suggest(str(number)), dict)
        assert searcher.suggest("more") is None
        running = searcher._sweep.trials.running.pop(str(number))
        running.began = 5.0
        assert SweepCallback.retry(searcher._sweep, running, machine_lost=machine_lost)
    for name in ("after an epoch", "again"):
        assert isinstance(searcher.suggest(name), dict)
        running = searcher._sweep.trials.running.pop(name)
        running.numbers = {"epoch": 1.0}
        assert SweepCallback.retry(searcher._sweep, running, machine_lost=False)
    assert isinstance(searcher.suggest("last"), dict)
    running = searcher._sweep.trials.running.pop("last")
    assert running.began == 5.0, "its clock goes on"
    assert not SweepCallback.retry(searcher._sweep, running, machine_lost=False)
    searcher._sweep.trials.fail(running.trial, "died")
    assert searcher.suggest("none") == Searcher.FINISHED


MakeSettings = Callable[..., TrainSettings]
SHARED = {"_AutoscalingCoordinatorActor"}
"""Actors that Ray keeps once in a cluster, whatever runs in it."""


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many placement groups each call finds, instead of asking a cluster."""
    left: list[int] = []
    monkeypatch.setattr(ray_tune, "release_orphans", lambda: left.pop(0) if left else 0)
    return left


@pytest.fixture
def retention(tmp_path: Path) -> Retention:
    """Of a sweep in tmp_path with nested trials."""
    trials: Any = SimpleNamespace(
        workdir=WorkDir.at(tmp_path), ended={}, space=SimpleNamespace(goals=[], keep_students=1)
    )
    return Retention(trials, Resources(slots=1, cpus=1.0, gpus=0.0, workers=2), checkpoints=1)


def trial_in(folder: Path) -> Path:
    """The folder of a trial of the sweep in `folder`."""
    return folder / "trials" / "one"


def test_cleanup_runs_only_so_often(
    held: list[int], write_space: WriteSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune's loop runs hundreds of times a second: asking each time would slow every trial down."""
    monkeypatch.setattr(ray_tune, "STATUS_SECONDS", 0.2)
    monkeypatch.setattr("ray.nodes", list)
    calls: list[str] = []
    space = read_space(write_space(SPACE))
    trials = Trials(space, SweepStudy(space, tmp_path), WorkDir.at(tmp_path))
    first = trial_settings(space, {}, seed=0, out="out", overrides={})
    resources = Resources(slots=1, cpus=1.0, gpus=0.0, workers=2)
    check = partial(calls.append, "check")
    callback = SweepCallback(trials, first, resources, console=Console(), check=check)
    monkeypatch.setattr(callback.display, "tick", partial(calls.append, "tick"))
    held += [1, 1, 1]
    for _ in range(100):
        callback.on_step_end(0, [])
    assert len(held) == 2
    assert calls == ["check", "tick"] * 100
    time.sleep(0.25)
    callback.on_step_end(0, [])
    callback.on_step_end(0, [])
    assert len(held) == 1


def test_the_end_waits_for_cleanup_but_not_for_ever(held: list[int], retention: Retention) -> None:
    """A placement group that Ray does not release must not keep the sweep from ending."""
    held += [2, 1]
    assert wait_for_groups(retention, seconds=5.0)
    held += [1] * 100
    assert not wait_for_groups(retention, seconds=0.3)


def test_checkpoints_are_removed_when_nobody_writes_any_more(
    held: list[int], retention: Retention, tmp_path: Path
) -> None:
    """A worker that is ending writes one more after the sweep has cleaned up; it would stay for ever."""
    folder = trial_in(tmp_path)
    (folder / "checkpoints" / "step-1").mkdir(parents=True)
    (folder / GROUP_FOLDER).mkdir()
    (folder / METRICS).touch()
    release_groups(retention)
    assert (folder / "checkpoints").exists()
    with rank_zero_lock(folder):
        retention.ended("one")
        assert (folder / "checkpoints").exists()
        assert not wait_for_groups(retention, seconds=0.2)
    assert wait_for_groups(retention, seconds=0.0)
    assert not (folder / "checkpoints").exists()
    assert not (folder / GROUP_FOLDER).exists()
    assert (folder / METRICS).exists()


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_trial_stopped_then_killed_then_finished(
    ray: RaySession, make_settings: MakeSettings, retention: Retention, tmp_path: Path
) -> None:
    """Later trials would wait for ever for what a stopped or killed trial's group still holds.

    Three starts of one run, each after the other's end: Tune stops the first at its first report, the second
    dies at its first, and Tune starts it again. There are CPUs for one group alone.
    """
    import ray as cluster
    from ray import tune

    run, seen = trial_in(tmp_path), tmp_path / "seen.jsonl"
    settings = make_settings(workers=2, epochs=4, out=str(run))  # shorter ones end before they are stopped
    with environment({"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}):
        results = tune.Tuner(
            tune.with_resources(nested_trial(), {"CPU": 0, "node:__internal_head__": 0.001}),
            param_space={
                "settings": settings.model_dump(),
                "seen": str(seen),
                "way": tune.grid_search(["stopped", "killed"]),
            },
            tune_config=tune.TuneConfig(max_concurrent_trials=1, reuse_actors=False),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(tmp_path / "tune"),
                verbose=0,
                stop=lambda _, result: result.get("way") == "stopped",
                callbacks=[releasing(retention)],
                failure_config=tune.FailureConfig(max_failures=1),
            ),
        ).fit()
    assert results.num_errors == 0
    retention.ended("one")
    assert wait_for_groups(retention)
    assert actors_alive() <= SHARED
    assert {one["state"] for one in cluster.util.placement_group_table().values()} == {"REMOVED"}
    assert_free(cpus=2.0)
    record = read_record(run)
    assert record.hardware["workers"] == 2
    evaluations = [e for e in read_entries(run / METRICS) if e["kind"] == "evaluation"]
    assert [e["epoch"] for e in evaluations] == [1.0, 2.0, 3.0, 4.0]
    starts = [json.loads(line) for line in seen.read_text().splitlines()]
    assert [start["way"] for start in starts if "begins" in start] == ["stopped", "killed", "killed"]
    epochs = [start["epoch"] for start in starts if "epoch" in start]
    assert epochs[0] == 1.0
    assert epochs[-1] == 4.0
    assert {start["thread"] for start in starts if "epoch" in start} == {True}
    assert not (run / "checkpoints").exists()
    assert not (run / GROUP_FOLDER).exists()


def nested_trial() -> Callable[[Mapping[str, Any]], None]:
    """A trial's function. All it needs is inside, because it travels to an actor that has no tests."""

    def trial(config: Mapping[str, Any]) -> None:
        import json
        import os
        import signal
        import threading

        from ray import tune

        from newsbert_ray.config import TrainSettings
        from newsbert_ray.training.run import train

        here = threading.get_ident()

        def note(**values: Any) -> None:
            with open(config["seen"], "a") as file:
                file.write(json.dumps(values) + "\n")

        def report(entry: dict[str, Any]) -> None:
            note(epoch=entry["epoch"], thread=threading.get_ident() == here)
            with open(config["seen"]) as file:
                starts = file.read().count("begins")
            if starts == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            tune.report({"epoch": entry["epoch"], "way": config["way"]})

        note(begins=True, way=config["way"])
        train(TrainSettings.model_validate(config["settings"]), report=report, quiet=True)

    return trial


def releasing(retention: Retention) -> Any:
    """What a sweep's callback does now and then in Tune's loop."""
    from ray import tune

    class Releasing(tune.Callback):
        last = 0.0

        def __getstate__(self) -> dict[str, Any]:
            return {}

        def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
            if time.monotonic() - self.last > 0.5:
                release_groups(retention)
                self.last = time.monotonic()

    return Releasing()


def actors_alive() -> set[str]:
    """Classes of the actors that the cluster knows to be alive."""
    from ray._private.state import actors

    return {one["ActorClassName"] for one in actors().values() if one["State"] != "DEAD"}


def assert_free(*, cpus: float, seconds: float = 20.0) -> None:
    """Ray tells its free CPUs a moment late."""
    import ray

    end = time.monotonic() + seconds
    while (free := ray.available_resources()).get("CPU") != cpus:  # type: ignore[no-untyped-call]
        assert time.monotonic() < end, free
        time.sleep(0.2)
