"""A job's log as it grows, through dropped connections, until the job has ended. Prints no line twice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

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
