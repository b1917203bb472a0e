"""Atomic writes, the lock between processes, and the wording of errors, durations and sizes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from newsbert_ray.files import (
    first_line,
    format_duration,
    format_size,
    is_locked,
    locked,
    replace_file,
    replace_folder,
    write_json,
    write_text,
)


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk while a record is replaced must not cost the record that was there."""
    path = tmp_path / "record.json"
    write_text(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_a_failed_folder_keeps_the_old_one(tmp_path: Path) -> None:
    """A checkpoint that cannot be written must not cost the one before."""
    path = tmp_path / "step"
    with replace_folder(path) as partial:
        (partial / "state").write_text("old")
    with pytest.raises(OSError, match="full"), replace_folder(path) as partial:  # noqa: PT012
        (partial / "state").write_text("new")
        raise OSError("full")
    assert (path / "state").read_text() == "old"
    assert [folder.name for folder in tmp_path.iterdir()] == ["step"]


def test_partial_folders_of_killed_processes_are_removed(tmp_path: Path) -> None:
    """Each kill would leave a checkpoint of gigabytes on the disk; files of other names must stay."""
    for name in (".step.0123abcd", ".step.backup", ".step-2.0123abcd"):
        (tmp_path / name).mkdir()
    with replace_folder(tmp_path / "step"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"step", ".step.backup", ".step-2.0123abcd"}


def test_a_new_folder_holds_only_what_is_written(tmp_path: Path) -> None:
    """A student's file list would name a lock that is gone when it is read."""
    with replace_folder(tmp_path / "student") as partial:
        assert list(partial.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_block_may_leave_the_old_folder(tmp_path: Path) -> None:
    """prepare finds its result there already, and must not replace it by nothing."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    with replace_folder(tmp_path / "out") as partial:
        partial.rmdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "kept"]


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    """Colleagues who share a disk could not read results, or strangers could."""
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", {})
        with replace_file(tmp_path / "b") as partial:
            partial.chmod(0o600)  # as safetensors leaves its files
        with replace_folder(tmp_path / "c") as folder:
            (folder / "weights").touch(0o600)
    finally:
        os.umask(before)
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in ("a.json", "b", "c", "c/weights")}
    assert modes == {"a.json": 0o640, "b": 0o640, "c": 0o750, "c/weights": 0o640}


_HOLD = """
import sys, time
from pathlib import Path
from newsbert_ray.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_holds_between_processes_and_ends_with_its_own(tmp_path: Path) -> None:
    """Two runs would write into one folder; or a killed one would block it for ever."""
    path = tmp_path / ".lock"
    assert not is_locked(path)
    assert not path.exists()
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert is_locked(path)
        with pytest.raises(ValueError, match="in use"), locked(path, error=ValueError("in use")):
            pass
        with pytest.raises(TimeoutError), locked(path):
            pass
        holder.kill()
    assert not is_locked(path)
    with locked(path):
        assert is_locked(path)


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    """The second of two trials that need the same teacher must wait until it is trained."""
    path, order, inside = tmp_path / ".lock", [], threading.Event()

    def first() -> None:
        with locked(path):
            inside.set()
            time.sleep(0.2)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    with locked(path, wait_seconds=float("inf")):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


@pytest.mark.parametrize(
    ("error", "line"), [(ValueError("one\ntwo"), "one"), (KeyError(), "KeyError"), (OSError("  a "), "a")]
)
def test_first_line(error: Exception, line: str) -> None:
    """A library's page of text hides the reason."""
    assert first_line(error) == line


@pytest.mark.parametrize(
    ("seconds", "text"), [(42.4, "42 s"), (738.0, "12.3 min"), (5040.0, "84.0 min"), (7200.0, "2.0 h")]
)
def test_format_duration(seconds: float, text: str) -> None:
    """Nobody reads 5,040 s as an hour and a half."""
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_940_000, "1.9 MB"), (12e9, "12.0 GB")],
)
def test_format_size(count: float, text: str) -> None:
    """A size in the wrong unit makes a full disk look empty."""
    assert format_size(count) == text
