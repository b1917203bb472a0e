"""A search played again on recorded learning curves, at the cost of no training: the sweep's own memory, jobs
and early stopping, with time counted in epochs. Knows no Ray."""

from __future__ import annotations

import heapq
import itertools
import json
import math
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from newsbert_ray.config import build_settings, merge
from newsbert_ray.methods import task_of
from newsbert_ray.record import METRICS, EarlyStop, RunRecord, find_records, read_record
from newsbert_ray.tune.space import (
    Axis,
    Point,
    Search,
    SearchSpace,
    Stopping,
    curves_of,
    flatten,
    point_label,
)
from newsbert_ray.tune.stopping import EPOCH, EarlyStopping
from newsbert_ray.tune.study import Memory
from newsbert_ray.tune.sweep_folder import SWEEP
from newsbert_ray.tune.trials import TRIALS, Curve, Job, Jobs, metric_value, trial_curve


class TableError(ValueError):
    """Records that cannot be replayed; the text says what is missing."""


@dataclass(frozen=True)
class Recorded:
    """What a trial came to that was trained to its end: (epochs done, metric) at each evaluation, and the
    number that its point is judged by."""

    name: str
    curve: Curve
    value: float


@dataclass(frozen=True)
class Table:
    """Every point of a grid, trained with every seed; `trials` by name (see `point_label`)."""

    axes: tuple[Axis, ...]
    seeds: tuple[int, ...]
    metric: str
    trials: Mapping[str, Recorded]

    @property
    def epochs(self) -> float:
        """Epochs that the whole grid took."""
        return sum(trial.curve[-1][0] for trial in self.trials.values())

    @property
    def points(self) -> list[Point]:
        """Every point, the last axis fastest."""
        return list(self.space(Search(sampler="grid")).grid())

    def space(
        self, search: Search, *, stopping: Stopping | None = None, start: Sequence[Point] = ()
    ) -> SearchSpace:
        """This grid's points as a search space, to be searched by `search`; nothing is stopped early unless
        asked for."""
        values = {
            "file": "replay",
            "name": "replay",
            "axes": self.axes,
            "seeds": self.seeds,
            "start": tuple(start),
            "search": search,
            "stopping": stopping or Stopping(scheduler="none"),
            "goals": ({"metric": self.metric, "mode": "max"},),
        }
        return build_settings(SearchSpace, values, where="replay")


@dataclass(frozen=True)
class Moment:
    """An evaluation of a replayed trial: what it found, the epochs since the one before, and whether it was
    the trial's last."""

    trial: Recorded
    epoch: float
    value: float
    cost: float
    stopped: bool
    finished: bool


@dataclass(frozen=True)
class Replay:
    """How a search went. `progress`: (trial-epochs spent, best point so far) whenever a better one came."""

    progress: tuple[tuple[float, float], ...]
    epochs: float
    trials: int
    stopped: int

    def best_at(self, epochs: float) -> float:
        """The best point found with so many trial-epochs; NaN before the first."""
        known = [value for spent, value in self.progress if spent <= epochs]
        return known[-1] if known else math.nan

    def epochs_to(self, value: float) -> float:
        """Trial-epochs spent when a point as good as `value` was found; infinite where none was."""
        return next((spent for spent, best in self.progress if best >= value), math.inf)


def read_table(folder: str | Path, *, metric: str | None = None) -> Table:
    """The finished grid sweep in `folder`: what varied by its sweep.json, values and curves by its records.

    Args:
        metric: one that is known at each evaluation (`schema.CURVES`); by default the first of the task's.
    Raises:
        TableError: no sweep there, or a point of the grid has no record.
        MetricError: a record without the metric.
    """
    folder = Path(folder)
    records = [read_record(path) for path in find_records(folder / TRIALS)]
    if not records or not (folder / SWEEP).exists():
        raise TableError(f"{folder}: no finished trials of a sweep there; give the folder of a grid sweep")
    names = json.loads((folder / SWEEP).read_text(encoding="utf-8"))["varied"]
    metric = metric or curves_of(task_of(records[0].settings))[0]
    flats = [flatten(record.settings) for record in records]
    axes = tuple(Axis(name=name, values=tuple(sorted({flat[name] for flat in flats}))) for name in names)
    seeds = tuple(sorted({record.seed for record in records}))
    trials = {}
    for record, flat in zip(records, flats, strict=True):
        label = point_label({name: flat[name] for name in names}, seed=record.seed)
        trials[label] = Recorded(label, record_curve(record, metric), metric_value(record, metric))
    table = Table(axes, seeds, metric, trials)
    labels = [point_label(point, seed=seed) for point in table.points for seed in seeds]
    missing = [label for label in labels if label not in trials]
    if missing:
        raise TableError(
            f"{folder}: {len(missing)} of the grid's {len(labels)} trials have not finished (such as "
            f"{missing[0]}); go on with `newsbert-ray sweep ... --resume`"
        )
    return table


def record_curve(record: RunRecord, metric: str) -> Curve:
    """(epochs done, metric) at each evaluation of a finished run."""
    flats = [flatten(entry) for entry in record.curve]
    return [(float(flat[EPOCH]), float(flat[metric])) for flat in flats if metric in flat]


