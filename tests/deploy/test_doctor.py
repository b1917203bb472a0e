"""The doctor's verb: lines for a person, JSON and an exit code for a script."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from newsbert_ray import cli
from newsbert_ray.deploy import doctor as doctors
from newsbert_ray.deploy.doctor import Finding


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """The command line silences libraries through the environment; other tests keep theirs."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


@pytest.fixture
def quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a test names is looked at; the rest is this machine's affair."""
    for name in ("check_versions", "check_devices", "check_ports", "check_token", "check_cluster"):
        monkeypatch.setattr(doctors, name, lambda *_, **__: [])


@pytest.mark.usefixtures("quiet_machine")
def test_the_verb_ends_with_the_number_of_ills(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script that looks before it submits needs the exit code; a person the cure below the ill."""
    assert cli.main(["doctor", "--data", str(shards), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert f"shards    {shards}" in said.out
    assert cli.main(["doctor", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert said.err == "newsbert-ray doctor: 1 to mend; what to do stands below each\n"
    ill_line, cure = said.out.splitlines()[-2:]
    assert ill_line.startswith("mend shards")
    assert cure.strip().startswith("cure: newsbert-ray prepare")


@pytest.mark.usefixtures("quiet_machine")
def test_the_verb_for_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Monitoring reads JSON; colours or wrapped lines in it would be another fault to mend."""
    assert cli.main(["doctor", "--json", "--data", str(tmp_path), "--out", str(tmp_path)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert {tuple(item) for item in found} == {("topic", "state", "found", "cure")}
    assert [item["state"] for item in found if item["topic"] == "shards"] == ["mend"]


def test_the_address_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cluster that the run will join is the one to look at."""
    asked: list[str | None] = []
    for name in ("check_versions", "check_devices", "check_storage", "check_ports", "check_token"):
        monkeypatch.setattr(doctors, name, lambda *_, **__: [])

    def ask(address: str | None, *_: object, **__: object) -> list[Finding]:
        asked.append(address)
        return []

    monkeypatch.setattr(doctors, "check_cluster", ask)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    list(doctors.doctor())
    list(doctors.doctor(address="http://head:8265"))
    assert asked == ["head:6379", "http://head:8265"]
