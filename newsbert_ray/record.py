"""RunRecord: what a finished run leaves behind as record.json. Reads and writes JSON; knows no tensor and no
Ray."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from newsbert_ray.files import write_text

RECORD = "record.json"
TEACHER, BEFORE, TEACHERS = "teacher", "before", "teachers"
"""Where a run has the teacher that it only reads, and the run whose student it starts from; and where a sweep
has those of its trials."""
_FIRST = {TEACHER, BEFORE, TEACHERS}
METRICS = "metrics.jsonl"
MAP = "map.json"
"""Where a topics run's titles lie on a plane."""
STOPPED = "stopped.json"
_PACKAGES = ("newsbert_ray", "torch", "transformers", "ray", "optuna", "pyarrow", "numpy")


class RecordError(ValueError):
    """A record that cannot be read; its text names the file and the cure."""


class RunRecord(BaseModel):
    """One finished run.

    `metrics` is nested: `metrics["test"]["student"]["accuracy"]`. `curve` holds one entry an evaluation, in
    order: step, epoch, validation (as in metrics) and train (loss name to mean). `layer_map[i]` lists the
    teacher layers (from 1) of the block behind student layer i + 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: dict[str, Any]
    seed: int
    versions: dict[str, str]
    hardware: dict[str, Any]
    seconds: dict[str, float]
    layer_map: list[list[int]]
    metrics: dict[str, Any]
    curve: list[dict[str, Any]]
    data: dict[str, Any]
    steps: int
    titles_per_second: float


class EarlyStop(BaseModel):
    """A sweep's trial that was ended before its last epoch, as stopped.json in its folder.

    `value` is what the sweep judges by, at `epoch`; its curve are the evaluations in metrics.jsonl, its
    settings stand in settings.json.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epoch: float
    value: float
    seconds: float
    reason: str


def write_stop(folder: str | Path, stop: EarlyStop) -> None:
    """Write `stop` as folder/stopped.json, whole or not at all."""
    write_text(Path(folder) / STOPPED, stop.model_dump_json(indent=1) + "\n")


def read_stop(folder: str | Path) -> EarlyStop | None:
    """The trial's early end; None where there is none, or only a damaged one."""
    try:
        return EarlyStop.model_validate_json((Path(folder) / STOPPED).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError, UnicodeDecodeError):
        return None


def read_entries(path: Path) -> list[dict[str, Any]]:
    """Whole entries of a metrics.jsonl; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def write_record(folder: str | Path, record: RunRecord) -> Path:
    """Write `record` as folder/record.json, whole or not at all."""
    path = Path(folder) / RECORD
    write_text(path, record.model_dump_json(indent=1) + "\n")
    return path


def read_record(folder: str | Path) -> RunRecord:
    """The record of the run in `folder`.

    Raises:
        RecordError: no record there (the run has not finished), or one that is damaged.
    """
    path = Path(folder) / RECORD
    try:
        return RunRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecordError(f"{path}: no record there; is it the folder of a finished run?") from error
    except (ValidationError, UnicodeDecodeError) as error:
        fault = first_fault(error)
        raise RecordError(f"{path}: not a whole run record ({fault}); run the training again") from error


def first_fault(error: ValidationError | UnicodeDecodeError) -> str:
    """What is wrong with a damaged file, in one line; pydantic's own text has a page."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    faults = error.errors()
    name = ".".join(str(part) for part in faults[0]["loc"])
    more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
    return f"{name}: {faults[0]['msg']}{more}" if name else f"{faults[0]['msg']}{more}"


def find_records(folder: str | Path) -> list[Path]:
    """Folders at or below `folder` that hold a record.json, sorted; not those of runs that others
    there had to have first."""
    found = (path.parent for path in Path(folder).rglob(RECORD))
    return sorted(path for path in found if not set(path.relative_to(folder).parts) & _FIRST)


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that can alter a number."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def describe_hardware() -> dict[str, Any]:
    """Kind of machine: processor and cores; a run adds its device. No host name, no address."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text().splitlines()
            if "model name" in line
        ]
        model = names[0] if names else model
    return {"processor": model, "cores": os.cpu_count() or 1, "system": platform.system()}
