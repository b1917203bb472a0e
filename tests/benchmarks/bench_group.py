"""A Ray Train group of one worker, fed by Ray Data, against the same loop in this process.

Both train the same updates with the same settings; compared are the seconds of steps and of waiting for data
(start-up
and evaluation apart, which the closing lines of a run show). They run in turn, several times.

    python -m tests.benchmarks.bench_group [--data SHARDS --teacher NAME_OR_DIR] [--steps 60] [--repeats 2]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from newsbert_ray.config import TrainSettings, build_settings, merge
from newsbert_ray.connect import ray_session
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
    }
    speeds: dict[str, list[float]] = {"process": [], "group": []}
    with tempfile.TemporaryDirectory() as folder, ray_session(dashboard=True):
        for repeat in range(options.repeats):
            for name in speeds:
                settings = build_settings(
                    TrainSettings, merge(common, {"out": str(Path(folder) / f"{name}{repeat}")})
                )
                record = train(settings, quiet=name == "process")
                speeds[name].append(record.titles_per_second)
    ratios = [g / p for g, p in zip(speeds["group"], speeds["process"], strict=True)]
    say(
        "group of one against the plain loop", **speeds, ratio_median=statistics.median(ratios), ratios=ratios
    )


if __name__ == "__main__":
    main()
