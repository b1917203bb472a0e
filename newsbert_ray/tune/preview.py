"""`newsbert-ray sweep --plan`: what a sweep will take, measured on its own slots before anything is spent;
and, once it has run, how near that was."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from newsbert_ray.config import SettingsError
from newsbert_ray.files import write_json
from newsbert_ray.ray_session import ray_session
from newsbert_ray.storage import workdir as storage
from newsbert_ray.tune import space as spaces
from newsbert_ray.tune.resources import place_of
from newsbert_ray.tune.sweep_folder import (
    ESTIMATE,
    MARKS,
    build_space,
    claim_folder,
    fixed_part,
    read_asked,
    read_corpora,
)

if TYPE_CHECKING:
    from newsbert_ray.tune.estimate import Estimate
    from newsbert_ray.tune.space import SearchSpace


def preview(
    space: str | Path,
    *,
    out: str | Path,
    overrides: Mapping[str, Any] | None = None,
    vary: Mapping[str, Sequence[Any]] | None = None,
    control: Mapping[str, Any] | None = None,
    concurrency: int | None = None,
    curves: str | Path | None = None,
) -> Estimate:
    """Time a few steps of each kind of trial, as many at once as the sweep would; print what it will take.

    Args:
        space, overrides, vary, control, concurrency: as for `sweep`.
        out: folder that the sweep is to have; plan.json in it is held against what the sweep then takes.
        curves: an earlier sweep, whose learning curves say what early stopping saves; without one, curves
            that never cross are assumed.
    Raises:
        SettingsError, SweepError, ConnectError, ShardError: as `sweep`.
    """
    place = out if storage.is_url(out) else Path(out)
    with storage.working(place, marks=MARKS, small=True) as folder, claim_folder(folder):
        asked = read_asked(overrides, vary, control, before={})
        found, said = build_space(space, asked)
        first = spaces.check_space(found, out=place, overrides=asked["overrides"])
        read_corpora(found, first)
        recorded = _curves(curves, found)
        from newsbert_ray.tune.estimate import estimate_sweep
        from newsbert_ray.tune.ray_tune import node_resources

        began = time.monotonic()
        with ray_session():
            session_seconds = time.monotonic() - began
            trials = found.points * len(found.seeds)
            seat = place_of(first, node_resources(), jobs=trials, concurrency=concurrency, gpus=found.gpus)
            scratch = folder / ".plan"
            estimate = estimate_sweep(
                found,
                seat,
                overrides=asked["overrides"],
                folder=scratch,
                session_seconds=session_seconds,
                curves=recorded,
                say=print,
            )
        shutil.rmtree(scratch, ignore_errors=True)
        print("\n".join([*said, *estimate.lines()]))
        expected = estimate.expected
        write_json(
            folder / ESTIMATE,
            {
                "of": _subject(found, asked["overrides"]),
                "slots": seat.slots,
                "wall": expected.wall,
                "trial_seconds": expected.trial_seconds,
                "money": expected.money,
                "lines": estimate.lines(),
            },
        )
        storage.publish(place)
        print(f"kept in {storage.join(place, ESTIMATE)}; the same command without --plan runs the sweep")
    return estimate


def compared(
    out: Path, space: SearchSpace, overrides: Mapping[str, Any], *, seconds: float, slots: int
) -> str:
    """How near the plan in `out` was to what the sweep took; empty where there is none of this sweep."""
    try:
        plan = json.loads((out / ESTIMATE).read_text(encoding="utf-8"))
        if plan["of"] != _subject(space, overrides) or plan["slots"] != slots:
            return ""
        wall = float(plan["wall"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    from newsbert_ray.files import format_duration

    error = seconds / wall - 1
    return f"planned {format_duration(wall)}, took {format_duration(seconds)} ({error:+.0%})"


def _subject(space: SearchSpace, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What a plan was made for: everything that alters how long the sweep takes."""
    found = {**fixed_part("space", space.model_dump(mode="json", exclude={"file"})), "points": space.points}
    return dict(json.loads(json.dumps({**found, "overrides": overrides})))


def _curves(folder: str | Path | None, space: SearchSpace) -> Any:
    if folder is None:
        return None
    from newsbert_ray.tune.replay import recorded_curves

    with storage.snapshot(folder) as here:
        curves = recorded_curves(here, space.metric)
    if not curves:
        raise SettingsError(f"--curves {folder}: no trial there has reported {space.metric}")
    return curves
