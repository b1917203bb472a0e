"""What a sweep varies: overrides, other values, each trial's settings, names of points."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from newsbert_ray.config import SettingsError
from newsbert_ray.tune.space import SearchSpace, check_space, fix, flatten, point_label, trial_settings, vary
from newsbert_ray.tune.space_file import read_space

WriteSpace = Callable[..., Path]


@pytest.fixture
def space(write_space: WriteSpace) -> SearchSpace:
    """The usual small one: beta 0 and 0.2, layers 1 and 2."""
    return read_space(write_space())


def test_an_override_of_an_axis_fixes_it_and_says_so(space: SearchSpace) -> None:
    """The command line says beta 0.1, and the sweep varies beta all the same."""
    fixed, said = fix(space, {"distill": {"beta": 0.1}, "seed": 5})
    assert [axis.name for axis in fixed.axes] == ["student.layers"]
    assert fixed.seeds == (5,)
    assert said == ["distill.beta is 0.1, not varied", "seed is 5 in every trial"]
    assert fix(space, {"batch_size": 8}) == (space, [])
    with pytest.raises(SettingsError, match="out = 'x'"):
        fix(space, {"out": "x"})


def test_vary_replaces_adds_and_checks(space: SearchSpace) -> None:
    """Depths given on the command line are ignored, or a misspelt one is taken."""
    changed = vary(space, {"student.layers": [1, 4], "distill.temperature": [1, 2], "seeds": [3, 4]})
    assert {axis.name: axis.values for axis in changed.axes} == {
        "distill.beta": (0.0, 0.2),
        "student.layers": (1, 4),
        "distill.temperature": (1, 2),
    }
    assert changed.seeds == (3, 4)
    for slip, message in (
        ({"student.layer": [1]}, "did you mean 'student.layers'"),
        ({"student.layers": [1, 1]}, "1 stands there twice"),
        ({"student.layers": []}, "at least one value"),
        ({"seeds": [1, 1]}, "each once"),
        ({"seeds": ["a"]}, "seeds"),
    ):
        with pytest.raises(SettingsError, match=message):
            vary(space, slip)


def test_the_point_wins_over_the_command_line_and_that_over_the_file(
    space: SearchSpace, tmp_path: Path
) -> None:
    """A trial trains with other settings than its name says."""
    settings = trial_settings(
        space,
        {"distill.beta": 0.2},
        seed=3,
        out=tmp_path / "t",
        overrides={"epochs": 9, "distill": {"beta": 0.4}},
    )
    assert (settings.distill.beta, settings.epochs, settings.seed, settings.threads) == (0.2, 9, 3, 1)
    assert settings.out == str(tmp_path / "t")


def test_a_depth_that_does_not_divide_is_found_before_anything_starts(
    space: SearchSpace, tmp_path: Path
) -> None:
    """Half a sweep fails after an hour of training."""
    odd = vary(space, {"student.layers": [1, 2, 3]})
    message = "8 teacher layers do not divide into 3 student layers; choose 1, 2, 4 or 8"
    with pytest.raises(SettingsError, match=message):
        check_space(odd, out=tmp_path, overrides={"scratch": {"layers": 8}})
    with pytest.raises(SettingsError, match=message):
        check_space(odd, out=tmp_path, overrides={"scratch": {"layers": 12}, "model": {"teacher_layers": 8}})
    check_space(odd, out=tmp_path, overrides={"scratch": {"layers": 6}})


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layers"])
def test_the_depth_of_a_teacher_in_a_folder_is_read_from_its_config(
    key: str, space: SearchSpace, tmp_path: Path
) -> None:
    """A depth that does not fit is only noticed when the weights are loaded, trial by trial."""
    (tmp_path / "config.json").write_text(json.dumps({key: 5}))
    with pytest.raises(
        SettingsError, match="5 teacher layers do not divide into 2 student layers; choose 1 or 5"
    ):
        check_space(space, out=tmp_path, overrides={"teacher": str(tmp_path)})
    with pytest.raises(SettingsError, match=r"model.teacher_layers = 8: .* has 5 layers"):
        check_space(space, out=tmp_path, overrides={"teacher": str(tmp_path), "model": {"teacher_layers": 8}})


def test_combinations_that_cannot_be_are_found_before_anything_starts(
    space: SearchSpace, tmp_path: Path
) -> None:
    """A sweep starts whose trials cannot."""
    for overrides, message in (
        ({"workers": 2}, "a sweep's trials use one worker for now"),
        ({"batch_size": 2, "optimizer": {"accumulate": 4}}, "each part of a batch needs a title"),
        ({"distil": {"beta": 0.1}}, "unknown setting 'distil'"),
        ({"epochs": 0}, "epochs = 0"),
    ):
        with pytest.raises(SettingsError, match=message):
            check_space(space, out=tmp_path, overrides=overrides)


def test_missing_data_or_teacher_is_asked_for(write_space: WriteSpace, tmp_path: Path) -> None:
    """A sweep without data fails in every trial."""
    space = read_space(write_space(**{"data: nowhere, teacher: scratch, ": ""}))
    with pytest.raises(SettingsError, match="'data' is required; 'teacher' is required"):
        check_space(space, out=tmp_path, overrides={})


def test_folders_reach_a_trial_as_they_were_meant(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that Ray starts elsewhere looks for a relative folder in its own."""
    monkeypatch.chdir(tmp_path)
    Path("shards").mkdir()
    settings = trial_settings(space, {}, seed=0, out=Path("out"), overrides={"data": "shards"})
    assert (settings.data, settings.out) == (str(tmp_path / "shards"), str(tmp_path / "out"))
    assert settings.teacher == "scratch"


def test_a_point_is_named_by_what_varies() -> None:
    """Nobody finds the trial of beta 0.1 again."""
    assert point_label({"distill.beta": 0.1, "student.layers": 2}, seed=0) == "beta=0.1,layers=2,seed=0"
    assert point_label({}) == "only"
    both = {"optimizer.beta1": 0.9, "a.rate": 1.0, "b.rate": 2}
    assert point_label(both) == "beta1=0.9,a.rate=1,b.rate=2"


VALUES: st.SearchStrategy[Any] = st.one_of(
    st.floats(0, 1),
    st.integers(0, 9),
    st.booleans(),
    st.none(),
    st.text(max_size=300),
    st.sampled_from(["../x", "a/b"]),
)


@given(first=VALUES, second=VALUES)
def test_names_of_points_are_distinct_and_fit_a_file_system(first: Any, second: Any) -> None:
    """Two points share a folder, or a value with a slash leaves it."""
    names = [point_label({"distill.beta": value}, seed=0) for value in (first, second)]
    assert all(len(name) < 200 and "/" not in name and not name.startswith(".") for name in names)
    if str(first) != str(second) and not (isinstance(first, int | float) and first == second):
        assert names[0] != names[1]


def test_flatten_opens_groups() -> None:
    """A command to run again names a group instead of its settings."""
    assert flatten({"a": {"b": {"c": 1}}, "d": None}) == {"a.b.c": 1, "d": None}
