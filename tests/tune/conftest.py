"""Shared by the tests of sweeps: a search space in a file, a stand-in for training, one Ray session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from newsbert_ray.config import TrainSettings
from newsbert_ray.ray_session import RaySession, ray_session
from newsbert_ray.record import RunRecord

if TYPE_CHECKING:
    from newsbert_ray.tune.trial import Train

WriteSpace = Callable[..., Path]
MakeTrain = Callable[..., "Train"]

SPACE = """\
name: small
settings: {data: nowhere, teacher: scratch, epochs: 2}
space:
  distill.beta: {grid: [0.0, 0.2]}
  student.layers: {grid: [1, 2]}
seeds: [0]
"""


@pytest.fixture
def write_space(tmp_path: Path) -> WriteSpace:
    """write_space(text) -> the file; write_space(old=new) changes the usual one by replacement."""

    def write(text: str = SPACE, **changes: str) -> Path:
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "space.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


class SharedRay:
    """One Ray session for the tests of a file; closed where a test starts its own."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._session: RaySession | None = None

    def open(self) -> RaySession:
        """The session, started if it is not running."""
        if self._session is None:
            self._session = self._stack.enter_context(ray_session(cpus=2))
        return self._session

    def close(self) -> None:
        """End the session, if it is running."""
        self._stack.close()
        self._session = None


@pytest.fixture(scope="module")
def shared_ray() -> Iterator[SharedRay]:
    """Closed at the end of the file: the next file in this process may need another environment."""
    shared = SharedRay()
    yield shared
    shared.close()


@pytest.fixture
def ray(shared_ray: SharedRay) -> RaySession:
    """A running session with two CPUs, shared with other tests."""
    return shared_ray.open()


@pytest.fixture
def no_ray(shared_ray: SharedRay) -> None:
    """No session runs: the test starts its own, with its own environment."""
    shared_ray.close()


@pytest.fixture
def make_train() -> MakeTrain:
    """A stand-in for training: its accuracy is 0.5 + beta + 0.01 x layers + 0.1 x seed.

    make_train(fails={"distill.beta": 0.2}) raises where all of these settings hold. Each start leaves a line
    in starts.txt of the trial's folder.
    """
    return stand_in


def stand_in(*, fails: dict[str, Any] | None = None) -> Train:
    """See make_train. All it needs is inside, because it travels to an actor that has no tests."""

    def train(settings: TrainSettings, *, report: Any, quiet: bool) -> RunRecord:
        from pathlib import Path

        from newsbert_ray.record import RECORD, read_record, write_record
        from newsbert_ray.settings import flatten

        folder = Path(settings.out)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "starts.txt").open("a") as file:
            file.write("start\n")
        if (folder / RECORD).exists():
            return read_record(folder)
        flat = flatten(settings.model_dump())
        accuracy = 0.5 + settings.distill.beta + 0.01 * settings.student.layers + 0.1 * settings.seed
        both = {"accuracy": accuracy, "macro_f1": accuracy}
        entry = {
            "step": 1,
            "epoch": 1.0,
            "validation": {"student": both, "teacher": both},
            "train": {"loss": 1.0},
        }
        report(entry)
        if fails and all(flat[name] == value for name, value in fails.items()):
            raise ValueError("the loss is not a number")
        record = RunRecord(
            settings=settings.model_dump(),
            seed=settings.seed,
            versions={},
            hardware={},
            seconds={"total": 1.0},
            layer_map=[[1]],
            metrics={"validation": entry["validation"], "test": entry["validation"]},
            curve=[entry],
            data={},
            steps=1,
            titles_per_second=1.0,
        )
        write_record(folder, record)
        return record

    return train
