"""The Dockerfile: everything it copies exists, everything it installs is pinned, no secret is copied."""

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
    """`latest`, or a tag without a patch version, is a different image next month; Ray refuses nodes with
    a different Python."""
    (base,) = _all("FROM")
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-bookworm", base)


def test_copied_files_exist_and_are_not_ignored() -> None:
    """A missing file, or one that .dockerignore excludes, ends the build."""
    allowed = {line.removeprefix("!").removesuffix("/*.yaml") for line in IGNORED if line.startswith("!")}
    assert len(_copied()) == 6
    for source in _copied():
        assert (ROOT / source).exists()
        assert source in allowed


def test_nothing_else_is_sent_to_docker() -> None:
    """A .venv of gigabytes, shards or a token would end up in the image."""
    rules = [line for line in IGNORED if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {line.removeprefix("!").removesuffix("/*.yaml") for line in rules if line[0] == "!"} == set(
        _copied()
    )
    assert not [path for path in _copied() for secret in ("*token*", ".*", "*.pem") if fnmatch(path, secret)]


def test_installs_are_pinned() -> None:
    """Tomorrow's image must equal today's; Ray's version is pinned exactly once."""
    installs = [part for step in _all("RUN") for part in step.split("&&") if "pip install" in part]
    assert installs
    for command in installs:
        assert "-c constraints.txt" in command
    assert "--no-build-isolation" in installs[-1]  # else pip fetches the newest setuptools for the build
    assert "ray==" not in TEXT
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert len(re.findall(r"^ray==\d+\.\d+\.\d+$", pinned, flags=re.MULTILINE)) == 1


def test_it_does_not_run_as_root() -> None:
    """A job runs submitted code, so our Kubernetes files forbid root."""
    users = _all("USER")
    assert users == ["1000"]
    after = [step for step, _ in STEPS][[step for step, _ in STEPS].index("USER") :]
    assert "RUN" not in after
    assert not re.search(r"(?i)(token|secret|password|key)\s*=", TEXT)


def test_its_tag_is_the_version_of_the_package() -> None:
    """An old image under the new version's name would run old code."""
    tag = f"YOUR-REGISTRY/newsbert-ray:{newsbert_ray.__version__}"
    tags = set()
    for path in [
        ROOT / "cluster/Dockerfile",
        ROOT / "docs/cluster.md",
        *(ROOT / "cluster/kuberay").iterdir(),
    ]:
        tags |= set(re.findall(r"YOUR-REGISTRY/\S+?:[\w.]+\d", path.read_text(encoding="utf-8")))
    assert tags == {tag}
