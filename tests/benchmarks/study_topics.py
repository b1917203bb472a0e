"""F1 of each topic for each value of a setting: which topics does it help or hurt?

    python -m tests.benchmarks.study_topics --sweep runs/why ... --by method [--split test]

Reads the students that the sweeps kept (`keep_students`). Prints one JSON line per topic, most frequent
topics first, and one with macro-F1, in percent, as the mean over seeds. `seeds` is the number of students
for each value; all values must have the same seeds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from newsbert_ray.evaluation.evaluate import evaluate
from newsbert_ray.evaluation.metrics import TopicRow
from newsbert_ray.record import find_records, read_record
from newsbert_ray.reporting.records import flat_settings
from newsbert_ray.reporting.sweep_data import TRIALS
from tests.benchmarks.subject import say


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the students and print one line per topic."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sweep", nargs="+", required=True, help="folders of sweeps that keep their students"
    )
    parser.add_argument("--by", default="method", help="the setting whose values are compared")
    parser.add_argument("--split", default="test")
    options = parser.parse_args(arguments)
    students: dict[str, dict[int, Path]] = {}
    for sweep in options.sweep:
        for folder in find_records(Path(sweep) / TRIALS):
            if (folder / "student").is_dir():
                record = read_record(folder)
                students.setdefault(str(flat_settings(record)[options.by]), {})[record.seed] = folder
    seeds = sorted(set.intersection(*(set(runs) for runs in students.values()))) if students else []
    if not seeds:
        raise SystemExit("no seed of which every value has a student; sweep with more --keep_students")
    chosen = {
        value: [evaluate(runs[seed], split=options.split, by_topic=True) for seed in seeds]
        for value, runs in students.items()
    }
    for row in next(iter(chosen.values()))[0]:
        of_topic = {value: _mean(runs, row.topic) for value, runs in chosen.items()}
        say(row.topic, titles=row.titles, **of_topic)
    means = {
        value: [statistics.fmean(row.f1 for row in run) for run in runs] for value, runs in chosen.items()
    }
    say("macro-F1", seeds=len(seeds), **{value: _percent(statistics.fmean(m)) for value, m in means.items()})


def _mean(runs: Sequence[Sequence[TopicRow]], topic: str) -> float:
    """F1 of a topic; 0 if it neither occurs nor is predicted."""
    return _percent(statistics.fmean(next((r.f1 for r in run if r.topic == topic), 0.0) for run in runs))


def _percent(share: float) -> float:
    return round(100 * share, 1)


if __name__ == "__main__":
    main()
