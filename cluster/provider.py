"""Nodes of `cluster.local`: processes of this machine, on the loopback, each with a folder for jobs' files.

Ray has no public way to start them. All nodes of one machine share a session folder, and each unpacks a job's
files anew when its first worker starts: in one folder they would remove them while programs run from them.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from typing import Any

from ray._private import ray_constants
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


def run_node(address: str, *, cpus: int, resources: Mapping[str, float], store_bytes: int) -> None:
    """Run one more node of the cluster at `address` until SIGTERM; prints a line when it has started.

    `ray start` refuses a second node on the loopback.
    """
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    parameters = RayParams(
        gcs_address=address,
        redis_address=address,
        node_ip_address="127.0.0.1",
        num_cpus=cpus,
        num_gpus=0,
        resources=dict(resources),
        object_store_memory=store_bytes,
        min_worker_port=0,
        max_worker_port=0,
        dashboard_agent_listen_port=0,
        runtime_env_dir_name=f"runtime_resources_{os.getpid()}",
    )
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    node = Node(parameters, head=False, shutdown_at_exit=False, spawn_reaper=False)
    print("Ray runtime started", flush=True)
    over.wait()
    node.kill_all_processes(check_alive=False, allow_graceful=True)


class SeparateNodes(FakeMultiNodeProvider):
    """The autoscaler's provider: starts nodes as processes."""

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: Mapping[str, Any], labels: Any
    ) -> None:
        with self.lock:
            name = ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME
            ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME = f"{name}_{self._next_node_id + 1}"
            try:
                super()._create_node_with_resources_and_labels(  # type: ignore[no-untyped-call]
                    node_config, tags, count, resources, labels
                )
            finally:
                ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME = name
