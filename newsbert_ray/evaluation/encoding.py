"""Texts to embeddings: on several workers, timed, and as a map of titles on a plane."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from newsbert_ray.config import TrainSettings
from newsbert_ray.data.batches import Batch, Topics, cut_buckets
from newsbert_ray.data.examples import Impressions
from newsbert_ray.data.reading import (
    EVALUATION_TOKENS,
    ONE_WORKER,
    World,
    evaluation_batches,
    read_impressions,
)
from newsbert_ray.data.shards import Manifest, Split, TextTable, read_shard
from newsbert_ray.methods import TaskName
from newsbert_ray.model.encoder import Encoder
from newsbert_ray.model.pair import Top

Scores = dict[str, dict[str, float]]
"""Metrics by name, of each model by name."""
Models = Mapping[str, tuple[Encoder, Top]]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MAP_TITLES = 1500
"""Titles on the map; more dots cannot be told apart."""
MISTAKES = 10
"""Most confident wrong predictions that are kept."""
_MAP_BATCH = 50
_MIN_TOPIC_TITLES = 5
"""Titles that a topic needs to influence the plane."""


@dataclass(frozen=True)
class SplitData:
    """One split of prepared shards, as a run reads it.

    Attributes:
        folder, manifest: the shards.
        history: number of a user's last clicks that are used, in recommendation.
    """

    folder: Path
    manifest: Manifest
    split: Split
    task: TaskName = "topics"
    history: int = 50

    @classmethod
    def of(cls, settings: TrainSettings, manifest: Manifest, split: Split) -> Self:
        """A split of the shards of these settings, which have local paths."""
        return cls(Path(settings.data), manifest, split, settings.task, settings.recommendation.history)

    def batches(self, size: int, world: World = ONE_WORKER) -> Iterator[Batch]:
        """This worker's batches of titles, as `evaluation_batches`."""
        return evaluation_batches(self.folder, self.manifest, self.split, batch_size=size, world=world)

    def impressions(self) -> Iterator[tuple[pa.Table, Impressions]]:
        """Each behaviours shard's table and impressions, as `read_impressions`."""
        return read_impressions(self.folder, self.manifest, self.split, history=self.history)

    def news_rows(self) -> Ints:
        """Rows of the table of texts that occur in histories or candidates, ascending."""
        occurs = np.zeros(self.manifest.texts.rows, np.bool_)
        for _, impressions in self.impressions():
            occurs[impressions.history] = True
            occurs[impressions.candidates[impressions.candidates >= 0]] = True
        return np.flatnonzero(occurs)


@dataclass
class Pace:
    """Cost of scoring a split on one worker: titles, and each model's seconds.

    Seconds are from token ids to news embeddings (and topic logits), in fp32 with the run's threads. Reading,
    copying to the device and counting are not included. The models take turns on the same batches, so that
    the ratio of their speeds is meaningful on a busy machine, where the speeds themselves are not.
    """

    titles: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def speed(self) -> dict[str, float]:
        """`student_titles_per_second`; with a teacher also `teacher_titles_per_second`, `times_teacher`."""
        rates = {name: self.titles / max(1e-9, seconds) for name, seconds in self.seconds.items()}
        speed = {f"{name}_titles_per_second": rate for name, rate in rates.items()}
        if "teacher" in rates:
            speed["times_teacher"] = rates["student"] / rates["teacher"]
        return speed

    def charge(self, name: str, began: float, device: torch.device) -> None:
        """Add the time since `began` to the model's seconds."""
        self.seconds[name] = self.seconds.get(name, 0.0) + device_seconds(device) - began


