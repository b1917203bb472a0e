"""docs/cluster.md explains every file of cluster/, every placeholder and every role."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "cluster"
PAGE = (FOLDER.parent / "docs" / "cluster.md").read_text(encoding="utf-8")
RECIPES = [path for path in FOLDER.rglob("*") if path.suffix == ".yaml" or path.name == "Dockerfile"]
LINES = [
    line for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL) for line in block.splitlines()
]
TYPED = [
    words
    for words in (shlex.split(line, comments=True) for line in LINES if "newsbert-ray" in line)
    if "newsbert-ray" in words
]


def test_sweeps_ask_for_nodes() -> None:
    """Without --concurrency a sweep looks for GPUs that have not started yet, and ends."""
    sweeps = [words for words in TYPED if "sweep" in words and any("s3://" in word for word in words)]
    assert sweeps
    assert all("--concurrency" in words for words in sweeps)


def test_every_placeholder_is_explained() -> None:
    """A file with YOUR-AMI in it starts nothing."""
    placeholders = {
        name for path in RECIPES for name in re.findall(r"YOUR-[A-Z]+", path.read_text(encoding="utf-8"))
    }
    explained = set(re.findall(r"^\| (YOUR-[A-Z]+) \|", PAGE, flags=re.MULTILINE))
    assert placeholders == explained
    assert {"YOUR-AMI", "YOUR-PROJECT", "YOUR-BUCKET"} <= placeholders


def test_every_file_is_named() -> None:
    """Nobody finds a file that the page does not name."""
    named = set(re.findall(r"[\w./-]+\.(?:py|yaml)", PAGE))
    for path in FOLDER.glob("*.yaml"):
        assert path.name in named
    for path in named:
        inside = path.removeprefix("cluster/")
        assert (FOLDER / inside).exists() or (FOLDER.parent / path).exists() or "VERB" in path, path


def test_roles_of_the_files_are_described() -> None:
    """A machine without its role cannot write its first checkpoint."""
    for cloud in ("aws", "gcp"):
        text = (FOLDER / f"{cloud}.yaml").read_text(encoding="utf-8")
        roles = set(re.findall(r"\b(newsbert-(?:head|worker))\b", text))
        assert roles == {"newsbert-head", "newsbert-worker"}
        assert all(f"`{role}`" in PAGE for role in roles)


def test_flags_of_the_local_cluster_exist() -> None:
    """The local cluster must start with the command on the page."""
    lines = [line.partition("#")[0] for line in LINES if line.startswith("python -m cluster.local")]
    program = (FOLDER / "local.py").read_text(encoding="utf-8")
    flags = re.findall(r" (--\w+)", " ".join(lines))
    assert flags
    assert all(f'"{flag}"' in program for flag in flags)
