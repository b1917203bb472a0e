"""Folders by location: a path is used where it is, a URL (s3://, gs://, ...) through a copy on this machine.

`WorkDir` is a folder that is written to, `fetch` copies what is only read. Public functions call them once,
at the start; everything below works on local paths.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from operator import attrgetter
from pathlib import Path, PurePosixPath

from newsbert_ray.config import TrainSettings, merge
from newsbert_ray.files import checksum_of, locked, write_json
from newsbert_ray.record import RECORD, STOPPED, read_record, write_record
from newsbert_ray.storage.bucket import FileInfo, Remote, StorageError, is_hidden, is_url, join, lease

CACHE = "NEWSBERT_CACHE"
"""Environment variable: the folder of all copies; ~/.cache/newsbert_ray by default."""
WRITER = ".writer.json"
"""In a bucket's folder: which copy writes there. Only the process that began last may write."""
_LOCATIONS = ("data", "teacher", "out", "student.encoder", "distill.teacher_run", "before.data", "unlabelled")
HUB_NAMES = ("teacher", "student.encoder")
"""Settings that may be a Hugging Face name instead of a location."""
_LARGE = ("checkpoints", "student")
"""Folders of a run that only training and evaluation need."""
_RANK_FIRST, _RANK_LAST = ("settings.json", "sweep.json"), (RECORD, STOPPED)
_INDEX_FILES = ("state.json", "manifest.json")
"""Files that are read first and hold the hashes of other files."""
_DOWNLOAD_TRIES = 5
"""Downloads of a folder that changes in the meantime."""


