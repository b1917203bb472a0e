"""What a person sees of a running sweep: a live table on a terminal, plain lines elsewhere. Knows no Ray."""

from __future__ import annotations

import json
import shlex
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from newsbert_ray.config import merge
from newsbert_ray.files import format_duration
from newsbert_ray.record import RECORD, read_record
from newsbert_ray.storage import workdir as storage
from newsbert_ray.tune import space as spaces
from newsbert_ray.tune.estimate import COUNTED, NAMED, READ
from newsbert_ray.tune.resources import Place
from newsbert_ray.tune.space import Point, SearchSpace
from newsbert_ray.tune.storage import JOURNAL, shown_storage
from newsbert_ray.tune.trials import FAILURES, TRIALS, Job, Jobs, Keeper, PointResult, pareto_front

if TYPE_CHECKING:
    from rich.console import Console

    from newsbert_ray.tune.trials import Budget


EVERY_SECONDS = 30.0
"""Least time between two lines about the whole, where output is no terminal."""
REFRESH_SECONDS = 0.5
"""Least time between two pictures of the live table."""
MAX_ROWS = 12
"""Running trials that the table names."""
LENGTHENING = frozenset({*NAMED, *COUNTED, *READ, "epochs", "train_rows"})
"""Settings that decide how long a trial takes."""
_NUMBERS_WIDTH = 26
"""Letters of a row beside the trial's name and the metric's."""


Work = tuple[tuple[str, Any], ...]
"""The values of a point that decide how long it takes."""


@dataclass
class _Running:
    """A trial under way: when it began, and the last numbers that it reported."""

    job: Job
    began: float
    numbers: Mapping[str, float] = field(default_factory=dict)


