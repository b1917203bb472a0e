"""What a sweep will take, before anything is spent: from a few timed steps to hours and money. Knows no Ray
(`calibrate` times)."""

from __future__ import annotations

import heapq
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from newsbert_ray import inputs
from newsbert_ray.config import SettingsError, TrainSettings
from newsbert_ray.tasks import TaskName
from newsbert_ray.tune import space as spaces
from newsbert_ray.tune.calibrate import Calibration, calibrate
from newsbert_ray.tune.jobs import Curve
from newsbert_ray.tune.kinds import Times, kinds_to_time
from newsbert_ray.tune.limits import hourly_price
from newsbert_ray.tune.memory import Memory
from newsbert_ray.tune.place import Place
from newsbert_ray.tune.saving import Saving, early_stopping
from newsbert_ray.tune.space import Point, SearchSpace

if TYPE_CHECKING:
    from newsbert_ray.data.shards import Manifest

BETWEEN_SECONDS = 0.1
"""From a trial's end to the next one's start in its slot: Ray Tune's own."""
AROUND_SECONDS = 6.0
"""Before the first trial and after the last one: Tune's imports and its end, the report."""
GROUP_SECONDS = 20.0
"""A nested Ray Train group's start and end, which no step shows."""


@dataclass(frozen=True)
class Planned:
    """The trials of a sweep as far as they can be known before it: settings of each, how many that the
    sampler drew were the same as another or cannot be; and for each trial the settings of the runs that have
    to come before it (a frozen teacher's, say), where it is the first to need them."""

    trials: tuple[TrainSettings, ...]
    points: int
    again: int
    impossible: int
    firsts: tuple[tuple[TrainSettings, ...], ...] = ()

    @property
    def work(self) -> list[TrainSettings]:
        """Everything that is trained."""
        return [*self.trials, *(run for runs in self.firsts for run in runs)]


@dataclass(frozen=True)
class Cost:
    """Seconds of one trial: before its first step, per whole course, and after its last one."""

    start: float
    course: float
    end: float
    steps: int
    epochs: int

    def seconds(self, *, course: float = 1.0, end: float = 1.0) -> float:
        """The whole trial's, or those of one with such shares of its course and its end."""
        return self.start + course * self.course + end * self.end


@dataclass(frozen=True)
class Amount:
    """What a sweep takes: seconds of all trials together, wall time, money."""

    trial_seconds: float
    wall: float
    money: float


@dataclass(frozen=True)
class Estimate:
    """A sweep's plan. `whole`: every trial to its end; `stopped`: with early stopping, where there is any."""

    space: SearchSpace
    place: Place
    planned: Planned
    costs: tuple[Cost, ...]
    calibration: Calibration
    whole: Amount
    saving: Saving | None
    stopped: Amount | None

    @property
    def expected(self) -> Amount:
        """What the sweep as it is asked for should take."""
        return self.stopped or self.whole

    def lines(self) -> list[str]:
        """The plan for a person, a line each."""
        return [*self._work(), *self._amounts(), *self._limits()]

    def _work(self) -> list[str]:
        planned, seconds = self.planned, [cost.seconds() for cost in self.costs]
        steps = sum(cost.steps for cost in self.costs)
        lines = [
            f"{self.space.name}: {planned.points} points, {len(self.costs)} trials, {steps:,} steps, "
            f"{sum(cost.epochs for cost in self.costs):,} epochs",
        ]
        if planned.again:
            lines.append(f"{planned.again} points come twice when drawn by chance; they cost nothing")
        if planned.impossible:
            lines.append(f"{planned.impossible} points are combinations that cannot be; they cost nothing")
        per_step = [1000 * parts.step for parts in self.calibration.parts]
        lines += [
            f"timed in {shown_seconds(self.calibration.seconds)} on {self.place.slots} trials at once: "
            f"{len(per_step)} kinds of trial, a step {_span(per_step, '.0f')} ms",
            f"a trial to its end: {_span(seconds, '.1f')} s, mean {statistics.fmean(seconds):.1f} s",
        ]
        return lines

    def _amounts(self) -> list[str]:
        lines = [f"every trial to its end: {self._amount(self.whole)}"]
        if self.saving and self.stopped:
            lines += [
                f"with {self.space.scheduler}: {self._amount(self.stopped)}",
                f"  {self.saving.epochs:.0%} of the epochs, {self.saving.finished:.0%} of the trials to the "
                f"end; {self.saving.source}",
            ]
        return lines

    def _amount(self, amount: Amount) -> str:
        hours, workers = amount.trial_seconds / 3600, self.place.workers
        found = [
            f"{shown_seconds(amount.wall)} at {self.place.slots} trials at once",
            f"{hours * self.place.cpus * workers:.2f} CPU-hours",
        ]
        if self.place.gpus:
            found.append(f"{hours * self.place.gpus * workers:.2f} GPU-hours")
        prices = self.space.prices
        found.append(f"cost {amount.money:.2f}" if prices.cpu_hour or prices.gpu_hour else "no prices given")
        return ", ".join(found)

    def _limits(self) -> list[str]:
        limits, lines = self.space.limits, []
        asked = (
            ("hours", limits.hours, self.expected.wall / 3600),
            ("cost", limits.cost, self.expected.money),
        )
        for name, limit, expected in asked:
            if limit is not None and expected > limit:
                share = limit / expected
                lines.append(
                    f"limits.{name} = {limit:g} ends it early: after about {share * len(self.costs):.0f} of "
                    f"{len(self.costs)} trials"
                )
        if limits.target is not None:
            lines.append(f"limits.target = {limits.target:g} may end it earlier")
        return lines


