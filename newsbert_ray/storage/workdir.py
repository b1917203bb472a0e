"""Places: a path is worked in where it is, a URL (s3://, gs://, ...) in a copy on this machine, brought and
published. Each function takes both; with a path it does nothing that a path does not need.

A run's folder in a bucket can be gone on from at any moment: what is published goes in an order in which the
files that name others come after those, and removals come last.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from newsbert_ray.files import write_json, write_text
from newsbert_ray.record import RECORD, STOPPED
from newsbert_ray.storage.bucket import Listed, Remote, StorageError, hidden, is_url, join, leased, shown

__all__ = [
    "StorageError",
    "absolute",
    "bring",
    "cache_folder",
    "check_writable",
    "collect",
    "copy_name",
    "discard",
    "is_url",
    "join",
    "last_part",
    "leave",
    "local",
    "publish",
    "remove",
    "shown",
    "sizes",
    "snapshot",
    "working",
]

CACHE = "NEWSBERT_CACHE"
"""Environment: where copies lie; ~/.cache/newsbert_ray by default."""
WRITER = ".writer.json"
"""In a bucket's folder: which copy writes there. The last one that has begun to is the only one that may."""
_LARGE = ("checkpoints", "student")
"""Folders of a run that only those need who train or evaluate."""
_FIRST, _LAST = ("settings.json", "sweep.json"), (RECORD, STOPPED)
_NAMING = ("state.json", "manifest.json")
"""Files that are read first, and name the hashes of others."""


def absolute(place: str | Path) -> str:
    """`place` as any working directory understands it."""
    return str(place) if is_url(place) else str(Path(place).absolute())


def local(place: str | Path) -> Path:
    """Where `place` is worked in on this machine: itself if it is a path."""
    return cache_folder() / "runs" / copy_name(place) if is_url(place) else Path(place)


@contextmanager
def working(
    place: str | Path, *, marks: Sequence[str], small: bool = False, alone: bool = True
) -> Iterator[Path]:
    """The working copy of a place that this process alone writes to.

    Args:
        marks, small: as for `bring`.
        alone: whether another process may have begun there; a sweep's trial knows that none has.
    Raises:
        StorageError: another process works there, or as `bring`.
    """
    if not is_url(place):
        yield Path(place)
        return
    if not alone:
        yield bring(place, marks=marks, small=small)
        return
    with leased(str(place), _beside(place, ".lock")):
        yield bring(place, marks=marks, small=small)


def bring(place: str | Path, *, marks: Sequence[str] = (), small: bool = False) -> Path:
    """Make the working copy what the place holds, and this process the place's writer.

    Where nobody else has written there since this copy was, the copy stays as it is: it is the newer one, if
    the storage was away at the end. Of a finished run no checkpoints and no student come.

    Args:
        marks: names of which one must be there where anything is.
        small: leave checkpoints and students where they are.
    Raises:
        StorageError: the place holds other files; no bucket, no permission; away for too long.
    """
    if not is_url(place):
        return Path(place)
    remote, folder, copy = Remote(str(place)), local(place), _Copy.read(place)
    files = remote.files()
    if marks and files and not any(mark in files for mark in marks):
        raise StorageError(f"{place}: holds other files; give an empty or new folder as --out")
    wanted = {n: f for n, f in files.items() if not (small or RECORD in files) or not is_large(n)}
    folder.mkdir(parents=True, exist_ok=True)
    if copy.id and _writer(remote).get("copy") == copy.id:
        wanted = {n: f for n, f in wanted.items() if n not in copy.files and not (folder / n).exists()}
    else:
        copy = _Copy(id=uuid.uuid4().hex)
        _keep_only(folder, wanted)
    remote.download(wanted, folder)
    copy.files |= _stamps(folder, wanted)
    copy.session = ""
    copy.write(place)
    if files and RECORD not in files:
        _claim(remote, copy, place)
    return folder


def publish(place: str | Path) -> None:
    """Send what has changed in the working copy since it was brought or published, then remove what is gone.

    Raises:
        StorageError: another process has begun to write there; no permission; away for too long.
    """
    if not is_url(place):
        return
    folder, copy = local(place), _Copy.read(place)
    now = _stamps(folder, _names(folder))
    changed = [name for name, stamp in now.items() if copy.files.get(name) != stamp]
    gone = [name for name in copy.files if name not in now]
    if not changed and not gone:
        return
    remote = Remote(str(place))
    _claim(remote, copy, place)
    for rank in sorted({_rank(name) for name in changed}):
        names = [name for name in changed if _rank(name) == rank]
        remote.upload(folder, names)
        copy.files |= {name: now[name] for name in names}
        copy.write(place)
    folders = {str(PurePosixPath(name).parent) for name in gone}
    for name in sorted(name for name in folders if not (folder / name).exists()):
        remote.remove_folder(name)
    remote.remove(name for name in gone if (folder / name).parent.exists())
    if gone:
        copy.files = {name: stamp for name, stamp in copy.files.items() if name not in gone}
        copy.write(place)


def collect(place: str | Path, part: str = "") -> None:
    """Bring the small files that others have written below place/part; what else is in the copy stays."""
    if not is_url(place):
        return
    remote, folder, copy = Remote(str(place)), local(place), _Copy.read(place)
    files = {name: file for name, file in remote.files(part).items() if not is_large(name)}
    remote.download(files, folder)
    copy.files |= _stamps(folder, files)
    copy.write(place)


