"""What a sweep varies: overrides, other values, each trial's settings, names of points."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from newsbert_ray.config import SettingsError
from newsbert_ray.model import families
from newsbert_ray.model.encoder import EncoderError
from newsbert_ray.reporting.sweep_data import Axis, Goal, point_label
from newsbert_ray.settings import flatten
from newsbert_ray.tune.space import Search, SearchSpace, faults, fix, steer, vary
from newsbert_ray.tune.space_file import read_space
from newsbert_ray.tune.trial import check_space, resolve_depths, trial_settings

WriteSpace = Callable[..., Path]


@pytest.fixture
def space(write_space: WriteSpace) -> SearchSpace:
    """The usual small one: beta 0 and 0.2, layers 1 and 2."""
    return read_space(write_space())


def test_an_override_of_an_axis_fixes_it_and_says_so(space: SearchSpace) -> None:
    """The command line says beta 0.1, and the sweep varies beta all the same."""
    fixed, messages = fix(space, {"distill": {"beta": 0.1}, "seed": 5})
    assert [axis.name for axis in fixed.axes] == ["student.layers"]
    assert fixed.seeds == (5,)
    assert messages == ["distill.beta is 0.1, not varied", "seed is 5 in every trial"]
    assert fix(space, {"batch_size": 8}) == (space, [])
    with pytest.raises(SettingsError, match="out = 'x'"):
        fix(space, {"out": "x"})


def test_vary_replaces_adds_and_checks(space: SearchSpace) -> None:
    """Depths on the command line are ignored, or a misspelt name is accepted."""
    changed = vary(space, {"student.layers": [1, 4], "distill.temperature": [1, 2], "seeds": [3, 4]})
    assert {axis.name: axis.values for axis in changed.axes} == {
        "distill.beta": (0.0, 0.2),
        "student.layers": (1, 4),
        "distill.temperature": (1, 2),
    }
    assert changed.seeds == (3, 4)
    for slip, message in (
        ({"student.layer": [1]}, "did you mean 'student.layers'"),
        ({"student.layers": [1, 1]}, "1 is given twice"),
        ({"student.layers": []}, "at least one value"),
        ({"seeds": [1, 1]}, "expected different seeds"),
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


CONDITIONAL = """\
name: s
settings: {data: nowhere, teacher: scratch}
space:
  optimizer.decay: {grid: [none, linear, cosine]}
  optimizer.warmup_share: {grid: [0.1, 0.2], when: {optimizer.decay: [linear, cosine]}}
  distill.beta: {grid: [0.0, 0.1]}
  distill.temperature: {grid: [2.0, 4.0], when: {optimizer.warmup_share: 0.1, distill.beta: 0.1}}
