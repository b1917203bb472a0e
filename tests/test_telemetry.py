"""events.jsonl: complete lines and no secrets. Prometheus: the loop's numbers, each once."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from newsbert_ray import telemetry as meters
from newsbert_ray.telemetry import (
    EVENTS,
    METERS,
    STATES,
    EventLog,
    RunMeters,
    SweepMeters,
    read_events,
)
from newsbert_ray.training.run import train
from tests.conftest import MakeSettings


def test_an_event_has_time_name_and_run(tmp_path: Path) -> None:
    """Without UTC times the log cannot be compared with a cloud's own log of a lost node."""
    log = EventLog(tmp_path / "first")
    (tmp_path / "first").mkdir()
    log("start", workers=2)
    log("node_gone", node="ab12")
    first, second = read_events(tmp_path / "first")
    assert first.items() >= {"event": "start", "run": "first", "workers": 2}.items()
    assert second["node"] == "ab12"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
    assert first["time"] <= second["time"]


def test_entries_of_training_become_events(tmp_path: Path) -> None:
    """After the end of a spot machine people ask whether it wrote a checkpoint, and at which step."""
    report = EventLog(tmp_path).report
    report({"kind": "log", "step": 20, "train": {"total": 1.0}})
    report(
        {"kind": "evaluation", "step": 20, "epoch": 1.0, "validation": {"student": {"auc": 0.6}}, "train": {}}
    )
    report({"kind": "checkpoint", "step": 25, "preempted": False})
    report({"kind": "checkpoint", "step": 31, "preempted": True})
    events = [(event["event"], event["step"]) for event in read_events(tmp_path)]
    assert events == [("evaluation", 20), ("checkpoint", 25), ("preemption", 31)]


def test_an_unknown_event_is_an_error(tmp_path: Path) -> None:
    """With both `ended` and `end` in use, a count of ends finds half of them."""
    with pytest.raises(AssertionError, match="ended"):
        EventLog(tmp_path)("ended")  # type: ignore[arg-type]


def test_a_line_cut_short_does_not_damage_the_next(tmp_path: Path) -> None:
    """After a kill during a write, the next start's line must be readable."""
    (tmp_path / EVENTS).write_text('{"event": "start"}\n{"event": "che', encoding="utf-8")
    EventLog(tmp_path)("resume", step=7)
    assert [event["event"] for event in read_events(tmp_path)] == ["start", "resume"]


_WRITE_MANY = """
import sys
from newsbert_ray.telemetry import EventLog
log = EventLog(sys.argv[1])
for step in range(200):
    log("checkpoint", step=step, writer=sys.argv[2], text="x" * 300)
"""


