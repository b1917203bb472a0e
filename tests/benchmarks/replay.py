"""A search repeated on the recorded learning curves of a grid sweep, without training: the sweep's own study,
trials and early stopping, with time counted in epochs."""

from __future__ import annotations

import heapq
import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from newsbert_ray.config import build_settings, merge
from newsbert_ray.methods import task_of
from newsbert_ray.record import METRICS, EarlyStop, RunRecord, find_records, read_record
from newsbert_ray.reporting.sweep_data import SWEEP, TRIALS, Axis, Trial, point_label, validation_metrics
from newsbert_ray.settings import flatten
from newsbert_ray.storage.workdir import WorkDir
from newsbert_ray.tune.space import PointValues, Search, SearchSpace, Stopping
from newsbert_ray.tune.study import EPOCH, Curve, EarlyStopping, SweepStudy
from newsbert_ray.tune.trials import Trials, metric_value


@dataclass(frozen=True)
class RecordedTrial:
    """A trial that was trained to its end: (epochs done, metric) at each evaluation, and its final value."""

    name: str
    curve: Curve
    value: float


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a simulated trial; `cost`: epochs since the evaluation before."""

    trial: RecordedTrial
    epoch: float
    value: float
    cost: float
    stopped: bool
    finished: bool


def simulate(
    next_trial: Callable[[], RecordedTrial | None], space: SearchSpace, *, slots: int
) -> Iterator[Evaluation]:
    """Every evaluation of recorded trials, in the order in which `slots` at once would make them.

    An epoch takes the same time in every trial. `next_trial` is called whenever a slot is free.
    """
    early: EarlyStopping | None = None
    running: list[tuple[float, int, int, RecordedTrial]] = []  # due, order, index in the curve, trial
    order, clock = itertools.count(), 0.0
    while True:
        while len(running) < slots and (trial := next_trial()) is not None:
            heapq.heappush(running, (clock + trial.curve[0][0], next(order), 0, trial))
            early = early or EarlyStopping(space, epochs=round(trial.curve[-1][0]))
        if not running or early is None:
            return
        clock, _, index, trial = heapq.heappop(running)
        (epoch, value), last = trial.curve[index], index + 1 == len(trial.curve)
        before = trial.curve[index - 1][0] if index else 0.0
        result = {EPOCH: epoch, space.metric: value}
        stopped = early.should_stop(trial.name, result, epochs=round(trial.curve[-1][0]))
        if not last and not stopped:
            due = clock + trial.curve[index + 1][0] - epoch
            heapq.heappush(running, (due, next(order), index + 1, trial))
        yield Evaluation(trial, epoch, value, epoch - before, stopped, last and not stopped)


class TableError(ValueError):
    """Records that cannot be replayed; the text says what is missing."""


@dataclass(frozen=True)
class Table:
    """Every point of a grid, trained with every seed; `trials` by name (see `point_label`)."""

    axes: tuple[Axis, ...]
    seeds: tuple[int, ...]
    metric: str
    trials: Mapping[str, RecordedTrial]

    @property
    def epochs(self) -> float:
        """Epochs that the whole grid took."""
        return sum(trial.curve[-1][0] for trial in self.trials.values())

    @property
    def points(self) -> list[PointValues]:
        """Every point, the last axis fastest."""
        return list(self.space(Search(sampler="grid")).grid())

    def space(
        self, search: Search, *, stopping: Stopping | None = None, start: Sequence[PointValues] = ()
    ) -> SearchSpace:
        """This grid's points as a search space for `search`; without early stopping by default."""
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
class Replay:
    """How a search went. `progress`: (trial-epochs spent, best point so far) at each improvement."""

    progress: tuple[tuple[float, float], ...]
    epochs: float
    trials: int
    stopped: int

    def best_at(self, epochs: float) -> float:
        """The best point after so many trial-epochs; NaN before the first."""
        known = [value for spent, value in self.progress if spent <= epochs]
        return known[-1] if known else math.nan

    def epochs_to(self, value: float) -> float:
        """Trial-epochs spent until a point as good as `value`; infinite where none was."""
        return next((spent for spent, best in self.progress if best >= value), math.inf)


