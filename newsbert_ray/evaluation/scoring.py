"""Models and batches -> confusion counts, summed over workers -> metrics."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from newsbert_ray.data.batches import Batch
from newsbert_ray.evaluation.metrics import topic_metrics
from newsbert_ray.model.encoder import Encoder
from newsbert_ray.model.pair import Pair, Top

Scores = dict[str, dict[str, float]]


@dataclass
class Pace:
    """What one worker's scoring of a split costs: titles, and each model's seconds from token ids at hand to
    news embedding and topic logits. Reading, copying to the device and counting are left out.

    The models take turns on the same batches, in fp32 and with the run's threads. It is one pass on a machine
    that may be busy with other trials: the ratio of the two speeds holds, each of them may not.
    """

    titles: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def speed(self) -> dict[str, float]:
        """`student_titles_per_second`, `teacher_titles_per_second`, `times_teacher`: theirs divided."""
        rates = {name: self.titles / max(1e-9, self.seconds[name]) for name in ("student", "teacher")}
        named = {f"{name}_titles_per_second": rate for name, rate in rates.items()}
        return {**named, "times_teacher": rates["student"] / rates["teacher"]}


def score_pair(
    pair: Pair,
    batches: Iterable[Batch],
    *,
    topics: int,
    device: torch.device,
    world_size: int = 1,
    pace: Pace | None = None,
) -> Scores:
    """Topic metrics of both models of a pair: {"teacher": {...}, "student": {...}}; see `score_models`."""
    models = {"teacher": (pair.teacher, pair.top), "student": (pair.student, pair.top)}
    training = pair.training
    pair.eval()
    scores = score_models(models, batches, topics=topics, device=device, world_size=world_size, pace=pace)
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
    pace: Pace | None = None,
) -> Scores:
    """Topic metrics of each model, the same on every worker.

    Args:
        models: name -> encoder and its top, in evaluation mode and on `device`.
        batches: this worker's part of a split; each title once over all workers.
        topics: Y.
        pace: gets this worker's titles and seconds added.
    Returns:
        name -> {"accuracy", "macro_f1", "rows"}.
    """
    counts = torch.zeros(len(models), topics, topics, dtype=torch.int64, device=device)
    for batch in batches:
        moved = batch.to(device)
        if pace:
            pace.titles += len(batch.labels)
        for number, (name, (encoder, top)) in enumerate(models.items()):
            began = device_seconds(device) if pace else 0.0
            output = top(encoder(moved.input_ids, moved.attention_mask), moved.attention_mask)
            if pace:
                pace.seconds[name] = pace.seconds.get(name, 0.0) + device_seconds(device) - began
            counts[number] += _confusion(moved.labels, output.logits.argmax(-1), topics)
    if world_size > 1:
        torch.distributed.all_reduce(counts)
    matrices = counts.cpu().numpy()
    return {name: topic_metrics(matrix) for name, matrix in zip(models, matrices, strict=True)}


def device_seconds(device: torch.device) -> float:
    """Seconds of a clock, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _confusion(labels: Tensor, predicted: Tensor, topics: int) -> Tensor:
    """(B,) true and predicted topics to (Y, Y) counts."""
    return torch.bincount(labels * topics + predicted, minlength=topics * topics).view(topics, topics)
