"""Installs a wheel into an empty environment and runs a small demo from there: `make wheel`."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
SOURCES = "--source corpus/synthetic_train --source corpus/synthetic_dev"
DEMO = (
    "newsbert-ray synthesize --news 2000 --out corpus",
    f"newsbert-ray prepare {SOURCES} --teacher scratch --out shards",
    "newsbert-ray sweep demo --data shards --vary seeds=0 --vary student.layers=1 --out sweep",
    "newsbert-ray report sweep --out report",
)


def main(wheel: Path) -> None:
    """Fails if a command fails, or if the commands do not run the code of the wheel."""
    with TemporaryDirectory(prefix="newsbert-wheel-") as name:
        folder = Path(name)
        venv.create(folder / "venv", with_pip=True)
        programs = folder / "venv" / "bin"
        environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
        environment.pop("PYTHONPATH", None)  # else pip takes the checkout for the installed package

        def run(program: str, *words: str) -> None:
            subprocess.run([str(programs / program), *words], cwd=folder, env=environment, check=True)

        install = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet")
        run("python", *install, "-c", str(ROOT / "constraints.txt"), str(wheel))
        run("python", "-c", f"import newsbert_ray as n; assert n.__file__.startswith({str(folder)!r}), n")
        for command in DEMO:
            print("$", command, flush=True)
            program, *words = command.split()
            run(program, *words)
        assert (folder / "report" / "report.html").exists()
    print(f"{wheel.name}: installed into an empty environment, and the demo ran there")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
