from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from newsbert_ray.config import SettingsError
from newsbert_ray.deploy.package import (
    Parcel,
    checked_name,
    entrypoint_of,
    job_name,
    read_entrypoint,
    read_variables,
    runtime_of,
)


def test_command_survives_the_shell() -> None:
    """The entrypoint is a shell's line: a value with a space or a `;` must stay one word, and run nothing."""
    command = ["sweep", "my space.yaml", "--vary", "seeds=0,1", "--out", "s3://b/a; touch x"]
    text = entrypoint_of(command)
    assert shlex.split(text)[3:] == command
    assert read_entrypoint(text) == ("sweep", "s3://b/a; touch x")


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("python -m newsbert_ray.cli train --out=/x --data a", ("train", "/x")),
        ("python -m newsbert_ray.cli report a", ("report", None)),
        ("python -m newsbert_ray.cli report --out", ("report", None)),
        ("python -m newsbert_ray.cli", ("", None)),
        ("python other.py --out x", ("", None)),
        ("echo 'unfinished", ("", None)),
        ("", ("", None)),
    ],
)
def test_entrypoints_of_others_are_left_alone(text: str, known: tuple[str, str | None]) -> None:
    """A cluster has other people's jobs too; listing or stopping one must not stumble over its command."""
    assert read_entrypoint(text) == known


def test_names_are_readable_and_unlike() -> None:
    """Two people who sweep in the same minute must not get the same name."""
    names = {job_name(None, ["sweep", "x"]) for _ in range(20)}
    assert len(names) > 15
    assert all(re.fullmatch(r"newsbert-sweep-\d{8}-\d{4}-[0-9a-f]{4}", name) for name in names)


@pytest.mark.parametrize("name", ["../../etc", "a/b", "", "a b", "-x", "a?b", "a\n", "é", "x" * 101])
def test_name_that_would_lead_elsewhere_is_refused(name: str) -> None:
    """A job's name becomes part of an address and of a log's file name on the head."""
    with pytest.raises(SettingsError, match="no job's name"):
        checked_name(name)


def test_requirements_leave_ray_to_the_cluster(tmp_path: Path) -> None:
    """Another Ray inside a job than outside breaks it; constraints.txt names Ray too."""
    file = tmp_path / "constraints.txt"
    file.write_text("# pinned\nnumpy==2.4.6  # ids\n\nray==2.60.0\nray[data]>=2\nray-extra==1\n")
    found = runtime_of(Parcel(pip=str(file), variables={"A": "1"}))
    assert found["pip"]["packages"] == ["numpy==2.4.6", "ray-extra==1"]
    assert found["env_vars"]["A"] == "1"
    assert "pip" not in runtime_of(Parcel())
    with pytest.raises(SettingsError, match="--pip nowhere"):
        runtime_of(Parcel(pip="nowhere"))


def test_environment_is_not_the_submitters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands in a person's environment, keys of a cloud among it, stays with the person."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hunter2")
    assert "hunter2" not in str(runtime_of(Parcel()))


def test_variables_are_read() -> None:
    """A value may hold an equals sign; a name without a value is a slip."""
    assert read_variables(["A=b=c", "B="]) == {"A": "b=c", "B": ""}
    with pytest.raises(SettingsError, match="--env A: expected NAME=VALUE"):
        read_variables(["A"])
