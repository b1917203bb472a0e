"""Connects to a cluster's dashboard (address, token, version) and follows a job's log. Does not import Ray.

Ray's own client has no time-out, prefers RAY_ADDRESS to the given address, and shows the token to any server.
"""

from __future__ import annotations

import asyncio
import json
import os
import stat
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from http.client import HTTPException
from importlib import metadata
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from newsbert_ray.files import first_line

ANSWER_SECONDS = 15.0
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
Warn = Callable[[str, str], None]
"""Takes a warning and its cure."""


class DashboardError(ValueError):
    """A dashboard that cannot be used: the problem, which names the address, and the cure."""

    def __init__(self, problem: str, cure: str) -> None:
        super().__init__(problem, cure)
        self.problem, self.cure = problem, cure

    def __str__(self) -> str:
        return f"{self.problem}; {self.cure}"


@dataclass(frozen=True)
class Dashboard:
    """A dashboard that has answered. `token` is None where it asks for none."""

    address: str
    token: str | None
    ray_version: str

    def __repr__(self) -> str:
        """Without the token, which must not reach a log."""
        return f"Dashboard({self.address!r}, ray_version={self.ray_version!r})"


def connect(
    address: str | None,
    *,
    token_file: str | Path | None = None,
    warn: Warn,
    environment: Mapping[str, str] = os.environ,
) -> Dashboard:
    """Ask a dashboard for its version. The token is shown only to a dashboard that asks for one.

    Args:
        address: http(s)://HOST:PORT, or HOST:PORT; RAY_API_SERVER_ADDRESS by default.
        token_file: file with the token; RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token by default.
        warn: called with what is unsafe or differs between both sides, and the cure.
    Raises:
        DashboardError: no address, no answer, a token is required and missing, or the token is wrong.
    """
    address = _full_address(address or environment.get(ADDRESS_VARIABLE))
    parts = urlsplit(address)
    host = parts.hostname or ""
    if parts.scheme != "https" and not is_loopback(host):
        warn(
            f"{address} is neither https nor on this machine: token, code and log are sent unencrypted",
            f"use https, or a tunnel (ssh -L 8265:127.0.0.1:{parts.port or 80} {host}, then --address "
            "http://127.0.0.1:8265)",
        )
    token = _read_token(token_file, warn) if token_file else None
    version = _ask_version(address, None)
    if version is None:
        token = token or _find_token(environment, warn)
        version = _ask_with_token(address, token)
    else:
        token = None
        if not is_loopback(host):
            warn(
                f"{address} asks for no token: everyone who can reach it can run programs on the cluster",
                "start the head with RAY_AUTH_MODE=token",
            )
    own_version = metadata.version("ray")
    if version != own_version:
        warn(
            f"{address} runs Ray {version}, this machine has Ray {own_version}",
            f"pip install ray=={version} here, or use an image with ray=={own_version} for the cluster",
        )
    return Dashboard(address, token, version)


def is_loopback(host: str) -> bool:
    """Whether a host name or IP address reaches this machine only."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _full_address(text: str | None) -> str:
    if not text or not text.strip():
        raise DashboardError(
            "no cluster given", f"give --address http://HOST:8265 (its dashboard), or set {ADDRESS_VARIABLE}"
        )
    address = text.strip()
    address = (address if "://" in address else f"http://{address}").rstrip("/")
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts, host = urlsplit(""), None
    if parts.scheme == "ray":
        raise DashboardError(
            f"--address {address} is Ray Client's", f"give the dashboard's: http://{host or 'HOST'}:8265"
        )
    if parts.scheme not in ("http", "https") or not host:
        raise DashboardError(f"--address {text} is not an address", "give the dashboard's: http://HOST:8265")
    if "@" in parts.netloc:
        raise DashboardError("--address holds a password, which logs would show", f"give {host} without it")
    return address


def _read_token(path: str | Path, warn: Warn) -> str:
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="ascii").strip()
        mode = stat.S_IMODE(path.stat().st_mode)
    except UnicodeDecodeError:
        text, mode = "", 0
    except OSError as error:
        raise DashboardError(f"{path}: {error.strerror}", "give a file with the cluster's token") from error
    if len(text.split()) != 1:
        raise DashboardError(f"{path}: contains no token", "write the cluster's token there, as one word")
    if mode & 0o077:
        warn(f"{path} can be read by other users of this machine", f"chmod 600 {path}")
    return text


def _find_token(environment: Mapping[str, str], warn: Warn) -> str | None:
    """The token from the variables and files that Ray reads, in Ray's order."""
    if text := environment.get("RAY_AUTH_TOKEN", "").strip():
        return text
    if path := environment.get("RAY_AUTH_TOKEN_PATH"):
        return _read_token(path, warn)
    default = Path(environment.get("HOME") or Path.home()) / ".ray/auth_token"
    return _read_token(default, warn) if default.is_file() else None


