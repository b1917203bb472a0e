"""The peers that are installed compute what we do, and a program that fails says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from newsbert_ray.data.reading import World, make_schedule, read_updates
from newsbert_ray.data.shards import read_manifest
from newsbert_ray.training.step import train_step
from newsbert_ray.training.worker import build_worker_learner
from tests.benchmarks.bench_peers import JOBS, NO_NEWS, OURS, Program, shuffled, step_figures
from tests.benchmarks.peers import Given, distilled

SCRATCH = {"layers": 2, "hidden": 16, "heads": 2, "feed_forward": 32}


@pytest.fixture(scope="module")
def given(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Given:
    values = {
        "data": str(shards), "teacher": "scratch", "scratch": SCRATCH, "model.query_size": 8,
        "student.layers": 1, "batch_size": 8, "threads": 1,
    }  # fmt: skip
    return Given.make(values, tmp_path_factory.mktemp("peers"), batches=2)


@pytest.mark.parametrize("job", JOBS)
def test_programs_with_the_same_mathematics_learn_the_same(given: Given, job: str) -> None:
    """A peer that does less, or something else, would be compared unfairly."""
    found = dict(step_figures(job, given, rounds=2))
    assert found[OURS]["times_slower"] == 1.0
    for name, figures in found.items():
        assert figures["titles_per_second"] > 0
        if job != "embeddings" and not figures["differs"]:
            assert figures["loss_after"] == pytest.approx(found[OURS]["loss_after"], rel=1e-5), name


@pytest.mark.parametrize("method", ["newsbert", "disjoint"])
def test_the_trainer_s_loss_is_ours(given: Given, method: str) -> None:
    """Also where no peer is installed."""
    joint = method == "newsbert"
    settings = given.settings(method, **({} if joint else NO_NEWS))
    schedule = make_schedule(settings, read_manifest(settings.data))
    learner = build_worker_learner(settings, schedule, World())
    total = train_step(learner, next(read_updates(schedule)).parts, step=1)["total"]
    teacher, student = given.models(joint=joint)
    batch = given.batches[0]
    with torch.no_grad():
        theirs = distilled(student(**batch), teacher(**batch), batch, given.matches, joint=joint)
    assert float(theirs) == pytest.approx(float(total), rel=1e-6)


def test_random_batches_hold_the_same_titles(given: Given) -> None:
    """Each token and label once, and padding only after the longest title."""
    other = shuffled(given)
    for name in ("attention_mask", "labels"):
        assert sum(int(b[name].sum()) for b in other.batches) == sum(
            int(b[name].sum()) for b in given.batches
        )
    for batch in other.batches:
        assert batch["input_ids"].shape[1] == int(batch["attention_mask"].sum(1).max())


def test_a_program_that_fails_is_not_waited_for() -> None:
    """Its thread would end, and the benchmark wait for ever."""

    def loop(wait: object) -> None:
        raise ValueError("no such layer")

    with pytest.raises(ValueError, match="no such layer"):
        Program(loop)
