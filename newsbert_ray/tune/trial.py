"""One trial of a sweep, inside a Tune actor that serves the next one too: trains, and passes evaluations on.

A trial that raises ends with its reason as a report, not as a broken actor: the sweep goes on at no cost.
Only a process that dies is left for Tune to see; it starts the trial again, from the trial's own checkpoints.
"""

from __future__ import annotations

import ctypes
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from newsbert_ray.config import TrainSettings, build_settings
from newsbert_ray.record import TEACHERS, RunRecord
from newsbert_ray.storage import workdir as storage

if TYPE_CHECKING:
    from newsbert_ray.training.loop import Report
from newsbert_ray.files import is_locked
from newsbert_ray.tune.resources import require_seen
from newsbert_ray.tune.space import flatten
from newsbert_ray.tune.trials import metric_value

LOCK_SECONDS = 30.0
"""How long the trial's folder may still be held by a process of a sweep that was killed."""


class Train(Protocol):
    """What a trial calls: `newsbert_ray.training.run.train`, or a stand-in for it."""

    def __call__(self, settings: TrainSettings, *, report: Report | None, quiet: bool) -> RunRecord: ...


def run_trial(config: Mapping[str, Any], *, train: Train | None = None) -> None:
    """Run one trial and report to Tune.

    Every evaluation is reported with dotted names (`validation.student.accuracy`, `epoch`, `step`); the last
    report holds `values`, the record's number for each goal, or `failure`, why there is none. A trial that
    Tune stops at a report ends there, by SystemExit out of the report, with its checkpoint behind it.

    Args:
        config: `settings` (of TrainSettings, nested), `metrics` (one for each goal), `notes` (a folder for a
            failure's frames), for a group of workers `gpus` (each one's share of a GPU), and on a cluster
            `sweep`, the folder that this machine must see.
        train: what trains; the real one by default.
    """
    from ray import tune

    from newsbert_ray.training.loop import PreemptedError

    settings = build_settings(TrainSettings, config["settings"], where="trial")
    note = f"{PurePosixPath(settings.out.partition('?')[0]).name}.txt"
    _await_folder(storage.local(settings.out))
    try:
        require_seen(config.get("sweep"))
        work = train or _train(config, settings)
        record = work(settings, report=lambda entry: tune.report(numbers(entry)), quiet=True)
        values = [metric_value(record, metric) for metric in config["metrics"]]
        storage.discard(settings.out)
    except PreemptedError:
        raise  # Tune starts the trial again, on another machine
    except SystemExit:
        storage.discard(settings.out)
        raise
    except Exception as error:
        # The one place that stops an exception: it belongs to this trial alone, and is shown by the sweep.
        with suppress(OSError, storage.StorageError):  # the reason may be a full disk
            storage.leave(config["notes"], note, traceback.format_exc())
        tune.report({"failure": f"{type(error).__name__}: {error}"})
    else:
        if not storage.is_url(config["notes"]):
            with suppress(OSError):
                (Path(config["notes"]) / note).unlink(missing_ok=True)
        tune.report({"values": values})
    finally:
        give_back_memory()


def give_back_memory() -> None:
    """Return freed pages to the system: every trial is a new thread of its actor, and the C library (glibc)
    would keep what each of them has freed, at most gigabytes after some trials of different lengths."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _train(config: Mapping[str, Any], settings: TrainSettings) -> Train:
    from newsbert_ray.training.run import train

    # Beside the trials' folders; of a sweep in a bucket each machine keeps its own.
    beside = storage.cache_folder() if storage.is_url(settings.out) else Path(settings.out).parents[1]
    gpus = config["gpus"] if settings.workers > 1 else None
    return partial(train, gpus=gpus, teachers=beside / TEACHERS)


def numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation's entry, by dotted name."""
    flat = flatten(entry)
    return {n: v for n, v in flat.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _await_folder(folder: Path) -> None:
    """Wait while another process holds the run's lock: one of a killed sweep, about to end."""
    end = time.monotonic() + LOCK_SECONDS
    while is_locked(folder / ".lock") and time.monotonic() < end:
        time.sleep(0.2)
