"""`newsbert-ray train`: the run's folder, and who does the work: this process, or a Ray Train group."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from newsbert_ray.config import SCRATCH, SettingsError, TrainSettings
from newsbert_ray.data.shards import Manifest, read_manifest
from newsbert_ray.files import locked, write_json
from newsbert_ray.methods import Task, task_of
from newsbert_ray.model.saved import CHECKPOINTS
from newsbert_ray.ray_session import inside_cluster
from newsbert_ray.record import RECORD, RunRecord, read_record
from newsbert_ray.storage import workdir as storage
from newsbert_ray.storage.workdir import (
    HUB_NAMES,
    download_input,
    locations_of,
    restore_urls,
    with_local_paths,
    with_locations,
)
from newsbert_ray.training.journal import Display, combine
from newsbert_ray.training.loop import Report
from newsbert_ray.training.prerequisites import NEUTRAL_SETTINGS, train_prerequisite

SETTINGS = "settings.json"


class RunFolderError(ValueError):
    """A run's folder that is somebody else's; the text names it and the cure."""


def train(
    settings: TrainSettings,
    *,
    report: Report | None = None,
    quiet: bool = False,
    gpus: float | None = None,
    teachers: str | Path | None = None,
) -> RunRecord:
    """Distil a student from a teacher on prepared shards; an interrupted run goes on from its last
    checkpoint. A teacher that the method only reads, or a student that this one starts from, comes first.

    One worker computes in this process; several, or one inside a Ray cluster, are a Ray Train group (one
    worker never where `quiet`, a sweep's trial, which has its own place in the cluster).

    Args:
        settings: everything that decides the result.
        report: gets each evaluation's entry, {"step", "epoch", "validation", "train", "kind"}, in this
            thread; it ends the run by raising, and the next start goes on from there.
        quiet: print nothing.
        gpus: share of a GPU that each worker of a group takes; found out from the cluster by default.
        teachers: folder of this machine in which runs share what comes before them, such as teachers that
            they only read; by default each run has its own.
    Returns:
        The finished run's record; at once where the folder holds it already.
    Raises:
        RunFolderError: the folder is another run's, or another process works on it.
        StorageError: a place in a bucket cannot be read or written, or another process works on it.
        ShardError, EncoderError, CheckpointError, LossError, SettingsError, GroupError: as they say.
    """
    say, place = _silent if quiet else print, settings.out
    settings = _with_absolute_places(settings)
    here = settings.workers == 1 and (quiet or not inside_cluster())
    # A trial's place is held by its sweep; a group's first worker has a copy of its own.
    with storage.working(settings.out, marks=(SETTINGS, RECORD), small=not here, alone=not quiet) as run:
        manifest = read_manifest(download_input(settings.data))
        with _claim(run, settings, manifest):
            finished = (run / RECORD).exists()
            if not finished:
                storage.publish(settings.out)
                work = partial(train, quiet=quiet, gpus=gpus, teachers=teachers)
                ready = train_prerequisite(settings, shared=teachers, train=work, say=say)
                if here:
                    ours = with_local_paths(ready)
                    _train_here(ours, manifest, report=report, quiet=quiet, out=settings.out)
                else:
                    from newsbert_ray.training.ray_group import train_group

                    train_group(ready, manifest, report=report, quiet=quiet, gpus=gpus)
                    storage.bring(settings.out, small=True)
            elif not settings.checkpoint.keep_finished:
                storage.remove(settings.out, CHECKPOINTS)
            restore_urls(run, settings)
            storage.publish(settings.out)
            record = read_record(run)
    if finished:
        say(f"already finished: {place}; give another --out to train again")
    elif not quiet:
        print(closing_lines(record, place, logs=run))
    return record


def _with_absolute_places(settings: TrainSettings) -> TrainSettings:
    """The same settings with absolute folders: workers run elsewhere, and a record is read from anywhere."""
    given = locations_of(settings)
    return with_locations(
        settings,
        {
            name: storage.absolute(place)
            for name, place in given.items()
            if name not in HUB_NAMES or (place != SCRATCH and Path(place).is_dir())
        },
    )


def closing_lines(record: RunRecord, run: str | Path, *, logs: Path | None = None) -> str:
    """What came out, where it is, and what to type next; `logs`: where a bucket's run lies here."""
    task = task_of(record.settings)
    test = record.metrics.get("test") or {}
    split, scores = ("test", test) if test else ("validation", record.metrics["validation"])
    unlabelled = (
        f"the test split has no labels: newsbert-ray evaluate {run} --submission prediction.zip ranks it"
    )
    there = storage.is_url(run)
    shown = "report" if there else f"{run}/report"
    return "\n".join(
        [
            f"{split}, {_counted(scores['student'], task)}, best step {record.metrics['best_step']} of "
            f"{record.steps}:",
            *(_score_line(name, scores[name], task) for name in ("teacher", "student") if name in scores),
            *([] if test else [unlabelled]),
            f"{record.titles_per_second:.0f} {task.examples}/s, {record.seconds['total']:.0f} s; record, "
            "student/, checkpoints/ "
            f"and TensorBoard events are in {run}",
            f"next: newsbert-ray evaluate {run}   |   newsbert-ray report {run} --out {shown}   |   "
            f"tensorboard --logdir {logs if there else run}",
        ]
    )


def _counted(scores: Mapping[str, float], task: Task) -> str:
    """`982 impressions (3 left out)`."""
    left_out = int(scores.get("left_out", 0))
    return f"{int(scores['rows'])} {task.rows}" + (f" ({left_out} left out)" if left_out else "")


def _score_line(model: str, scores: Mapping[str, float], task: Task) -> str:
    """A model's metrics, each with its standard error over what was evaluated where that is known."""
    shown = [
        f"{metric.heading} {scores[metric.name]:.4f}"
        + (f" ± {error:.4f}" if (error := scores.get(f"{metric.name}_error")) is not None else "")
        for metric in task.metrics
    ]
    return f"  {model:<8} {'  '.join(shown)}"


def _train_here(
    settings: TrainSettings, manifest: Manifest, *, report: Report | None, quiet: bool, out: str
) -> None:
    """Train in this process; each checkpoint is in the place `out` before anybody hears of it."""
    from newsbert_ray.data.reading import read_updates
    from newsbert_ray.training.ray_group import watch_for_preemption
    from newsbert_ray.training.worker import run_worker
    from newsbert_ray.world import World

    world = World(device=pick_device(settings))
    sent, evaluations = published(out), evaluations_to(report)
    with ExitStack() as stack:
        display = None if quiet else stack.enter_context(Display(total=_steps(settings, manifest)))
        leaving = stack.enter_context(watch_for_preemption())
        run_worker(
            settings,
            world,
            updates=lambda schedule, done: read_updates(schedule, done=done),
            report=combine(sent, display, evaluations) if display else combine(sent, evaluations),
            say=display.say if display else _silent,
            preempted=leaving,
        )


def pick_device(settings: TrainSettings) -> Any:
    """The torch device that the settings ask for.

    Raises:
        SettingsError: a GPU is asked for and there is none.
    """
    import torch

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device cuda: no GPU is visible here; use --device auto or cpu")
    found = "cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu"
    return torch.device(found)


def published(out: str) -> Report:
    """A report that publishes the run's working copy whenever a checkpoint has been written."""

    def publish(entry: dict[str, Any]) -> None:
        if entry["kind"] in ("evaluation", "checkpoint"):
            storage.publish(out)

    return publish


def evaluations_to(report: Report | None) -> Report:
    """A report that passes evaluations alone on to `report`."""

    def passed(entry: dict[str, Any]) -> None:
        if report is not None and entry["kind"] == "evaluation":
            report(entry)

    return passed


def _steps(settings: TrainSettings, manifest: Manifest) -> int:
    from newsbert_ray.data.reading import make_schedule

    return make_schedule(settings, manifest).total_steps


@contextmanager
def _claim(run: Path, settings: TrainSettings, manifest: Manifest) -> Iterator[None]:
    """The run's folder for this process alone, after making sure it is this run's."""
    place = settings.out if storage.is_url(settings.out) else run
    if run.exists() and not run.is_dir():
        raise RunFolderError(f"{place}: is a file; give another --out")
    if run.is_dir() and any(run.iterdir()) and not (run / SETTINGS).exists() and not (run / ".lock").exists():
        raise RunFolderError(f"{place}: holds other files and no run; give an empty or new folder as --out")
    run.mkdir(parents=True, exist_ok=True)
    busy = RunFolderError(f"{place}: another process trains in it; wait for it, or give another --out")
    with locked(run / ".lock", error=busy):
        _check_settings(run, settings, manifest, place)
        yield


def _check_settings(run: Path, settings: TrainSettings, manifest: Manifest, place: str | Path) -> None:
    own = {"settings": settings.model_dump(), "fingerprint": manifest.fingerprint}
    path = run / SETTINGS
    if not path.exists():
        write_json(path, own)
        return
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
        differ = [
            f"{name} was {theirs['settings'].get(name)!r}, now {value!r}"
            for name, value in json.loads(json.dumps(own["settings"])).items()
            if name not in NEUTRAL_SETTINGS and theirs["settings"].get(name) != value
        ]
        if theirs["fingerprint"] != manifest.fingerprint:
            differ.append("the shards were prepared anew")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise RunFolderError(
            f"{storage.join(place, SETTINGS)}: damaged; give another --out, or delete {place}"
        ) from error
    if differ:
        raise RunFolderError(f"{place}: holds another run ({'; '.join(differ)}); give another --out")


def _silent(_: str) -> None:
    pass