def device_seconds(device: torch.device) -> float:
    """A clock's seconds after the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_name(device: torch.device) -> str:
    """The device's name in a record: cpu, or the GPU's model."""
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
    """Embeddings of texts; the bits are the same on every worker and for any number of workers.

    Args:
        rows: (M,) distinct rows of the table.
        pace: this worker's titles and seconds are added to it.
    Returns:
        name -> (M, D) in the order of `rows`, on the world's device.
    """
    lengths = table.lengths(rows)
    order = np.argsort(lengths, kind="stable")
    embeddings = {
        name: torch.zeros(len(rows), encoder.hidden_size, device=world.device)
        for name, (encoder, _) in models.items()
    }
    for index, (start, stop) in enumerate(cut_buckets(lengths[order], budget=EVALUATION_TOKENS)):
        if not world.owns(index):
            continue
        chosen = order[start:stop]
        ids, mask = (
            torch.from_numpy(array).to(world.device) for array in table.ids(rows[chosen], pad_id=pad_id)
        )
        positions, attention_mask = torch.from_numpy(chosen).to(world.device), mask.long()
        if pace:
            pace.titles += len(chosen)
        for name, (encoder, top) in models.items():
            began = device_seconds(world.device) if pace else 0.0
            embeddings[name][positions] = top.embed(encoder(ids, attention_mask), attention_mask)
            if pace:
                pace.charge(name, began, world.device)
    return {name: world.sum_tensor(embedding) for name, embedding in embeddings.items()}


@torch.inference_mode()
def map_titles(
    encoder: Encoder, top: Top, data: SplitData, *, device: torch.device, count: int = MAP_TITLES
) -> dict[str, Any]:
    """What a model of topics does on a split: some titles on a plane, its confusion matrix, its worst errors.

    Args:
        encoder, top: in evaluation mode, on `device`.
        count: approximate number of titles on the plane, of all lengths.
    Returns:
        {"split", "labels", "topic" and "predicted": indices into labels for each title on the plane, "x",
        "y", "share": share of the variance between topics that the plane shows, "confusion": (Y, Y) counts
        of all titles, "mistakes": the most confident wrong predictions, each with "title", "topic",
        "predicted" and "probability"}.
    """
    every = max(1, data.manifest.rows(data.split, "topics") // count)
    confusion = np.zeros((len(data.manifest.labels),) * 2, np.int64)
    parts, topics, predicted, seen = [], [], [], 0
    mistakes: list[tuple[float, int, int, int]] = []  # probability, number of the title, topic, predicted
    for index, batch in enumerate(data.batches(_MAP_BATCH)):
        batch = batch.to(device)
        states = [encoder(bucket.input_ids, bucket.attention_mask) for bucket in batch.buckets]
        output = top(states, batch)
        assert isinstance(batch.target, Topics)
        best, guesses = (part.cpu().numpy() for part in torch.softmax(output.logits, -1).max(-1))
        labels = batch.target.labels.cpu().numpy()
        known = np.flatnonzero(labels >= 0)
        np.add.at(confusion, (labels[known], guesses[known]), 1)
        wrong = known[labels[known] != guesses[known]].tolist()
        mistakes += [(float(best[i]), seen + i, int(labels[i]), int(guesses[i])) for i in wrong]
        mistakes = heapq.nlargest(MISTAKES, mistakes)
        seen += len(labels)
        if index % every == 0:
            parts.append(output.news_embedding.double().cpu().numpy()[known])
            predicted.append(guesses[known])
            topics.append(labels[known])
    all_topics, titles = np.concatenate(topics), _titles_at(data, [number for _, number, *_ in mistakes])
    points, share = between_topics(np.concatenate(parts), all_topics)
    return {
        "split": data.split,
        "labels": data.manifest.labels,
        "topic": all_topics.tolist(),
        "predicted": np.concatenate(predicted).tolist(),
        "x": np.round(points[:, 0], 3).tolist(),
        "y": np.round(points[:, 1], 3).tolist(),
        "share": share,
        "confusion": confusion.tolist(),
        "mistakes": [
            {"title": titles[number], "topic": topic, "predicted": guess, "probability": round(p, 4)}
            for p, number, topic, guess in mistakes
        ],
    }


def _titles_at(data: SplitData, numbers: Sequence[int]) -> dict[int, str]:
    """The titles at some positions in the order of `evaluation_batches`."""
    titles, start = dict[int, str](), 0
    for shard in data.manifest.splits[data.split]:
        inside = [number for number in numbers if start <= number < start + shard.rows]
        if inside:
            table = read_shard(data.folder, shard, ["title", "tokens"])
            order = np.argsort(pc.list_value_length(table.column("tokens")).to_numpy(), kind="stable")
            titles |= {n: table.column("title")[int(order[n - start])].as_py() for n in inside}
        start += shard.rows
    return titles


def between_topics(embeddings: Floats, topics: Ints) -> tuple[Floats, float]:
    """Embeddings projected on the plane that separates the means of the topics most.

    The plane is spanned by the first two principal components of the topics' means, weighted by their titles.

    Args:
        embeddings: (M, D).
        topics: (M,).
    Returns:
        (M, 2), and the share, 0 to 1, of the means' variance in the plane.
    """
    names, counts = np.unique(topics, return_counts=True)
    large = counts >= _MIN_TOPIC_TITLES
    if large.sum() > 1:
        names, counts = names[large], counts[large]
    centre = embeddings.mean(0)
    means = np.stack([embeddings[topics == name].mean(0) for name in names]) - centre
    _, sizes, axes = np.linalg.svd(np.sqrt(counts)[:, None] * means, full_matrices=False)
    plane = np.zeros((2, embeddings.shape[1]))
    plane[: min(2, len(axes))] = axes[:2]
    # An axis may point either way; make its largest entry positive, so that equal runs give equal maps.
    plane *= np.where(plane[np.arange(2), np.abs(plane).argmax(1)] < 0, -1.0, 1.0)[:, None]
    power = np.square(sizes)
    return (embeddings - centre) @ plane.T, float(power[:2].sum() / max(power.sum(), 1e-12))