class SweepDisplay:
    """Shows a sweep's trials as they start, report and end.

    Draws only where it is called: no thread reads the jobs while they change.
    """

    def __init__(
        self,
        jobs: Jobs,
        *,
        slots: int,
        console: Console,
        epochs: int | None = None,
        budget: Budget | None = None,
    ) -> None:
        """
        Args:
            slots: trials at once, at most.
            epochs: of each trial, where they do not vary.
            budget: what the sweep spends; without it no cost is shown.
        """
        self._jobs = jobs
        self._slots = slots
        self._console = console
        self._epochs = epochs
        self._budget = budget
        self._began = self._said = self._drawn = time.monotonic()
        self._running: dict[str, _Running] = {}
        self._seconds: list[tuple[Work, float]] = []
        self._last = ""
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
        """A line that stays."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def started(self, job: Job) -> None:
        """A trial begins; one whose process died begins again, and its time goes on."""
        self._running.setdefault(job.name, _Running(job, time.monotonic()))
        self._draw()

    def reported(self, job: Job, numbers: Mapping[str, float]) -> None:
        """A trial has evaluated."""
        self._running.setdefault(job.name, _Running(job, time.monotonic())).numbers = numbers
        self._draw()

    def ended(self, job: Job) -> None:
        """A trial has ended; how stands in the jobs."""
        running = self._running.pop(job.name, None)
        failed = job.seed in self._jobs.results[job.label].failures
        took = ""
        if running is not None:
            seconds = time.monotonic() - running.began
            took = f"  {seconds:.1f} s"
            if not failed:
                self._seconds.append((_work_of(job.point), seconds))
        ending = f"{self._outcome(job)}{took}"
        self._last = f"last: {_cut(job.name, self._console.width - len(ending) - 8)}  {ending}"
        if self._live is None or failed:
            self.say(f"{self._done()}  {job.name}  {ending}")
            self._said = time.monotonic()
        self._draw()

    def tick(self) -> None:
        """Called often: draws the live table anew, or says now and then how things stand."""
        if self._live is not None:
            if time.monotonic() - self._drawn >= REFRESH_SECONDS:
                self._draw()
        elif time.monotonic() - self._said >= EVERY_SECONDS:
            self._said = time.monotonic()
            self.say("; ".join([f"{self._done()}  {self._counts()}", *self._best(), *self._standing()]))

    def _draw(self) -> None:
        if self._live is not None:
            self._drawn = time.monotonic()
            self._live.update(self._table(), refresh=True)

    def _table(self) -> Group:
        """Two lines about the whole, one for the trial that ended last, a row for each that runs."""
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for heading in ("trial", "epoch", self._jobs.space.metric, "seconds"):
            table.add_column(heading, justify="left" if heading == "trial" else "right", no_wrap=True)
        running = list(self._running.values())
        for trial in running[:MAX_ROWS]:
            table.add_row(*self._row(trial))
        if len(running) > MAX_ROWS:
            table.add_row(f"and {len(running) - MAX_ROWS} more", "", "", "")
        lines = [f"{self._jobs.space.name} {self._done()}  {self._counts()}", *self._best()]
        lines.append("; ".join(self._standing()))
        if self._last:
            lines.append(self._last)
        return Group(*(Text(line) for line in lines), table)

    def _row(self, trial: _Running) -> list[str]:
        epoch, value = trial.numbers.get("epoch"), trial.numbers.get(self._jobs.space.metric)
        epochs = trial.job.point.get("epochs", self._epochs)
        of = f" of {epochs}" if epochs else ""
        return [
            _cut(trial.job.name, self._console.width - _NUMBERS_WIDTH - len(self._jobs.space.metric)),
            f"{epoch or 0:g}{of}",
            "" if value is None else f"{value:.4f}",
            f"{time.monotonic() - trial.began:.0f}",
        ]

    def _outcome(self, job: Job) -> str:
        result = self._jobs.results[job.label]
        if job.seed in result.failures:
            return f"failed: {result.failures[job.seed]}"
        if job.seed in result.stops:
            stop = result.stops[job.seed]
            return f"stopped early at epoch {stop.epoch:g} ({stop.reason}): {stop.value:.4f}"
        return self._judged(result.values[job.seed])

    def _judged(self, values: tuple[float, ...]) -> str:
        """Each goal by its metric's name and number."""
        goals = zip(self._jobs.space.goals, values, strict=True)
        return ", ".join(f"{goal.metric} {value:.4f}" for goal, value in goals)

    def _done(self) -> str:
        return f"[{self._jobs.total - self._jobs.unfinished}/{self._jobs.total}]"

    def _counts(self) -> str:
        """Trials by state; a point that the sampler chose twice counts twice, as in the total."""
        pairs = [(result, max(1, len(result.numbers))) for result in self._jobs.results.values()]
        ended = {
            "done": sum(len(result.values) * times for result, times in pairs),
            "stopped early": sum(len(result.stops) * times for result, times in pairs),
            "skipped": sum(len(result.skipped) * times for result, times in pairs),
            "failed": sum(len(result.failures) * times for result, times in pairs),
        }
        counts = {**ended, "running": len(self._running), "waiting": self._waiting()}
        always = ("done", "running", "waiting")
        return ", ".join(f"{count} {state}" for state, count in counts.items() if count or state in always)

    def _waiting(self) -> int:
        return max(0, self._jobs.unfinished - len(self._running))

    def _best(self) -> list[str]:
        best = self._jobs.best()
        return [f"best so far {best.label}: {self._judged(best.means)}"] if best else []

    def _standing(self) -> list[str]:
        """The time left and what it has cost, as far as they are known."""
        left = f"ending: {self._jobs.closed}" if self._jobs.closed else self._left()
        return [left, *self._cost()]

    def _elapsed(self) -> list[float]:
        """Seconds since each running trial's start."""
        now = time.monotonic()
        return [now - trial.began for trial in self._running.values()]

    def _work(self) -> tuple[float, float] | None:
        """Seconds of trials still to run, and of the one that runs longest; None where nobody knows.

        From trials that ended in this start, or else in earlier ones, those of the same work where there are
        any; failed ones tell nothing.
        """
        known = self._seconds or self._earlier()
        if not known:
            return None
        mean = statistics.fmean(seconds for _, seconds in known)
        alike: dict[Work, list[float]] = {}
        for work, seconds in known:
            alike.setdefault(work, []).append(seconds)

        def expected(point: Point) -> float:
            return statistics.fmean(alike.get(_work_of(point), [mean]))

        now = time.monotonic()
        rest = [max(0.0, expected(t.job.point) - (now - t.began)) for t in self._running.values()]
        points = self._jobs.waiting(self._running.keys())
        waiting = self._waiting() * mean if points is None else sum(map(expected, points))
        return waiting + sum(rest), max(rest, default=0.0)

    def _earlier(self) -> list[tuple[Work, float]]:
        """Work and seconds of trials that ended in earlier starts."""
        points = {name: r.point for r in self._jobs.results.values() for name in self._jobs.names(r)}
        return [(_work_of(points.get(name, Point())), took) for name, took in self._jobs.seconds.items()]

    def _left(self) -> str:
        work = self._work()
        if work is None:
            return "time left unknown until a trial ends"
        left, why = max(work[0] / self._slots, work[1]), ""
        for limit, name in self._limits():
            if limit < left:
                left, why = max(0.0, limit), f" (limits.{name})"
        return f"about {format_duration(left)} left{why}"

    def _limits(self) -> list[tuple[float, str]]:
        """Seconds until a limit ends the sweep, at the cost of all slots."""
        limits, found = self._jobs.space.limits, []
        if limits.hours is not None:
            found.append((3600 * limits.hours - (time.monotonic() - self._began), "hours"))
        if limits.cost is not None and self._budget is not None and self._budget.hourly:
            money = limits.cost - self._budget.spent(self._elapsed())
            found.append((3600 * money / (self._budget.hourly * self._slots), "cost"))
        return found

    def _cost(self) -> list[str]:
        if self._budget is None or not self._budget.hourly:
            return []
        spent, work, limit = self._budget.spent(self._elapsed()), self._work(), self._jobs.space.limits.cost
        if work is None:
            return [f"cost {spent:.2f}"]
        expected = spent + self._budget.hourly * work[0] / 3600
        within = f" (limits.cost {limit:g})" if limit is not None and expected > limit else ""
        return [f"cost {spent:.2f} of about {expected if not within else limit:.2f}{within}"]


