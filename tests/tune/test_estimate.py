"""A sweep's plan from timed parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from newsbert_ray import preview, sweep
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
    calibrate,
    planned_trials,
    settings_to_time,
    time_parts,
    wall_seconds,
)
from newsbert_ray.tune.space import SearchSpace
from newsbert_ray.tune.space_file import read_space
from newsbert_ray.tune.sweep import ESTIMATE, SweepError, compare_with_estimate, estimate_subject
from newsbert_ray.tune.trials import Resources
from tests.conftest import MakeSettings

PARTS = Parts(cold=4.0, start=0.5, step=0.1, row=0.001, checkpoint=0.2, best=0.05, end=0.3)
ONE = Resources(slots=1, cpus=1.0, gpus=0.0)
BETA = {"name": "distill.beta", "low": 0.0, "high": 0.3}


def space(
    make_settings: MakeSettings, *, values: dict[str, Any] | None = None, **changes: Any
) -> SearchSpace:
    """Four points on the small corpus, two epochs of 64 titles each."""
    settings = make_settings(train_rows=64, batch_size=16, **(values or {}))
    parts = {
        "file": "space.yaml",
        "name": "planned",
        "settings": settings.model_dump(exclude={"seed", "out"}),
        "axes": [{"name": "distill.beta", "values": (0.0, 0.1, 0.2, 0.3)}],
        "search": {"sampler": "grid"},
        **changes,
    }
    return build_settings(SearchSpace, parts)


def plan(
    search: SearchSpace, resources: Resources = ONE, parts: Sequence[Parts] = (PARTS,), **more: Any
) -> Estimate:
    """The estimate if every trial took PARTS."""
    planned = planned_trials(search, overrides={})
    calibration = Calibration(tuple(zip(planned.trials, parts, strict=False)), process=2.0, seconds=9.0)
    return Estimate(search, resources, planned, calibration, **more)


def test_a_trial_is_the_sum_of_its_parts(make_settings: MakeSettings) -> None:
    """Worked by hand: 2 epochs of 4 steps, an evaluation and a checkpoint each, then the test split."""
    rows = read_manifest(make_settings().data)
    estimate = plan(space(make_settings))
    course = 8 * 0.1 + 2 * (rows.rows("validation") * 0.001 + 0.05 + 0.2)
    end = rows.rows("test") * 0.001 + 0.3
    one = 0.5 + BETWEEN_SECONDS + course + end
    assert [cost.seconds for cost in estimate.costs] == pytest.approx([one] * 4)
    assert estimate.full.trial_seconds == pytest.approx(4 * one)
    assert estimate.full.wall == pytest.approx(AROUND_SECONDS + 2.0 + 4.0 + 4 * one)
    assert (estimate.saving, estimate.stopped, estimate.expected) == (None, None, estimate.full)
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


def test_slots_work_in_parallel() -> None:
    """The wall time is that of the fullest slot, not the mean of all."""
    assert wall_seconds([4.0, 1.0, 1.0, 1.0, 3.0], 2) == 6.0
    assert wall_seconds([5.0], 8) == 5.0
    assert wall_seconds([2.0, 2.0, 2.0], 1) == 6.0


def test_money_and_hours_count_what_a_trial_occupies(make_settings: MakeSettings) -> None:
    """A group of two workers with half a GPU each costs double."""
    search = space(make_settings, prices={"cpu_hour": 0.5, "gpu_hour": 4.0})
    estimate = plan(search, Resources(slots=2, cpus=3.0, gpus=0.5))
    hours = estimate.full.trial_seconds / 3600
    assert estimate.full.money == pytest.approx(hours * (3 * 0.5 + 0.5 * 4.0))
    lines = "\n".join(estimate.lines())
    assert f"{3 * hours:.2f} CPU-hours" in lines
    assert f"{0.5 * hours:.2f} GPU-hours" in lines
    assert f"cost {estimate.full.money:.2f}" in lines
    assert "with 2 trials at once" in lines


def test_the_points_are_those_that_the_sweep_will_run(make_settings: MakeSettings) -> None:
    """Seeds multiply, a point drawn twice runs once, and an impossible one does not run."""
    assert len(planned_trials(space(make_settings, seeds=(0, 1, 2)), overrides={}).trials) == 12
    drawn: dict[str, Any] = {"search": {"sampler": "tpe", "trials": 20}, "start": [{"distill.beta": 0.1}]}
    planned = planned_trials(space(make_settings, **drawn), overrides={})
    assert planned.trials[0].distill.beta == 0.1
    assert (len(planned.trials), planned.duplicates) == (4, 16)
    depths = [{"name": "student.layers", "values": (2, 3)}]
    planned = planned_trials(space(make_settings, axes=depths), overrides={})
    assert (len(planned.trials), planned.impossible) == (1, 1)
    with pytest.raises(SettingsError, match="do not divide"):
        planned_trials(space(make_settings, axes=depths[:1]), overrides={"scratch.layers": 5})


def test_early_stopping_spends_less(make_settings: MakeSettings) -> None:
    """The plan shows both: with early stopping, and at most."""
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


def test_a_limit_that_ends_the_sweep_is_reported(make_settings: MakeSettings) -> None:
    """A user with one hour wants to know how many trials fit into it."""
    search = space(make_settings, limits={"hours": 0.001}, seeds=tuple(range(10)))
    assert any("limits.hours = 0.001 ends it early" in line for line in plan(search).lines())
    assert not any("limits.hours" in line for line in plan(space(make_settings, limits={"hours": 9})).lines())


def test_workers_share_the_evaluation_and_cost_a_start(make_settings: MakeSettings) -> None:
    """Two workers evaluate half each, and a nested group takes time before its first step."""
    alone = plan(space(make_settings))
    trials = [
        t.model_copy(update={"workers": 2}) for t in planned_trials(space(make_settings), overrides={}).trials
    ]
    planned = alone.planned._replace(trials=tuple(trials))
    calibration = Calibration(((trials[0], PARTS),), process=2.0, seconds=9.0)
    group = Estimate(alone.space, Resources(slots=1, cpus=1.0, gpus=0.0, workers=2), planned, calibration)
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
        "texts": {"rows": 1500, "tokens": part, "offsets": part},
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
    values = {
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
    estimate = plan(build_settings(SearchSpace, values))
    assert [cost.steps for cost in estimate.costs] == [14, 14]
    assert estimate.costs[0].training == pytest.approx(14 * 0.1 + 2 * (20 * 0.001 + 0.05 + 0.2))
    assert estimate.costs[0].end == pytest.approx((30 * 0.001 if labelled else 0.0) + 0.3)


def settings(**values: Any) -> TrainSettings:
    """Settings of a trial with a scratch teacher of 12 layers."""
    fixed = {"data": "shards", "teacher": "scratch", "out": "run", "scratch": {"layers": 12}}
    return build_settings(TrainSettings, merge(fixed, values))


def timed(groups: Sequence[TrainSettings]) -> Calibration:
    """Calibration on an invented machine: a step takes 3 ms, and 2 ms a layer and title."""
    step = [0.003 + 0.002 * one.batch_size * (12 + one.student.layers) for one in groups]
    parts = tuple(
        Parts(5.0, 0.1, s, 0.001 * k.student.layers, 0.2, 0.1, 0.3) for s, k in zip(step, groups, strict=True)
    )
    return Calibration(tuple(zip(groups, parts, strict=True)), process=1.0, seconds=10.0)


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


def test_costs_between_are_interpolated() -> None:
    """A step's time grows with layers times titles; neither alone is enough."""
    trials = [
        settings(**{"student.layers": n, "batch_size": b}) for n in (1, 2, 3, 4, 6, 12) for b in (8, 16, 32)
    ]
    times = timed(settings_to_time(trials))
    for trial in trials:
        parts = times.parts(trial)
        assert parts.step == pytest.approx(0.003 + 0.002 * trial.batch_size * (12 + trial.student.layers))
        assert parts.row == pytest.approx(0.001 * trial.student.layers)


