"""The token is not given away, every failure names its cure, and a log is followed completely."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from newsbert_ray.deploy import job_client
from newsbert_ray.deploy.job_client import DashboardError, FollowError, JobEnd, connect, follow_log, job_end
from tests.deploy.conftest import dashboard, guarded, version

OWN = metadata.version("ray")


def no_warning(*warning: str) -> None:
    """For connections that are safe."""
    pytest.fail(f"{warning}")


def token_file(folder: Path, text: str = "abc123", mode: int = 0o600) -> Path:
    """A file with a token."""
    path = folder / "its-token"
    path.write_text(f"{text}\n")
    path.chmod(mode)
    return path


def test_only_a_dashboard_that_asks_for_a_token_gets_it(tmp_path: Path) -> None:
    """A token sent to any server at an address is a token given away."""
    with dashboard(lambda _: (200, {}, version())) as (address, received):
        client = connect(address, token_file=token_file(tmp_path), warn=no_warning)
    assert (received, client.token) == ([None], None)
    with dashboard(guarded("abc123")) as (address, received):
        client = connect(address, token_file=token_file(tmp_path), warn=no_warning)
    assert (received, client.token) == ([None, "Bearer abc123"], "abc123")
    assert "abc123" not in repr(client)


def test_token_does_not_follow_a_redirect(tmp_path: Path) -> None:
    """urllib would send the token to the other host."""
    with dashboard(guarded("abc123")) as (other, received):
        target = {"Location": f"{other}/api/version"}
        with (
            dashboard(lambda header: (302, target, b"") if header else (401, {}, b"")) as (address, _),
            pytest.raises(DashboardError, match=f"answers 302 .*redirects to {other}"),
        ):
            connect(address, token_file=token_file(tmp_path), warn=no_warning)
        assert received == []


def test_token_is_read_where_ray_reads_it(tmp_path: Path) -> None:
    """Whatever RAY_AUTH_MODE says: Ray's own client would have the token and not send it."""
    (tmp_path / ".ray").mkdir()
    token_file(tmp_path / ".ray", "home").rename(tmp_path / ".ray/auth_token")
    file = str(token_file(tmp_path, "file"))
    for token, more in (
        ("word", {"RAY_AUTH_TOKEN": "word", "RAY_AUTH_TOKEN_PATH": file}),
        ("file", {"RAY_AUTH_TOKEN_PATH": file}),
        ("home", {}),
    ):
        with dashboard(guarded(token)) as (address, _):
            variables = {"HOME": str(tmp_path), "RAY_API_SERVER_ADDRESS": address, **more}
            assert connect(None, warn=no_warning, environment=variables).token == token


def test_missing_and_wrong_token_have_a_cure(tmp_path: Path) -> None:
    """401 and 403 do not tell which file is missing."""
    with dashboard(guarded("right")) as (address, _):
        with pytest.raises(DashboardError, match=r"none was found; give --token_file .*RAY_AUTH_TOKEN_PATH"):
            connect(address, warn=no_warning, environment={"HOME": str(tmp_path)})
        with pytest.raises(DashboardError, match="refuses the token; copy the cluster's token") as caught:
            connect(address, token_file=token_file(tmp_path, "wrong1"), warn=no_warning)
        assert "wrong1" not in str(caught.value)


def test_warning_about_a_token_file_that_others_can_read(tmp_path: Path) -> None:
    """Whoever can read the token can run programs as its owner."""
    warnings: list[tuple[str, str]] = []
    path = token_file(tmp_path, mode=0o644)
    with dashboard(guarded("abc123")) as (address, _):
        connect(address, token_file=path, warn=lambda *warning: warnings.append(warning))
    assert warnings == [(f"{path} can be read by other users of this machine", f"chmod 600 {path}")]


