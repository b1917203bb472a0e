from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path

import pytest

from newsbert_ray.deploy.job_client import ContactError, make_contact

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
