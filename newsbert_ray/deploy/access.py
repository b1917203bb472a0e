"""The token and the cluster at an address: who can read the one, does the other let us in. Joins none."""

from __future__ import annotations

import json
import os
import platform
import socket
import stat
import subprocess
import sys
from collections.abc import Mapping
from http.client import HTTPException
from importlib import metadata
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import SplitResult, urlsplit
from urllib.request import Request, urlopen

from newsbert_ray.deploy.finding import Finding, Topic
from newsbert_ray.deploy.ports import NEW_TOKEN, is_loopback

ANSWER_SECONDS = 10.0
_ASK_VERSIONS = """
import json, sys
from ray._common.usage.usage_lib import get_cluster_metadata
from ray._raylet import GcsClient
print(json.dumps(get_cluster_metadata(GcsClient(address=sys.argv[1]))))
"""
"""In a process of its own: where a cluster breaks off, Ray's client may wait for ever or end the process."""


def check_token(address: str | None, environment: Mapping[str, str], *, home: Path) -> list[Finding]:
    """Whether this process would show a token to a cluster, and who else can read it.

    Args:
        address: the cluster's, if there is one to reach.
        home: of the user; Ray looks there for .ray/auth_token.
    """
    topic = Topic("token")
    mode = environment.get("RAY_AUTH_MODE", "").strip().lower()
    remote = address is not None and not is_loopback(_split(address).hostname or "")
    if mode != "token":
        said = f"RAY_AUTH_MODE is {mode}" if mode else "RAY_AUTH_MODE is not set"
        if remote:
            topic.mend(f"{said}: no token is shown to {address}", "export RAY_AUTH_MODE=token")
        else:
            topic.note(f"{said}: a private session makes a token of its own, a cluster is shown none")
    if "RAY_AUTH_TOKEN" in environment and mode == "token":
        if environment["RAY_AUTH_TOKEN"].strip():
            topic.ok("the token is in RAY_AUTH_TOKEN")
        else:
            topic.mend("RAY_AUTH_TOKEN is empty", "unset RAY_AUTH_TOKEN, or put the cluster's token into it")
        return topic.findings
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else home / ".ray/auth_token"
    if not path.is_file():
        if mode == "token" or named:
            topic.mend(
                f"{path}: no token there", f"copy the cluster's token there with mode 0600, or {NEW_TOKEN}"
            )
        return topic.findings
    _check_token_file(topic, path)
    return topic.findings


def check_cluster(address: str | None, environment: Mapping[str, str], *, home: Path) -> list[Finding]:
    """Whether the cluster at `address` answers, takes our token and has our versions.

    Args:
        address: http(s)://HOST:PORT of a dashboard, as to submit, or HOST:PORT of a head, as RAY_ADDRESS.
    """
    topic = Topic("cluster")
    if address is None or address == "local":
        topic.ok("none named (--address, RAY_ADDRESS, RAY_API_SERVER_ADDRESS): work stays on this machine")
        return topic.findings
    place = _split(address)
    try:
        host, port = place.hostname, place.port
    except ValueError:
        host, port = None, None
    web = place.scheme in ("http", "https")
    if not host or not (port or web):
        topic.mend(
            f"{address}: not an address", "give http://HOST:8265 (to submit) or HOST:6379 (RAY_ADDRESS)"
        )
        return topic.findings
    if place.scheme == "http" and not is_loopback(host):
        topic.mend(
            f"{address}: the token and the code go there unencrypted",
            f"ssh -L 8265:127.0.0.1:{port or 80} {host}, then --address http://127.0.0.1:8265; or https",
        )
    try:
        socket.create_connection((host, port or {"http": 80}.get(place.scheme, 443)), ANSWER_SECONDS).close()
    except OSError as error:
        topic.mend(
            f"{address}: nothing answers there ({error.strerror or error})",
            "start the cluster, correct the address, or open the tunnel to it",
        )
        return topic.findings
    ask = _ask_dashboard if web else _ask_head
    versions = ask(topic, address, environment, home)
    if versions is not None:
        _compare(topic, address, versions)
    return topic.findings


