"""`newsbert-ray sweep --plan`: what a sweep will take, estimated from a few timed steps."""

from __future__ import annotations

import heapq
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from ray.exceptions import RayTaskError

from newsbert_ray.config import SCRATCH, SettingsError, TrainSettings
from newsbert_ray.data.batches import Ints
from newsbert_ray.data.reading import SplitData, TrainingSchedule, World, make_schedule, read_updates
from newsbert_ray.data.shards import read_manifest, read_texts
from newsbert_ray.evaluation.scoring import BATCH, device_seconds, encode_texts
from newsbert_ray.files import format_duration, write_json
from newsbert_ray.model.saved import CHECKPOINTS, load_best, write_best, write_student
from newsbert_ray.ray_session import ray_session
from newsbert_ray.reporting.figures import span
from newsbert_ray.reporting.records import grouped
from newsbert_ray.reporting.sweep_data import point_label, read_curves
from newsbert_ray.settings import flatten
from newsbert_ray.storage.workdir import snapshot, with_local_paths
from newsbert_ray.training.checkpoint import Progress, write_checkpoint
from newsbert_ray.training.journal import Journal
from newsbert_ray.training.run import all_prerequisites, pick_device
from newsbert_ray.training.step import Learner, train_step
from newsbert_ray.training.worker import build_worker_learner, with_precision
from newsbert_ray.tune.ray_tune import node_resources
from newsbert_ray.tune.space import PointValues, SearchSpace
from newsbert_ray.tune.space_file import Changes
from newsbert_ray.tune.study import Curve, Saving, SweepStudy, estimate_saving
from newsbert_ray.tune.sweep import ESTIMATE, estimate_subject, open_sweep
from newsbert_ray.tune.trial import teacher_depth, trial_schedule, trial_settings
from newsbert_ray.tune.trials import Resources, plan_resources

BETWEEN_SECONDS = 0.1
"""Between the end of a trial and the start of the next one in its slot; spent in Ray Tune."""
AROUND_SECONDS = 6.0
"""Before the first trial and after the last one: Tune's imports and its end, the report."""
GROUP_SECONDS = 20.0
"""Start and end of a nested Ray Train group."""
STEPS = 12
"""Steps that are timed, after WARM_UP more; chosen by their size from SAMPLE steps."""
WARM_UP = 3
SAMPLE = 60
UNKNOWN_DEPTH = 12
"""Teacher layers where only Hugging Face knows them."""
EVALUATIONS = 4
"""Batches of the validation split that are timed."""
COST_SETTINGS = (
    "data", "teacher", "task", "method", "precision", "device", "threads", "workers", "token_budget",
    "compile", "optimizer.accumulate", "student.kind", "student.encoder", "distill.teacher",
)  # fmt: skip
"""Settings that decide the duration of a step: trials with other values are timed separately."""
SWITCHES = ("model.dropout", "distill.teacher_dropout", "distill.weights.teacher_task")
"""Settings that change the work only by being zero or not."""


def plan_sweep(
    space: str | Path,
    changes: Changes,
    *,
    out: str | Path,
    concurrency: int | None = None,
    curves: str | Path | None = None,
) -> Estimate:
    """Time a few steps of each group of trials, and print what the sweep will take."""
    with open_sweep(space, changes, out=out) as opened:
        workdir, search_space, overrides = opened.workdir, opened.space, opened.changes.overrides
        recorded = None if curves is None else _recorded_curves(curves, search_space.metric)
        planned = planned_trials(search_space, overrides=overrides)
        print("starting Ray", flush=True)
        began = time.monotonic()
        with ray_session():
            session_seconds = time.monotonic() - began
            resources = plan_resources(
                opened.first,
                node_resources(),
                trials=search_space.points * len(search_space.seeds),
                concurrency=concurrency,
                gpus=search_space.gpus,
            )
            to_time = settings_to_time([*planned.trials, *itertools.chain(*planned.prerequisites)])
            print(f"timing a few steps of {len(to_time)} trials, {resources.slots} at once", flush=True)
            calibration = calibrate(to_time, resources, folder=workdir.path / ".plan")
        estimate = Estimate(search_space, resources, planned, calibration, session_seconds, recorded)
        shutil.rmtree(workdir.path / ".plan", ignore_errors=True)
        lines = estimate.lines()
        print("\n".join([*opened.messages, *lines]))
        saved = {"of": estimate_subject(search_space, overrides), "slots": resources.slots}
        write_json(workdir.path / ESTIMATE, {**saved, **estimate.expected._asdict(), "lines": lines})
        workdir.publish()
        print(f"saved in {workdir.child(ESTIMATE).location}; the same command without --plan runs the sweep")
    return estimate