@pytest.mark.parametrize("text", ["", "two words", "ümlaut"])
def test_file_without_a_token_is_refused(text: str, tmp_path: Path) -> None:
    """A wrong file must not be sent to a cluster as its token, nor be shown in a message."""
    with pytest.raises(DashboardError, match=r"its-token: contains no token") as caught:
        connect("127.0.0.1:1", token_file=token_file(tmp_path, text), warn=no_warning)
    assert not text or text not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "warned"),
    [
        ("http://10.255.255.1:8265", True),
        ("cluster.invalid:8265", True),
        ("https://cluster.invalid", False),
        ("127.0.0.1:1", False),
        ("http://[::1]:1", False),
        ("http://127.0.0.1.evil.invalid", True),
    ],
)
def test_warning_about_unencrypted_connections(
    address: str, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over plain http others can read the token and the code on their way."""
    monkeypatch.setattr(job_client, "_ask_version", lambda *_: None)
    warnings: list[tuple[str, str]] = []
    with pytest.raises(DashboardError, match="none was found"):
        connect(
            address,
            warn=lambda *warning: warnings.append(warning),
            environment={"HOME": "/nonexistent"},
        )
    assert bool(warnings) == warned
    assert all("unencrypted" in problem and "ssh -L" in cure for problem, cure in warnings)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (None, "no cluster given; give --address"),
        ("ray://head:10001", "is Ray Client's; give the dashboard's: http://head:8265"),
        ("ftp://head", "not an address; give the dashboard's: http://HOST:8265"),
        ("http://", "not an address"),
        ("http://head:port", "not an address"),
        ("http://me:hunter2@head:8265", "a password, which logs would show"),
    ],
)
def test_wrong_address_names_the_right_form(address: str | None, message: str) -> None:
    """A slip in the address must not end in a stack trace, nor show a password."""
    with pytest.raises(DashboardError, match=message) as caught:
        connect(address, warn=no_warning, environment={})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b"null"])
def test_another_server_is_not_taken_for_a_dashboard(body: bytes) -> None:
    """Jupyter or a proxy may use the port."""
    with (
        dashboard(lambda _: (200, {}, body)) as (address, _),
        pytest.raises(DashboardError, match="is not Ray's dashboard"),
    ):
        connect(address, warn=no_warning)
    with (
        dashboard(lambda _: (404, {}, body)) as (address, _),
        pytest.raises(DashboardError, match=r"answers 404 .*is this the cluster's dashboard\?"),
    ):
        connect(address, warn=no_warning)


def test_no_answer_names_the_tunnel() -> None:
    """A closed tunnel is the usual reason."""
    with pytest.raises(DashboardError, match=r"127\.0\.0\.1:1: no cluster answers .*open the tunnel"):
        connect("127.0.0.1:1", warn=no_warning)


def test_warnings_about_a_missing_token_and_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head without a token is open to everyone; another Ray fails with a misleading error."""
    monkeypatch.setattr(job_client, "_ask_version", lambda *_: "2.9.0")
    warnings: list[tuple[str, str]] = []
    assert connect("https://head:8265", warn=lambda *warning: warnings.append(warning)).token is None
    (problem, _), (versions, cure) = warnings
    assert problem.startswith("https://head:8265 asks for no token: everyone who can reach it")
    assert versions == f"https://head:8265 runs Ray 2.9.0, this machine has Ray {OWN}"
    assert cure.startswith("pip install ray==2.9.0 here")


LOG = "first\nsecond\nthird\nlast ünd\n"


@dataclass
class Info:
    """A job as Ray describes it."""

    status: str = "RUNNING"
    driver_exit_code: int | None = None
    message: str | None = None


DONE = Info("SUCCEEDED", 0)


class FakeJobs:
    """A cluster that behaves as told.

    `connections`: the pieces that each connection brings; an exception breaks it, None hangs.
    `infos`: the answers to requests for the job's state; the last one for ever.
    """

    def __init__(self, connections: Sequence[Sequence[Any]], infos: Sequence[Any]) -> None:
        self._connections, self._infos = list(connections), list(infos)

    def get_job_info(self, job_id: str) -> Any:
        info = self._infos.pop(0) if len(self._infos) > 1 else self._infos[0]
        if isinstance(info, Exception):
            raise info
        return info

    def get_job_logs(self, job_id: str) -> str:
        return LOG

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for piece in self._connections.pop(0) if self._connections else ():
            if piece is None:
                await asyncio.sleep(600)
            if isinstance(piece, Exception):
                raise piece
            yield piece


def follow(jobs: FakeJobs) -> tuple[JobEnd, str, list[str]]:
    """The job's end, its log, and the lines of explanation."""
    written: list[str] = []
    lines: list[str] = []
    end = follow_log(jobs, "job", write=written.append, say=lines.append, address="http://head")
    return end, "".join(written), lines


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PENDING_SECONDS", "CHECK_SECONDS", "POLL_SECONDS"):
        monkeypatch.setattr(job_client, name, 0.05)


def test_log_is_written_once() -> None:
    """No line is lost or repeated."""
    end, written, lines = follow(FakeJobs([["first\n", "second\nthi", "rd\nlast ünd\n"]], [Info(), DONE]))
    assert (end.code, written, lines) == (0, LOG, [])


def test_lost_connection_repeats_no_line() -> None:
    """A proxy ends each quiet connection after a minute."""
    broken = ["first\nsec", ConnectionResetError("gone")]
    jobs = FakeJobs(
        [broken, ["first\n", RuntimeError("closed with 1006")], [LOG]], [Info(), Info(), Info(), DONE]
    )
    end, written, lines = follow(jobs)
    assert (end.code, written) == (0, LOG)
    assert lines == ["the connection to http://head was lost; trying again ..."] * 2


def test_silent_connections_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a laptop slept: the end of the job is seen, and the lines of a running job come again."""
    end, written, _ = follow(FakeJobs([["first\n", None]], [Info(), Info(), Info(), DONE]))
    assert (end.code, written) == (0, LOG)
    monkeypatch.setattr(job_client, "SILENT_SECONDS", 0.1)
    assert follow(FakeJobs([["first\n", None], [LOG]], [*[Info()] * 4, DONE]))[1] == LOG


def test_pending_job_is_explained() -> None:
    """An installation of minutes looks like a cluster that hangs."""
    pending = Info("PENDING", message="Waiting for the runtime environment to be set up.\nmore")
    start = time.monotonic()

    class Slow(FakeJobs):
        def get_job_info(self, job_id: str) -> Any:
            return pending if time.monotonic() < start + 0.3 else super().get_job_info(job_id)

    _, written, lines = follow(Slow([[LOG]], [DONE]))
    assert written == LOG
    assert 1 <= len(lines) <= 3
    assert "still pending after" in lines[0]
    assert "Waiting for the runtime environment to be set up. (" in lines[0]


def test_unreachable_cluster_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dashboard that restarts must not end the log of a day's sweep; one that stays away must."""
    away = ConnectionError("refused")
    jobs = FakeJobs([["first\n", away], [LOG]], [Info(), away, away, Info(), DONE])
    assert follow(jobs)[1] == LOG
    monkeypatch.setattr(job_client, "GIVE_UP_SECONDS", 0.05)
    with pytest.raises(FollowError, match=r"http://head: no answer for 0\.05 s; job may still be running"):
        follow(FakeJobs([], [Info(), away]))


def test_unknown_job_ends_at_once() -> None:
    """A restarted head has forgotten the job: no reason to ask for five minutes."""
    with pytest.raises(FollowError, match=r"job: the cluster knows no such job; .*restarted head"):
        follow(FakeJobs([], [RuntimeError("Request failed with status code 404: Job job does not exist")]))


def test_ctrl_c_ends_at_once() -> None:
    """Taken for a lost connection, it would never give the terminal back."""
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT))
    timer.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        follow(FakeJobs([["first\n", None]], [Info()]))
    assert time.monotonic() - start < 5
    timer.join()


@pytest.mark.parametrize(
    ("info", "end"),
    [
        (Info(), None),
        (Info("PENDING"), None),
        (DONE, JobEnd("SUCCEEDED", 0, "")),
        (Info("FAILED", 3, "last lines of the log"), JobEnd("FAILED", 3, "exit code 3")),
        (Info("FAILED", -9, "text"), JobEnd("FAILED", 1, "killed by signal 9")),
        (Info("FAILED", None, "no such package\n"), JobEnd("FAILED", 1, "no such package")),
        (Info("FAILED", 0, "supervisor died"), JobEnd("FAILED", 1, "supervisor died")),
        (Info("STOPPED", None, None), JobEnd("STOPPED", 1, "")),
    ],
)
def test_end_has_the_exit_code(info: Info, end: JobEnd | None) -> None:
    """A script must not take a failed job for a successful one."""
    assert job_end(info) == end
