"""What a sweep prints: a live table or plain lines, the lines before and after, and its commands. No Ray."""

from __future__ import annotations

import json
import shlex
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from newsbert_ray.config import merge
from newsbert_ray.files import format_duration
from newsbert_ray.reporting.sweep_data import FAILURES, TRIALS, Point, Trial, read_sweep, resume_command
from newsbert_ray.settings import flatten
from newsbert_ray.storage.workdir import WorkDir
from newsbert_ray.tune.space import SearchSpace, absolute_folders
from newsbert_ray.tune.study import EPOCH, JOURNAL, shown_storage

if TYPE_CHECKING:
    from newsbert_ray.tune.sweep import SweepResult
    from newsbert_ray.tune.trials import Budget, Resources, Retention, RunningTrial, Trials

LINE_SECONDS = 30.0
"""Least time between two status lines, where the output is not a terminal."""
REFRESH_SECONDS = 0.5
"""Least time between two refreshes of the live table."""
MAX_ROWS = 12
"""Running trials in the live table."""


class SweepDisplay:
    """Shows a sweep's trials as they start, report and end; draws only where it is called."""

    def __init__(self, trials: Trials, budget: Budget, *, console: Console) -> None:
        self._trials = trials
        self._budget = budget
        self._console = console
        self._line_time = self._draw_time = time.monotonic()
        self._live: Live | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Live on a terminal for as long as the block runs."""
        if not self._console.is_terminal or self._console.is_dumb_terminal:
            yield
            return
        with Live(self._table(), console=self._console, auto_refresh=False, transient=True) as live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def say(self, line: str) -> None:
        say(self._console, line)

    def ended(self, trial: Trial, *, seconds: float | None = None) -> None:
        """A trial has ended; `seconds`: its duration, None where it never started."""
        if self._live is None or trial.state == "failed":
            took = "" if seconds is None else f"  {seconds:.1f} s"
            self.say(f"{self._done()}  {trial.name}  {self._ending(trial)}{took}")
            self._line_time = time.monotonic()
        self.draw()

    def tick(self) -> None:
        """Called often: refreshes the live table, or prints a status line now and then."""
        if self._live is not None:
            if time.monotonic() - self._draw_time >= REFRESH_SECONDS:
                self.draw()
        elif time.monotonic() - self._line_time >= LINE_SECONDS:
            self._line_time = time.monotonic()
            self.say("; ".join([f"{self._done()}  {self._counts()}", *self._best(), *self._status()]))

    def draw(self) -> None:
        """Draw the live table again, because a trial has started, reported or ended."""
        if self._live is not None:
            self._draw_time = time.monotonic()
            self._live.update(self._table(), refresh=True)

    def _table(self) -> Group:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.add_column("trial", overflow="fold")
        for heading in ("epoch", self._trials.space.metric, "seconds"):
            table.add_column(heading, justify="right", no_wrap=True)
        for running in self._running[:MAX_ROWS]:
            epoch, value = running.numbers.get(EPOCH, 0.0), running.numbers.get(self._trials.space.metric)
            number = "" if value is None else f"{value:.4f}"
            progress = f"{epoch:g} of {running.epochs}"
            table.add_row(running.trial.name, progress, number, f"{running.seconds:.0f}")
        if (more := len(self._running) - MAX_ROWS) > 0:
            table.add_row(f"and {more} more", "", "", "")
        head = f"{self._trials.space.name} {self._done()}  {self._counts()}"
        lines = [head, *self._best(), "; ".join(self._status())]
        return Group(*map(Text, lines), table)

    @property
    def _running(self) -> list[RunningTrial]:
        """Trials whose process has started."""
        return [trial for trial in self._trials.running.values() if trial.began]

    def _ending(self, trial: Trial) -> str:
        if trial.state == "failed":
            return f"failed: {trial.reason}"
        if trial.state == "stopped":
            return f"stopped early at epoch {trial.epoch:g} ({trial.reason}): {trial.values[0]:.4f}"
        return _goal_values(self._trials.space, trial.values)

    def _done(self) -> str:
        return f"[{self._trials.total - self._trials.unfinished}/{self._trials.total}]"

    def _counts(self) -> str:
        """Trials by state; a point that the sampler drew twice counts twice, as in the total."""
        counts = dict.fromkeys(("finished", "stopped", "skipped", "failed"), 0)
        for trial in self._trials.ended.values():
            counts[trial.state] += self._trials.count(trial)
        running = len(self._running)
        counts |= {"running": running, "waiting": max(0, self._trials.unfinished - running)}
        words = {"finished": "done", "stopped": "stopped early"}
        optional = ("stopped", "skipped", "failed")
        return ", ".join(f"{n} {words.get(s, s)}" for s, n in counts.items() if n or s not in optional)

    def _best(self) -> list[str]:
        best = self._trials.best()
        return [f"best so far {best.label}: {_goal_values(self._trials.space, best.means)}"] if best else []

    def _status(self) -> list[str]:
        reason = self._trials.end_reason
        return [f"ending: {reason}" if reason else self._time_left(), *self._cost()]

    def _time_left(self) -> str:
        if not self._trials.seconds:
            return "time left: known after the first trial"
        rest, waiting = self._remaining()
        left, why = max((waiting + sum(rest)) / self._budget.resources.slots, *rest, 0.0), ""
        for name, limit in self._budget.seconds_left().items():
            if limit < left:
                left, why = max(0.0, limit), f" (limits.{name})"
        return f"about {format_duration(left)} left{why}"

    def _remaining(self) -> tuple[list[float], float]:
        """Seconds of each running trial, and of all that wait, at the mean of those that have ended."""
        mean, rest = self._budget.expected()
        return rest, max(0, self._trials.unfinished - len(rest)) * mean

    def _cost(self) -> list[str]:
        if not self._budget.hourly:
            return []
        spent, limit = self._budget.spent(), self._trials.space.limits.cost
        if not self._trials.seconds:
            return [f"cost {spent:.2f}"]
        rest, waiting = self._remaining()
        expected, why = self._budget.spent(waiting, *rest), ""
        if limit is not None and expected > limit:
            expected, why = limit, f" (limits.cost {limit:g})"
        return [f"cost {spent:.2f} of about {expected:.2f}{why}"]


def _goal_values(space: SearchSpace, values: Sequence[float]) -> str:
    numbers = (f"{v:.4f}" if abs(v) < 100 else f"{v:.0f}" for v in values)
    return ", ".join(f"{goal.metric} {number}" for goal, number in zip(space.goals, numbers, strict=True))


def opening(trials: Trials) -> list[str]:
    """What the sweep is, before it starts."""
    space = trials.space
    axes = ", ".join(axis.name for axis in space.axes) or "nothing"
    rule = {"asha": "asha after each epoch", "median": "the median rule after each epoch", "none": "none"}
    seeds = f"seed{'s' * (len(space.seeds) > 1)} {', '.join(map(str, space.seeds))}"
    goals = ", ".join(f"{goal.metric} ({goal.mode})" for goal in space.goals)
    impossible = " (not possible with several goals)" if len(space.goals) > 1 else ""
    lines = [
        f"{space.name}: {space.points} points over {axes} by {space.search.sampler}, {seeds}: "
        f"{trials.total} trials in {trials.workdir.location}",
        f"goal: {goals}; early stopping: {rule[space.scheduler]}{impossible}",
    ]
    return [*lines, *([f"{trials.resumed} of them have ended before"] if trials.resumed else [])]


def starting(trials: Trials, resources: Resources, dashboard: str | None) -> list[str]:
    """How to watch, stop and resume; printed when the trials start."""
    slots = f"{resources.slots} trials at once" if resources.slots > 1 else "one trial at a time"
    workers = f", {resources.workers} Ray Train workers each" if resources.nested else ""
    resume = resume_command(trials.space.file, trials.workdir.location)
    lines = [f"{slots}{workers}. Ctrl-C stops the sweep; continue it with:", f"  {resume}"]
    return [*lines, *watch_commands(trials), *([f"Ray's dashboard: {dashboard}"] if dashboard else [])]


def watch_commands(trials: Trials) -> list[str]:
    """Commands that show the sweep in a browser, during and after it."""
    url = trials.space.search.storage
    study = shown_storage(url) if url else str(trials.folder / JOURNAL)
    return [
        f"watch: {shlex.join(['tensorboard', '--logdir', str(trials.folder / TRIALS)])}",
        f"       {shlex.join(['optuna-dashboard', study])}",
    ]


def print_result(
    result: SweepResult, trials: Trials, retention: Retention | None, console: Console, *, comparison: str
) -> None:
    """The table, early ends, failures, the best point with its command, and where the files are."""
    from newsbert_ray.reporting.sweep_page import terminal_points

    sweep = read_sweep(result.out)
    if table := terminal_points(sweep):
        console.print(table)
    page = next((path for path in result.report if path.suffix == ".html"), result.out / "report")
    disk = [retention.line()] if retention else []
    closing = [*disk, f"{result.seconds:.0f} s in all; report: {page}", *filter(None, [comparison])]
    lines = [*_end_lines(result, trials), *_best_lines(result, trials.space, sweep.front), *closing]
    say(console, *lines, *watch_commands(trials))


def _end_lines(result: SweepResult, trials: Trials) -> list[str]:
    states = [trial.state for trial in trials.ended.values()]
    resume, lines = resume_command(trials.space.file, result.location), []
    if stopped := states.count("stopped"):
        skipped = states.count("skipped")
        more = f", so {skipped} further seeds of their points were skipped" if skipped else ""
        lines.append(f"{stopped} trials stopped early by {trials.space.scheduler}{more}")
    if trials.end_reason:
        lines.append(f"ended before its last trial, {trials.unfinished} not started: {trials.end_reason}")
        lines.append(f"  continue with a wider limit: {resume}")
    lines += [f"failed: {trial}: {reason}" for trial, reason in result.failures.items()]
    if result.failures:
        folder = WorkDir.at(result.location).child(FAILURES).location
        lines.append(f"stack traces are in {folder}; try these trials again with: {resume}")
    return lines


def _best_lines(result: SweepResult, space: SearchSpace, front: Sequence[Point]) -> list[str]:
    if result.best is None:
        return ["no trial finished"]
    lines = []
    if len(space.goals) > 1:
        lines.append("Pareto front (no other point is as good in every goal and better in one):")
        lines += [f"  {point.label}: {_goal_values(space, point.means)}" for point in front]
    values = [trial.values[0] for trial in result.best.of_state("finished")]
    value = f"{result.best.means[0]:.4f}"
    value += f" (sd {statistics.stdev(values):.4f})" if len(values) > 1 else ""
    lines.append(f"best: {result.best.label}, {space.metric} {value}; train it again with:")
    return [*lines, f"  {result.command}"]


def train_command(space: SearchSpace, best: Point, overrides: Mapping[str, Any], location: str | Path) -> str:
    """The command that trains the best point again, with the first seed."""
    settings = flatten(absolute_folders(merge(space.settings, overrides, best.values)))
    settings |= {"seed": space.seeds[0], "out": WorkDir.at(location).child("best").location}
    words = []
    for name, value in settings.items():
        words += [f"--{name}", json.dumps(value) if value is None or isinstance(value, bool) else str(value)]
    return shlex.join(["newsbert-ray", "train", *words])


def say(console: Console, *lines: str) -> None:
    """Print lines as they are: no markup, no colours, never wrapped by rich."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
