"""What pyproject.toml and constraints.txt promise: what is installed is used, what is used is installed."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINNED = {
    re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower()
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if "==" in line
}
MODULES = {"pyyaml": "yaml"}
"""What a package is imported as, where that is not its name."""
UNSEEN = {
    "pandas": "Ray Data and Tune read their tables with it",
    "optuna-dashboard": "a command that a sweep's closing line names",
}
"""Packages that no line of ours imports, and what they are for."""


def _names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[><=]", requirement)[0].lower() for requirement in requirements}


def _imported() -> set[str]:
    found: set[str] = set()
    for path in (ROOT / "newsbert_ray").rglob("*.py"):
        if path.parent.name == "portable":  # runs where a model is served
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).partition(".")[0])
    return found - sys.stdlib_module_names - {"newsbert_ray"}


def test_dependencies_are_what_the_package_imports() -> None:
    """A package too many is a download and a risk for everybody; one too few fails on a fresh machine."""
    named = _names(PROJECT["dependencies"]) - UNSEEN.keys()
    optional = _names(PROJECT["optional-dependencies"]["export"])
    assert {MODULES.get(name, name) for name in named} == _imported() - optional


@pytest.mark.parametrize("group", ["dependencies", "dev", "export"])
def test_every_requirement_is_pinned(group: str) -> None:
    """An unpinned package makes tomorrow's environment another one than today's."""
    listed = PROJECT["dependencies"] if group == "dependencies" else PROJECT["optional-dependencies"][group]
    assert {name.replace("_", "-") for name in _names(listed)} - {"newsbert-ray"} <= PINNED


def test_what_torch_needs_at_run_time_is_pinned() -> None:
    """setuptools is no tool of the build alone: torch and tensorboard ask for it."""
    assert "setuptools" in PINNED
