"""Joining and starting Ray: no access from outside, nothing left on the machine, no endless waiting."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from newsbert_ray import ray_session as module
from newsbert_ray.data.stream import map_chunks
from newsbert_ray.ray_session import (
    ConnectError,
    Stopped,
    StopSignals,
    environment,
    inside_cluster,
    ray_session,
)

LOOPBACK = {"0100007F", "0" * 24 + "01000000", "0" * 16 + "FFFF00000100007F"}
"""127.0.0.1, ::1 and ::ffff:127.0.0.1 as /proc/net/tcp and tcp6 write them."""

JOIN = """
from newsbert_ray.ray_session import ConnectError, ray_session
try:
    with ray_session() as session:
        print("joined", session.private, session.cpus)
except ConnectError as error:
    print("refused", error)
"""


def descendants() -> list[int]:
    """Ids of this process's descendants, and its own."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    pids: list[int] = []
    more = {os.getpid()}
    while more:
        more = {pid for pid, parent in parents.items() if parent in more}
        pids += more
    return pids


def listeners(pids: list[int]) -> set[str]:
    """Local addresses, in hexadecimal, on which these processes listen for TCP."""
    inodes = set()
    for pid in pids:
        try:
            descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
        except OSError:  # a process that has just ended
            continue
        for descriptor in descriptors:
            try:
                target = os.readlink(descriptor)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                addresses.add(fields[1].partition(":")[0])
    return addresses


def join(address: str, **variables: str) -> str:
    """The output of another process that joins `address`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Ray asks a cluster that refuses it once a second, 20 times.
    own = {"RAY_ADDRESS": address, "RAY_NUM_REDIS_GET_RETRIES": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", JOIN],
        env=inherited | own | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


def _secret_of_a_task(chunk: int, shared: None) -> str:
    return os.environ["AWS_SECRET_ACCESS_KEY"]


@pytest.mark.ray
def test_keys_reach_the_tasks_but_no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may read a cluster's logs would have the bucket."""
    keys = {"AWS_ACCESS_KEY_ID": "AKIAINVENTED", "AWS_SECRET_ACCESS_KEY": "inventedsecret"}
    keys |= {"AWS_SESSION_TOKEN": "inventedtoken", "HF_TOKEN": "hf_invented"}
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    with ray_session(cpus=1):
        folder = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).parent
        assert list(map_chunks([1, 2], _secret_of_a_task, None, workers=1)) == ["inventedsecret"] * 2
        logs = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
        assert len(logs) > 10
        assert [value for value in keys.values() if any(value.encode() in log for log in logs)] == []


@pytest.mark.ray
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's list of listeners")
def test_a_private_session_listens_on_the_loopback_asks_for_a_token_and_leaves_nothing() -> None:
    """Otherwise other users of the machine or network run code in the session, or read its files."""
    before = dict(os.environ)
    others = set(descendants())  # of tests before this one, as multiprocessing's resource tracker
    with ray_session(cpus=1) as session:
        assert session.private
        assert session.cpus == 1
        assert inside_cluster()
        folder = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((folder / "token").stat().st_mode) == 0o600
        pids = [pid for pid in descendants() if pid not in others]
        assert len(pids) > 2
        addresses = listeners([*pids, os.getpid()])
        assert addresses
        assert addresses <= LOOPBACK
        assert "refused" in join(session.address, HOME=str(folder))
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        assert join(session.address, **token) == "joined False 1.0\n"
        with ray_session(cpus=7) as inner:
            assert not inner.private
            assert inner.cpus == 1
        assert inside_cluster(), "a session that was open already stays open"
    assert not folder.exists()
    assert not inside_cluster()
    end = time.monotonic() + 15
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.1)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    ours = {*module.PRIVATE_ENVIRONMENT, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "GLOO_SOCKET_IFNAME"}
    assert {name: os.environ.get(name) for name in ours} == {name: before.get(name) for name in ours}