"""


@pytest.fixture
def conditional(write_space: WriteSpace) -> SearchSpace:
    """A grid: decay, with it a warm-up, beta, and a temperature that depends on both."""
    return read_space(write_space(CONDITIONAL))


def test_a_conditional_grid_holds_each_point_once(conditional: SearchSpace) -> None:
    """Trials differ in a setting that does nothing in them, and are paid for twice."""
    points = list(conditional.grid())
    assert conditional.points == len(points) == len({point_label(point) for point in points}) == 12
    for point in points:
        assert ("optimizer.warmup_share" in point) == (point["optimizer.decay"] != "none")
        both = point.get("optimizer.warmup_share") == 0.1 and point["distill.beta"] == 0.1
        assert ("distill.temperature" in point) == both


@given(
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    parents=st.lists(st.integers(0, 3), min_size=4, max_size=4),
)
def test_a_grid_is_the_product_without_inactive_axes(sizes: list[int], parents: list[int]) -> None:
    """A conditional grid leaves out a combination, or runs one twice."""
    axes: list[Axis] = []
    for index, size in enumerate(sizes):
        parent = parents[index]
        when = {f"a{parent}": (0,)} if parent < index else {}
        axes.append(Axis(name=f"a{index}", values=tuple(range(size)), when=when))
    expected = set()
    for values in itertools.product(*(range(size) for size in sizes)):
        point: dict[str, Any] = {}
        for axis, value in zip(axes, values, strict=True):
            if all(point.get(name) in allowed for name, allowed in axis.when.items()):
                point[axis.name] = value
        expected.add(tuple(point.items()))
    space = SearchSpace(file="f", name="s", axes=tuple(axes), search=Search(sampler="grid"))
    points = [tuple(point.items()) for point in space.grid()]
    assert len(points) == len(expected)
    assert set(points) == expected


def test_a_far_too_large_grid_is_refused_at_once(write_space: WriteSpace) -> None:
    """Six axes of thirty values are counted point by point for an hour."""
    lines = [
        f"  {name}: {{grid: {list(range(1, 31))}}}"
        for name in ("epochs", "batch_size", "student.layers", "log_every", "threads", "train_rows")
    ]
    with pytest.raises(SettingsError, match="more than 100,000 points"):
        read_space(write_space("name: s\nspace:\n" + "\n".join(lines) + "\n"))


def test_every_value_of_every_axis_is_checked_before_a_search_starts(
    conditional: SearchSpace, tmp_path: Path
) -> None:
    """A search fails hours later at an impossible value of an axis that is rarely active."""
    searched = conditional.model_copy(update={"search": Search(sampler="tpe", trials=3)})
    check_space(searched, out=tmp_path, overrides={})
    axes = list(searched.axes)
    axes[3] = axes[3].model_copy(update={"values": (2.0, -1.0)})
    with pytest.raises(SettingsError, match=r"temperature=-1.*distill.temperature = -1"):
        check_space(searched.model_copy(update={"axes": tuple(axes)}), out=tmp_path, overrides={})


def test_what_depends_on_a_fixed_axis_varies_or_is_dropped(conditional: SearchSpace) -> None:
    """--optimizer.decay none leaves a warm-up that never varies, or drops one that should."""
    fixed, messages = fix(conditional, {"optimizer": {"decay": "linear"}})
    assert [axis.name for axis in fixed.axes] == [
        "optimizer.warmup_share",
        "distill.beta",
        "distill.temperature",
    ]
    assert fixed.axes[0].when == {}
    assert messages == ["optimizer.decay is 'linear', not varied"]
    fixed, messages = fix(conditional, {"optimizer": {"decay": "none"}})
    assert [axis.name for axis in fixed.axes] == ["distill.beta"]
    assert messages == [
        "optimizer.decay is 'none', not varied",
        "optimizer.warmup_share is not varied: it varies only where optimizer.decay is linear or cosine",
        "distill.temperature is not varied: it varies only where optimizer.warmup_share is 0.1 and "
        "distill.beta is 0.1",
    ]
    fixed, messages = fix(vary(conditional, {"optimizer.warmup_share": [0.3]}), {})
    assert [axis.name for axis in fixed.axes] == ["optimizer.decay", "optimizer.warmup_share", "distill.beta"]
    assert fixed.axes[1].when == {"optimizer.decay": ("linear", "cosine")}
    assert len(messages) == 1


def test_starting_points_follow_what_is_fixed_or_varied_otherwise(write_space: WriteSpace) -> None:
    """Optuna gets a starting point with a value off its axis, and warns, or uses it."""
    starts = "search: {trials: 5}\nstart:\n" + "".join(
        f"  - {{distill.beta: {beta}, student.layers: {layers}}}\n"
        for beta, layers in ((0.0, 1), (0.2, 1), (0.2, 2))
    )
    space = read_space(write_space(**{"seeds: [0]": starts}))
    fixed, messages = fix(vary(space, {"student.layers": [1, 3]}), {"distill.beta": 0.1})
    assert fixed.start == ({"student.layers": 1},)
    assert messages[1:] == ["starting point beta=0.2,layers=2 is left out: expected one of 1, 3"]


def test_the_command_line_steers_a_search(space: SearchSpace) -> None:
    """--search.trials or --limits.hours does nothing, or resets the file's other values."""
    control = {
        "search": {"sampler": "random", "trials": 9},
        "limits.hours": 2,
        "gpus": 0.5,
        "keep_students": 2,
    }
    steered = steer(space, control)
    assert (steered.search.sampler, steered.points, steered.search.seed) == ("random", 9, 0)
    assert (steered.limits.hours, steered.limits.target, steered.gpus) == (2, None, 0.5)
    assert steer(steered, {"search": {"seed": 4}}).search == Search(sampler="random", trials=9, seed=4)
    assert steer(steered, {}) == steered
    started = steered.model_copy(update={"start": ({"distill.beta": 0.2},)})
    grid = steer(started, {"search.sampler": "grid"})
    assert (grid.start, grid.points) == ((), 4)
    assert not list(faults(grid))
    with pytest.raises(SettingsError, match="trials = 0"):
        steer(space, {"search.trials": 0})
    with pytest.raises(SettingsError, match=r"sampler = 'tpee'.*did you mean 'tpe'"):
        steer(space, {"search.sampler": "tpee"})


@pytest.fixture
def deep(write_space: WriteSpace) -> SearchSpace:
    """Beta and the depths that divide the teacher's."""
    return read_space(write_space(**{"[1, 2]": "divisors"}))


def test_divisors_are_those_of_the_teacher(deep: SearchSpace, tmp_path: Path) -> None:
    """A search over depths tries an impossible one, or the teacher's own."""
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 12}))
    for overrides, expected in (
        ({}, (1, 2)),
        ({"scratch": {"layers": 6}}, (1, 2, 3)),
        ({"scratch.layers": 12, "model.teacher_layers": 8}, (1, 2, 4)),
        ({"scratch.layers": 1}, (1,)),
        ({"teacher": str(tmp_path)}, (1, 2, 3, 4, 6)),
        ({"teacher": "some/name", "model.teacher_layers": 9}, (1, 3)),
    ):
        resolved = resolve_depths(deep, overrides)
        assert resolved.axes[1].values == expected
        assert resolved.points == 2 * len(expected)
        assert resolve_depths(resolved, overrides) == resolved
        check_space(resolved, out=tmp_path, overrides=overrides)


