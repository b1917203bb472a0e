"""A folder in a bucket (s3://, gs://, all that pyarrow.fs opens): lists, reads, writes and removes files,
retries while the storage is unavailable, and locks the folder by a lease. Knows no run, no local copy."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from newsbert_ray.files import first_line, locked
from newsbert_ray.secrets import mask_url

PATIENCE = "NEWSBERT_STORAGE_PATIENCE"
"""Environment variable: seconds to retry while a storage is unavailable."""
PATIENCE_SECONDS = 600.0
MAX_PAUSE_SECONDS = 15.0
PARALLEL_TRANSFERS = 8
LEASE = ".lease.json"
RENEW_SECONDS = 15.0
WAIT_SECONDS = 60.0
"""The process behind a lease that does not change for this long is dead. No clocks are compared: they differ
between machines."""
_POLL_SECONDS = 1.0

_log = logging.getLogger(__name__)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_CREDENTIALS = (
    "the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS), a "
    "profile, or the machine's role"
)
_PERMANENT = re.compile(
    r"ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|UNRECOGNIZED_CLIENT"
    r"|INVALID_CLIENT_TOKEN|EXPIRED_TOKEN|MISSING_AUTHENTICATION|NOT_SIGNED_UP|OPT_IN_REQUIRED"
    r"|PERMISSION_DENIED|UNAUTHENTICATED|HTTP status (3\d\d|4(?!08|29)\d\d)"
)
"""Permanent errors of the storage services: not retried."""
_TEMPORARY = (ConnectionError, TimeoutError, BlockingIOError, InterruptedError)
_TEMPORARY_NUMBERS = (errno.EIO, errno.ESTALE, errno.EBUSY, errno.ENETUNREACH, errno.EHOSTUNREACH)
"""Errors of a network disk that may be available again later."""
_OBJECT_STORES = ("s3", "gcs", "abfs")
"""File systems in which a file appears only when it is complete; in others it is renamed at the end."""

T = TypeVar("T")


class StorageError(RuntimeError):
    """A location that cannot be read or written; the text has the reason and the cure, and no secret."""


class FileInfo(NamedTuple):
    """Bytes of a file, and when it was written, in nanoseconds."""

    size: int
    written: int


def is_url(location: str | Path) -> bool:
    """Whether `location` is not a path of this machine's own file system."""
    return isinstance(location, str) and _URL.match(location) is not None


def join(location: str | Path, *names: str) -> str | Path:
    """`location`/names: a path for a path, a URL for a URL; a query (`?region=...`) stays at the end."""
    if not is_url(location):
        return Path(location, *names)
    head, mark, query = str(location).partition("?")
    return "/".join([head.rstrip("/"), *names]) + mark + query


def is_hidden(name: str) -> bool:
    """Whether a file concerns only the machine that wrote it: a lock, or a file that is being written."""
    return name.endswith(".lock") or any(part.startswith(".") for part in PurePosixPath(name).parts)


