"""What is only read (shards, a teacher, a finished run): a path where it is, a URL in a copy on this machine,
downloaded once. `storage` has the folders that are written to."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from newsbert_ray.config import TrainSettings
from newsbert_ray.record import read_record, write_record
from newsbert_ray.remote import Listed, Remote, StorageError, is_url
from newsbert_ray.storage import cache_folder, copy_name, last_part, local

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
        with folder.with_name(f"{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
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


def at_hand(settings: TrainSettings) -> TrainSettings:
    """The same settings with this machine's copies as folders: shards and teacher fetched, the run's working
    copy as `out`; itself where all are paths.

    Raises:
        StorageError: as `fetch`.
    """
    places = {"data": settings.data, "teacher": settings.teacher}
    copies = {name: brought(place) for name, place in places.items() if is_url(place)}
    if is_url(settings.out):
        copies["out"] = str(local(settings.out))
    return settings.model_copy(update=copies) if copies else settings


def as_given(run: Path, settings: TrainSettings) -> None:
    """Let the record in `run` name as `settings` do the places of which `at_hand` had given copies."""
    record = read_record(run)
    given = {
        name: place
        for name in ("data", "teacher", "out")
        if is_url(place := getattr(settings, name)) and not is_url(record.settings[name])
    }
    if given:
        write_record(run, record.model_copy(update={"settings": {**record.settings, **given}}))


def _listed(remote: Remote, without: Sequence[str]) -> dict[str, Listed]:
    """The files of a folder; of a place that is a file itself that one, by an empty name."""
    if (itself := remote.itself()) is not None:
        return {"": itself}
    found = {n: f for n, f in remote.files().items() if not any(fnmatch(n, pattern) for pattern in without)}
    if not found:
        raise StorageError(f"{remote.url}: nothing there; correct the URL")
    return found
