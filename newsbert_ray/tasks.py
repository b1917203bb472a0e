"""The tasks a pair can learn: what an example of each is, and what it is judged by. Knows no tensor, no file.

"NewsBERT" is Wu et al. 2021: topic classification (Fig. 1), recommendation (Fig. 2), retrieval (Fig. 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

TaskName = Literal["topics", "recommendation", "retrieval"]


class Metric(NamedTuple):
    """A share from 0 to 1 by its name in records (`auc`) and its heading for people (`AUC`)."""

    name: str
    heading: str


class Task(NamedTuple):
    """What one task counts and is judged by.

    `examples` names what training counts, `rows` what evaluation counts; the first of `metrics` decides
    which model of a run is kept, and what a sweep looks at where it names no goal.
    """

    examples: str
    rows: str
    metrics: tuple[Metric, ...]

    @property
    def primary(self) -> Metric:
        """The metric that decides."""
        return self.metrics[0]


TASKS: Mapping[TaskName, Task] = {
    "topics": Task("titles", "titles", (Metric("accuracy", "accuracy"), Metric("macro_f1", "macro-F1"))),
    "recommendation": Task(
        "clicks",
        "impressions",
        (
            Metric("auc", "AUC"),
            Metric("mrr", "MRR"),
            Metric("ndcg5", "nDCG@5"),
            Metric("ndcg10", "nDCG@10"),
        ),
    ),
    "retrieval": Task("pairs", "pairs", (Metric("auc", "AUC"),)),
}

HEADINGS = {metric.name: metric.heading for task in TASKS.values() for metric in task.metrics}
"""Every metric's heading by its name."""


def task_of(settings: Mapping[str, Any]) -> Task:
    """The task of a run's settings, as a record holds them."""
    name: TaskName = settings.get("task", "topics")
    return TASKS[name]
