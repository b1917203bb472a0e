from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from newsbert_ray.config import (
    PrepareSettings,
    Settings,
    SettingsError,
    TrainSettings,
    build_settings,
    dotted_names,
    merge,
    nearest,
)

NEEDED = {"data": "shards", "teacher": "scratch", "out": "run"}


def test_defaults_are_the_papers_where_it_gives_one() -> None:
    """A default that drifts from the paper changes every result that names no setting."""
    settings = build_settings(TrainSettings, NEEDED)
    assert settings.distill.beta == 0.1
    assert settings.distill.temperature == 1.0
    assert not settings.distill.soft_label_t2
    papers = {"teacher_task", "student_task", "embedding", "hidden", "news_embedding", "user_embedding"}
    weights = settings.distill.weights.model_dump()
    assert {name for name, weight in weights.items() if weight == 1.0} == {*papers, "soft_labels"}
    assert set(weights.values()) == {0.0, 1.0}
    assert (settings.model.dropout, settings.model.query_size, settings.batch_size) == (0.2, 256, 32)
    assert settings.optimizer.decay == "none"
    assert settings.optimizer.warmup_share == 0.0


def test_every_setting_is_documented() -> None:
    """A flag without a line of help is a flag that only its author can use."""

    def undocumented(model: type[Settings], prefix: str = "") -> list[str]:
        missing = []
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
                missing += undocumented(field.annotation, f"{prefix}{name}.")
            if not field.description:
                missing.append(f"{prefix}{name}")
        return missing

    assert undocumented(TrainSettings) + undocumented(PrepareSettings) == []


def test_settings_cannot_be_changed_after_the_check() -> None:
    """A setting altered in the middle of a run would make its record a lie."""
    settings = build_settings(TrainSettings, NEEDED)
    with pytest.raises(ValidationError, match="frozen"):
        settings.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("distill.beta", -0.01),
        ("distill.beta", 1.01),
        ("distill.beta", float("nan")),
        ("distill.temperature", 0.0),
        ("distill.temperature", float("inf")),
        ("distill.weights.hidden", -1.0),
        ("student.layers", 0),
        ("student.layers", 1.5),
        ("model.dropout", 1.0),
        ("model.teacher_layers", 0),
        ("optimizer.beta2", 1.0),
        ("optimizer.warmup_share", 1.0),
        ("optimizer.clip_norm", 0.0),
        ("optimizer.decay", "linaer"),
        ("checkpoint.keep", 0),
        ("epochs", 0),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("inf")),
        ("seed", -1),
        ("seed", 2**31),
        ("workers", 0),
        ("precision", "fp16"),
        ("device", "tpu"),
        ("train_rows", 0),
        ("scratch.heads", 5),
    ],
)
def test_value_out_of_range_is_named(name: str, value: Any) -> None:
    """A value that cannot be must be refused by its name before an hour of training shows it."""
    with pytest.raises(SettingsError) as caught:
        build_settings(TrainSettings, merge(NEEDED, {name: value}))
    assert name in str(caught.value)
    assert str(value) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("unknown", "near"),
    [
        ("distill.betta", "distill.beta"),
        ("beta", "distill.beta"),
        ("batchsize", "batch_size"),
        ("lerning_rate", "learning_rate"),
        ("layers", "student.layers"),
        ("lr", "learning_rate"),
        ("batch-size", "batch_size"),
    ],
)
def test_unknown_setting_offers_the_nearest(unknown: str, near: str) -> None:
    """A typed-over name that is ignored runs the default and looks like a result."""
    with pytest.raises(SettingsError, match=rf"unknown setting '{unknown}', did you mean '{near}'\?"):
        build_settings(TrainSettings, merge(NEEDED, {unknown: 1}))


def test_missing_and_wrong_settings_are_all_told_at_once() -> None:
    """One complaint a start is a morning lost over five."""
    with pytest.raises(SettingsError) as caught:
        build_settings(
            TrainSettings, {"data": "d", "teacher": "t", "seed": -1, "epochs": 0}, where="run.yaml"
        )
    message = str(caught.value)
    assert message.startswith("run.yaml: ")
    assert all(part in message for part in ("required and not given: out", "seed = -1", "epochs = 0"))


def test_batch_smaller_than_its_parts_says_the_way_out() -> None:
    """A worker with no title of its own would hang the others in the all-reduce."""
    values = merge(NEEDED, {"batch_size": 4, "workers": 2, "optimizer.accumulate": 4})
    with pytest.raises(SettingsError, match=r"batch_size 4 is less than workers x optimizer\.accumulate = 8"):
        build_settings(TrainSettings, values)


def test_prepare_needs_a_source() -> None:
    """An empty list of sources would prepare an empty corpus."""
    with pytest.raises(SettingsError, match="source"):
        build_settings(PrepareSettings, {"source": [], "teacher": "scratch", "out": "shards"})


def test_merge_lays_later_layers_over_earlier_ones() -> None:
    """A flag that lost against the file it overrides would run another experiment than asked for."""
    file = {"distill": {"beta": 0.1, "temperature": 2.0}, "epochs": 3}
    flags = {"distill.beta": 0.2, "distill": {"weights": {"hidden": 0.0}}}
    assert merge(file, flags) == {
        "distill": {"beta": 0.2, "temperature": 2.0, "weights": {"hidden": 0.0}},
        "epochs": 3,
    }


def test_merge_leaves_its_layers_as_they_were() -> None:
    """A sweep lays many trials over one base; a base that changes mixes the trials."""
    base = {"distill": {"beta": 0.1}}
    merge(base, {"distill.beta": 0.2})
    assert base == {"distill": {"beta": 0.1}}


def test_names_are_the_leaves_only() -> None:
    """A group offered as the nearest setting takes no value."""
    names = list(dotted_names(TrainSettings))
    assert "distill.weights.hidden" in names
    assert "distill" not in names
    assert "distill.weights" not in names


def test_nothing_near_offers_nothing() -> None:
    """A far-fetched guess sends a person the wrong way."""
    assert nearest("zzzzzz", list(dotted_names(TrainSettings))) is None
