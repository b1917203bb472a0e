"""One worker compared with two, each on one core: speed-up, and where the time goes.

    python -m tests.benchmarks.bench_workers [--data SHARDS --teacher NAME_OR_DIR] [--batch_size 32 128]

The same updates of the same global batch by one process and by two (gloo, one thread and one core each), in
turns. `exchange` is the time that averaging gradients adds to a step, `data` the time spent waiting for
batches. `bound` is what two could reach if the exchange took no time, from steps of one process on half
of the batch: below 2 for small batches, as Adam and the traffic of weights do not shrink with the batch.
The last lines estimate the same step on 8 and 64 GPUs from the bytes exchanged and the assumptions below,
which are named constants.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from newsbert_ray.config import TrainSettings, build_settings, merge
from newsbert_ray.data.reading import World, make_schedule, read_updates
from newsbert_ray.data.shards import read_manifest
from newsbert_ray.training.step import Learner, train_step
from newsbert_ray.training.worker import build_worker_learner
from tests.benchmarks.subject import add_subject, say, subject

GPU_FLOPS = 989e12
GPU_SHARE = 0.3
"""Dense bf16 peak of an H100 (data sheet), and the share of it that a step is assumed to reach."""
LAUNCH_SECONDS = 2500 * 5e-6
"""Operations of a step (counted in a profile) at 5 microseconds per launch: the least time of a step on a
GPU."""
NODE_GPUS = 8
NVLINK_BYTES = 450e9
"""Bytes per second from a GPU to the others in its node (data sheet: 900 GB/s in both directions)."""
NETWORK_BYTES = 50e9
"""Bytes per second between nodes (400 Gb/s)."""
GPU_BATCH = 128
"""Titles per GPU in a batch."""


def main() -> None:
    """Print one JSON line per batch size, then the estimates."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_subject(parser)
    parser.add_argument("--batch_size", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--layers", type=int, default=1, help="of the student")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each kind and turn")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    common = {**subject(options), "student.layers": options.layers, "threads": 1, "out": "unused"}
    for batch_size in options.batch_size:
        by_workers: dict[int, list[dict[str, float]]] = {1: [], 2: []}
        halves = []
        for _ in range(options.repeats):
            for workers, rows in by_workers.items():
                values = merge(common, {"batch_size": batch_size, "workers": workers})
                rows.append(run(build_settings(TrainSettings, values), options.steps))
            values = merge(common, {"batch_size": batch_size // 2})
            halves.append(run(build_settings(TrainSettings, values), options.steps))
        ratios = [
            two["titles"] / one["titles"] for one, two in zip(by_workers[1], by_workers[2], strict=True)
        ]
        bounds = [2 * one["token"] / half["token"] for one, half in zip(by_workers[1], halves, strict=True)]
        two = {name: statistics.median(row[name] for row in by_workers[2]) for name in by_workers[2][0]}
        whole = two["step"] + two["data"]
        say(
            f"two workers against one, global batch {batch_size}",
            ratios=[round(ratio, 3) for ratio in ratios],
            median=round(statistics.median(ratios), 3),
            bound=round(statistics.median(bounds), 3),
            titles_per_second={
                n: round(statistics.median(r["titles"] for r in by_workers[n]), 1) for n in by_workers
            },
            shares_of_two={
                "exchange": round(two["exchange"] / whole, 3),
                "data": round(two["data"] / whole, 3),
                "step": round((two["step"] - two["exchange"]) / whole, 3),
            },
        )
    on_paper(build_settings(TrainSettings, merge(common, {"workers": 2})))


def run(settings: TrainSettings, steps: int) -> dict[str, float]:
    """Seconds of a step, a token, the exchange and the data, and titles per second, of the slowest worker."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(settings.workers, mp_context=mp.get_context("spawn")) as pool,
    ):
        jobs = [
            pool.submit(work, settings.model_dump(), rank, folder, steps) for rank in range(settings.workers)
        ]
        rows = [job.result() for job in jobs]
    return min(rows, key=lambda row: row["titles"])


def work(values: dict[str, Any], rank: int, folder: str, steps: int) -> dict[str, float]:
    """One worker: steps with and without the exchange, in turns."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    settings = TrainSettings.model_validate(values)
    world = World(rank, settings.workers, torch.device("cpu"))
    if world.size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world.size,
            timeout=timedelta(seconds=60),
        )
    manifest = read_manifest(settings.data)
    schedule = make_schedule(settings, manifest, world)
    learner = build_worker_learner(settings, schedule, world)
    updates = read_updates(schedule)
    seconds: dict[str, list[float]] = {"data": [], "step": [], "alone": []}
    titles = tokens = 0
    for number in range(2 * steps + 2):
        began = time.perf_counter()
        update = next(updates)
        read = time.perf_counter()
        kind = "step" if number % 2 == 0 else "alone"
        with contextlib.nullcontext() if kind == "step" else without_exchange(learner):
            train_step(learner, update.parts, step=number + 1)
        done = time.perf_counter()
        if number >= 2:
            seconds["data"].append(read - began)
            seconds[kind].append(done - read)
            titles += update.parts[0].rows if kind == "step" else 0
            tokens += update.parts[0].padded_tokens if kind == "step" else 0
    step, data = statistics.fmean(seconds["step"]), statistics.fmean(seconds["data"])
    if world.size > 1:
        dist.barrier()
        dist.destroy_process_group()
    return {
        "step": step,
        "data": data,
        "exchange": max(0.0, step - statistics.fmean(seconds["alone"])) if world.size > 1 else 0.0,
        "titles": titles / steps / (step + data),
        "token": step * steps / tokens,
    }


@contextlib.contextmanager
def without_exchange(learner: Learner) -> Any:
    """The same step without averaging gradients."""
    model, size = learner.model, learner.sparse_embedding.world_size
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    learner.model, learner.sparse_embedding.world_size = inner, 1
    try:
        yield
    finally:
        learner.model, learner.sparse_embedding.world_size = model, size


def on_paper(settings: TrainSettings) -> None:
    """Seconds of a step on one GPU and of its exchange among 8 and 64 GPUs, without overlap."""
    manifest = read_manifest(settings.data)
    schedule = make_schedule(settings, manifest)
    learner = build_worker_learner(settings, schedule, World())
    tables = {id(table.weight) for table in learner.sparse_embedding.embeddings}
    pair = learner.pair
    dense = 4 * sum(p.numel() for p in pair.parameters() if id(p) not in tables)
    part = next(read_updates(schedule)).parts[0]
    tokens = part.padded_tokens / part.rows * GPU_BATCH
    layers = [p for m in (pair.teacher.layers, pair.student.layers) for p in m.parameters()]
    flops = 6 * sum(p.numel() for p in layers) * tokens
    compute = max(LAUNCH_SECONDS, flops / (GPU_FLOPS * GPU_SHARE))
    words = tokens * 4 * sum(table.embedding_dim for table in learner.sparse_embedding.embeddings)
    for gpus in (8, 64):
        ring = 2 * (NODE_GPUS - 1) / NODE_GPUS * dense / NVLINK_BYTES + words * (NODE_GPUS - 1) / NVLINK_BYTES
        nodes = gpus // NODE_GPUS
        between = (2 * (nodes - 1) / nodes * dense + words * (gpus - NODE_GPUS)) / (NETWORK_BYTES * NODE_GPUS)
        exchange = ring + (between if nodes > 1 else 0.0)
        say(
            f"on paper, {gpus} GPUs",
            batch=gpus * GPU_BATCH,
            dense_megabytes=round(dense / 1e6, 1),
            rows_megabytes_each=round(words / 1e6, 2),
            step_milliseconds=round(1000 * compute, 3),
            exchange_milliseconds=round(1000 * exchange, 3),
            speedup=round(gpus * compute / (compute + exchange), 1),
            assumed={
                "flops": GPU_FLOPS,
                "share": GPU_SHARE,
                "launch_seconds": LAUNCH_SECONDS,
                "nvlink": NVLINK_BYTES,
                "network": NETWORK_BYTES,
            },
        )


if __name__ == "__main__":
    main()