def test_many_processes_write_complete_lines(tmp_path: Path) -> None:
    """Trials and driver of a sweep share a file; mixed lines would be lost."""
    command = [sys.executable, "-c", _WRITE_MANY, str(tmp_path)]
    writers = [subprocess.Popen([*command, str(number)]) for number in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    lines = (tmp_path / EVENTS).read_text().splitlines()
    assert len(lines) == 600
    for number in range(3):
        steps = [event["step"] for event in map(json.loads, lines) if event["writer"] == str(number)]
        assert steps == list(range(200))


def test_a_log_that_cannot_be_written_raises_nothing(tmp_path: Path) -> None:
    """The user must see the error of the full disk, not one about the log."""
    (tmp_path / EVENTS).mkdir()
    EventLog(tmp_path)("error", reason="disk full")
    EventLog(tmp_path / "gone")("error", reason="disk full")
    assert not (tmp_path / "gone").exists()


def test_events_hold_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log is the first thing that people send to others."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "c0ffee" * 8)
    fields: dict[str, Any] = {"reason": ValueError("refused " + "c0ffee" * 8), "tried": ["c0ffee" * 8]}
    EventLog(tmp_path)("error", api_key="hunter2", **fields)
    (event,) = read_events(tmp_path)
    assert event.items() >= {"api_key": "***", "reason": "refused ***", "tried": ["***"]}.items()


Series = dict[tuple[str, ...], float]


class Board:
    """Stands in for Ray's metrics: gauges hold the last value, counters the sum, by name and tag values."""

    def __init__(self) -> None:
        self.gauges: Series = {}
        self.counters: Counter[tuple[str, ...]] = Counter()

    def metric(self, name: str) -> Any:
        if METERS[name].counter:
            return _Meter(name, lambda key, value: self.counters.update({key: value}))
        return _Meter(name, lambda key, value: self.gauges.__setitem__(key, value))


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
    """A process with Ray, and the metrics that it receives."""
    board = Board()
    monkeypatch.setattr(meters, "_is_connected", lambda: True)
    monkeypatch.setattr(meters, "_metric", board.metric)
    return board


def log(step: int, *, train: float, data: float, speed: float = 100.0) -> dict[str, Any]:
    """A log entry of training after this many seconds."""
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
    """If each entry's total were added, a run of an hour would show days."""
    report = RunMeters("runs/first")
    report(log(1, train=1.0, data=0.5))
    report(log(5, train=3.0, data=1.0))
    assert board.counters["newsbert_seconds", "first", "train"] == 3.0
    assert board.counters["newsbert_seconds", "first", "data"] == 1.0
    assert board.counters["newsbert_titles", "first"] == pytest.approx(100 * 4.0)
    assert ("newsbert_seconds", "first", "evaluate") not in board.counters


def test_a_resumed_run_does_not_count_its_first_start_again(board: Board) -> None:
    """The process of the first start has counted its own seconds."""
    report = RunMeters("runs/first")
    report(log(20, train=30.0, data=9.0))
    assert not board.counters
    report(log(25, train=31.0, data=9.5))
    assert board.counters["newsbert_seconds", "first", "train"] == 1.0
    assert board.counters["newsbert_titles", "first"] == pytest.approx(150.0)


def test_an_evaluation_is_sent_again_with_each_later_log(board: Board) -> None:
    """Ray drops a gauge that is not set again: validation would show for 20 seconds of an epoch."""
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


def test_a_trial_has_tags_for_its_sweep_and_its_name(board: Board) -> None:
    """Without the sweep's name 400 trials cannot be summed; counters by trial would stay for ever."""
    report = RunMeters("runs/beta/trials/distill.beta=0.1,seed=0")
    report(log(1, train=1.0, data=0.5))
    assert board.gauges["newsbert_step", "beta", "distill.beta=0.1,seed=0"] == 1
    assert {key[1:] for key in board.counters} == {("beta", "train"), ("beta", "data"), ("beta",)}
    assert not any("trial" in meter.tags for meter in METERS.values() if meter.counter)


def test_a_name_that_is_not_ascii_is_quoted(board: Board) -> None:
    """Ray's metrics raise on such a tag, and the sweep or the group would end before its first step."""
    RunMeters("runs/köra min")(log(1, train=1.0, data=0.5))
    RunMeters("säsong/trials/größe=1")(log(1, train=1.0, data=0.5))
    SweepMeters("runs/säsong").update({"running": 1}, best=0.5)
    assert board.gauges["newsbert_step", "k%C3%B6ra min", ""] == 1
    assert board.gauges["newsbert_step", "s%C3%A4song", "gr%C3%B6%C3%9Fe=1"] == 1
    assert board.gauges["newsbert_best", "s%C3%A4song"] == 0.5


@pytest.mark.parametrize("kind", ["note", "checkpoint"])
def test_other_entries_are_ignored(board: Board, kind: str) -> None:
    """A note has no numbers, and must not end the run."""
    RunMeters("runs/first")({"kind": kind, "step": 0, "text": "hello"})
    assert not board.gauges


def test_every_state_of_a_sweep_is_sent(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that is not sent at zero keeps its last number."""
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


def test_an_unknown_state_is_an_error(board: Board) -> None:
    """The states of 20 trials must add up to 20."""
    with pytest.raises(AssertionError, match="ended"):
        SweepMeters("runs/beta").update({"ended": 3})


def test_without_ray_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain run on a laptop must not import Ray, let alone start it."""
    monkeypatch.setattr(meters, "_metric", lambda name: pytest.fail(name))
    monkeypatch.setattr(meters, "_is_connected", lambda: False)
    RunMeters(tmp_path)(log(1, train=1.0, data=0.5))
    SweepMeters(tmp_path).update({"running": 1})


def test_meters_understand_the_entries_of_training(board: Board, make_settings: MakeSettings) -> None:
    """A renamed field would end every run in a cluster, and no other."""
    settings = make_settings(epochs=1)
    record = train(settings, quiet=True)
    assert board.gauges["newsbert_step", "run", ""] == record.steps
    key = ("newsbert_validation", "run", "", "student", "accuracy")
    assert board.gauges[key] == record.metrics["validation"]["student"]["accuracy"]
    logged = record.steps - record.steps % settings.log_every
    assert board.counters["newsbert_titles", "run"] == pytest.approx(settings.batch_size * logged, rel=0.05)
    assert 0 < board.counters["newsbert_seconds", "run", "train"] <= record.seconds["train"]
