"""The trials of a sweep: seeds and their mean, resuming from records, and early stopping."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from newsbert_ray.config import TrainSettings, build_settings
from newsbert_ray.files import write_text
from newsbert_ray.record import METRICS, RECORD, EarlyStop, RecordError, RunRecord, write_stop
from newsbert_ray.reporting.sweep_data import Axis, Point, undominated
from newsbert_ray.storage.workdir import WorkDir
from newsbert_ray.tune.space import Search, SearchSpace, Stopping
from newsbert_ray.tune.space_file import read_space
from newsbert_ray.tune.study import SweepStudy
from newsbert_ray.tune.trials import (
    EarlyStopping,
    Trials,
    TrialSpec,
    estimate_saving,
    metric_value,
    read_curves,
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


def run(spec: TrialSpec, train: Any) -> None:
    """Leave the record that a trial leaves."""
    values = {"data": "nowhere", "teacher": "scratch", "out": str(spec.out), "seed": spec.seed}
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
    assert first.out == tmp_path / "sweep" / "trials" / "beta=0,layers=1,seed=0"
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
        run(spec, train)
    again = make_trials()
    names = []
    while (spec := again.next_trial()) is not None:
        names.append(spec.name)
        run(spec, train)
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
        run(spec, make_train())
        trials.finish(spec, (0.5,))
        done.append(spec)
    path = done[3].out / RECORD
    text = path.read_text()
    path.write_text(text[:100] if damage == "half a record" else text.replace('"accuracy"', '"other"'))
    again = make_trials()
    again.collect()
    assert again.resumed == 3
    spec = again.next_trial()
    assert spec == done[3]
    assert not path.exists()
    assert (done[3].out / "record.json.damaged").exists()
    run(spec, make_train())
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
    write_stop(first.out, EARLY)
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
    write_stop(first.out, EARLY)
    run(second, make_train())
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
        spec.out.mkdir(parents=True)
        lines = [
            {"kind": "evaluation", "epoch": float(n), "validation": {"student": {"accuracy": value}}}
            for n, value in enumerate(values, 1)
        ]
        (spec.out / METRICS).write_text(
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


METRIC = "validation.student.accuracy"


@pytest.fixture
def make_space(write_space: WriteSpace) -> Callable[[str], SearchSpace]:
    """A space of twelve points over beta with the given `stopping:`."""

    def make(stopping: str) -> SearchSpace:
        text = (
            "name: early\nsettings: {data: nowhere, teacher: scratch, epochs: 9}\n"
            "space:\n  distill.beta: {float: [0.0, 0.3]}\n"
            f"search: {{trials: 12}}\nstopping: {stopping}\n"
        )
        return read_space(write_space(text))

    return make


def ends(early: EarlyStopping, values: list[float], *, epochs: int = 9) -> list[int]:
    """At which epoch each of several trials ends, one after the other; each has its value at every epoch."""
    return [
        next(
            (
                epoch
                for epoch in range(1, epochs + 1)
                if early.should_stop(str(number), {"epoch": float(epoch), METRIC: value}, epochs=epochs)
            ),
            epochs,
        )
        for number, value in enumerate(values)
    ]


def test_asha_continues_one_trial_in_three(make_space: Callable[[str], SearchSpace]) -> None:
    """Every trial is trained to its end, or a good one is stopped.

    By hand, rungs at 1, 3 and 9: a trial continues where it is not below the upper third (numpy's linear
    percentile 66.7) of those that have reached the rung before it.
    """
    early = EarlyStopping(make_space("{scheduler: asha, grace: 1, factor: 3}"), epochs=9)
    assert ends(early, [0.5, 0.4, 0.6, 0.55, 0.7, 0.1]) == [9, 1, 9, 3, 9, 1]


def test_the_last_epoch_is_never_an_early_end(make_space: Callable[[str], SearchSpace]) -> None:
    """A trial that is paid for ends without a record because its last rung is not its best."""
    early = EarlyStopping(make_space("{scheduler: asha, grace: 1, factor: 3}"), epochs=1)
    assert not any(
        early.should_stop(str(n), {"epoch": 1.0, METRIC: value}, epochs=1)
        for n, value in enumerate([0.9, 0.1])
    )


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_a_resume_decides_like_an_uninterrupted_sweep(
    kind: str, make_space: Callable[[str], SearchSpace]
) -> None:
    """After a kill all start with empty rungs: bad trials continue, and a stopped one's rung is lost."""
    space = make_space(f"{{scheduler: {kind}, grace: 1}}")
    values = [0.5, 0.4, 0.6, 0.55, 0.7, 0.1, 0.65, 0.3]
    whole = ends(EarlyStopping(space, epochs=9), values)
    early, again = EarlyStopping(space, epochs=9), EarlyStopping(space, epochs=9)
    before = ends(early, values[:5])
    for number, (value, last) in enumerate(zip(values[:5], before, strict=True)):
        again.load_curve(str(number), [(float(epoch), value) for epoch in range(1, last + 1)])
    after = [
        next(
            (e for e in range(1, 10) if again.should_stop(str(n), {"epoch": float(e), METRIC: v}, epochs=9)),
            9,
        )
        for n, v in list(enumerate(values))[5:]
    ]
    assert before + after == whole
    assert 1 in whole
    assert 9 in whole


