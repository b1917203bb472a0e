"""What a trial occupies, and how many run at once: decided before the first, so that none waits for ever."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from newsbert_ray.config import SettingsError, TrainSettings

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