def replay(table: Table, space: SearchSpace, *, slots: int = 2, epochs: float = math.inf) -> Replay:
    """Search the points of `table` as a sweep over `space` would have done.

    A point that the sampler chooses again costs nothing, as in a sweep. Only a point whose every seed was
    trained to its end counts as found.

    Args:
        space: over the table's own axes and seeds (see `Table.space`).
        slots: trials at once.
        epochs: trial-epochs after which it ends.
    """
    with tempfile.TemporaryDirectory(prefix="replay-", dir=_quickest()) as name:
        jobs = Jobs(space, Memory(space, Path(name)), Path(name))
        handed: dict[str, Job] = {}

        def take() -> Recorded | None:
            job = jobs.next_job()
            if job is None:
                return None
            handed[job.name] = job
            return table.trials[job.name]

        spent, stopped, progress = 0.0, 0, list[tuple[float, float]]()
        for moment in play(take, space, slots=slots):
            if spent + moment.cost > epochs:
                break
            spent += moment.cost
            job = handed[moment.trial.name]
            _leave(job, moment, space.metric)
            if moment.stopped:
                stopped += 1
                end = EarlyStop(epoch=moment.epoch, value=moment.value, seconds=0.0, reason=space.scheduler)
                jobs.stop(job, end)
            elif moment.finished:
                jobs.finish(job, values=(moment.trial.value,))
                best = jobs.best()
                if (
                    best
                    and len(best.values) == len(space.seeds)
                    and (not progress or best.mean != progress[-1][1])
                ):
                    progress.append((spent, best.mean))
        return Replay(tuple(progress), spent, len(handed), stopped)


def play(take: Callable[[], Recorded | None], space: SearchSpace, *, slots: int) -> Iterator[Moment]:
    """Every evaluation of the trials that `take` gives, in the order in which `slots` at once make them.

    An epoch takes each trial the same time. `take` is asked whenever a slot is free, and after the last trial
    that it gave has ended or evaluated.
    """
    judge: EarlyStopping | None = None
    running: list[tuple[float, int, int, Recorded]] = []  # due, order, index in the curve, trial
    order, clock = itertools.count(), 0.0
    while True:
        while len(running) < slots and (trial := take()) is not None:
            heapq.heappush(running, (clock + trial.curve[0][0], next(order), 0, trial))
            judge = judge or EarlyStopping(space, epochs=round(trial.curve[-1][0]))
        if not running or judge is None:
            return
        clock, _, index, trial = heapq.heappop(running)
        (epoch, value), last = trial.curve[index], index + 1 == len(trial.curve)
        before = trial.curve[index - 1][0] if index else 0.0
        numbers = {EPOCH: epoch, space.metric: value}
        stopped = judge.stops(trial.name, numbers, epochs=round(trial.curve[-1][0]))
        if not last and not stopped:
            due = clock + trial.curve[index + 1][0] - epoch
            heapq.heappush(running, (due, next(order), index + 1, trial))
        yield Moment(trial, epoch, value, epoch - before, stopped, last and not stopped)


def _quickest() -> str | None:
    """A folder in memory where the system has one: a replay's memory is written as durably as a sweep's."""
    shared = "/dev/shm"
    return shared if os.access(shared, os.W_OK) else None


def _leave(job: Job, moment: Moment, metric: str) -> None:
    """The line that a trial leaves of an evaluation, where the jobs look for it."""
    entry = merge({"kind": "evaluation", EPOCH: moment.epoch}, {metric: moment.value})
    job.out.mkdir(parents=True, exist_ok=True)
    with (job.out / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


REPLAYS = 20
"""Orders of the trials that are played through."""


@dataclass(frozen=True)
class Saving:
    """What early stopping leaves: the share of all epochs, the share of trials that reach their end, and what
    that was concluded from."""

    epochs: float
    finished: float
    source: str


def recorded_curves(folder: str | Path, metric: str) -> list[Curve]:
    """The learning curves of an earlier sweep's trials, those stopped early included."""
    found = [trial_curve(path, metric) for path in sorted((Path(folder) / TRIALS).glob("*"))]
    return [curve for curve in found if curve]


def early_stopping(
    space: SearchSpace, epochs: Sequence[int], *, slots: int, curves: Sequence[Curve] | None = None
) -> Saving:
    """What the space's early stopping leaves of trials of so many `epochs`: the mean over REPLAYS orders.

    Recorded curves are dealt out by chance; one that is too short keeps its last value. Without any, every
    trial keeps its rank from the first epoch to the last, and any order of the ranks is as likely as another.
    """
    chance = random.Random(space.search.seed)
    spent, finished = 0.0, 0
    for _ in range(REPLAYS):
        take = partial(next, iter(_dealt(epochs, curves or (), chance)), None)
        for moment in play(take, space, slots=slots):
            spent += moment.cost
            finished += moment.finished
    source = "assumed: trials keep their rank from the first epoch to the last and come in any order"
    if curves:
        source = f"played through on {len(curves)} recorded curves in any order"
    return Saving(spent / (REPLAYS * sum(epochs)), finished / (REPLAYS * len(epochs)), source)


def _dealt(epochs: Sequence[int], curves: Sequence[Curve], chance: random.Random) -> list[Recorded]:
    """A curve for each trial, at whole epochs."""
    if not curves:
        drawn: Sequence[Curve] = [[(1.0, chance.random())] for _ in epochs]
    elif len(curves) >= len(epochs):
        drawn = chance.sample(curves, len(epochs))
    else:
        drawn = chance.choices(curves, k=len(epochs))
    dealt = []
    for number, (last, curve) in enumerate(zip(epochs, drawn, strict=True)):
        values = [(float(epoch), _value_at(curve, epoch)) for epoch in range(1, last + 1)]
        dealt.append(Recorded(f"trial {number}", values, values[-1][1]))
    return dealt


def _value_at(curve: Curve, epoch: int) -> float:
    """The last value by the end of `epoch`; before the first evaluation, the first one's."""
    known = [value for at, value in curve if at <= epoch]
    return known[-1] if known else curve[0][1]