def estimate_sweep(
    space: SearchSpace,
    place: Place,
    *,
    overrides: Mapping[str, Any],
    folder: Path,
    session_seconds: float = 0.0,
    curves: Sequence[Curve] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Estimate:
    """Time a few steps of each kind of trial, where and as many at once as the sweep would, and add up.

    Call it inside a Ray session; it takes some ten seconds a kind.

    Args:
        overrides: training settings over the space's.
        folder: for the calibration's files, on the sweep's disk; what it leaves there is removed.
        session_seconds: what Ray's start took.
        curves: recorded ones, for early stopping (see `recorded_curves`).
        say: gets a line before it starts.
    Raises:
        SettingsError: no point of the space can be.
    """
    planned = planned_trials(space, overrides=overrides)
    kinds = kinds_to_time(planned.work)
    say(f"timing a few steps of {len(kinds)} kinds of trial, {place.slots} at once")
    calibration = calibrate(kinds, place, folder=folder)
    return predict(space, planned, calibration, place, session_seconds=session_seconds, curves=curves)


def planned_trials(space: SearchSpace, *, overrides: Mapping[str, Any]) -> Planned:
    """The trials that a sweep over `space` runs: a grid's own, or as many drawn by chance as are asked for.

    Raises:
        SettingsError: no point can be.
    """
    points = _points(space)
    distinct = {spaces.point_label(point): point for point in points}
    found, fault = [], None
    for point in distinct.values():
        for seed in space.seeds:
            try:
                out = Path("plan")
                found.append(spaces.trial_settings(space, point, seed=seed, out=out, overrides=overrides))
            except SettingsError as error:
                fault = error
    if fault and not found:
        raise fault
    impossible = len(distinct) - len(found) // len(space.seeds)
    again = len(points) - len(distinct)
    return Planned(tuple(found), len(points), again, impossible, tuple(_first_runs(found)))


def _first_runs(trials: Sequence[TrainSettings]) -> Iterator[tuple[TrainSettings, ...]]:
    from newsbert_ray.training.first import first_runs

    seen = set[str]()
    for settings in trials:
        fresh = {run.model_dump_json(): run for run in first_runs(settings)}
        yield tuple(run for key, run in fresh.items() if key not in seen)
        seen |= fresh.keys()


def _points(space: SearchSpace) -> list[Point]:
    if space.search.sampler == "grid":
        return list(space.grid())
    search = space.search.model_copy(update={"sampler": "random", "storage": None})
    with tempfile.TemporaryDirectory(prefix="plan-") as name:
        memory, found = Memory(space.model_copy(update={"search": search}), Path(name)), []
        while (drawn := memory.next_point()) is not None:
            found.append(drawn[1])
        return found


def predict(
    space: SearchSpace,
    planned: Planned,
    calibration: Calibration,
    place: Place,
    *,
    session_seconds: float = 0.0,
    curves: Sequence[Curve] | None = None,
) -> Estimate:
    """Add up what was timed: each trial's steps, evaluations, checkpoints, start and end, slot by slot."""
    times = Times(calibration)
    firsts = planned.firsts or ((),) * len(planned.trials)
    costs = tuple(_cost(settings, times, runs) for settings, runs in zip(planned.trials, firsts, strict=True))
    around = session_seconds + calibration.process + calibration.parts[0].cold + AROUND_SECONDS
    hourly = hourly_price(space.prices, cpus=place.cpus * place.workers, gpus=place.gpus * place.workers)

    def amount(*, course: float = 1.0, end: float = 1.0) -> Amount:
        seconds = [cost.seconds(course=course, end=end) for cost in costs]
        return Amount(sum(seconds), around + wall_seconds(seconds, place.slots), hourly * sum(seconds) / 3600)

    saving, stopped = None, None
    if space.scheduler != "none":
        saving = early_stopping(space, [cost.epochs for cost in costs], slots=place.slots, curves=curves)
        stopped = amount(course=saving.epochs, end=saving.finished)
    return Estimate(space, place, planned, costs, calibration, amount(), saving, stopped)


def _cost(settings: TrainSettings, times: Times, firsts: Sequence[TrainSettings] = ()) -> Cost:
    """Seconds of one trial from its parts and their numbers; `firsts` are trained before it."""
    parts, workers = times.parts(settings), settings.workers
    rows = _rows(settings.data, settings.task)
    steps, evaluations, checkpoints = _numbers(
        settings.data,
        settings.task,
        settings.batch_size,
        settings.epochs,
        settings.train_rows,
        settings.evaluate_every,
        settings.checkpoint.every_steps,
    )
    validation, test = (parts.title * count / workers for count in rows)
    return Cost(
        start=parts.start
        + BETWEEN_SECONDS
        + (GROUP_SECONDS if workers > 1 else 0.0)
        + sum(_cost(first, times).seconds() for first in firsts),
        course=steps * parts.step + evaluations * (validation + parts.best) + checkpoints * parts.checkpoint,
        end=test + parts.end,
        steps=steps,
        epochs=settings.epochs,
    )


@lru_cache(maxsize=8)
def _at_hand(data: str) -> str:
    return str(inputs.fetch(data))


@lru_cache(maxsize=8)
def _manifest(folder: str) -> Manifest:
    from newsbert_ray.data.shards import read_manifest

    return read_manifest(_at_hand(folder))


@lru_cache(maxsize=64)
def _rows(data: str, task: TaskName) -> tuple[int, int]:
    """What an evaluation reads of validation and of test: titles, impressions or pairs; of a test split
    without labels nothing."""
    manifest = _manifest(data)
    test = manifest.rows("test", task) if manifest.examples("test", task) else 0
    return manifest.rows("validation", task), test


@lru_cache(maxsize=1024)
def _numbers(
    data: str,
    task: TaskName,
    batch_size: int,
    epochs: int,
    train_rows: int | None,
    every: int | None,
    written: int | None,
) -> tuple[int, int, int]:
    """A trial's updates, evaluations and checkpoints."""
    from newsbert_ray.data.order import Order
    from newsbert_ray.data.reading import Course

    course = Course(_at_hand(data), _manifest(data), Order(0, batch_size), epochs, train_rows, task=task)
    steps, ends = 0, set[int]()
    for epoch in range(epochs):
        steps += course.steps(epoch)
        ends.add(steps)
    evaluated = ends | set(range(every, steps + 1, every) if every else ())
    return steps, len(evaluated), len(evaluated | set(range(written, steps + 1, written) if written else ()))


def wall_seconds(seconds: Sequence[float], slots: int) -> float:
    """When the last trial ends, if each free slot takes the next one in order."""
    ends = [0.0] * slots
    for duration in seconds:
        heapq.heapreplace(ends, ends[0] + duration)
    return max(ends)


def shown_seconds(seconds: float) -> str:
    """`45 s`, `12.0 min` or `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _span(values: Sequence[float], form: str) -> str:
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"
