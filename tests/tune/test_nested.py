"""Trials that are groups of workers, under Tune: stopped, killed, resumed, and nothing of them left."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from newsbert_ray.config import TrainSettings
from newsbert_ray.ray_session import RaySession, environment, ray_session
from newsbert_ray.record import METRICS, read_entries, read_record
from newsbert_ray.training.ray_group import GROUP_FOLDER, rank_zero_lock
from newsbert_ray.tune import ray_tune as nested
from newsbert_ray.tune.ray_tune import Caretaker

MakeSettings = Callable[..., TrainSettings]
SHARED = {"_AutoscalingCoordinatorActor"}
"""Actors that Ray keeps once in a cluster, whatever runs in it."""


@pytest.fixture
def two_cpus() -> Iterator[RaySession]:
    """A private session with just the CPUs of one group, and without the dashboard."""
    with ray_session(cpus=2) as session:
        yield session


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many placement groups each look finds, instead of asking a cluster."""
    left: list[int] = []
    monkeypatch.setattr(nested, "release_orphans", lambda: left.pop(0) if left else 0)
    return left


def test_looks_only_so_often(held: list[int]) -> None:
    """Tune's loop turns hundreds of times a second: asking each time would slow every trial down."""
    held += [1, 1, 1]
    caretaker = Caretaker(seconds=0.2)
    for _ in range(100):
        caretaker.tick()
    assert len(held) == 3
    time.sleep(0.25)
    caretaker.tick()
    caretaker.tick()
    assert len(held) == 2


def test_an_end_is_waited_for_but_not_for_ever(held: list[int]) -> None:
    """A placement group that Ray does not take back must not keep the sweep from ending."""
    held += [2, 1]
    assert Caretaker().settle(seconds=5.0)
    held += [1] * 100
    assert not Caretaker().settle(seconds=0.3)


def test_checkpoints_go_when_nobody_writes_any_more(held: list[int], tmp_path: Path) -> None:
    """A worker on its way out writes one more after the sweep has tidied up; it would stay for good."""
    (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / GROUP_FOLDER).mkdir()
    (tmp_path / METRICS).touch()
    caretaker = Caretaker(seconds=0.0)
    caretaker.tick()
    assert (tmp_path / "checkpoints").exists()
    caretaker.ended(tmp_path)
    with rank_zero_lock(tmp_path):
        caretaker.tick()
        assert (tmp_path / "checkpoints").exists()
        assert not caretaker.settle(seconds=0.2)
    assert caretaker.settle(seconds=0.0)
    assert not (tmp_path / "checkpoints").exists()
    assert not (tmp_path / GROUP_FOLDER).exists()
    assert (tmp_path / METRICS).exists()


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_trial_stopped_then_killed_then_finished(
    two_cpus: RaySession, make_settings: MakeSettings, tmp_path: Path
) -> None:
    """What a stopped or killed trial's group holds, every later trial waits for: in silence, for ever.

    Three starts of one run, each after the other's end: Tune stops the first at its first report, the second
    dies at its first, and Tune starts it again. There are CPUs for one group alone.
    """
    import ray
    from ray import tune

    settings = make_settings(workers=2, epochs=4)
    run = Path(settings.out)
    caretaker, seen = Caretaker(seconds=0.5), tmp_path / "seen.jsonl"
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
                stop=lambda _, result: result["way"] == "stopped",
                callbacks=[ticking(caretaker)],
                failure_config=tune.FailureConfig(max_failures=1),
            ),
        ).fit()
    assert results.num_errors == 0
    caretaker.ended(run)
    assert caretaker.settle()
    assert actors_alive() <= SHARED
    assert {one["state"] for one in ray.util.placement_group_table().values()} == {"REMOVED"}
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


def ticking(caretaker: Caretaker) -> Any:
    """What a sweep's callback does at each turn of Tune's loop."""
    from ray import tune

    class Ticking(tune.Callback):
        def __getstate__(self) -> dict[str, Any]:
            return {}

        def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
            caretaker.tick()

    return Ticking()


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