def _work_of(point: Point) -> Work:
    return tuple((name, value) for name, value in point.items() if name in LENGTHENING)


def _cut(name: str, width: int) -> str:
    """`name` in so many letters; of a long one the middle is left out, because its seed stands at the end."""
    width = max(20, width)
    if len(name) <= width:
        return name
    tail = (width - 1) // 2
    return f"{name[: width - 1 - tail]}…{name[-tail:]}"


@dataclass(frozen=True)
class SweepResult:
    """What a sweep came to.

    `out` is its folder on this machine, `place` what the user calls it; `command` trains the best point
    again, empty where no trial finished.
    """

    out: Path
    place: str | Path
    space: SearchSpace
    points: tuple[PointResult, ...]
    best: PointResult | None
    command: str
    seconds: float
    report: tuple[Path, ...]

    @property
    def failures(self) -> dict[str, str]:
        """Why trials failed, by trial."""
        return {
            spaces.point_label(point.point, seed=seed): reason
            for point in self.points
            for seed, reason in point.failures.items()
        }


def opening(jobs: Jobs) -> list[str]:
    """What the sweep is, before it starts."""
    space = jobs.space
    axes = ", ".join(axis.name for axis in space.axes) or "nothing"
    early = {"asha": "asha by epoch", "median": "the median rule by epoch", "none": "none"}[space.scheduler]
    lines = [
        f"{space.name}: {space.points} points over {axes} by {space.search.sampler}, "
        f"seeds {', '.join(map(str, space.seeds))}: {jobs.total} trials in {jobs.place}",
        f"judged by {', '.join(f'{goal.metric} ({goal.mode})' for goal in space.goals)}; "
        f"early stopping: {early}" + (" (several goals run without)" if len(space.goals) > 1 else ""),
    ]
    if jobs.found:
        lines.append(f"{jobs.found} of them had ended before")
    return lines


def starting(jobs: Jobs, place: Place, dashboard: str | None) -> list[str]:
    """What stands on the screen while the trials run: how to watch, to stop and to go on."""
    many = f"{place.slots} trials at once" if place.slots > 1 else "one trial after another"
    workers = f", {place.workers} Ray Train workers each" if place.nested else ""
    lines = [
        f"{many}{workers}; Ctrl-C ends the sweep, and it goes on with:",
        f"  {resume_command(jobs.space, jobs.place)}",
        *watching(jobs),
    ]
    return lines + ([f"Ray's dashboard: {dashboard}"] if dashboard else [])


def watching(jobs: Jobs) -> list[str]:
    """Commands that show the sweep in a browser, while it runs and after."""
    storage = jobs.space.search.storage
    study = shown_storage(storage) if storage else str(jobs.folder / JOURNAL)
    return [
        f"watch: tensorboard --logdir {jobs.folder / TRIALS}   (SCALARS and HPARAMS)",
        f"       optuna-dashboard {study}",
    ]