class _NoRedirect(HTTPRedirectHandler):
    """Follows no redirect: the token would be sent along, possibly to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _ask_with_token(address: str, token: str | None) -> str:
    if token is None:
        raise DashboardError(
            f"{address}: the cluster requires a token, and none was found",
            "give --token_file FILE, or RAY_AUTH_MODE=token with RAY_AUTH_TOKEN_PATH=FILE",
        )
    version = _ask_version(address, token)
    if version is None:
        raise DashboardError(
            f"{address}: the cluster refuses the token",
            "copy the cluster's token (on the head: ~/.ray/auth_token) to the file of --token_file or "
            "RAY_AUTH_TOKEN_PATH",
        )
    return version


def _ask_version(address: str, token: str | None) -> str | None:
    """The cluster's Ray version; None if the token is missing or wrong."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = Request(f"{address}/api/version", headers=headers)
    try:
        with build_opener(_NoRedirect()).open(request, timeout=ANSWER_SECONDS) as answer:
            return str(json.loads(answer.read(100_000))["ray_version"])
    except HTTPError as error:
        if error.code in (401, 403):
            return None
        target = error.headers.get("Location")
        cure = f"it redirects to {target}" if target else "is this the cluster's dashboard?"
        raise DashboardError(f"{address}: answers {error.code} when asked for its version", cure) from error
    except (URLError, OSError, HTTPException) as error:
        raise DashboardError(
            f"{address}: no cluster answers ({getattr(error, 'reason', None) or error})",
            "start it, correct --address (the dashboard's, usually port 8265), or open the tunnel to it",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DashboardError(
            f"{address}: answers, but is not Ray's dashboard", "give http://HOST:8265 of the head"
        ) from error


PENDING_SECONDS = 20.0
"""A job that is pending for so long is explained; again after twice, four times ... as long."""
POLL_SECONDS = 0.5
"""Between two checks of a pending job, and before the first reconnection."""
CHECK_SECONDS = 2.0
"""After so long without output the job's state is checked: a dead connection may not report an error."""
SILENT_SECONDS = 300.0
"""After so long without output the log is requested again."""
GIVE_UP_SECONDS = 300.0
"""How long a cluster may be unreachable."""


class FollowError(RuntimeError):
    """A job that can no longer be followed; the text says why."""


@dataclass(frozen=True)
class JobEnd:
    """How a job ended: Ray's status, our exit code, and the reason."""

    status: str
    code: int
    reason: str


def follow_log(
    jobs: Any, job: str, *, write: Callable[[str], None], say: Callable[[str], None], address: str
) -> JobEnd:
    """Write the log of `job` from its beginning until the job ends.

    Args:
        jobs: a ray.job_submission.JobSubmissionClient.
        write: called with pieces of the log, which need not end with a line.
        say: called with a line that explains a delay or a lost connection.
        address: of the cluster, for these lines.
    Raises:
        FollowError: the cluster does not know the job, or was unreachable for GIVE_UP_SECONDS.
        KeyboardInterrupt: the job continues.
    """
    return asyncio.run(_Follower(jobs, job, write, say, address).run())


def job_status(info: Any) -> str:
    """Ray's word for a job's state, such as RUNNING."""
    return str(getattr(info.status, "value", info.status))


def job_end(info: Any) -> JobEnd | None:
    """The end of a job from Ray's description of it; None while it has not ended."""
    status, code = job_status(info), info.driver_exit_code
    if status not in ("SUCCEEDED", "FAILED", "STOPPED"):
        return None
    failure = code if isinstance(code, int) and 0 < code < 256 else 1
    if isinstance(code, int) and code:
        reason = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    else:
        reason = (info.message or "").strip()
    return JobEnd(status, 0 if status == "SUCCEEDED" else failure, reason)


@dataclass
class _Follower:
    """Follows one job: how many characters of its log are written, and when the cluster last answered."""

    jobs: Any
    job: str
    write: Callable[[str], None]
    say: Callable[[str], None]
    address: str
    written: int = 0

    async def run(self) -> JobEnd:
        self.answered = time.monotonic()
        await self._wait_until_started()
        wait = POLL_SECONDS
        while True:
            before = self.written
            lost = await self._read_log()
            info = self._info()
            if info is not None and (end := job_end(info)) is not None:
                self._write_rest()
                return end
            wait = POLL_SECONDS if self.written > before else min(2 * wait, 15.0)
            if lost:
                self.say(f"the connection to {self.address} was lost; trying again ...")
            await asyncio.sleep(wait)

    async def _wait_until_started(self) -> None:
        start, hint = time.monotonic(), PENDING_SECONDS
        while (info := self._info()) is None or job_status(info) == "PENDING":
            waited = time.monotonic() - start
            if info is not None and waited >= hint:
                reason = (info.message or "").strip().split("\n")[0] or "the head has not started it"
                self.say(
                    f"still pending after {waited:.0f} s: {reason} (the first start unpacks the files; "
                    "--pip installs packages, which takes minutes)"
                )
                hint *= 2
            await asyncio.sleep(POLL_SECONDS)

    async def _read_log(self) -> bool:
        """Write the log until the connection ends; True if it was lost."""
        position = 0
        try:
            async with aclosing(self.jobs.tail_job_logs(self.job)) as stream:
                while (text := await self._next_piece(stream)) is not None:
                    self._put(text, position)
                    position += len(text)
        except Exception:
            # From aiohttp, the socket or Ray, and all mean a lost connection: the job's state decides.
            return True
        return False

    async def _next_piece(self, stream: AsyncIterator[str]) -> str | None:
        """The next piece; None at the end of the log or of the job, or after a long silence."""
        piece = asyncio.ensure_future(anext(stream, None))
        silent = 0.0
        try:
            while not (await asyncio.wait({piece}, timeout=CHECK_SECONDS))[0]:
                silent += CHECK_SECONDS
                info = self._info()
                if silent >= SILENT_SECONDS or (info is not None and job_end(info)):
                    return None
            return piece.result()
        finally:
            if not piece.done():
                piece.cancel()
                await asyncio.wait({piece})

    def _put(self, text: str, position: int) -> None:
        """Write the part of `text`, which starts at `position` of the log, that is not yet written."""
        if new := text[max(0, self.written - position) :]:
            self.write(new)
            self.written = position + len(text)

    def _write_rest(self) -> None:
        """The last lines, which the connection may not have brought."""
        try:
            self._put(self.jobs.get_job_logs(self.job), 0)
        except (RuntimeError, OSError) as error:
            self.say(f"the end of the log could not be read ({first_line(error)})")

    def _info(self) -> Any:
        """Ray's description of the job; None while the cluster does not answer."""
        try:
            info = self.jobs.get_job_info(self.job)
        except (RuntimeError, OSError) as error:
            if "status code 404" in str(error):
                raise FollowError(
                    f"{self.job}: the cluster knows no such job; --list shows its jobs (a restarted head has "
                    "forgotten the jobs before)"
                ) from error
            if time.monotonic() - self.answered > GIVE_UP_SECONDS:
                raise FollowError(
                    f"{self.address}: no answer for {GIVE_UP_SECONDS:g} s; {self.job} may still be running"
                ) from error
            return None
        self.answered = time.monotonic()
        return info