def _recorded_curves(sweep: str | Path, metric: str) -> list[Curve]:
    with snapshot(sweep) as folder:
        curves: list[Curve] = [*read_curves(folder, metric).values()]
    if not curves:
        raise SettingsError(f"--curves {sweep}: no trial there has reported {metric}")
    return curves


class PlannedTrials(NamedTuple):
    """The trials of a sweep that are known before it; `prerequisites`: the runs that each is the first to
    need. Points that the sampler drew twice and impossible combinations cost nothing."""

    trials: tuple[TrainSettings, ...]
    prerequisites: tuple[tuple[TrainSettings, ...], ...]
    duplicates: int
    impossible: int


class TrialCost(NamedTuple):
    """Seconds of one trial before its first step, in training, and after its last step; its size."""

    start: float
    training: float
    end: float
    steps: int
    epochs: int

    @property
    def seconds(self) -> float:
        return self.start + self.training + self.end


class Amount(NamedTuple):
    """Seconds of all trials together, wall time, and money."""

    trial_seconds: float
    wall: float
    money: float


class Parts(NamedTuple):
    """Seconds of a trial's parts; of one worker's share where it has several."""

    cold: float  # what a process's first trial takes in addition: imports, the teacher's weights, the shards
    start: float  # from a trial's start to its first step in a process that has run another
    step: float  # one step, with its batch
    row: float  # one validation row evaluated with all models that learn
    checkpoint: float  # one checkpoint written
    best: float  # the best model written
    end: float  # the best model read back, the student written, the checkpoints removed


@dataclass(frozen=True)
class Calibration:
    """The timed trials with their parts; seconds until a process has started, and of all timing."""

    timed: tuple[tuple[TrainSettings, Parts], ...]
    process: float
    seconds: float

    def parts(self, settings: TrainSettings) -> Parts:
        """A trial's parts, on lines through its group's: a step's by its work, others by a text's."""
        group = cost_group(settings)
        timed, parts = zip(*(pair for pair in self.timed if cost_group(pair[0]) == group), strict=True)
        lines = []
        for x, own in zip(np.transpose([*map(work_of, timed)]), work_of(settings), strict=True):
            line = np.linalg.lstsq(np.column_stack([np.ones(len(x)), x / max(x)]), parts, rcond=None)[0]
            lines.append(np.maximum(0.0, (1.0, own / max(x)) @ line).tolist())
        by_text, by_step = itertools.starmap(Parts, lines)
        return by_text._replace(step=by_step.step)


