"""Models and a split -> the task's metrics, the same numbers whatever the number of workers.

Every worker computes its batches of an order that does not depend on how many there are, and what they add up
to is summed in that order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from newsbert_ray.config import TrainSettings
from newsbert_ray.data.batches import Batch
from newsbert_ray.data.examples import Impressions
from newsbert_ray.data.order import Ints, seeded_generator
from newsbert_ray.data.reading import evaluation_batches, read_impressions, read_pairs
from newsbert_ray.data.shards import Manifest, Split, read_texts
from newsbert_ray.evaluation.encoding import Models, Pace, Scores, device_seconds, encode_texts
from newsbert_ray.evaluation.metrics import (
    impression_metrics,
    pooled_auc,
    ranking_scores,
    tally,
    topic_metrics,
)
from newsbert_ray.model.heads import ClickHead, PairHead
from newsbert_ray.model.pair import Pair
from newsbert_ray.world import World

BATCH = 256
"""Titles scored together."""


def score_pair(
    pair: Pair,
    settings: TrainSettings,
    manifest: Manifest,
    split: Split,
    *,
    world: World,
    pace: Pace | None = None,
    models: Models | None = None,
) -> Scores:
    """Metrics of a pair's models on a split, as `score_models`; the pair is left in the mode it was in.

    Args:
        models: those of the pair's to look at; all by default.
    """
    training = pair.training
    pair.eval()
    scores = score_models(models or pair.models(), settings, manifest, split, world=world, pace=pace)
    pair.train(training)
    return scores


def score_models(
    models: Models,
    settings: TrainSettings,
    manifest: Manifest,
    split: Split,
    *,
    world: World,
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
        return score_rankings(models, folder, manifest, split, history=history, world=world, pace=pace)
    if settings.task == "retrieval":
        return score_matches(models, folder, manifest, split, world=world, pace=pace)
    batches = evaluation_batches(
        folder, manifest, split, batch_size=BATCH, rank=world.rank, world_size=world.size
    )
    return score_topics(models, batches, topics=len(manifest.labels), world=world, pace=pace)


def score_topics(
    models: Models, batches: Iterable[Batch], *, topics: int, world: World, pace: Pace | None = None
) -> Scores:
    """Topic metrics of each model: {"accuracy", "macro_f1", "rows"}; arguments as in `count_topics`."""
    counts = count_topics(models, batches, topics=topics, world=world, pace=pace)
    return {name: topic_metrics(matrix) for name, matrix in counts.items()}


@torch.inference_mode()
def count_topics(
    models: Models, batches: Iterable[Batch], *, topics: int, world: World, pace: Pace | None = None
) -> dict[str, npt.NDArray[np.int64]]:
    """Each model's confusion matrix (Y, Y), rows true topics, columns predicted ones.

    Args:
        batches: this worker's part of a split; each title once over all workers.
        topics: Y.
    """
    device = world.device
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
    return dict(zip(models, world.sum_tensor(counts).cpu().numpy(), strict=True))


def _confusion(labels: Tensor, predicted: Tensor, topics: int) -> Tensor:
    """(B,) true and predicted topics to (Y, Y) counts."""
    return torch.bincount(labels * topics + predicted, minlength=topics * topics).view(topics, topics)


@torch.inference_mode()
def score_matches(
    models: Models, folder: Path, manifest: Manifest, split: Split, *, world: World, pace: Pace | None = None
) -> Scores:
    """AUC of each model over all pairs of a split: {"auc", "auc_error", "rows"}.

    Each different text of a shard is encoded once by each model; memory holds one shard's embeddings.
    """
    table = read_texts(folder, manifest)
    scores: dict[str, list[torch.Tensor]] = {name: [] for name in models}
    clicked = []
    for pairs in read_pairs(folder, manifest, split):
        rows, places = np.unique(np.concatenate([pairs.queries, pairs.texts]), return_inverse=True)
        pad_id = manifest.tokenizer.pad_id
        found = encode_texts(models, table, rows, pad_id=pad_id, world=world, pace=pace)
        queries, texts = (torch.from_numpy(half).to(world.device) for half in np.split(places, 2))
        for name, (_, top) in models.items():
            embedding = found[name]
            head = cast("PairHead", top.head)
            scores[name].append(head.scores(embedding[queries], embedding[texts]).double().cpu())
        clicked.append(pairs.clicked)
    labels = np.concatenate(clicked)
    return {name: pooled_auc(torch.cat(parts).numpy(), labels) for name, parts in scores.items()}


Floats = npt.NDArray[np.float64]
BLOCK = 256
"""Impressions scored together."""


@dataclass(frozen=True)
class News:
    """Embeddings of the news that a split names: `places[row]` is a news' position in each (M, D) tensor."""

    places: Ints
    embeddings: Mapping[str, Tensor]