def finished(out: Path, points: Iterable[PointResult]) -> list[Path]:
    """Folders of the trials that have values; a failed one may hold half a record."""
    folders = [out / TRIALS / spaces.point_label(p.point, seed=seed) for p in points for seed in p.values]
    return [folder for folder in folders if (folder / RECORD).exists()]


def close(result: SweepResult, jobs: Jobs, keeper: Keeper | None, console: Console, *, planned: str) -> None:
    """The table, what ended early, the failures, the best point as a command, and where things are."""
    records = [read_record(folder) for folder in finished(result.out, result.points)]
    if records:
        from newsbert_ray.reporting.tables import sweep_table

        seeds = len(result.space.seeds)
        console.print(sweep_table(records, metric=result.space.metric, mode=result.space.mode, seeds=seeds))
    for line in [*_outcome(result, jobs), *_best_lines(result)]:
        say(console, line)
    if keeper:
        say(console, keeper.line())
    html = [str(path) for path in result.report if path.suffix == ".html"]
    say(console, f"{result.seconds:.0f} s in all; report: {html[0] if html else result.out / 'report'}")
    for line in [planned, *watching(jobs)] if planned else watching(jobs):
        say(console, line)


def _outcome(result: SweepResult, jobs: Jobs) -> list[str]:
    stops = sum(len(point.stops) for point in result.points)
    skipped = sum(len(point.skipped) for point in result.points)
    lines = []
    if stops:
        seeds = f", {skipped} further seeds of theirs not begun" if skipped else ""
        lines.append(f"{stops} trials stopped early by {jobs.space.scheduler}{seeds}")
    if jobs.closed:
        lines.append(f"ended before its last trial, {jobs.unfinished} not begun: {jobs.closed}")
        lines.append(f"  go on with a wider limit: {resume_command(result.space, result.place)}")
    lines += [f"failed: {trial}: {reason}" for trial, reason in result.failures.items()]
    if result.failures:
        again = resume_command(result.space, result.place)
        lines.append(f"frames in {storage.join(result.place, FAILURES)}; try them again with: {again}")
    return lines


def _best_lines(result: SweepResult) -> list[str]:
    if result.best is None:
        return ["no trial finished"]
    lines = []
    if len(result.space.goals) > 1:
        lines.append("Pareto front (no other point is as good in every goal and better in one):")
        names = [goal.metric for goal in result.space.goals]
        for point in front(result.space, result.points):
            numbers = ", ".join(f"{n} {v:.4g}" for n, v in zip(names, point.means, strict=True))
            lines.append(f"  {point.label}: {numbers}")
    sd = f" (sd {result.best.sd:.4f})" if len(result.best.values) > 1 else ""
    lines.append(
        f"best: {result.best.label}, {result.space.metric} {result.best.mean:.4f}{sd}; train it again with:"
    )
    return [*lines, f"  {result.command}"]


def front(space: SearchSpace, points: Iterable[PointResult]) -> list[PointResult]:
    """The points with all seeds that make the Pareto front, the best by the first goal first."""
    whole = [point for point in points if len(point.values) == len(space.seeds)]
    signs = [1.0 if goal.mode == "max" else -1.0 for goal in space.goals]
    signed = [tuple(s * v for s, v in zip(signs, point.means, strict=True)) for point in whole]
    return [whole[i] for i in sorted(pareto_front(signed), key=lambda i: signed[i], reverse=True)]


def train_command(
    space: SearchSpace, best: PointResult, overrides: Mapping[str, Any], out: str | Path
) -> str:
    """The command that trains the best point again, with the first seed."""
    settings = spaces.flatten(spaces.absolute_folders(merge(space.settings, overrides, best.point)))
    settings |= {"seed": space.seeds[0], "out": str(storage.join(out, "best"))}
    words = [word for name, value in settings.items() for word in (f"--{name}", _word(value))]
    return shlex.join(["newsbert-ray", "train", *words])


def resume_command(space: SearchSpace, out: str | Path) -> str:
    """The command that goes on with the sweep; what else was asked stands in its folder."""
    return shlex.join(["newsbert-ray", "sweep", space.file, "--out", str(out), "--resume"])


def _word(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)


def say(console: Console, line: str) -> None:
    """One line, as it is: no markup, no colours, never broken."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
