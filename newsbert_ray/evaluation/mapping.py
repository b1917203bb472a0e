"""A map of titles: news embeddings in the plane that parts their topics best, for a person to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from newsbert_ray.data.batches import Topics
from newsbert_ray.data.reading import evaluation_batches
from newsbert_ray.data.shards import Manifest, Split
from newsbert_ray.model.encoder import Encoder
from newsbert_ray.model.pair import Top

TITLES = 1500
"""Dots that a person can still tell apart."""
_BATCH = 50
_LEAST = 5
"""Titles that a topic needs to have a say in how the plane lies."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@torch.inference_mode()
def map_titles(
    encoder: Encoder,
    top: Top,
    folder: str | Path,
    manifest: Manifest,
    split: Split,
    *,
    device: torch.device,
    count: int = TITLES,
) -> dict[str, Any]:
    """Where some of a split's titles lie.

    Args:
        encoder, top: in evaluation mode, on `device`.
        count: titles, about; short and long ones alike.
    Returns:
        {"split", "labels", "topic": index into labels of each title, "x", "y", "share": of the variance
        between topics that the plane shows}.
    """
    every = max(1, manifest.rows(split, "topics") // count)
    found, topics = [], []
    batches = evaluation_batches(folder, manifest, split, batch_size=_BATCH)
    for number, batch in enumerate(batches):
        if number % every:
            continue
        batch = batch.to(device)
        states = [encoder(bucket.input_ids, bucket.attention_mask) for bucket in batch.buckets]
        found.append(top(states, batch).news_embedding.double().cpu().numpy())
        assert isinstance(batch.target, Topics)
        topics.append(batch.target.labels.cpu().numpy())
    embeddings, labels = np.concatenate(found), np.concatenate(topics)
    places, share = between_topics(embeddings, labels)
    return {
        "split": split,
        "labels": manifest.labels,
        "topic": labels.tolist(),
        "x": np.round(places[:, 0], 3).tolist(),
        "y": np.round(places[:, 1], 3).tolist(),
        "share": share,
    }


def between_topics(embeddings: Floats, topics: Ints) -> tuple[Floats, float]:
    """Embeddings (M, D) in the plane in which their topics' means lie furthest apart (the first two principal
    components of the means, each weighted by its titles), and the share of the means' variance in it.

    Returns:
        (M, 2), and 0 to 1.
    """
    names, counts = np.unique(topics, return_counts=True)
    large = names[counts >= _LEAST] if (counts >= _LEAST).sum() > 1 else names
    centre = embeddings.mean(0)
    weights = np.sqrt([(topics == name).sum() for name in large])
    means = np.stack([embeddings[topics == name].mean(0) for name in large]) - centre
    _, sizes, axes = np.linalg.svd(weights[:, None] * means, full_matrices=False)
    plane = np.zeros((2, embeddings.shape[1]))
    plane[: min(2, len(axes))] = axes[:2]
    # An axis and its reverse are the same; one of them is taken, so that two runs look alike.
    plane *= np.where(plane[np.arange(2), np.abs(plane).argmax(1)] < 0, -1.0, 1.0)[:, None]
    power = np.square(sizes)
    return (embeddings - centre) @ plane.T, float(power[:2].sum() / max(power.sum(), 1e-12))
