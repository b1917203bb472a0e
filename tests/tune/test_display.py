"""What a running sweep prints, on a terminal and into a log file."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from newsbert_ray.record import EarlyStop
from newsbert_ray.reporting.sweep_data import Trial
from newsbert_ray.storage.workdir import WorkDir
from newsbert_ray.tune import display
from newsbert_ray.tune.display import SweepDisplay
from newsbert_ray.tune.space_file import read_space
from newsbert_ray.tune.study import SweepStudy
from newsbert_ray.tune.trials import Budget, Resources, RunningTrial, Trials

WriteSpace = Callable[..., Path]
MakeTrials = Callable[..., Trials]
ACCURACY = "validation.student.accuracy"


@pytest.fixture
def make_trials(write_space: WriteSpace, tmp_path: Path) -> MakeTrials:
    """make_trials(seeds="[0, 1]", more="prices: {cpu_hour: 1.0}"): four points."""

    def make(*, seeds: str = "[0]", more: str = "") -> Trials:
        space = read_space(write_space(**{"seeds: [0]": f"seeds: {seeds}\n{more}"}))
        return Trials(space, SweepStudy(space, tmp_path, "test"), WorkDir.at(tmp_path))

    return make


def take(trials: Trials) -> Trial:
    """The next trial."""
    spec = trials.next_trial()
    assert spec is not None
    return spec


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """As time.monotonic."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the display, the trials and the budget."""
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock.monotonic)
    return clock


def show(trials: Trials, console: Console, *, slots: int = 1) -> SweepDisplay:
    """The display of a sweep whose trials have two CPUs each."""
    return SweepDisplay(trials, Budget(trials, Resources(slots, cpus=2.0, gpus=0.0)), console=console)


def start(trials: Trials) -> RunningTrial:
    """Start the next trial."""
    running = RunningTrial(take(trials), epochs=2, began=time.monotonic())
    trials.running[running.trial.name] = running
    return running


def finish(shown: SweepDisplay, trials: Trials, clock: Clock, seconds: float, value: float | None) -> None:
    """A trial runs for so long, and ends with the value, or fails where there is none."""
    spec = start(trials).trial
    clock.now += seconds
    del trials.running[spec.name]
    if value is None:
        trials.fail(spec, "no memory")
    else:
        trials.finish(spec, (value,), seconds=seconds)
    shown.ended(trials.ended[spec.name], seconds=seconds)


def play(trials: Trials, console: Console, clock: Clock) -> None:
    """One trial finishes, one fails, each after 20 seconds; one runs."""
    shown = show(trials, console)
    with shown.shown():
        finish(shown, trials, clock, 20, 0.5)
        finish(shown, trials, clock, 20, None)
        start(trials).numbers = {"epoch": 1.0, ACCURACY: 0.4321}
        clock.now += 5
        shown.tick()


def plain() -> tuple[Console, Callable[[], list[str]]]:
    """A console that is a file, and its lines."""
    file = io.StringIO()
    return Console(file=file, width=80), lambda: file.getvalue().splitlines()


