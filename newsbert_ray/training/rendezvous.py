"""What a group does otherwise than Ray Train: where its workers meet, and what watches over it.

Ray's own way lets rank 0 listen on every interface of the machine, without a token, and torch has no setting
for it; a socket that is bound beforehand can be handed over.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

from ray.train.backend import BackendConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

_LOOPBACK = "127.0.0.1"
_TIMEOUT = timedelta(minutes=30)  # Ray's own
_LEFT_OUT = ("PlacementGroupCleanerCallback", "DatasetsCallback")
_kept: list[socket.socket] = []
"""The first worker's socket, between being opened and being handed to the store."""


class GroupTrainer(TorchTrainer):
    """TorchTrainer without two of the actors that Ray starts beside the workers.

    PlacementGroupCleaner belongs to nobody, and where the dashboard is off, or another Ray runs on the
    machine, it stays for ever; `training.placement` does its work. DatasetManager serves Ray's own data sets;
    ours come otherwise.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        return [one for one in callbacks if type(one).__name__ not in _LEFT_OUT]


class LoopbackConfig(TorchConfig):
    """TorchConfig for a group whose workers all stand on this machine."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What Ray starts the group with."""
        return _LoopbackBackend


class _LoopbackBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        import ray

        size = len(worker_group)
        gpus = worker_group.get_resources_per_worker().get("GPU", 0)
        worker_group.execute(_set_torch_distributed_env_vars)
        options = {
            "port": worker_group.execute_single(0, _listen),
            "size": size,
            "backend": getattr(backend_config, "backend", None) or ("nccl" if gpus else "gloo"),
        }
        ray.get(
            [worker_group.execute_single_async(rank, _join, number=rank, **options) for rank in range(size)]
        )


def _listen() -> int:
    """Open the first worker's socket; returns its port."""
    listener = socket.create_server((_LOOPBACK, 0))
    _kept.append(listener)
    port: int = listener.getsockname()[1]
    return port


def _join(*, number: int, size: int, port: int, backend: str) -> None:
    """Join the group at the first worker's socket, as worker `number` of `size`."""
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

    store = TCPStore(
        _LOOPBACK,
        port,
        size,
        is_master=number == 0,
        timeout=_TIMEOUT,
        master_listen_fd=_kept.pop().detach() if number == 0 else None,
        wait_for_workers=False,
    )
    dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=_TIMEOUT)
