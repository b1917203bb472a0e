"""The shell around Tune, as far as it goes without Ray: what is handed out, and why a trial has no value."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import RayActorError
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from newsbert_ray.config import SettingsError
from newsbert_ray.training.loop import PreemptedError
from newsbert_ray.tune.ray_tune import Queue, _error, _machine_gone, _reason
from newsbert_ray.tune.space import trial_settings
from newsbert_ray.tune.space_file import read_space
from newsbert_ray.tune.study import Memory
from newsbert_ray.tune.trials import Budget, Job, Jobs

WriteSpace = Callable[..., Path]

SPACE = """\
name: deep
settings: {data: nowhere, teacher: scratch, scratch: {layers: 8}}
space:
  student.layers: {choice: [1, 2, 4]}
  model.teacher_layers: {choice: [8, 6]}
search: {sampler: random, trials: 30}
"""


def test_a_combination_that_cannot_be_fails_alone(write_space: WriteSpace, tmp_path: Path) -> None:
    """The sampler joins 4 student layers with 6 of the teacher, and the sweep dies on it at every resume."""
    space = read_space(write_space(SPACE))
    jobs = Jobs(space, Memory(space, tmp_path), tmp_path)

    def config(job: Job) -> Mapping[str, Any]:
        settings = trial_settings(space, job.point, seed=job.seed, out=job.out, overrides={})
        return {"settings": settings.model_dump()}

    refused: list[Job] = []
    queue = Queue(jobs, config, slots=1, budget=Budget(jobs, cpus=1, gpus=0), refused=refused.append)
    handed = 0
    while (found := queue.suggest(str(handed))) != Searcher.FINISHED:
        assert found["settings"]["out"] == str(queue.running[str(handed)].job.out)
        jobs.finish(queue.running.pop(str(handed)).job, values=(0.5,))
        handed += 1
    assert handed == 5
    (failed,) = [result for result in jobs.results.values() if result.failures]
    assert failed.point == {"student.layers": 4, "model.teacher_layers": 6}
    assert [job.label for job in refused] == [failed.label]
    assert "6 teacher layers do not divide into 4 student layers" in failed.failures[0]
    assert jobs.unfinished == 0
    with pytest.raises(SettingsError):
        config(Job("", failed.label, failed.point, 0, tmp_path))


def test_no_trial_starts_past_a_limit(write_space: WriteSpace, tmp_path: Path) -> None:
    """A sweep over night spends twice what it may; or it ends while a running trial could still make room."""
    space = read_space(write_space(SPACE + "limits: {cost: 10}\nprices: {cpu_hour: 3}\n"))
    jobs = Jobs(space, Memory(space, tmp_path), tmp_path)
    budget = Budget(jobs, cpus=2, gpus=0)

    def config(job: Job) -> Mapping[str, Any]:
        return {"settings": {"epochs": 2}}

    queue = Queue(jobs, config, slots=2, budget=budget, refused=lambda job: None)
    assert queue.suggest("a") is not None
    jobs.finish(queue.running.pop("a").job, values=(0.5,), seconds=1800.0)
    assert budget.spent() == pytest.approx(3.0)
    assert queue.suggest("b") is not None
    assert queue.suggest("c") is not None  # 3 spent, 3 expected of each
    jobs.finish(queue.running.pop("b").job, values=(0.5,), seconds=1800.0)
    assert queue.suggest("d") is None
    assert jobs.closed == ""
    jobs.finish(queue.running.pop("c").job, values=(0.5,), seconds=1800.0)
    assert queue.suggest("d") == Searcher.FINISHED
    assert jobs.closed == "limits.cost = 10 leaves no money for another trial"


def test_the_sweep_ends_at_its_target(write_space: WriteSpace, tmp_path: Path) -> None:
    """A good enough point is found in the first hour, and the sweep runs until the morning."""
    space = read_space(write_space(SPACE + "limits: {target: 0.6}\n"))
    jobs = Jobs(space, Memory(space, tmp_path), tmp_path)
    queue = Queue(
        jobs,
        lambda job: {"settings": {"epochs": 2}},
        slots=2,
        budget=Budget(jobs, cpus=1, gpus=0),
        refused=lambda job: None,
    )
    for name, value in (("a", 0.5), ("b", 0.7)):
        assert queue.suggest(name) not in (None, Searcher.FINISHED)
        jobs.finish(queue.running.pop(name).job, values=(value,))
    assert queue.suggest("c") == Searcher.FINISHED
    assert "reached limits.target = 0.6 (0.7000)" in jobs.closed


def test_only_a_dead_process_is_called_one() -> None:
    """A person buys memory for a fault in the settings."""
    died = "its process died 3 times, for want of memory perhaps"
    assert _reason(RayActorError(error_msg="The actor died.\nIts frames")).startswith(died)
    assert _reason(None) == died
    raised = RuntimeError("a whole trace")
    raised.cause = OSError("no space left\nand more")  # type: ignore[attr-defined]
    assert _reason(raised) == "OSError: no space left"


class Unreadable(Exception):
    """An exception that cannot be made again from its text, as many are."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(one + other)


