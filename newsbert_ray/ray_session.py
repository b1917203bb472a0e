"""Joins a Ray cluster, or starts a private one on this machine and removes it at the end."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import Any, Self
from urllib.parse import urlsplit

from newsbert_ray import ray_private
from newsbert_ray.files import first_line, locked

ANSWER_SECONDS = 10.0
"""Time limit for an answer from a cluster's address."""
WATCH_SECONDS = 1.0
"""Between two checks for a preemption notice: a small part of a spot warning's 30 to 120 s."""
PREFIX = "nb-"
"""Start of the name of a private session's folder."""
LOCK = "in-use"
"""File in that folder that its process holds locked."""

HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
HTTP2_SETTINGS = b"\4"
"""Frame type of the answer to the greeting (RFC 9113, 6.5)."""

PRIVATE_ENVIRONMENT: Mapping[str, str] = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    # Otherwise Ray hides CUDA from a worker without its own GPU, and prints a warning.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


_ALONE = "unset RAY_ADDRESS to work on this machine alone"


class ConnectError(ValueError):
    """A cluster that cannot be joined or started; the text names the address and the cure."""


@dataclass(frozen=True)
class RaySession:
    """A session and what the cluster has now. `private`: started by this process, on this machine alone;
    `address`: HOST:PORT of the head; `dashboard`: its URL, if any; `has_autoscaler`: it starts nodes."""

    private: bool
    address: str
    cpus: float
    gpus: float
    dashboard: str | None
    has_autoscaler: bool


def inside_cluster() -> bool:
    """Whether RAY_ADDRESS names a cluster, or this process is already connected to one."""
    return _named_address() is not None or initialised()


@contextmanager
def ray_session(*, cpus: int | None = None, dashboard: bool = False) -> Iterator[RaySession]:
    """A Ray session for the duration of the block.

    A session that is already open in this process is used and left open. Otherwise the cluster of RAY_ADDRESS
    is joined, and left at the end. Without RAY_ADDRESS a private session starts on this machine, with `cpus`
    (all by default) and, where wanted, Ray's dashboard; it listens on the loopback only, asks for a token,
    and is removed at the end, with its folder. ConnectError: the address does not answer or refuses this
    user, or Ray does not start.
    """
    address, private = _named_address(), False
    with ExitStack() as stack:
        if not initialised():
            private = address is None
            _start(stack, cpus=cpus, dashboard=dashboard) if address is None else _join(stack, address)
        import ray

        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        url = ray_private.dashboard_address()
        yield RaySession(
            private=private,
            address=ray.get_runtime_context().gcs_address,
            cpus=float(resources.get("CPU", 0)),
            gpus=float(resources.get("GPU", 0)),
            dashboard=f"http://{url}" if url else None,
            has_autoscaler=not private and ray_private.has_autoscaler(),
        )


def _named_address() -> str | None:
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return address if address and address != "local" else None


def initialised() -> bool:
    """Whether this process is connected to a cluster already."""
    # A process with a session has imported Ray; this function must not import it, which is slow.
    if "ray" not in sys.modules:
        return False
    import ray

    return bool(ray.is_initialized())


def _join(stack: ExitStack, address: str) -> None:
    loopback = address != "auto" and _check_answer(address)
    try:
        _init(stack, loopback=loopback, address=address)
    except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
        token = "if it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with it"
        raise ConnectError(f"RAY_ADDRESS={address}: {first_line(error)}; {token}; or {_ALONE}") from error


def _init(stack: ExitStack, *, loopback: bool, **options: Any) -> None:
    """Connect to Ray until `stack` is closed."""
    import ray

    if loopback:
        stack.enter_context(ray_private.loopback_node())
    stack.callback(_shut_down)
    with ray_private.own_sigterm():
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)


def _check_answer(address: str) -> bool:
    """Raise ConnectError where `address` does not answer: Ray would wait for minutes, then end the process.
    Returns whether the cluster listens on this machine's loopback only: Ray replaces a loopback address by
    the network's, where such a cluster does not listen."""
    host, port = host_and_port(address)
    if not host or not port:
        raise ConnectError(f"RAY_ADDRESS={address}: expected HOST:PORT, such as 10.0.0.5:6379")
    if reason := refusal(host, port):
        what = f"no Ray cluster answers there ({reason})"
        raise ConnectError(f"RAY_ADDRESS={address}: {what}; start it, correct the address, or {_ALONE}")
    from ray.util import get_node_ip_address

    own_address = get_node_ip_address()  # type: ignore[no-untyped-call]
    return is_loopback(host) and refusal(own_address, port) is not None


def host_and_port(address: str) -> tuple[str | None, int | None]:
    """The parts of HOST:PORT or of a URL; None for a missing one, and for both where one is wrong."""
    try:
        url = urlsplit(address if "://" in address else f"//{address}")
        return url.hostname, url.port
    except ValueError:
        return None, None


