"""A run's record and its other small files: exact, complete, and damage reported with the cure."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from newsbert_ray import record
from newsbert_ray.files import write_json
from newsbert_ray.record import (
    RecordError,
    RunRecord,
    describe_hardware,
    find_records,
    installed_versions,
    read_record,
    write_record,
)
from tests.conftest import change_json

MakeRecord = Callable[..., RunRecord]


def test_a_record_is_read_as_it_was_written(tmp_path: Path, make_record: MakeRecord) -> None:
    """A number rounded or lost on its way through JSON would be reported as measured."""
    record = make_record(accuracy=0.1 + 0.2)
    write_record(tmp_path / "run", record)
    assert read_record(tmp_path / "run") == record


def test_a_changed_record_is_refused(tmp_path: Path, make_record: MakeRecord) -> None:
    """A flipped digit would be reported as measured; a record of an earlier version has no checksum."""
    path = write_record(tmp_path, make_record(accuracy=0.75))
    text = path.read_text()
    path.write_text(text.replace("0.75", "0.74"))
    with pytest.raises(RecordError, match=r"changed since it was written.*remove `check`"):
        read_record(tmp_path)
    change_json(path)
    assert read_record(tmp_path).metrics["test"]["student"]["accuracy"] == 0.74


def test_a_missing_record_is_an_error_that_says_so(tmp_path: Path) -> None:
    """A run that has not finished must not look like a broken disk."""
    with pytest.raises(
        RecordError, match=r"run/record\.json: no record there; is it the folder of a finished"
    ):
        read_record(tmp_path / "run")
    (tmp_path / "settings.json").touch()
    with pytest.raises(RecordError, match="the run has not finished; the command that started it continues"):
        read_record(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"seed": 1}', '{"surprise": 1}'])
def test_a_damaged_record_is_an_error_with_the_cure(tmp_path: Path, content: str) -> None:
    """Half a record must not put a wrong row into a table."""
    (tmp_path / "record.json").write_text(content)
    with pytest.raises(RecordError, match=r"record\.json: not a complete run record.*run the training again"):
        read_record(tmp_path)


def test_a_record_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    """A flipped byte must end in a message, not in a UnicodeDecodeError."""
    (tmp_path / "record.json").write_bytes(b'{"seed": "\xff"}')
    with pytest.raises(RecordError, match="not a complete run record"):
        read_record(tmp_path)


def test_unknown_key_is_refused(tmp_path: Path, make_record: MakeRecord) -> None:
    """A record of another version must not be read with parts of it dropped silently."""
    values = json.loads(make_record().model_dump_json()) | {"surprise": 1}
    write_json(tmp_path / "record.json", values)
    with pytest.raises(RecordError, match="surprise"):
        read_record(tmp_path)


def test_records_are_found_at_and_below_a_folder_in_order(tmp_path: Path, make_record: MakeRecord) -> None:
    """A sweep's report must see every run, always in the same order."""
    for name in ("sweep/b", "sweep/a", "sweep/deep/c", "."):
        write_record(tmp_path / name, make_record())
    names = [str(folder.relative_to(tmp_path)) for folder in find_records(tmp_path)]
    assert names == [".", "sweep/a", "sweep/b", "sweep/deep/c"]


def test_versions_of_packages_that_can_change_a_result() -> None:
    """A result without the versions of its packages cannot be reproduced."""
    assert {"python", "newsbert_ray", "torch", "transformers", "ray"} <= installed_versions().keys()


def test_hardware_has_no_host_name() -> None:
    """Records are published; the machine's name and user must not be."""
    hardware = describe_hardware()
    assert hardware["cores"] >= 1
    assert os.uname().nodename not in json.dumps(hardware).split('"')


@pytest.mark.parametrize(("flags", "expected"), [
    ("flags : fpu avx512f avx512_bf16 amx_tile", True),
    ("Features : fp asimd bf16 i8mm", True),
    ("flags : fpu avx2 avx512f", False),
    ("", False),
])  # fmt: skip
def test_bf16_of_processors(monkeypatch: pytest.MonkeyPatch, flags: str, expected: bool) -> None:
    """x86 and ARM have names of their own for it; a system without the file has not."""
    monkeypatch.setattr(record, "_cpuinfo", lambda: flags)
    assert record.cpu_has_bf16() is expected
