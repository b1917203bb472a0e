"""Ray Data: maps chunks of files to shards over a cluster, and streams shards to a worker. No arithmetic here."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

Chunk = TypeVar("Chunk")
Shared = TypeVar("Shared")
Summary = TypeVar("Summary")


def map_chunks(
    chunks: Sequence[Chunk], function: Callable[[Chunk, Shared], Summary], shared: Shared, *, workers: int | None
) -> Iterator[Summary]:
    """`function(chunk, shared)` for every chunk, as a Ray Data pipeline; summaries come as they are ready.

    Args:
        chunks: small descriptions of work, one task each.
        function: importable on every worker; what it writes must lie where the driver sees it.
        shared: what all chunks need; sent to the object store once.
        workers: tasks at once; as many as the cluster has CPUs where None.
    """
    import ray
    from ray.data import DataContext, TaskPoolStrategy

    DataContext.get_current().enable_progress_bars = False
    reference = ray.put(shared)

    def run(batch: dict[str, Any]) -> dict[str, Any]:
        return {"summary": [pickle.dumps(function(pickle.loads(one), ray.get(reference))) for one in batch["chunk"]]}

    rows = [{"chunk": pickle.dumps(chunk)} for chunk in chunks]
    pipeline = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        run, batch_size=1, compute=TaskPoolStrategy(workers), num_cpus=1
    )
    for row in pipeline.iter_rows():
        yield pickle.loads(row["summary"])
