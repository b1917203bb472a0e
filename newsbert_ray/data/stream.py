"""Ray Data: runs a function over chunks of files on a cluster, streams shards to a worker. No arithmetic."""

from __future__ import annotations

import logging
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import numpy as np
import pyarrow as pa

from newsbert_ray.data.batches import Window
from newsbert_ray.data.examples import Part
from newsbert_ray.data.reading import TrainingSchedule, Update, collate_update, training_texts, window_parts
from newsbert_ray.data.shards import TextTable

_NO_TEXTS = TextTable(np.zeros(0, np.int32), np.zeros(1, np.int64))

Chunk = TypeVar("Chunk")
Shared = TypeVar("Shared")
Summary = TypeVar("Summary")


def map_chunks(
    chunks: Sequence[Chunk],
    function: Callable[[Chunk, Shared], Summary],
    shared: Shared,
    *,
    workers: int | None,
    gpus: float = 0,
) -> Iterator[Summary]:
    """`function(chunk, shared)` for every chunk, as a Ray Data pipeline; results come as they are ready.
    `function` must be importable on every worker, and write where the driver can read. `workers`: concurrent
    tasks; if None as many as the cluster's CPUs, or its GPUs, allow. `gpus`: of each task, such as 0.25."""
    import ray
    from ray.data import TaskPoolStrategy

    reference = ray.put(shared)

    def run(batch: dict[str, Any]) -> dict[str, Any]:
        # One task a core: threads inside a task would only compete for the same cores.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        shared = ray.get(reference)
        return {"summary": [pickle.dumps(function(pickle.loads(one), shared)) for one in batch["chunk"]]}

    if not chunks:
        return
    rows = [{"chunk": pickle.dumps(chunk)} for chunk in chunks]
    _quiet_context()
    pipeline = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        run, batch_size=1, compute=TaskPoolStrategy(workers), num_cpus=1, num_gpus=gpus or None
    )
    for row in pipeline.iter_rows():
        yield pickle.loads(row["summary"])


def _quiet_context() -> Any:
    from ray.data import DataContext

    with warnings.catch_warnings():
        # Ray 2.60 warns of deprecated fields that its own context sets.
        warnings.simplefilter("ignore", DeprecationWarning)
        context = DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return context


def stream_updates(schedule: TrainingSchedule, *, done: int = 0) -> Iterator[Update]:
    """The same updates as `data.reading.read_updates` gives, made by Ray Data tasks.

    One pipeline over all windows of all remaining epochs, so that it starts once. A task reads and orders a
    window and sends this worker's examples only, without the table of texts, because each worker maps it.
    Tasks reserve no CPU, because the workers may hold all of them.
    """
    import ray

    _quiet_context().execution_options.preserve_order = True
    rows = [
        {"work": pickle.dumps((schedule, window, first_step, skip))}
        for window, first_step, skip in schedule.windows_from(done)
    ]
    pipeline = ray.data.from_items(rows, override_num_blocks=max(1, len(rows))).map_batches(
        _window_parts, batch_size=1, num_cpus=0
    )
    for block in pipeline.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        for update in cast("pa.Table", block).column("update").to_pylist():
            step, epoch, sent = pickle.loads(update)
            parts = [_over(training_texts(schedule), part) for part in sent]
            yield collate_update(parts, schedule, step=step, epoch=epoch)


def _window_parts(batch: dict[str, Any]) -> pa.Table:
    """A window's updates for one worker, a row each."""
    work: tuple[TrainingSchedule, Window, int, int] = pickle.loads(batch["work"][0])
    schedule, window, first_step, skip = work
    updates = [
        pickle.dumps((step, window.epoch, [_over(_NO_TEXTS, part) for part in parts]))
        for step, parts in window_parts(schedule, window, first_step=first_step, skip=skip)
    ]
    return pa.table({"update": pa.array(updates, pa.binary())})


def _over(table: TextTable, part: Part) -> Part:
    return part._replace(examples=replace(part.examples, table=table))