@dataclass(frozen=True)
class WorkDir:
    """A folder of results: `location` is the user's path or URL; `path` is where this machine works.

    For a local folder both are the same, and the methods that exchange files with a bucket do nothing. An
    `absolute` WorkDir may be sent to another process or machine, where `path` is that machine's copy.

    A run in a bucket can be continued at any moment: files are sent in an order in which those that name
    others come after them, and files are removed last.
    """

    location: str

    @classmethod
    def at(cls, location: str | Path) -> WorkDir:
        """The folder at a path or URL; nothing is read or created."""
        return cls(str(location) if is_url(location) else str(Path(location)))

    @property
    def is_remote(self) -> bool:
        """Whether the folder is in a bucket and `path` is a copy."""
        return is_url(self.location)

    @property
    def path(self) -> Path:
        """The folder on this machine."""
        return cache_folder() / "runs" / copy_name(self.location) if self.is_remote else Path(self.location)

    def absolute(self) -> WorkDir:
        """The same folder, independent of the working directory."""
        return WorkDir(absolute(self.location))

    def child(self, *names: str) -> WorkDir:
        """A folder below this one."""
        return WorkDir(str(join(self.location, *names)))

    def companion(self, name: str) -> WorkDir:
        """A folder for a run that this one needs: below a local folder, beside one in a bucket."""
        return WorkDir(f"{self.location.rstrip('/')}-{name}") if self.is_remote else self.child(name)

    def download(self, *, markers: Sequence[str] = (), small: bool = False) -> Path:
        """Bring the copy up to date with the bucket, become the folder's writer, and return `path`.

        Where nobody else has written there since, the copy is kept: it is newer if the storage was
        unavailable at the end. Checkpoints and students are left out of a finished run, and with `small`.
        StorageError: the folder holds files, but none of `markers`; no such bucket, no permission;
        unavailable too long.
        """
        if not self.is_remote:
            return self.path
        remote, path, copy = Remote(self.location), self.path, _Copy.read(self)
        files = remote.files()
        if markers and files and not any(name in files for name in markers):
            raise StorageError(f"{self.location}: holds other files; give an empty or new folder as --out")
        wanted = {n: f for n, f in files.items() if not (small or RECORD in files) or not is_large(n)}
        path.mkdir(parents=True, exist_ok=True)
        if copy.id and remote.read_json(WRITER).get("copy") == copy.id:
            wanted = {n: f for n, f in wanted.items() if n not in copy.files and not (path / n).exists()}
        else:
            copy = _Copy(id=uuid.uuid4().hex)
            _keep_only(path, wanted)
        remote.download(wanted, path)
        copy.files |= _stamps(path, wanted)
        copy.session = ""
        copy.write(self)
        if files and RECORD not in files:
            self._claim(remote, copy)
        return path

    def publish(self) -> None:
        """Send what has changed since the last download or publication, then remove what is gone.
        StorageError where another process has begun to write there, or the bucket does not let us."""
        if not self.is_remote:
            return
        path, copy = self.path, _Copy.read(self)
        now = _stamps(path, _file_names(path))
        changed = [name for name, stamp in now.items() if copy.files.get(name) != stamp]
        gone = [name for name in copy.files if name not in now]
        if not changed and not gone:
            return
        remote = Remote(self.location)
        self._claim(remote, copy)
        for rank in sorted({_rank(name) for name in changed}):
            names = [name for name in changed if _rank(name) == rank]
            remote.upload(path, names)
            copy.files |= {name: now[name] for name in names}
            copy.write(self)
        folders = {str(PurePosixPath(name).parent) for name in gone}
        for name in sorted(name for name in folders if not (path / name).exists()):
            remote.remove_folder(name)
        remote.remove(name for name in gone if (path / name).parent.exists())
        copy.files = {name: stamp for name, stamp in copy.files.items() if name not in gone}
        copy.write(self)

    def collect(self, part: str = "") -> None:
        """Download the small files that others have written below `part`; other files in the copy stay."""
        if not self.is_remote:
            return
        remote, copy = Remote(self.location), _Copy.read(self)
        files = {name: file for name, file in remote.files(part).items() if not is_large(name)}
        remote.download(files, self.path)
        copy.files |= _stamps(self.path, files)
        copy.write(self)

    def remove(self, part: str) -> None:
        """Remove the folder `part`, in the bucket and on this machine, if it is there."""
        shutil.rmtree(self.path / part, ignore_errors=True)
        if self.is_remote:
            Remote(self.location).remove_folder(part)
            copy = _Copy.read(self)
            copy.files = {n: stamp for n, stamp in copy.files.items() if not n.startswith(f"{part}/")}
            copy.write(self)

    def clear(self) -> None:
        """Remove everything but hidden files, in the bucket and on this machine."""
        for top in {PurePosixPath(name).parts[0] for name in self.sizes()}:
            (self.path / top).unlink(missing_ok=True) if (self.path / top).is_file() else self.remove(top)
        self.publish()

    def discard(self) -> None:
        """Delete the copy: everything in it that counts has been published."""
        if self.is_remote:
            shutil.rmtree(self.path, ignore_errors=True)
            self._beside(".json").unlink(missing_ok=True)

    def write_text(self, name: str, text: str) -> None:
        """Write a small file at the location itself, in one step."""
        Remote(absolute(self.location)).write(name, text.encode())

    def sizes(self) -> dict[str, int]:
        """Bytes of each file at the location itself, by name."""
        return {name: file.size for name, file in Remote(absolute(self.location)).files().items()}

    def check_writable(self) -> None:
        """Write a file at the location, read it back and remove it; StorageError where that fails."""
        remote = Remote(absolute(self.location))
        name, content = f".probe-{secrets.token_hex(8)}", secrets.token_bytes(16)
        remote.write(name, content)
        read = remote.read(name)
        remote.remove([name])
        if read != content:
            raise StorageError(f"{self.location}: a test file came back changed; give another --out")

    def _claim(self, remote: Remote, copy: _Copy) -> None:
        """Become the folder's writer; after that, make sure that nobody else has become it since."""
        if copy.session:
            if remote.read_json(WRITER).get("session") not in (copy.session, None):
                raise StorageError(
                    f"{self.location}: another process has begun to write there, so this one ends; its work "
                    "continues there"
                )
            return
        copy.id, copy.session = copy.id or uuid.uuid4().hex, uuid.uuid4().hex
        copy.write(self)
        remote.write_json(WRITER, {"copy": copy.id, "session": copy.session})

    def _beside(self, suffix: str) -> Path:
        return self.path.with_name(f"{self.path.name}{suffix}")


