"""events.jsonl in a run's or a sweep's folder: what happened and when, one JSON line each. No secrets."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

EVENTS = "events.jsonl"
Event = Literal[
    "start",
    "resume",
    "checkpoint",
    "evaluation",
    "trial_start",
    "trial_end",
    "trial_broke_off",
    "trial_retry",
    "worker_restart",
    "preemption",
    "node_came",
    "node_gone",
    "interrupted",
    "end",
    "error",
]
"""Everything that is logged; `start`, `resume`, `end` and `error` are the run's or the sweep's own."""
MASK = "***"

_SECRET_WORDS = {
    "token",
    "key",
    "apikey",
    "password",
    "passwd",
    "passphrase",
    "pwd",
    "secret",
    "secrets",
    "credential",
    "credentials",
    "authorization",
}
_FOLDER = "PWD"
"""The shell's name for the folder it is in, which is no password."""
_PLACES = ("path", "file", "mode")
"""Last words of a name that holds where a secret is, not the secret."""
_SECRET_TEXTS = (
    # Up to the last @, because a password that was not percent-encoded may hold one.
    (re.compile(r"(://[^:@/?#\s]*):\S*@"), rf"\1:{MASK}@"),
    (re.compile(r"://[^:@/?#\s]+@"), f"://{MASK}@"),
    (re.compile(r"(?i)\b(bearer|basic) [\w.~+/=-]{8,}"), rf"\1 {MASK}"),
    (
        re.compile(
            r"(?i)\b((?:[\w-]*[_-])?(?:password|passwd|pwd|secret|token|key|signature)(?:_id)?=)[^&\s]+"
        ),
        rf"\1{MASK}",
    ),
)
_LEAST_LETTERS = 8
"""Of a secret in the environment that is looked for in texts: a shorter one would mask common words."""


class EventLog:
    """Appends events to folder/events.jsonl, whole lines, from as many processes as there are.

    A log that cannot be written (a full disk) is left: it must not end the run, nor hide the error that it
    was about to tell.
    """

    def __init__(self, folder: str | Path, *, run: str | None = None) -> None:
        """
        Args:
            folder: of the run or sweep; it must be there when the first event comes.
            run: name in each line; the folder's by default.
        """
        self.path = Path(folder) / EVENTS
        self._run = run or Path(folder).absolute().name

    def __call__(self, event: Event, **fields: Any) -> None:
        """Add a line: `time` (UTC), `event`, `run` and the fields, with secrets masked."""
        assert event in get_args(Event), event
        assert not fields.keys() & {"time", "run"}, fields
        time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"time": time, "event": event, "run": self._run, **without_secrets(fields)}
        try:
            _append(self.path, json.dumps(line, default=str))
        except OSError:
            return

    def report(self, entry: Mapping[str, Any]) -> None:
        """Log the loop's evaluations and checkpoints; a report like any other (an evaluation has one too)."""
        if entry["kind"] == "evaluation":
            self("evaluation", step=entry["step"], epoch=entry["epoch"], validation=entry["validation"])
        elif entry["kind"] == "checkpoint":
            self("preemption" if entry["leaving"] else "checkpoint", step=entry["step"])


def read_events(folder: str | Path) -> list[dict[str, Any]]:
    """The events in a folder, in the order in which they were written; damaged lines are left out."""
    return list(_whole_lines(Path(folder) / EVENTS))


def without_secrets(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same with every secret masked: by the name of a field, or by what a text looks like."""
    return {
        str(name): MASK if _holds_secret(str(name), value) else _masked(value)
        for name, value in fields.items()
    }


def mask_text(text: str) -> str:
    """A text without passwords in URLs, bearer tokens, and the secrets of this process's environment."""
    for pattern, masked in _SECRET_TEXTS:
        text = pattern.sub(masked, text)
    for name, value in os.environ.items():
        if len(value) >= _LEAST_LETTERS and value in text and name != _FOLDER and _names_secret(name):
            text = text.replace(value, MASK)
    return text


def _masked(value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_secrets(value)
    if isinstance(value, str):
        return mask_text(value)
    if isinstance(value, Path | BaseException):
        return mask_text(str(value))
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_masked(item) for item in value]
    return value


def _holds_secret(name: str, value: Any) -> bool:
    return value is not None and not isinstance(value, bool) and _names_secret(name)


def _names_secret(name: str) -> bool:
    """Whether a setting or variable of that name holds a secret: `api_key`, `hfToken`, not `max_tokens`."""
    words = re.split(r"[_.-]+", re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower())
    return bool(_SECRET_WORDS & set(words)) and words[-1] not in _PLACES


def _append(path: Path, line: str) -> None:
    """One write at the file's end; the line before may have been cut short by a kill."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        with suppress(OSError):  # a file system without locks: at worst an empty line
            fcntl.flock(handle, fcntl.LOCK_EX)
        size = os.fstat(handle).st_size
        cut = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
        os.write(handle, (("\n" if cut else "") + line + "\n").encode())
    finally:
        os.close(handle)


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found