def test_each_categorical_value_is_timed() -> None:
    """Nothing can be interpolated between fp32 and bf16, or between two corpora."""
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
    times = Calibration(tuple(zip(chosen, parts, strict=True)), process=1.0, seconds=10.0)
    for trial, pair in zip(trials, pairs, strict=True):
        assert times.parts(trial).row == pytest.approx(0.001 * sum(pair))


def test_each_task_method_and_budget_is_timed() -> None:
    """A step of clicks costs many times one of titles, and one without a teacher less."""
    trials = [
        settings(**{"task": task, "method": method, "token_budget": budget})
        for task in ("topics", "recommendation", "retrieval")
        for method in ("newsbert", "finetune")
        for budget in (2048, 8192)
    ]
    assert len(settings_to_time(trials)) == 12


def test_histories_and_negatives_count_in_recommendation_only() -> None:
    """Each history length would be timed, also for topics, which reads no history."""
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


def test_every_part_is_timed_and_no_file_is_left(make_settings: MakeSettings, tmp_path: Path) -> None:
    """A forgotten part would be free in every plan; a leftover checkpoint would fill the disk."""
    folder = tmp_path / "calibration"
    parts = time_parts(make_settings(**{"optimizer.accumulate": 2}), folder=folder)
    assert all(seconds > 0 for name, seconds in parts._asdict().items() if name != "cold")
    assert parts.cold >= 0
    assert not folder.exists()


