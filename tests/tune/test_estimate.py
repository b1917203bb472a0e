"""A sweep's plan from timed parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest

from newsbert_ray.config import SettingsError, TrainSettings, build_settings, merge
from newsbert_ray.data.shards import Manifest, ShardError, read_manifest
from newsbert_ray.ray_session import RaySession
from newsbert_ray.tune.estimate import (
    AROUND_SECONDS,
    BETWEEN_SECONDS,
    GROUP_SECONDS,
    Calibration,
    Estimate,
    Parts,
    Times,
    calibrate,
    plan_sweep,
    planned_trials,
    predict,
    settings_to_time,
    time_parts,
    wall_seconds,
)
from newsbert_ray.tune.resources import Resources
from newsbert_ray.tune.space import SearchSpace
from newsbert_ray.tune.space_file import read_space
from newsbert_ray.tune.sweep import ESTIMATE, SweepError, compare_with_estimate, estimate_subject, sweep
from tests.conftest import MakeSettings

PARTS = Parts(cold=4.0, start=0.5, step=0.1, row=0.001, checkpoint=0.2, best=0.05, end=0.3)
ONE = Resources(slots=1, cpus=1.0, gpus=0.0)
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


def plan(
    found: SearchSpace, place: Resources = ONE, parts: Sequence[Parts] = (PARTS,), **more: Any
) -> Estimate:
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
    assert found.full.trial_seconds == pytest.approx(4 * one)
    assert found.full.wall == pytest.approx(AROUND_SECONDS + 2.0 + 4.0 + 4 * one)
    assert (found.saving, found.stopped) == (None, None)
    assert plan(space(make_settings), session_seconds=7.0).expected.wall == pytest.approx(
        AROUND_SECONDS + 13.0 + 4 * one
    )


def test_more_evaluations_and_checkpoints_are_counted(make_settings: MakeSettings) -> None:
    """`evaluate_every` and `checkpoint.every_steps` can double a trial's time."""
    once = plan(space(make_settings)).costs[0].training
    every = {"evaluate_every": 3, "checkpoint.every_steps": 2}
    rows = read_manifest(make_settings().data).rows("validation")
    # Steps 3 and 6 besides 4 and 8; then 2 besides 3, 4, 6, 8.
    more = 2 * (rows * 0.001 + 0.05) + 3 * 0.2
    assert plan(space(make_settings, values=every)).costs[0].training == pytest.approx(once + more)


def test_slots_work_side_by_side() -> None:
    """The wall time is that of the fullest slot, not the mean of all."""
    assert wall_seconds([4.0, 1.0, 1.0, 1.0, 3.0], 2) == 6.0
    assert wall_seconds([5.0], 8) == 5.0
    assert wall_seconds([2.0, 2.0, 2.0], 1) == 6.0


def test_money_and_hours_are_those_of_what_a_trial_occupies(make_settings: MakeSettings) -> None:
    """A budget is granted by these numbers: a group of two workers with half a GPU each costs double."""
    found = space(make_settings, prices={"cpu_hour": 0.5, "gpu_hour": 4.0})
    estimate = plan(found, Resources(slots=2, cpus=3.0, gpus=0.5))
    hours = estimate.full.trial_seconds / 3600
    assert estimate.full.money == pytest.approx(hours * (3 * 0.5 + 0.5 * 4.0))
    lines = "\n".join(estimate.lines())
    assert f"{3 * hours:.2f} CPU-hours" in lines
    assert f"{0.5 * hours:.2f} GPU-hours" in lines
    assert f"cost {estimate.full.money:.2f}" in lines
    assert "with 2 trials at once" in lines


def test_the_points_are_those_that_the_sweep_will_run(make_settings: MakeSettings) -> None:
    """Seeds multiply, a point drawn twice runs once, and one that cannot be does not run."""
    assert len(planned_trials(space(make_settings, seeds=(0, 1, 2)), overrides={}).trials) == 12
    drawn: dict[str, Any] = {"search": {"sampler": "tpe", "trials": 20}, "start": [{"distill.beta": 0.1}]}
    planned = planned_trials(space(make_settings, **drawn), overrides={})
    assert planned.trials[0].distill.beta == 0.1
    assert (planned.points, len(planned.trials), planned.duplicates) == (20, 4, 16)
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
    assert estimate.expected.wall < 0.8 * estimate.full.wall
    assert estimate.expected.trial_seconds < estimate.full.trial_seconds
    lines = "\n".join(estimate.lines())
    assert "with asha" in lines
    assert f"{estimate.saving.epochs:.0%} of the epochs" in lines
    assert "assuming" in lines
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
    group = predict(alone.space, planned, calibration, Resources(slots=1, cpus=1.0, gpus=0.0, workers=2))
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
    assert found.costs[0].training == pytest.approx(14 * 0.1 + 2 * (20 * 0.001 + 0.05 + 0.2))
    assert found.costs[0].end == pytest.approx((30 * 0.001 if labelled else 0.0) + 0.3)


