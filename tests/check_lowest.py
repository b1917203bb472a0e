"""Runs the quick tests with the lowest allowed version of each dependency: `make check-lowest`.

The lower bounds of pyproject.toml become exact versions in the environment .lowest. pip chooses the versions
of the packages that they need in turn. The test tools have their pinned versions.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".lowest"
TOOLS = (
    *("pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "jsonschema"),
    *("moto", "Flask", "flask-cors", "boto3", "google-api-python-client", "sentence-transformers"),
)
"""What the quick tests need besides the package."""


def lowest(requirement: str) -> str:
    """The lower bound as an exact version: `ray[data]>=2.55,<2.61` gives `ray[data]==2.55`."""
    match = re.match(r"([^>=<]+)>=([\w.]+)", requirement)
    if match is None:
        raise ValueError(f"{requirement}: no lower bound")
    return f"{match[1]}=={match[2]}"


def pinned(names: tuple[str, ...]) -> list[str]:
    """The lines of constraints.txt for these packages."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.partition("==")[0] in names]


def main(words: list[str]) -> int:
    """Install, then run pytest with `words`.

    Returns:
        pytest's exit code.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["export"]]
    python = str(FOLDER / "bin" / "python")
    if not Path(python).exists():
        venv.create(FOLDER, with_pip=True)
    install = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*install, *map(lowest, requirements), *pinned(TOOLS)], check=True)
    subprocess.run([*install, "--no-deps", "--editable", str(ROOT)], check=True)
    tests = [python, "-m", "pytest", "-m", "not ray and not slow", "-n", "auto", "--dist", "loadfile"]
    return subprocess.run([*tests, *words], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