def score_rankings(
    models: Models,
    folder: Path,
    manifest: Manifest,
    split: Split,
    *,
    history: int,
    world: World,
    pace: Pace | None = None,
    baselines: bool = False,
    news: News | None = None,
) -> Scores:
    """MIND's metrics of each model over all impressions at once (method 4: per impression, then their mean).

    Args:
        history: clicks of a user that are read.
        baselines: also rank by `popularity` and at `random`.
        news: the split's news where they are encoded already.
    Returns:
        name -> {"auc", "mrr", "ndcg5", "ndcg10", each with its standard error as "<name>_error", "rows",
        "left_out"}; empty where no impression of the split carries labels.
    """
    news = news or encode_news(models, folder, manifest, split, history=history, world=world, pace=pace)
    clicks = count_clicks(folder, manifest) if baselines else None
    names = [*models, *(("popularity", "random") if baselines else ())]
    found: dict[str, list[Floats]] = {name: [] for name in names}
    for number, (_, block) in enumerate(read_blocks(folder, manifest, split, history=history)):
        scores: dict[str, Floats] = {}
        if world.owns(number):
            scores = score_block(models, news, block, world=world)
            if clicks is not None:
                scores["popularity"] = clicks[block.candidates].astype(np.float64)
                scores["random"] = seeded_generator(0, number).random(len(block.candidates))
        for name in names:
            found[name].append(_tally(scores.get(name), block))
    tallies = {name: _over_workers(parts, world) for name, parts in found.items()}
    if any(tallied[:, :2].sum() == 0 for tallied in tallies.values()):
        return {}
    return {name: ranking_scores(tallied) for name, tallied in tallies.items()}


def encode_news(
    models: Models,
    folder: Path,
    manifest: Manifest,
    split: Split,
    *,
    history: int,
    world: World,
    pace: Pace | None = None,
) -> News:
    """Every news that a split's histories and candidates name, encoded once."""
    rows = find_named(folder, manifest, split, history=history)
    return encode_rows(models, folder, manifest, rows, world=world, pace=pace)


def encode_rows(
    models: Models, folder: Path, manifest: Manifest, rows: Ints, *, world: World, pace: Pace | None = None
) -> News:
    """The news at some rows of the table of texts (M,), each once."""
    table = read_texts(folder, manifest)
    places = np.zeros(len(table), np.int64)
    places[rows] = np.arange(len(rows))
    pad_id = manifest.tokenizer.pad_id
    return News(places, encode_texts(models, table, rows, pad_id=pad_id, world=world, pace=pace))


def find_named(folder: Path, manifest: Manifest, split: Split, *, history: int) -> Ints:
    """Rows of the table of texts that a split's histories and candidates name, each once."""
    named = np.zeros(manifest.texts.rows, np.bool_)
    for _, impressions in read_impressions(folder, manifest, split, history=history):
        named[impressions.history] = True
        named[impressions.candidates] = True
    return np.flatnonzero(named)


@torch.inference_mode()
def score_block(models: Models, news: News, block: Impressions, *, world: World) -> dict[str, Floats]:
    """Each model's scores (N,) of all candidates of some impressions, flat as they stand there."""
    device = world.device
    lengths = np.diff(block.history_offsets)
    mask = np.arange(max(1, int(lengths.max(initial=1))))[None, :] < lengths[:, None]  # (I, T)
    history = np.zeros(mask.shape, np.int64)
    history[mask] = news.places[block.history]
    owner = np.repeat(np.arange(len(block)), np.diff(block.offsets))
    read, present, offered, whose = (
        torch.from_numpy(array).to(device)
        for array in (history, mask.astype(np.int64), news.places[block.candidates], owner)
    )
    found = {}
    for name, (_, top) in models.items():
        embedding = news.embeddings[name]
        users = cast("ClickHead", top.head).encode_users(embedding[read], present)  # (I, D)
        found[name] = (embedding[offered] * users[whose]).sum(-1).double().cpu().numpy()
    return found


def count_clicks(folder: Path, manifest: Manifest) -> Ints:
    """Clicks of each news in the training split's impressions, by its row of the table of texts."""
    clicks = np.zeros(manifest.texts.rows, np.int64)
    for _, impressions in read_impressions(folder, manifest, "train", history=1):
        clicks += np.bincount(impressions.candidates[impressions.clicked == 1], minlength=len(clicks))
    return clicks


def read_blocks(
    folder: Path, manifest: Manifest, split: Split, *, history: int
) -> Iterator[tuple[pa.Table, Impressions]]:
    """A split's impressions in the order of the file, BLOCK at a time, each with its rows of the shard."""
    for table, impressions in read_impressions(folder, manifest, split, history=history):
        for start in range(0, len(impressions), BLOCK):
            stop = min(start + BLOCK, len(impressions))
            yield table.slice(start, stop - start), _slice(impressions, start, stop)


def _slice(impressions: Impressions, start: int, stop: int) -> Impressions:
    read = impressions.history_offsets[start : stop + 1]
    offered = impressions.offsets[start : stop + 1]
    return Impressions(
        impressions.history[read[0] : read[-1]],
        read - read[0],
        impressions.candidates[offered[0] : offered[-1]],
        offered - offered[0],
        impressions.clicked[offered[0] : offered[-1]],
    )


def _tally(scores: Floats | None, block: Impressions) -> Floats:
    """A block's metrics added up, over its labelled impressions; zeros where another worker has them."""
    labelled = np.add.reduceat(block.clicked < 0, block.offsets[:-1]) == 0
    kept = np.repeat(labelled, np.diff(block.offsets))
    offsets = np.concatenate([[0], np.cumsum(np.diff(block.offsets)[labelled])])
    values = np.zeros(int(kept.sum())) if scores is None else scores[kept]
    total = tally(impression_metrics(values, block.clicked[kept], offsets))
    return np.zeros_like(total) if scores is None else total


def _over_workers(parts: list[Floats], world: World) -> Floats:
    tallied = torch.from_numpy(np.array(parts)).to(world.device)
    summed: Floats = world.sum_tensor(tallied).cpu().numpy()
    return summed
