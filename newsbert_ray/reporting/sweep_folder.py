"""The folder of a sweep -> Sweep, also while it runs and after an interruption. Reads sweep.json and the
trials' own files; knows no figure, no Optuna and no Ray."""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from newsbert_ray.record import (
    METRICS,
    RECORD,
    TEACHERS,
    RecordError,
    RunRecord,
    read_entries,
    read_record,
    read_stop,
)
from newsbert_ray.reporting.compared import flat_values
from newsbert_ray.reporting.sweeps import Axis, Goal, Point, State, Sweep, Trial
from newsbert_ray.reporting.tables import number

SWEEP = "sweep.json"


def is_sweep(folder: str | Path) -> bool:
    """Whether `folder` is a sweep's."""
    return (Path(folder) / SWEEP).is_file()


def read_sweep(folder: str | Path) -> Sweep:
    """The sweep in `folder`, finished or not.

    Raises:
        RecordError: sweep.json, or the record of a trial that has not failed, is damaged.
    """
    folder = Path(folder)
    path = folder / SWEEP
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        space = plan["space"]
        axes = tuple(_axis(values) for values in space["axes"])
        goals = tuple(Goal(goal["metric"], goal["mode"]) for goal in space["goals"])
        seeds = tuple(int(seed) for seed in space["seeds"])
        failures = {**_notes(folder / "failures"), **{n: str(r) for n, r in plan.get("failures", {}).items()}}
        if "failures" in plan:
            failures = {name: reason for name, reason in failures.items() if name in plan["failures"]}
        int(plan["trials"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(
            f"{path}: damaged, or written by another version ({type(error).__name__}: {error}); "
            f"its finished trials alone: newsbert-ray report {folder / 'trials'}"
        ) from error
    trials = [
        trial
        for found in sorted((folder / "trials").glob("*"))
        if found.is_dir() and (trial := _trial(found, axes, goals, failures)) is not None
    ]
    points = _points(trials, seeds)
    held, firsts = _held(folder / ".lock"), _firsts(folder / TEACHERS)
    return Sweep(folder, plan, axes, goals, seeds, points, failures, held, firsts)


def _axis(values: Mapping[str, Any]) -> Axis:
    given = values.get("values")
    names = ("low", "high", "integer", "log", "step", "when")
    rest = {name: values[name] for name in names if values.get(name) is not None}
    return Axis(values["name"], None if given is None else tuple(given), **rest)


def _firsts(folder: Path) -> tuple[RunRecord, ...]:
    """The finished runs that trials share; a damaged record is its own trial's business."""
    found = []
    for path in sorted(folder.glob(f"*/{RECORD}")):
        with suppress(RecordError):
            found.append(read_record(path.parent))
    return tuple(found)


def _notes(folder: Path) -> dict[str, str]:
    """The last line of each failure's frames, by trial."""
    found = {}
    for path in sorted(folder.glob("*.txt")):
        lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line]
        reason = re.sub(r"^[\w.]+\.(\w+:)", r"\1", lines[-1]) if lines else "unknown reason"
        found[path.name.removesuffix(".txt")] = reason
    return found


def _trial(
    folder: Path, axes: Sequence[Axis], goals: Sequence[Goal], failures: Mapping[str, str]
) -> Trial | None:
    """What a trial's folder tells; None for one in which nothing has begun."""
    failed = folder.name in failures
    record = read_record(folder) if (folder / RECORD).exists() and not failed else None
    settings = record.settings if record else _settings(folder)
    if settings is None:
        return None
    flat = flat_values(settings)
    point: dict[str, Any] = {}
    for axis in axes:
        if axis.active(point):
            point[axis.name] = flat.get(axis.name)
    entries = record.curve if record else read_entries(folder / METRICS)
    evaluations = tuple(entry for entry in entries if "validation" in entry)
    return Trial(
        name=folder.name,
        point=point,
        seed=int(settings.get("seed", 0)),
        settings=settings,
        epochs=int(settings.get("epochs", 0)),
        entries=evaluations,
        epoch=max((float(entry.get("epoch", 0.0)) for entry in evaluations), default=0.0),
        reason=failures.get(folder.name, ""),
        record=record,
        **({"state": "failed"} if failed else _finish(record, goals) if record else _stop(folder)),
    )


def _finish(record: RunRecord, goals: Sequence[Goal]) -> dict[str, Any]:
    values = [number(record, goal.metric) for goal in goals]
    if None in values:
        return {"state": "failed"}
    return {"state": "finished", "values": tuple(values), "seconds": number(record, "seconds")}


def _stop(folder: Path) -> dict[str, Any]:
    stop = read_stop(folder)
    if stop is None:
        return {"state": "under way"}
    return {"state": "stopped", "values": (stop.value,), "seconds": stop.seconds}


def _settings(folder: Path) -> Mapping[str, Any] | None:
    try:
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return settings if isinstance(settings, dict) else None


def _points(trials: Sequence[Trial], seeds: Sequence[int]) -> tuple[Point, ...]:
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.name.removesuffix(f",seed={trial.seed}"), []).append(trial)
    points = []
    for label, group in groups.items():
        states = {trial.state for trial in group}
        state: State = "under way"
        if "failed" in states:
            state = "failed"
        elif "stopped" in states:
            state = "stopped"
        elif states == {"finished"} and {trial.seed for trial in group} >= set(seeds):
            state = "finished"
        points.append(Point(label, group[0].point, tuple(group), state))
    return tuple(points)


def _held(lock: Path) -> bool:
    """Whether a process holds the sweep's folder; the system frees it however that ends."""
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
