"""Everything that uses Ray's private modules, one function for each use. No other file may.

Each function says why Ray's public API does not do. `tests/test_ray_private.py` names the function that a new
version of Ray breaks. Imports are local: Ray is slow to load.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from ray.train.torch import TorchConfig, TorchTrainer

VERSIONS_PROGRAM = """
import json, sys
from ray._common.usage.usage_lib import get_cluster_metadata
from ray._raylet import GcsClient
print(json.dumps(get_cluster_metadata(GcsClient(address=sys.argv[1]))))
"""
"""Prints the versions of the cluster whose head has the address in argv[1]. Ray's public clients refuse a
cluster of another version without naming it. A program, because Ray may end the process that asks."""

_TIMEOUT = timedelta(minutes=30)
"""Ray Train's own timeout for joining a process group."""
_ENTRIES = b"newsbert-entries"
_NOT_STARTED = ("PlacementGroupCleanerCallback", "DatasetsCallback")


# --- Addresses and tokens ---------------------------------------------------------------------------------


@contextmanager
def loopback_node() -> Iterator[None]:
    """This process's node address is 127.0.0.1 for the duration of the block, as it is for Ray's other
    processes by RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, which Ray reads on import."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def own_sigterm() -> Iterator[None]:
    """A Python handler of SIGTERM stays in force while Ray starts. `ray.init` replaces it by one that ends
    the process without a word; for a moment its C++ part by one that prints frames, which nothing turns off:
    so nothing is printed in that moment."""
    from ray import _raylet
    from ray._private import utils

    raylet, handlers = cast("Any", _raylet), cast("Any", utils)
    handler = signal.getsignal(signal.SIGTERM)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = handlers.set_sigterm_handler, raylet.CoreWorker

    def start_core(*arguments: Any, **options: Any) -> Any:
        screen, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 2)
        try:
            core = before[1](*arguments, **options)
            signal.signal(signal.SIGTERM, handler)
            return core
        finally:
            os.dup2(screen, 2)
            os.close(screen)
            os.close(nothing)

    handlers.set_sigterm_handler, raylet.CoreWorker = lambda handler: None, start_core
    try:
        yield
    finally:
        handlers.set_sigterm_handler, raylet.CoreWorker = before


def forget_authentication() -> None:
    """Let Ray read its token again: it keeps the first one, and a second private session has another."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def dashboard_address() -> str | None:
    """HOST:PORT of the dashboard of the cluster that this process joined; `ray.init` alone returns it."""
    import ray

    address: str | None = ray._private.worker.get_dashboard_url()  # type: ignore[no-untyped-call]
    return address or None


def has_autoscaler() -> bool:
    """Whether the cluster starts nodes on demand; no public function tells."""
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    return bool(is_autoscaler_v2(fetch_from_server=True))


# --- Jobs' files, and this machine ------------------------------------------------------------------------


def walk_package(
    start: Path,
    visit: Callable[[Path], None],
    *,
    root: Path,
    excludes: Sequence[str],
    skip: Callable[[Path], bool],
    gitignore: bool,
) -> None:
    """Visit the files and folders at or below `start` that Ray would pack as a job's working directory: it
    reads .gitignore and .rayignore only while it packs; names and sizes are needed before. `excludes` are
    patterns relative to `root`; `skip` leaves a path out whatever they say."""
    from ray._private.runtime_env import packaging

    silent = logging.Logger("newsbert_ray.package", logging.CRITICAL)
    matchers = [packaging._get_excludes(root, list(excludes)), skip]
    packaging._dir_travel(start, matchers, visit, include_gitignore=gitignore, logger=silent)


def container_cores() -> float:
    """Cores that this machine or container may use; the standard library ignores a container's quota."""
    from ray._private.utils import get_num_cpus

    logging.getLogger("ray._private.utils").setLevel(logging.ERROR)  # it warns of a fraction of a core
    return float(get_num_cpus(override_docker_cpu_warning=True, truncate=False))


def available_memory() -> int:
    """Bytes that this machine or container has free; psutil alone ignores a container's limit."""
    import psutil
    from ray._private.utils import estimate_available_memory

    return max(0, min(int(psutil.virtual_memory().available), int(estimate_available_memory())))  # type: ignore[no-untyped-call]


def send_no_keys() -> None:
    """Keep Ray Tune from giving this process's AWS keys to its trials as a runtime environment, which every
    node logs. A private session's processes inherit them; a cluster's nodes have keys or a role of their own.
    """
    from ray.tune.execution import class_cache

    sent: set[str] = class_cache.ENV_VARS_TO_PROPAGATE
    sent -= {name for name in sent if name.startswith("AWS_")}


# --- Placement groups and actors --------------------------------------------------------------------------


def release_orphans() -> int:
    """Remove this job's placement groups whose creator, an actor, is dead; what runs in them ends.

    Ray keeps such a group, with its CPUs and GPUs, until the job ends. Its own cleaner needs the dashboard.
    `ray.util.placement_group_table` does not say who created a group. Returns how many groups of actors this
    job has, with those just removed: 0 when all are released. Groups that this process created itself (a
    sweep's trials) are kept and not counted.
    """
    import ray
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    gcs, job = _messages(), bytes.fromhex(ray.get_runtime_context().get_job_id())
    count = 0
    for row in _tables().get_placement_group_table():
        group = gcs.PlacementGroupTableData.FromString(row)
        creator = ray.ActorID(group.creator_actor_id)
        is_removed = group.state == gcs.PlacementGroupTableData.REMOVED
        if is_removed or group.creator_job_id != job or creator.is_nil():
            continue
        count += 1
        actor = _tables().get_actor_info(creator)
        if actor is None or gcs.ActorTableData.FromString(actor).state == gcs.ActorTableData.DEAD:
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
    return count