def is_loopback(host: str) -> bool:
    """Whether a host name or IP address reaches this machine only."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def refusal(host: str, port: int) -> str | None:
    """Why host:port is no gRPC server like Ray's, which answers HTTP/2's greeting with its settings."""
    try:
        with socket.create_connection((host, port), timeout=ANSWER_SECONDS) as connection:
            connection.sendall(HTTP2_GREETING)
            answer = connection.recv(9)
    except OSError as error:
        return str(error)
    return None if answer[3:4] == HTTP2_SETTINGS else "something else listens on that port"


def _start(stack: ExitStack, *, cpus: int | None, dashboard: bool) -> None:
    # The path must be short: Ray's sockets are in it, and their paths may have 107 bytes. Ray lets every user
    # of the machine into its own folder, so that one is inside ours, which only this user may enter.
    temporary = Path(tempfile.gettempdir())
    if len(str(temporary)) > 30 and os.access("/tmp", os.W_OK):
        temporary = Path("/tmp")
    folder = _own_folder(stack, temporary)
    has_token = any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    token = {} if has_token else write_token(folder)
    stack.enter_context(environment({**PRIVATE_ENVIRONMENT, **token}))
    stack.enter_context(environment(loopback_only(), over=True))
    ray_private.forget_authentication()
    options = {"num_cpus": cpus, "include_dashboard": dashboard, "_temp_dir": str(folder / "ray")}
    try:
        _init(stack, loopback=True, address="local", **options)
    except Exception as error:  # Ray raises Exception itself where its processes start too slowly
        cure = f"check its load, free memory, and free disk in {temporary}"
        raise ConnectError(f"Ray does not start on this machine: {first_line(error)}; {cure}") from error


def _shut_down() -> None:
    """End the session. A second Ctrl-C must not interrupt this: Ray's processes would stay for a minute."""
    import ray

    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None
    try:
        ray.shutdown()
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before or signal.SIG_DFL)


def _own_folder(stack: ExitStack, parent: Path) -> Path:
    """A new folder with a lock; the folders of this user's sessions that were killed are removed."""
    for lock in parent.glob(f"{PREFIX}*/{LOCK}"):
        with suppress(OSError), locked(lock):
            shutil.rmtree(lock.parent, ignore_errors=True)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        with suppress(FileNotFoundError, TimeoutError):  # another start may remove it before it is locked
            stack.enter_context(locked(folder / LOCK))
            if (folder / LOCK).exists():
                return folder


@contextmanager
def watch_for_end(stopped: Callable[[], bool] = lambda: False) -> Iterator[Callable[[], str]]:
    """A function that tells, at no cost, why this process has to end soon: `preempted` (this machine is about
    to be taken away: spot warning, drained node) or `stopped` (the argument said so). An empty text
    otherwise, and always outside a cluster."""
    if not initialised():
        yield lambda: ""
        return
    import ray

    node = ray.get_runtime_context().get_node_id()
    reasons, over = list[str](), threading.Event()

    def watch() -> None:
        while not reasons and not over.wait(WATCH_SECONDS):
            with suppress(Exception):  # the head may be away for a while; the next check asks again
                if stopped():
                    reasons.append("stopped")
                elif node in ray_private.draining_nodes():
                    reasons.append("preempted")

    thread = threading.Thread(target=watch, name="watch-for-end", daemon=True)
    thread.start()
    try:
        yield lambda: reasons[0] if reasons else ""
    finally:
        over.set()
        thread.join(WATCH_SECONDS)


def loopback_only() -> dict[str, str]:
    """Environment in which Ray, gloo and NCCL use the loopback only; its name depends on the system."""
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    interfaces = {key: name for name in names for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    # With this variable the node's address is 127.0.0.1, and then every server listens on the loopback.
    return {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", **interfaces}


def write_token(folder: Path) -> dict[str, str]:
    """Write a new token into `folder`, readable by this user only; return the environment that uses it."""
    path = folder / "token"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


@contextmanager
def environment(values: Mapping[str, str], *, over: bool = False) -> Iterator[None]:
    """Set environment variables for the duration of the block; those already set stay, unless `over`."""
    added = {name: value for name, value in values.items() if over or name not in os.environ}
    before = {name: os.environ[name] for name in added if name in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
        os.environ.update(before)


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM (`number`; the exit code is 128 more) ended the work; the text says what was kept."""

    def __init__(self, number: int = signal.SIGINT, text: str = "") -> None:
        super().__init__(text)
        self.number = int(number)


class StopSignals:
    """Receives Ctrl-C and SIGTERM while its block runs in the main thread. A signal raises Stopped at once;
    in a block of `deferred` the first one only sets `number`."""

    def __init__(self, *, active: bool = True) -> None:
        """Where not `active` (a process that Ray started), signals are left as they are."""
        self.number = 0
        self._active = active and threading.current_thread() is threading.main_thread()
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM) if self._active else ():
            if signal.getsignal(number) != signal.SIG_IGN:  # a shell's `&`, nohup
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def check(self) -> None:
        """Raise Stopped where a signal was received: Ray may have swallowed the exception."""
        if self.number:
            raise Stopped(self.number)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A block that looks at `number` often and ends by itself; Stopped is raised at its end."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
            self.check()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        is_first, self.number = not self.number, self.number or number
        if not (is_first and self._deferred):
            raise Stopped(self.number)
        # print() could be interrupted in the middle of another print().
        os.write(2, b"\nstopping: a checkpoint is written first; press Ctrl-C again to stop at once\n")
