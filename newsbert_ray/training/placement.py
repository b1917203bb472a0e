"""A group's place in the cluster and on the disk, and that it gives all of it back. Knows no training.

A group belongs to its controller, an actor of the process that called it. When that process ends, Ray ends
the controller and the workers; the group's placement group, with its CPUs and GPUs, it keeps until the whole
job ends. Ray's own cure asks the dashboard, and fails without one or beside another Ray on the machine; here
the cluster's own tables are read, which say who has made a placement group, and who is alive.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from newsbert_ray.files import is_locked, locked
from newsbert_ray.ray_session import initialised

LOCK = ".group"
"""File in a run's folder that a group's first worker holds locked; however that ends, the system unlocks
it."""
GROUP_FOLDER = "ray"
"""Folder in a run's folder for what passes between a group and who follows it, as long as it works."""
LOCK_SECONDS = 60.0
"""How long the workers of an earlier start may take to end: they outlive a driver that is killed."""
LOOK_SECONDS = 1.0
"""Between two looks whether this machine is to be taken away: little of a spot warning's 30 to 120 s."""


class PlacementError(RuntimeError):
    """A run's folder in which another group works still; the text names it."""


def release_orphans() -> int:
    """Remove this job's placement groups whose maker, an actor, is dead; whatever runs in one ends with it.

    Returns:
        How many placement groups of actors this job has, the removed ones still among them: 0 when all is
        given back. What this process has placed itself, a Tune sweep's trials say, is left and not counted.
    """
    import ray
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    gcs, job = _tables(), bytes.fromhex(ray.get_runtime_context().get_job_id())
    found = 0
    for row in _accessor().get_placement_group_table():
        group = gcs.PlacementGroupTableData.FromString(row)
        maker = ray.ActorID(group.creator_actor_id)
        removed = group.state == gcs.PlacementGroupTableData.REMOVED
        if removed or group.creator_job_id != job or maker.is_nil():
            continue
        found += 1
        actor = _accessor().get_actor_info(maker)
        if actor is None or gcs.ActorTableData.FromString(actor).state == gcs.ActorTableData.DEAD:
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
    return found


def end_controllers() -> None:
    """Kill the Ray Train controllers that this process has started.

    Their workers end with them, their placement groups are orphans then.
    """
    import ray

    gcs, context = _tables(), ray.get_runtime_context()
    here: Any = ray._private.worker.global_worker
    own = bytes.fromhex(context.get_worker_id())
    for row in _accessor().get_actor_table(ray.JobID.from_hex(context.get_job_id()), None):
        actor = gcs.ActorTableData.FromString(row)
        alive = actor.state != gcs.ActorTableData.DEAD
        if alive and actor.class_name == "TrainController" and actor.owner_address.worker_id == own:
            here.core_worker.kill_actor(ray.ActorID(actor.actor_id), True)


@contextmanager
def watched_node() -> Iterator[Callable[[], bool]]:
    """Whether this process's machine is about to be taken away (a spot warning, a drained node), as a
    function that costs nothing; always False outside of a cluster."""
    if not initialised():
        yield lambda: False
        return
    import ray

    node = ray.get_runtime_context().get_node_id()
    leaving, over = threading.Event(), threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_SECONDS):
            try:
                draining = _accessor().get_draining_nodes()
            except Exception:  # the head may be away for a while; the next look asks again
                continue
            if node in draining:
                leaving.set()
                return

    thread = threading.Thread(target=watch, name="watched-node", daemon=True)
    thread.start()
    try:
        yield leaving.is_set
    finally:
        over.set()
        thread.join(LOOK_SECONDS)


def _accessor() -> Any:
    """What reads the cluster's tables; `ray.util.placement_group_table` does, too, but drops the maker."""
    from ray._private.state import state

    return state._connect_and_get_accessor()


def _tables() -> Any:
    """How their rows are written: protocol buffers, without types."""
    from ray.core.generated import gcs_pb2

    return gcs_pb2


@contextmanager
def first_worker_alone(run: Path, *, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """The run's folder for this first worker, once the one of an earlier start has ended.

    Raises:
        PlacementError: it has not ended within `seconds`.
    """
    busy = PlacementError(
        f"{run}: workers of an earlier start still train in it after {seconds:g} s; end them, "
        "or wait, then run the same command again"
    )
    with locked(run / LOCK, wait_seconds=seconds, error=busy):
        yield


def at_rest(run: Path) -> bool:
    """Whether no group works in the run's folder."""
    return not is_locked(run / LOCK)
