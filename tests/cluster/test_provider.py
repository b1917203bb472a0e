"""The failing test names what a new version of Ray changed under `cluster.provider`."""

from __future__ import annotations

import inspect
from pathlib import Path

from ray._private import ray_constants
from ray._private.node import Node
from ray._private.parameter import RayParams

from cluster.provider import SeparateNodes


def test_separate_nodes_overrides_a_method_that_ray_calls() -> None:
    """Local nodes would remove each other's programs."""
    name = "_create_node_with_resources_and_labels"
    parent = SeparateNodes.__mro__[1]
    assert name in vars(parent)
    assert f"self.{name}(" in Path(str(__import__(parent.__module__, fromlist=["x"]).__file__)).read_text()
    assert isinstance(ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME, str)


def test_run_node_passes_parameters_that_ray_knows() -> None:
    """cluster.local could start no second node; tests of several nodes show the rest."""
    known = inspect.signature(RayParams).parameters
    assert {"gcs_address", "node_ip_address", "runtime_env_dir_name", "object_store_memory"} <= known.keys()
    assert {"head", "shutdown_at_exit", "spawn_reaper"} <= inspect.signature(Node).parameters.keys()
