"""Early stopping: which trials end when, that a resume decides alike, and what it saves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from newsbert_ray.files import write_text
from newsbert_ray.record import METRICS
from newsbert_ray.reporting.sweep_data import Axis
from newsbert_ray.tune.space import Search, SearchSpace, Stopping
from newsbert_ray.tune.space_file import read_space
from newsbert_ray.tune.stopping import EarlyStopping, estimate_saving, recorded_curves

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


def run(early: EarlyStopping, values: list[float], *, epochs: int = 9) -> list[int]:
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
    assert run(early, [0.5, 0.4, 0.6, 0.55, 0.7, 0.1]) == [9, 1, 9, 3, 9, 1]


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
    whole = run(EarlyStopping(space, epochs=9), values)
    early, again = EarlyStopping(space, epochs=9), EarlyStopping(space, epochs=9)
    before = run(early, values[:5])
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
    assert run(early, [0.5, 0.6, 0.7, 0.4, 0.65]) == [9, 9, 9, 2, 9]


def test_reports_without_the_metric_end_nothing(make_space: Callable[[str], SearchSpace]) -> None:
    """A trial's last report, which holds its value alone, ends the sweep with a KeyError."""
    for kind in ("asha", "median"):
        early = EarlyStopping(make_space(f"{{scheduler: {kind}}}"), epochs=9)
        assert not early.should_stop("a", {"value": 0.1}, epochs=9)


def test_without_a_scheduler_nothing_is_stopped(make_space: Callable[[str], SearchSpace]) -> None:
    """A grid for a figure misses points."""
    early = EarlyStopping(make_space("{scheduler: none}"), epochs=9)
    assert run(early, [0.9, 0.1]) == [9, 9]


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
    curves = recorded_curves(tmp_path, "validation.student.accuracy")
    assert curves == [[(1.0, 0.5)], [(1.0, 0.5)]]
    saving = estimate_saving(space("asha"), [4] * 6, slots=2, curves=curves)
    assert saving.epochs == pytest.approx(1.0)  # equal curves: no trial is worse than the rung
