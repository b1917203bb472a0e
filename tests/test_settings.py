"""Validation of settings, and the wording of errors about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from newsbert_ray.config import PrepareSettings, TrainSettings
from newsbert_ray.settings import (
    SettingsError,
    build_settings,
    check_arguments,
    check_each,
    dotted_names,
    merge,
    nearest,
    parse_scalar,
    read_yaml,
    settings_in,
)

NEEDED = {"data": "shards", "teacher": "scratch", "out": "run"}


def test_settings_cannot_be_changed_after_the_check() -> None:
    """A setting that changes during a run would make its record wrong."""
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
        ("student.layers", -1),
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
    """A wrong value is refused by its name, before it costs an hour of training."""
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
    """A misspelt name that is ignored would run the default."""
    with pytest.raises(SettingsError, match=rf"unknown setting '{unknown}', did you mean '{near}'\?"):
        build_settings(TrainSettings, merge(NEEDED, {unknown: 1}))


def test_all_wrong_settings_are_reported_at_once() -> None:
    """One error per start would need five starts for five errors."""
    with pytest.raises(SettingsError) as caught:
        build_settings(
            TrainSettings, {"data": "d", "teacher": "t", "seed": -1, "epochs": 0}, where="run.yaml"
        )
    message = str(caught.value)
    assert message.startswith("run.yaml: ")
    assert all(part in message for part in ("required and not given: out", "seed = -1", "epochs = 0"))


def test_later_layers_override_earlier_ones() -> None:
    """A flag that is ignored would run another experiment."""
    file = {"distill": {"beta": 0.1, "temperature": 2.0}, "epochs": 3}
    flags = {"distill.beta": 0.2, "distill": {"weights": {"hidden": 0.0}}}
    assert merge(file, flags) == {
        "distill": {"beta": 0.2, "temperature": 2.0, "weights": {"hidden": 0.0}},
        "epochs": 3,
    }


def test_merge_leaves_its_layers_as_they_were() -> None:
    """A sweep merges many trials with one base; a base that changes would mix the trials."""
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
    """A far-fetched suggestion misleads."""
    assert nearest("zzzzzz", list(dotted_names(TrainSettings))) is None


def test_each_value_is_checked_by_itself() -> None:
    """A sweep sets a part of the settings, which fit together only with the search space's."""
    check_each(TrainSettings, {"distill.teacher": "frozen", "student": {"layers": 3}})
    with pytest.raises(SettingsError) as caught:
        check_each(TrainSettings, {"distill": {"beta": 2, "betta": 1}, "lr": 1}, where="space.yaml")
    assert str(caught.value) == (
        "space.yaml: distill.beta = 2: Input should be less than or equal to 1; "
        "unknown setting 'distill.betta', did you mean 'distill.beta'?; "
        "unknown setting 'lr', did you mean 'learning_rate'?"
    )
    with pytest.raises(SettingsError, match=r"^required and not given: data, teacher$"):
        check_each(TrainSettings, {"out": "o"}, complete=True)


def test_a_union_is_one_error_without_the_names_of_its_members() -> None:
    """Pydantic names the members of a union, which are types of Python and no settings."""
    for check in (check_each, build_settings):
        with pytest.raises(SettingsError) as caught:
            check(TrainSettings, merge(NEEDED, {"before.method": "newsbart"}))
        assert str(caught.value).startswith("before.method = 'newsbart': Input should be 'newsbert', ")
        assert "before.method.literal" not in str(caught.value)


def test_arguments_are_checked_by_the_signature() -> None:
    """A function and its flags cannot disagree if both follow the signature."""

    def embed(run: str, *, top: int = 3, names: tuple[str, ...] = (), **others: Any) -> None:
        """Embed.

        Args:
            run: folder
                of a run.
        """

    assert check_arguments(embed, ("r",), {"top": "4", "x": 1}) == {"run": "r", "top": 4, "names": (), "x": 1}
    with pytest.raises(SettingsError, match=r"top = 'many': .*; required and not given: run"):
        check_arguments(embed, (), {"top": "many"})


def test_a_setting_knows_its_kind() -> None:
    """Help and completion show choices, switches and lists as such."""
    settings = {setting.name: setting for setting in settings_in(TrainSettings)}
    assert settings["precision"].choices == ("auto", "fp32", "tf32", "bf16")
    assert settings["before.method"].choices[-1] == "none"
    assert settings["distill.shared_top"].type is bool
    assert not settings["min_workers"].choices
    assert next(s for s in settings_in(PrepareSettings) if s.name == "source").is_list


def write(folder: Path, text: str) -> Path:
    """A file with this text."""
    path = folder / "file.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_error_names_the_line_of_its_key(tmp_path: Path) -> None:
    """A user searches a long file for the mistake."""
    file = read_yaml(write(tmp_path, "name: a\ngoals:\n  - metric: x\n    mode: max\n"))
    for at, line in ((("goals", "0", "mode"), 4), (("goals", "0", "unknown"), 3), (("name",), 1), ((), 1)):
        with pytest.raises(SettingsError, match=rf"file\.yaml:{line}: wrong"):
            file.fail(at, "wrong")
    assert file.mapping(("name", "nothing")[1:]) == {}


def test_values_are_read_as_yaml_with_exponents() -> None:
    """1e-3 is a string in YAML 1.1."""
    assert [parse_scalar(text) for text in ("1e-3", "2", "true", "linear", "[")] == [
        1e-3,
        2,
        True,
        "linear",
        "[",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)),
            "aliases expand to more than",
        ),
        ("name: " + "[" * 20_000 + "]" * 20_000, "nested too deeply"),
    ],
    ids=["aliases", "depth"],
)
def test_a_hostile_file_is_refused_at_once(text: str, message: str, tmp_path: Path) -> None:
    """A file of a few lines fills the memory, or ends in an internal error."""
    with pytest.raises(SettingsError, match=message):
        read_yaml(write(tmp_path, text))
