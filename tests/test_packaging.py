"""pyproject.toml and constraints.txt: dependencies are used and pinned, the wheel holds every package."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

import newsbert_ray
from newsbert_ray.tune.space_file import find_space_file

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
PINNED = {
    re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower()
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if "==" in line
}
MODULES = {
    "pyyaml": "yaml",
    "docstring-parser": "docstring_parser",
    "scikit-learn": "sklearn",
    "mlflow-skinny": "mlflow",
}
"""The import name, where it differs from the package's name."""
NOT_IMPORTED = {
    "pandas": "Ray Data and Tune read their tables with it",
    "optuna-dashboard": "a command that a sweep prints at its end",
}
"""Dependencies that the package does not import, and why they are needed."""


def _names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[><=]", requirement)[0].lower() for requirement in requirements}


def _imported() -> set[str]:
    modules: set[str] = set()
    for path in (ROOT / "newsbert_ray").rglob("*.py"):
        if path.parent.name == "portable":  # runs where a model is served
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(str(node.module).partition(".")[0])
    return modules - sys.stdlib_module_names - {"newsbert_ray"}


def test_dependencies_are_what_the_package_imports() -> None:
    """One too many is a download and a risk for everybody; one too few fails on a new machine."""
    named = _names(PROJECT["dependencies"]) - NOT_IMPORTED.keys()
    extras = (PROJECT["optional-dependencies"][name] for name in ("export", "mlflow", "wandb"))
    optional = {MODULES.get(name, name) for extra in extras for name in _names(extra)}
    assert {MODULES.get(name, name) for name in named} == _imported() - optional


@pytest.mark.parametrize("group", ["dependencies", "dev", "docs", "export"])
def test_every_requirement_is_pinned(group: str) -> None:
    """With an unpinned package, tomorrow's environment differs from today's."""
    listed = PROJECT["dependencies"] if group == "dependencies" else PROJECT["optional-dependencies"][group]
    assert {name.replace("_", "-") for name in _names(listed)} - {"newsbert-ray"} <= PINNED


def test_setuptools_is_pinned() -> None:
    """setuptools is needed at run time, too: by torch and tensorboard."""
    assert "setuptools" in PINNED


def test_wheel_holds_every_package() -> None:
    """A folder that the list leaves out is missing from the wheel, not from the checkout."""
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "newsbert_ray").rglob("*.py")}
    packages = {".".join(folder.parts) for folder in folders}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == packages | {"newsbert_ray.search_spaces"}


def test_wheel_holds_every_other_file() -> None:
    """A template that is missing from the wheel is found out by the first report."""
    listed = PYPROJECT["tool"]["setuptools"]["package-data"]
    inside = {path for package, names in listed.items() for name in names
              for path in (ROOT / package.replace(".", "/")).glob(name)}  # fmt: skip
    files = {path for path in (ROOT / "newsbert_ray").rglob("*.*") if path.is_file()}
    assert {path.name for path in files - inside if path.suffix not in (".py", ".pyc")} == set()


@pytest.mark.parametrize("name", ["demo", "search_spaces/demo.yaml"])
def test_search_spaces_are_reachable_anywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who installed the wheel has no folder search_spaces."""
    monkeypatch.chdir(tmp_path)
    assert find_space_file(name).read_text(encoding="utf-8").startswith("# ")
    assert not find_space_file("no_such").exists()


def test_versions_agree() -> None:
    """The changelog has an entry for the version of the package."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\d\S+)", changelog, flags=re.MULTILINE)[0] == newsbert_ray.__version__


def test_tests_mirror_the_package() -> None:
    """The tests of a module are found by its path; nine modules in ten have some."""
    modules = [path.relative_to(ROOT / "newsbert_ray") for path in (ROOT / "newsbert_ray").rglob("*.py")]
    modules = [path for path in modules if not path.name.startswith("__") and "portable" not in path.parts]
    missing = [path for path in modules if not (ROOT / "tests" / path.parent / f"test_{path.name}").exists()]
    assert len(missing) <= len(modules) / 10, missing
