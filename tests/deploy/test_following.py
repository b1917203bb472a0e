from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from newsbert_ray.deploy import job_client as following
from newsbert_ray.deploy.job_client import FollowError, JobEnd, end_of, follow

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
