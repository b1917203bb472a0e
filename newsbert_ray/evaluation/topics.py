"""Topic by topic: how well a run's model knows each, and what it most often takes it for."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from newsbert_ray.config import SettingsError
from newsbert_ray.data.reading import evaluation_batches
from newsbert_ray.data.shards import ShardError
from newsbert_ray.evaluation.evaluate import load_trained, split_named
from newsbert_ray.evaluation.metrics import topic_f1
from newsbert_ray.evaluation.scoring import BATCH, count_topics


class TopicRow(NamedTuple):
    """A topic: titles of it, titles that were taken for it, and what came of both, 0 to 1.

    `precision` is None where nothing was taken for it, `recall` where no title is of it; `taken_for` is the
    other topic that its titles were most often taken for, None where they never were.
    """

    topic: str
    titles: int
    predicted: int
    precision: float | None
    recall: float | None
    f1: float
    taken_for: str | None


def by_topic(
    run: str | Path, *, data: str | Path | None = None, split: str = "test", model: str = "student"
) -> list[TopicRow]:
    """How a topics run's model does on each topic of a split, those of most titles first.

    The mean of the topics' F1 is `evaluate`'s macro-F1; topics that neither occur nor are predicted are left
    out of both.

    Args:
        run, data, split: as of `evaluate`.
        model: student or teacher.
    Raises:
        SettingsError: the run learned another task, or does not keep that model.
        ShardError: no such split, or one without labels; and as `evaluate`.
    """
    part = split_named(split)
    trained = load_trained(run, data=data)
    if trained.settings.task != "topics":
        raise SettingsError(
            f"--by_topic needs a run of task topics; this one learned {trained.settings.task}"
        )
    chosen, place, labels = trained.require(model), trained.place, trained.manifest.labels
    batches = evaluation_batches(
        trained.folder, trained.manifest, part, batch_size=BATCH, rank=place.rank, world_size=place.size
    )
    confusion = count_topics(chosen, batches, topics=len(labels), place=place)[model]
    if not confusion.sum():
        raise ShardError(f"split '{split}' of {trained.data}: no title carries a topic")
    return topic_rows(confusion, labels)


def topic_rows(confusion: npt.NDArray[np.int64], labels: list[str]) -> list[TopicRow]:
    """The rows of a confusion matrix (Y, Y), rows true topics, columns predicted ones."""
    scores = topic_f1(confusion)
    found = []
    for number, (topic, f1) in enumerate(zip(labels, scores.tolist(), strict=True)):
        titles, predicted = int(confusion[number].sum()), int(confusion[:, number].sum())
        if not titles and not predicted:
            continue
        hits = int(confusion[number, number])
        others = confusion[number].copy()
        others[number] = 0
        found.append(
            TopicRow(
                topic,
                titles,
                predicted,
                hits / predicted if predicted else None,
                hits / titles if titles else None,
                f1,
                labels[int(others.argmax())] if others.any() else None,
            )
        )
    return sorted(found, key=lambda row: -row.titles)
