"""A real Ray cluster on one machine: a head, nodes and Ray's autoscaler, on loopback and with a token.

    python -m cluster.local --workers 2              # a head without CPUs and two nodes of one CPU
    python -m cluster.local --cpus 0 --autoscale 4   # up to four nodes start and stop on demand

It prints the variables to export. Ctrl-C stops everything that it started. Tests and `make soak` kill its
nodes on purpose.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.request import urlopen

import psutil

from newsbert_ray.ray_session import PRIVATE_ENVIRONMENT, loopback_only, write_token

START_SECONDS = 90.0
"""Longest time for a head or a node to start; about 5 seconds on an idle machine."""
END_SECONDS = 15.0
STORE_BYTES = 150_000_000
"""Object store of each node; little data passes through it."""
HEAD_ID = "f" * 51 + "00000"
"""The node id that Ray's provider for one machine expects for the head."""
_HOST = "127.0.0.1"
_ROOT = Path(__file__).absolute().parents[1]
"""The folder from which nodes and the autoscaler import `cluster.provider`."""


class LocalClusterError(RuntimeError):
    """A head or node did not start; the message contains the end of its log."""


@dataclass(frozen=True)
class Node:
    """A node: Ray's id, and the process that started it."""

    id: str
    process: subprocess.Popen[bytes]