class Remote:
    """The files below a URL, by their names below it. Hidden files are not listed."""

    def __init__(self, url: str, *, patience: float | None = None) -> None:
        """`patience`: seconds to retry an unavailable storage; NEWSBERT_STORAGE_PATIENCE by default.
        StorageError: an unknown kind of URL, or a URL with a secret in it."""
        self.url, self._patience = url, _patience() if patience is None else patience
        self._since: float | None = None  # when the storage became unavailable
        self._cancelled = threading.Event()  # nobody waits for the results any more
        if mask_url(url) != url:
            raise StorageError(
                f"{mask_url(url)}: a secret in a URL would appear in records and logs; remove it, and give "
                f"it by {_CREDENTIALS}"
            )
        self._fs, self._base = _open(url, os.environ.get("AWS_ENDPOINT_URL", ""))

    def files(self, below: str = "") -> dict[str, FileInfo]:
        """Every file below the URL, or below its folder `below`; empty where there is none. StorageError
        where there is no such bucket, no right to read, or it is unavailable too long."""
        from pyarrow.fs import FileSelector

        base = self._path(below) if below else self._base
        selector = FileSelector(base, recursive=True, allow_not_found=True)
        infos = self._call(lambda: self._fs.get_file_info(selector))
        start = len(self._base) + 1 if self._base else 0
        files = {info.path[start:]: FileInfo(info.size, info.mtime_ns or 0) for info in infos if info.is_file}
        if not files:
            self._require_bucket()
        return {name: file for name, file in files.items() if not is_hidden(name)}

    def as_file(self) -> FileInfo | None:
        """The URL's own size and time where it is one file; None where it is a folder or nothing."""
        info = self._call(lambda: self._fs.get_file_info(self._base)) if self._base else None
        return FileInfo(info.size, info.mtime_ns or 0) if info is not None and info.is_file else None

    def read(self, name: str) -> bytes | None:
        """A small file's content; None where there is none."""

        def read() -> bytes | None:
            with suppress(FileNotFoundError), self._fs.open_input_stream(self._path(name)) as file:
                return bytes(file.read())
            return None

        return self._call(read)

    def read_json(self, name: str) -> dict[str, Any]:
        """A small file's JSON object; empty where there is none."""
        try:
            value = json.loads(self.read(name) or b"{}")
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    def open(self, name: str) -> Any:
        """A file opened for reading at any position; the caller closes it."""
        return self._call(lambda: self._fs.open_input_file(self._path(name)))

    def write(self, name: str, content: bytes) -> None:
        """Replace a small file in one step."""
        self._call(lambda: self._put(name, content))

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Replace a small file by a JSON object, in one step."""
        self.write(name, (json.dumps(value, indent=1) + "\n").encode())

    def upload(self, folder: Path, names: Iterable[str]) -> None:
        """Copy these files of `folder` here, several at once."""
        self._for_each(names, lambda name: self._upload_file(folder / name, name))

    def download(self, files: dict[str, FileInfo], folder: Path) -> None:
        """Copy these files into `folder`, several at once, each complete or not at all."""
        self._for_each(files, lambda name: self._download_file(name, files[name].size, folder / name))

    def remove(self, names: Iterable[str]) -> None:
        """Remove these files; one that is missing counts as removed."""
        self._for_each(names, lambda name: _unless_missing(self._fs.delete_file, self._path(name)))

    def remove_folder(self, name: str) -> None:
        """Remove a folder and everything in it, if it is there."""
        self._call(lambda: _unless_missing(self._fs.delete_dir, self._path(name)))

    def _call(self, action: Callable[[], T]) -> T:
        """The result of `action`, tried again with growing pauses while the storage is unavailable."""
        pause = 0.5
        while True:
            try:
                result = action()
            except (OSError, ValueError, NotImplementedError) as error:
                if not _is_temporary(error) or self._cancelled.is_set():
                    raise StorageError(f"{self.url}: {self._explain(error)}") from error
                self._warn(error)
                self._cancelled.wait(pause)
                pause = min(2 * pause, MAX_PAUSE_SECONDS)
            else:
                since, self._since = self._since, None
                if since is not None:
                    seconds = time.monotonic() - since
                    _log.warning("%s: the storage is back after %.0f s", self.url, seconds)
                return result

    def _warn(self, error: Exception) -> None:
        """Log the beginning of an outage, and raise its end where it lasts too long."""
        since = self._since or time.monotonic()
        is_first, self._since, seconds = self._since is None, since, time.monotonic() - since
        reason = first_line(error)
        if seconds >= self._patience:
            raise StorageError(
                f"{self.url}: the storage has been unavailable for {seconds:.0f} s ({reason}); run the same "
                "command again once it is back (sweeps: with --resume); "
                f"{PATIENCE}=SECONDS waits longer"
            ) from error
        if is_first:
            again = f"trying again for up to {self._patience:.0f} s"
            _log.warning("%s: the storage is unavailable (%s); %s", self.url, reason, again)

    def _explain(self, error: Exception) -> str:
        """A permanent error, with the cure."""
        reason = first_line(error)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return f"{reason}; free some space, then run the same command again"
        if "NO_SUCH_BUCKET" in reason:
            return f"there is no such bucket ({reason}); create it, or correct the URL"
        if self._fs.type_name == "local":
            return f"cannot be written or read ({reason}); give another location"
        if _PERMANENT.search(reason) or isinstance(error, PermissionError):
            return (
                f"not permitted ({reason}); give credentials that may list, read, write and delete there by "
                f"{_CREDENTIALS}, and the bucket's region by AWS_DEFAULT_REGION"
            )
        return f"{reason}; correct the URL, or give another one"

    def _for_each(self, names: Iterable[str], work: Callable[[str], None]) -> None:
        pool = ThreadPoolExecutor(PARALLEL_TRANSFERS)
        try:
            for future in [pool.submit(self._call, partial(work, name)) for name in names]:
                future.result()
        except BaseException:
            self._cancelled.set()  # the other threads must not retry any longer
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _upload_file(self, path: Path, name: str) -> None:
        import pyarrow as pa

        try:
            # In one piece: an interruption between two pieces would leave half a file that looks complete.
            content = pa.memory_map(str(path)).read_buffer() if path.stat().st_size else b""
        except FileNotFoundError:
            return  # a temporary file, removed since it was listed
        self._put(name, content)

    def _put(self, name: str, content: Any) -> None:
        path = self._path(name)
        if self._fs.type_name in _OBJECT_STORES:
            with self._fs.open_output_stream(path) as file:
                file.write(content)
            return
        parent, _, last = path.rpartition("/")
        self._fs.create_dir(parent, recursive=True)
        partial_path = f"{parent}/.{last}.partial"
        with self._fs.open_output_stream(partial_path) as file:
            file.write(content)
        self._fs.move(partial_path, path)

    def _download_file(self, name: str, size: int, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_name(f".{path.name}.partial")
        with self._fs.open_input_stream(self._path(name)) as source, partial_path.open("wb") as target:
            shutil.copyfileobj(source, target, 8 << 20)
        if (received := partial_path.stat().st_size) != size:
            raise ConnectionError(f"{name}: received {received} bytes of {size}")
        os.replace(partial_path, path)

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}" if self._base and name else self._base or name

    def _require_bucket(self) -> None:
        """A missing bucket lists like an empty one."""
        bucket = self._base.partition("/")[0]
        if self._fs.type_name not in _OBJECT_STORES or not bucket:
            return
        if self._call(lambda: self._fs.get_file_info(bucket)).type.name == "NotFound":
            raise StorageError(f"{self.url}: there is no bucket '{bucket}'; create it, or correct the URL")


def _unless_missing(delete: Callable[[str], None], path: str) -> None:
    with suppress(FileNotFoundError):
        delete(path)


def _patience() -> float:
    value = os.environ.get(PATIENCE, "")
    try:
        return float(value) if value else PATIENCE_SECONDS
    except ValueError as error:
        raise StorageError(f"{PATIENCE}={value}: expected seconds, such as 600") from error


@lru_cache(maxsize=32)
def _open(url: str, endpoint: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it; cached, because a new one would connect again. pyarrow
    reads AWS_ENDPOINT_URL itself; `endpoint` keeps the file systems of two servers apart."""
    from pyarrow import ArrowInvalid
    from pyarrow.fs import FileSystem

    try:
        fs, path = FileSystem.from_uri(url)
    except (ArrowInvalid, OSError, NotImplementedError) as error:
        raise StorageError(
            f"{url}: cannot be opened ({first_line(error)}); expected a path, or a URL such as "
            "s3://bucket/folder, gs://bucket/folder or file:///folder"
        ) from error
    return fs, path.rstrip("/")


