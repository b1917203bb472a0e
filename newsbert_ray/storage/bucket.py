"""A folder in a bucket (s3://, gs://, anything of pyarrow.fs): list, read, write and remove its files,
and wait while the storage is away. Knows no run and no working copy."""

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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from newsbert_ray.files import first_line, locked
from newsbert_ray.secrets import mask_url

PATIENCE = "NEWSBERT_STORAGE_PATIENCE"
"""Environment: seconds that an unreachable storage is waited for."""
PATIENCE_SECONDS = 600.0
LONGEST_PAUSE_SECONDS = 15.0
AT_ONCE = 8
"""Files of one folder that travel side by side."""

_log = logging.getLogger(__name__)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_CREDENTIALS = (
    "the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS), a "
    "profile, or the machine's role"
)
_REFUSED = re.compile(
    r"ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|UNRECOGNIZED_CLIENT"
    r"|INVALID_CLIENT_TOKEN|EXPIRED_TOKEN|MISSING_AUTHENTICATION|NOT_SIGNED_UP|OPT_IN_REQUIRED"
    r"|PERMISSION_DENIED|UNAUTHENTICATED|HTTP status (3\d\d|4(?!08|29)\d\d)"
)
"""What a storage answers that will answer the same in ten minutes; each service has its own words."""
_AWAY = (
    errno.EIO,
    errno.ESTALE,
    errno.EAGAIN,
    errno.EINTR,
    errno.EBUSY,
    errno.EPIPE,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.ECONNABORTED,
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
)
"""What the system says of a disk that a network brings, and that may be back."""
_OBJECTS = ("s3", "gcs", "abfs")
"""File systems in which a file appears when its writing ends; elsewhere it is written beside its place."""

T = TypeVar("T")


class StorageError(RuntimeError):
    """A place that cannot be read or written; the text names it, the reason and the cure, and no secret."""


class Listed(NamedTuple):
    """A file there: its bytes, and when it was written, in nanoseconds."""

    size: int
    written: int


def is_url(place: str | Path) -> bool:
    """Whether `place` is no path of this machine's own file system."""
    return isinstance(place, str) and _URL.match(place) is not None


def join(place: str | Path, *names: str) -> str | Path:
    """`place`/names: a path of a path, a URL of a URL; what stands behind a `?` stays behind."""
    if not is_url(place):
        return Path(place, *names)
    head, mark, query = str(place).partition("?")
    return "/".join([head.rstrip("/"), *names]) + mark + query


def shown(place: str | Path) -> str:
    """`place` as it may be printed: without a password, key or token that somebody wrote into it."""
    return mask_url(place) if isinstance(place, str) and is_url(place) else str(place)


