"""Texts to embeddings, metrics of models on a split, and a map of titles.

The numbers are the same for any number of workers: batches have a fixed order, each worker computes its share
of them, and the results are summed in that order.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from newsbert_ray.data.batches import Batch, Topics, cut_buckets, seeded_generator
from newsbert_ray.data.examples import Impressions
from newsbert_ray.data.reading import EVALUATION_TOKENS, SplitData, World
from newsbert_ray.data.shards import TextTable, pad, read_shard, read_texts
from newsbert_ray.evaluation import metrics
from newsbert_ray.evaluation.metrics import FloatArray, Ints
from newsbert_ray.model.encoder import Encoder
from newsbert_ray.model.heads import ClickHead, PairHead
from newsbert_ray.model.pair import Top

Scores = dict[str, dict[str, float]]
"""Metrics by name, of each model by name."""
Models = Mapping[str, tuple[Encoder, Top]]

BATCH = BLOCK = 256
"""Titles, and impressions, that are scored together."""
MAP_TITLES = 1500
"""Titles on the map; more dots cannot be told apart."""
MISTAKES = 10
"""Most confident wrong predictions that are kept."""
_MAP_BATCH = 50
_MIN_TOPIC_TITLES = 5
"""Titles that a topic needs to influence the plane."""


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


@contextmanager
def _timed(pace: Pace | None, name: str, device: torch.device) -> Iterator[None]:
    """Adds the block's time to the model's seconds; without a pace nothing waits for the device."""
    if pace is None:
        yield
        return
    began = device_seconds(device)
    yield
    pace.seconds[name] = pace.seconds.get(name, 0.0) + device_seconds(device) - began


def device_seconds(device: torch.device) -> float:
    """A clock's seconds after the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_name(device: torch.device) -> str:
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
    """Embeddings (M, D) of texts by each model, in the order of `rows` (M,), distinct rows of the table, on
    the world's device; the bits are the same on every worker and for any number of workers. This worker's
    titles and seconds are added to `pace`."""
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
            with _timed(pace, name, world.device):
                embeddings[name][positions] = top.embed(encoder(ids, attention_mask), attention_mask)
    return {name: world.sum_tensor(embedding) for name, embedding in embeddings.items()}


def score_models(models: Models, data: SplitData, *, world: World, pace: Pace | None = None) -> Scores:
    """Metrics by name (methods.TASKS) and `rows` evaluated of each model, the same on every worker; none for
    a split without labels. ShardError where the shards have no data of the task in this split.

    Args:
        models: in evaluation mode and on the world's device.
        pace: this worker's titles and seconds are added to it.
    """
    if data.task == "recommendation":
        news = encode_news(models, data, data.news_rows(), world=world, pace=pace)
        return score_rankings(models, data, news, world=world)
    if data.task == "retrieval":
        return score_matches(models, data, world=world, pace=pace)
    topics = len(data.manifest.labels)
    counts = count_topics(models, data.batches(BATCH, world), topics=topics, world=world, pace=pace)
    return {name: metrics.topic_metrics(matrix) for name, matrix in counts.items() if matrix.any()}


@torch.inference_mode()
def count_topics(
    models: Models, batches: Iterable[Batch], *, topics: int, world: World, pace: Pace | None = None
) -> dict[str, Ints]:
    """Each model's confusion matrix (Y, Y) of the titles with a label: rows are true topics, columns
    predicted ones. `batches`: this worker's part of a split; over all workers each title occurs once."""
    device = world.device
    counts = torch.zeros(len(models), topics, topics, dtype=torch.int64, device=device)
    for batch in batches:
        batch = batch.to(device)
        labels = batch.target.labels
        if pace:
            pace.titles += len(labels)
        for index, (name, (encoder, top)) in enumerate(models.items()):
            with _timed(pace, name, device):
                output = top([encoder(b.input_ids, b.attention_mask) for b in batch.buckets], batch)
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
    for pairs in data.pairs():
        rows, positions = np.unique(np.concatenate([pairs.queries, pairs.texts]), return_inverse=True)
        embeddings = encode_texts(models, table, rows, pad_id=pad_id, world=world, pace=pace)
        queries, texts = (torch.from_numpy(half).to(world.device) for half in np.split(positions, 2))
        for name, (_, top) in models.items():
            head, embedding = cast("PairHead", top.head), embeddings[name]
            scores[name].append(head.scores(embedding[queries], embedding[texts]).double().cpu())
        clicked.append(pairs.clicked)
    labels = np.concatenate(clicked)
    return {name: metrics.pooled_auc(torch.cat(parts).numpy(), labels) for name, parts in scores.items()}


