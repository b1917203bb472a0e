"""A sweep's plan from timed parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from newsbert_ray.config import SettingsError, build_settings
from newsbert_ray.data.shards import Manifest, read_manifest
from newsbert_ray.tune.estimate import (
    AROUND_SECONDS,
    BETWEEN_SECONDS,
    GROUP_SECONDS,
    Calibration,
    Estimate,
    Parts,
    planned_trials,
    predict,
    wall_seconds,
)
from newsbert_ray.tune.resources import Place
from newsbert_ray.tune.space import SearchSpace
from tests.conftest import MakeSettings

PARTS = Parts(cold=4.0, start=0.5, step=0.1, title=0.001, checkpoint=0.2, best=0.05, end=0.3)
ONE = Place(slots=1, cpus=1.0, gpus=0.0)
BETA = {"name": "distill.beta", "low": 0.0, "high": 0.3}


def space(
    make_settings: MakeSettings, *, values: dict[str, Any] | None = None, **changes: Any
) -> SearchSpace:
    """Four points on the small corpus, two epochs of 64 titles each."""
    settings = make_settings(train_rows=64, batch_size=16, **(values or {}))
    given = {
        "file": "space.yaml",
        "name": "planned",
        "settings": settings.model_dump(exclude={"seed", "out"}),
        "axes": [{"name": "distill.beta", "values": (0.0, 0.1, 0.2, 0.3)}],
        "search": {"sampler": "grid"},
        **changes,
    }
    return build_settings(SearchSpace, given)


def plan(found: SearchSpace, place: Place = ONE, parts: Sequence[Parts] = (PARTS,), **more: Any) -> Estimate:
    """The plan if every kind of trial took PARTS."""
    planned = planned_trials(found, overrides={})
    calibration = Calibration(planned.trials[: len(parts)], tuple(parts), process=2.0, seconds=9.0)
    return predict(found, planned, calibration, place, **more)


def test_a_trial_is_the_sum_of_its_parts(make_settings: MakeSettings) -> None:
    """Worked by hand: 2 epochs of 4 steps, an evaluation and a checkpoint each, then the test split."""
    rows = read_manifest(make_settings().data)
    found = plan(space(make_settings))
    course = 8 * 0.1 + 2 * (rows.rows("validation") * 0.001 + 0.05 + 0.2)
    end = rows.rows("test") * 0.001 + 0.3
    one = 0.5 + BETWEEN_SECONDS + course + end
    assert [cost.seconds() for cost in found.costs] == pytest.approx([one] * 4)
    assert found.whole.trial_seconds == pytest.approx(4 * one)
    assert found.whole.wall == pytest.approx(AROUND_SECONDS + 2.0 + 4.0 + 4 * one)
    assert (found.saving, found.stopped) == (None, None)
    assert plan(space(make_settings), session_seconds=7.0).expected.wall == pytest.approx(
        AROUND_SECONDS + 13.0 + 4 * one
    )


def test_more_evaluations_and_checkpoints_are_counted(make_settings: MakeSettings) -> None:
    """`evaluate_every` and `checkpoint.every_steps` can double a trial's time."""
    once = plan(space(make_settings)).costs[0].course
    every = {"evaluate_every": 3, "checkpoint.every_steps": 2}
    rows = read_manifest(make_settings().data).rows("validation")
    # Steps 3 and 6 besides 4 and 8; then 2 besides 3, 4, 6, 8.
    more = 2 * (rows * 0.001 + 0.05) + 3 * 0.2
    assert plan(space(make_settings, values=every)).costs[0].course == pytest.approx(once + more)


def test_slots_work_side_by_side() -> None:
    """The wall time is that of the fullest slot, not the mean of all."""
    assert wall_seconds([4.0, 1.0, 1.0, 1.0, 3.0], 2) == 6.0
    assert wall_seconds([5.0], 8) == 5.0
    assert wall_seconds([2.0, 2.0, 2.0], 1) == 6.0


def test_money_and_hours_are_those_of_what_a_trial_occupies(make_settings: MakeSettings) -> None:
    """A budget is granted by these numbers: a group of two workers with half a GPU each costs double."""
    found = space(make_settings, prices={"cpu_hour": 0.5, "gpu_hour": 4.0})
    estimate = plan(found, Place(slots=2, cpus=3.0, gpus=0.5))
    hours = estimate.whole.trial_seconds / 3600
    assert estimate.whole.money == pytest.approx(hours * (3 * 0.5 + 0.5 * 4.0))
    lines = "\n".join(estimate.lines())
    assert f"{3 * hours:.2f} CPU-hours" in lines
    assert f"{0.5 * hours:.2f} GPU-hours" in lines
    assert f"cost {estimate.whole.money:.2f}" in lines
    assert "at 2 trials at once" in lines


