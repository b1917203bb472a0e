"""The first word with a cluster's dashboard: its address, the token it asks for, its version. Knows no Ray.

Ray's own client has no time-out, lets RAY_ADDRESS go over what it is given, and answers a slip with a page.
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
from typing import Any, Protocol
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

ANSWER_SECONDS = 15.0
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"


class ContactError(ValueError):
    """A cluster that cannot be spoken to; the text names the address and the cure."""


@dataclass(frozen=True)
class Contact:
    """A dashboard that has answered. `token`: what it asks for, None where it lets everybody in."""

    address: str
    token: str | None
    ray: str

    def __repr__(self) -> str:
        """Without the token, which would end up in a log."""
        return f"Contact({self.address!r}, ray={self.ray!r})"


def make_contact(
    address: str | None,
    *,
    token_file: str | Path | None = None,
    say: Callable[[str], None],
    environment: Mapping[str, str] = os.environ,
) -> Contact:
    """Ask the dashboard for its version: first without the token, which is shown to who asks for it only.

    Args:
        address: http(s)://HOST:PORT, or HOST:PORT; RAY_API_SERVER_ADDRESS by default.
        token_file: file with the token; RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token by default.
        say: hears of what is unsafe, or unlike on the two sides.
    Raises:
        ContactError: no address, nobody answers, a token is asked for and none known, or it is the wrong one.
    """
    address = _whole(address or environment.get(ADDRESS_VARIABLE))
    host = urlsplit(address).hostname or ""
    if urlsplit(address).scheme != "https" and not is_loopback(host):
        say(
            f"warning: {address} is neither https nor on this machine: token, code and log travel readable; "
            f"take https, or a tunnel (ssh -L 8265:127.0.0.1:8265 {host}, then --address "
            "http://127.0.0.1:8265)"
        )
    token = _named_token(token_file, say) if token_file else None
    version = _version(address, None)
    if version is not None:
        if not is_loopback(host):
            say(f"warning: {address} asks for no token: whoever reaches it runs programs on the cluster")
    else:
        token = token or _usual_token(environment, say)
        if token is None:
            raise ContactError(
                f"{address}: the cluster asks for a token, and none is known here; give --token_file FILE, "
                "or RAY_AUTH_MODE=token with RAY_AUTH_TOKEN_PATH=FILE"
            )
        version = _version(address, token)
        if version is None:
            raise ContactError(
                f"{address}: the cluster refuses the token; copy its own (of the head: ~/.ray/auth_token) to "
                "the file of --token_file or RAY_AUTH_TOKEN_PATH"
            )
        return _compared(Contact(address, token, version), say)
    return _compared(Contact(address, None, version), say)


def _compared(contact: Contact, say: Callable[[str], None]) -> Contact:
    here = metadata.version("ray")
    if contact.ray != here:
        say(
            f"warning: Ray is {contact.ray} there and {here} here; take an image with ray=={here} for the "
            f"cluster, or pip install ray=={contact.ray} here"
        )
    return contact


def _whole(given: str | None) -> str:
    if not given or not given.strip():
        raise ContactError(
            f"no cluster named; give --address http://HOST:8265 (its dashboard), or set {ADDRESS_VARIABLE}"
        )
    address = given.strip()
    address = (address if "://" in address else f"http://{address}").rstrip("/")
    try:
        place = urlsplit(address)
        host, _ = place.hostname, place.port
    except ValueError:
        place, host = urlsplit(""), None
    if place.scheme == "ray":
        raise ContactError(f"--address {address}: jobs go to the dashboard, http://{host or 'HOST'}:8265")
    if place.scheme not in ("http", "https") or not host:
        raise ContactError(f"--address {given}: expected http://HOST:8265, the cluster's dashboard")
    if "@" in place.netloc:
        raise ContactError(f"--address: a password in it would be shown in logs; leave {host} without it")
    return address


def _named_token(path: str | Path, say: Callable[[str], None]) -> str:
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="ascii").strip()
        mode = stat.S_IMODE(path.stat().st_mode)
    except (OSError, UnicodeDecodeError) as error:
        reason = "holds no token" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise ContactError(f"{path}: {reason}; expected a file with the cluster's token") from error
    if not text or len(text.split()) > 1:
        raise ContactError(f"{path}: holds no token; expected one word, the cluster's token")
    if mode & 0o077:
        say(f"warning: {path} can be read by other users of this machine; chmod 600 {path}")
    return text


def _usual_token(environment: Mapping[str, str], say: Callable[[str], None]) -> str | None:
    """The token where Ray looks for it, in Ray's order."""
    if text := environment.get("RAY_AUTH_TOKEN", "").strip():
        return text
    if path := environment.get("RAY_AUTH_TOKEN_PATH"):
        return _named_token(path, say)
    usual = Path(environment.get("HOME") or Path.home()) / ".ray/auth_token"
    return _named_token(usual, say) if usual.is_file() else None