def test_an_address_without_an_answer_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself waits for minutes, then ends the process with a signal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    assert inside_cluster()
    with (
        pytest.raises(ConnectError, match=f"RAY_ADDRESS=127.0.0.1:{port}: no Ray cluster answers there"),
        ray_session(),
    ):
        pass


def test_a_server_that_is_no_cluster_is_an_error_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The port of another program, or of a cluster that hangs, would make the command hang."""
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(ConnectError, match="timed out"), ray_session():
            pass


def test_a_machine_that_is_too_busy_for_ray_is_no_internal_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray raises a bare Exception after its time-out."""

    def init(*_: object, **__: object) -> None:
        raise Exception("The current node timed out during startup.\nMore.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("newsbert_ray.ray_session._init", init)
    with (
        pytest.raises(ConnectError, match=r"does not start .*timed out during startup\.; check its load"),
        ray_session(),
    ):
        pass


@pytest.mark.parametrize("address", ["10.0.0.5", "10.0.0.5:six", "ray://", ":6379"])
def test_an_address_without_host_or_port_is_an_error_with_an_example(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A typing error in RAY_ADDRESS would end in Ray's stack trace."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConnectError, match="expected HOST:PORT"), ray_session():
        pass


def test_local_and_empty_addresses_name_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """RAY_ADDRESS=local asks Ray for a private session; a run must not look for a cluster."""
    for address in ("local", "", "  "):
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert not inside_cluster()


def test_variables_set_by_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's setting would be overwritten, or removed after the block."""
    monkeypatch.setenv("NEWSBERT_TEST_KEPT", "mine")
    with environment({"NEWSBERT_TEST_KEPT": "ours", "NEWSBERT_TEST_ADDED": "ours"}):
        assert os.environ["NEWSBERT_TEST_KEPT"] == "mine"
        assert os.environ["NEWSBERT_TEST_ADDED"] == "ours"
    assert os.environ["NEWSBERT_TEST_KEPT"] == "mine"
    assert "NEWSBERT_TEST_ADDED" not in os.environ


def test_only_folders_of_killed_sessions_are_removed(tmp_path: Path) -> None:
    """A running session would lose its folder."""
    from contextlib import ExitStack

    left, held, other = (tmp_path / name for name in ("nb-left", "nb-held", "nb-other"))
    for folder in (left, held, other):
        folder.mkdir()
    (left / "in-use").touch()
    with ExitStack() as stack:
        lock = stack.enter_context((held / module.LOCK).open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        module._own_folder(stack, tmp_path)
        assert [folder.exists() for folder in (left, held, other)] == [False, True, True]


def test_a_second_ctrl_c_does_not_interrupt_the_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's processes would stay for a minute after two Ctrl-C."""
    import ray

    ended = []

    def shutdown() -> None:
        signal.raise_signal(signal.SIGINT)
        ended.append(True)

    monkeypatch.setattr(ray, "shutdown", shutdown)
    before = signal.getsignal(signal.SIGINT)
    module._shut_down()
    assert ended == [True]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_swallowed_ctrl_c_is_raised_later() -> None:
    """Ray swallows Ctrl-C while it starts, and the sweep goes on."""
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as signals:
        signals.check()
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(Stopped):
            signals.check()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_deferred_signal_is_raised_at_the_end_and_a_second_one_at_once(number: signal.Signals) -> None:
    """A checkpoint is written first; a person who presses Ctrl-C twice does not want to wait for it."""
    done: list[int] = []

    def work(times: int) -> None:
        with signals.deferred():
            for _ in range(times):
                signal.raise_signal(number)
            done.append(signals.number)

    with StopSignals() as signals:
        with pytest.raises(Stopped) as caught:
            work(1)
        assert done == [number]
        assert caught.value.number == number
        signals.number = 0
        with pytest.raises(Stopped):
            work(2)
    assert done == [number]


def test_another_thread_runs_without_signals() -> None:
    """Python sets signal handlers only in its main thread, so the sweep would fail at its start."""
    passed: list[str] = []

    def inside() -> None:
        with StopSignals() as signals:
            signals.check()
            passed.append("through")

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert passed == ["through"]
