"""One trial of a sweep: its settings, from the search space and a point; running it inside a Tune actor; and
whether a machine can read and write what it needs. An exception in a trial becomes a reported failure, so
that the actor lives on and serves the next trial. Only a process that dies is seen by Tune, which starts the
trial again from the trial's own checkpoints."""

from __future__ import annotations

import ctypes
import json
import secrets
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from newsbert_ray.config import SCRATCH, SettingsError, TrainSettings, build_settings, merge
from newsbert_ray.data.shards import MANIFEST, Manifest, read_manifest
from newsbert_ray.files import first_line, locked
from newsbert_ray.record import TEACHERS, RunRecord
from newsbert_ray.reporting.sweep_data import SWEEP, point_label
from newsbert_ray.settings import flatten
from newsbert_ray.storage.bucket import StorageError
from newsbert_ray.storage.workdir import WorkDir, absolute, fetch
from newsbert_ray.trackers import TrackedRun
from newsbert_ray.tune.space import PointValues, SearchSpace, absolute_folders, conditions, faults
from newsbert_ray.tune.trials import metric_value

if TYPE_CHECKING:
    from newsbert_ray.data.reading import TrainingSchedule
    from newsbert_ray.training.loop import Report

LOCK_SECONDS = 30.0
"""How long to wait for a process of a killed sweep that still holds the trial's folder."""

_TRIAL_DEFAULTS: Mapping[str, Any] = {"threads": 1, "checkpoint": {"keep": 1, "keep_finished": False}}
"""Defaults of a trial that differ from those of a single run: one core, little disk."""


def trial_epochs(settings: TrainSettings) -> int:
    """Epochs of a run, which its `steps` may decide; the last may be cut."""
    return settings.epochs if settings.steps is None else len(trial_schedule(settings).ends)


def trial_schedule(settings: TrainSettings) -> TrainingSchedule:
    """The number of updates and epochs of a trial, from the manifest of its shards alone."""
    from newsbert_ray.data.batches import Order
    from newsbert_ray.data.reading import TrainingSchedule, unlabelled_size

    manifest = _read_data(settings.data)
    order = Order(0, settings.batch_size - unlabelled_size(settings, manifest))
    return TrainingSchedule(settings, manifest, order)


@lru_cache(maxsize=8)
def _read_data(data: str) -> Manifest:
    return read_manifest(fetch(data))


def trial_settings(
    space: SearchSpace, point: Mapping[str, Any], *, seed: int, out: str | Path, overrides: Mapping[str, Any]
) -> TrainSettings:
    """Settings of one trial, absolute folders included; SettingsError for an impossible combination."""
    # A worker that Ray starts has another working directory, so folders must be absolute.
    own = {"seed": seed, "out": absolute(out)}
    values = absolute_folders(merge(_TRIAL_DEFAULTS, space.settings, overrides, point, own))
    settings = build_settings(TrainSettings, values, where=f"{space.file}, point {point_label(point)}")
    check_depth(settings)
    return settings


def check_space(space: SearchSpace, *, out: str | Path, overrides: Mapping[str, Any]) -> TrainSettings:
    """Build the settings of every grid point, or of each axis's values in turn; return the first ones. Raises
    SettingsError for an impossible combination, or nothing to run."""
    for _, message in faults(space):
        raise SettingsError(message)
    points = list(space.grid() if space.search.sampler == "grid" else _sample_points(space))
    built = [trial_settings(space, p, seed=space.seeds[0], out=out, overrides=overrides) for p in points]
    teacher = next((goal.metric for goal in space.goals if "teacher" in goal.metric), None)
    if teacher and any(settings.method == "finetune" for settings in built):
        cure = "use a metric of the student, or another method"
        raise SettingsError(f"{space.file}: metric = {teacher!r}: method finetune trains no teacher; {cure}")
    return built[0]


def _sample_points(space: SearchSpace) -> Iterator[PointValues]:
    """A first point, and one for each value of each axis, with the other axes at their first value."""
    for axis in (None, *space.axes):
        required = dict(conditions(space.axes, axis) or {}) if axis else {}
        for value in axis.samples() if axis else (None,):
            point = PointValues()
            for other in space.axes:
                if other.is_active(point):
                    default = required.get(other.name, other.samples())[0]
                    point[other.name] = value if other is axis else default
            yield point


