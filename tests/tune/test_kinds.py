"""Which trials are timed, and the times of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from newsbert_ray.config import TrainSettings, build_settings, merge
from newsbert_ray.tune.estimate import Calibration, Parts, Times, kinds_to_time


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


def test_settings_that_leave_the_work_alone_are_timed_once() -> None:
    """A grid over beta and rates would otherwise be calibrated for longer than it runs."""
    trials = [
        settings(**{"distill.beta": beta, "learning_rate": rate, "seed": seed, "epochs": epochs})
        for beta in (0.0, 0.2)
        for rate in (1e-4, 1e-3)
        for seed in (0, 1)
        for epochs in (1, 5)
    ]
    assert len(kinds_to_time(trials)) == 1


def test_only_the_ends_of_long_lists_are_timed() -> None:
    """Calibration has to stay short for the wide searches, which need it most."""
    trials = [
        settings(**{"student.layers": n, "batch_size": b}) for n in (1, 2, 3, 4, 6, 12) for b in (8, 16, 32)
    ]
    chosen = [(kind.student.layers, kind.batch_size) for kind in kinds_to_time(trials)]
    assert sorted(chosen) == [(1, 8), (1, 32), (12, 8), (12, 32)]


def test_what_lies_between_is_interpolated() -> None:
    """A step's time grows with layers times titles: neither alone would do."""
    trials = [
        settings(**{"student.layers": n, "batch_size": b}) for n in (1, 2, 3, 4, 6, 12) for b in (8, 16, 32)
    ]
    times = timed(kinds_to_time(trials))
    for trial in trials:
        parts = times.parts(trial)
        assert parts.step == pytest.approx(0.003 + 0.002 * trial.batch_size * (12 + trial.student.layers))
        assert parts.title == pytest.approx(0.001 * trial.student.layers)


def test_words_are_timed_each() -> None:
    """There is nothing between fp32 and bf16, nor between two corpora."""
    trials = [
        settings(**{"precision": p, "data": d, "student.layers": n, "model.dropout": drop})
        for p in ("fp32", "bf16")
        for d in ("small", "large")
        for n in (1, 2, 3)
        for drop in (0.1, 0.2)
    ]
    chosen = kinds_to_time(trials)
    assert len(chosen) == 2 * 2 * 2
    assert {(c.precision, c.data) for c in chosen} == {(t.precision, t.data) for t in trials}


def test_a_corner_that_cannot_be_gives_way_to_a_neighbour() -> None:
    """Depths have to divide: 4 teacher layers and 6 student layers do not, and must not end the plan."""
    pairs = [(4, 1), (4, 2), (4, 4), (6, 1), (6, 2), (6, 3), (6, 6)]
    trials = [settings(**{"model.teacher_layers": t, "student.layers": s}) for t, s in pairs]
    chosen = kinds_to_time(trials)
    assert {(c.model.teacher_layers, c.student.layers) for c in chosen} <= {*pairs}
    times = timed(chosen)
    for trial in trials:
        assert times.parts(trial).title == pytest.approx(0.001 * trial.student.layers)


def test_many_growing_settings_are_varied_one_at_a_time() -> None:
    """All corners of four settings are sixteen calibrations."""
    trials = [
        settings(**{"student.layers": n, "batch_size": b, "optimizer.accumulate": a, "model.query_size": q})
        for n in (1, 2, 3)
        for b in (8, 16, 32)
        for a in (1, 2, 4)
        for q in (64, 128, 256)
    ]
    chosen = kinds_to_time(trials)
    assert len(chosen) == 5
    assert timed(chosen).parts(trials[-1]).title == pytest.approx(0.003)


def test_tasks_methods_and_budgets_are_timed_each() -> None:
    """A step of clicks takes many times one of titles, and one without a teacher a part of it."""
    trials = [
        settings(**{"task": task, "method": method, "token_budget": budget})
        for task in ("topics", "recommendation", "retrieval")
        for method in ("newsbert", "finetune")
        for budget in (2048, 8192)
    ]
    assert len(kinds_to_time(trials)) == 12


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
    chosen = [(k.recommendation.history, k.recommendation.npratio) for k in kinds_to_time(clicks)]
    assert sorted(chosen) == [(10, 1), (10, 4), (50, 1), (50, 4)]
    assert len(kinds_to_time(titles)) == 1
