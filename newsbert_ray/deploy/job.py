"""What a job is made of: name, command, environment, what goes along; and what its command tells later.
Knows no Ray."""

from __future__ import annotations

import re
import secrets
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from newsbert_ray.config import SettingsError

ENVIRONMENT: Mapping[str, str] = {
    "PYTHONUNBUFFERED": "1",
    "TERM": "dumb",
    "COLUMNS": "110",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    # To stop is a Ctrl-C, on which a sweep ends tidily; who has not ended after that is killed.
    "RAY_JOB_STOP_SIGNAL": "SIGINT",
    "RAY_JOB_STOP_WAIT_TIME_S": "30",
}
"""Of every job: lines as they come, without cursor movements, wide enough for a table."""
HEAD: Mapping[str, float] = {"node:__internal_head__": 0.001}
"""What a job's own program occupies: the head, which is not taken away, and none of its CPUs."""
_PROGRAM = ("python", "-m", "newsbert_ray.cli")


@dataclass(frozen=True)
class Parcel:
    """What goes along: `folder` with what `include` and `exclude` say over the usual; variables; packages.

    `pip`: a file of requirements that the nodes install first; slow, and needless with an image.
    """

    folder: str = "."
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    pip: str | None = None


def read_variables(given: Sequence[str]) -> dict[str, str]:
    """{"NAME": "VALUE"} of NAME=VALUE words.

    Raises:
        SettingsError: a word that is none.
    """
    found = {}
    for word in given:
        name, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise SettingsError(f"--env {name}: expected NAME=VALUE")
        found[name] = value
    return found


def runtime_of(parcel: Parcel) -> dict[str, Any]:
    """Ray's runtime environment but for the working directory: variables, and what pip is to install.

    Ray itself is left out of the requirements: the cluster has its own.

    Raises:
        SettingsError: requirements that cannot be read.
    """
    variables = {"env_vars": {**ENVIRONMENT, **parcel.variables}}
    if parcel.pip is None:
        return variables
    try:
        lines = Path(parcel.pip).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--pip {parcel.pip}: no file of requirements ({error})") from error
    packages = [line.partition("#")[0].strip() for line in lines]
    kept = [name for name in packages if name and not re.match(r"ray\b(?!-)", name)]
    return {**variables, "pip": {"packages": kept, "pip_check": False}}


def entrypoint_of(command: Sequence[str]) -> str:
    """The command line that a cluster runs: newsbert_ray from the job's own folder."""
    return shlex.join([*_PROGRAM, *command])


def read_entrypoint(text: str) -> tuple[str, str | None]:
    """The verb of a job of ours and its --out, from its command line; an empty verb for another's job."""
    try:
        words = shlex.split(text)
    except ValueError:
        return "", None
    if tuple(words[:3]) != _PROGRAM or len(words) < 4:
        return "", None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "--out" or word.startswith("--out="):
            return words[3], word.removeprefix("--out").removeprefix("=") or following or None
    return words[3], None


def job_name(given: str | None, command: Sequence[str]) -> str:
    """The job's name as given, or one of its verb and the time, such as newsbert-sweep-20261125-1231-ab12.

    Raises:
        SettingsError: no command, or a name that cannot be.
    """
    if not command:
        raise SettingsError("nothing to submit; write the verb after --, as in: -- sweep FILE --out s3://...")
    if given is not None:
        return checked_name(given)
    return f"newsbert-{command[0]}-{time.strftime('%Y%m%d-%H%M')}-{secrets.token_hex(2)}"


def checked_name(job: str) -> str:
    """`job`, which becomes a part of addresses and of file names on the head.

    Raises:
        SettingsError: a name that cannot be.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", job):
        raise SettingsError(f"{job!r} is no job's name; expected letters, digits, '-', '_' and '.'")
    return job
