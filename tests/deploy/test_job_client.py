""""""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from newsbert_ray.deploy import job_client as following
from newsbert_ray.deploy.job_client import ContactError, FollowError, JobEnd, end_of, follow, make_contact

HERE = metadata.version("ray")
Answer = Callable[[str | None], tuple[int, Mapping[str, str], bytes]]
"""Of a dashboard: its answer, with headers and body, to an Authorization header."""


@contextmanager
def _dashboard(answer: Answer) -> Iterator[tuple[str, list[str | None]]]:
    """A loopback server, its address, and the Authorization headers that it was shown."""
    shown: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown.append(self.headers.get("Authorization"))
            code, headers, body = answer(shown[-1])
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", shown
        finally:
            server.shutdown()
            thread.join()


def _version(ray: str = HERE) -> bytes:
    return json.dumps({"version": "4", "ray_version": ray}).encode()


def _guarded(token: str) -> Answer:
    def answer(shown: str | None) -> tuple[int, Mapping[str, str], bytes]:
        if shown is None:
            return 401, {}, b"Unauthorized: Missing authentication token"
        return (200, {}, _version()) if shown == f"Bearer {token}" else (403, {}, b"Forbidden")

    return answer


def _token(folder: Path, text: str = "abc123", mode: int = 0o600) -> Path:
    path = folder / "its-token"
    path.write_text(f"{text}\n")
    path.chmod(mode)
    return path


def test_token_is_shown_to_who_asks_only(tmp_path: Path) -> None:
    """A token sent to whatever answers at an address is a token given away."""
    with _dashboard(lambda _: (200, {}, _version())) as (address, shown):
        contact = make_contact(address, token_file=_token(tmp_path), say=pytest.fail)
    assert shown == [None]
    assert contact.token is None
    with _dashboard(_guarded("abc123")) as (address, shown):
        contact = make_contact(address, token_file=_token(tmp_path), say=pytest.fail)
    assert shown == [None, "Bearer abc123"]
    assert contact.token == "abc123"
    assert "abc123" not in repr(contact)


def test_token_does_not_follow_a_redirect(tmp_path: Path) -> None:
    """The library would send the token on to the other host."""
    with _dashboard(_guarded("abc123")) as (other, reached):
        moved = {"Location": f"{other}/api/version"}
        with (
            _dashboard(lambda shown: (302, moved, b"") if shown else (401, {}, b"")) as (address, _),
            pytest.raises(ContactError, match=f"answers 302 .*sends on to {other}"),
        ):
            make_contact(address, token_file=_token(tmp_path), say=pytest.fail)
        assert reached == []


def test_token_is_found_where_ray_looks(tmp_path: Path) -> None:
    """RAY_AUTH_MODE is no condition: Ray's own client would stand there with the token and not show it."""
    (tmp_path / ".ray").mkdir()
    _token(tmp_path / ".ray", "home").rename(tmp_path / ".ray/auth_token")
    file = str(_token(tmp_path, "file"))
    for token, more in (
        ("word", {"RAY_AUTH_TOKEN": "word", "RAY_AUTH_TOKEN_PATH": file}),
        ("file", {"RAY_AUTH_TOKEN_PATH": file}),
        ("home", {}),
    ):
        with _dashboard(_guarded(token)) as (address, _):
            variables = {"HOME": str(tmp_path), "RAY_API_SERVER_ADDRESS": address, **more}
            assert make_contact(None, say=pytest.fail, environment=variables).token == token


def test_missing_and_wrong_token_say_what_to_do(tmp_path: Path) -> None:
    """401 and 403 tell nobody which file is missing."""
    with _dashboard(_guarded("right")) as (address, _):
        with pytest.raises(
            ContactError, match=r"none is known here; give --token_file .*RAY_AUTH_TOKEN_PATH"
        ):
            make_contact(address, say=pytest.fail, environment={"HOME": str(tmp_path)})
        with pytest.raises(ContactError, match="refuses the token; copy its own") as caught:
            make_contact(address, token_file=_token(tmp_path, "wrong1"), say=pytest.fail)
        assert "wrong1" not in str(caught.value)


