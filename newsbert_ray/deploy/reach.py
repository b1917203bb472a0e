"""What a command's paths mean on a cluster, known before it is sent; no secret in its words. Knows no Ray."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from newsbert_ray.config import SettingsError
from newsbert_ray.deploy.package import Package
from newsbert_ray.events import mask_text

_READ = (
    "config",
    "space",
    "curves",
    "data",
    "source",
    "run",
    "folders",
    "input",
    "vectors",
    "behaviors",
    "teacher",
)
_WRITTEN = ("out", "submission")
_NAMES = ("teacher",)
"""What may be a name of Hugging Face's instead of a path."""
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|(^|_)KEY(_ID)?$|API_?KEY", re.IGNORECASE)
_SECRET_IN_URL = re.compile(
    r"\w://[^/\s@]+:[^/\s@]+@|[?&][^=&\s]*(secret|token|password|access_key)[^=&\s]*=", re.IGNORECASE
)
SHARED = "a URL such as s3://BUCKET/FOLDER, or an absolute path on a disk that all nodes share"


def check_reach(values: Mapping[str, Any], package: Package) -> list[str]:
    """Refuse what the cluster cannot see, and say what it must.

    Args:
        values: what the command names, by the setting's name: {"data": "shards", "out": "s3://..."}.
    Returns:
        Lines to show: absolute paths, which only a shared disk makes the same everywhere.
    Raises:
        SettingsError: a file or folder that is not sent, or a result that nobody would find.
    """
    absolute = []
    for name, path in _paths(values):
        if "://" in path:
            continue
        if PurePosixPath(path).is_absolute() or path.startswith("~"):
            absolute.append(f"{_flag(name)} {path}")
        elif name in _WRITTEN:
            raise SettingsError(
                f"{_flag(name)} {path}: would lie in the job's own folder on the cluster, which Ray removes; "
                f"give {SHARED}"
            )
        else:
            _require_sent(name, path, package)
    return [f"note: every node must see {', '.join(absolute)} at that path"] if absolute else []


def check_words(words: Sequence[str], variables: Mapping[str, str]) -> None:
    """Refuse secrets: Ray shows a job's words and variables to everybody who may look at the cluster.

    Raises:
        SettingsError: a password in a URL, or a variable that by its name is a secret.
    """
    cure = "give the nodes a role, or a secret of the cluster's own, instead"
    for word in words:
        if _SECRET_IN_URL.search(word):
            raise SettingsError(
                f"{mask_text(word)}: a secret in a job's command is shown to everybody; {cure}"
            )
    for name, value in variables.items():
        if _SECRET_NAME.search(name) or _SECRET_IN_URL.search(value):
            raise SettingsError(
                f"--env {name}: a secret in a job's environment is shown to everybody; {cure}"
            )


def _paths(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in (*_READ, *_WRITTEN):
        given = values.get(name)
        for path in given if isinstance(given, list) else [given]:
            if isinstance(path, str):
                yield name, path


def _require_sent(name: str, path: str, package: Package) -> None:
    inside = os.path.normpath(path)
    if package.holds(inside):
        return
    there = (package.root / inside).exists()
    if name in _NAMES and not there:
        return
    if not there:
        raise SettingsError(f"{_flag(name)} {path}: not in {package.root}, which is sent; give {SHARED}")
    if inside.startswith(".."):
        raise SettingsError(f"{_flag(name)} {path}: outside of {package.root}, which is sent; give {SHARED}")
    raise SettingsError(
        f"{_flag(name)} {path}: the cluster cannot see it, it is not among the files that are sent; give "
        f"{SHARED}, or send it along with --include /{_pattern(package.root / inside, inside)}"
    )


def _pattern(path: Path, name: str) -> str:
    return f"{name}/" if path.is_dir() else name


def _flag(name: str) -> str:
    return {
        "space": "the search space",
        "run": "the run",
        "folders": "the folder",
        "vectors": "the vectors",
    }.get(name, f"--{name}")
