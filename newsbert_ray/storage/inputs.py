"""What is only read (shards, a teacher, a finished run): a path where it is, a URL in a copy on this machine,
downloaded once. `storage` has the folders that are written to."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from newsbert_ray.config import TrainSettings, merge
from newsbert_ray.files import locked
from newsbert_ray.record import read_record, write_record
from newsbert_ray.storage.bucket import Listed, Remote, StorageError, is_url
from newsbert_ray.storage.workdir import cache_folder, copy_name, last_part, local

NAMES = ("teacher", "student.encoder")
"""Settings that may be a Hugging Face name instead of a place."""
_TRIES = 5
"""Downloads of a folder that changes meanwhile."""


def fetch(place: str | Path, *, without: Sequence[str] = ()) -> Path:
    """What is only read, a folder or one file: shards, a teacher, a finished run, a source's zip. Downloaded
    once to a machine, and anew where it has changed; the copy of before stays for those who read it.

    Args:
        without: patterns of files that are not needed.
    Raises:
        StorageError: nothing there; no bucket, no permission; away for too long.
    """
    if not is_url(place):
        return Path(place)
    remote, last = Remote(str(place)), last_part(place)
    for _ in range(_TRIES):
        files = _listed(remote, without)
        state = json.dumps(sorted((name, *file) for name, file in files.items()))
        digest = hashlib.sha256(state.encode()).hexdigest()[:8]
        folder = cache_folder() / "inputs" / f"{copy_name(place)}-{digest}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f"{folder.name}.lock"), wait_seconds=math.inf):
            if folder.is_dir():
                return folder / last
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            remote.download(files, partial / last)
            if _listed(remote, without) == files:
                os.replace(partial, folder)
                return folder / last
    raise StorageError(f"{place}: changes while it is read; try again when it is whole")


def brought(given: str) -> str:
    """A URL as its copy on this machine; a path, or a Hugging Face name, as it stands."""
    return str(fetch(given)) if is_url(given) else given


def places(settings: TrainSettings) -> dict[str, str]:
    """Every place that the settings name, by the setting's dotted name."""
    given = {
        "data": settings.data,
        "teacher": settings.teacher,
        "out": settings.out,
        "student.encoder": settings.student.encoder,
        "distill.teacher_run": settings.distill.teacher_run,
        "before.data": settings.before.data,
    }
    return {name: place for name, place in given.items() if place is not None}


def moved(settings: TrainSettings, there: Mapping[str, str]) -> TrainSettings:
    """The same settings with other places, by dotted name; itself where none is another."""
    if all(places(settings).get(name) == place for name, place in there.items()):
        return settings
    return TrainSettings.model_validate(merge(settings.model_dump(), there))


def at_hand(settings: TrainSettings) -> TrainSettings:
    """The same settings with this machine's copies as folders: shards, encoders and a teacher's run fetched,
    the run's working copy as `out`; itself where all are paths.

    Raises:
        StorageError: as `fetch`.
    """
    urls = {name: place for name, place in places(settings).items() if is_url(place)}
    without = {"distill.teacher_run": ("checkpoints/*",)}
    copies = {
        name: str(local(place) if name == "out" else fetch(place, without=without.get(name, ())))
        for name, place in urls.items()
    }
    return moved(settings, copies)


def as_given(run: Path, settings: TrainSettings) -> None:
    """Let the record in `run` name as `settings` do all places, of which `at_hand` had given copies."""
    record = read_record(run)
    given: dict[str, str | None] = {**places(settings)}
    if record.settings.get("distill", {}).get("teacher_run"):
        given.setdefault("distill.teacher_run", None)  # the one that was fine-tuned first
    values = merge(record.settings, given)
    if values != record.settings:
        write_record(run, record.model_copy(update={"settings": values}))


def _listed(remote: Remote, without: Sequence[str]) -> dict[str, Listed]:
    """The files of a folder; of a place that is a file itself that one, by an empty name."""
    if (itself := remote.itself()) is not None:
        return {"": itself}
    found = {n: f for n, f in remote.files().items() if not any(fnmatch(n, pattern) for pattern in without)}
    if not found:
        raise StorageError(f"{remote.url}: nothing there; correct the URL")
    return found