def test_token_file_of_others_is_warned_of(tmp_path: Path) -> None:
    """Who can read the token runs programs as its owner."""
    said: list[str] = []
    with _dashboard(_guarded("abc123")) as (address, _):
        make_contact(address, token_file=_token(tmp_path, mode=0o644), say=said.append)
    assert len(said) == 1
    assert "can be read by other users" in said[0]
    assert "chmod 600" in said[0]


@pytest.mark.parametrize("text", ["", "two words", "ümlaut"])
def test_file_without_a_token_is_refused(text: str, tmp_path: Path) -> None:
    """A wrong file as token must not be sent to a cluster, nor shown in a message."""
    with pytest.raises(ContactError, match=r"its-token: holds no token") as caught:
        make_contact("127.0.0.1:1", token_file=_token(tmp_path, text), say=pytest.fail)
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
def test_readable_way_is_warned_of(address: str, warned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over plain http to another machine token and code can be read on the way, and nobody would know."""
    monkeypatch.setattr("newsbert_ray.deploy.job_client._version", lambda *_: None)
    said: list[str] = []
    with pytest.raises(ContactError, match="none is known here"):
        make_contact(address, say=said.append, environment={"HOME": "/nonexistent"})
    assert bool(said) == warned
    assert all("neither https nor on this machine" in line and "ssh -L" in line for line in said)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (None, "no cluster named; give --address"),
        ("ray://head:10001", "jobs go to the dashboard, http://head:8265"),
        ("ftp://head", "expected http://HOST:8265"),
        ("http://", "expected http://HOST:8265"),
        ("http://head:port", "expected http://HOST:8265"),
        ("http://me:hunter2@head:8265", "a password in it would be shown in logs"),
    ],
)
def test_address_that_cannot_be_names_one_that_can(address: str | None, message: str) -> None:
    """A slip in the address must not end in a library's trace, nor show a password."""
    with pytest.raises(ContactError, match=message) as caught:
        make_contact(address, say=pytest.fail, environment={})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b"null"])
def test_another_server_is_told_from_a_dashboard(body: bytes) -> None:
    """Jupyter or a proxy at the port must not be taken for a cluster."""
    with (
        _dashboard(lambda _: (200, {}, body)) as (address, _),
        pytest.raises(ContactError, match="something else than Ray's dashboard"),
    ):
        make_contact(address, say=pytest.fail)
    with (
        _dashboard(lambda _: (404, {}, body)) as (address, _),
        pytest.raises(ContactError, match=r"answers 404 .*is it the cluster's dashboard\?"),
    ):
        make_contact(address, say=pytest.fail)


def test_nobody_there_is_said() -> None:
    """A tunnel that is not open is the usual reason, and the message must lead to it."""
    with pytest.raises(ContactError, match=r"127\.0\.0\.1:1: no cluster answers there .*open the tunnel"):
        make_contact("127.0.0.1:1", say=pytest.fail)


def test_cluster_that_lets_everybody_in_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's heads ask for no token unless told to: whoever finds the port has the machines."""
    monkeypatch.setattr("newsbert_ray.deploy.job_client._version", lambda *_: HERE)
    said: list[str] = []
    assert make_contact("https://head:8265", say=said.append).token is None
    assert said == [
        "warning: https://head:8265 asks for no token: whoever reaches it runs programs on the cluster"
    ]


def test_other_version_of_ray_is_said() -> None:
    """What works here may not work there, and the reason would be sought elsewhere."""
    said: list[str] = []
    with _dashboard(lambda _: (200, {}, _version("2.9.0"))) as (address, _):
        make_contact(address, say=said.append)
    assert said == [
        f"warning: Ray is 2.9.0 there and {HERE} here; take an image with ray=={HERE} for the cluster, or "
        "pip install ray==2.9.0 here"
    ]


LOG = "first\nsecond\nthird\nlast ünd\n"


@dataclass
class Info:
    status: str = "RUNNING"
    driver_exit_code: int | None = None
    message: str | None = None


DONE = Info("SUCCEEDED", 0)