def test_a_log_gets_one_line_a_trial_and_status_lines(
    make_trials: MakeTrials, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log file fills with frames of a table, or shows nothing for hours."""
    monkeypatch.setattr(display, "LINE_SECONDS", 5.0)
    console, lines = plain()
    play(make_trials(), console, clock)
    assert lines() == [
        "[1/4]  beta=0,layers=1,seed=0  validation.student.accuracy 0.5000  20.0 s",
        "[2/4]  beta=0,layers=2,seed=0  failed: no memory  20.0 s",
        "[2/4]  1 done, 1 failed, 1 running, 1 waiting; best so far beta=0,layers=1: "
        "validation.student.accuracy 0.5000; about 35 s left",
    ]


def test_a_log_is_not_flooded(make_trials: MakeTrials, clock: Clock) -> None:
    """A line at each of Tune's steps is ten lines a second."""
    console, lines = plain()
    shown = show(make_trials(), console)
    for _ in range(100):
        clock.now += 0.5
        shown.tick()
    assert len(lines()) == 1


def test_a_terminal_gets_a_quiet_table_and_keeps_the_failures(make_trials: MakeTrials, clock: Clock) -> None:
    """A failure scrolls away, or a finished table fills the screen."""
    console = Console(
        file=io.StringIO(), width=100, height=30, force_terminal=True, color_system=None, record=True
    )
    play(make_trials(), console, clock)
    text = console.export_text()
    failure = "[2/4]  beta=0,layers=2,seed=0  failed: no memory  20.0 s"
    assert text.count(failure) == 1
    assert "[1/4]  beta=0,layers=1,seed=0" not in text
    frame = text[text.rindex("small [2/4]") :]
    assert [line.rstrip() for line in frame.splitlines()] == [
        "small [2/4]  1 done, 1 failed, 1 running, 1 waiting",
        "best so far beta=0,layers=1: validation.student.accuracy 0.5000",
        "about 35 s left",
        "trial                       epoch   validation.student.accuracy   seconds",
        "─" * 73,
        "beta=0.2,layers=1,seed=0   1 of 2                        0.4321         5",
    ]


def test_nothing_is_drawn_between_events(make_trials: MakeTrials, clock: Clock) -> None:
    """A thread that reads the trials while they change ends with an error in the middle of the night."""
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None)
    shown = show(make_trials(), console)
    with shown.shown():
        before = console.file.getvalue()  # type: ignore[attr-defined]
        shown.tick()
        assert console.file.getvalue() == before  # type: ignore[attr-defined]
        clock.now += 1
        shown.tick()
        assert console.file.getvalue() != before  # type: ignore[attr-defined]


def test_early_stops_and_skipped_seeds_are_shown(make_trials: MakeTrials, clock: Clock) -> None:
    """A trial that ends at epoch 1 looks like a failure, and nobody knows why others never start."""
    trials = make_trials(seeds="[0, 1, 2]")
    console, lines = plain()
    shown = show(trials, console)
    spec = take(trials)
    trials.stop(spec, EarlyStop(epoch=1.0, value=0.61, seconds=4.0, reason="asha"))
    shown.ended(trials.ended[spec.name], seconds=4.0)
    clock.now += 30
    shown.tick()
    assert lines() == [
        "[3/12]  beta=0,layers=1,seed=0  stopped early at epoch 1 (asha): 0.6100  4.0 s",
        "[3/12]  0 done, 1 stopped early, 2 skipped, 0 running, 9 waiting; about 36 s left",
    ]


def test_time_left_counts_trials_that_ran(make_trials: MakeTrials, clock: Clock) -> None:
    """Trials that fail at once make the rest look like a matter of seconds."""
    trials = make_trials(seeds="[0, 1]")
    console, lines = plain()
    shown = show(trials, console, slots=2)
    finish(shown, trials, clock, 1, None)
    finish(shown, trials, clock, 600, 0.5)
    clock.now += 30
    shown.tick()
    # Six trials of ten minutes on two slots.
    assert lines()[-1].endswith("about 30.0 min left")


def test_last_trial_takes_its_own_time(make_trials: MakeTrials, clock: Clock) -> None:
    """One trial on four slots is not done in a quarter of its time."""
    trials = make_trials()
    console, lines = plain()
    shown = show(trials, console, slots=4)
    for _ in range(3):
        finish(shown, trials, clock, 100, 0.5)
    start(trials)
    clock.now += 40
    shown.tick()
    assert "1 running, 0 waiting" in lines()[-1]
    assert lines()[-1].endswith("about 60 s left")


def test_unknown_time_is_not_guessed(make_trials: MakeTrials, clock: Clock) -> None:
    """`0 s left` at the start of a night would be believed."""
    console, lines = plain()
    shown = show(make_trials(), console)
    clock.now += 30
    shown.tick()
    assert lines() == ["[0/4]  0 done, 0 running, 4 waiting; time left: known after the first trial"]


