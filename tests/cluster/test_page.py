"""cluster/README.md: its commands are understood, its files are there, each blank to fill in is explained."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from newsbert_ray.flags import values_from
from newsbert_ray.verbs import VERBS

FOLDER = Path(__file__).parents[2] / "cluster"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
RECIPES = [path for path in FOLDER.rglob("*") if path.suffix == ".yaml" or path.name == "Dockerfile"]
LINES = [
    line for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL) for line in block.splitlines()
]
TYPED = [
    words
    for words in (shlex.split(line, comments=True) for line in LINES if "newsbert-ray" in line)
    if "newsbert-ray" in words
]


@pytest.mark.parametrize("words", TYPED, ids=[f"{n} {words[0]}" for n, words in enumerate(TYPED)])
def test_command_is_understood(words: list[str]) -> None:
    """A command copied from the page must not end in `unknown setting` once a cluster has been paid for."""
    verb, *rest = words[words.index("newsbert-ray") + 1 :]
    assert verb in VERBS
    sent = values_from(verb, rest).get("command", [])
    if sent:
        assert sent[0] in set(VERBS) - {"submit"}
        values_from(sent[0], sent[1:])


def test_all_verbs_are_shown() -> None:
    """Lines in another form would make the test above test nothing."""
    assert {"submit", "prepare", "sweep", "train", "evaluate", "report"} <= {
        word for ws in TYPED for word in ws
    }
    assert len(TYPED) >= 10


def test_a_growing_cluster_is_asked_to_grow() -> None:
    """Without --concurrency a sweep looks for GPUs that are not there yet, and ends."""
    sweeps = [words for words in TYPED if "sweep" in words and any("s3://" in word for word in words)]
    assert sweeps
    assert all("--concurrency" in words for words in sweeps)


def test_every_blank_is_explained() -> None:
    """A file with YOUR-AMI in it starts nothing, and says so in the cloud's words."""
    blanks = {
        found for path in RECIPES for found in re.findall(r"YOUR-[A-Z]+", path.read_text(encoding="utf-8"))
    }
    explained = set(re.findall(r"^\| (YOUR-[A-Z]+) \|", PAGE, flags=re.MULTILINE))
    assert blanks == explained
    assert {"YOUR-AMI", "YOUR-PROJECT", "YOUR-BUCKET"} <= blanks


def test_every_recipe_is_named() -> None:
    """A file that the page does not name is found by nobody."""
    named = set(re.findall(r"[\w./-]+\.(?:py|yaml)", PAGE))
    for path in FOLDER.glob("*.yaml"):
        assert path.name in named
    for path in named:
        inside = path.removeprefix("cluster/")
        assert (FOLDER / inside).exists() or (FOLDER.parent / path).exists() or "VERB" in path, path


def test_roles_of_the_files_are_described() -> None:
    """A machine without its role cannot write a checkpoint; that is noticed at the end of the first epoch."""
    for cloud in ("aws", "gcp"):
        text = (FOLDER / f"{cloud}.yaml").read_text(encoding="utf-8")
        roles = set(re.findall(r"\b(newsbert-(?:head|worker))\b", text))
        assert roles == {"newsbert-head", "newsbert-worker"}
        assert all(f"`{role}`" in PAGE for role in roles)


def test_flags_of_the_local_cluster_are_there() -> None:
    """The one recipe that anybody can try must work as it is printed."""
    (line,) = [line for line in LINES if line.startswith("python -m cluster.local")]
    program = (FOLDER / "local.py").read_text(encoding="utf-8")
    flags = re.findall(r" (--\w+)", line.partition("#")[0])
    assert flags
    assert all(f'add_argument("{flag}"' in program for flag in flags)