@contextmanager
def open_workdir(
    location: str | Path, *, markers: Sequence[str], small: bool = False, exclusive: bool = True
) -> Iterator[WorkDir]:
    """The folder at `location`, downloaded (`markers`, `small`: see there) where it is in a bucket, which no
    other process may write to; with `exclusive` False the caller knows that none does (a sweep's trial).
    StorageError: another process works there, or as for `WorkDir.download`."""
    workdir = WorkDir.at(location)
    with ExitStack() as stack:
        if workdir.is_remote and exclusive:
            stack.enter_context(lease(workdir.location, workdir._beside(".lock")))
        workdir.download(markers=markers, small=small)
        yield workdir


@contextmanager
def snapshot(location: str | Path) -> Iterator[Path]:
    """The small files of a run or sweep as they are now, in a folder of the same name, deleted at the end."""
    if not is_url(location):
        yield Path(location)
        return
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / last_part(location)
        remote = Remote(str(location))
        remote.download({n: f for n, f in remote.files().items() if not is_large(n)}, folder)
        yield folder


def fetch(location: str | Path, *, without: Sequence[str] = ()) -> Path:
    """A local path to something that is only read: shards, a teacher, a finished run, one file.

    A URL is downloaded once to a machine, without files of the patterns `without`, and again where it has
    changed; the copy from before stays for the processes that read it. StorageError: nothing there; no such
    bucket, no permission; unavailable too long.
    """
    if not is_url(location):
        return Path(location)
    remote, last = Remote(str(location)), last_part(location)
    for _ in range(_DOWNLOAD_TRIES):
        files = _list_inputs(remote, without)
        digest = checksum_of(sorted((name, *file) for name, file in files.items()))[:8]
        folder = cache_folder() / "inputs" / f"{copy_name(location)}-{digest}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f"{folder.name}.lock"), wait_seconds=math.inf):
            if folder.is_dir():
                return folder / last
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            remote.download(files, partial / last)
            if _list_inputs(remote, without) == files:
                os.replace(partial, folder)
                return folder / last
    raise StorageError(f"{location}: changes while it is read; try again when it is complete")


def download_input(location: str) -> str:
    """A URL as its copy on this machine; a path, or a Hugging Face name, unchanged."""
    return str(fetch(location)) if is_url(location) else location


def locations_of(settings: TrainSettings) -> dict[str, str]:
    """Every location in the settings, by the setting's dotted name."""
    return {name: location for name in _LOCATIONS if (location := attrgetter(name)(settings)) is not None}


def with_locations(settings: TrainSettings, locations: Mapping[str, str]) -> TrainSettings:
    """The same settings with other locations, by dotted name; the same object where none differs."""
    if all(locations_of(settings).get(name) == location for name, location in locations.items()):
        return settings
    return TrainSettings.model_validate(merge(settings.model_dump(), locations))


def with_local_paths(settings: TrainSettings) -> TrainSettings:
    """The same settings with every URL replaced by this machine's copy; inputs are fetched."""
    urls = {name: location for name, location in locations_of(settings).items() if is_url(location)}
    without = {"distill.teacher_run": ("checkpoints/*",)}
    copies = {
        name: str(WorkDir(url).path if name == "out" else fetch(url, without=without.get(name, ())))
        for name, url in urls.items()
    }
    return with_locations(settings, copies)


