"""The trials of a sweep: every seed of every point, judged by the mean; records are the truth."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from newsbert_ray.config import TrainSettings, build_settings
from newsbert_ray.record import METRICS, RECORD, EarlyStop, RunRecord, write_stop
from newsbert_ray.tune.space_file import read_space
from newsbert_ray.tune.study import Memory
from newsbert_ray.tune.trials import Job, Jobs, MetricError, metric_value

WriteSpace = Callable[..., Path]
MakeJobs = Callable[..., Jobs]


@pytest.fixture
def make_jobs(write_space: WriteSpace, tmp_path: Path) -> MakeJobs:
    """make_jobs(old=new) -> the trials of the usual space with two seeds, in tmp_path/sweep."""

    def make(**changes: str) -> Jobs:
        space = read_space(write_space(**{"seeds: [0]": "seeds: [0, 1]", **changes}))
        (tmp_path / "sweep").mkdir(exist_ok=True)
        return Jobs(space, Memory(space, tmp_path / "sweep"), tmp_path / "sweep")

    return make


def run(job: Job, train: Any) -> None:
    """Leave the record that a trial leaves."""
    values = {"data": "nowhere", "teacher": "scratch", "out": str(job.out), "seed": job.seed}
    layers = {"layers": job.point["student.layers"]}
    beta = {"beta": job.point["distill.beta"]}
    settings = build_settings(TrainSettings, {**values, "student": layers, "distill": beta})
    train(settings, report=lambda entry: None, quiet=True)


def test_a_point_is_told_once_all_its_seeds_have_ended(make_jobs: MakeJobs, tmp_path: Path) -> None:
    """The sampler learns from one lucky seed."""
    jobs = make_jobs()
    memory = jobs._memory
    first, second = jobs.next_job(), jobs.next_job()
    assert first is not None
    assert second is not None
    assert (first.label, first.seed, second.label, second.seed) == (
        "beta=0,layers=1",
        0,
        "beta=0,layers=1",
        1,
    )
    assert first.out == tmp_path / "sweep" / "trials" / "beta=0,layers=1,seed=0"
    jobs.finish(first, values=(0.1,))
    assert memory.ended == []
    jobs.finish(second, values=(0.3,))
    assert [ended.values for ended in memory.ended] == [pytest.approx((0.2,))]
    result = jobs.results["beta=0,layers=1"]
    assert result.mean == pytest.approx(0.2)
    assert result.sd == pytest.approx(0.1 * math.sqrt(2))
    assert (jobs.total, jobs.unfinished) == (8, 6)


def test_the_best_point_is_one_that_all_seeds_finished(make_jobs: MakeJobs) -> None:
    """A point with one lucky seed and one failure wins the sweep."""
    for mode, best in (("max", "beta=0.2,layers=1"), ("min", "beta=0,layers=1")):
        jobs = make_jobs(**{"name: small": f"name: {mode}\nmode: {mode}"})
        outcomes: list[float | None] = [0.1, 0.1, 0.9, None, 0.5, 0.6, 0.3, 0.3]
        for outcome in outcomes:
            job = jobs.next_job()
            assert job is not None
            jobs.finish(job, values=None if outcome is None else (outcome,), failure="the reason")
        found = jobs.best()
        assert found is not None
        assert found.label == best
        assert jobs.results["beta=0,layers=2"].failures == {1: "the reason"}
        assert (jobs.next_job(), jobs.exhausted, jobs.unfinished) == (None, True, 0)


def test_a_trial_with_a_record_is_not_run_again(make_jobs: MakeJobs, make_train: Any) -> None:
    """A resume repeats what has finished, or forgets it."""
    train = make_train()
    jobs = make_jobs()
    handed = [jobs.next_job() for _ in range(3)]
    for job in handed[1:]:
        assert job is not None
        run(job, train)
    again = make_jobs()
    names = []
    while (job := again.next_job()) is not None:
        names.append(job.name)
        run(job, train)
        again.finish(job, values=(0.5,))
    assert handed[0] is not None
    assert names[0] == handed[0].name
    assert len(names) == 6
    assert again.found == 2
    assert again.results["beta=0,layers=1"].values == {0: (0.5,), 1: pytest.approx((0.61,))}
    last = make_jobs()
    last.settle()
    assert (last.due, last.found) == (0, 8)


@pytest.mark.parametrize("damage", ["half a record", "no number"])
def test_a_damaged_record_is_put_aside_and_its_trial_run_again(
    damage: str, make_jobs: MakeJobs, make_train: Any
) -> None:
    """One bad file ends every resume of a sweep of days, or leaves a hole that nothing can fill."""
    jobs = make_jobs()
    done = []
    while (job := jobs.next_job()) is not None:
        run(job, make_train())
        jobs.finish(job, values=(0.5,))
        done.append(job)
    path = done[3].out / RECORD
    text = path.read_text()
    path.write_text(text[:100] if damage == "half a record" else text.replace('"accuracy"', '"other"'))
    again = make_jobs()
    again.settle()
    assert again.found == 3
    job = again.next_job()
    assert job == done[3]
    assert not path.exists()
    assert (done[3].out / "record.json.damaged").exists()
    run(job, make_train())
    again.finish(job, values=(0.5,))
    assert again.next_job() is None
    assert (again.unfinished, again.found) == (0, 7)
    assert [result.failures for result in again.results.values()] == [{}] * 4


def test_a_point_that_the_sampler_chooses_again_is_run_once_and_counts_twice(make_jobs: MakeJobs) -> None:
    """Two trials write into one folder at the same time."""
    jobs = make_jobs(
        **{
            "distill.beta: {grid: [0.0, 0.2]}": "distill.beta: {grid: [0.1]}",
            "name: small": "name: again\nsearch: {sampler: random, trials: 6}",
        }
    )
    names = []
    while (job := jobs.next_job()) is not None:
        names.append(job.name)
        jobs.finish(job, values=(0.5,))
    assert len(names) == len(set(names)) <= 4
    assert len(jobs._memory.ended) == 6
    assert jobs.unfinished == 0


EARLY = EarlyStop(epoch=1.0, value=0.3, seconds=4.0, reason="asha")


def test_a_point_that_lost_early_is_not_tried_with_other_seeds(make_jobs: MakeJobs) -> None:
    """Money goes into the further seeds of a point that the scheduler has given up; or a resume runs them."""
    jobs = make_jobs()
    first = jobs.next_job()
    assert first is not None
    write_stop(first.out, EARLY)
    jobs.stop(first, EARLY)
    result = jobs.results[first.label]
    assert (result.stops, result.skipped, result.values) == ({0: EARLY}, {1}, {})
    assert (jobs.total, jobs.unfinished) == (8, 6)
    (ended,) = jobs._memory.ended
    assert (ended.stopped, ended.values) == (True, (0.3,))
    following = jobs.next_job()
    assert following is not None
    assert following.label != first.label
    again = make_jobs()
    again.settle()
    assert again.results[first.label].stops == {0: EARLY}
    assert again.results[first.label].skipped == {1}
    assert (again.found, again.unfinished) == (1, 6)
    assert again.next_job() == following
    assert again.seconds == {first.name: 4.0}


def test_a_seed_that_had_finished_counts_although_another_was_stopped(
    make_jobs: MakeJobs, make_train: Any
) -> None:
    """Killed between the two ends, a resume forgets the seed that was trained to its end."""
    jobs = make_jobs()
    first, second = jobs.next_job(), jobs.next_job()
    assert first is not None
    assert second is not None
    write_stop(first.out, EARLY)
    run(second, make_train())
    again = make_jobs()
    again.settle()
    result = again.results[first.label]
    assert (result.stops, result.skipped) == ({0: EARLY}, set())
    assert result.values == {1: pytest.approx((0.61,))}
    assert [ended.stopped for ended in again._memory.ended] == [True]


def test_the_memory_is_told_the_mean_curve(make_jobs: MakeJobs) -> None:
    """The sampler takes a point that was stopped at its first epoch for as good as one that was trained."""
    jobs = make_jobs()
    first, second = jobs.next_job(), jobs.next_job()
    assert first is not None
    assert second is not None
    for job, values in ((first, [0.1, 0.5]), (second, [0.3, 0.7])):
        job.out.mkdir(parents=True)
        lines = [
            {"kind": "evaluation", "epoch": float(n), "validation": {"student": {"accuracy": value}}}
            for n, value in enumerate(values, 1)
        ]
        (job.out / METRICS).write_text("".join(json.dumps(line) + "\n" for line in [{"kind": "log"}, *lines]))
    jobs.finish(first, values=(0.5,))
    jobs.finish(second, values=(0.7,))
    (trial,) = [trial for trial in jobs._memory._study.trials if trial.state.is_finished()]
    assert trial.intermediate_values == {1: pytest.approx(0.2), 2: pytest.approx(0.6)}
    assert dict(jobs.curves()) == {
        first.name: [(1.0, 0.1), (2.0, 0.5)],
        second.name: [(1.0, 0.3), (2.0, 0.7)],
    }


def test_nothing_more_is_handed_out_once_the_sweep_is_closed(make_jobs: MakeJobs) -> None:
    """A sweep goes on spending past its limit; or what is left is lost to a resume."""
    jobs = make_jobs()
    first = jobs.next_job()
    assert first is not None
    jobs.put_back(first)
    jobs.closed = "a limit"
    assert jobs.next_job() is None
    jobs.closed = ""
    assert jobs.next_job() == first


def test_the_value_is_the_records(make_record: Callable[..., RunRecord]) -> None:
    """A sweep judges by another number than its table shows, or by none."""
    record = make_record(accuracy=0.5, macro_f1=math.nan)
    assert metric_value(record, "validation.student.accuracy") == 0.5
    for missing in ("validation.student.macro_f1", "validation.teacher.recall", "validation.student"):
        with pytest.raises(MetricError, match=f"{missing} = .*expected a finite number"):
            metric_value(record, missing)