def _check_token_file(topic: Topic, path: Path) -> None:
    status = path.stat()
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        topic.mend(f"{path}: other users of this machine may read it (mode {mode:04o})", f"chmod 600 {path}")
    elif not os.access(path, os.R_OK):
        topic.mend(f"{path}: cannot be read by this user", f"chown $USER {path}")
    elif not path.read_text(encoding="utf-8", errors="replace").strip():
        topic.mend(f"{path}: is empty", f"copy the cluster's token there, or {NEW_TOKEN}")
    else:
        topic.ok(f"{path}: there, for this user only")


def _ask_dashboard(
    topic: Topic, address: str, environment: Mapping[str, str], home: Path
) -> Mapping[str, str] | None:
    """{"ray_version": ...} of the cluster behind a dashboard; None where that ended in a finding."""
    token = _token(environment, home)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    url = f"{address.rstrip('/')}/api/version"
    try:
        with urlopen(Request(url, headers=headers), timeout=ANSWER_SECONDS) as answer:
            found: Mapping[str, str] = {"ray_version": json.loads(answer.read())["ray_version"]}
    except HTTPError as error:
        if error.code in (401, 403):
            _refused(topic, address, shown=bool(token))
        else:
            topic.mend(
                f"{address}: answers {error.code} to a question for its version", "is it Ray's dashboard?"
            )
        return None
    except (OSError, ValueError, KeyError, TypeError, HTTPException) as error:
        topic.mend(
            f"{address}: no Ray dashboard answers there ({error})", "give http://HOST:8265 of the head"
        )
        return None
    return found


def _ask_head(
    topic: Topic, address: str, environment: Mapping[str, str], home: Path
) -> Mapping[str, str] | None:
    """The same of the cluster behind a head, with its Python."""
    place = _split(address)
    command = [sys.executable, "-c", _ASK_VERSIONS, f"{place.hostname}:{place.port}"]
    variables = {**environment, "HOME": str(home), "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            command, env=variables, capture_output=True, text=True, timeout=2 * ANSWER_SECONDS
        )
    except subprocess.TimeoutExpired:
        topic.mend(
            f"{address}: something listens there, and no Ray head answers", "give HOST:6379 of the head"
        )
        return None
    if done.returncode == 0:
        found: Mapping[str, str] = json.loads(done.stdout.splitlines()[-1])
        return found
    if "AuthenticationError" in done.stderr or "InvalidAuthToken" in done.stderr:
        _refused(topic, address, shown=_token(environment, home) is not None)
    else:
        reason = next(iter(reversed(done.stderr.strip().splitlines())), f"exit code {done.returncode}")
        topic.mend(f"{address}: no Ray head answers there ({reason[:200]})", "give HOST:6379 of the head")
    return None


def _refused(topic: Topic, address: str, *, shown: bool) -> None:
    if shown:
        topic.mend(
            f"{address}: refuses our token", "copy the cluster's token to the file of RAY_AUTH_TOKEN_PATH"
        )
    else:
        topic.mend(
            f"{address}: asks for a token, and none is shown",
            "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=FILE, a file with the cluster's token",
        )


def _compare(topic: Topic, address: str, versions: Mapping[str, str]) -> None:
    """Ray refuses another Ray or another Python, down to its last number."""
    own = {"ray_version": metadata.version("ray"), "python_version": platform.python_version()}
    names = {"ray_version": "Ray", "python_version": "Python"}
    unlike = [name for name in own if name in versions and versions[name] != own[name]]
    for name in unlike:
        cure = (
            f"pip install ray=={versions[name]}" if name == "ray_version" else f"use Python {versions[name]}"
        )
        topic.mend(
            f"{address}: {names[name]} {versions[name]} there, {own[name]} here",
            f"{cure} here, or change it there",
        )
    if not unlike:
        said = ", ".join(f"{names[name]} {versions[name]}" for name in own if name in versions)
        topic.ok(f"{address} answers and lets us in: {said}")


def _token(environment: Mapping[str, str], home: Path) -> str | None:
    """The token that Ray would show, looked for where and as Ray does."""
    if environment.get("RAY_AUTH_MODE", "").lower() != "token":
        return None
    if text := environment.get("RAY_AUTH_TOKEN", "").strip():
        return text
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or home / ".ray/auth_token")
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _split(address: str) -> SplitResult:
    return urlsplit(address if "://" in address else f"//{address}")