def settings(**values: Any) -> TrainSettings:
    """Settings of a trial with a scratch teacher of 12 layers."""
    given = {"data": "shards", "teacher": "scratch", "out": "run", "scratch": {"layers": 12}}
    return build_settings(TrainSettings, merge(given, values))


def timed(kinds: Sequence[TrainSettings]) -> Times:
    """Times of an invented machine: a step takes 3 ms, and 2 ms a layer and title."""
    step = [0.003 + 0.002 * kind.batch_size * (12 + kind.student.layers) for kind in kinds]
    parts = tuple(
        Parts(5.0, 0.1, s, 0.001 * k.student.layers, 0.2, 0.1, 0.3) for s, k in zip(step, kinds, strict=True)
    )
    return Times(Calibration(tuple(kinds), parts, process=1.0, seconds=10.0))


def test_settings_that_cost_nothing_are_timed_once() -> None:
    """A grid over beta and rates would take longer to time than to run."""
    trials = [
        settings(**{"distill.beta": beta, "learning_rate": rate, "seed": seed, "epochs": epochs})
        for beta in (0.0, 0.2)
        for rate in (1e-4, 1e-3)
        for seed in (0, 1)
        for epochs in (1, 5)
    ]
    assert len(settings_to_time(trials)) == 1


def test_only_the_ends_of_long_lists_are_timed() -> None:
    """Timing must stay short for wide searches, which need it most."""
    trials = [
        settings(**{"student.layers": n, "batch_size": b}) for n in (1, 2, 3, 4, 6, 12) for b in (8, 16, 32)
    ]
    chosen = [(one.student.layers, one.batch_size) for one in settings_to_time(trials)]
    assert sorted(chosen) == [(1, 8), (12, 32)]


def test_what_lies_between_is_interpolated() -> None:
    """A step's time grows with layers times titles: neither alone would do."""
    trials = [
        settings(**{"student.layers": n, "batch_size": b}) for n in (1, 2, 3, 4, 6, 12) for b in (8, 16, 32)
    ]
    times = timed(settings_to_time(trials))
    for trial in trials:
        parts = times.parts(trial)
        assert parts.step == pytest.approx(0.003 + 0.002 * trial.batch_size * (12 + trial.student.layers))
        assert parts.row == pytest.approx(0.001 * trial.student.layers)


def test_words_are_timed_each() -> None:
    """There is nothing between fp32 and bf16, nor between two corpora."""
    trials = [
        settings(**{"precision": p, "data": d, "student.layers": n, "model.dropout": drop})
        for p in ("fp32", "bf16")
        for d in ("small", "large")
        for n in (1, 2, 3)
        for drop in (0.1, 0.2)
    ]
    chosen = settings_to_time(trials)
    assert len(chosen) == 2 * 2 * 2
    assert {(c.precision, c.data) for c in chosen} == {(t.precision, t.data) for t in trials}


def test_teacher_and_student_layers_both_count() -> None:
    """A search over both depths would be planned by the student's depth alone."""
    pairs = [(4, 1), (4, 2), (4, 4), (6, 1), (6, 2), (6, 3), (6, 6)]
    trials = [settings(**{"model.teacher_layers": t, "student.layers": s}) for t, s in pairs]
    chosen = settings_to_time(trials)
    assert [(c.model.teacher_layers, c.student.layers) for c in chosen] == [(4, 1), (6, 6)]
    parts = [Parts(5.0, 0.1, 0.1, 0.001 * sum(pair), 0.2, 0.1, 0.3) for pair in ((4, 1), (6, 6))]
    times = Times(Calibration(tuple(chosen), tuple(parts), process=1.0, seconds=10.0))
    for trial, pair in zip(trials, pairs, strict=True):
        assert times.parts(trial).row == pytest.approx(0.001 * sum(pair))


def test_tasks_methods_and_budgets_are_timed_each() -> None:
    """A step of clicks takes many times one of titles, and one without a teacher a part of it."""
    trials = [
        settings(**{"task": task, "method": method, "token_budget": budget})
        for task in ("topics", "recommendation", "retrieval")
        for method in ("newsbert", "finetune")
        for budget in (2048, 8192)
    ]
    assert len(settings_to_time(trials)) == 12


def test_histories_and_negatives_grow_a_step_of_clicks_alone() -> None:
    """Each history length would be timed for itself, and those of topics, which read none, too."""
    values = [(h, n) for h in (10, 20, 30, 50) for n in (1, 2, 4)]
    clicks, titles = (
        [
            settings(**{"task": task, "recommendation.history": h, "recommendation.npratio": n})
            for h, n in values
        ]
        for task in ("recommendation", "topics")
    )
    chosen = [(k.recommendation.history, k.recommendation.npratio) for k in settings_to_time(clicks)]
    assert sorted(chosen) == [(10, 1), (50, 4)]
    assert len(settings_to_time(titles)) == 1


