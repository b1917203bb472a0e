"""One process at a time in a folder of a bucket, where no lock reaches: a lease that its holder renews."""

from __future__ import annotations

import fcntl
import json
import logging
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from newsbert_ray.remote import Remote, StorageError

LEASE = ".lease.json"
RENEW_SECONDS = 15.0
WAIT_SECONDS = 60.0
"""A lease that does not change for so long is a dead process's. Clocks are not compared: machines differ."""
_LOOK_SECONDS = 1.0

_log = logging.getLogger(__name__)


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
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise _taken(url) from error
        file.seek(0)
        _await(remote, before=file.read())
        file.truncate(0)
        file.write(own)
        file.flush()
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