@pytest.mark.slow
def test_more_work_takes_longer(make_settings: MakeSettings, tmp_path: Path) -> None:
    """The estimate depends on these differences."""
    wide = {"layers": 6, "hidden": 128, "heads": 2, "feed_forward": 512}
    small = time_parts(make_settings(batch_size=8), folder=tmp_path / "a")
    large = time_parts(make_settings(batch_size=64, scratch=wide), folder=tmp_path / "b")
    assert large.step > 2 * small.step
    assert large.row > small.row


@pytest.mark.ray
def test_slots_are_timed_together_and_released(
    ray: RaySession, make_settings: MakeSettings, tmp_path: Path
) -> None:
    """Trials slow each other down: timed alone, a step is too fast; CPUs that stay reserved would block the
    sweep."""
    import ray as cluster

    resources = Resources(slots=2, cpus=1.0, gpus=0.0)
    groups = [make_settings(), make_settings(**{"student.layers": 4})]
    calibration = calibrate(groups, resources, folder=tmp_path / "calibration")
    assert [settings for settings, _ in calibration.timed] == groups
    assert all(part >= 0 for _, parts in calibration.timed for part in parts)
    assert calibration.process > 0
    assert calibration.seconds > calibration.process
    with pytest.raises(ShardError, match="no prepared shards"):
        calibrate([make_settings(data=str(tmp_path / "nowhere"))], resources, folder=tmp_path / "calibration")

    @cluster.remote(num_cpus=2)
    def whole() -> str:
        return "free"

    assert cluster.get(whole.remote(), timeout=60) == "free"
    assert not (tmp_path / "calibration" / "slot-0").exists()


WriteSpace = Callable[..., Path]


def test_an_estimate_is_compared_with_its_own_sweep_only(write_space: WriteSpace, tmp_path: Path) -> None:
    """An estimate for two trials is compared with a sweep of a hundred."""
    space = read_space(write_space())
    plan = {"of": estimate_subject(space, {}), "slots": 2, "wall": 600.0}
    (tmp_path / ESTIMATE).write_text(json.dumps(plan))
    assert (
        compare_with_estimate(tmp_path, estimate_subject(space, {}), seconds=660.0, slots=2)
        == "planned 10.0 min, took 11.0 min (+10%)"
    )
    assert compare_with_estimate(tmp_path, estimate_subject(space, {}), seconds=660.0, slots=1) == ""
    assert (
        compare_with_estimate(tmp_path, estimate_subject(space, {"epochs": 9}), seconds=660.0, slots=2) == ""
    )
    other = read_space(write_space(**{"[1, 2]": "[1]"}))
    assert compare_with_estimate(tmp_path, estimate_subject(other, {}), seconds=660.0, slots=2) == ""
    (tmp_path / ESTIMATE).write_text("{")
    assert compare_with_estimate(tmp_path, estimate_subject(space, {}), seconds=660.0, slots=2) == ""


def test_an_impossible_plan_ends_at_once(write_space: WriteSpace, shards: Path, tmp_path: Path) -> None:
    """A user waits for the timing of a sweep that then refuses to start."""
    file = write_space(nowhere=str(shards))
    with pytest.raises(SettingsError, match="epochs = 0"):
        preview(file, out=tmp_path / "sweep", overrides={"epochs": 0})
    with pytest.raises(ShardError):
        preview(write_space(), out=tmp_path / "sweep")
    with pytest.raises(SettingsError, match=r"--curves .*no trial there has reported"):
        preview(write_space(nowhere=str(shards)), out=tmp_path / "sweep", curves=tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.jpg").touch()
    with pytest.raises(SweepError, match="holds other files"):
        preview(file, out=tmp_path / "other")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_sweep_compares_itself_with_its_estimate(
    ray: RaySession,
    write_space: WriteSpace,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """plan.json blocks its own sweep, or nobody learns how wrong estimates are."""
    small = (
        f"name: planned\nsettings: {{data: {shards}, teacher: scratch, epochs: 1, batch_size: 32, "
        "student.layers: 1, model.query_size: 8, scratch: {layers: 2, hidden: 16, heads: 2, "
        "feed_forward: 32}}\n"
        "space:\n  distill.beta: {grid: [0.0, 0.2]}\nprices: {cpu_hour: 0.5}\n"
    )
    file, out = write_space(small), tmp_path / "sweep"
    estimate = preview(file, out=out)
    output = capsys.readouterr().out
    assert (len(estimate.costs), estimate.resources.slots) == (2, 2)
    assert "planned: 2 points, 2 trials, 18 steps, 2 epochs" in output
    assert sorted(path.name for path in out.iterdir()) == [".lock", "plan.json"]
    monkeypatch.setattr("newsbert_ray.reporting.report.report", lambda folders, *, out: [])
    sweep(file, out=out)
    assert "planned " in capsys.readouterr().out