class Remote:
    """The files below a URL, by their names below it. Those that `hidden` names are not listed."""

    def __init__(self, url: str, *, patience: float | None = None) -> None:
        """`patience`: seconds to wait for a storage that is away; NEWSBERT_STORAGE_PATIENCE by default.

        Raises:
            StorageError: no such kind of place, or a URL with a secret in it.
        """
        self.url = url
        self._waiting = _Waiting(url, _patience() if patience is None else patience)
        if shown(url) != url:
            raise StorageError(
                f"{shown(url)}: a secret in a URL would stand in records and logs; leave it out, give it by "
                f"{_CREDENTIALS}"
            )
        self._fs, self._base = _open(url, os.environ.get("AWS_ENDPOINT_URL", ""))

    def files(self, below: str = "") -> dict[str, Listed]:
        """Every file below the place, or below its folder `below`; none where nothing is there.

        Raises:
            StorageError: no such bucket, no right to read, or away for too long.
        """
        from pyarrow.fs import FileSelector, FileType

        base = self._path(below) if below else self._base
        selector = FileSelector(base, recursive=True, allow_not_found=True)
        found = self._waiting.call(lambda: self._fs.get_file_info(selector))
        start = len(self._base) + 1 if self._base else 0
        names = {i.path[start:]: Listed(i.size, i.mtime_ns or 0) for i in found if i.type == FileType.File}
        if not names:
            self._require_bucket()
        return {name: file for name, file in names.items() if not hidden(name)}

    def itself(self) -> Listed | None:
        """The place's own size and time where it is one file; None where it is a folder, or nothing."""
        from pyarrow.fs import FileType

        found = self._waiting.call(lambda: self._fs.get_file_info(self._base)) if self._base else None
        if found is None or found.type != FileType.File:
            return None
        return Listed(found.size, found.mtime_ns or 0)

    def read(self, name: str) -> bytes | None:
        """A small file's content; None where there is none."""

        def read() -> bytes | None:
            try:
                with self._fs.open_input_stream(self._path(name)) as file:
                    return bytes(file.read())
            except FileNotFoundError:
                return None

        return self._waiting.call(read)

    def open(self, name: str) -> Any:
        """A file there, opened for reading from any place in it; whoever asks closes it."""
        return self._waiting.call(lambda: self._fs.open_input_file(self._path(name)))

    def write(self, name: str, content: bytes) -> None:
        """Replace a small file, whole or not at all."""
        import pyarrow as pa

        self._waiting.call(lambda: self._put(name, pa.py_buffer(content)))

    def upload(self, folder: Path, names: Iterable[str]) -> None:
        """Copy these files of `folder` here, several at once."""
        self._each(names, lambda name: self._send(folder / name, name))

    def download(self, files: dict[str, Listed], folder: Path) -> None:
        """Copy these files into `folder`, several at once, each whole or not at all."""
        self._each(files, lambda name: self._take(name, files[name].size, folder / name))

    def remove(self, names: Iterable[str]) -> None:
        """Remove these files; one that is not there is as good as removed."""
        self._each(names, self._delete)

    def remove_folder(self, name: str) -> None:
        """Remove a folder and everything in it, if it is there."""

        def remove() -> None:
            try:
                self._fs.delete_dir(self._path(name))
            except FileNotFoundError:
                return

        self._waiting.call(remove)

    def _each(self, names: Iterable[str], work: Callable[[str], None]) -> None:
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            for done in [pool.submit(self._waiting.call, partial(work, name)) for name in names]:
                done.result()
        except BaseException:
            self._waiting.over.set()  # the others do not wait on, with the storage away
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _send(self, path: Path, name: str) -> None:
        import pyarrow as pa

        try:
            # In one piece: an interruption between two would leave half a file that looks whole.
            content = pa.memory_map(str(path)).read_buffer() if path.stat().st_size else pa.py_buffer(b"")
        except FileNotFoundError:
            return  # a file of the moment, gone since it was listed
        self._put(name, content)

    def _put(self, name: str, content: Any) -> None:
        path = self._path(name)
        if self._fs.type_name in _OBJECTS:
            with self._fs.open_output_stream(path) as file:
                file.write(content)
            return
        parent, _, last = path.rpartition("/")
        self._fs.create_dir(parent, recursive=True)
        half = f"{parent}/.{last}.partial"
        with self._fs.open_output_stream(half) as file:
            file.write(content)
        self._fs.move(half, path)

    def _take(self, name: str, size: int, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(f".{path.name}.partial")
        with self._fs.open_input_stream(self._path(name)) as source, half.open("wb") as target:
            shutil.copyfileobj(source, target, 8 << 20)
        if (found := half.stat().st_size) != size:
            raise ConnectionError(f"{name}: {found} bytes came of {size}")
        os.replace(half, path)

    def _delete(self, name: str) -> None:
        try:
            self._fs.delete_file(self._path(name))
        except FileNotFoundError:
            return

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}" if self._base and name else self._base or name

    def _require_bucket(self) -> None:
        """A bucket that is not there lists as an empty one."""
        from pyarrow.fs import FileType

        bucket = self._base.partition("/")[0]
        if self._fs.type_name not in _OBJECTS or not bucket:
            return
        if self._waiting.call(lambda: self._fs.get_file_info(bucket)).type == FileType.NotFound:
            raise StorageError(f"{self.url}: there is no bucket '{bucket}'; create it, or correct the URL")


class _Waiting:
    """Calls the storage, and again with growing pauses while it is away; says when it goes and comes back."""

    def __init__(self, url: str, patience: float) -> None:
        self._url = url
        self._patience = patience
        self._since: float | None = None
        self._lock = threading.Lock()
        self.over = threading.Event()
        """Set when nobody waits for the answer any more."""

    def call(self, action: Callable[[], T]) -> T:
        pause = 0.5
        while True:
            try:
                found = action()
            except (OSError, ValueError, NotImplementedError) as error:
                if not _may_pass(error) or self.over.is_set():
                    raise StorageError(f"{shown(self._url)}: {_explain(error)}") from error
                self._await(error)
                self.over.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            else:
                self._back()
                return found

    def _await(self, error: Exception) -> None:
        now = time.monotonic()
        with self._lock:
            first, self._since = self._since is None, now if self._since is None else self._since
            gone = now - self._since
        if gone >= self._patience:
            raise StorageError(
                f"{self._url}: the storage has been away for {gone:.0f} s ({first_line(error)}); the same "
                f"command goes on once it is back (sweeps: with --resume), {PATIENCE}=SECONDS waits longer"
            ) from error
        if first:
            _log.warning(
                "%s: the storage is away (%s); trying again for up to %.0f s",
                self._url,
                first_line(error),
                self._patience,
            )

    def _back(self) -> None:
        if self._since is None:
            return
        with self._lock:
            since, self._since = self._since, None
        if since is not None:
            _log.warning("%s: the storage is back after %.0f s", self._url, time.monotonic() - since)