class _Still(HTTPRedirectHandler):
    """Follows no redirect: the token would go with it, to another host too."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _version(address: str, token: str | None) -> str | None:
    """Ray's version there; None where the token is missing or wrong."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with build_opener(_Still()).open(
            Request(f"{address}/api/version", headers=headers), timeout=ANSWER_SECONDS
        ) as answer:
            return str(json.loads(answer.read(100_000))["ray_version"])
    except HTTPError as error:
        if error.code in (401, 403):
            return None
        elsewhere = error.headers.get("Location")
        cure = f"it sends on to {elsewhere}" if elsewhere else "is it the cluster's dashboard?"
        raise ContactError(f"{address}: answers {error.code} when asked for its version; {cure}") from error
    except (URLError, OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise ContactError(
            f"{address}: no cluster answers there ({reason}); start it, correct --address (the dashboard's, "
            "usually port 8265), or open the tunnel to it"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ContactError(f"{address}: something else than Ray's dashboard answers there") from error


PENDING_SECONDS = 20.0
"""A job that has not begun by then is explained, and again each time as long as all before."""
POLL_SECONDS = 0.5
"""Between two looks at a job that has not begun, and before the first new connection."""
LOOK_SECONDS = 2.0
"""Silence after which the job is asked for its state: a connection may be dead without a word."""
SILENT_SECONDS = 300.0
"""Silence after which the log is asked for anew."""
GIVE_UP_SECONDS = 300.0
"""How long a cluster may be away."""


class FollowError(RuntimeError):
    """A job that can no longer be followed; the text says how to come back, or that it is gone."""


class Jobs(Protocol):
    """What is needed of ray.job_submission.JobSubmissionClient."""

    def get_job_info(self, job_id: str) -> Any: ...

    def get_job_logs(self, job_id: str) -> str: ...

    def tail_job_logs(self, job_id: str) -> AsyncIterator[str]: ...


@dataclass(frozen=True)
class JobEnd:
    """How a job ended: Ray's word for it, our exit code, and the reason."""

    status: str
    code: int
    reason: str


def follow(
    jobs: Jobs, job: str, *, write: Callable[[str], None], say: Callable[[str], None], address: str
) -> JobEnd:
    """Write the log of `job` from its beginning until the job has ended.

    Args:
        write: takes pieces of the log, which need not end with a line.
        say: hears why nothing comes, and that a connection was lost.
    Raises:
        FollowError: the cluster has no such job, or has been away for GIVE_UP_SECONDS.
        KeyboardInterrupt: the job goes on.
    """
    return asyncio.run(_Follower(jobs, job, write=write, say=say, address=address).run())


def end_of(info: Any) -> JobEnd | None:
    """The end of a job as Ray describes it; None while it has not ended."""
    status = str(getattr(info.status, "value", info.status))
    if status not in ("SUCCEEDED", "FAILED", "STOPPED"):
        return None
    code = info.driver_exit_code
    failed = code if isinstance(code, int) and 0 < code < 256 else 1
    if isinstance(code, int) and code:
        reason = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    else:
        reason = (info.message or "").strip()
    return JobEnd(status, 0 if status == "SUCCEEDED" else failed, reason)


class _Follower:
    """One job's log: how much of it is written, and when the cluster last answered."""

    def __init__(
        self,
        jobs: Jobs,
        job: str,
        *,
        write: Callable[[str], None],
        say: Callable[[str], None],
        address: str,
    ) -> None:
        self._jobs, self._job, self._write, self._say = jobs, job, write, say
        self._address = address
        self._written = 0
        self._answered = time.monotonic()

    async def run(self) -> JobEnd:
        await self._begin()
        wait = POLL_SECONDS
        while True:
            before = self._written
            dropped = await self._read()
            info = self._info()
            end = end_of(info) if info is not None else None
            if end is not None:
                self._write_rest()
                return end
            wait = POLL_SECONDS if self._written > before else min(2 * wait, 15.0)
            if dropped:
                self._say(f"the connection to {self._address} was lost; trying again ...")
            await asyncio.sleep(wait)

    async def _begin(self) -> None:
        """Wait until the job runs, and explain where that takes long."""
        began, hint = time.monotonic(), PENDING_SECONDS
        while True:
            info = self._info()
            if info is not None and str(getattr(info.status, "value", info.status)) != "PENDING":
                return
            waited = time.monotonic() - began
            if info is not None and waited >= hint:
                said = (info.message or "").strip().split("\n")[0]
                self._say(
                    f"still pending after {waited:.0f} s: {said or 'the head has not started it'} "
                    "(a first start unpacks what was sent; --pip installs, which takes minutes)"
                )
                hint *= 2
            await asyncio.sleep(POLL_SECONDS)

    async def _read(self) -> bool:
        """Write what comes until the connection ends, and whether that was against its will."""
        position = 0
        try:
            async with aclosing(self._jobs.tail_job_logs(self._job)) as stream:  # type: ignore[type-var]
                while (text := await self._next(stream)) is not None:
                    self._put(text, position)
                    position += len(text)
        except Exception:
            # aiohttp's, the socket's or Ray's, all for a connection that is gone: the job's state decides.
            return True
        return False

    async def _next(self, stream: AsyncIterator[str]) -> str | None:
        """The next piece; None where there is none, the job has ended, or nothing came for long."""
        piece = asyncio.ensure_future(anext(stream, None))
        quiet = 0.0
        try:
            while not (await asyncio.wait({piece}, timeout=LOOK_SECONDS))[0]:
                quiet += LOOK_SECONDS
                info = self._info()
                if quiet >= SILENT_SECONDS or (info is not None and end_of(info)):
                    return None
            return piece.result()
        finally:
            if not piece.done():
                piece.cancel()
                await asyncio.wait({piece})

    def _put(self, text: str, position: int) -> None:
        """Write what of `text`, which stands at `position` of the log, is new."""
        if new := text[max(0, self._written - position) :]:
            self._write(new)
            self._written = position + len(text)

    def _write_rest(self) -> None:
        """Last lines that the connection did not bring; a head that has just gone has none."""
        try:
            self._put(self._jobs.get_job_logs(self._job), 0)
        except (RuntimeError, OSError):
            self._say("the end of the log could not be read")

    def _info(self) -> Any:
        """The job as Ray describes it; None where the cluster does not answer just now."""
        try:
            found = self._jobs.get_job_info(self._job)
        except (RuntimeError, OSError) as error:
            if "status code 404" in str(error):
                raise FollowError(
                    f"{self._job}: the cluster knows no such job; --list shows those it knows (a head that "
                    "was started anew knows none from before)"
                ) from error
            if time.monotonic() - self._answered > GIVE_UP_SECONDS:
                raise FollowError(
                    f"{self._address}: no answer for {GIVE_UP_SECONDS:g} s; whether {self._job} still runs "
                    "is not known"
                ) from error
            return None
        self._answered = time.monotonic()
        return found


def is_loopback(host: str) -> bool:
    """Whether a host or address is this machine's own, which no other can reach."""
    if host == "localhost":
        return True
    try:
        found = ip_address(host)
    except ValueError:
        return False
    return found.is_loopback
