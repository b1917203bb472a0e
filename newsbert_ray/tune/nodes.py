"""Whether each machine of a cluster can read and write what a sweep's trials will: said before the first
trial, and by a trial on a machine that has come later."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from newsbert_ray import inputs, storage
from newsbert_ray.data.shards import MANIFEST
from newsbert_ray.tune.plan import SWEEP


class NodeError(RuntimeError):
    """A machine that cannot read or write what it has to; the text names it, the place and the cure."""


def check_nodes(place: str | Path, *, data: Sequence[str] = (), teachers: Sequence[str] = ()) -> None:
    """Let every machine of the cluster write into a sweep's folder, and find shards and teachers; those in a
    bucket are downloaded there. Machines that go meanwhile are not waited for.

    Raises:
        NodeError: one cannot.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    probe = Path(f".probe-{secrets.token_hex(8)}")
    shared = None if storage.is_url(place) else Path(place).absolute() / probe
    look: Any = ray.remote(num_cpus=0, max_retries=0)(find_fault)
    if shared:
        shared.touch()
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        answers = [
            look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(storage.absolute(place), str(shared or ""), list(data), list(teachers))
            for node in nodes
        ]
        for node, answer in zip(nodes, answers, strict=True):
            try:
                fault = ray.get(answer)
            except RayTaskError:
                raise
            except RayError:
                continue  # the machine is gone
            if fault:
                raise NodeError(f"node {node['NodeManagerAddress']} ({node['NodeID'][:12]}): {fault}")
    finally:
        if shared:
            shared.unlink(missing_ok=True)


def find_fault(place: str, shared: str, data: Sequence[str], teachers: Sequence[str]) -> str:
    """What keeps this machine from working on a sweep; empty where nothing does.

    Args:
        place: the sweep's folder.
        shared: a file in it that the driver has left; empty where it is in a bucket.
        data, teachers: folders of shards, and of teachers.
    """
    if shared and not Path(shared).exists():
        return _unseen(place, "--out")
    try:
        storage.check_writable(place)
        for folder in data:
            if not (inputs.fetch(folder) / MANIFEST).exists():
                return _unseen(folder, "--data")
        for folder in teachers:
            if not inputs.fetch(folder).is_dir():
                return _unseen(folder, "--teacher")
    except storage.StorageError as error:
        return str(error)
    return ""


def require_seen(sweep: str | None) -> None:
    """Refuse to work on a machine that does not see the sweep's folder: its results would be lost there.

    Args:
        sweep: the folder; None, or one in a bucket, is seen from everywhere.
    Raises:
        NodeError: it does not.
    """
    if sweep and not storage.is_url(sweep) and not (Path(sweep) / SWEEP).exists():
        raise NodeError(f"this node {_unseen(sweep, '--out')}")


def _unseen(place: str, flag: str) -> str:
    return (
        f"does not see {place}: give as {flag} a folder that all nodes share, or a URL such as "
        "s3://bucket/folder"
    )
