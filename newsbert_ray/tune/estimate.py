"""What a sweep will take, before anything is spent: from a few timed steps to hours and money. Knows no Ray
(`calibrate` times)."""

from __future__ import annotations

import heapq
import itertools
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from newsbert_ray.config import SCRATCH, SettingsError, TrainSettings, build_settings, merge
from newsbert_ray.files import format_duration
from newsbert_ray.methods import TaskName
from newsbert_ray.storage import inputs
from newsbert_ray.tune import space as spaces
from newsbert_ray.tune.replay import Saving, early_stopping
from newsbert_ray.tune.resources import Place
from newsbert_ray.tune.space import Point, SearchSpace, check_depth, flatten
from newsbert_ray.tune.study import Memory
from newsbert_ray.tune.trials import Curve, hourly_price

if TYPE_CHECKING:
    import torch

    from newsbert_ray.data.order import Ints
    from newsbert_ray.data.reading import TrainingSchedule
    from newsbert_ray.data.shards import Manifest
    from newsbert_ray.training.step import Learner
    from newsbert_ray.tune.resources import Place
    from newsbert_ray.tune.space import SearchSpace


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
            f"timed in {format_duration(self.calibration.seconds)} on {self.place.slots} trials at once: "
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
            f"{format_duration(amount.wall)} at {self.place.slots} trials at once",
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
    from newsbert_ray.training.prerequisites import all_prerequisites

    seen = set[str]()
    for settings in trials:
        fresh = {run.model_dump_json(): run for run in all_prerequisites(settings)}
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
    from newsbert_ray.data.reading import TrainingSchedule

    schedule = TrainingSchedule(
        _at_hand(data), _manifest(data), Order(0, batch_size), epochs, train_rows, task=task
    )
    steps, ends = 0, set[int]()
    for epoch in range(epochs):
        steps += schedule.steps(epoch)
        ends.add(steps)
    evaluated = ends | set(range(every, steps + 1, every) if every else ())
    return steps, len(evaluated), len(evaluated | set(range(written, steps + 1, written) if written else ()))


def wall_seconds(seconds: Sequence[float], slots: int) -> float:
    """When the last trial ends, if each free slot takes the next one in order."""
    ends = [0.0] * slots
    for duration in seconds:
        heapq.heapreplace(ends, ends[0] + duration)
    return max(ends)


def _span(values: Sequence[float], form: str) -> str:
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"


STEPS = 12
"""Updates that are timed, after WARM_UP more; they stand for SAMPLE updates by their sizes."""
WARM_UP = 3
SAMPLE = 60
EVALUATIONS = 4
"""Batches of the validation split that are timed."""


@dataclass(frozen=True)
class Parts:
    """Seconds of a trial's parts; with several workers those of each worker's share.

    Attributes:
        cold: what a process's first trial takes more: imports, the teacher's weights, the shards.
        start: from a trial's start to its first step in a process that has run another.
        step: one update, its batch included.
        title: one title evaluated with both models.
        checkpoint: one checkpoint written.
        best: the best model written.
        end: the best model read back, the student written, the checkpoints removed.
    """

    cold: float
    start: float
    step: float
    title: float
    checkpoint: float
    best: float
    end: float


@dataclass(frozen=True)
class Calibration:
    """Parts of each kind of trial that was timed, `process` seconds until a process is there at all, and how
    long all of it took."""

    settings: tuple[TrainSettings, ...]
    parts: tuple[Parts, ...]
    process: float
    seconds: float


def calibrate(kinds: Sequence[TrainSettings], place: Place, *, folder: Path) -> Calibration:
    """Time each kind of trial on as many workers at once as the sweep will have, where Ray places them.

    Call it inside a Ray session; its actors are gone when it returns.

    Args:
        kinds: settings that differ in their work.
        folder: for checkpoints, on the sweep's disk; all nodes must see it.
    Raises:
        ShardError, EncoderError, SettingsError, LossError: as the trials themselves would.
    """
    import ray
    from ray.exceptions import RayTaskError

    began = time.monotonic()
    options: dict[str, Any] = {"num_cpus": place.cpus, "num_gpus": place.gpus}
    actor: Any = ray.remote(**options)(_Timer)
    timers = [actor.remote() for _ in range(place.slots * place.workers)]
    try:
        ray.get([timer.ready.remote() for timer in timers])
        process = time.monotonic() - began
        folders = [str(folder.absolute() / f"slot-{number}") for number in range(len(timers))]
        parts = []
        for settings in kinds:
            calls = [t.time.remote(settings.model_dump(), f) for t, f in zip(timers, folders, strict=True)]
            parts.append(_mean(ray.get(calls)))
    except RayTaskError as error:
        raise error.cause from error
    finally:
        for timer in timers:
            ray.kill(timer)
    return Calibration(tuple(kinds), tuple(parts), process, time.monotonic() - began)