def test_the_median_rule_compares_with_earlier_trials(make_space: Callable[[str], SearchSpace]) -> None:
    """The worst trial runs to its end, or the rule pauses a trial, which Tune could not resume."""
    early = EarlyStopping(make_space("{scheduler: median, grace: 2}"), epochs=9)
    assert ends(early, [0.5, 0.6, 0.7, 0.4, 0.65]) == [9, 9, 9, 2, 9]


def test_reports_without_the_metric_end_nothing(make_space: Callable[[str], SearchSpace]) -> None:
    """A trial's last report, which holds its value alone, ends the sweep with a KeyError."""
    for kind in ("asha", "median"):
        early = EarlyStopping(make_space(f"{{scheduler: {kind}}}"), epochs=9)
        assert not early.should_stop("a", {"value": 0.1}, epochs=9)


def test_without_a_scheduler_nothing_is_stopped(make_space: Callable[[str], SearchSpace]) -> None:
    """A grid for a figure misses points."""
    early = EarlyStopping(make_space("{scheduler: none}"), epochs=9)
    assert ends(early, [0.9, 0.1]) == [9, 9]


def space(scheduler: str, **stopping: int) -> SearchSpace:
    """A search of 30 points with this early stopping."""
    return SearchSpace(
        file="space.yaml",
        name="saving",
        axes=(Axis(name="distill.beta", low=0.0, high=0.3),),
        search=Search(sampler="random", trials=30),
        stopping=Stopping.model_validate({"scheduler": scheduler, **stopping}),
    )


def test_without_early_stopping_nothing_is_saved() -> None:
    """A plan must not promise a saving that does not exist."""
    saving = estimate_saving(space("none"), [4] * 30, slots=2)
    assert (saving.epochs, saving.finished) == (1.0, 1.0)


def test_asha_saves_what_its_rungs_stop() -> None:
    """With ranks that never change, about one in three continues from each rung (1 and 3 of 9
    epochs), more while the rungs are still empty."""
    saving = estimate_saving(space("asha"), [9] * 300, slots=1)
    ideal = (1 + (1 / 3) * 2 + (1 / 9) * 6) / 9
    assert ideal < saving.epochs < 1.25 * ideal
    assert 1 / 9 < saving.finished < 0.2
    assert "assuming" in saving.source


def test_recorded_curves_decide_the_saving() -> None:
    """Curves that cross cost more than those that do not: the saving must be based on what was recorded."""
    calm = [[(float(e), 0.01 * i) for e in range(1, 10)] for i in range(30)]
    assert estimate_saving(space("asha"), [9] * 30, slots=1, curves=calm).epochs < 0.5
    rising = [[(float(e), e + 0.01 * i) for e in range(1, 10)] for i in range(30)]
    saving = estimate_saving(space("median", grace=1), [9] * 30, slots=30, curves=rising)
    assert 0.5 < saving.epochs < 1.0
    assert "30 recorded curves" in saving.source


def test_curves_of_an_earlier_sweep_are_read(tmp_path: Path) -> None:
    """Without the curves of stopped trials, only winners would be simulated."""
    line = '{"kind": "evaluation", "epoch": 1.0, "validation": {"student": {"accuracy": 0.5}}}\n'
    write_text(tmp_path / "trials" / "a" / METRICS, line)
    write_text(tmp_path / "trials" / "b" / METRICS, line + '{"kind": "log", "epoch": 2}\n')
    write_text(tmp_path / "trials" / "c" / METRICS, "")
    curves = list(read_curves(tmp_path, "validation.student.accuracy").values())
    assert curves == [[(1.0, 0.5)], [(1.0, 0.5)]]
    saving = estimate_saving(space("asha"), [4] * 6, slots=2, curves=curves)
    assert saving.epochs == pytest.approx(1.0)  # equal curves: no trial is worse than the rung