class LocalCluster:
    """A head and its nodes; a context manager that stops them at the end.

    Attributes:
        folder: token, logs and Ray's session; readable by this user only.
        address: HOST:PORT of the head, for RAY_ADDRESS.
        dashboard: http:// address for job submission.
        environment: variables for a client, including RAY_ADDRESS and RAY_API_SERVER_ADDRESS.
    """

    def __init__(
        self,
        *,
        cpus: int = 2,
        autoscale: int = 0,
        node_cpus: int = 1,
        idle_seconds: float = 6.0,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """Start the head.

        Args:
            cpus: CPUs of the head; with 0 no work runs on it.
            autoscale: largest number of nodes that Ray's autoscaler may start; 0 for no autoscaler.
            node_cpus: CPUs of each of these nodes.
            idle_seconds: time after which the autoscaler stops an idle node.
            variables: more environment variables for head and nodes.
        Raises:
            LocalClusterError: the head did not start in time.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="nbc-", dir="/tmp"))
        self._cpus, self._autoscale = cpus, autoscale
        self._node_cpus, self._idle_seconds = node_cpus, idle_seconds
        self._port, dashboard = _free_port(), _free_port()
        self.address, self.dashboard = f"{_HOST}:{self._port}", f"http://{_HOST}:{dashboard}"
        self.environment = {
            **PRIVATE_ENVIRONMENT,
            **loopback_only(),
            **write_token(self.folder),
            "RAY_ADDRESS": self.address,
            "RAY_API_SERVER_ADDRESS": self.dashboard,
        }
        self._variables = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            **(variables or {}),
        }
        self.nodes: list[Node] = []
        self._known: set[int] = set()
        try:
            self.head = self._start_head()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add_node(self, *, cpus: int = 1, resources: Mapping[str, float] | None = None) -> Node:
        """Start a node and wait until it has joined the cluster."""
        command = [sys.executable, "-c", _NODE, self.address, str(cpus), json.dumps(dict(resources or {}))]
        node = self._start([*command, str(STORE_BYTES)], secrets.token_hex(28))
        self.nodes.append(node)
        self._wait_for(node)
        return node

    def kill_node(self, node: Node) -> None:
        """Simulate the loss of a machine: SIGKILL to the node and all its child processes."""
        kill_all([node.process.pid, *descendants(node.process.pid)])
        node.process.wait()
        self.nodes.remove(node)

    def drain_node(self, node: Node, *, seconds: float) -> None:
        """Simulate a preemption notice: the node will stop in `seconds`, and Ray schedules nothing on it."""
        command = [*_RAY, "drain-node", "--address", self.address, "--node-id", node.id]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "preemption notice"]
        command += ["--deadline-remaining-seconds", str(int(seconds))]
        subprocess.run(command, env=self._environment(), check=True, capture_output=True, timeout=60)

    def restart_head(self) -> None:
        """Simulate the loss of the head and all nodes; a new head starts at the same address."""
        for node in [*self.nodes, self.head]:
            kill_all([node.process.pid, *descendants(node.process.pid)])
            node.process.wait()
        self.nodes.clear()
        self.head = self._start_head()

    def close(self) -> None:
        """Stop everything that was started here, nodes first, and remove the folder."""
        started = [*reversed(self.nodes), *([self.head] if hasattr(self, "head") else [])]
        family = {pid for node in started for pid in descendants(node.process.pid)} | self._known
        for node in started:
            node.process.terminate()
        end = time.monotonic() + END_SECONDS
        for node in started:
            try:
                node.process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                kill_all([node.process.pid])
                node.process.wait()
        while any(alive(pid) for pid in family) and time.monotonic() < end:
            time.sleep(0.1)
        kill_all(family)
        self.nodes.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start_head(self) -> Node:
        words = [*_RAY, "start", "--head", "--block", "--node-ip-address", _HOST, "--port", str(self._port)]
        words += ["--num-cpus", str(self._cpus), "--object-store-memory", str(STORE_BYTES)]
        words += ["--min-worker-port", "0", "--max-worker-port", "0", "--dashboard-agent-listen-port", "0"]
        words += ["--dashboard-host", _HOST, "--dashboard-port", self.dashboard.rpartition(":")[2]]
        words += ["--temp-dir", str(self.folder / "ray"), "--disable-usage-stats"]
        more: dict[str, str] = {}
        if self._autoscale:
            file = self.folder / "autoscaling.json"
            file.write_text(json.dumps(self._autoscaling()), encoding="utf-8")
            words += ["--autoscaling-config", str(file)]
            more = {
                "RAY_FAKE_CLUSTER": "1",
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_enable_autoscaler_v2": "1",
                "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            }
        head = self._start(words, HEAD_ID, **more)
        self._wait_for(head)
        end = time.monotonic() + START_SECONDS
        while not _answers(f"{self.dashboard}/api/gcs_healthz"):
            if time.monotonic() > end:
                raise LocalClusterError(f"no dashboard at {self.dashboard} after {START_SECONDS:g} s")
            time.sleep(0.2)
        return head

    def _start(self, command: list[str], node_id: str, **more: str) -> Node:
        environment = self._environment() | more | {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": node_id}
        # With RAY_ADDRESS set, a head would try to join that cluster and refuse to start.
        environment.pop("RAY_ADDRESS", None)
        with (self.folder / f"{node_id[:4]}{node_id[-5:]}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                env=environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        return Node(node_id, process)

    def _wait_for(self, node: Node) -> None:
        log = self.folder / f"{node.id[:4]}{node.id[-5:]}.log"
        end = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in log.read_text(encoding="utf-8", errors="replace"):
            if node.process.poll() is not None or time.monotonic() > end:
                last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-12:]
                raise LocalClusterError("a node of the local cluster did not start:\n" + "\n".join(last))
            time.sleep(0.1)
        self._known.update(descendants(node.process.pid))

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        return {**os.environ, "PYTHONPATH": path, **self._variables, **self.environment}

    def _autoscaling(self) -> dict[str, object]:
        """A Ray cluster file for the provider that starts nodes as processes of this machine."""
        return {
            "cluster_name": "local",
            "max_workers": self._autoscale,
            "idle_timeout_minutes": self._idle_seconds / 60,
            "provider": {
                "type": "external",
                "module": "cluster.provider.SeparateNodes",
                "gcs_address": self.address,
                "head_node_id": HEAD_ID,
                "launch_multiple": True,
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            "auth": {},
            "docker": {},
            "file_mounts": {},
            **{name: [] for name in _COMMANDS},
            "head_node_type": "ray.head.default",
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": self._cpus}, "node_config": {}, "max_workers": 0},
                "worker": {
                    "resources": {"CPU": self._node_cpus, "object_store_memory": STORE_BYTES},
                    "node_config": {},
                    "min_workers": 0,
                    "max_workers": self._autoscale,
                },
            },
        }


_RAY = (sys.executable, "-c", "from ray.scripts.scripts import main; main()")
_COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "cluster_synced_files",
)
"""Lists that Ray requires in a cluster file, even if empty."""
_NODE = """
import json, sys
from cluster.provider import run_node
address, cpus, resources, store = sys.argv[1:]
run_node(address, cpus=int(cpus), resources=json.loads(resources), store_bytes=int(store))
"""


def descendants(pid: int) -> list[int]:
    """Ids of all child processes, their children and so on; none if the process has ended."""
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill_all(pids: list[int] | set[int]) -> None:
    """Send SIGKILL; processes that have already ended are ignored."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def alive(pid: int) -> bool:
    """Whether the process is running (a zombie is not)."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def main() -> None:
    """Start a cluster, print how to use it, and wait for Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.local", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cpus", type=int, default=0, help="CPUs of the head (0: no trials run on it)")
    parser.add_argument("--workers", type=int, default=0, help="number of nodes to start")
    parser.add_argument("--node_cpus", type=int, default=1, help="CPUs of each node")
    parser.add_argument(
        "--autoscale", type=int, default=0, help="largest number of nodes that Ray's autoscaler may start"
    )
    parser.add_argument(
        "--idle_seconds",
        type=float,
        default=60.0,
        help="idle time before the autoscaler stops a node",
    )
    words = parser.parse_args()
    if not (words.cpus or words.workers or words.autoscale):
        parser.error("a cluster without CPUs runs nothing; give --cpus, --workers or --autoscale")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print("starting the head ...", flush=True)
    with LocalCluster(
        cpus=words.cpus, autoscale=words.autoscale, node_cpus=words.node_cpus, idle_seconds=words.idle_seconds
    ) as cluster:
        for _ in range(words.workers):
            cluster.add_node(cpus=words.node_cpus)
        print("\n".join(_usage(cluster, words.workers)), flush=True)
        try:
            while cluster.head.process.poll() is None:
                time.sleep(0.5)
        except KeyboardInterrupt:
            print("\nstopping the cluster ...", flush=True)


def _usage(cluster: LocalCluster, workers: int) -> list[str]:
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS")
    return [
        f"The cluster is running: head at {cluster.address}, {workers} nodes. In another shell:",
        *(f"  export {name}={cluster.environment[name]}" for name in names),
        "  newsbert-ray submit -- sweep search_spaces/demo.yaml --data SHARDS --teacher scratch --out OUT",
        f"dashboard: {cluster.dashboard} (the token is in the file above); Ctrl-C stops the cluster",
    ]


if __name__ == "__main__":
    main()
