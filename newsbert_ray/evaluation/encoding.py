"""Where scoring happens, on which worker of how many, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from newsbert_ray.data.batches import Topics, cut_buckets
from newsbert_ray.data.reading import EVALUATION_TOKENS, evaluation_batches
from newsbert_ray.data.shards import Manifest, Split, TextTable
from newsbert_ray.model.encoder import Encoder
from newsbert_ray.model.pair import Top
from newsbert_ray.world import World

Scores = dict[str, dict[str, float]]
Models = Mapping[str, tuple[Encoder, Top]]


@dataclass
class Pace:
    """What one worker's scoring of a split costs: titles, and each model's seconds from token ids at hand to
    news embedding (and topic logits). Reading, copying to the device and counting are left out.

    The models take turns on the same batches, in fp32 and with the run's threads. It is one pass on a machine
    that may be busy with other trials: the ratio of the two speeds holds, each of them may not.
    """

    titles: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def speed(self) -> dict[str, float]:
        """`student_titles_per_second`, and where a teacher was scored `teacher_titles_per_second` and
        `times_teacher`: theirs divided."""
        rates = {name: self.titles / max(1e-9, seconds) for name, seconds in self.seconds.items()}
        named = {f"{name}_titles_per_second": rate for name, rate in rates.items()}
        return (
            {**named, "times_teacher": rates["student"] / rates["teacher"]} if "teacher" in rates else named
        )

    def charge(self, name: str, began: float, device: torch.device) -> None:
        """Add the time since `began` to a model's."""
        self.seconds[name] = self.seconds.get(name, 0.0) + device_seconds(device) - began


def device_seconds(device: torch.device) -> float:
    """Seconds of a clock, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_name(device: torch.device) -> str:
    """What a record calls it: cpu, or the GPU's own name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@torch.inference_mode()
def encode_texts(
    models: Models,
    table: TextTable,
    rows: npt.NDArray[np.integer],
    *,
    pad_id: int,
    world: World,
    pace: Pace | None = None,
) -> Mapping[str, Tensor]:
    """Embeddings of texts, the same bits on every worker and for any number of workers.

    Args:
        rows: (M,) different rows of the table.
        pace: gets this worker's titles and seconds added.
    Returns:
        name -> (M, D), in the order of `rows`, on the place's device.
    """
    lengths = table.lengths(rows)
    order = np.argsort(lengths, kind="stable")
    found = {
        name: torch.zeros(len(rows), encoder.hidden_size, device=world.device)
        for name, (encoder, _) in models.items()
    }
    for number, (start, stop) in enumerate(cut_buckets(lengths[order], budget=EVALUATION_TOKENS)):
        if not world.owns(number):
            continue
        chosen = order[start:stop]
        both = table.ids(rows[chosen], pad_id=pad_id)
        ids, mask = (torch.from_numpy(array).to(world.device) for array in both)
        where = torch.from_numpy(chosen).to(world.device)
        if pace:
            pace.titles += len(chosen)
        for name, (encoder, top) in models.items():
            began = device_seconds(world.device) if pace else 0.0
            attention_mask = mask.long()
            found[name][where] = top.embed(encoder(ids, attention_mask), attention_mask)
            if pace:
                pace.charge(name, began, world.device)
    return {name: world.sum_tensor(embedding) for name, embedding in found.items()}


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