def hidden(name: str) -> bool:
    """Whether a file is this machine's own business: a lock, or one that is being written."""
    return name.endswith(".lock") or any(part.startswith(".") for part in PurePosixPath(name).parts)


def _patience() -> float:
    given = os.environ.get(PATIENCE, "")
    try:
        return float(given) if given else PATIENCE_SECONDS
    except ValueError as error:
        raise StorageError(f"{PATIENCE}={given}: expected seconds, such as 600") from error


@lru_cache(maxsize=32)
def _open(url: str, endpoint: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it; kept, for a new one would have to say hello again.

    pyarrow reads AWS_ENDPOINT_URL itself; `endpoint` tells one server's file system from another's here.
    """
    from pyarrow import ArrowInvalid
    from pyarrow.fs import FileSystem

    try:
        fs, path = FileSystem.from_uri(url)
    except (ArrowInvalid, OSError, NotImplementedError) as error:
        raise StorageError(
            f"{url}: no place that can be opened ({first_line(error)}); expected a path, or a URL such as "
            "s3://bucket/folder, gs://bucket/folder or file:///folder"
        ) from error
    return fs, path.rstrip("/")


def _may_pass(error: Exception) -> bool:
    if not isinstance(error, OSError):
        return False
    if error.errno is not None:
        return error.errno in _AWAY
    return isinstance(error, ConnectionError) or not _REFUSED.search(str(error))


def _explain(error: Exception) -> str:
    """What a storage refused, with the cure."""
    reason = first_line(error)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return f"{reason}; make room, then run the same command again"
    if "NO_SUCH_BUCKET" in reason:
        return f"there is no such bucket ({reason}); create it, or correct the URL"
    if _REFUSED.search(reason) or isinstance(error, PermissionError):
        return (
            f"not permitted ({reason}); give credentials that may list, read, write and delete there by "
            f"{_CREDENTIALS}, and the bucket's region by AWS_DEFAULT_REGION"
        )
    return f"{reason}; correct the URL, or give another place"


LEASE = ".lease.json"
RENEW_SECONDS = 15.0
WAIT_SECONDS = 60.0
"""A lease that does not change for so long is a dead process's. Clocks are not compared: machines differ."""
_LOOK_SECONDS = 1.0


@contextmanager
def leased(url: str, lock: Path) -> Iterator[None]:
    """The place for this process alone.

    A start that was killed is waited for until its lease has not changed for WAIT_SECONDS; where it was on
    this machine not at all, for the system has freed its lock.

    Args:
        lock: a file of this machine's for the place.
    Raises:
        StorageError: another process works there.
    """
    remote, own = Remote(url), uuid.uuid4().hex
    lock.parent.mkdir(parents=True, exist_ok=True)
    holder = lock.with_suffix(".holder")
    with locked(lock, error=_taken(url)):
        _await(remote, before=holder.read_text(encoding="utf-8") if holder.exists() else "")
        holder.write_text(own, encoding="utf-8")
        _write(remote, own, beat=0)
        over = threading.Event()
        renewal = threading.Thread(target=_renew, args=(url, own, over), name="lease", daemon=True)
        renewal.start()
        try:
            yield
        finally:
            over.set()
            renewal.join()
            with suppress(StorageError):  # a storage that is away frees it by itself
                remote = Remote(url, patience=0)
                if _holder(remote.read(LEASE)) == own:
                    remote.remove([LEASE])


def _await(remote: Remote, *, before: str) -> None:
    """Return once nobody holds the place; `before` held it from this machine and is dead."""
    found = remote.read(LEASE)
    if found is None or (before and _holder(found) == before):
        return
    _log.warning("%s: a start that may have been killed holds it; waiting %.0f s", remote.url, WAIT_SECONDS)
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end:
        time.sleep(min(_LOOK_SECONDS, WAIT_SECONDS / 4))
        now = remote.read(LEASE)
        if now is None:
            return
        if now != found:
            raise _taken(remote.url)


def _renew(url: str, own: str, over: threading.Event) -> None:
    beat = 0
    while not over.wait(RENEW_SECONDS):
        beat += 1
        with suppress(StorageError):  # away: the next beat tries again
            remote = Remote(url, patience=0)
            if _holder(remote.read(LEASE)) not in (own, ""):
                return  # another start thought this one dead; what is sent is checked for that
            _write(remote, own, beat=beat)


def _write(remote: Remote, own: str, *, beat: int) -> None:
    remote.write(LEASE, json.dumps({"holder": own, "beat": beat}).encode())


def _holder(content: bytes | None) -> str:
    try:
        return str(json.loads(content or b"{}").get("holder", ""))
    except (ValueError, AttributeError):
        return ""


def _taken(url: str) -> StorageError:
    return StorageError(f"{url}: another process works in it; wait for it, or give another --out")
