"""The trials of a sweep: seeds and their mean, resuming from records, and early stopping."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from newsbert_ray.config import SettingsError, TrainSettings, build_settings
from newsbert_ray.record import METRICS, RECORD, EarlyStop, RecordError, RunRecord, write_stop
from newsbert_ray.reporting.sweep_data import Point, Trial, read_curves, undominated
from newsbert_ray.storage.workdir import WorkDir
from newsbert_ray.tune.space_file import read_space
from newsbert_ray.tune.study import SweepStudy
from newsbert_ray.tune.trials import (
    Resources,
    Retention,
    Trials,
    metric_value,
    plan_resources,
)

WriteSpace = Callable[..., Path]
MakeTrials = Callable[..., Trials]


@pytest.fixture
def make_trials(write_space: WriteSpace, tmp_path: Path) -> MakeTrials:
    """make_trials(old=new) -> the trials of the usual space with two seeds, in tmp_path/sweep."""

    def make(**changes: str) -> Trials:
        space = read_space(write_space(**{"seeds: [0]": "seeds: [0, 1]", **changes}))
        (tmp_path / "sweep").mkdir(exist_ok=True)
        return Trials(space, SweepStudy(space, tmp_path / "sweep"), WorkDir.at(tmp_path / "sweep"))

    return make


def states(point: Point) -> dict[int, str]:
    """The state of each trial, by seed."""
    return {trial.seed: trial.state for trial in point.trials}


def values_by_seed(point: Point) -> dict[int, tuple[float, ...]]:
    """The values of each finished trial, by seed."""
    return {trial.seed: trial.values for trial in point.of_state("finished")}


def run(trials: Trials, spec: Trial, train: Any) -> None:
    """Leave the record that a trial leaves."""
    values = {"data": "nowhere", "teacher": "scratch", "out": str(trials.out(spec.name)), "seed": spec.seed}
    layers = {"layers": spec.point["student.layers"]}
    beta = {"beta": spec.point["distill.beta"]}
    settings = build_settings(TrainSettings, {**values, "student": layers, "distill": beta})
    train(settings, report=lambda entry: None, quiet=True)


def test_a_point_is_told_once_all_its_seeds_have_ended(make_trials: MakeTrials, tmp_path: Path) -> None:
    """The sampler learns from one lucky seed."""
    trials = make_trials()
    study = trials._study
    first, second = trials.next_trial(), trials.next_trial()
    assert first is not None
    assert second is not None
    assert (first.label, first.seed, second.label, second.seed) == (
        "beta=0,layers=1",
        0,
        "beta=0,layers=1",
        1,
    )
    assert trials.out(first.name) == tmp_path / "sweep" / "trials" / "beta=0,layers=1,seed=0"
    trials.finish(first, (0.1,))
    assert study.ended == []
    trials.finish(second, (0.3,))
    assert [ended.results for ended in study.ended] == [pytest.approx((0.2,))]
    result = trials.points["beta=0,layers=1"]
    assert result.means == pytest.approx((0.2,))
    summary = result.summary()
    assert summary is not None
    assert summary.sd == pytest.approx(0.1 * math.sqrt(2))
    assert (trials.total, trials.unfinished) == (8, 6)


def test_the_best_point_is_one_that_all_seeds_finished(make_trials: MakeTrials) -> None:
    """A point with one lucky seed and one failure wins the sweep."""
    for mode, best in (("max", "beta=0.2,layers=1"), ("min", "beta=0,layers=1")):
        trials = make_trials(**{"name: small": f"name: {mode}\nmode: {mode}"})
        outcomes: list[float | None] = [0.1, 0.1, 0.9, None, 0.5, 0.6, 0.3, 0.3]
        for outcome in outcomes:
            spec = trials.next_trial()
            assert spec is not None
            if outcome is None:
                trials.fail(spec, "the reason")
            else:
                trials.finish(spec, (outcome,))
        found = trials.best()
        assert found is not None
        assert found.label == best
        assert [t.reason for t in trials.points["beta=0,layers=2"].of_state("failed")] == ["the reason"]
        assert (trials.next_trial(), trials.due, trials.unfinished) == (None, 0, 0)


def test_a_trial_with_a_record_is_not_run_again(make_trials: MakeTrials, make_train: Any) -> None:
    """A resume repeats what has finished, or forgets it."""
    train = make_train()
    trials = make_trials()
    handed = [trials.next_trial() for _ in range(3)]
    for spec in handed[1:]:
        assert spec is not None
        run(trials, spec, train)
    again = make_trials()
    names = []
    while (spec := again.next_trial()) is not None:
        names.append(spec.name)
        run(trials, spec, train)
        again.finish(spec, (0.5,))
    assert handed[0] is not None
    assert names[0] == handed[0].name
    assert len(names) == 6
    assert again.resumed == 2
    assert values_by_seed(again.points["beta=0,layers=1"]) == {0: (0.5,), 1: pytest.approx((0.61,))}
    last = make_trials()
    last.collect()
    assert (last.due, last.resumed) == (0, 8)


@pytest.mark.parametrize("damage", ["half a record", "no number"])
def test_a_damaged_record_is_renamed_and_its_trial_run_again(
    damage: str, make_trials: MakeTrials, make_train: Any
) -> None:
    """One bad file ends every resume of a long sweep, or its trial is lost."""
    trials = make_trials()
    done = []
    while (spec := trials.next_trial()) is not None:
        run(trials, spec, make_train())
        trials.finish(spec, (0.5,))
        done.append(spec)
    path = trials.out(done[3].name) / RECORD
    text = path.read_text()
    path.write_text(text[:100] if damage == "half a record" else text.replace('"accuracy"', '"other"'))
    again = make_trials()
    again.collect()
    assert again.resumed == 3
    spec = again.next_trial()
    assert spec == done[3]
    assert not path.exists()
    assert (trials.out(done[3].name) / "record.json.damaged").exists()
    run(trials, spec, make_train())
    again.finish(spec, (0.5,))
    assert again.next_trial() is None
    assert (again.unfinished, again.resumed) == (0, 7)
    assert [point.state for point in again.points.values()] == ["finished"] * 4


def test_a_point_drawn_twice_runs_once_and_counts_twice(make_trials: MakeTrials) -> None:
    """Two trials write into one folder at the same time."""
    trials = make_trials(
        **{
            "distill.beta: {grid: [0.0, 0.2]}": "distill.beta: {grid: [0.1]}",
            "name: small": "name: again\nsearch: {sampler: random, trials: 6}",
        }
    )
    names = []
    while (spec := trials.next_trial()) is not None:
        names.append(spec.name)
        trials.finish(spec, (0.5,))
    assert len(names) == len(set(names)) <= 4
    assert len(trials._study.ended) == 6
    assert trials.unfinished == 0


EARLY = EarlyStop(epoch=1.0, value=0.3, seconds=4.0, reason="asha")


def test_a_stopped_point_is_not_run_with_other_seeds(make_trials: MakeTrials) -> None:
    """Money is spent on further seeds of a point that was stopped; or a resume runs them."""
    trials = make_trials()
    first = trials.next_trial()
    assert first is not None
    write_stop(trials.out(first.name), EARLY)
    trials.stop(first, EARLY)
    result = trials.points[first.label]
    assert states(result) == {0: "stopped", 1: "skipped"}
    assert (trials.total, trials.unfinished) == (8, 6)
    (ended,) = trials._study.ended
    assert (ended.stopped, ended.results) == (True, (0.3,))
    following = trials.next_trial()
    assert following is not None
    assert following.label != first.label
    again = make_trials()
    again.collect()
    assert states(again.points[first.label]) == {0: "stopped", 1: "skipped"}
    assert (again.resumed, again.unfinished) == (1, 6)
    assert again.next_trial() == following
    assert again.seconds == {first.name: 4.0}


def test_a_finished_seed_counts_although_another_was_stopped(
    make_trials: MakeTrials, make_train: Any
) -> None:
    """Killed between the two ends, a resume forgets the seed that was trained to its end."""
    trials = make_trials()
    first, second = trials.next_trial(), trials.next_trial()
    assert first is not None
    assert second is not None
    write_stop(trials.out(first.name), EARLY)
    run(trials, second, make_train())
    again = make_trials()
    again.collect()
    result = again.points[first.label]
    assert states(result) == {0: "stopped", 1: "finished"}
    assert result.means == pytest.approx((0.61,))
    assert [ended.stopped for ended in again._study.ended] == [True]


def test_the_study_gets_the_mean_curve(make_trials: MakeTrials) -> None:
    """The sampler treats a point stopped at its first epoch like one that was trained to its end."""
    trials = make_trials()
    first, second = trials.next_trial(), trials.next_trial()
    assert first is not None
    assert second is not None
    for spec, values in ((first, [0.1, 0.5]), (second, [0.3, 0.7])):
        trials.out(spec.name).mkdir(parents=True)
        lines = [
            {"kind": "evaluation", "epoch": float(n), "validation": {"student": {"accuracy": value}}}
            for n, value in enumerate(values, 1)
        ]
        (trials.out(spec.name) / METRICS).write_text(
            "".join(json.dumps(line) + "\n" for line in [{"kind": "log"}, *lines])
        )
    trials.finish(first, (0.5,))
    trials.finish(second, (0.7,))
    (trial,) = [trial for trial in trials._study._study.trials if trial.state.is_finished()]
    assert trial.intermediate_values == {1: pytest.approx(0.2), 2: pytest.approx(0.6)}
    assert read_curves(trials.folder, trials.space.metric) == {
        first.name: [(1.0, 0.1), (2.0, 0.5)],
        second.name: [(1.0, 0.3), (2.0, 0.7)],
    }


def test_a_stack_trace_is_removed_once_the_trial_succeeds(make_trials: MakeTrials) -> None:
    """A person looks for the fault of a trial that has been fixed."""
    trials = make_trials()
    trial = trials.next_trial()
    assert trial is not None
    note = trials.folder / "failures" / f"{trial.name}.txt"
    note.parent.mkdir()
    note.write_text("Traceback")
    trials.finish(trial, (0.5,))
    assert not note.exists()


def test_no_trial_starts_once_the_sweep_is_ending(make_trials: MakeTrials) -> None:
    """A sweep spends more than its limit; or a resume loses what is left."""
    trials = make_trials()
    first = trials.next_trial()
    assert first is not None
    trials.put_back(first)
    trials.end_reason = "a limit"
    assert trials.next_trial() is None
    trials.end_reason = ""
    assert trials.next_trial() == first


def test_the_value_comes_from_the_record(make_record: Callable[..., RunRecord]) -> None:
    """A sweep compares other numbers than its table shows."""
    record = make_record(accuracy=0.5, macro_f1=math.nan)
    assert metric_value(record, "validation.student.accuracy") == 0.5
    for missing in ("validation.student.macro_f1", "validation.teacher.recall", "validation.student"):
        with pytest.raises(RecordError, match=f"no finite number {missing}"):
            metric_value(record, missing)


def test_the_pareto_front_holds_what_nothing_dominates() -> None:
    """A slower and worse student is on the front, or one of two equals is missing."""
    assert undominated([(1.0, 5.0), (2.0, 4.0), (0.5, 4.5), (2.0, 3.0), (1.0, 5.0)]) == [0, 1, 4]


@pytest.mark.parametrize(
    ("nodes", "values", "concurrency", "trials", "expected"),
    [
        ([(8, 0)], {}, None, 100, (8, 1, 0)),
        ([(8, 0)], {}, 3, 100, (3, 1, 0)),
        ([(8, 0)], {}, 30, 100, (8, 1, 0)),
        ([(8, 0)], {}, None, 5, (5, 1, 0)),
        ([(8, 0)], {"threads": 3}, None, 100, (2, 3, 0)),
        ([(0, 0), (4, 0), (7, 0)], {"threads": 3}, None, 100, (3, 3, 0)),
        ([(4, 0), (2, 0)], {"threads": 4}, None, 100, (1, 4, 0)),
        ([(16, 1)], {}, None, 100, (4, 1, 0.25)),
        ([(16, 1)], {}, 8, 100, (8, 1, 0.125)),
        ([(8, 2), (8, 2)], {}, 2, 100, (2, 1, 1)),
        ([(64, 0), (2, 1)], {}, None, 100, (2, 1, 0.5)),
        ([(16, 1)], {"device": "cpu"}, None, 100, (16, 1, 0)),
        ([(5, 0), (2, 0)], {"workers": 2}, None, 100, (3, 1, 0)),
        ([(5, 0), (3, 0)], {"workers": 2, "threads": 2}, None, 100, (1, 2, 0)),
        ([(8, 4)], {"workers": 2}, None, 100, (2, 1, 1)),
    ],
)
def test_trials_at_once_follow_the_resources(
    nodes: list[tuple[int, int]],
    values: dict[str, Any],
    concurrency: int | None,
    trials: int,
    expected: tuple[float, ...],
) -> None:
    """Trials wait for ever for resources that do not exist, or leave the machine idle."""
    resources = plan_resources(settings_with(values), cluster(*nodes), trials=trials, concurrency=concurrency)
    assert (resources.slots, resources.cpus, resources.gpus) == expected


@pytest.mark.parametrize(
    ("nodes", "values", "message"),
    [
        ([(2, 0)], {"threads": 4}, "needs 4 CPUs of one node, and Ray's largest node has 2"),
        ([(4, 0), (4, 0)], {"threads": 8}, "needs 8 CPUs of one node, and Ray's largest node has 4"),
        ([(8, 0), (4, 1)], {"threads": 8}, "largest node with a GPU has 4"),
        ([(0, 0)], {}, "largest node has 0"),
        ([(2, 0)], {"device": "cuda"}, "Ray has no GPU"),
        ([(2, 0)], {"workers": 3}, "workers = 3: each needs 1 CPUs of one node, and 2 fit"),
        ([(8, 1)], {"workers": 2}, "workers = 2: each needs 1 CPUs and 1 GPUs of one node, and 1 fit"),
    ],
)
def test_a_trial_that_does_not_fit_is_refused_at_once(
    nodes: list[tuple[int, int]], values: dict[str, Any], message: str
) -> None:
    """Ray would wait for ever for a larger machine."""
    with pytest.raises(SettingsError, match=message):
        plan_resources(settings_with(values), cluster(*nodes), trials=1, concurrency=None)


@pytest.mark.parametrize(
    ("nodes", "gpus", "concurrency", "expected"),
    [
        ([(16, 1)], 0.25, None, (4, 0.25)),
        ([(16, 1)], 0.3, None, (3, 0.3)),
        ([(2, 1)], 0.25, None, (2, 0.25)),
        ([(16, 2)], 1.0, None, (2, 1.0)),
        ([(16, 2)], 2.0, 8, (1, 2.0)),
    ],
)
def test_the_gpu_share_is_the_requested_one(
    nodes: list[tuple[int, int]], gpus: float, concurrency: int | None, expected: tuple[float, ...]
) -> None:
    """Five trials share a GPU that holds four, and all die for lack of memory."""
    resources = plan_resources(
        settings_with({}), cluster(*nodes), trials=100, concurrency=concurrency, gpus=gpus
    )
    assert (resources.slots, resources.gpus) == expected


def test_a_gpu_share_without_gpus_is_refused() -> None:
    """Trials priced for a GPU run for days on a CPU."""
    with pytest.raises(SettingsError, match=r"gpus = 0.25: Ray has no GPU"):
        plan_resources(settings_with({}), cluster((8, 0)), trials=1, gpus=0.25)


def test_a_groups_driver_holds_no_cpu() -> None:
    """Drivers hold all CPUs and their workers wait for ever."""
    resources = plan_resources(settings_with({"workers": 2}), cluster((4, 0)), trials=9)
    assert (resources.nested, resources.slots, resources.tune_request["CPU"]) == (True, 2, 0)


def settings_with(values: dict[str, Any]) -> TrainSettings:
    """Settings of a trial."""
    return build_settings(TrainSettings, {"data": "d", "teacher": "scratch", "out": "o", **values})


def cluster(*nodes: tuple[int, int]) -> list[dict[str, float]]:
    """Nodes of so many CPUs and GPUs, as Ray describes them."""
    return [{"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {}) for cpus, gpus in nodes]


def test_checkpoints_are_removed_and_the_best_students_are_kept(
    write_space: Callable[..., Path], tmp_path: Path
) -> None:
    """A sweep of hundreds of trials fills the disk; or the best model is the one that was removed."""
    space = read_space(write_space(**{"seeds: [0]": "seeds: [0]\nkeep_students: 2"}))
    trials = Trials(space, SweepStudy(space, tmp_path), WorkDir.at(tmp_path))
    keeper = Retention(trials, Resources(slots=2, cpus=1.0, gpus=0.0), checkpoints=1)
    folders = []
    for value in (0.2, 0.4, 0.1, 0.3):
        spec = trials.next_trial()
        assert spec is not None
        for name, size in (("checkpoints/step-1", 3000), ("checkpoints/best-1", 1000), ("student", 500)):
            (trials.out(spec.name) / name).mkdir(parents=True)
            (trials.out(spec.name) / name / "weights").write_bytes(bytes(size))
        keeper.reported(spec.name)
        trials.finish(spec, (value,))
        keeper.ended(spec.name)
        folders.append(trials.out(spec.name))
    assert [(folder / "student").exists() for folder in folders] == [False, True, False, True]
    assert not any((folder / "checkpoints").exists() for folder in folders)
    assert keeper.line() == (
        "disk: 2 students kept, 1.0 kB (keep_students: 2); checkpoints 0 B now, at most 16.0 kB during the "
        "sweep (2 trials at once)"
    )