def end_controllers() -> None:
    """Kill the Ray Train controllers that this process started; their workers end with them. Ray Train gives
    no handle to its controller, and `fit` cannot be interrupted."""
    import ray

    gcs, context = _messages(), ray.get_runtime_context()
    worker: Any = ray._private.worker.global_worker
    own_id = bytes.fromhex(context.get_worker_id())
    for row in _tables().get_actor_table(ray.JobID.from_hex(context.get_job_id()), None):
        actor = gcs.ActorTableData.FromString(row)
        is_alive = actor.state != gcs.ActorTableData.DEAD
        if is_alive and actor.class_name == "TrainController" and actor.owner_address.worker_id == own_id:
            worker.core_worker.kill_actor(ray.ActorID(actor.actor_id), True)


def draining_nodes() -> set[str]:
    """Ids of the nodes that are about to be taken away; Ray's public state shows only their end."""
    return set(_tables().get_draining_nodes())


def _tables() -> Any:
    """Reads the cluster's own tables, which need no dashboard."""
    from ray._private.state import state

    return state._connect_and_get_accessor()


def _messages() -> Any:
    """The protocol buffers in which the tables' rows are written."""
    from ray.core.generated import gcs_pb2

    return gcs_pb2


# --- Entries of a training group, in the key-value store of the cluster's head -----------------------------
# An actor that holds a queue would cost a process; the store is there, and survives its writers.


def send_entry(group: str, entry: Mapping[str, Any]) -> None:
    """Send `entry` (JSON values) to the process that started `group`."""
    _store()._internal_kv_put(f"{group}/{time.time_ns():020d}", json.dumps(entry), namespace=_ENTRIES)


def take_entries(group: str) -> list[dict[str, Any]]:
    """Remove and return what `group` has sent, in order; what is left while the head is away comes later."""
    entries: list[dict[str, Any]] = []
    with _head_may_be_away():
        for key in sorted(_store()._internal_kv_list(f"{group}/", namespace=_ENTRIES)):
            value = _store()._internal_kv_get(key, namespace=_ENTRIES)
            _store()._internal_kv_del(key, namespace=_ENTRIES)
            if value:
                entries.append(json.loads(value))
    return entries


def forget_entries(group: str) -> None:
    """Remove the entries of `group` that nobody has taken; nothing happens while the head is away."""
    with _head_may_be_away():
        for prefix in (f"{group}/", f"stop-{group}"):
            _store()._internal_kv_del(prefix, del_by_prefix=True, namespace=_ENTRIES)


def request_stop(group: str) -> None:
    """Ask the workers of `group` to write a checkpoint and end."""
    _store()._internal_kv_put(f"stop-{group}", "1", namespace=_ENTRIES)


def stop_requested(group: str) -> bool:
    """Whether the workers of `group` were asked to end."""
    return bool(_store()._internal_kv_get(f"stop-{group}", namespace=_ENTRIES))


def _store() -> Any:
    from ray.experimental import internal_kv

    return internal_kv


def _head_may_be_away() -> suppress:
    from ray.exceptions import RpcError

    return suppress(RpcError, ConnectionError)


# --- Ray Train --------------------------------------------------------------------------------------------


def group_trainer() -> type[TorchTrainer]:
    """TorchTrainer without two of the actors that it starts beside the workers; no setting turns them off.

    PlacementGroupCleaner has no owner: without a dashboard, or beside another Ray on the machine, it runs for
    ever; `release_orphans` does its work. DatasetManager serves Ray datasets, which we do not pass.
    """
    from ray.train.torch import TorchTrainer

    class GroupTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
            return [callback for callback in callbacks if type(callback).__name__ not in _NOT_STARTED]

    return GroupTrainer


def loopback_config() -> type[TorchConfig]:
    """TorchConfig for a group whose workers all run on this machine: they meet in a file. Ray's own lets rank
    0 listen on every network interface, without a token; torch has no setting for the interface."""
    from ray.train.torch import TorchConfig
    from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

    class LoopbackBackend(_TorchBackend):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            import ray

            size = len(worker_group)
            gpus = worker_group.get_resources_per_worker().get("GPU", 0)
            worker_group.execute(_set_torch_distributed_env_vars)
            options = {
                "store": worker_group.execute_single(0, _new_store),
                "size": size,
                "backend": getattr(backend_config, "backend", None) or ("nccl" if gpus else "gloo"),
            }
            start = worker_group.execute_single_async
            ray.get([start(rank, _join_group, worker_rank=rank, **options) for rank in range(size)])

    class LoopbackConfig(TorchConfig):
        @property
        def backend_cls(self) -> type[_TorchBackend]:
            return LoopbackBackend

    return LoopbackConfig


def _new_store() -> str:
    """The name of a new file in the session's folder."""
    import ray

    node = ray._private.worker._global_node
    folder = node.get_session_dir_path() if node else tempfile.gettempdir()
    return f"{folder}/newsbert-{secrets.token_hex(8)}"


def _join_group(*, worker_rank: int, size: int, store: str, backend: str) -> None:
    import torch.distributed as dist
    from torch.distributed import FileStore  # type: ignore[attr-defined]  # public, but not in __all__

    file = FileStore(store, size)
    dist.init_process_group(backend, store=file, rank=worker_rank, world_size=size, timeout=_TIMEOUT)
