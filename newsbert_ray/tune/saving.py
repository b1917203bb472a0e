"""What early stopping leaves of a sweep, played through on recorded or assumed curves. Knows no Ray."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from newsbert_ray.tune.jobs import TRIALS, Curve, trial_curve
from newsbert_ray.tune.replay import Recorded, play
from newsbert_ray.tune.space import SearchSpace

REPLAYS = 20
"""Orders of the trials that are played through."""


@dataclass(frozen=True)
class Saving:
    """What early stopping leaves: the share of all epochs, the share of trials that reach their end, and what
    that was concluded from."""

    epochs: float
    finished: float
    source: str


def recorded_curves(folder: str | Path, metric: str) -> list[Curve]:
    """The learning curves of an earlier sweep's trials, those stopped early included."""
    found = [trial_curve(path, metric) for path in sorted((Path(folder) / TRIALS).glob("*"))]
    return [curve for curve in found if curve]


def early_stopping(
    space: SearchSpace, epochs: Sequence[int], *, slots: int, curves: Sequence[Curve] | None = None
) -> Saving:
    """What the space's early stopping leaves of trials of so many `epochs`: the mean over REPLAYS orders.

    Recorded curves are dealt out by chance; one that is too short keeps its last value. Without any, every
    trial keeps its rank from the first epoch to the last, and any order of the ranks is as likely as another.
    """
    chance = random.Random(space.search.seed)
    spent, finished = 0.0, 0
    for _ in range(REPLAYS):
        take = partial(next, iter(_dealt(epochs, curves or (), chance)), None)
        for moment in play(take, space, slots=slots):
            spent += moment.cost
            finished += moment.finished
    source = "assumed: trials keep their rank from the first epoch to the last and come in any order"
    if curves:
        source = f"played through on {len(curves)} recorded curves in any order"
    return Saving(spent / (REPLAYS * sum(epochs)), finished / (REPLAYS * len(epochs)), source)


def _dealt(epochs: Sequence[int], curves: Sequence[Curve], chance: random.Random) -> list[Recorded]:
    """A curve for each trial, at whole epochs."""
    if not curves:
        drawn: Sequence[Curve] = [[(1.0, chance.random())] for _ in epochs]
    elif len(curves) >= len(epochs):
        drawn = chance.sample(curves, len(epochs))
    else:
        drawn = chance.choices(curves, k=len(epochs))
    dealt = []
    for number, (last, curve) in enumerate(zip(epochs, drawn, strict=True)):
        values = [(float(epoch), _value_at(curve, epoch)) for epoch in range(1, last + 1)]
        dealt.append(Recorded(f"trial {number}", values, values[-1][1]))
    return dealt


def _value_at(curve: Curve, epoch: int) -> float:
    """The last value by the end of `epoch`; before the first evaluation, the first one's."""
    known = [value for at, value in curve if at <= epoch]
    return known[-1] if known else curve[0][1]