@dataclass(frozen=True)
class Estimate:
    """What a sweep will take: with every trial to its end (`full`), and with early stopping (`stopped`).
    Without recorded `curves`, trials are assumed to keep their rank."""

    space: SearchSpace
    resources: Resources
    planned: PlannedTrials
    calibration: Calibration
    session_seconds: float = 0.0
    curves: Sequence[Curve] | None = None

    @cached_property
    def costs(self) -> tuple[TrialCost, ...]:
        """The timed parts added up for each trial."""
        pairs = zip(self.planned.trials, self.planned.prerequisites, strict=True)
        return tuple(_trial_cost(settings, self.calibration, runs) for settings, runs in pairs)

    @cached_property
    def saving(self) -> Saving | None:
        """What early stopping leaves; None without any."""
        if self.space.scheduler == "none":
            return None
        epochs = [cost.epochs for cost in self.costs]
        return estimate_saving(self.space, epochs, slots=self.resources.slots, curves=self.curves)

    @property
    def full(self) -> Amount:
        """Without early stopping."""
        return self._amount(training=1.0, end=1.0)

    @property
    def stopped(self) -> Amount | None:
        """With early stopping, if any."""
        return self.saving and self._amount(training=self.saving.epochs, end=self.saving.finished)

    @property
    def expected(self) -> Amount:
        """What the sweep should take."""
        return self.stopped or self.full

    def _amount(self, *, training: float, end: float) -> Amount:
        """Of trials with these shares of their training, and of what follows it, slot by slot."""
        seconds = [cost.start + training * cost.training + end * cost.end for cost in self.costs]
        timed = self.calibration
        around = self.session_seconds + timed.process + timed.timed[0][1].cold + AROUND_SECONDS
        money = self.resources.hourly_price(self.space.prices) * sum(seconds) / 3600
        return Amount(sum(seconds), around + wall_seconds(seconds, self.resources.slots), money)

    def lines(self) -> list[str]:
        planned, seconds = self.planned, [cost.seconds for cost in self.costs]
        step_times = [round(1000 * parts.step) for _, parts in self.calibration.timed]
        steps, epochs = (sum(getattr(cost, unit) for cost in self.costs) for unit in ("steps", "epochs"))
        free = {"drawn twice at random": planned.duplicates, "impossible combinations": planned.impossible}
        lines = [
            f"{self.space.name}: {self.space.points} points, {len(self.costs)} trials, {steps:,} steps, "
            f"{epochs:,} epochs",
            *(f"{count} points are {what}; they cost nothing" for what, count in free.items() if count),
            f"timed {len(step_times)} trials in {format_duration(self.calibration.seconds)}: "
            f"{span(step_times)} ms a step with {self.resources.slots} trials at once",
            f"seconds a trial, without early stopping: {span([round(s, 1) for s in seconds])}, "
            f"mean {statistics.fmean(seconds):.1f}",
            f"every trial to its end: {self._amount_text(self.full)}",
        ]
        if self.saving and self.stopped:
            lines += [
                f"with {self.space.scheduler}: {self._amount_text(self.stopped)}",
                f"  {self.saving.epochs:.0%} of the epochs, {self.saving.finished:.0%} of the trials reach "
                f"their end; {self.saving.source}",
            ]
        return [*lines, *self._limit_lines()]

    def _amount_text(self, amount: Amount) -> str:
        hours, resources, prices = amount.trial_seconds / 3600, self.resources, self.space.prices
        gpus = f", {hours * resources.trial_gpus:.2f} GPU-hours" if resources.gpus else ""
        cost = f"cost {amount.money:.2f}" if prices.cpu_hour or prices.gpu_hour else "no prices given"
        return (
            f"{format_duration(amount.wall)} with {resources.slots} trials at once, "
            f"{hours * resources.trial_cpus:.2f} CPU-hours{gpus}, {cost}"
        )

    def _limit_lines(self) -> Iterator[str]:
        limits, count = self.space.limits, len(self.costs)
        hours, cost = self.expected.wall / 3600, self.expected.money
        for name, limit, value in (("hours", limits.hours, hours), ("cost", limits.cost, cost)):
            if limit is not None and value > limit:
                trials = f"{limit / value * count:.0f} of {count} trials"
                yield f"limits.{name} = {limit:g} ends it early, after about {trials}"
        if limits.target is not None:
            yield f"limits.target = {limits.target:g} may end it earlier"


def planned_trials(space: SearchSpace, *, overrides: Mapping[str, Any]) -> PlannedTrials:
    """The trials of a sweep over `space`: a grid's own, or as many random ones as it asks for. Raises
    SettingsError where every point is impossible."""
    points = list(space.grid()) if space.search.sampler == "grid" else _random_points(space)
    distinct = {point_label(point): point for point in points}
    trials: list[TrainSettings] = []
    fault = None
    for point, seed in itertools.product(distinct.values(), space.seeds):
        try:
            trials.append(trial_settings(space, point, seed=seed, out=Path("plan"), overrides=overrides))
        except SettingsError as error:
            fault = error
    if fault and not trials:
        raise fault
    seen = set[str]()
    prerequisites = []
    for settings in trials:
        runs = {run.model_dump_json(): run for run in all_prerequisites(settings)}
        prerequisites.append(tuple(run for key, run in runs.items() if key not in seen))
        seen |= runs.keys()
    duplicates, impossible = len(points) - len(distinct), len(distinct) - len(trials) // len(space.seeds)
    return PlannedTrials(tuple(trials), tuple(prerequisites), duplicates, impossible)


def _random_points(space: SearchSpace) -> list[PointValues]:
    search = space.search.model_copy(update={"sampler": "random", "storage": None})
    with tempfile.TemporaryDirectory(prefix="plan-") as name:
        study = SweepStudy(space.model_copy(update={"search": search}), Path(name))
        return [point for _, point in iter(study.next_point, None)]