def test_an_error_that_cannot_be_read_is_said_to_be_one(tmp_path: Path) -> None:
    """Whatever a trial raises, the sweep goes on."""
    path = tmp_path / "error.pkl"
    path.write_bytes(pickle.dumps(Unreadable("a", "b")))
    assert isinstance(_error(cast(Trial, SimpleNamespace(pickled_error_file=str(path)))), TypeError)
    path.write_bytes(pickle.dumps(OSError("no space left")))
    assert str(_error(cast(Trial, SimpleNamespace(pickled_error_file=str(path))))) == "no space left"


def test_a_machine_that_is_gone_is_not_the_trials_fault() -> None:
    """Three spot machines taken away, and a sound trial counts as failed."""
    warned = RuntimeError("a trace")
    warned.cause = PreemptedError("about to be taken away")  # type: ignore[attr-defined]
    assert _machine_gone(warned)
    assert _machine_gone(RayActorError(error_msg="The actor died because its node has died."))
    assert not _machine_gone(RayActorError(error_msg="The actor died: worker exit by SIGKILL"))
    assert not _machine_gone(None)


def test_a_trial_goes_on_as_often_as_it_may(write_space: WriteSpace, tmp_path: Path) -> None:
    """A trial that kills its process each time must end; one whose machines go must not, and must not be
    forgotten when all others have been handed out."""
    space = read_space(write_space(SPACE.replace("trials: 30", "trials: 1")))
    jobs = Jobs(space, Memory(space, tmp_path), tmp_path)
    queue = Queue(
        jobs,
        lambda job: {"settings": {"epochs": 2}},
        slots=2,
        budget=Budget(jobs, cpus=1, gpus=0),
        refused=lambda job: None,
    )
    faults = [False, True, False, True, False]
    for number, counted in enumerate(faults):
        assert isinstance(queue.suggest(str(number)), dict)
        assert queue.suggest("more") is None
        running = queue.running.pop(str(number))
        running.began = 5.0
        assert queue.again(running, counted=counted, most=2)
    assert isinstance(queue.suggest("further"), dict)
    assert queue.again(queue.running.pop("further"), counted=True, most=2, reached=1.0), "it gets on"
    assert isinstance(queue.suggest("and"), dict)
    assert queue.again(queue.running.pop("and"), counted=True, most=2, reached=1.0)
    assert isinstance(queue.suggest("last"), dict)
    running = queue.running.pop("last")
    assert running.began == 5.0, "its time goes on"
    assert not queue.again(running, counted=True, most=2, reached=1.0)
    jobs.finish(running.job, values=None, failure="died")
    assert queue.suggest("none") == Searcher.FINISHED
