"""What a sweep cost: hours of processors, money at the search space's prices, what early stopping saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from newsbert_ray.reporting.figure_data import Bar, Bars, FigureData, NothingToDraw
from newsbert_ray.reporting.sweep_data import Sweep, Trial
from newsbert_ray.reporting.tables import number

COST_FIGURE = "seconds_by_part"
_UNITS = (("CPU-hours", 1.0), ("CPU-minutes", 60.0), ("CPU-seconds", 3600.0))
PARTS = ("train", "data", "evaluate", "checkpoint", "report")
"""Parts of a training loop's time, in the order shown."""
STOPPED, BEFORE = "stopped early", "runs before"


@dataclass(frozen=True)
class Costs:
    """Sums over trials, and over the runs that came before them. Times are those of the training loops, as
    the runs wrote them down."""

    wall_seconds: float | None
    """From start to end, all starts together; None while nobody has written it."""
    seconds: float
    """Of all trials that know it."""
    first_seconds: float
    """Of the runs that came before trials: teachers, students to start from."""
    firsts: int
    """How many those are."""
    cpu_hours: float
    gpu_hours: float
    money: float | None
    """None where the search space states no price."""
    parts: Mapping[str, float]
    """CPU-hours by part of finished trials, of those that were stopped early, and of the runs before."""
    unknown: int
    """Trials whose time is not known: failed, or under way."""
    seconds_per_epoch: float | None
    """Of all trials that know their time."""
    saved_epochs: float
    """Epochs that early stopping left out, those of seeds that never began included."""

    @property
    def saved_seconds(self) -> float:
        """Time that the left-out epochs would have taken, at the mean of those that ran."""
        return self.saved_epochs * (self.seconds_per_epoch or 0.0)


def costs_of(sweep: Sweep) -> Costs:
    """What the sweep has cost so far."""
    timed = [(trial, trial.seconds) for trial in sweep.trials if trial.seconds is not None]
    first = [(record, number(record, "seconds") or 0.0) for record in sweep.firsts]
    cpu = sum(seconds * _cpus(_known(trial)) for trial, seconds in timed)
    cpu += sum(seconds * _cpus(record.hardware) for record, seconds in first)
    gpu = sum(seconds * _gpus(sweep, trial) for trial, seconds in timed)
    if sweep.trials:
        gpu += sum(seconds for _, seconds in first) * _gpus(sweep, sweep.trials[0])
    cpu, gpu = cpu / 3600, gpu / 3600
    prices = sweep.space.get("prices") or {}
    hour = {name: float(prices.get(name, 0.0)) for name in ("cpu_hour", "gpu_hour")}
    epochs = sum(trial.epoch for trial, _ in timed)
    seconds = sum(seconds for _, seconds in timed)
    wall = sweep.plan.get("seconds")
    return Costs(
        wall_seconds=float(wall) if isinstance(wall, int | float) else None,
        seconds=seconds,
        first_seconds=sum(seconds for _, seconds in first),
        firsts=len(first),
        cpu_hours=cpu,
        gpu_hours=gpu,
        money=cpu * hour["cpu_hour"] + gpu * hour["gpu_hour"] if any(hour.values()) else None,
        parts=_parts(sweep),
        unknown=len(sweep.trials) - len(timed),
        seconds_per_epoch=seconds / epochs if epochs else None,
        saved_epochs=_saved_epochs(sweep),
    )


def _parts(sweep: Sweep) -> dict[str, float]:
    parts: dict[str, float] = {}
    for trial in sweep.trials:
        share = _cpus(_known(trial)) / 3600
        if trial.record:
            for name, seconds in trial.record.seconds.items():
                if name != "total":
                    parts[name] = parts.get(name, 0.0) + seconds * share
        elif trial.seconds is not None:
            parts[STOPPED] = parts.get(STOPPED, 0.0) + trial.seconds * share
    for record in sweep.firsts:
        share = _cpus(record.hardware) / 3600
        parts[BEFORE] = parts.get(BEFORE, 0.0) + (number(record, "seconds") or 0.0) * share
    last = (STOPPED, BEFORE)
    order = [*PARTS, *(name for name in parts if name not in (*PARTS, *last)), *last]
    return {name: parts[name] for name in order if name in parts}


def _saved_epochs(sweep: Sweep) -> float:
    saved = 0.0
    for point in sweep.of("stopped"):
        saved += sum(max(0.0, t.epochs - t.epoch) for t in point.trials if t.state == "stopped")
        saved += (len(sweep.seeds) - len(point.trials)) * point.trials[0].epochs
    return saved


def _cpus(hardware: Mapping[str, Any]) -> float:
    return float(hardware.get("threads") or 1) * float(hardware.get("workers") or 1)


def _gpus(sweep: Sweep, trial: Trial) -> float:
    """GPUs of a trial: what sweep.json says that it was given, else the space's share for each worker.

    Early-ended trials leave no record; they ran where the others did.
    """
    place = sweep.plan.get("place")
    if isinstance(place, dict) and "gpus" in place:
        return float(place["gpus"])
    devices = {str(t.record.hardware.get("device", "cpu")) for t in sweep.trials if t.record}
    if devices <= {"cpu"}:
        return 0.0
    return float(sweep.space.get("gpus") or 1.0) * float(_known(trial).get("workers") or 1)


def _known(trial: Trial) -> Mapping[str, Any]:
    """What a trial ran with: its record's hardware, and its settings where that says nothing."""
    return {**trial.settings, **(trial.record.hardware if trial.record else {})}


def cost_figure(sweep: Sweep) -> FigureData[Bars]:
    """What the trials' time went into.

    Raises:
        NothingToDraw: no trial has written its time down.
    """
    parts = costs_of(sweep).parts
    if not parts:
        raise NothingToDraw("no trial has written down its time yet")
    largest = max(parts.values())
    unit, factor = next(pair for pair in _UNITS if largest * pair[1] >= 1 or pair == _UNITS[-1])
    return FigureData(
        COST_FIGURE,
        (Bars("", unit, tuple(Bar(name, hours * factor) for name, hours in parts.items())),),
        "Processor time of all trials by what it went into; of trials that were stopped early, and of the "
        "runs that came before trials (teachers, students to start from), the sum.",
        wide=True,
        alt=f"{unit} by part: " + ", ".join(f"{name} {hours * factor:.3g}" for name, hours in parts.items()),
    )


def duration(seconds: float) -> str:
    """`42 s`, `12.3 min`, `1.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