def _trial_cost(
    settings: TrainSettings, calibration: Calibration, prerequisites: Sequence[TrainSettings] = ()
) -> TrialCost:
    """Seconds of one trial; `prerequisites` are trained before it."""
    task, schedule = settings.task, trial_schedule(settings)
    manifest = schedule.manifest
    steps, interval = schedule.total_steps, settings.checkpoint.every_steps
    evaluations = schedule.evaluations(settings.evaluate_every)
    checkpoints = set(range(interval, steps + 1, interval)) if interval else set()
    checkpoints |= evaluations if settings.checkpoint.at_evaluation else set()
    parts = calibration.parts(settings)
    row = parts.row / settings.workers
    # An unlabelled test split is not evaluated.
    test = row * manifest.rows("test", task) if manifest.examples("test", task) else 0.0
    evaluation = row * manifest.rows("validation", task) + parts.best
    group = GROUP_SECONDS if settings.workers > 1 else 0.0
    before = sum(_trial_cost(run, calibration).seconds for run in prerequisites)
    start = parts.start + BETWEEN_SECONDS + group + before
    training = steps * parts.step + len(evaluations) * evaluation + len(checkpoints) * parts.checkpoint
    return TrialCost(start, training, test + parts.end, steps=steps, epochs=len(schedule.ends))


def wall_seconds(seconds: Sequence[float], slots: int) -> float:
    """When the last trial ends, if each free slot takes the next one in order."""
    ends = [0.0] * slots
    for duration in seconds:
        heapq.heapreplace(ends, ends[0] + duration)
    return max(ends)


def calibrate(trials: Sequence[TrainSettings], resources: Resources, *, folder: Path) -> Calibration:
    """Time these trials, inside a Ray session, on as many workers at once as the sweep will have. They raise
    their own errors. `folder`: for checkpoints, on the sweep's disk; all nodes must see it."""
    began = time.monotonic()
    slots = range(resources.slots * resources.workers)
    remote: Any = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=0)
    start, task = remote(lambda: None), remote(time_parts)
    try:
        ray.get([start.remote() for _ in slots])  # returns once the worker processes have started
        process = time.monotonic() - began
        timed = []
        for settings in trials:
            calls = [task.remote(settings, folder=folder.absolute() / f"slot-{slot}") for slot in slots]
            timed.append((settings, Parts(*np.mean(ray.get(calls), axis=0).tolist())))
    except RayTaskError as error:
        raise error.cause from error
    return Calibration(tuple(timed), process, time.monotonic() - began)