def restore_urls(run: Path, settings: TrainSettings) -> None:
    """Write the locations of `settings` into the record in `run`, where `with_local_paths` had put copies."""
    record = read_record(run)
    locations: dict[str, str | None] = {**locations_of(settings)}
    if record.settings.get("distill", {}).get("teacher_run"):
        locations.setdefault("distill.teacher_run", None)  # a prerequisite: fine-tuned before this run
    values = merge(record.settings, locations)
    if values != record.settings:
        write_record(run, record.model_copy(update={"settings": values}))


def is_location(name: str) -> bool:
    """Whether a setting that may be a Hugging Face name is a URL or a folder of this machine."""
    return is_url(name) or Path(name).is_dir()


def absolute(location: str | Path) -> str:
    """The location independent of the working directory."""
    return str(location) if is_url(location) else str(Path(location).absolute())


def cache_folder() -> Path:
    """The folder of all copies: NEWSBERT_CACHE, or a folder that only this user may write to."""
    if named := os.environ.get(CACHE):
        Path(named).mkdir(parents=True, exist_ok=True, mode=0o700)
        return Path(named)
    usual = Path("~/.cache/newsbert_ray").expanduser()
    for folder in (usual, Path(tempfile.gettempdir()) / f"newsbert_ray-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            status = folder.stat()
        except OSError:
            continue
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    raise StorageError(f"{usual}: no folder for copies of files in buckets; set {CACHE} to one of yours")


def copy_name(location: str | Path) -> str:
    """A copy's folder name: the location's last part for people, and its hash."""
    url = str(location).rstrip("/")
    return f"{last_part(location)}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"


def last_part(location: str | Path) -> str:
    """The last part of a location, as the name of a file or folder on this machine."""
    last = str(location).partition("?")[0].rstrip("/").rpartition("/")[2]
    return "".join(c if c.isalnum() or c in "._=,-" else "_" for c in last).strip(".")[:80] or "folder"


def is_large(name: str) -> bool:
    """Whether a file of a run, or of a sweep's trial, belongs to its checkpoints or student."""
    return any(part in _LARGE for part in PurePosixPath(name).parent.parts)


@dataclass
class _Copy:
    """What this machine knows of a copy: size and time of each file when it last equalled the bucket's."""

    id: str = ""
    session: str = ""
    files: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def read(cls, workdir: WorkDir) -> _Copy:
        try:
            return cls(**json.loads(workdir._beside(".json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return cls()

    def write(self, workdir: WorkDir) -> None:
        write_json(workdir._beside(".json"), self.__dict__)


def _rank(name: str) -> int:
    """The order of sending: weights before their state, the best model before the checkpoint that names it,
    and last the file that says that all has ended."""
    path = PurePosixPath(name)
    if path.name in _RANK_FIRST:
        return 0
    if path.name in _INDEX_FILES:
        return 3 if path.parent.name.startswith("step-") else 2
    return 4 if path.name in _RANK_LAST else 1


def _list_inputs(remote: Remote, without: Sequence[str]) -> dict[str, FileInfo]:
    """The files of a folder; where the location is one file, that file under an empty name."""
    if (info := remote.as_file()) is not None:
        return {"": info}
    files = {n: f for n, f in remote.files().items() if not any(fnmatch(n, pattern) for pattern in without)}
    if not files:
        raise StorageError(f"{remote.url}: nothing there; correct the URL")
    return files


def _file_names(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return [name for name in (path.relative_to(folder).as_posix() for path in paths) if not is_hidden(name)]


def _stamps(folder: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Size and time of the files that exist."""
    stamps = {}
    for name in names:
        with suppress(FileNotFoundError):
            status = (folder / name).stat()
            stamps[name] = [status.st_size, status.st_mtime_ns]
    return stamps


def _keep_only(folder: Path, names: Mapping[str, FileInfo]) -> None:
    for name in _file_names(folder):
        if name not in names:
            (folder / name).unlink(missing_ok=True)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