def test_the_points_are_those_that_the_sweep_will_run(make_settings: MakeSettings) -> None:
    """Seeds multiply, a point drawn twice runs once, and one that cannot be does not run."""
    assert len(planned_trials(space(make_settings, seeds=(0, 1, 2)), overrides={}).trials) == 12
    drawn: dict[str, Any] = {"search": {"sampler": "tpe", "trials": 20}, "start": [{"distill.beta": 0.1}]}
    planned = planned_trials(space(make_settings, **drawn), overrides={})
    assert planned.trials[0].distill.beta == 0.1
    assert (planned.points, len(planned.trials), planned.again) == (20, 4, 16)
    depths = [{"name": "student.layers", "values": (2, 3)}]
    planned = planned_trials(space(make_settings, axes=depths), overrides={})
    assert (len(planned.trials), planned.impossible) == (1, 1)
    with pytest.raises(SettingsError, match="do not divide"):
        planned_trials(space(make_settings, axes=depths[:1]), overrides={"scratch.layers": 5})


def test_early_stopping_spends_less(make_settings: MakeSettings) -> None:
    """The plan shows both: what was asked for, and what it costs at most."""
    search: dict[str, Any] = {"search": {"sampler": "tpe", "trials": 30}, "axes": [BETA]}
    estimate = plan(space(make_settings, values={"epochs": 4}, **search))
    assert estimate.saving is not None
    assert estimate.expected == estimate.stopped
    assert estimate.expected.wall < 0.8 * estimate.whole.wall
    assert estimate.expected.trial_seconds < estimate.whole.trial_seconds
    lines = "\n".join(estimate.lines())
    assert "with asha" in lines
    assert f"{estimate.saving.epochs:.0%} of the epochs" in lines
    assert "assumed" in lines
    flat = [[(float(epoch), 0.5) for epoch in range(1, 5)]] * 30
    replayed = plan(space(make_settings, values={"epochs": 4}, **search), curves=flat)
    assert "30 recorded curves" in "\n".join(replayed.lines())


def test_a_limit_that_ends_the_sweep_is_said(make_settings: MakeSettings) -> None:
    """Whoever gives an hour wants to know how many trials fit into it."""
    found = space(make_settings, limits={"hours": 0.001}, seeds=tuple(range(10)))
    assert any("limits.hours = 0.001 ends it early" in line for line in plan(found).lines())
    assert not any("limits.hours" in line for line in plan(space(make_settings, limits={"hours": 9})).lines())


def test_a_group_shares_the_titles_and_costs_its_start(make_settings: MakeSettings) -> None:
    """Two workers evaluate half each, and a nested group takes its time before the first step."""
    alone = plan(space(make_settings))
    trials = [
        t.model_copy(update={"workers": 2}) for t in planned_trials(space(make_settings), overrides={}).trials
    ]
    planned = replace(alone.planned, trials=tuple(trials))
    calibration = Calibration(tuple(trials[:1]), (PARTS,), process=2.0, seconds=9.0)
    group = predict(alone.space, planned, calibration, Place(slots=1, cpus=1.0, gpus=0.0, workers=2))
    assert group.costs[0].start == pytest.approx(alone.costs[0].start + GROUP_SECONDS)
    rows = read_manifest(make_settings().data).rows("test")
    assert group.costs[0].end == pytest.approx(alone.costs[0].end - 0.0005 * rows)


def counted(folder: Path, *, labelled: bool) -> Path:
    """A manifest without its shards: 100 clicks of 70 impressions to train on, 20 to validate, 30 to test."""
    part = {"file": "-", "bytes": 0, "sha256": ""}

    def shard(rows: int, examples: int) -> dict[str, Any]:
        return {**part, "rows": rows, "examples": examples}

    behaviors = {
        "train": [shard(40, 60), shard(30, 40)],
        "validation": [shard(20, 25)],
        "test": [shard(30, 33 if labelled else 0)],
    }
    manifest = {
        "format": 2,
        "fingerprint": "ab12",
        "settings": {},
        "sources": [],
        "tokenizer": {"name": "-", "sha256": "", "vocabulary": 10, "pad_id": 0},
        "labels": [],
        "splits": {split: [shard(500, 500)] for split in behaviors},
        "others": [],
        "behaviors": behaviors,
        "pairs": {},
        "texts": {"rows": 0, "tokens": part, "offsets": part},
        "statistics": {},
        "rejected": {},
    }
    folder.mkdir()
    (folder / "manifest.json").write_text(Manifest.model_validate(manifest).model_dump_json())
    return folder


@pytest.mark.parametrize("labelled", [True, False])
def test_clicks_are_trained_on_and_impressions_evaluated(labelled: bool, tmp_path: Path) -> None:
    """Worked by hand: 100 clicks in batches of 16 are 7 steps, not the 5 of 70 impressions or the 32 of 500
    titles; 20 impressions are evaluated an epoch, and of the test split 30, none where it has no labels."""
    given = {
        "file": "space.yaml",
        "name": "planned",
        "settings": {
            "data": str(counted(tmp_path / "shards", labelled=labelled)),
            "teacher": "scratch",
            "task": "recommendation",
            "batch_size": 16,
            "epochs": 2,
        },
        "axes": [{"name": "distill.beta", "values": (0.0, 0.15)}],
        "search": {"sampler": "grid"},
    }
    found = plan(build_settings(SearchSpace, given))
    assert [cost.steps for cost in found.costs] == [14, 14]
    assert found.costs[0].course == pytest.approx(14 * 0.1 + 2 * (20 * 0.001 + 0.05 + 0.2))
    assert found.costs[0].end == pytest.approx((30 * 0.001 if labelled else 0.0) + 0.3)
