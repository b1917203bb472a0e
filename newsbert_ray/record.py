"""record.json, which a finished run writes, and the other small files of a run. Knows no tensor, no Ray."""

from __future__ import annotations

import json
import os
import platform
import re
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from newsbert_ray.files import checksum_of, write_json, write_text

RECORD = "record.json"
TEACHER, BEFORE, TEACHERS = "teacher", "before", "teachers"
"""Folders of prerequisite runs: a run's frozen teacher, the run whose student it starts from, and all
prerequisites of a sweep's trials."""
_PREREQUISITES = {TEACHER, BEFORE, TEACHERS}
METRICS = "metrics.jsonl"
MAP = "map.json"
"""A topics run's titles as points of a plane."""
STOPPED = "stopped.json"
_PACKAGES = ("newsbert_ray", "torch", "transformers", "ray", "optuna", "pyarrow", "numpy")


class RecordError(ValueError):
    """A record that cannot be read; the text names the file and the cure."""


class Sealed(BaseModel):
    """A JSON file that carries its own checksum, `check`, which is compared when it is read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _compare(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "check" not in value:
            return value  # of an earlier version
        body = {name: one for name, one in value.items() if name != "check"}
        if checksum_of(body) != value["check"]:
            raise ValueError("changed since it was written; if that was on purpose, remove `check`")
        return body

    def sealed(self) -> dict[str, Any]:
        """The content of the file."""
        body = json.loads(self.model_dump_json())
        return {**body, "check": checksum_of(body)}


class RunRecord(Sealed):
    """One finished run.

    Attributes:
        seconds: by activity, and `total`.
        layer_map: for student layer i + 1 the teacher layers (from 1) of its block.
        metrics: nested: `metrics["test"]["student"]["accuracy"]`.
        curve: one entry for each evaluation, in order: step, epoch, validation (as in metrics) and train
            (mean of each loss).
    """

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
    """A sweep's trial that was stopped before its last epoch: stopped.json in its folder. `value`: the
    sweep's metric at `epoch`; metrics.jsonl has the earlier ones, settings.json the settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epoch: float
    value: float
    seconds: float
    reason: str


def write_stop(folder: str | Path, stop: EarlyStop) -> None:
    """Write `stop` as folder/stopped.json."""
    write_text(Path(folder) / STOPPED, stop.model_dump_json(indent=1) + "\n")


def read_stop(folder: str | Path) -> EarlyStop | None:
    """The trial's early stop; None where there is none, or the file is damaged."""
    try:
        return EarlyStop.model_validate_json((Path(folder) / STOPPED).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError, UnicodeDecodeError):
        return None


def read_entries(path: Path) -> list[Any]:
    """The values of a JSON Lines file such as metrics.jsonl; none where it is missing. Damaged lines are
    skipped: a kill may cut the last one short."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def write_record(folder: str | Path, record: RunRecord) -> Path:
    """Write `record` as folder/record.json."""
    path = Path(folder) / RECORD
    write_json(path, record.sealed())
    return path


def read_record(folder: str | Path) -> RunRecord:
    """The record of the run in `folder`; RecordError if it is missing (not finished) or damaged."""
    path = Path(folder) / RECORD
    try:
        return RunRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        fault = "no record there; is it the folder of a finished run?"
        if (path.parent / "settings.json").is_file():
            fault = "the run has not finished; the command that started it continues it"
        raise RecordError(f"{path}: {fault}") from error
    except (ValidationError, UnicodeDecodeError) as error:
        fault = first_fault(error)
        raise RecordError(f"{path}: not a complete run record ({fault}); run the training again") from error


def first_fault(error: ValidationError | UnicodeDecodeError) -> str:
    """What is wrong with a damaged file, in one line; pydantic's own message fills a page."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    faults = error.errors()
    name = ".".join(str(part) for part in faults[0]["loc"])
    text = faults[0]["msg"].removeprefix("Value error, ")
    text += f", and {len(faults) - 1} more" if len(faults) > 1 else ""
    return f"{name}: {text}" if name else text


def find_records(folder: str | Path) -> list[Path]:
    """Folders at or below `folder` that hold a record.json, sorted; without those of prerequisite runs."""
    runs = (path.parent for path in Path(folder).rglob(RECORD))
    return sorted(run for run in runs if not set(run.relative_to(folder).parts) & _PREREQUISITES)


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    versions = {"python": platform.python_version(), **dict.fromkeys(_PACKAGES, "not installed")}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def describe_hardware() -> dict[str, Any]:
    """Processor, cores and operating system; a run adds its device. No host name, no address."""
    named = re.search(r"model name\s*: *(.*)", _cpuinfo())
    model = named[1].strip() if named else platform.processor() or platform.machine()
    return {"processor": model, "cores": os.cpu_count() or 1, "system": platform.system()}


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 numbers itself, as far as Linux says."""
    return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", _cpuinfo()) is not None


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""