@dataclass(frozen=True)
class News:
    """Embeddings (M, D) of news by each model, and the position in them of each row of the table of texts."""

    positions: Ints
    embeddings: Mapping[str, Tensor]


def score_rankings(
    models: Models, data: SplitData, news: News, *, world: World, baselines: bool = False
) -> Scores:
    """MIND's metrics of each model, as `ranking_scores` returns them; empty if no impression has labels.
    `news`: all of the split. `baselines`: also of `popularity`, `tfidf` (ProfileScores) and `random`."""
    clicks = count_clicks(data) if baselines else None
    profiles = ProfileScores(data) if baselines else None
    names = [*models, *(("popularity", "tfidf", "random") if baselines else ())]
    tallies: dict[str, list[FloatArray]] = {name: [] for name in names}
    for index, (_, block) in enumerate(read_blocks(data)):
        scores: dict[str, FloatArray] = {}
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
    return {name: metrics.ranking_scores(parts) for name, parts in sums.items()}


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
def score_block(models: Models, news: News, block: Impressions, *, world: World) -> dict[str, FloatArray]:
    """Each model's scores (N,) of all candidates of some impressions, in their order.

    Candidates without a known title (-1) come after all others, in the order of the file.
    """
    unknown = block.candidates < 0
    history, mask = pad(news.positions[block.history], np.diff(block.history_offsets))  # (I, T)
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

    def score(self, block: Impressions) -> FloatArray:
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


def _tally(scores: FloatArray | None, block: Impressions) -> FloatArray:
    """Sums of the metrics of a block's labelled impressions, without those that offer a news whose title is
    unknown; zeros if another worker has its scores."""
    labelled, known = (
        np.add.reduceat(array < 0, block.offsets[:-1]) == 0 for array in (block.clicked, block.candidates)
    )
    kept = np.repeat(labelled, np.diff(block.offsets))
    offsets = np.concatenate([[0], np.cumsum(np.diff(block.offsets)[labelled])])
    values = np.zeros(int(kept.sum())) if scores is None else scores[kept]
    by_metric = metrics.impression_metrics(values, block.clicked[kept], offsets)
    total = metrics.tally({name: np.where(known[labelled], one, np.nan) for name, one in by_metric.items()})
    return np.zeros_like(total) if scores is None else total


@torch.inference_mode()
def map_titles(
    encoder: Encoder, top: Top, data: SplitData, *, device: torch.device, count: int = MAP_TITLES
) -> dict[str, Any]:
    """What a model of topics, in evaluation mode and on `device`, does on a split: "split"; "labels"; of each
    title on a plane (about `count`, of all lengths) "x", "y" and "topic", an index into labels; "share", of
    the variance between topics that the plane shows; "confusion" (Y, Y) of all titles; "mistakes", the most
    confident ones, each with "title", "topic", "predicted" and "probability"."""
    every = max(1, data.manifest.rows(data.split, "topics") // count)
    confusion = np.zeros((len(data.manifest.labels),) * 2, np.int64)
    parts, topics, seen = [], [], 0
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
            topics.append(labels[known])
    all_topics, titles = np.concatenate(topics), _titles_at(data, [number for _, number, *_ in mistakes])
    points, share = between_topics(np.concatenate(parts), all_topics)
    return {
        "split": data.split,
        "labels": data.manifest.labels,
        "topic": all_topics.tolist(),
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
    """The titles at some positions in the order of `SplitData.batches`."""
    titles, start = dict[int, str](), 0
    for shard in data.manifest.splits[data.split]:
        inside = [number for number in numbers if start <= number < start + shard.rows]
        if inside:
            table = read_shard(data.folder, shard, ["title", "tokens"])
            order = np.argsort(pc.list_value_length(table.column("tokens")).to_numpy(), kind="stable")
            titles |= {n: table.column("title")[int(order[n - start])].as_py() for n in inside}
        start += shard.rows
    return titles


def between_topics(embeddings: FloatArray, topics: Ints) -> tuple[FloatArray, float]:
    """Embeddings (M, D) projected on the plane that separates the means of the topics (M,) most: (M, 2), and
    the share, 0 to 1, of the means' variance in the plane.

    The plane is spanned by the first two principal components of the topics' means, weighted by their titles.
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
