"""Early stopping: who ends when, and that a resume judges as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from newsbert_ray.tune.space import SearchSpace
from newsbert_ray.tune.space_file import read_space
from newsbert_ray.tune.stopping import EarlyStopping

WriteSpace = Callable[..., Path]
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


def run(judge: EarlyStopping, values: list[float], *, epochs: int = 9) -> list[int]:
    """At which epoch each of several trials ends, one after the other; each has its value at every epoch."""
    return [
        next(
            (
                epoch
                for epoch in range(1, epochs + 1)
                if judge.stops(str(number), {"epoch": float(epoch), METRIC: value}, epochs=epochs)
            ),
            epochs,
        )
        for number, value in enumerate(values)
    ]


def test_asha_lets_one_in_three_go_on(make_space: Callable[[str], SearchSpace]) -> None:
    """Every trial is trained to its end, or a good one is stopped.

    By hand, rungs at 1, 3 and 9: a trial goes on where it is not below the upper third (numpy's linear
    percentile 66.7) of those that were at the rung before it.
    """
    judge = EarlyStopping(make_space("{scheduler: asha, grace: 1, factor: 3}"), epochs=9)
    assert run(judge, [0.5, 0.4, 0.6, 0.55, 0.7, 0.1]) == [9, 1, 9, 3, 9, 1]


def test_the_last_epoch_is_never_an_early_end(make_space: Callable[[str], SearchSpace]) -> None:
    """A trial that is paid for ends without a record because its last rung is not its best."""
    judge = EarlyStopping(make_space("{scheduler: asha, grace: 1, factor: 3}"), epochs=1)
    assert not any(
        judge.stops(str(n), {"epoch": 1.0, METRIC: value}, epochs=1) for n, value in enumerate([0.9, 0.1])
    )


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_a_resume_judges_as_if_nothing_had_happened(
    kind: str, make_space: Callable[[str], SearchSpace]
) -> None:
    """After a kill everybody starts with empty rungs: bad trials go on, and a stopped one's rung is lost."""
    space = make_space(f"{{scheduler: {kind}, grace: 1}}")
    values = [0.5, 0.4, 0.6, 0.55, 0.7, 0.1, 0.65, 0.3]
    whole = run(EarlyStopping(space, epochs=9), values)
    judge, again = EarlyStopping(space, epochs=9), EarlyStopping(space, epochs=9)
    before = run(judge, values[:5])
    for number, (value, last) in enumerate(zip(values[:5], before, strict=True)):
        again.recall(str(number), [(float(epoch), value) for epoch in range(1, last + 1)])
    after = [
        next(
            (e for e in range(1, 10) if again.stops(str(n), {"epoch": float(e), METRIC: v}, epochs=9)),
            9,
        )
        for n, v in list(enumerate(values))[5:]
    ]
    assert before + after == whole
    assert 1 in whole
    assert 9 in whole


def test_the_median_rule_judges_by_those_before(make_space: Callable[[str], SearchSpace]) -> None:
    """The worst goes on to the end, or the rule pauses a trial, which Tune could not wake."""
    judge = EarlyStopping(make_space("{scheduler: median, grace: 2}"), epochs=9)
    assert run(judge, [0.5, 0.6, 0.7, 0.4, 0.65]) == [9, 9, 9, 2, 9]


def test_reports_without_the_metric_end_nothing(make_space: Callable[[str], SearchSpace]) -> None:
    """A trial's last report, which holds its value alone, ends the sweep with a KeyError."""
    for kind in ("asha", "median"):
        judge = EarlyStopping(make_space(f"{{scheduler: {kind}}}"), epochs=9)
        assert not judge.stops("a", {"value": 0.1}, epochs=9)


def test_nothing_is_stopped_where_nothing_is_asked(make_space: Callable[[str], SearchSpace]) -> None:
    """A grid for a figure misses points."""
    judge = EarlyStopping(make_space("{scheduler: none}"), epochs=9)
    assert run(judge, [0.9, 0.1]) == [9, 9]