def resolve_depths(space: SearchSpace, overrides: Mapping[str, Any]) -> SearchSpace:
    """`space` with values for `choice: divisors`: the depths below the teacher's that divide it. Raises
    SettingsError where the teacher's depth is unknown or varies, or a named depth does not divide it."""
    axis = next((axis for axis in space.axes if axis.divisors and axis.values is None), None)
    if axis is None:
        return space
    for other in space.axes:
        if other.name in ("teacher", "model.teacher_layers", "scratch.layers"):
            what = f"{axis.name}: `divisors` needs one teacher depth, but {other.name} varies"
            cure = f"list the depths (`choice: [1, 2]`, --vary {axis.name}=1,2), or fix --{other.name}"
            raise SettingsError(f"{what}; {cure}")
    values = merge({"data": "-", "out": "-"}, space.settings, overrides)
    settings = build_settings(TrainSettings, values, where=space.file)
    depth = teacher_depth(settings) or _fetch_depth(settings)
    divisors = tuple(n for n in range(1, depth // 2 + 1) if depth % n == 0) or (1,)
    known = axis.model_copy(update={"values": divisors})
    why = f"the divisors of the {depth} teacher layers are {', '.join(map(str, divisors))}"
    axes = tuple(known if other is axis else other for other in space.axes)
    for other in axes:
        if conditions(axes, other) is None:
            what = f"{other.name} varies only where {other.condition}, but {why}"
            raise SettingsError(f"{what}; fix --{other.name}")
    for point in space.start:
        if point.get(axis.name, 1) not in divisors:
            raise SettingsError(f"start: {axis.name} = {point[axis.name]}, but {why}; use one of them")
    return build_settings(SearchSpace, {**dict(space), "axes": axes}, where=space.file)


def check_depth(settings: TrainSettings) -> None:
    """Raise SettingsError where the student's layers do not divide the teacher's, or a student alone has more
    than its encoder. Depths that are not known here are left to the trial."""
    if settings.before.method != "none":
        from newsbert_ray.training.run import before_settings

        check_depth(before_settings(settings, ""))
        return
    student = settings.student.layers
    depth = _encoder_depth(settings) if settings.distill.alone else teacher_depth(settings)
    if depth is None:
        return
    if not settings.distill.alone:
        from newsbert_ray.model.pair import block_map

        block_map(depth, student)
    elif student > depth:
        raise SettingsError(f"student.layers {student}: {settings.teacher} has {depth} layers")


def teacher_depth(settings: TrainSettings) -> int | None:
    """Layers of the teacher (NK); None where only its configuration at Hugging Face tells. Raises
    SettingsError where more layers are requested than there are."""
    wanted, layers = settings.model.teacher_layers, _encoder_depth(settings)
    if layers is not None and wanted is not None and wanted > layers:
        what = f"{settings.teacher} has {layers} layers; give --model.teacher_layers {layers} or fewer"
        raise SettingsError(f"model.teacher_layers = {wanted}: {what}")
    return layers if wanted is None else wanted


def _encoder_depth(settings: TrainSettings) -> int | None:
    if settings.teacher == SCRATCH:
        return settings.scratch.layers
    folder = _fetch(settings.teacher)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        depth = next(config[key] for key in ("num_hidden_layers", "n_layers", "num_layers") if key in config)
    except (OSError, ValueError, TypeError, StopIteration):
        return None
    return depth if isinstance(depth, int) and depth > 0 else None


_fetch = lru_cache(maxsize=8)(fetch)
"""A teacher in a bucket, fetched once for all points of a grid."""


def _fetch_depth(settings: TrainSettings) -> int:
    from newsbert_ray.model.families import encoder_depth

    try:
        return encoder_depth(settings.teacher, settings.model, settings.scratch)
    except (ValueError, AttributeError, TypeError) as error:
        what = f"its depth is not known here ({first_line(error.__cause__ or error)})"
        cure = "`choice: divisors` needs it; give --model.teacher_layers N, or list the depths"
        raise SettingsError(f"teacher = {settings.teacher!r}: {what}, and {cure}") from error


class Train(Protocol):
    """What a trial calls: `newsbert_ray.training.run.train`, or a stand-in for it."""

    def __call__(self, settings: TrainSettings, *, report: Report | None, quiet: bool) -> RunRecord: ...


@dataclass(frozen=True)
class TrialConfig:
    """What a trial's actor receives."""

    settings: TrainSettings
    metrics: tuple[str, ...]
    """The goals' metrics; the trial reports one number for each."""
    failures: WorkDir
    """Folder for the stack trace of a failure."""
    sweep: WorkDir | None = None
    """The sweep's folder, where this machine has to check that it sees it; None on a single machine."""
    gpus: float = 0.0
    """Each worker's share of a GPU, for a trial of several workers."""
    tracked: TrackedRun | None = None
    """The sweep's run in MLflow or W&B."""


CONFIG = "trial"
"""Key of the TrialConfig in Tune's configuration of a trial."""


def run_trial(config: Mapping[str, TrialConfig], *, train: Train | None = None) -> None:
    """Run one trial by `train` or the real training, and report to Tune every evaluation with dotted names
    (`validation.student.accuracy`, `epoch`, `step`). The last report holds `values`, one for each goal, or
    `failure`, the reason for having none. Tune stops a trial by raising SystemExit from a report, after the
    trial has written its checkpoint."""
    from ray import tune

    from newsbert_ray.training.loop import PreemptedError

    def report(entry: Mapping[str, Any]) -> None:
        tune.report({name: v for name, v in flatten(entry).items() if type(v) in (int, float)})

    trial = config[CONFIG]
    settings = trial.settings
    workdir = WorkDir(settings.out)
    note = f"{PurePosixPath(settings.out.partition('?')[0]).name}.txt"
    if (lock := workdir.path / ".lock").exists():
        # A process of a killed sweep, which is about to end, may still hold the run's lock.
        with suppress(OSError), locked(lock, wait_seconds=LOCK_SECONDS):
            pass
    try:
        require_seen(trial.sweep)
        work = train or _real_train(trial)
        record = work(settings, report=report, quiet=True)
        values = [metric_value(record, metric) for metric in trial.metrics]
        workdir.discard()
    except PreemptedError:
        raise  # Tune starts the trial again on another machine.
    except SystemExit:
        workdir.discard()
        raise
    except Exception as error:
        # The only place that stops an exception: it ends this trial alone, and the sweep shows it.
        with suppress(OSError, StorageError):  # the disk may be full
            trial.failures.write_text(note, traceback.format_exc())
        tune.report({"failure": f"{type(error).__name__}: {error}"})
    else:
        tune.report({"values": values})
    finally:
        # Every trial is a new thread of its actor, and glibc would keep what each of them has freed:
        # gigabytes after some trials of different lengths.
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)


def _real_train(trial: TrialConfig) -> Train:
    from newsbert_ray.training.run import train

    # Next to the trials' folders; for a sweep in a bucket each machine keeps its own.
    parent = WorkDir(trial.settings.out).path.parents[1]
    gpus = trial.gpus if trial.settings.workers > 1 else None
    return partial(train, gpus=gpus, teachers=parent / TEACHERS, parent=trial.tracked)


class NodeError(RuntimeError):
    """A machine that cannot read or write what a trial needs; the text names both, and the cure."""


def check_nodes(workdir: WorkDir, *, data: Sequence[str] = (), teachers: Sequence[str] = ()) -> None:
    """Raise NodeError unless every node of the cluster can write to the sweep's folder and finds shards and
    teachers, which are downloaded there from a bucket."""
    import ray
    from ray.exceptions import RayError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    probe = None
    if not workdir.is_remote:
        probe = workdir.path.absolute() / f".probe-{secrets.token_hex(8)}"
        probe.touch()
    task: Any = ray.remote(num_cpus=0, max_retries=0)(node_fault)
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        pins = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
        needed = (workdir.absolute(), probe, list(data), list(teachers))
        answers = [task.options(scheduling_strategy=pin).remote(*needed) for pin in pins]
        for node, answer in zip(nodes, answers, strict=True):
            try:
                fault = ray.get(answer)
            except RayTaskError:
                raise
            except RayError:
                continue  # the node has left
            if fault:
                raise NodeError(f"node {node['NodeManagerAddress']} ({node['NodeID'][:12]}): {fault}")
    finally:
        if probe:
            probe.unlink(missing_ok=True)


def node_fault(workdir: WorkDir, probe: Path | None, data: Sequence[str], teachers: Sequence[str]) -> str:
    """Why this machine cannot run trials, if so; `probe`: a file that the driver has written."""
    if probe and not probe.exists():
        return _not_visible(workdir.location, "--out")
    needed = [(folder, "--data", MANIFEST) for folder in data]
    needed += [(folder, "--teacher", "") for folder in teachers]
    try:
        workdir.check_writable()
        lacking = ((name, flag) for name, flag, file in needed if not (fetch(name) / file).exists())
        return next((_not_visible(folder, flag) for folder, flag in lacking), "")
    except StorageError as error:
        return str(error)


def require_seen(sweep: WorkDir | None) -> None:
    """Raise NodeError on a machine that does not see the sweep's local folder."""
    if sweep and not sweep.is_remote and not (sweep.path / SWEEP).exists():
        raise NodeError(f"this node {_not_visible(sweep.location, '--out')}")


def _not_visible(location: str, flag: str) -> str:
    cure = "a folder that all nodes share, or a URL such as s3://bucket/folder"
    return f"does not see {location}: give as {flag} {cure}"
