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
from newsbert_ray.storage.workdir import (
    HUB_NAMES,
    WorkDir,
    absolute,
    download_input,
    locations_of,
    open_workdir,
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

    Arguments, result and errors are those of `newsbert_ray.train`.
    """
    say, location = _silent if quiet else print, settings.out
    settings = _with_absolute_locations(settings)
    here = settings.workers == 1 and (quiet or not inside_cluster())
    # A trial's folder is locked by its sweep; a group's rank 0 has its own copy.
    with open_workdir(
        settings.out, markers=(SETTINGS, RECORD), small=not here, exclusive=not quiet
    ) as workdir:
        run = workdir.path
        manifest = read_manifest(download_input(settings.data))
        with _claim(workdir, settings, manifest):
            finished = (run / RECORD).exists()
            if not finished:
                workdir.publish()
                work = partial(train, quiet=quiet, gpus=gpus, teachers=teachers)
                ready = train_prerequisite(settings, shared=teachers, train=work, say=say)
                if here:
                    ours = with_local_paths(ready)
                    _train_here(ours, manifest, workdir, report=report, quiet=quiet)
                else:
                    from newsbert_ray.training.ray_group import train_group

                    train_group(ready, manifest, report=report, quiet=quiet, gpus=gpus)
                    workdir.download(small=True)
            elif not settings.checkpoint.keep_finished:
                workdir.remove(CHECKPOINTS)
            restore_urls(run, settings)
            workdir.publish()
            record = read_record(run)
    if finished:
        say(f"already finished: {location}; give another --out to train again")
    elif not quiet:
        print(closing_lines(record, WorkDir.at(location)))
    return record


def _with_absolute_locations(settings: TrainSettings) -> TrainSettings:
    """The same settings with absolute folders: workers run elsewhere, and a record is read from anywhere."""
    return with_locations(
        settings,
        {
            name: absolute(location)
            for name, location in locations_of(settings).items()
            if name not in HUB_NAMES or (location != SCRATCH and Path(location).is_dir())
        },
    )


def closing_lines(record: RunRecord, workdir: WorkDir) -> str:
    """The run's metrics, where its files are, and which commands to run next."""
    run = workdir.location
    task = task_of(record.settings)
    test = record.metrics.get("test") or {}
    split, scores = ("test", test) if test else ("validation", record.metrics["validation"])
    unlabelled = (
        f"the test split has no labels: newsbert-ray evaluate {run} --submission prediction.zip ranks it"
    )
    shown = "report" if workdir.is_remote else f"{run}/report"
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
            f"tensorboard --logdir {workdir.path}",
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
    settings: TrainSettings, manifest: Manifest, workdir: WorkDir, *, report: Report | None, quiet: bool
) -> None:
    """Train in this process; each checkpoint is published before it is reported."""
    from newsbert_ray.data.reading import read_updates
    from newsbert_ray.ray_session import watch_for_preemption
    from newsbert_ray.training.worker import run_worker
    from newsbert_ray.world import World

    world = World(device=pick_device(settings))
    sent, evaluations = publish_checkpoints(workdir), evaluations_to(report)
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


def publish_checkpoints(workdir: WorkDir) -> Report:
    """A report that publishes the run's folder whenever a checkpoint has been written."""

    def publish(entry: dict[str, Any]) -> None:
        if entry["kind"] in ("evaluation", "checkpoint"):
            workdir.publish()

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
def _claim(workdir: WorkDir, settings: TrainSettings, manifest: Manifest) -> Iterator[None]:
    """The run's folder for this process alone, after making sure it is this run's."""
    run, location = workdir.path, workdir.location
    if run.exists() and not run.is_dir():
        raise RunFolderError(f"{location}: is a file; give another --out")
    if run.is_dir() and any(run.iterdir()) and not (run / SETTINGS).exists() and not (run / ".lock").exists():
        raise RunFolderError(
            f"{location}: holds other files and no run; give an empty or new folder as --out"
        )
    run.mkdir(parents=True, exist_ok=True)
    busy = RunFolderError(f"{location}: another process trains in it; wait for it, or give another --out")
    with locked(run / ".lock", error=busy):
        _check_settings(workdir, settings, manifest)
        yield


def _check_settings(workdir: WorkDir, settings: TrainSettings, manifest: Manifest) -> None:
    own = {"settings": settings.model_dump(), "fingerprint": manifest.fingerprint}
    path, location = workdir.path / SETTINGS, workdir.location
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
            f"{workdir.child(SETTINGS).location}: damaged; give another --out, or delete {location}"
        ) from error
    if differ:
        raise RunFolderError(f"{location}: holds another run ({'; '.join(differ)}); give another --out")


def _silent(_: str) -> None:
    pass
