"""A Ray Train group of one worker with Ray Data, compared with the same training loop in this process.

    python -m tests.benchmarks.bench_group [--data SHARDS --teacher NAME_OR_DIR] [--steps 60] [--repeats 2]

Both train the same updates with the same settings, in turns. The measure is titles per second over training
steps and waiting for data, for the whole run and (`steady`) without the first log entries, while Ray Data
starts. The start of the group and evaluation are excluded from both.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from newsbert_ray.config import TrainSettings, build_settings, merge
from newsbert_ray.ray_session import ray_session
from newsbert_ray.record import METRICS, read_entries
from newsbert_ray.training.run import train
from tests.benchmarks.subject import add_subject, say, subject


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_subject(parser)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    common = {
        **subject(options),
        "student.layers": 1,
        "epochs": 1,
        "batch_size": 32,
        "train_rows": options.steps * 32,
        "threads": options.threads,
        "log_every": 5,
    }
    speeds: dict[str, list[float]] = {"process": [], "group": []}
    steady: dict[str, list[float]] = {"process": [], "group": []}
    with tempfile.TemporaryDirectory() as folder, ray_session(dashboard=True):
        for repeat in range(options.repeats):
            for name in speeds:
                settings = build_settings(
                    TrainSettings, merge(common, {"out": str(Path(folder) / f"{name}{repeat}")})
                )
                record = train(settings, quiet=name == "process")
                speeds[name].append(record.titles_per_second)
                entries = [e for e in read_entries(Path(settings.out) / METRICS) if e["kind"] == "log"]
                steady[name].append(statistics.median(e["titles_per_second"] for e in entries[2:]))
    for part, rates in (("whole", speeds), ("steady", steady)):
        ratios = [g / p for g, p in zip(rates["group"], rates["process"], strict=True)]
        say(f"group of one against the plain loop, {part}", **rates, ratios=ratios)


if __name__ == "__main__":
    main()
