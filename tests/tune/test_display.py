"""What a person sees of a running sweep, on a terminal and in a log file."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from newsbert_ray.tune import display
from newsbert_ray.tune.display import SweepDisplay
from newsbert_ray.tune.jobs import Job, Jobs
from newsbert_ray.tune.memory import Memory
from newsbert_ray.tune.space_file import read_space

WriteSpace = Callable[..., Path]


@pytest.fixture
def jobs(write_space: WriteSpace, tmp_path: Path) -> Jobs:
    """Four trials."""
    space = read_space(write_space())
    return Jobs(space, Memory(space, tmp_path), tmp_path)


def take(jobs: Jobs) -> Job:
    """The next trial."""
    job = jobs.next_job()
    assert job is not None
    return job


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """As time.monotonic."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The display's clock."""
    clock = Clock()
    monkeypatch.setattr(display, "time", clock)
    return clock


def play(jobs: Jobs, console: Console, clock: Clock) -> None:
    """One trial finishes, one fails, each after 20 seconds; one runs."""
    shown = SweepDisplay(jobs, slots=1, console=console)
    with shown.shown():
        for value, failure in ((0.5, ""), (None, "no memory")):
            job = take(jobs)
            shown.started(job)
            shown.reported(job, {"epoch": 1.0, "validation.student.accuracy": 0.4})
            clock.now += 20
            jobs.finish(job, values=None if value is None else (value,), failure=failure)
            shown.ended(job)
        running = take(jobs)
        shown.started(running)
        shown.reported(running, {"epoch": 2.0, "validation.student.accuracy": 0.4321})
        shown.tick()


def test_a_log_gets_one_plain_line_a_trial_and_now_and_then_one_about_the_whole(
    jobs: Jobs, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log file fills with frames of a table, or shows nothing for hours."""
    monkeypatch.setattr(display, "EVERY_SECONDS", 0.0)
    file = io.StringIO()
    play(jobs, Console(file=file, width=80), clock)
    first, second, third = file.getvalue().splitlines()
    assert first == "[1/4]  beta=0,layers=1,seed=0  validation.student.accuracy 0.5000  20.0 s"
    assert second == "[2/4]  beta=0,layers=2,seed=0  failed: no memory  20.0 s"
    assert third == "[2/4]  1 running, about 40 s left, best so far beta=0,layers=1 0.5000"
    assert "\x1b" not in file.getvalue()


def test_a_terminal_gets_a_live_table_and_keeps_the_failures(jobs: Jobs, clock: Clock) -> None:
    """A failure scrolls by, or a finished table fills the screen."""
    file = io.StringIO()
    play(jobs, Console(file=file, width=150, force_terminal=True, color_system=None), clock)
    text = file.getvalue()
    assert (
        "small: 1 done, 1 running, 1 waiting, 1 failed, about 40 s left, best so far beta=0,layers=1 0.5000"
        in text
    )
    assert "beta=0.2,layers=1,seed=0" in text
    assert "0.4321" in text
    assert "failed: no memory" in text
