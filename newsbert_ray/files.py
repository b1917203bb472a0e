"""Files: atomic writes, the lock between processes, and one wording for errors, durations and sizes.

Knows nothing of runs, sweeps or buckets.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

_POLL_SECONDS = 0.05


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) in one step: a reader sees the old file or the whole new one."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON, in one step."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step; its folder is created where it is missing."""
    with replace_file(path) as partial:
        partial.write_bytes(content)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """An empty hidden file beside `path` to write, which becomes `path` at the end of the block. If the block
    raises, it is removed, and `path` stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    partial.touch(exist_ok=False)
    mode = partial.stat().st_mode
    try:
        yield partial
        partial.chmod(mode)  # safetensors writes mode 0600, whatever the umask
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """An empty hidden folder beside `path` to fill, which becomes `path` at the end of the block. What was
    there before is removed only then; if the block raises or deletes its folder, it stays. Partial folders of
    processes that were killed (nobody holds their lock) are removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{escape(path.name)}.{'[0-9a-f]' * 8}*"):
        if leftover.is_dir():
            with suppress(OSError), _locked_folder(leftover):
                shutil.rmtree(leftover, ignore_errors=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with _locked_folder(partial):
        partial.mkdir()
        try:
            yield partial
            if partial.exists():
                for file in partial.rglob("*"):
                    if file.is_file():
                        file.chmod(partial.stat().st_mode & 0o666)
                old = partial.with_name(f"{partial.name}-old")
                if path.exists():
                    os.replace(path, old)
                os.replace(partial, path)
                shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    """Hold a lock file beside `folder`, which is removed at the end."""
    lock = folder.with_name(f"{folder.name}.lock")
    with locked(lock):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum_of(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys and its layout in a file."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def files_in(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in a folder, by name."""
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.is_file()}


def require_intact(folder: Path, hashes: Mapping[str, str], error: Callable[[str], Exception]) -> None:
    """Raise `error` of the first file in `folder` that is missing or does not have its hash."""
    for name, digest in hashes.items():
        if not (folder / name).is_file() or sha256_of(folder / name) != digest:
            state = "damaged: its content has changed" if (folder / name).is_file() else "missing"
            raise error(f"{folder / name}: {state}")


def sync(path: Path) -> None:
    """Write a file through to the disk, so that it survives a power failure."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def locked(path: Path, *, wait_seconds: float = 0.0, error: Exception | None = None) -> Iterator[None]:
    """Hold the lock file `path`; the system releases it however this process ends. Waits `wait_seconds`
    (infinity: for ever), then raises `error`, by default TimeoutError; OSError if it cannot be written."""
    lock = FileLock(path, timeout=-1 if wait_seconds == float("inf") else wait_seconds, thread_local=False)
    try:
        lock.acquire(poll_interval=_POLL_SECONDS)
    except Timeout as timeout:
        raise error or timeout from timeout
    try:
        yield
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock file `path`; False where it is missing or may not be opened."""
    if not path.exists():
        return False
    try:
        with locked(path):
            return False
    except OSError as error:
        return isinstance(error, TimeoutError)


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type where there is none."""
    return str(error).strip().split("\n", 1)[0] or type(error).__name__


def format_duration(seconds: float) -> str:
    """Examples: `42 s`, `12.3 min`, `1.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def format_size(count: float) -> str:
    """Bytes in decimal units, for example `310 B`, `1.9 MB`, `12.0 GB`."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:,.1f} GB"
