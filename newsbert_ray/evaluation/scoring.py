"""Models and a split -> the task's metrics, the same numbers whatever the number of workers.

Every worker computes its batches of an order that does not depend on how many there are, and what they add up
to is summed in that order.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from newsbert_ray.config import TrainSettings
from newsbert_ray.data.batches import Batch
from newsbert_ray.data.reading import evaluation_batches
from newsbert_ray.data.shards import Manifest, Split
from newsbert_ray.evaluation.matching import score_matches
from newsbert_ray.evaluation.metrics import topic_metrics
from newsbert_ray.evaluation.place import Models, Pace, Place, Scores, device_seconds
from newsbert_ray.evaluation.ranking import score_rankings
from newsbert_ray.model.pair import Pair

BATCH = 256
"""Titles scored together."""


def score_pair(
    pair: Pair,
    settings: TrainSettings,
    manifest: Manifest,
    split: Split,
    *,
    place: Place,
    pace: Pace | None = None,
    models: Models | None = None,
) -> Scores:
    """Metrics of a pair's models on a split, as `score_models`; the pair is left in the mode it was in.

    Args:
        models: those of the pair's to look at; all by default.
    """
    training = pair.training
    pair.eval()
    scores = score_models(models or pair.models(), settings, manifest, split, place=place, pace=pace)
    pair.train(training)
    return scores


def score_models(
    models: Models,
    settings: TrainSettings,
    manifest: Manifest,
    split: Split,
    *,
    place: Place,
    pace: Pace | None = None,
) -> Scores:
    """The metrics of the settings' task, the same on every worker.

    Args:
        models: name -> encoder and its top, in evaluation mode and on the place's device.
        pace: gets this worker's titles and seconds added.
    Returns:
        name -> metrics by name (tasks.TASKS), with `rows` evaluated; empty where the split carries no labels.
    Raises:
        ShardError: the shards have nothing of the task in this split.
    """
    folder = Path(settings.data)
    if settings.task == "recommendation":
        history = settings.recommendation.history
        return score_rankings(models, folder, manifest, split, history=history, place=place, pace=pace)
    if settings.task == "retrieval":
        return score_matches(models, folder, manifest, split, place=place, pace=pace)
    batches = evaluation_batches(
        folder, manifest, split, batch_size=BATCH, rank=place.rank, world_size=place.size
    )
    return score_topics(models, batches, topics=len(manifest.labels), place=place, pace=pace)


def score_topics(
    models: Models, batches: Iterable[Batch], *, topics: int, place: Place, pace: Pace | None = None
) -> Scores:
    """Topic metrics of each model: {"accuracy", "macro_f1", "rows"}; arguments as in `count_topics`."""
    counts = count_topics(models, batches, topics=topics, place=place, pace=pace)
    return {name: topic_metrics(matrix) for name, matrix in counts.items()}


@torch.inference_mode()
def count_topics(
    models: Models, batches: Iterable[Batch], *, topics: int, place: Place, pace: Pace | None = None
) -> dict[str, npt.NDArray[np.int64]]:
    """Each model's confusion matrix (Y, Y), rows true topics, columns predicted ones.

    Args:
        batches: this worker's part of a split; each title once over all workers.
        topics: Y.
    """
    device = place.device
    counts = torch.zeros(len(models), topics, topics, dtype=torch.int64, device=device)
    for batch in batches:
        moved = batch.to(device)
        if pace:
            pace.titles += len(batch.target.labels)
        for number, (name, (encoder, top)) in enumerate(models.items()):
            began = device_seconds(device) if pace else 0.0
            output = top([encoder(b.input_ids, b.attention_mask) for b in moved.buckets], moved)
            if pace:
                pace.charge(name, began, device)
            counts[number] += _confusion(moved.target.labels, output.logits.argmax(-1), topics)
    return dict(zip(models, place.sum(counts).cpu().numpy(), strict=True))


def _confusion(labels: Tensor, predicted: Tensor, topics: int) -> Tensor:
    """(B,) true and predicted topics to (Y, Y) counts."""
    return torch.bincount(labels * topics + predicted, minlength=topics * topics).view(topics, topics)