def test_every_part_is_timed_and_nothing_is_left(make_settings: MakeSettings, tmp_path: Path) -> None:
    """A part that was forgotten would count as free in every plan; a checkpoint left would fill the disk."""
    folder = tmp_path / "calibration"
    parts = time_parts(make_settings(**{"optimizer.accumulate": 2}), folder=folder)
    assert all(seconds > 0 for name, seconds in vars(parts).items() if name != "cold")
    assert parts.cold >= 0
    assert not folder.exists()


@pytest.mark.slow
def test_more_work_takes_longer(make_settings: MakeSettings, tmp_path: Path) -> None:
    """The plan stands on these differences."""
    wide = {"layers": 8, "hidden": 64, "heads": 2, "feed_forward": 256}
    small = time_parts(make_settings(batch_size=8), folder=tmp_path / "a")
    large = time_parts(make_settings(batch_size=64, scratch=wide), folder=tmp_path / "b")
    assert large.step > 2 * small.step
    assert large.row > small.row


@pytest.mark.ray
def test_slots_are_timed_together_and_freed(
    ray: RaySession, make_settings: MakeSettings, tmp_path: Path
) -> None:
    """Neighbours slow each other down: timed alone, a step is too fast; actors that stay would block the
    sweep."""
    import ray as cluster

    place = Resources(slots=2, cpus=1.0, gpus=0.0)
    kinds = [make_settings(), make_settings(**{"student.layers": 4})]
    found = calibrate(kinds, place, folder=tmp_path / "calibration")
    assert found.settings == tuple(kinds)
    assert all(part >= 0 for parts in found.parts for part in astuple(parts))
    assert found.process > 0
    assert found.seconds > found.process
    with pytest.raises(ShardError, match="no prepared shards"):
        calibrate([make_settings(data=str(tmp_path / "nowhere"))], place, folder=tmp_path / "calibration")

    @cluster.remote(num_cpus=2)
    def whole() -> str:
        return "free"

    assert cluster.get(whole.remote(), timeout=60) == "free"
    assert not (tmp_path / "calibration" / "slot-0").exists()


WriteSpace = Callable[..., Path]


def test_a_plan_is_held_against_its_own_sweep_only(write_space: WriteSpace, tmp_path: Path) -> None:
    """A plan for two trials is said to have missed by a thousand per cent because a hundred were run."""
    space = read_space(write_space())
    plan = {"of": estimate_subject(space, {}), "slots": 2, "wall": 600.0}
    (tmp_path / ESTIMATE).write_text(json.dumps(plan))
    assert (
        compare_with_estimate(tmp_path, space, {}, seconds=660.0, slots=2)
        == "planned 10.0 min, took 11.0 min (+10%)"
    )
    assert compare_with_estimate(tmp_path, space, {}, seconds=660.0, slots=1) == ""
    assert compare_with_estimate(tmp_path, space, {"epochs": 9}, seconds=660.0, slots=2) == ""
    other = read_space(write_space(**{"[1, 2]": "[1]"}))
    assert compare_with_estimate(tmp_path, other, {}, seconds=660.0, slots=2) == ""
    (tmp_path / ESTIMATE).write_text("{")
    assert compare_with_estimate(tmp_path, space, {}, seconds=660.0, slots=2) == ""


def test_a_plan_of_what_cannot_be_ends_at_once(write_space: WriteSpace, shards: Path, tmp_path: Path) -> None:
    """A person waits for the calibration of a sweep that then refuses to start."""
    file = write_space(nowhere=str(shards))
    with pytest.raises(SettingsError, match="epochs = 0"):
        plan_sweep(file, out=tmp_path / "sweep", overrides={"epochs": 0})
    with pytest.raises(ShardError):
        plan_sweep(write_space(), out=tmp_path / "sweep")
    with pytest.raises(SettingsError, match=r"--curves .*no trial there has reported"):
        plan_sweep(write_space(nowhere=str(shards)), out=tmp_path / "sweep", curves=tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.jpg").touch()
    with pytest.raises(SweepError, match="holds other files"):
        plan_sweep(file, out=tmp_path / "other")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_sweep_follows_its_plan_and_says_how_near_it_was(
    ray: RaySession,
    write_space: WriteSpace,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The plan stands in the way of its own sweep, or nobody learns that plans are wrong."""
    small = (
        f"name: planned\nsettings: {{data: {shards}, teacher: scratch, epochs: 1, batch_size: 32, "
        "student.layers: 1, model.query_size: 8, scratch: {layers: 2, hidden: 16, heads: 2, "
        "feed_forward: 32}}\n"
        "space:\n  distill.beta: {grid: [0.0, 0.2]}\nprices: {cpu_hour: 0.5}\n"
    )
    file, out = write_space(small), tmp_path / "sweep"
    estimate = plan_sweep(file, out=out)
    said = capsys.readouterr().out
    assert (len(estimate.costs), estimate.resources.slots) == (2, 2)
    assert "planned: 2 points, 2 trials, 18 steps, 2 epochs" in said
    assert sorted(path.name for path in out.iterdir()) == [".lock", "plan.json"]
    sweep(file, out=out)
    assert "planned " in capsys.readouterr().out
