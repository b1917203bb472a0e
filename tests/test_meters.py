"""What reaches Prometheus: the loop's own numbers, once, and nothing where there is no Ray."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from newsbert_ray import telemetry as meters
from newsbert_ray.telemetry import METERS, STATES, RunMeters, SweepMeters, exported_name
from newsbert_ray.training.run import train
from tests.conftest import MakeSettings

Series = dict[tuple[str, ...], float]


class Board:
    """Stands in for Ray's metrics: gauges hold the last value, counters the sum, by name and tag values."""

    def __init__(self) -> None:
        self.gauges: Series = {}
        self.counters: Counter[tuple[str, ...]] = Counter()

    def gauge(self, name: str) -> Any:
        return _Meter(name, lambda key, value: self.gauges.__setitem__(key, value))

    def counter(self, name: str) -> Any:
        return _Meter(name, lambda key, value: self.counters.update({key: value}))


class _Meter:
    def __init__(self, name: str, put: Any) -> None:
        self._name, self._put = name, put

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert tags.keys() == set(METERS[self._name].tags)  # Ray raises on any other
        self._put((self._name, *(tags[tag] for tag in METERS[self._name].tags)), value)

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0  # Ray raises on any other
        self.set(value, tags)


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    """A process in which Ray is there, and what is told to it."""
    found = Board()
    monkeypatch.setattr(meters, "_ray_is_there", lambda: True)
    monkeypatch.setattr(meters, "_gauge", found.gauge)
    monkeypatch.setattr(meters, "_counter", found.counter)
    return found


def log(step: int, *, train: float, data: float, speed: float = 100.0) -> dict[str, Any]:
    """A log entry of the loop after so many seconds."""
    seconds = {"train": train, "data": data, "evaluate": 0.0}
    return {
        "kind": "log",
        "step": step,
        "epoch": 1,
        "titles_per_second": speed,
        "train": {"total": 3.0 / step, "student_task": 1.0},
        "seconds": seconds,
    }


EVALUATION = {
    "kind": "evaluation",
    "step": 2,
    "epoch": 0.5,
    "validation": {
        "student": {"accuracy": 0.6, "accuracy_error": 0.01, "rows": 397.0},
        "teacher": {"accuracy": 0.7},
    },
    "train": {},
}


def test_seconds_and_titles_are_counted_once(board: Board) -> None:
    """Counted from each entry's total anew, a run of an hour would show days of waiting."""
    report = RunMeters("runs/first")
    report(log(1, train=1.0, data=0.5))
    report(log(5, train=3.0, data=1.0))
    assert board.counters["newsbert_seconds", "first", "train"] == 3.0
    assert board.counters["newsbert_seconds", "first", "data"] == 1.0
    assert board.counters["newsbert_titles", "first"] == pytest.approx(100 * 4.0)
    assert ("newsbert_seconds", "first", "evaluate") not in board.counters


def test_a_resumed_run_does_not_count_its_first_start_again(board: Board) -> None:
    """The seconds before the break were counted by the process that spent them."""
    report = RunMeters("runs/first")
    report(log(20, train=30.0, data=9.0))
    assert not board.counters
    report(log(25, train=31.0, data=9.5))
    assert board.counters["newsbert_seconds", "first", "train"] == 1.0
    assert board.counters["newsbert_titles", "first"] == pytest.approx(150.0)


def test_an_evaluation_is_told_with_each_later_log(board: Board) -> None:
    """Ray forgets a gauge that is not set: validation would be seen for 20 seconds of an epoch."""
    report = RunMeters("runs/first")
    report(dict(EVALUATION))
    key = ("newsbert_validation", "first", "", "student", "accuracy")
    assert board.gauges[key] == 0.6
    board.gauges.clear()
    report(log(5, train=1.0, data=0.5))
    assert board.gauges[key] == 0.6
    assert board.gauges["newsbert_loss", "first", "", "total"] == pytest.approx(0.6)
    assert board.gauges["newsbert_step", "first", ""] == 5
    assert {key[-1] for key in board.gauges if key[0] == "newsbert_validation"} == {"accuracy"}


def test_a_trial_bears_its_sweep_and_its_name(board: Board) -> None:
    """400 trials without their sweep's name cannot be summed; counters with a trial's name stay for ever."""
    report = RunMeters("runs/beta/trials/distill.beta=0.1,seed=0")
    report(log(1, train=1.0, data=0.5))
    assert board.gauges["newsbert_step", "beta", "distill.beta=0.1,seed=0"] == 1
    assert {key[1:] for key in board.counters} == {("beta", "train"), ("beta", "data"), ("beta",)}
    assert not any("trial" in meter.tags for meter in METERS.values() if meter.counter)


@pytest.mark.parametrize("kind", ["note", "checkpoint"])
def test_other_entries_pass(board: Board, kind: str) -> None:
    """A note to the person has no numbers, and must not end the run."""
    RunMeters("runs/first")({"kind": kind, "step": 0, "text": "hello"})
    assert not board.gauges


def test_every_state_of_a_sweep_is_told(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that is left out at zero keeps showing its last number."""
    sweep = SweepMeters("runs/beta")
    sweep.update({"running": 2, "waiting": 3})
    sweep.update({"running": 0, "finished": 5}, best=0.7)
    states = {key[2]: value for key, value in board.gauges.items() if key[0] == "newsbert_trials"}
    assert states == {state: 5 if state == "finished" else 0 for state in STATES}
    assert board.gauges["newsbert_best", "beta"] == 0.7
    board.gauges.clear()
    sweep.update({"finished": 5}, best=0.7)
    assert board.gauges["newsbert_best", "beta"] == 0.7  # another state again: told at once
    board.gauges.clear()
    sweep.update({"finished": 5}, best=0.7)
    assert not board.gauges  # the same within two seconds
    monkeypatch.setattr(meters, "REFRESH_SECONDS", 0.0)
    sweep.update({"finished": 5}, best=0.7)
    assert board.gauges  # again before Ray forgets it


def test_a_misspelt_state_is_our_own_slip(board: Board) -> None:
    """A sweep of 20 trials whose states add up to 17 is believed by nobody."""
    with pytest.raises(AssertionError, match="ended"):
        SweepMeters("runs/beta").update({"ended": 3})


def test_without_ray_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain run on a laptop must not import Ray, let alone start it."""
    monkeypatch.setattr(meters, "_gauge", lambda name: pytest.fail(name))
    monkeypatch.setattr(meters, "_ray_is_there", lambda: False)
    RunMeters(tmp_path)(log(1, train=1.0, data=0.5))
    SweepMeters(tmp_path).update({"running": 1})


def test_names_as_prometheus_finds_them() -> None:
    """Ray adds to both ends of a name; a dashboard written without them stays empty."""
    assert exported_name("newsbert_step") == "ray_newsbert_step"
    assert exported_name("newsbert_seconds") == "ray_newsbert_seconds_total"


def test_the_loop_speaks_as_the_meters_listen(board: Board, make_settings: MakeSettings) -> None:
    """An entry that loses a name would end every run in a cluster, and none of those without."""
    settings = make_settings(epochs=1)
    record = train(settings, quiet=True)
    assert board.gauges["newsbert_step", "run", ""] == record.steps
    key = ("newsbert_validation", "run", "", "student", "accuracy")
    assert board.gauges[key] == record.metrics["validation"]["student"]["accuracy"]
    logged = record.steps - record.steps % settings.log_every
    assert board.counters["newsbert_titles", "run"] == pytest.approx(settings.batch_size * logged, rel=0.05)
    assert 0 < board.counters["newsbert_seconds", "run", "train"] <= record.seconds["train"]