def test_unknown_divisors_give_the_cure(
    deep: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher given by name, without a network, ends in a stack trace."""

    def refuse(name: str, *values: Any) -> None:
        raise EncoderError("its configuration was not read") from OSError(
            f"no connection for {name}\nand a page of advice"
        )

    monkeypatch.setattr(families, "encoder_depth", refuse)
    with pytest.raises(
        SettingsError, match=r"\(no connection for some/name\).*give --model.teacher_layers N"
    ):
        resolve_depths(deep, {"teacher": "some/name"})
    for name, values in (("model.teacher_layers", [4, 8]), ("scratch.layers", [4]), ("teacher", ["a"])):
        with pytest.raises(SettingsError, match=rf"{name} varies.*--vary student.layers=1,2"):
            resolve_depths(vary(deep, {name: values}), {})
    assert resolve_depths(vary(deep, {"student.layers": [1, 2], "teacher": ["a"]}), {})
    with pytest.raises(SettingsError, match="required and not given: teacher"):
        resolve_depths(deep.model_copy(update={"settings": {}}), {})


def test_starting_points_and_conditions_are_checked_against_the_divisors(write_space: WriteSpace) -> None:
    """A starting point of four layers fails with a six-layer teacher, an hour later."""
    text = "search: {trials: 3}\nstart: [{student.layers: 4}]"
    space = read_space(write_space(**{"[1, 2]": "divisors", "seeds: [0]": text}))
    assert resolve_depths(space, {"scratch.layers": 8}).start == ({"student.layers": 4},)
    with pytest.raises(SettingsError, match=r"start: student.layers = 4.*layers are 1, 2, 3"):
        resolve_depths(space, {"scratch.layers": 6})
    text = "  batch_size: {choice: [8, 16], when: {student.layers: 4}}\nseeds: [0]"
    space = read_space(write_space(**{"[1, 2]": "divisors", "seeds: [0]": text}))
    with pytest.raises(SettingsError, match=r"batch_size varies only where student.layers is 4.*1, 2, 3"):
        resolve_depths(space, {"scratch.layers": 6})


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


def test_impossible_combinations_are_found_before_anything_starts(space: SearchSpace, tmp_path: Path) -> None:
    """A sweep starts whose trials cannot."""
    for overrides, message in (
        (
            {"batch_size": 2, "optimizer": {"accumulate": 4}},
            "needs at least one example",
        ),
        ({"distil": {"beta": 0.1}}, "unknown setting 'distil'"),
        ({"epochs": 0}, "epochs = 0"),
    ):
        with pytest.raises(SettingsError, match=message):
            check_space(space, out=tmp_path, overrides=overrides)


def test_missing_data_or_teacher_is_asked_for(write_space: WriteSpace, tmp_path: Path) -> None:
    """A sweep without data fails in every trial."""
    space = read_space(write_space(**{"data: nowhere, teacher: scratch, ": ""}))
    with pytest.raises(SettingsError, match="required and not given: data, teacher"):
        check_space(space, out=tmp_path, overrides={})


def test_relative_folders_reach_a_trial_as_absolute_ones(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that Ray starts elsewhere looks for a relative folder in its own."""
    monkeypatch.chdir(tmp_path)
    Path("shards").mkdir()
    settings = trial_settings(space, {}, seed=0, out=Path("out"), overrides={"data": "shards"})
    assert (settings.data, settings.out) == (str(tmp_path / "shards"), str(tmp_path / "out"))
    assert settings.teacher == "scratch"


def test_a_point_is_named_by_what_varies() -> None:
    """Nobody finds the trial of beta 0.1."""
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


def test_a_task_on_the_command_line_changes_a_default_goal(space: SearchSpace) -> None:
    """The default goal does not follow the task, or a given goal is changed silently."""
    moved, _ = fix(space, {"task": "recommendation"})
    assert (moved.metric, moved.settings["task"]) == ("validation.student.auc", "recommendation")
    assert fix(moved, {"task": "topics"})[0].metric == "validation.student.accuracy"
    explicit = space.model_copy(update={"goals": (Goal(metric="validation.student.accuracy"),)})
    kept, _ = fix(explicit, {"task": "recommendation"})
    assert kept.metric == "validation.student.accuracy"
    with pytest.raises(SettingsError, match=r"did you mean 'validation\.student\.auc'"):
        check_space(kept, out=Path("out"), overrides={"task": "recommendation"})


def test_the_task_does_not_vary(space: SearchSpace) -> None:
    """The mean over two tasks' metrics, and a best point that is only the easier task."""
    with pytest.raises(SettingsError, match="'task' cannot vary"):
        vary(space, {"task": ["topics", "retrieval"]})
