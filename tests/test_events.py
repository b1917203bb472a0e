"""The log of events: whole lines whatever happens, and no secret in them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from newsbert_ray.secrets import mask_fields, mask_text
from newsbert_ray.telemetry import EVENTS, EventLog, read_events


def test_an_event_says_when_what_and_where(tmp_path: Path) -> None:
    """Lines without a time in one zone cannot be laid beside a cloud's own log of a lost node."""
    log = EventLog(tmp_path / "first")
    (tmp_path / "first").mkdir()
    log("start", workers=2)
    log("node_gone", node="ab12")
    first, second = read_events(tmp_path / "first")
    assert first.items() >= {"event": "start", "run": "first", "workers": 2}.items()
    assert second["node"] == "ab12"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
    assert first["time"] <= second["time"]


def test_the_loop_s_entries_become_events(tmp_path: Path) -> None:
    """After a spot machine's end the first question is whether its warning was heeded, and at which step."""
    report = EventLog(tmp_path).report
    report({"kind": "log", "step": 20, "train": {"total": 1.0}})
    report(
        {"kind": "evaluation", "step": 20, "epoch": 1.0, "validation": {"student": {"auc": 0.6}}, "train": {}}
    )
    report({"kind": "checkpoint", "step": 25, "preempted": False})
    report({"kind": "checkpoint", "step": 31, "preempted": True})
    found = [(event["event"], event["step"]) for event in read_events(tmp_path)]
    assert found == [("evaluation", 20), ("checkpoint", 25), ("preemption", 31)]


def test_an_unknown_event_is_our_own_slip(tmp_path: Path) -> None:
    """`ended` beside `end`, and whoever counts ends counts half of them."""
    with pytest.raises(AssertionError, match="ended"):
        EventLog(tmp_path)("ended")  # type: ignore[arg-type]


def test_a_line_cut_short_spoils_no_other(tmp_path: Path) -> None:
    """A kill in the midst of a write must not swallow the next start's line."""
    (tmp_path / EVENTS).write_text('{"event": "start"}\n{"event": "che', encoding="utf-8")
    EventLog(tmp_path)("resume", step=7)
    assert [event["event"] for event in read_events(tmp_path)] == ["start", "resume"]


_WRITE_MANY = """
import sys
from newsbert_ray.telemetry import EventLog
log = EventLog(sys.argv[1], run=sys.argv[2])
for step in range(200):
    log("checkpoint", step=step, text="x" * 300)
"""


def test_many_processes_write_whole_lines(tmp_path: Path) -> None:
    """Trials and driver of a sweep share a file; lines through one another would be lost."""
    command = [sys.executable, "-c", _WRITE_MANY, str(tmp_path)]
    writers = [subprocess.Popen([*command, str(run)]) for run in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    lines = (tmp_path / EVENTS).read_text().splitlines()
    assert len(lines) == 600
    for run in range(3):
        steps = [event["step"] for event in map(json.loads, lines) if event["run"] == str(run)]
        assert steps == list(range(200))


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    """A full disk's own error must reach the person, not one about the log of it."""
    (tmp_path / EVENTS).mkdir()
    EventLog(tmp_path)("error", reason="disk full")
    EventLog(tmp_path / "gone")("error", reason="disk full")
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize(
    "name",
    ["token", "api_key", "AWS_SECRET_ACCESS_KEY", "hfToken", "db.password", "X-Api-Key", "credentials"],
)
def test_fields_named_like_a_secret_are_masked(name: str) -> None:
    """A log is the first thing that people send to others."""
    assert mask_fields({"settings": {name: "hunter2"}}) == {"settings": {name: "***"}}


@pytest.mark.parametrize(
    "name", ["max_tokens", "tokenizer", "keep", "monkey", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"]
)
def test_fields_that_only_look_alike_stay(name: str) -> None:
    """A log in which `max_tokens` is masked tells nobody how long the titles were."""
    assert mask_fields({name: "30"}) == {name: "30"}


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("mysql://me:p@ss/w@host/db failed", "mysql://me:***@host/db failed"),
        ("https://ghp_abc@github.com/x", "https://***@github.com/x"),
        ("s3://a:b@bucket/x?access_key_id=c&region=d e", "s3://a:***@bucket/x?access_key_id=***&region=d e"),
        ("GET s3://b/x?X-Amz-Signature=ab12&y=1", "GET s3://b/x?X-Amz-Signature=***&y=1"),
        ("header Authorization: Bearer ab12cd34ef", "header Authorization: Bearer ***"),
        ("postgresql://h/db?user=me&password=hunter2", "postgresql://h/db?user=me&password=***"),
        (
            "s3://bucket/runs/beta=0.1,seed=0 at 10.0.0.5:6379",
            "s3://bucket/runs/beta=0.1,seed=0 at 10.0.0.5:6379",
        ),
    ],
)
def test_secrets_within_texts_are_masked(text: str, masked: str) -> None:
    """An error's message quotes the URL that it failed at, with the password in it."""
    assert mask_text(text) == masked


def test_secrets_of_the_environment_are_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries put a refused token into their messages, where no name in front of it gives it away."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "c0ffee" * 8)
    fields: dict[str, Any] = {"reason": ValueError("refused " + "c0ffee" * 8), "tried": ["c0ffee" * 8]}
    EventLog(tmp_path)("error", **fields)
    assert "c0ffee" not in (tmp_path / EVENTS).read_text()
    assert read_events(tmp_path)[0]["reason"] == "refused ***"


def test_the_folder_one_is_in_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells call it PWD: each path under it would be hidden from the log and from a list of jobs."""
    monkeypatch.setenv("PWD", "/home/anna/news")
    monkeypatch.setenv("DB_PWD", "/unlikely/but/a/password")
    assert mask_text("/home/anna/news/shards") == "/home/anna/news/shards"
    assert mask_text("/unlikely/but/a/password") == "***"
