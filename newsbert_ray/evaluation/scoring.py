"""Metrics of models on a split, the same numbers for any number of workers.

Batches have a fixed order that does not depend on the number of workers. Each worker computes its share of
them, and the results are summed in that order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from newsbert_ray.data.batches import Batch
from newsbert_ray.data.examples import Impressions
from newsbert_ray.data.order import seeded_generator
from newsbert_ray.data.reading import World, read_pairs
from newsbert_ray.data.shards import read_texts
from newsbert_ray.evaluation.encoding import (
    Floats,
    Ints,
    Models,
    Pace,
    Scores,
    SplitData,
    device_seconds,
    encode_texts,
)
from newsbert_ray.evaluation.metrics import (
    impression_metrics,
    pooled_auc,
    ranking_scores,
    tally,
    topic_metrics,
)
from newsbert_ray.model.heads import ClickHead, PairHead

BATCH = 256
"""Titles scored together."""
BLOCK = 256
"""Impressions scored together."""


def score_models(models: Models, data: SplitData, *, world: World, pace: Pace | None = None) -> Scores:
    """Metrics of the split's task, the same on every worker.

    Args:
        models: encoder and top by name, in evaluation mode and on the world's device.
        pace: this worker's titles and seconds are added to it.
    Returns:
        name -> metrics by name (methods.TASKS) and `rows` evaluated; empty if the split has no labels.
    Raises:
        ShardError: the shards have no data of the task in this split.
    """
    if data.task == "recommendation":
        news = encode_news(models, data, data.news_rows(), world=world, pace=pace)
        return score_rankings(models, data, news, world=world)
    if data.task == "retrieval":
        return score_matches(models, data, world=world, pace=pace)
    topics = len(data.manifest.labels)
    counts = count_topics(models, data.batches(BATCH, world), topics=topics, world=world, pace=pace)
    return {name: topic_metrics(matrix) for name, matrix in counts.items() if matrix.any()}


@torch.inference_mode()
def count_topics(
    models: Models, batches: Iterable[Batch], *, topics: int, world: World, pace: Pace | None = None
) -> dict[str, Ints]:
    """Each model's confusion matrix (Y, Y): rows are true topics, columns predicted ones.

    Titles without a label are not counted.

    Args:
        batches: this worker's part of a split; over all workers each title occurs once.
        topics: Y.
    """
    device = world.device
    counts = torch.zeros(len(models), topics, topics, dtype=torch.int64, device=device)
    for batch in batches:
        batch = batch.to(device)
        labels = batch.target.labels
        if pace:
            pace.titles += len(labels)
        for index, (name, (encoder, top)) in enumerate(models.items()):
            began = device_seconds(device) if pace else 0.0
            output = top([encoder(b.input_ids, b.attention_mask) for b in batch.buckets], batch)
            if pace:
                pace.charge(name, began, device)
            cells = (labels * topics + output.logits.argmax(-1))[labels >= 0]
            counts[index] += torch.bincount(cells, minlength=topics * topics).view(topics, topics)
    return dict(zip(models, world.sum_tensor(counts).cpu().numpy(), strict=True))


@torch.inference_mode()
def score_matches(models: Models, data: SplitData, *, world: World, pace: Pace | None = None) -> Scores:
    """AUC of each model over all pairs of a split: {"auc", "auc_error", "rows"}.

    Each text of a shard is encoded once by each model; memory holds the embeddings of one shard.
    """
    table, pad_id = read_texts(data.folder, data.manifest), data.manifest.tokenizer.pad_id
    scores: dict[str, list[Tensor]] = {name: [] for name in models}
    clicked = []
    for pairs in read_pairs(data.folder, data.manifest, data.split):
        rows, positions = np.unique(np.concatenate([pairs.queries, pairs.texts]), return_inverse=True)
        embeddings = encode_texts(models, table, rows, pad_id=pad_id, world=world, pace=pace)
        queries, texts = (torch.from_numpy(half).to(world.device) for half in np.split(positions, 2))
        for name, (_, top) in models.items():
            head, embedding = cast("PairHead", top.head), embeddings[name]
            scores[name].append(head.scores(embedding[queries], embedding[texts]).double().cpu())
        clicked.append(pairs.clicked)
    labels = np.concatenate(clicked)
    return {name: pooled_auc(torch.cat(parts).numpy(), labels) for name, parts in scores.items()}


@dataclass(frozen=True)
class News:
    """Embeddings of the news in a split.

    Attributes:
        positions: position in each embedding tensor of each row of the table of texts.
        embeddings: (M, D) of each model by name.
    """

    positions: Ints
    embeddings: Mapping[str, Tensor]


def score_rankings(
    models: Models, data: SplitData, news: News, *, world: World, baselines: bool = False
) -> Scores:
    """MIND's metrics of each model: per impression, then the mean.

    Args:
        news: all news of the split.
        baselines: also rank by `popularity`, by `tfidf` (ProfileScores) and at `random`.
    Returns:
        name -> {"auc", "mrr", "ndcg5", "ndcg10", the standard error of each as "<name>_error", "rows",
        "left_out"}; empty if no impression of the split has labels.
    """
    clicks = count_clicks(data) if baselines else None
    profiles = ProfileScores(data) if baselines else None
    names = [*models, *(("popularity", "tfidf", "random") if baselines else ())]
    tallies: dict[str, list[Floats]] = {name: [] for name in names}
    for index, (_, block) in enumerate(read_blocks(data)):
        scores: dict[str, Floats] = {}
        if world.owns(index):
            scores = score_block(models, news, block, world=world)
            if clicks is not None and profiles is not None:
                scores["popularity"] = clicks[block.candidates].astype(np.float64)
                scores["tfidf"] = profiles.score(block)
                scores["random"] = seeded_generator(0, index).random(len(block.candidates))
        for name in names:
            tallies[name].append(_tally(scores.get(name), block))
    sums = {
        name: world.sum_tensor(torch.from_numpy(np.array(parts)).to(world.device)).cpu().numpy()
        for name, parts in tallies.items()
    }
    if any(parts[:, :2].sum() == 0 for parts in sums.values()):
        return {}
    return {name: ranking_scores(parts) for name, parts in sums.items()}


def encode_news(
    models: Models, data: SplitData, rows: Ints, *, world: World, pace: Pace | None = None
) -> News:
    """Embeddings of the news at distinct rows (M,) of the table of texts."""
    table = read_texts(data.folder, data.manifest)
    positions = np.zeros(len(table), np.int64)
    positions[rows] = np.arange(len(rows))
    pad_id = data.manifest.tokenizer.pad_id
    return News(positions, encode_texts(models, table, rows, pad_id=pad_id, world=world, pace=pace))


@torch.inference_mode()
def score_block(models: Models, news: News, block: Impressions, *, world: World) -> dict[str, Floats]:
    """Each model's scores (N,) of all candidates of some impressions, in their order.

    Candidates without a known title (-1) come after all others, in the order of the file.
    """
    unknown = block.candidates < 0
    lengths = np.diff(block.history_offsets)
    mask = np.arange(max(1, int(lengths.max(initial=1))))[None, :] < lengths[:, None]  # (I, T)
    history = np.zeros(mask.shape, np.int64)
    history[mask] = news.positions[block.history]
    owners = np.repeat(np.arange(len(block)), np.diff(block.offsets))
    positions = news.positions[np.where(unknown, 0, block.candidates)]
    arrays = (history, mask.astype(np.int64), positions, owners)
    clicked, clicked_mask, candidates, owner = (torch.from_numpy(a).to(world.device) for a in arrays)
    scores = {}
    for name, (_, top) in models.items():
        embedding = news.embeddings[name]
        users = cast("ClickHead", top.head).encode_users(embedding[clicked], clicked_mask)  # (I, D)
        own = (embedding[candidates] * users[owner]).sum(-1).double().cpu().numpy()
        if unknown.any():
            own[unknown] = np.floor(own.min()) - 1.0 - np.arange(unknown.sum())
        scores[name] = own
    return scores


class ProfileScores:
    """A baseline without learning: the cosine of a candidate and the user's profile.

    A token's weight is (1 + log of its count) log(texts / texts with it), and a text's vector has length 1. A
    profile is the sum over the user's history; users without one score 0 everywhere.
    """

    def __init__(self, data: SplitData) -> None:
        from scipy.sparse import csr_matrix  # type: ignore[import-untyped]
        from sklearn.preprocessing import normalize

        table = read_texts(data.folder, data.manifest)
        counts = csr_matrix((np.ones(len(table.tokens)), np.array(table.tokens), table.offsets))
        counts.sum_duplicates()
        texts = np.bincount(counts.indices, minlength=counts.shape[1])
        counts.data = (1 + np.log(counts.data)) * np.log(len(table) / texts[counts.indices])
        self.vectors = normalize(counts)

    def score(self, block: Impressions) -> Floats:
        """Scores (N,) of all candidates of some impressions, in their order."""
        from scipy.sparse import csr_matrix
        from sklearn.preprocessing import normalize

        shape = (len(block), self.vectors.shape[0])
        clicked = csr_matrix((np.ones(len(block.history)), block.history, block.history_offsets), shape=shape)
        users = normalize(clicked @ self.vectors)
        owners = np.repeat(np.arange(len(block)), np.diff(block.offsets))
        known = block.candidates >= 0
        products = self.vectors[np.where(known, block.candidates, 0)].multiply(users[owners])
        return np.where(known, np.asarray(products.sum(1)).ravel(), -1.0)


def count_clicks(data: SplitData) -> Ints:
    """Clicks of each row of the table of texts in the training split."""
    clicks = np.zeros(data.manifest.texts.rows, np.int64)
    for _, impressions in replace(data, split="train", history=1).impressions():
        clicks += np.bincount(impressions.candidates[impressions.clicked == 1], minlength=len(clicks))
    return clicks


def read_blocks(data: SplitData) -> Iterator[tuple[pa.Table, Impressions]]:
    """A split's impressions in file order, BLOCK at a time, with their rows of the shard."""
    for table, impressions in data.impressions():
        for start in range(0, len(impressions), BLOCK):
            stop = min(start + BLOCK, len(impressions))
            yield table.slice(start, stop - start), impressions.take(np.arange(start, stop))


def _tally(scores: Floats | None, block: Impressions) -> Floats:
    """Sums of the metrics of a block's labelled impressions, without those that offer a news whose title is
    unknown; zeros if another worker has its scores."""
    labelled, known = (
        np.add.reduceat(array < 0, block.offsets[:-1]) == 0 for array in (block.clicked, block.candidates)
    )
    kept = np.repeat(labelled, np.diff(block.offsets))
    offsets = np.concatenate([[0], np.cumsum(np.diff(block.offsets)[labelled])])
    values = np.zeros(int(kept.sum())) if scores is None else scores[kept]
    metrics = impression_metrics(values, block.clicked[kept], offsets)
    total = tally({name: np.where(known[labelled], one, np.nan) for name, one in metrics.items()})
    return np.zeros_like(total) if scores is None else total