def test_resume_knows_how_long_trials_took_before(make_trials: MakeTrials, clock: Clock) -> None:
    """A resumed sweep has records, so it can tell the time left from the start."""
    trials = make_trials()
    trials.ended["earlier"] = Trial("earlier", {}, 0, "finished", seconds=50.0)
    console, lines = plain()
    shown = show(trials, console)
    clock.now += 30
    shown.tick()
    assert lines()[-1].endswith("about 2.5 min left")


def test_cost_so_far_and_in_the_end(make_trials: MakeTrials, clock: Clock) -> None:
    """Money that is spent unseen is the last sweep somebody runs."""
    trials = make_trials(more="prices: {cpu_hour: 3.6}")
    console, lines = plain()
    shown = show(trials, console)
    finish(shown, trials, clock, 100, 0.5)
    start(trials)
    clock.now += 50
    shown.tick()
    # 0.002 a second: 100 s have ended, 50 s run, 50 + 200 s are to come.
    assert lines()[-1].endswith("about 4.2 min left; cost 0.30 of about 0.80")


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("hours: 0.05", "about 30 s left (limits.hours); cost 0.30 of about 0.80"),
        ("cost: 0.4", "about 50 s left (limits.cost); cost 0.30 of about 0.40 (limits.cost 0.4)"),
        ("cost: 9", "about 4.2 min left; cost 0.30 of about 0.80"),
    ],
)
def test_limits_end_the_sweep_before_its_last_trial(
    make_trials: MakeTrials, clock: Clock, limit: str, expected: str
) -> None:
    """Four minutes left, and the limit in thirty seconds: the second number is the true one."""
    trials = make_trials(more=f"prices: {{cpu_hour: 3.6}}\nlimits: {{{limit}}}")
    console, lines = plain()
    shown = show(trials, console)
    finish(shown, trials, clock, 100, 0.5)
    start(trials)
    clock.now += 50
    shown.tick()
    assert lines()[-1].endswith(expected)


def test_a_sweep_that_starts_no_more_trials_says_why(make_trials: MakeTrials, clock: Clock) -> None:
    """Two trials are left and none starts: the line must give the reason, not a time."""
    trials = make_trials()
    trials.end_reason = "limits.hours = 1 leaves no time for another trial"
    console, lines = plain()
    shown = show(trials, console)
    clock.now += 30
    shown.tick()
    assert lines()[-1].endswith("; ending: limits.hours = 1 leaves no time for another trial")


def test_several_goals_are_all_shown(make_trials: MakeTrials, clock: Clock) -> None:
    """A trial that is accurate and slow must not look like the best."""
    goals = (
        "goals: [{metric: validation.student.accuracy}, {metric: speed.times_teacher}]\n"
        "stopping: {scheduler: none}"
    )
    trials = make_trials(more=goals)
    console, lines = plain()
    shown = show(trials, console)
    spec = take(trials)
    trials.finish(spec, (0.5, 3.25))
    shown.ended(trials.ended[spec.name], seconds=1.0)
    assert lines()[-1].split("  ")[2] == "validation.student.accuracy 0.5000, speed.times_teacher 3.2500"


def test_an_impossible_combination_is_shown(make_trials: MakeTrials, clock: Clock) -> None:
    """It never started; it has no seconds, and must not vanish."""
    trials = make_trials()
    console, lines = plain()
    shown = show(trials, console)
    spec = take(trials)
    trials.fail(spec, "3 does not divide 4")
    shown.ended(trials.ended[spec.name])
    assert lines() == ["[1/4]  beta=0,layers=1,seed=0  failed: 3 does not divide 4"]


def test_table_stays_small(make_trials: MakeTrials, clock: Clock) -> None:
    """Sixty-four trials at once, each with a long name, must not push the heading off the screen."""
    seeds = ", ".join(map(str, range(10)))
    trials = make_trials(seeds=f"[{seeds}]")
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None, record=True)
    shown = show(trials, console, slots=40)
    with shown.shown():
        for _ in range(20):
            start(trials)
        shown.draw()
    frame = console.export_text()
    frame = frame[frame.rindex("small [0/40]") :]
    assert "and 8 more" in frame
    assert frame.count("seed=") == 12