def read_table(folder: str | Path, *, metric: str | None = None) -> Table:
    """The finished grid sweep in `folder`: its axes from sweep.json, values and curves from its records.

    Args:
        metric: one that is known at each evaluation; by default the task's first.
    Raises:
        TableError: no sweep there, or a point of the grid has no record.
        RecordError: a record without the metric.
    """
    folder = Path(folder)
    records = [read_record(path) for path in find_records(folder / TRIALS)]
    if not records or not (folder / SWEEP).exists():
        raise TableError(f"{folder}: no finished trials of a sweep; give the folder of a grid sweep")
    names = json.loads((folder / SWEEP).read_text(encoding="utf-8"))["varied"]
    metric = metric or validation_metrics(task_of(records[0].settings))[0]
    flats = [flatten(record.settings) for record in records]
    axes = tuple(Axis(name=name, values=tuple(sorted({flat[name] for flat in flats}))) for name in names)
    seeds = tuple(sorted({record.seed for record in records}))
    trials = {}
    for record, flat in zip(records, flats, strict=True):
        label = point_label({name: flat[name] for name in names}, seed=record.seed)
        trials[label] = RecordedTrial(label, record_curve(record, metric), metric_value(record, metric))
    table = Table(axes, seeds, metric, trials)
    labels = [point_label(point, seed=seed) for point in table.points for seed in seeds]
    missing = [label for label in labels if label not in trials]
    if missing:
        raise TableError(
            f"{folder}: {len(missing)} of the grid's {len(labels)} trials have not finished (such as "
            f"{missing[0]}); continue with `newsbert-ray sweep ... --resume`"
        )
    return table


def record_curve(record: RunRecord, metric: str) -> Curve:
    """(epochs done, metric) at each evaluation of a finished run."""
    flats = [flatten(entry) for entry in record.curve]
    return [(float(flat[EPOCH]), float(flat[metric])) for flat in flats if metric in flat]


def replay(table: Table, space: SearchSpace, *, slots: int = 2, epochs: float = math.inf) -> Replay:
    """Search the points of `table` as a sweep over `space` would have done.

    A point that the sampler draws again costs nothing, as in a sweep. Only a point that every seed finished
    counts as a result.

    Args:
        space: over the table's own axes and seeds (see `Table.space`).
        slots: trials at once.
        epochs: trial-epochs after which it ends.
    """
    with tempfile.TemporaryDirectory(prefix="replay-", dir=_memory_folder()) as name:
        trials = Trials(space, SweepStudy(space, Path(name)), WorkDir.at(name))
        started: dict[str, Trial] = {}

        def next_trial() -> RecordedTrial | None:
            spec = trials.next_trial()
            if spec is None:
                return None
            started[spec.name] = spec
            return table.trials[spec.name]

        spent, stopped, progress = 0.0, 0, list[tuple[float, float]]()
        for evaluation in simulate(next_trial, space, slots=slots):
            if spent + evaluation.cost > epochs:
                break
            spent += evaluation.cost
            spec = started[evaluation.trial.name]
            _write_entry(trials.out(spec.name), evaluation, space.metric)
            if evaluation.stopped:
                stopped += 1
                end = EarlyStop(
                    epoch=evaluation.epoch, value=evaluation.value, seconds=0.0, reason=space.scheduler
                )
                trials.stop(spec, end)
            elif evaluation.finished:
                trials.finish(spec, (evaluation.trial.value,))
                best = trials.best()
                if best and best.state == "finished":
                    value = best.means[0]
                    if not progress or value != progress[-1][1]:
                        progress.append((spent, value))
        return Replay(tuple(progress), spent, len(started), stopped)


def _memory_folder() -> str | None:
    """A folder in memory where the system has one: the study is written as durably as a sweep's."""
    shared = "/dev/shm"
    return shared if os.access(shared, os.W_OK) else None


def _write_entry(folder: Path, evaluation: Evaluation, metric: str) -> None:
    """The line that a trial writes for an evaluation."""
    entry = merge({"kind": "evaluation", EPOCH: evaluation.epoch}, {metric: evaluation.value})
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
