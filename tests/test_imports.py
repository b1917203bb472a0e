"""Which package may import which, and which modules may use Ray and torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "newsbert_ray"
ORDER = (
    ("files", "secrets", "ray_private"),
    (
        "settings",
        "config",
        "record",
        "ray_session",
        "methods",
        "telemetry",
        "trackers",
        "storage",
    ),
    ("data",),
    ("model",),
    ("distill",),
    ("evaluation",),
    ("training",),
    ("reporting",),
    ("tune", "deploy", "serving"),
    ("screens", "cli", "__main__"),
)
"""Layers, the lowest first; a package imports from its own layer and those below.

`reporting` needs records only; it is below `tune` because a sweep ends with its own report.
"""
LAYER = {package: layer for layer, packages in enumerate(ORDER) for package in packages}
RAY = (
    "data.stream",
    "training.ray_group",
    "tune",
    "deploy",
    "ray_private",
    "ray_session",
    "telemetry",
    "cli",
)
TORCH = (
    "ray_private",
    "data.batches",
    "data.examples",
    "data.reading",
    "model",
    "distill",
    "training",
    "evaluation",
    "tune",
    "deploy",
    "serving",
)
NO_TORCH = ("evaluation.metrics",)
HEAVY = {"torch", "transformers", "ray", "matplotlib", "datasets", "optuna", "scipy", "pandas", "tokenizers"}


class Import(NamedTuple):
    """`module` imports `target` in `line`: when it loads, inside a function, or only for the type checker."""

    module: str
    target: str
    line: int
    when: str


def _modules() -> dict[str, Path]:
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


MODULES = _modules()


def _imports(module: str) -> Iterator[Import]:
    yield from _walk(ast.parse(MODULES[module].read_text(encoding="utf-8")), module, "load")


def _walk(node: ast.AST, module: str, when: str) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for name in child.names:
                yield Import(module, name.name, child.lineno, when)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module}:{child.lineno}: relative import"
            for name in child.names:
                whole = f"{child.module}.{name.name}"
                inner = whole.removeprefix("newsbert_ray.") in MODULES
                yield Import(module, whole if inner else str(child.module), child.lineno, when)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _walk(child, module, "typing")
        else:
            deeper = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _walk(child, module, "call" if deeper and when == "load" else when)


ALL = [item for module in MODULES for item in _imports(module)]


def _own(item: Import) -> str | None:
    return item.target.removeprefix("newsbert_ray.") if item.target.startswith("newsbert_ray.") else None


def _within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _top(item: Import) -> str:
    return item.target.partition(".")[0]


def _loaded_by(module: str, whens: tuple[str, ...]) -> set[str]:
    """The packages that `module` loads, directly or through our own modules."""
    seen: set[str] = set()
    others: set[str] = set()
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if current in seen or current not in MODULES:
            continue
        seen.add(current)
        waiting.append(current.rpartition(".")[0])
        for item in _imports(current):
            own = _own(item)
            if item.when not in (("load",) if current in ("", "telemetry") else whens):
                continue  # the public functions are for users; telemetry uses Ray only if it runs already
            if own is not None:
                waiting.append(own)
            else:
                others.add(_top(item))
    return others


def test_every_package_has_its_layer() -> None:
    """A new package that is not in the order would escape every rule below."""
    packages = {module.partition(".")[0] for module in MODULES if module}
    assert packages <= LAYER.keys()


def test_no_package_imports_from_a_higher_layer() -> None:
    """With one such import the steps from a file to a figure can no longer be read in one direction."""
    wrong = [
        f"{item.module}:{item.line} imports {own}"
        for item in ALL
        if item.module
        and (own := _own(item))
        and LAYER[own.partition(".")[0]] > LAYER[item.module.partition(".")[0]]
    ]
    assert wrong == []


def test_no_two_modules_import_each_other() -> None:
    """A cycle means that neither half can be understood, tested or moved alone."""
    below: dict[str, set[str]] = {module: set() for module in MODULES}
    for item in ALL:
        own = _own(item)
        if own in MODULES and item.module and item.when != "typing" and own != item.module:
            below[item.module].add(own)
    while leaves := [module for module, targets in below.items() if not targets & below.keys()]:
        for module in leaves:
            del below[module]
    assert below == {}


@pytest.mark.parametrize(
    ("package", "allowed", "never"), [("ray", RAY, ()), ("torch", TORCH, NO_TORCH)], ids=["ray", "torch"]
)
def test_is_used_only_where_allowed(package: str, allowed: tuple[str, ...], never: tuple[str, ...]) -> None:
    """Mathematics that uses Ray, or settings that use torch, cannot be read or run without it."""
    wrong = [
        f"{item.module}:{item.line}"
        for item in ALL
        if _top(item) == package and (not _within(item.module, allowed) or _within(item.module, never))
    ]
    assert wrong == []


def test_rays_private_modules_are_named_in_one_file() -> None:
    """A new version of Ray then breaks one file of the package, whose tests name the function that fails.

    Nodes of a test cluster on one machine have the other file.
    """
    private = re.compile(
        r"\bray\.(_|autoscaler\.(_private|v2)|core\.generated|experimental\.internal_kv)|_TorchBackend|_set_torch"
    )
    sources = {**MODULES, **{path.name: path for path in (PACKAGE.parent / "cluster").glob("*.py")}}
    wrong = [
        f"{name}:{number}"
        for name, path in sources.items()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if name not in ("ray_private", "provider.py") and private.search(line)
    ]
    assert wrong == []


def test_locations_are_resolved_in_public_functions() -> None:
    """A function that has to ask whether a string is a URL works on something other than a local path."""
    public = {
        *("data.prepare", "evaluation.evaluate", "reporting.report"),
        *("serving.bench", "serving.export", "serving.texts"),
    }
    modules = {
        module
        for module, path in MODULES.items()
        if re.search(r"\bis_url\b", path.read_text(encoding="utf-8")) and not module.startswith("storage.")
    }
    assert modules <= public


@pytest.mark.parametrize("module", ["", "cli", "config", "record", "reporting.report"])
def test_command_line_loads_nothing_heavy(module: str) -> None:
    """A `--help` that loads torch answers after five seconds instead of at once."""
    assert _loaded_by(module, ("load",)) & HEAVY == set()


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("reporting.")])
def test_report_needs_neither_torch_nor_ray(module: str) -> None:
    """Records are read where nothing is trained: on a laptop, years later."""
    assert _loaded_by(module, ("load", "call")) & {"torch", "ray", "transformers"} == set()


def test_import_of_the_command_line_loads_nothing_heavy_in_a_new_process() -> None:
    """The test above reads the source; an import that it misses would still cost five seconds."""
    code = f"import sys, newsbert_ray, newsbert_ray.cli; print({HEAVY!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_nothing_happens_on_import() -> None:
    """A module that prints, sets the environment or makes folders on import surprises its users."""
    calls = []
    for module, path in MODULES.items():
        body = ast.parse(path.read_text(encoding="utf-8")).body
        own = {statement.name for statement in body if isinstance(statement, ast.ClassDef)}
        for statement in body:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
                whose = ast.unparse(statement.value.func).partition(".")[0]
                calls += [] if whose in own else [f"{module}:{statement.lineno}"]
    assert calls == []
