"""What a person sees of a running sweep: a live table on a terminal, plain lines elsewhere. Knows no Ray."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from newsbert_ray.tune.jobs import Job, Jobs

EVERY_SECONDS = 30.0
"""Least time between two lines about the whole, where output is no terminal."""


class SweepDisplay:
    """Shows a sweep's trials as they start, report and end."""

    def __init__(self, jobs: Jobs, *, slots: int, console: Console) -> None:
        self._jobs = jobs
        self._slots = slots
        self._console = console
        self._began = self._said = time.monotonic()
        self._running: dict[str, tuple[float, Mapping[str, float]]] = {}
        self._seconds: list[float] = []
        self._live: Live | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Live on a terminal for as long as the block runs."""
        if not self._console.is_terminal:
            yield
            return
        live = Live(console=self._console, get_renderable=self._table, refresh_per_second=2, transient=True)
        try:
            with live as self._live:
                yield
        finally:
            self._live = None

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def started(self, job: Job) -> None:
        """A trial begins."""
        self._running[job.name] = (time.monotonic(), {})

    def reported(self, job: Job, numbers: Mapping[str, float]) -> None:
        """A trial has evaluated."""
        began, _ = self._running.get(job.name, (time.monotonic(), {}))
        self._running[job.name] = (began, numbers)

    def ended(self, job: Job) -> None:
        """A trial has ended; its value or failure stands in the jobs."""
        began, _ = self._running.pop(job.name, (time.monotonic(), {}))
        self._seconds.append(time.monotonic() - began)
        result = self._jobs.results[job.label]
        if job.seed in result.values:
            outcome = f"{self._jobs.space.metric} {result.values[job.seed][0]:.4f}"
        elif job.seed in result.stops:
            stop = result.stops[job.seed]
            outcome = f"stopped early at epoch {stop.epoch:g} ({stop.reason}): {stop.value:.4f}"
        else:
            outcome = f"failed: {result.failures[job.seed]}"
        if self._live is None or job.seed in result.failures:
            self.say(f"{self._counts()}  {job.name}  {outcome}  {self._seconds[-1]:.1f} s")
            self._said = time.monotonic()

    def tick(self) -> None:
        """Called often; where there is no live table, says now and then how things stand."""
        if self._live is None and time.monotonic() - self._said >= EVERY_SECONDS:
            self._said = time.monotonic()
            self.say(f"{self._counts()}  {len(self._running)} running, {self._left()}{self._best()}")

    def _counts(self) -> str:
        return f"[{self._jobs.total - self._jobs.unfinished}/{self._jobs.total}]"

    def _left(self) -> str:
        waiting = self._jobs.unfinished
        if not self._seconds:
            return "time left unknown until a trial ends"
        seconds = waiting / self._slots * sum(self._seconds) / len(self._seconds)
        return f"about {_duration(seconds)} left"

    def _best(self) -> str:
        best = self._jobs.best()
        return f", best so far {best.label} {best.mean:.4f}" if best else ""

    def _table(self) -> Group:
        failed = sum(len(result.failures) for result in self._jobs.results.values())
        done = self._jobs.total - self._jobs.unfinished - failed
        waiting = max(0, self._jobs.unfinished - len(self._running))
        counts = f"{done} done, {len(self._running)} running, {waiting} waiting, {failed} failed"
        table = Table()
        for heading in ("trial", "epoch", self._jobs.space.metric, "seconds"):
            table.add_column(heading, justify="left" if heading == "trial" else "right")
        now = time.monotonic()
        for name, (began, numbers) in list(self._running.items()):
            epoch, value = numbers.get("epoch"), numbers.get(self._jobs.space.metric)
            cells = ["" if epoch is None else f"{epoch:g}", "" if value is None else f"{value:.4f}"]
            table.add_row(name, *cells, f"{now - began:.0f}")
        head = f"{self._jobs.space.name}: {counts}, {self._left()}{self._best()}"
        return Group(Text(head), table)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"
