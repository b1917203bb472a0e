"""A stand-in for a cluster's dashboard, and how tests read the doctor's findings."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata

from newsbert_ray.deploy.doctor import Finding

TOKEN = "ab" * 32
Answer = Callable[[str | None], tuple[int, Mapping[str, str], bytes]]
"""A dashboard's status code, headers and body for an Authorization header."""


@contextmanager
def dashboard(answer: Answer) -> Iterator[tuple[str, list[str | None]]]:
    """A server on the loopback: its address, and the Authorization headers that it received."""
    received: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            received.append(self.headers.get("Authorization"))
            code, headers, body = answer(received[-1])
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", received
        finally:
            server.shutdown()
            thread.join()


def version(ray: str = metadata.version("ray")) -> bytes:
    """The body of /api/version."""
    return json.dumps({"version": "4", "ray_version": ray}).encode()


def guarded(token: str = TOKEN, *, ray: str = metadata.version("ray")) -> Answer:
    """A dashboard that answers as Ray's does: 401 without a token, 403 with a wrong one."""

    def answer(header: str | None) -> tuple[int, Mapping[str, str], bytes]:
        if header is None:
            return 401, {}, b"Unauthorized: Missing authentication token"
        return (200, {}, version(ray)) if header == f"Bearer {token}" else (403, {}, b"Forbidden")

    return answer


def problems(findings: Iterator[Finding]) -> list[Finding]:
    """The findings that need a fix; each must have a cure."""
    fixes = [finding for finding in findings if finding.state == "fix"]
    assert all(finding.cure for finding in fixes)
    return fixes


def problem(findings: Iterator[Finding]) -> Finding:
    """The only problem."""
    (only,) = problems(findings)
    return only


def notes(findings: Iterator[Finding]) -> str:
    """The notes as one text."""
    return "\n".join(f"{finding.message} | {finding.cure}" for finding in findings if finding.state == "note")
