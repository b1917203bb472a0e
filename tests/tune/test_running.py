"""The shell around Tune, as far as it goes without Ray: what is handed out, and why a trial has no value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import RayActorError
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from newsbert_ray.config import SettingsError
from newsbert_ray.tune.jobs import Job, Jobs
from newsbert_ray.tune.memory import Memory
from newsbert_ray.tune.running import _Queue, _reason
from newsbert_ray.tune.space import trial_settings
from newsbert_ray.tune.space_file import read_space

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
        return trial_settings(space, job.point, seed=job.seed, out=job.out, overrides={}).model_dump()

    queue = _Queue(jobs, config, slots=1)
    handed = 0
    while (found := queue.suggest(str(handed))) != Searcher.FINISHED:
        assert found["out"] == str(queue.running[str(handed)].out)
        jobs.finish(queue.running.pop(str(handed)), value=0.5)
        handed += 1
    assert handed == 5
    (failed,) = [result for result in jobs.results.values() if result.failures]
    assert failed.point == {"student.layers": 4, "model.teacher_layers": 6}
    assert "6 teacher layers do not divide into 4 student layers" in failed.failures[0]
    assert jobs.unfinished == 0
    with pytest.raises(SettingsError):
        config(Job("", failed.label, failed.point, 0, tmp_path))


def given_up(error: Callable[[], BaseException | None]) -> Trial:
    """A trial that Tune gave up."""
    return cast(Trial, SimpleNamespace(get_pickled_error=error))


def test_only_a_dead_process_is_called_one() -> None:
    """A person buys memory for a fault in the settings."""

    def unreadable() -> BaseException:
        raise TypeError("missing 1 argument")

    died = "its process died 3 times, for want of memory perhaps"
    assert _reason(given_up(lambda: RayActorError(error_msg="The actor died.\nIts frames"))).startswith(died)
    assert _reason(given_up(lambda: None)) == died
    raised = RuntimeError("a whole trace")
    raised.cause = OSError("no space left\nand more")  # type: ignore[attr-defined]
    assert _reason(given_up(lambda: raised)) == "OSError: no space left"
    assert _reason(given_up(unreadable)) == "TypeError: missing 1 argument"
