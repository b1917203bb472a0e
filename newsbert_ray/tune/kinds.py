"""Which trials of a sweep do the same work, which of them to time, and from these the times of all. Knows no
Ray."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np

from newsbert_ray.config import SCRATCH, SettingsError, TrainSettings, build_settings, merge
from newsbert_ray.tune.calibrate import Calibration, Parts
from newsbert_ray.tune.depths import check_depth
from newsbert_ray.tune.space import flatten

NAMED = (
    "data",
    "teacher",
    "task",
    "method",
    "precision",
    "device",
    "threads",
    "workers",
    "token_budget",
    "student.kind",
    "student.encoder",
    "distill.teacher",
)
"""Settings that decide a trial's work, each value in its own way."""
COUNTED = ("student.layers", "model.teacher_layers", "model.query_size", "batch_size", "optimizer.accumulate")
"""Settings that the work grows with, nearly in a straight line; those of a scratch teacher besides."""
READ = ("recommendation.npratio", "recommendation.history")
"""Settings that the work of recommendation grows with, by the news that a click brings along: less than in a
straight line, since each is encoded once and few users have the longest history."""
SWITCHES = ("model.dropout", "distill.teacher_dropout", "distill.weights.teacher_task")
"""Settings of which only zero makes another work."""
CORNERS = 2
"""With more settings that grow, they are varied one at a time instead of all together."""

Kind = Mapping[str, Any]


def kind_of(settings: TrainSettings) -> Kind:
    """What decides a trial's seconds a step; other settings (beta, rates, epochs, ...) leave them alone."""
    flat = flatten(settings.model_dump())
    names = [*NAMED, *COUNTED, *(READ if settings.task == "recommendation" else ())]
    if settings.teacher == SCRATCH:
        names += [name for name in flat if name.startswith("scratch.")]
    return {**{name: flat[name] for name in names}, **{name: flat[name] > 0 for name in SWITCHES}}


def kinds_to_time(trials: Sequence[TrainSettings]) -> list[TrainSettings]:
    """Settings to time, so that the seconds of all `trials` are known or lie between known ones."""
    chosen: dict[tuple[Any, ...], TrainSettings] = {}
    for members in _cells(trials).values():
        for settings in _chosen(members):
            chosen.setdefault(_key(settings), settings)
    return list(chosen.values())


class Times:
    """Parts of any trial from those that were timed."""

    def __init__(self, calibration: Calibration) -> None:
        self._exact = {_key(s): p for s, p in zip(calibration.settings, calibration.parts, strict=True)}
        self._cells = _cells(calibration.settings)

    def parts(self, settings: TrainSettings) -> Parts:
        """Its own where it was timed, else on a plane through those that differ in numbers alone."""
        if (found := self._exact.get(_key(settings))) is not None:
            return found
        members = self._cells[_cell(settings)]
        kinds = [kind_of(member) for member in members]
        names = _growing(kinds)
        low = {name: min(kind[name] for kind in kinds) for name in names}
        reach = {name: max(kind[name] for kind in kinds) - low[name] for name in names}

        def features(kind: Kind) -> list[float]:
            x = [(kind[name] - low[name]) / reach[name] for name in names]
            return [1.0, *x] + ([math.prod(x)] if len(x) == CORNERS and len(members) >= 2**CORNERS else [])

        matrix = np.array([features(kind) for kind in kinds])
        known = np.array([astuple(self._exact[_key(member)]) for member in members])
        plane = np.linalg.lstsq(matrix, known, rcond=None)[0]
        return Parts(*np.maximum(0.0, np.array(features(kind_of(settings))) @ plane).tolist())


def _cell(settings: TrainSettings) -> tuple[Any, ...]:
    kind = kind_of(settings)
    # Without a number for the teacher's layers, all of them are taken: a kind of its own.
    return tuple(v for name, v in kind.items() if not _grows(name) or v is None)


def _cells(trials: Sequence[TrainSettings]) -> dict[tuple[Any, ...], list[TrainSettings]]:
    """Trials that differ in numbers alone together, each kind once."""
    cells: dict[tuple[Any, ...], dict[tuple[Any, ...], TrainSettings]] = {}
    for settings in trials:
        cells.setdefault(_cell(settings), {}).setdefault(_key(settings), settings)
    return {cell: list(members.values()) for cell, members in cells.items()}


def _key(settings: TrainSettings) -> tuple[Any, ...]:
    return tuple(kind_of(settings).items())


def _grows(name: str) -> bool:
    return name in (*COUNTED, *READ) or name.startswith("scratch.")


def _growing(kinds: Sequence[Kind]) -> list[str]:
    return [name for name in kinds[0] if _grows(name) and len({kind[name] for kind in kinds}) > 1]


def _chosen(members: Sequence[TrainSettings]) -> list[TrainSettings]:
    """Those at the ends of what grows: at all corners for few such settings, else one at a time."""
    kinds = [kind_of(member) for member in members]
    names = _growing(kinds)
    ends = [(min(kind[name] for kind in kinds), max(kind[name] for kind in kinds)) for name in names]
    corners = list(itertools.product(*ends))
    if len(names) > CORNERS:
        first = tuple(low for low, _ in ends)
        corners = [first] + [(*first[:i], high, *first[i + 1 :]) for i, (_, high) in enumerate(ends)]
    if len(members) <= len(corners):
        return list(members)
    return [
        _at(dict(zip(names, corner, strict=True)), members, dict(zip(names, ends, strict=True)))
        for corner in corners
    ]


def _at(
    corner: Mapping[str, Any], members: Sequence[TrainSettings], ends: Mapping[str, tuple[float, float]]
) -> TrainSettings:
    """Settings at a corner; where that combination cannot be, those of the member nearest to it."""
    try:
        settings = build_settings(TrainSettings, merge(members[0].model_dump(), corner))
        check_depth(settings)
    except SettingsError:

        def distance(member: TrainSettings) -> float:
            kind = kind_of(member)
            return float(sum(abs(kind[n] - v) / (ends[n][1] - ends[n][0]) for n, v in corner.items()))

        return min(members, key=distance)
    return settings
