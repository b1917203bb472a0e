"""Installs the lowest allowed version of each dependency into .lowest and runs the quick tests: `make check-lowest`.

The lower bounds of pyproject.toml become exact versions. Packages that they need in turn are chosen by pip.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".lowest"
TOOLS = ("pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "psutil", "jsonschema", "moto", "flask", "flask-cors")
"""What the quick tests need besides the package; these stay at their pinned versions."""


def lowest(requirement: str) -> str:
    """`ray[data]>=2.55,<2.61` -> `ray[data]==2.55`."""
    match = re.match(r"([\w.\[\],-]+?)>=([\w.]+)", requirement)
    if match is None:
        raise ValueError(f"{requirement}: no lower bound")
    return f"{match[1]}=={match[2]}"


def main(words: list[str]) -> int:
    """Returns pytest's exit code; `words` go to pytest."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    python = FOLDER / "bin" / "python"
    if not python.exists():
        venv.create(FOLDER, with_pip=True)
    packages = [*map(lowest, project["dependencies"]), *map(lowest, project["optional-dependencies"]["export"])]
    install = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*install, *packages, *TOOLS_PINNED], check=True)
    subprocess.run([*install, "--no-deps", "--editable", str(ROOT)], check=True)
    tests = [str(python), "-m", "pytest", "-m", "not ray and not slow", "-p", "no:cacheprovider", "-n", "auto"]
    return subprocess.run([*tests, *words], cwd=ROOT, env=dict(os.environ), check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