class _Timer:
    """An actor in a slot: like a sweep's, it keeps its process from one kind of trial to the next."""

    def ready(self) -> None:
        """Returns once the process is there."""

    def time(self, settings: dict[str, Any], folder: str) -> Parts:
        return time_parts(build_settings(TrainSettings, settings, where="calibration"), folder=Path(folder))


def _mean(found: Sequence[Parts]) -> Parts:
    names = [field.name for field in fields(Parts)]
    return Parts(**{name: statistics.fmean(getattr(parts, name) for parts in found) for name in names})


def time_parts(settings: TrainSettings, *, folder: Path) -> Parts:
    """Time the parts of a trial of `settings` in this process: WARM_UP + STEPS updates of its first epoch, a
    few batches evaluated, files written into `folder`, where nothing stays.

    Of several workers one's share is timed, without what they say to each other.
    """

    from newsbert_ray.evaluation.encoding import device_seconds
    from newsbert_ray.training.run import pick_device

    if settings.workers > 1:
        share = max(settings.optimizer.accumulate, settings.batch_size // settings.workers)
        settings = settings.model_copy(update={"workers": 1, "batch_size": share})
    settings = inputs.at_hand(settings)
    device, run = pick_device(settings), folder / "run"
    try:
        marks = [time.perf_counter()]
        for _ in range(2):  # the second start is that of a process that has run a trial before
            learner, schedule = _start(settings, device, run)
            marks.append(device_seconds(device))
        warm = marks[2] - marks[1]
        first, step = _steps(learner, schedule, device)
        title = _title(learner, schedule, device)
        checkpoint, best, end = _files(learner, schedule, run, device)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Parts(
        cold=max(0.0, marks[1] - marks[0] - warm),
        start=warm + max(0.0, first - step),
        step=step,
        title=title,
        checkpoint=checkpoint,
        best=best,
        end=end,
    )


def _start(settings: TrainSettings, device: torch.device, run: Path) -> tuple[Learner, TrainingSchedule]:
    """What a trial does before its first step."""
    from newsbert_ray.data.reading import make_schedule, read_updates
    from newsbert_ray.data.shards import read_manifest
    from newsbert_ray.training.journal import Journal
    from newsbert_ray.training.worker import build_worker_learner
    from newsbert_ray.world import World

    manifest = read_manifest(settings.data)
    schedule = make_schedule(settings, manifest)
    learner = build_worker_learner(settings, manifest, schedule, World(device=device), stand_in=True)
    Journal(run, done=0).close()
    next(read_updates(schedule))
    return learner, schedule


def _steps(learner: Learner, schedule: TrainingSchedule, device: torch.device) -> tuple[float, float]:
    """Seconds of a trial's first update, and of a later one with its batch's making.

    Updates differ by the length of their titles: those timed lie evenly between the smallest and the largest
    of a sample.
    """
    from newsbert_ray.data.reading import read_updates
    from newsbert_ray.evaluation.encoding import device_seconds
    from newsbert_ray.training.step import train_step

    count = min(SAMPLE, schedule.steps(0))
    began = time.perf_counter()
    sample = list(itertools.islice(read_updates(schedule), count))
    reading = (time.perf_counter() - began) / count
    sample.sort(key=lambda update: sum(part.padded_tokens for part in update.parts))
    chosen = [sample[-1]] * WARM_UP + [sample[int((i + 0.5) * count / STEPS)] for i in range(STEPS)]
    marks = [device_seconds(device)]
    for number, update in enumerate(chosen, 1):
        train_step(learner, [part.to(device) for part in update.parts], step=number)
        marks.append(device_seconds(device))
    later = (marks[-1] - marks[WARM_UP]) / STEPS
    return marks[1] - marks[0], later + reading


def _title(learner: Learner, schedule: TrainingSchedule, device: torch.device) -> float:
    """Seconds to evaluate one row of validation with all models that learn, by a sample all over it.

    In recommendation and retrieval that is the encoding of the different texts that its rows name, shared
    out among them; scoring and metrics are small beside it.
    """
    from newsbert_ray.data.reading import evaluation_batches
    from newsbert_ray.data.shards import read_texts
    from newsbert_ray.evaluation.encoding import device_seconds, encode_texts
    from newsbert_ray.evaluation.scoring import BATCH, score_topics
    from newsbert_ray.world import World

    pair, world = learner.pair, World(device=device)
    models = {name: model for name, model in pair.models().items() if not (pair.frozen and name == "teacher")}
    pair.eval()
    if schedule.task == "topics":
        shards = schedule.manifest.splits["validation"]
        count = sum(-(-shard.rows // BATCH) for shard in shards)
        wanted = {int((i + 0.5) * count / EVALUATIONS) for i in range(EVALUATIONS)}
        batches = evaluation_batches(schedule.folder, schedule.manifest, "validation", batch_size=BATCH)
        chosen = [batch for number, batch in enumerate(batches) if number in wanted]
        began = device_seconds(device)
        score_topics(models, chosen, topics=len(schedule.manifest.labels), world=world)
        seconds = (device_seconds(device) - began) / sum(batch.rows for batch in chosen)
    else:
        named, rows = _named(schedule)
        table = read_texts(schedule.folder, schedule.manifest)
        sample = named[np.linspace(0, len(named) - 1, min(len(named), EVALUATIONS * BATCH)).astype(np.int64)]
        began = device_seconds(device)
        encode_texts(models, table, sample, pad_id=schedule.manifest.tokenizer.pad_id, world=world)
        seconds = (device_seconds(device) - began) / len(sample) * len(named) / rows
    pair.train()
    return seconds


def _named(schedule: TrainingSchedule) -> tuple[Ints, int]:
    """The different texts that rows of validation name, and how many rows: all impressions, or a shard's
    pairs."""
    from newsbert_ray.data.reading import read_pairs
    from newsbert_ray.evaluation.scoring import find_named

    folder, manifest = Path(schedule.folder), schedule.manifest
    if schedule.task == "recommendation":
        rows = manifest.rows("validation", schedule.task)
        return find_named(folder, manifest, "validation", history=schedule.history), rows
    first = next(read_pairs(folder, manifest, "validation"))
    return np.unique(np.concatenate([first.queries, first.texts])), len(first)


def _files(
    learner: Learner, schedule: TrainingSchedule, run: Path, device: torch.device
) -> tuple[float, float, float]:
    """Seconds of a checkpoint, of a best model, and of a trial's end."""

    from newsbert_ray.evaluation.encoding import device_seconds
    from newsbert_ray.model.saved import CHECKPOINTS, load_best, write_best, write_student
    from newsbert_ray.training.checkpoint import Progress, write_checkpoint

    folder = run / CHECKPOINTS
    marks = [device_seconds(device)]
    name = write_best(folder, learner.pair, step=1)
    marks.append(time.perf_counter())
    write_checkpoint(folder, learner, Progress(step=1, best=name, best_step=1), keep=1)
    marks.append(time.perf_counter())
    load_best(folder, name, learner.pair)
    tokenizer = Path(schedule.folder) / "tokenizer"
    write_student(run / "student", learner.pair, schedule.manifest, tokenizer=tokenizer, task=schedule.task)
    shutil.rmtree(folder)
    marks.append(device_seconds(device))
    best, checkpoint, end = (after - before for before, after in itertools.pairwise(marks))
    return checkpoint, best, end


NAMED = (
    "data",
    "teacher",
    "task",
    "method",
    "precision",
    "device",
    "threads",
    "workers",
    "token_budget",
    "student.kind",
    "student.encoder",
    "distill.teacher",
)
"""Settings that decide a trial's work, each value in its own way."""
COUNTED = ("student.layers", "model.teacher_layers", "model.query_size", "batch_size", "optimizer.accumulate")
"""Settings that the work grows with, nearly in a straight line; those of a scratch teacher besides."""
READ = ("recommendation.npratio", "recommendation.history")
"""Settings that the work of recommendation grows with, by the news that a click brings along: less than in a
straight line, since each is encoded once and few users have the longest history."""
SWITCHES = ("model.dropout", "distill.teacher_dropout", "distill.weights.teacher_task")
"""Settings of which only zero makes another work."""
CORNERS = 2
"""With more settings that grow, they are varied one at a time instead of all together."""

Kind = Mapping[str, Any]


def kind_of(settings: TrainSettings) -> Kind:
    """What decides a trial's seconds a step; other settings (beta, rates, epochs, ...) leave them alone."""
    flat = flatten(settings.model_dump())
    names = [*NAMED, *COUNTED, *(READ if settings.task == "recommendation" else ())]
    if settings.teacher == SCRATCH:
        names += [name for name in flat if name.startswith("scratch.")]
    return {**{name: flat[name] for name in names}, **{name: flat[name] > 0 for name in SWITCHES}}


def kinds_to_time(trials: Sequence[TrainSettings]) -> list[TrainSettings]:
    """Settings to time, so that the seconds of all `trials` are known or lie between known ones."""
    chosen: dict[tuple[Any, ...], TrainSettings] = {}
    for members in _cells(trials).values():
        for settings in _chosen(members):
            chosen.setdefault(_key(settings), settings)
    return list(chosen.values())


class Times:
    """Parts of any trial from those that were timed."""

    def __init__(self, calibration: Calibration) -> None:
        self._exact = {_key(s): p for s, p in zip(calibration.settings, calibration.parts, strict=True)}
        self._cells = _cells(calibration.settings)

    def parts(self, settings: TrainSettings) -> Parts:
        """Its own where it was timed, else on a plane through those that differ in numbers alone."""
        if (found := self._exact.get(_key(settings))) is not None:
            return found
        members = self._cells[_cell(settings)]
        kinds = [kind_of(member) for member in members]
        names = _growing(kinds)
        low = {name: min(kind[name] for kind in kinds) for name in names}
        reach = {name: max(kind[name] for kind in kinds) - low[name] for name in names}

        def features(kind: Kind) -> list[float]:
            x = [(kind[name] - low[name]) / reach[name] for name in names]
            return [1.0, *x] + ([math.prod(x)] if len(x) == CORNERS and len(members) >= 2**CORNERS else [])

        matrix = np.array([features(kind) for kind in kinds])
        known = np.array([astuple(self._exact[_key(member)]) for member in members])
        plane = np.linalg.lstsq(matrix, known, rcond=None)[0]
        return Parts(*np.maximum(0.0, np.array(features(kind_of(settings))) @ plane).tolist())


def _cell(settings: TrainSettings) -> tuple[Any, ...]:
    kind = kind_of(settings)
    # Without a number for the teacher's layers, all of them are taken: a kind of its own.
    return tuple(v for name, v in kind.items() if not _grows(name) or v is None)


def _cells(trials: Sequence[TrainSettings]) -> dict[tuple[Any, ...], list[TrainSettings]]:
    """Trials that differ in numbers alone together, each kind once."""
    cells: dict[tuple[Any, ...], dict[tuple[Any, ...], TrainSettings]] = {}
    for settings in trials:
        cells.setdefault(_cell(settings), {}).setdefault(_key(settings), settings)
    return {cell: list(members.values()) for cell, members in cells.items()}


def _key(settings: TrainSettings) -> tuple[Any, ...]:
    return tuple(kind_of(settings).items())


def _grows(name: str) -> bool:
    return name in (*COUNTED, *READ) or name.startswith("scratch.")


def _growing(kinds: Sequence[Kind]) -> list[str]:
    return [name for name in kinds[0] if _grows(name) and len({kind[name] for kind in kinds}) > 1]


def _chosen(members: Sequence[TrainSettings]) -> list[TrainSettings]:
    """Those at the ends of what grows: at all corners for few such settings, else one at a time."""
    kinds = [kind_of(member) for member in members]
    names = _growing(kinds)
    ends = [(min(kind[name] for kind in kinds), max(kind[name] for kind in kinds)) for name in names]
    corners = list(itertools.product(*ends))
    if len(names) > CORNERS:
        first = tuple(low for low, _ in ends)
        corners = [first] + [(*first[:i], high, *first[i + 1 :]) for i, (_, high) in enumerate(ends)]
    if len(members) <= len(corners):
        return list(members)
    return [
        _at(dict(zip(names, corner, strict=True)), members, dict(zip(names, ends, strict=True)))
        for corner in corners
    ]


def _at(
    corner: Mapping[str, Any], members: Sequence[TrainSettings], ends: Mapping[str, tuple[float, float]]
) -> TrainSettings:
    """Settings at a corner; where that combination cannot be, those of the member nearest to it."""
    try:
        settings = build_settings(TrainSettings, merge(members[0].model_dump(), corner))
        check_depth(settings)
    except SettingsError:

        def distance(member: TrainSettings) -> float:
            kind = kind_of(member)
            return float(sum(abs(kind[n] - v) / (ends[n][1] - ends[n][0]) for n, v in corner.items()))

        return min(members, key=distance)
    return settings