def time_parts(settings: TrainSettings, *, folder: Path) -> Parts:
    """Time the parts of a trial of `settings` in this process: WARM_UP + STEPS steps, a few evaluated
    batches, files written into `folder` and removed. Of several workers one's share, not communication."""
    if settings.workers > 1:
        share = max(settings.optimizer.accumulate, settings.batch_size // settings.workers)
        settings = settings.model_copy(update={"workers": 1, "batch_size": share})
    settings = with_local_paths(settings)
    manifest, device = read_manifest(settings.data), pick_device(settings)
    settings = with_precision(settings, World(device=device))
    schedule, run, starts = make_schedule(settings, manifest), folder / "run", []
    try:
        for _ in range(2):  # the second start is that of a process that has run a trial before
            began = time.perf_counter()
            learner = build_worker_learner(settings, schedule, World(device=device), stand_in=True)
            Journal(run, done=0).close()
            next(read_updates(schedule))
            starts.append(device_seconds(device) - began)
        first, step = _time_steps(learner, schedule, device)
        row = _time_evaluation(learner, schedule, device)
        best, checkpoint, end = _time_files(learner, schedule, run)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    cold, start = max(0.0, starts[0] - starts[1]), starts[1] + max(0.0, first - step)
    return Parts(cold, start, step, row, checkpoint=checkpoint, best=best, end=end)


def _time_steps(learner: Learner, schedule: TrainingSchedule, device: torch.device) -> tuple[float, float]:
    """Seconds of a trial's first step, and of a later one with its batch, over the sizes of a sample."""
    count = min(SAMPLE, schedule.steps(0))
    began = time.perf_counter()
    sample = list(itertools.islice(read_updates(schedule), count))
    reading = (time.perf_counter() - began) / count
    sample.sort(key=lambda update: sum(part.padded_tokens for part in update.parts))
    chosen = [sample[-1]] * WARM_UP + [sample[int((i + 0.5) * count / STEPS)] for i in range(STEPS)]
    times = [device_seconds(device)]
    for number, update in enumerate(chosen, 1):
        train_step(learner, [part.to(device) for part in update.parts], step=number)
        times.append(device_seconds(device))
    later = (times[-1] - times[WARM_UP]) / STEPS
    return times[1] - times[0], later + reading


def _time_evaluation(learner: Learner, schedule: TrainingSchedule, device: torch.device) -> float:
    """Seconds to evaluate one validation row with all models that learn, from a sample over the split. Only
    the encoding of the different texts counts, divided among the rows."""
    pair, manifest = learner.pair, schedule.manifest
    models = {name: model for name, model in pair.models().items() if not (pair.frozen and name == "teacher")}
    texts, rows = _validation_texts(schedule)
    sample = texts[np.linspace(0, len(texts) - 1, min(len(texts), EVALUATIONS * BATCH)).astype(np.int64)]
    table, world = read_texts(schedule.settings.data, manifest), World(device=device)
    pair.eval()
    began = device_seconds(device)
    encode_texts(models, table, sample, pad_id=manifest.tokenizer.pad_id, world=world)
    seconds = device_seconds(device) - began
    pair.train()
    return seconds / len(sample) * len(texts) / rows


def _validation_texts(schedule: TrainingSchedule) -> tuple[Ints, int]:
    """The different texts of validation rows, and the number of rows: all, or one shard's pairs."""
    data = SplitData.of(schedule.settings, schedule.manifest, "validation")
    if data.task == "retrieval":
        first = next(data.pairs())
        return np.unique(np.concatenate([first.queries, first.texts])), len(first)
    rows, starts = data.manifest.rows("validation", data.task), dict(data.manifest.news)
    if data.task == "recommendation":
        return data.news_rows(), rows
    shards = data.manifest.splits["validation"]
    return np.concatenate([starts[shard] + np.arange(shard.rows) for shard in shards]), rows


def _time_files(learner: Learner, schedule: TrainingSchedule, run: Path) -> list[float]:
    folder, tokenizer = run / CHECKPOINTS, Path(schedule.settings.data) / "tokenizer"
    times = [time.perf_counter()]
    name = write_best(folder, learner.pair, step=1)
    times.append(time.perf_counter())
    write_checkpoint(folder, learner, Progress(step=1, best=name, best_step=1), keep=1)
    times.append(time.perf_counter())
    load_best(folder, name, learner.pair)
    task = schedule.settings.task
    write_student(run / "student", learner.pair, schedule.manifest, tokenizer=tokenizer, task=task)
    shutil.rmtree(folder)
    times.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(times)]


def cost_group(settings: TrainSettings) -> str:
    """Trials of one group differ in the amount of work, and in settings that cost nothing."""
    flat = flatten(settings.model_dump())
    return repr([flat[name] for name in COST_SETTINGS] + [flat[name] > 0 for name in SWITCHES])


def work_of(settings: TrainSettings) -> tuple[float, float]:
    """Amount of work to within a factor: that of a text, by all layers; and that of a step, by its texts."""
    layers = (teacher_depth(settings) or UNKNOWN_DEPTH) + settings.student.layers
    scratch, clicks = settings.scratch, settings.recommendation
    width = scratch.hidden * (2 * scratch.hidden + scratch.feed_forward) if settings.teacher == SCRATCH else 1
    texts = 1 + clicks.npratio + clicks.history if settings.task == "recommendation" else 1
    return layers * width, layers * width * texts * settings.batch_size


def settings_to_time(trials: Sequence[TrainSettings]) -> list[TrainSettings]:
    """For each group the trials with the least and the greatest work of a text and of a step."""
    chosen = []
    for group in grouped(trials, cost_group).values():
        members = {work_of(settings): settings for settings in reversed(group)}
        by_text, by_step = sorted(members), sorted(members, key=lambda work: work[1])
        ends = (by_text[0], by_text[-1], by_step[0], by_step[-1])
        chosen += [members[work] for work in dict.fromkeys(ends)]
    return chosen
