"""What a trial occupies, and how many run at once: decided before the first, so that none waits for ever."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from newsbert_ray.config import SettingsError, TrainSettings
from newsbert_ray.data.shards import MANIFEST
from newsbert_ray.storage import inputs
from newsbert_ray.storage import workdir as storage
from newsbert_ray.tune.sweep_folder import SWEEP

TRIALS_PER_GPU = 4
"""Trials that share a GPU where nothing else is asked for."""

Node = Mapping[str, float]
"""What a node of the cluster has, as Ray names it: {"CPU": 8.0, "GPU": 1.0}."""


@dataclass(frozen=True)
class Place:
    """What one worker of a trial occupies, how many workers a trial has, and how many trials run at once."""

    slots: int
    cpus: float
    gpus: float
    workers: int = 1

    @property
    def nested(self) -> bool:
        """Whether a trial is a Ray Train group of its own, driven from an actor that holds no CPU."""
        return self.workers > 1

    @property
    def resources(self) -> dict[str, float]:
        """What Tune holds for a trial, as Ray names it; a group asks for its workers' share itself."""
        if self.nested:
            return {"CPU": 0, "node:__internal_head__": 0.001}
        return {"CPU": self.cpus, "GPU": self.gpus} if self.gpus else {"CPU": self.cpus}


def place_of(
    settings: TrainSettings,
    nodes: Sequence[Node],
    *,
    jobs: int,
    concurrency: int | None = None,
    gpus: float | None = None,
    growing: bool = False,
) -> Place:
    """The place of each trial of a sweep whose first has `settings`.

    Args:
        nodes: the cluster's nodes.
        jobs: trials that are due.
        concurrency: trials at once, at most.
        gpus: GPUs of each worker; where there are GPUs an equal share of them by default, at most
            TRIALS_PER_GPU trials on each, or one for each worker of a group.
        growing: the cluster starts nodes for what is asked of it: with `concurrency`, the asked many run at
            once however few fit now.
    Raises:
        SettingsError: not even one trial would fit, and Ray would wait for ever.
    """
    cpus, workers = float(settings.threads or 1), settings.workers
    if growing and concurrency is not None:
        usual = 1.0 if workers > 1 else 1.0 / TRIALS_PER_GPU
        share = (gpus or (usual if settings.device == "cuda" else 0.0)) if settings.device != "cpu" else 0.0
        return Place(slots=min(jobs, concurrency), cpus=cpus, gpus=share, workers=workers)
    there = sum(node.get("GPU", 0.0) for node in nodes) if settings.device != "cpu" else 0.0
    if (settings.device == "cuda" or gpus) and not there:
        asked = f"gpus = {gpus:g}" if gpus else "device = cuda"
        cure = ", or say how many trials at once with --concurrency and the cluster grows" if growing else ""
        raise SettingsError(f"{asked}: Ray has no GPU; take --device cpu and leave gpus out{cure}")
    share = (gpus or (1.0 if workers > 1 else 0.0)) if there else 0.0
    usable = [node for node in nodes if node.get("GPU") or not there]
    fitting = sum(_fitting(node, cpus, share) for node in usable)
    if fitting < workers:
        cure = "; or let the cluster grow: say how many trials at once with --concurrency" if growing else ""
        raise SettingsError(_too_large(usable, cpus, share, workers, fitting) + cure)
    slots = fitting // workers
    if there and not share and concurrency is None:
        slots = min(slots, int(there * TRIALS_PER_GPU))
    slots = max(1, min(slots, jobs, concurrency or slots))
    if there and not share:
        share = min(1.0, int(there / slots * 1000) / 1000)
    return Place(slots=slots, cpus=cpus, gpus=share, workers=workers)


def _fitting(node: Node, cpus: float, gpus: float) -> int:
    """Workers that fit on a node."""
    by_cpu = int(node.get("CPU", 0.0) // cpus)
    return min(by_cpu, int(node.get("GPU", 0.0) / gpus + 1e-9)) if gpus else by_cpu


def _too_large(nodes: Sequence[Node], cpus: float, gpus: float, workers: int, fitting: int) -> str:
    """Why no trial fits, and the cure."""
    kind = "node with a GPU" if any(node.get("GPU") for node in nodes) else "node"
    largest = max((node.get("CPU", 0.0) for node in nodes), default=0.0)
    if not fitting and largest < cpus:
        return (
            f"threads = {cpus:g}: a trial needs {cpus:g} CPUs of one node, Ray's largest {kind} has "
            f"{largest:g}; take fewer threads"
        )
    share = f" and {gpus:g} GPUs" if gpus else ""
    return (
        f"workers = {workers}: each needs {cpus:g} CPUs{share} of one node, and {fitting} fit on Ray's "
        "nodes; take fewer workers, threads or gpus"
    )


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
