"""Every slip in a search space is named by file and line before anything starts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from newsbert_ray.config import SettingsError
from newsbert_ray.tune.space_file import parse_vary, read_space

WriteSpace = Callable[..., Path]
SPACES = sorted((Path(__file__).parents[2] / "search_spaces").glob("*.yaml"))


@pytest.mark.parametrize("path", SPACES, ids=lambda path: str(path.stem))
def test_every_committed_space_can_be_read_and_opens_with_what_a_person_asks(path: Path) -> None:
    """A search space that we ship does not start, or nobody knows what it is for."""
    space = read_space(path)
    assert space.name == path.stem
    assert space.points > 1
    head = path.read_text().split("\nname:")[0]
    for question in (
        "# What it answers: ",
        "# What it costs: ",
        "# Command",
        f"newsbert-ray sweep search_spaces/{path.name}",
    ):
        assert question in head


def test_a_space_is_read_as_written(write_space: WriteSpace) -> None:
    """A number such as 1e-3, which YAML 1.1 takes for a word, or the order of a grid is changed."""
    space = read_space(
        write_space(
            "name: s\nsettings: {learning_rate: 1e-3}\nspace:\n  optimizer.decay: {choice: [none, linear]}\n"
            "  learning_rate: {float: [1e-5, 1E-3], log: true}\n  student.layers: {int: [1, 4]}\n"
            "search: {sampler: tpe, trials: 7, seed: 3}\nmetric: test.student.macro_f1\n"
            "mode: min\nseeds: [4, 2]\n"
        )
    )
    assert space.settings == {"learning_rate": 0.001}
    decay, rate, layers = space.axes
    assert decay.values == ("none", "linear")
    assert (rate.low, rate.high, rate.log, rate.integer) == (1e-5, 1e-3, True, False)
    assert layers.samples() == (1, 2, 3, 4)
    assert (space.points, space.seeds, space.mode, space.search.seed) == (7, (4, 2), "min", 3)


def test_a_grid_runs_through_its_points_the_last_axis_fastest(write_space: WriteSpace) -> None:
    """The table and the journal list points in an order that nobody expects."""
    points = list(read_space(write_space()).grid())
    assert [tuple(point.values()) for point in points] == [(0.0, 1), (0.0, 2), (0.2, 1), (0.2, 2)]


SLIPS = {
    "name of a setting": (
        "distill.beta",
        "distill.bta",
        4,
        "unknown setting 'distill.bta', did you mean 'distill.beta'",
    ),
    "last part of a name": ("distill.beta", "beta", 4, "did you mean 'distill.beta'"),
    "a whole group": ("distill.beta", "distill", 4, "unknown setting 'distill'"),
    "value out of range": ("[0.0, 0.2]", "[0.0, 1.2]", 4, "distill.beta = 1.2"),
    "value of another type": ("[1, 2]", "[1, two]", 5, "student.layers = 'two'"),
    "value twice": ("[1, 2]", "[1, 1]", 5, "1 stands there twice"),
    "value that is a list": ("[1, 2]", "[[1], 2]", 5, "is no single value"),
    "empty grid": ("[1, 2]", "[]", 5, "expected a list of values"),
    "no kind": ("{grid: [1, 2]}", "{}", 5, "needs one of"),
    "two kinds": ("{grid: [1, 2]}", "{grid: [1, 2], int: [1, 2]}", 5, "needs one of"),
    "kind misspelt": (
        "{grid: [1, 2]}",
        "{grd: [1, 2]}",
        5,
        "unknown key of student.layers 'grd', did you mean 'grid'",
    ),
    "no mapping": ("{grid: [1, 2]}", "[1, 2]", 5, "expected names with values"),
    "range upside down": ("{grid: [1, 2]}", "{int: [4, 1]}", 5, r"did you mean \[1, 4\]"),
    "range of words": ("{grid: [1, 2]}", "{int: [a, b]}", 5, "two whole numbers"),
    "log from 0": ("{grid: [0.0, 0.2]}", "{float: [0, 0.2], log: true}", 4, "must be above 0"),
    "log and step": ("{grid: [0.0, 0.2]}", "{float: [0.1, 0.2], log: true, step: 0.1}", 4, "leave one out"),
    "step too wide": ("{grid: [0.0, 0.2]}", "{float: [0.1, 0.2], step: 0.5}", 4, "at most 0.1"),
    "range in a grid": ("{grid: [1, 2]}", "{int: [1, 2]}", 5, "the grid sampler needs values"),
    "fixed setting misspelt": ("epochs: 2", "epoch: 2", 2, "unknown setting 'epoch', did you mean 'epochs'"),
    "fixed setting out of range": ("epochs: 2", "epochs: 0", 2, "epochs = 0"),
    "seed among settings": ("epochs: 2", "seed: 2", 2, r"use `seeds: \[...\]`"),
    "seed as an axis": ("student.layers", "seed", 5, r"use `seeds: \[...\]`"),
    "seeds twice": ("seeds: [0]", "seeds: [0, 0]", 6, "each once"),
    "no seeds": ("seeds: [0]", "seeds: []", 6, "seeds"),
    "key misspelt": ("seeds: [0]", "seed: [0]", 6, "unknown key 'seed', did you mean 'seeds'"),
    "key twice": ("seeds: [0]", "name: other", 6, "'name' stands there twice, first in line 1"),
    "metric misspelt": (
        "seeds: [0]",
        "metric: validation.student.acuracy",
        6,
        "did you mean 'validation.student.accuracy'",
    ),
    "sampler misspelt": ("seeds: [0]", "search: {sampler: tpee}", 6, "sampler = 'tpee'"),
    "trials missing": ("seeds: [0]", "search: {sampler: tpe}", 6, "give `trials: N`"),
    "trials of a grid": (
        "seeds: [0]",
        "search: {sampler: grid, trials: 3}",
        6,
        "a grid tries each of its 4 points once",
    ),
    "no YAML": ("seeds: [0]", "seeds: [0", 7, "not YAML"),
    "name with a slash": ("name: small", "name: a/b", 1, "name = 'a/b'"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_named_by_file_line_and_cure(slip: str, write_space: WriteSpace) -> None:
    """A sweep runs for hours over the wrong thing, or fails with a stack of frames."""
    old, new, line, message = SLIPS[slip]
    path = write_space(**{old: new})
    with pytest.raises(SettingsError, match=message) as caught:
        read_space(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")


@pytest.mark.parametrize(
    "text", ["", "- a\n- b\n", "just words\n", "name: \x00\n", "!!python/object/apply:os.getcwd []\n"]
)
def test_a_file_that_is_no_search_space_is_one_message(text: str, write_space: WriteSpace) -> None:
    """A wrong file ends in frames, or runs what stands in it."""
    with pytest.raises(SettingsError, match=r"space\.yaml"):
        read_space(write_space(text))


def test_a_missing_or_unreadable_file_is_one_message(tmp_path: Path) -> None:
    """A misspelt path ends in frames."""
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(SettingsError, match=os.fspath(path)):
            read_space(path)


def test_vary_reads_values_as_yaml_does() -> None:
    """--vary turns numbers into words, which no setting takes and no table sorts."""
    assert parse_vary("student.layers=1,2,3") == ("student.layers", [1, 2, 3])
    assert parse_vary(" learning_rate = [1e-5, 3e-5]") == ("learning_rate", [1e-5, 3e-5])
    assert parse_vary("optimizer.clip_norm=null,1.0") == ("optimizer.clip_norm", [None, 1.0])
    for slip in ("student.layers", "student.layers=", "=1", "student.layers=1,,2"):
        with pytest.raises(SettingsError, match="expected NAME=VALUE,VALUE"):
            parse_vary(slip)