class StandIn:
    """A cluster that behaves as told.

    `connections`: what each tail brings, in pieces; an exception among them breaks it, None hangs.
    `infos`: what is answered when asked for the job, the last one for ever.
    """

    def __init__(self, connections: Sequence[Sequence[Any]], infos: Sequence[Any], log: str = LOG) -> None:
        self._connections, self._infos, self._log = list(connections), list(infos), log

    def get_job_info(self, job_id: str) -> Any:
        found = self._infos.pop(0) if len(self._infos) > 1 else self._infos[0]
        if isinstance(found, Exception):
            raise found
        return found

    def get_job_logs(self, job_id: str) -> str:
        return self._log

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for piece in self._connections.pop(0) if self._connections else ():
            if piece is None:
                await asyncio.sleep(600)
            if isinstance(piece, Exception):
                raise piece
            yield piece


def _follow(jobs: StandIn) -> tuple[JobEnd, str, list[str]]:
    written: list[str] = []
    said: list[str] = []
    end = follow(jobs, "job", write=written.append, say=said.append, address="http://head")
    return end, "".join(written), said


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PENDING_SECONDS", "LOOK_SECONDS", "POLL_SECONDS"):
        monkeypatch.setattr(following, name, 0.05)


def test_whole_log_once() -> None:
    """A line lost or doubled, and the log is no log."""
    end, written, said = _follow(StandIn([["first\n", "second\nthi", "rd\nlast ünd\n"]], [Info(), DONE]))
    assert (end.code, written, said) == (0, LOG, [])


def test_dropped_connection_repeats_no_line() -> None:
    """A proxy ends each quiet connection after a minute: a log of hours would be shown sixty times."""
    broken = ["first\nsec", ConnectionResetError("gone")]
    jobs = StandIn(
        [broken, ["first\n", RuntimeError("closed with 1006")], [LOG]], [Info(), Info(), Info(), DONE]
    )
    end, written, said = _follow(jobs)
    assert (end.code, written) == (0, LOG)
    assert said == ["the connection to http://head was lost; trying again ..."] * 2


def test_end_is_noticed_where_the_connection_died_silently() -> None:
    """A laptop that slept would otherwise wait for ever for a job that has long ended."""
    end, written, _ = _follow(StandIn([["first\n", None]], [Info(), Info(), Info(), DONE]))
    assert (end.code, written) == (0, LOG)


def test_silent_connection_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the job runs on, its lines must come again too."""
    monkeypatch.setattr(following, "SILENT_SECONDS", 0.1)
    jobs = StandIn([["first\n", None], [LOG]], [*[Info()] * 4, DONE])
    assert _follow(jobs)[1] == LOG


def test_pending_is_explained() -> None:
    """An installation of minutes looks like a cluster that hangs."""
    pending = Info("PENDING", message="Waiting for the runtime environment to be set up.\nmore")

    class Slow(StandIn):
        began = time.monotonic()

        def get_job_info(self, job_id: str) -> Any:
            return pending if time.monotonic() < self.began + 0.3 else super().get_job_info(job_id)

    _, written, said = _follow(Slow([[LOG]], [DONE]))
    assert written == LOG
    assert 1 <= len(said) <= 3
    assert "still pending after" in said[0]
    assert "Waiting for the runtime environment to be set up. (" in said[0]


def test_cluster_away_for_a_while_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dashboard that restarts must not end the following of a day's sweep; one that is gone must."""
    away = ConnectionError("refused")
    jobs = StandIn([["first\n", away], [LOG]], [Info(), away, away, Info(), DONE])
    assert _follow(jobs)[1] == LOG
    monkeypatch.setattr(following, "GIVE_UP_SECONDS", 0.05)
    with pytest.raises(FollowError, match=r"http://head: no answer for 0\.05 s; whether job still runs"):
        _follow(StandIn([], [Info(), away]))


def test_job_that_is_gone_is_said() -> None:
    """A head that was started anew knows nothing of the job: no reason to ask it for five minutes."""
    with pytest.raises(FollowError, match=r"job: the cluster knows no such job; .*started anew"):
        _follow(StandIn([], [RuntimeError("Request failed with status code 404: Job job does not exist")]))


def test_interrupt_ends_the_following_at_once() -> None:
    """Ctrl-C that is swallowed as a dropped connection would never let go of the terminal."""
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.3, lambda: signal.pthread_kill(main, signal.SIGINT))
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        _follow(StandIn([["first\n", None]], [Info()]))
    assert time.monotonic() - began < 5
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
def test_end_hands_the_exit_code_back(info: Info, end: JobEnd | None) -> None:
    """A script that submits must not take a failed job for a done one."""
    assert end_of(info) == end
