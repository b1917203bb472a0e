from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from newsbert_ray.config import (
    PrepareSettings,
    Settings,
    SettingsError,
    TrainSettings,
    build_settings,
    merge,
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


@pytest.mark.parametrize("name", ["table2", "fig3", "fig4", "fig5", "fig6", "fig7", "paper_beta"])
def test_spaces_of_the_paper_have_its_constant_rate(name: str) -> None:
    """The defaults are chosen for short runs; what reproduces the paper must not take them."""
    text = (Path(__file__).parents[1] / "search_spaces" / f"{name}.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)["settings"]
    settings = build_settings(TrainSettings, merge({**NEEDED, "teacher": "some-encoder"}, values))
    assert set(settings.learning_rates.values()) == {3e-6}
    assert (settings.optimizer.decay, settings.optimizer.warmup_share) == ("none", 0.0)


def test_a_pretrained_teacher_learns_slowly_by_default() -> None:
    """At a student's rate it would forget what it knows; one of random weights has to learn as fast."""

    def rates(**values: object) -> dict[str, float]:
        return build_settings(TrainSettings, {**NEEDED, **values}).learning_rates

    assert rates(teacher="some-encoder") == {"teacher": 1e-4, "student": 6e-4, "top": 6e-4}
    assert rates(teacher="some-encoder", learning_rate=3e-6)["teacher"] == 3e-6
    assert rates(teacher="scratch")["teacher"] == 6e-4
    assert rates(teacher="some-encoder", optimizer={"teacher_learning_rate": 2e-4})["teacher"] == 2e-4


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


def test_batch_smaller_than_its_parts_says_the_way_out() -> None:
    """A worker with no title of its own would hang the others in the all-reduce."""
    values = merge(NEEDED, {"batch_size": 4, "workers": 2, "optimizer.accumulate": 4})
    with pytest.raises(SettingsError, match=r"batch_size 4 is less than workers x optimizer\.accumulate = 8"):
        build_settings(TrainSettings, values)


def test_prepare_needs_a_source() -> None:
    """An empty list of sources would prepare an empty corpus."""
    with pytest.raises(SettingsError, match="source"):
        build_settings(PrepareSettings, {"source": [], "teacher": "scratch", "out": "shards"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "finetune"}, "nothing learns from texts without labels with method finetune"),
        ({"method": "twinbert", "task": "recommendation"}, "nothing learns from news without clicks"),
        ({"task": "retrieval"}, "task retrieval has no texts without a pair"),
        ({"batch_size": 4, "unlabelled_share": 0.9}, "leaves no labelled example in a batch of 4"),
        ({"unlabelled": "more", "unlabelled_share": 0.0}, "has no effect; set unlabelled_share above 0"),
    ],
)
def test_a_share_without_labels_that_nothing_learns_from(values: dict[str, Any], message: str) -> None:
    """A run that ignores what it was given would look like one that found it useless."""
    given = {"data": "d", "teacher": "scratch", "out": "o", "unlabelled_share": 0.5, **values}
    with pytest.raises(SettingsError, match=message):
        build_settings(TrainSettings, given)


def test_compiled_layers_cannot_be_looked_into() -> None:
    """The compiler would drop the hooks that read queries, keys and values."""
    values = {"data": "d", "teacher": "scratch", "out": "o", "compile": True}
    assert build_settings(TrainSettings, values).compile
    with pytest.raises(SettingsError, match="losses on attention read inside the layers"):
        build_settings(TrainSettings, {**values, "method": "minilm"})
