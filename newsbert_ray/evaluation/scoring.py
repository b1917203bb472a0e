"""Models and batches -> confusion counts, summed over workers -> metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from newsbert_ray.data.batches import Batch
from newsbert_ray.evaluation.metrics import topic_metrics
from newsbert_ray.model.encoder import Encoder
from newsbert_ray.model.pair import Pair, Top

Scores = dict[str, dict[str, float]]


def score_pair(
    pair: Pair, batches: Iterable[Batch], *, topics: int, device: torch.device, world_size: int = 1
) -> Scores:
    """Topic metrics of both models of a pair: {"teacher": {...}, "student": {...}}; see `score_models`."""
    models = {"teacher": (pair.teacher, pair.top), "student": (pair.student, pair.top)}
    training = pair.training
    pair.eval()
    scores = score_models(models, batches, topics=topics, device=device, world_size=world_size)
    pair.train(training)
    return scores


@torch.inference_mode()
def score_models(
    models: Mapping[str, tuple[Encoder, Top]],
    batches: Iterable[Batch],
    *,
    topics: int,
    device: torch.device,
    world_size: int = 1,
) -> Scores:
    """Topic metrics of each model, the same on every worker.

    Args:
        models: name -> encoder and its top, in evaluation mode and on `device`.
        batches: this worker's part of a split; each title once over all workers.
        topics: Y.
    Returns:
        name -> {"accuracy", "macro_f1", "rows"}.
    """
    counts = torch.zeros(len(models), topics, topics, dtype=torch.int64, device=device)
    for batch in batches:
        moved = batch.to(device)
        for number, (encoder, top) in enumerate(models.values()):
            output = top(encoder(moved.input_ids, moved.attention_mask), moved.attention_mask)
            counts[number] += _confusion(moved.labels, output.logits.argmax(-1), topics)
    if world_size > 1:
        torch.distributed.all_reduce(counts)
    matrices = counts.cpu().numpy()
    return {name: topic_metrics(matrix) for name, matrix in zip(models, matrices, strict=True)}


def _confusion(labels: Tensor, predicted: Tensor, topics: int) -> Tensor:
    """(B,) true and predicted topics to (Y, Y) counts."""
    return torch.bincount(labels * topics + predicted, minlength=topics * topics).view(topics, topics)
