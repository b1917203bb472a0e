"""Records of many runs in one small file, without the places of the machine that made them: what a repository
keeps so that its numbers can be made again by `newsbert-ray report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from newsbert_ray.config import merge
from newsbert_ray.record import RecordError, RunRecord, first_fault, write_text

ENDING = ".jsonl"
_PLACES = ("data", "teacher", "out", "student.encoder", "before.data", "distill.teacher_run")


def is_kept(path: str | Path) -> bool:
    """Whether a place is such a file."""
    return str(path).endswith(ENDING)


def write_kept(path: Path, records: Sequence[RunRecord]) -> None:
    """Write the records, a line each, places cut to their last names.

    Raises:
        RecordError: the file's name is not that of such a file.
    """
    if not is_kept(path):
        raise RecordError(f"--keep {path}: give a file that ends in {ENDING}")
    lines = [record.model_copy(update={"settings": _unplaced(record.settings)}) for record in records]
    write_text(path, "".join(f"{record.model_dump_json()}\n" for record in lines))


def read_kept(path: Path) -> list[RunRecord]:
    """What `write_kept` wrote.

    Raises:
        RecordError: missing or damaged; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: cannot be read ({error})") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(RunRecord.model_validate_json(line))
        except ValidationError as error:
            raise RecordError(f"{path}, line {number}: no run record ({first_fault(error)})") from error
    return found


def _unplaced(settings: dict[str, Any]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for place in _PLACES:
        value: Any = settings
        for part in place.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, str):
            names[place] = PurePosixPath(value).name or value
    return merge(settings, names)
