"""YAML files of settings: line numbers in errors, and hostile files."""

from __future__ import annotations

from pathlib import Path

import pytest

from newsbert_ray.settings import SettingsError
from newsbert_ray.yaml_file import parse_scalar, read_yaml


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