def _is_temporary(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno is None and not isinstance(error, _TEMPORARY):
        return not _PERMANENT.search(str(error))
    return isinstance(error, _TEMPORARY) or getattr(error, "errno", None) in _TEMPORARY_NUMBERS


@contextmanager
def lease(url: str, lock: Path) -> Iterator[None]:
    """Hold the folder at `url` for this process alone; `lock` is this machine's lock file for it.
    StorageError: another process works there.

    The lease of a process that was killed is waited for until it has not changed for WAIT_SECONDS; if that
    process ran on this machine, not at all, because the system has released its lock.
    """
    remote, own = Remote(url), uuid.uuid4().hex
    lock.parent.mkdir(parents=True, exist_ok=True)
    holder_file = lock.with_suffix(".holder")
    with locked(lock, error=_in_use(url)):
        before = holder_file.read_text(encoding="utf-8") if holder_file.exists() else ""
        _wait_for_lease(remote, dead=before)
        holder_file.write_text(own, encoding="utf-8")
        remote.write_json(LEASE, {"holder": own, "beat": 0})
        over = threading.Event()
        renewal = threading.Thread(target=_renew_lease, args=(url, own, over), name="lease", daemon=True)
        renewal.start()
        try:
            yield
        finally:
            over.set()
            renewal.join()
            with suppress(StorageError):  # where the storage is unavailable, the lease runs out by itself
                remote = Remote(url, patience=0)
                if remote.read_json(LEASE).get("holder") == own:
                    remote.remove([LEASE])


def _wait_for_lease(remote: Remote, *, dead: str) -> None:
    """Return once nobody holds the folder; `dead` held it from this machine and does not run any more."""
    lease = remote.read_json(LEASE)
    if not lease or (dead and lease.get("holder") == dead):
        return
    _log.warning("%s: in use, perhaps by a process that was killed; waiting %.0f s", remote.url, WAIT_SECONDS)
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end:
        time.sleep(min(_POLL_SECONDS, WAIT_SECONDS / 4))
        now = remote.read_json(LEASE)
        if not now:
            return
        if now != lease:
            raise _in_use(remote.url)


def _renew_lease(url: str, own: str, over: threading.Event) -> None:
    beat = 0
    while not over.wait(RENEW_SECONDS):
        beat += 1
        with suppress(StorageError):  # unavailable: the next beat tries again
            remote = Remote(url, patience=0)
            if remote.read_json(LEASE).get("holder", own) != own:
                return  # another process took this one for dead; WorkDir.publish checks for that
            remote.write_json(LEASE, {"holder": own, "beat": beat})


def _in_use(url: str) -> StorageError:
    return StorageError(f"{url}: another process works in it; wait for it, or give another --out")
