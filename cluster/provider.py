"""Ray's provider that starts nodes as processes of one machine, made fit for jobs that bring files.

All nodes of one machine share a session folder, and each unpacks a job's files anew when its first worker
starts: in one folder they would take them away under each other's running programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray._private import ray_constants
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class SeparateNodes(FakeMultiNodeProvider):
    """Gives each node a folder of its own for jobs' files."""

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: Mapping[str, Any], labels: Any
    ) -> None:
        with self.lock:
            usual = ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME
            ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME = f"{usual}_{self._next_node_id + 1}"
            try:
                super()._create_node_with_resources_and_labels(  # type: ignore[no-untyped-call]
                    node_config, tags, count, resources, labels
                )
            finally:
                ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME = usual
