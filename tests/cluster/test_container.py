"""The container's recipe: all it copies is there, all it installs is pinned, and no secret gets in."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import newsbert_ray

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "cluster/Dockerfile").read_text(encoding="utf-8")
STEPS = [
    line.split(maxsplit=1)
    for line in re.sub(r"\\\n", " ", TEXT).splitlines()
    if line.strip() and not line.startswith("#")
]
IGNORED = (ROOT / "cluster/Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()


def _all(word: str) -> list[str]:
    return [rest for step, rest in STEPS if step == word]


def _copied() -> list[str]:
    return [source for words in _all("COPY") for source in words.split()[:-1]]


def test_base_is_one_version() -> None:
    """`latest`, or a tag without a last number, is another image next month; nodes of another Python are
    refused by Ray."""
    (base,) = _all("FROM")
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-bookworm", base)


def test_what_is_copied_is_there_and_let_in() -> None:
    """A missing file, or one that .dockerignore keeps out, ends the build."""
    let_in = {line.removeprefix("!").removesuffix("/*.yaml") for line in IGNORED if line.startswith("!")}
    assert len(_copied()) == 6
    for source in _copied():
        assert (ROOT / source).exists()
        assert source in let_in


def test_nothing_else_is_let_in() -> None:
    """A .venv of gigabytes, shards, or a token in the folder would go into a layer for everybody."""
    rules = [line for line in IGNORED if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {line.removeprefix("!").removesuffix("/*.yaml") for line in rules if line[0] == "!"} == set(
        _copied()
    )
    assert not [path for path in _copied() for secret in ("*token*", ".*", "*.pem") if fnmatch(path, secret)]


def test_installs_are_pinned() -> None:
    """An image of tomorrow must be the image of today; Ray's version is among them, once."""
    installs = [part for step in _all("RUN") for part in step.split("&&") if "pip install" in part]
    assert installs
    for command in installs:
        assert "-c constraints.txt" in command
    assert "--no-build-isolation" in installs[-1]  # else pip fetches the newest setuptools for the build
    assert "ray==" not in TEXT
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert len(re.findall(r"^ray==\d+\.\d+\.\d+$", pinned, flags=re.MULTILINE)) == 1


def test_it_runs_as_nobody_of_importance() -> None:
    """Kubernetes refuses root here, and it must: a job's code is whatever was submitted."""
    users = _all("USER")
    assert users == ["1000"]
    after = [step for step, _ in STEPS][[step for step, _ in STEPS].index("USER") :]
    assert "RUN" not in after
    assert not re.search(r"(?i)(token|secret|password|key)\s*=", TEXT)


def test_its_tag_is_the_packages_version() -> None:
    """An image of an old version under the new one's name would run the old code."""
    tag = f"YOUR-REGISTRY/newsbert-ray:{newsbert_ray.__version__}"
    named = set()
    for path in [
        ROOT / "cluster/Dockerfile",
        ROOT / "docs/cluster.md",
        *(ROOT / "cluster/kuberay").iterdir(),
    ]:
        named |= set(re.findall(r"YOUR-REGISTRY/\S+?:[\w.]+\d", path.read_text(encoding="utf-8")))
    assert named == {tag}