def remove(place: str | Path, part: str) -> None:
    """Remove the folder place/part, there and in the working copy, if it is there."""
    shutil.rmtree(local(place) / part, ignore_errors=True)
    if is_url(place):
        Remote(str(place)).remove_folder(part)
        copy = _Copy.read(place)
        if any(name.startswith(f"{part}/") for name in copy.files):
            copy.files = {n: stamp for n, stamp in copy.files.items() if not n.startswith(f"{part}/")}
            copy.write(place)


def discard(place: str | Path) -> None:
    """Forget the working copy: everything in it that counts has been published."""
    if is_url(place):
        shutil.rmtree(local(place), ignore_errors=True)
        _beside(place, ".json").unlink(missing_ok=True)


def leave(place: str | Path, name: str, text: str) -> None:
    """Write the small file place/name, whole or not at all."""
    if is_url(place):
        Remote(str(place)).write(name, text.encode())
    else:
        write_text(Path(place) / name, text)


@contextmanager
def snapshot(place: str | Path) -> Iterator[Path]:
    """The small files of a run or sweep as they are now, under the place's own name; gone at the end."""
    if not is_url(place):
        yield Path(place)
        return
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / last_part(place)
        remote = Remote(str(place))
        remote.download({n: f for n, f in remote.files().items() if not is_large(n)}, folder)
        yield folder


def sizes(place: str | Path) -> dict[str, int]:
    """Bytes of each file at or below `place`, by name; one that vanishes meanwhile counts nothing."""
    if is_url(place):
        return {name: file.size for name, file in Remote(str(place)).files().items()}
    return {name: size for name, (size, _) in _stamps(Path(place), _names(Path(place))).items()}


def check_writable(place: str | Path) -> None:
    """Write a file there, read it back, remove it.

    Raises:
        StorageError: one of them does not work.
    """
    name, content = f".probe-{secrets.token_hex(8)}", secrets.token_bytes(16)
    if is_url(place):
        remote = Remote(str(place))
        remote.write(name, content)
        found = remote.read(name)
        remote.remove([name])
    else:
        try:
            Path(place).mkdir(parents=True, exist_ok=True)
            (Path(place) / name).write_bytes(content)
            found = (Path(place) / name).read_bytes()
            (Path(place) / name).unlink()
        except OSError as error:
            raise StorageError(f"{place}: cannot be written ({error}); give another --out") from error
    if found != content:
        raise StorageError(f"{place}: what was written there reads otherwise; give another --out")


@dataclass
class _Copy:
    """What this machine remembers of a working copy: the size and time of each file when it was last the same
    here and there."""

    id: str = ""
    session: str = ""
    files: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def read(cls, place: str | Path) -> _Copy:
        try:
            return cls(**json.loads(_beside(place, ".json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return cls()

    def write(self, place: str | Path) -> None:
        write_json(_beside(place, ".json"), self.__dict__)


def _claim(remote: Remote, copy: _Copy, place: str | Path) -> None:
    """Become the place's writer; once that, make sure that nobody else has become it since."""
    if copy.session:
        if _writer(remote).get("session") not in (copy.session, None):
            raise StorageError(
                f"{place}: another process has begun to write there, so this one ends; its work goes on there"
            )
        return
    copy.id, copy.session = copy.id or uuid.uuid4().hex, uuid.uuid4().hex
    copy.write(place)
    remote.write(WRITER, json.dumps({"copy": copy.id, "session": copy.session}).encode())


def _writer(remote: Remote) -> Mapping[str, str]:
    try:
        found = json.loads(remote.read(WRITER) or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _rank(name: str) -> int:
    """When a file is sent: weights before their state, the best model before the checkpoint that
    names it, the word that all has ended last."""
    path = PurePosixPath(name)
    if path.name in _FIRST:
        return 0
    if path.name in _NAMING:
        return 3 if path.parent.name.startswith("step-") else 2
    return 4 if path.name in _LAST else 1


def is_large(name: str) -> bool:
    """Whether a file of a run, or of a sweep's trial, is none of its small ones."""
    return any(part in _LARGE for part in PurePosixPath(name).parent.parts)


def _names(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return [name for name in (path.relative_to(folder).as_posix() for path in paths) if not hidden(name)]


def _stamps(folder: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Size and time of those files that are there."""
    found = {}
    for name in names:
        try:
            status = (folder / name).stat()
        except FileNotFoundError:
            continue
        found[name] = [status.st_size, status.st_mtime_ns]
    return found


def _keep_only(folder: Path, names: Mapping[str, Listed]) -> None:
    for name in _names(folder):
        if name not in names:
            (folder / name).unlink(missing_ok=True)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def cache_folder() -> Path:
    """The folder of all copies: NEWSBERT_CACHE, or one of this user's alone."""
    if given := os.environ.get(CACHE):
        Path(given).mkdir(parents=True, exist_ok=True, mode=0o700)
        return Path(given)
    usual = Path("~/.cache/newsbert_ray").expanduser()
    for folder in (usual, Path(tempfile.gettempdir()) / f"newsbert_ray-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            status = folder.stat()
        except OSError:
            continue
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    raise StorageError(f"{usual}: no folder for copies of what is in a bucket; set {CACHE} to one of yours")


def copy_name(place: str | Path) -> str:
    """A copy's folder: the place's last part for a person, its hash for the rest."""
    url = str(place).rstrip("/")
    return f"{last_part(place)}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"


def last_part(place: str | Path) -> str:
    """The last part of a place's name, as a file's or folder's name on this machine."""
    last = str(place).partition("?")[0].rstrip("/").rpartition("/")[2]
    return "".join(c if c.isalnum() or c in "._=,-" else "_" for c in last).strip(".")[:80] or "folder"


def _beside(place: str | Path, suffix: str) -> Path:
    folder = local(place)
    return folder.with_name(f"{folder.name}{suffix}")
