"""Whether a cluster lets us in, and who else could get in with our token."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from newsbert_ray.deploy import doctor as access
from newsbert_ray.deploy.doctor import Finding, check_cluster, check_ports, check_token
from tests.deploy.conftest import ill, the_one_to_mend


def token_file(path: Path, text: str = "ab" * 32, *, mode: int = 0o600) -> Path:
    """A file with a token."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_token_in_its_place(tmp_path: Path) -> None:
    """The usual way must pass: a file for its user alone."""
    token_file(tmp_path / ".ray/auth_token")
    (found,) = check_token("https://head:8265", {"RAY_AUTH_MODE": "token"}, home=tmp_path)
    assert found.state == "ok"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
@pytest.mark.parametrize("usual", [True, False])
def test_a_token_that_others_can_read(tmp_path: Path, mode: int, usual: bool) -> None:
    """Ray itself writes its token for everybody to read; on a shared machine that is no token."""
    path = token_file(tmp_path / (".ray/auth_token" if usual else "elsewhere"), mode=mode)
    variables = {} if usual else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
    found = the_one_to_mend(check_token(None, variables, home=tmp_path))
    assert found.found.endswith(f"may read it (mode {mode:04o})")
    assert found.cure == f"chmod 600 {path}"


def test_a_token_that_is_empty_or_not_there(tmp_path: Path) -> None:
    """Ray says of both that a file cannot be opened or is empty, at the end of a page of frames."""
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    assert "no token there" in the_one_to_mend(check_token(None, variables, home=tmp_path)).found
    token_file(tmp_path / "token", "\n")
    assert "is empty" in the_one_to_mend(check_token(None, variables, home=tmp_path)).found
    empty = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": " "}
    assert the_one_to_mend(check_token(None, empty, home=tmp_path)).found == "RAY_AUTH_TOKEN is empty"


def test_a_token_that_is_not_shown(tmp_path: Path) -> None:
    """A token file alone does nothing: a client shows it only where RAY_AUTH_MODE says so."""
    token_file(tmp_path / ".ray/auth_token")
    found = the_one_to_mend(check_token("https://head:8265", {}, home=tmp_path))
    assert found.cure == "export RAY_AUTH_MODE=token"
    assert ill(check_token(None, {}, home=tmp_path)) == []


class Dashboard(http.server.BaseHTTPRequestHandler):
    """Answers /api/version as Ray's dashboard does, with a token."""

    version = metadata.version("ray")
    answer = b""

    def do_GET(self) -> None:
        shown = self.headers.get("Authorization")
        status = 401 if shown is None else 200 if shown == f"Bearer {'ab' * 32}" else 403
        status = status if self.path == "/api/version" else 404
        self.send_response(status)
        self.end_headers()
        if status == 200:
            self.wfile.write(
                self.answer or json.dumps({"version": "4", "ray_version": self.version}).encode()
            )

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of such a dashboard."""
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., list[Finding]]:
    """check_cluster with a token, the cluster's own by default."""

    def check(address: str | None, token: str | None = "ab" * 32) -> list[Finding]:
        variables: Mapping[str, str] = (
            {} if token is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        )
        return check_cluster(address, variables, home=tmp_path)

    return check


Ask = Callable[..., list[Finding]]


def test_a_cluster_that_lets_us_in(dashboard: str, ask: Ask) -> None:
    """The way to a submission, as far as it goes without submitting."""
    (found,) = ask(dashboard)
    assert found.state == "ok"
    assert f"Ray {metadata.version('ray')}" in found.found


@pytest.mark.parametrize(
    ("token", "said"), [(None, "asks for a token, and none is shown"), ("cd" * 32, "refuses our token")]
)
def test_a_cluster_that_does_not(dashboard: str, ask: Ask, token: str | None, said: str) -> None:
    """`Unauthorized` leaves open whether there was no token or a wrong one."""
    assert the_one_to_mend(ask(dashboard, token)).found == f"{dashboard}: {said}"


def test_a_cluster_of_another_ray(dashboard: str, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray refuses to work across versions, after the package was uploaded."""
    monkeypatch.setattr(Dashboard, "version", "2.49.1")
    found = the_one_to_mend(ask(dashboard))
    assert f"Ray 2.49.1 there, {metadata.version('ray')} here" in found.found
    assert "pip install ray==2.49.1" in found.cure


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b"{}"])
def test_a_server_that_is_no_dashboard(
    dashboard: str, ask: Ask, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    """Grafana's port, or a proxy's page, is taken for the dashboard's."""
    monkeypatch.setattr(Dashboard, "answer", answer)
    assert "no Ray dashboard answers there" in the_one_to_mend(ask(dashboard)).found
    assert "answers 404" in the_one_to_mend(ask(f"{dashboard}/elsewhere")).found


@pytest.mark.parametrize("form", ["http://127.0.0.1:{}", "127.0.0.1:{}"])
def test_an_address_where_nothing_answers(ask: Ask, form: str) -> None:
    """Ray itself would try for minutes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = form.format(probe.getsockname()[1])
    assert "nothing answers there (Connection refused)" in the_one_to_mend(ask(address)).found


def test_a_listener_that_is_no_head(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's client waits for an answer as long as one lets it."""
    monkeypatch.setattr(access, "ANSWER_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert "no Ray head answers" in the_one_to_mend(ask(address)).found


@pytest.mark.parametrize("address", ["head", "head:port", "http://"])
def test_an_address_that_is_none(ask: Ask, address: str) -> None:
    """A slip in the address is not a cluster that is down."""
    assert the_one_to_mend(ask(address)).found == f"{address}: not an address"


def test_an_address_that_sends_the_token_in_clear(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over http the token is read along the way, and with it goes the whole cluster."""
    monkeypatch.setattr(
        socket, "create_connection", lambda *_: (_ for _ in ()).throw(OSError(113, "No route"))
    )
    first, second = ill(ask("http://head.example:8265"))
    assert "unencrypted" in first.found
    assert first.cure.startswith("ssh -L 8265:127.0.0.1:8265 head.example")
    assert "No route" in second.found
    assert "unencrypted" not in the_one_to_mend(ask("https://head.example:8265")).found


@pytest.mark.parametrize("address", [None, "local"])
def test_no_cluster_is_no_fault(ask: Ask, address: str | None) -> None:
    """Most people work on one machine."""
    assert [finding.state for finding in ask(address)] == ["ok"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_real_head(tmp_path: Path) -> None:
    """Both of a head's doors, as Ray itself keeps them; one is asked past Ray's public interface."""
    from cluster.local import LocalCluster

    with LocalCluster(cpus=1) as cluster:
        right = cluster.environment
        wrong = right | {"RAY_AUTH_TOKEN_PATH": str(token_file(tmp_path / "wrong", "cd" * 32))}
        none = {name: value for name, value in right.items() if not name.startswith("RAY_AUTH")}
        for address in (cluster.dashboard, cluster.address):
            (found,) = check_cluster(address, right, home=tmp_path)
            assert found.state == "ok", found
            assert "refuses our token" in the_one_to_mend(check_cluster(address, wrong, home=tmp_path)).found
            assert "none is shown" in the_one_to_mend(check_cluster(address, none, home=tmp_path)).found
        port = cluster.address.rpartition(":")[2]
        said = [finding for finding in check_ports() if f"port {port}" in finding.found]
        assert [finding.found for finding in said] == [
            f"a Ray head runs here, port {port}, on the loopback only"
        ]
