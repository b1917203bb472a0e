"""Recommendation that encodes each distinct news once, compared with encoding every mention.

    python -m tests.benchmarks.bench_recommend [--data SHARDS --teacher NAME_OR_DIR] [--steps 4]

The plain program uses the same models and losses on the same clicks, encodes every mention of a news, pads
titles to 30 tokens and histories to 50 news, works in parts of `--plain_part` clicks to fit into memory, uses
unfused Adam and mixes gradients one tensor at a time. In training both take turns, update by update, without
dropout, and their losses are compared. In evaluation ours scores the whole split and the plain program the
first `--impressions`; the measure is seconds per impression.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from newsbert_ray.config import TrainSettings, build_settings, merge
from newsbert_ray.data.batches import Batch, Bucket, ClickChoices
from newsbert_ray.data.examples import Clicks, Impressions
from newsbert_ray.data.reading import (
    SplitData,
    TrainingSchedule,
    World,
    collate_update,
    make_schedule,
    window_parts,
)
from newsbert_ray.data.shards import TextTable, read_manifest, read_texts
from newsbert_ray.distill.joint import joint_losses
from newsbert_ray.distill.losses import weighted_total
from newsbert_ray.evaluation.metrics import impression_metrics
from newsbert_ray.evaluation.scoring import Models, encode_news, score_block, score_models
from newsbert_ray.model.assemble import assemble_pair
from newsbert_ray.model.heads import ClickHead
from newsbert_ray.training.step import train_step
from newsbert_ray.training.worker import build_worker_learner
from tests.benchmarks.bench_step import mix_one_by_one
from tests.benchmarks.subject import add_subject, say, subject

LENGTH, HISTORY = 30, 50
WARM_UP = 1


def main() -> None:
    """Print one JSON line per figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_subject(parser)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--batch_size", type=int, nargs="+", default=[32])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--plain_part", type=int, default=8)
    parser.add_argument("--impressions", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="fp32", help="of our training; the plain program has fp32")
    parser.add_argument("--only", choices=["training", "evaluation"])
    options = parser.parse_args()
    settings = build_settings(
        TrainSettings,
        merge(
            {
                **subject(options, history=60, candidates=37),
                "out": "unused",
                "task": "recommendation",
                "student.layers": options.layers,
                "model.dropout": 0.0,
                "threads": options.threads,
                "precision": options.precision,
                "learning_rate": 1e-5,
            }
        ),
    )
    if options.only != "evaluation":
        for size in options.batch_size:
            compare_training(
                settings.model_copy(update={"batch_size": size}), steps=options.steps, part=options.plain_part
            )
    if options.only != "training":
        compare_evaluation(settings, impressions=options.impressions)


def compare_training(settings: TrainSettings, *, steps: int, part: int) -> None:
    """Alternate the two programs over the same updates."""
    manifest = read_manifest(settings.data)
    schedule = make_schedule(settings, manifest)
    learner = build_worker_learner(settings, schedule, World())
    plain = PlainLoop(settings, schedule, part)
    ours, theirs, losses, read = [], [], [], [[0, 0], [0, 0]]
    window, first, skip = next(schedule.windows_from(0))
    whole = (
        (step, parts)
        for step, parts in window_parts(schedule, window, first_step=first, skip=skip)
        if parts[0].rows == settings.batch_size  # the smaller batch of an epoch may be anywhere
    )
    for step, parts in itertools.islice(whole, WARM_UP + steps):
        clicks = cast("Clicks", parts[0].examples)
        start = time.perf_counter()
        update = collate_update(parts, schedule, step=step, epoch=0)
        numbers = train_step(learner, update.parts, step=step)
        middle = time.perf_counter()
        loss, plain_tokens = plain.step(clicks)
        end = time.perf_counter()
        ours.append(middle - start)
        theirs.append(end - middle)
        losses.append((float(numbers["total"]), loss))
        read[0][0] += sum(len(bucket.input_ids) for bucket in update.parts[0].buckets)
        read[0][1] += update.parts[0].padded_tokens
        read[1][0] += len(clicks) * (HISTORY + clicks.candidates.shape[1])
        read[1][1] += plain_tokens
    ours, theirs = ours[WARM_UP:], theirs[WARM_UP:]
    ours_in = "" if settings.precision == "fp32" else f", {settings.precision}"
    say(
        f"training, batch {settings.batch_size}{ours_in}: each news once against each mention",
        ratio=sum(theirs) / sum(ours),
        ratios=[b / a for a, b in zip(ours, theirs, strict=True)],
        ours_clicks_per_second=settings.batch_size / statistics.median(ours),
        plain_clicks_per_second=settings.batch_size / statistics.median(theirs),
        fewer_texts=read[1][0] / read[0][0],
        fewer_tokens=read[1][1] / read[0][1],
        largest_loss_difference=max(abs(a - b) for a, b in losses),
        losses=losses[-1],
    )


class PlainLoop:
    """The reference program's training."""

    def __init__(self, settings: TrainSettings, schedule: TrainingSchedule, part: int) -> None:
        self.settings = settings
        self.part = part
        self.pad_id = schedule.manifest.tokenizer.pad_id
        self.pair = assemble_pair(settings, schedule.manifest)
        self.optimizer = torch.optim.Adam(self.pair.parameters(), lr=settings.learning_rate)

    def step(self, clicks: Clicks) -> tuple[float, int]:
        """The loss of the update, and the number of tokens read."""
        weights, distill = self.settings.distill.weights, self.settings.distill
        self.optimizer.zero_grad()
        total, tokens = 0.0, 0
        counts = (len(clicks), *clicks.count())
        for start in range(0, len(clicks), self.part):
            rows = np.arange(start, min(start + self.part, len(clicks)))
            batch = each_mention(clicks.take(rows), counts, pad_id=self.pad_id)
            teacher, student = self.pair(batch)
            loss = weighted_total(joint_losses(teacher, student, batch, distill), weights)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            tokens += batch.padded_tokens
        mix_one_by_one(self.pair.student.layers, self.pair.teacher.layers, distill.beta)
        self.optimizer.step()
        return total, tokens


def each_mention(clicks: Clicks, counts: tuple[int, int, int], *, pad_id: int) -> Batch:
    """A batch in which every mention, and every empty slot of a history, is a text of its own."""
    lengths = np.diff(clicks.offsets)
    present = np.arange(HISTORY)[None, :] < lengths[:, None]
    news = np.zeros((len(clicks), HISTORY + clicks.candidates.shape[1]), np.int64)
    news[:, :HISTORY][present] = clicks.history
    offered = clicks.candidates >= 0
    news[:, HISTORY:][offered] = clicks.candidates[offered]
    ids, mask = padded(clicks.table, news.ravel(), pad_id)
    uses = np.concatenate([present, offered], axis=1).ravel().astype(np.float32)
    indices = torch.arange(news.size).view(news.shape)
    target = ClickChoices(
        history=indices[:, :HISTORY],
        history_mask=torch.from_numpy(present.astype(np.int64)),
        candidates=indices[:, HISTORY:],
        candidate_mask=torch.from_numpy(offered),
        labels=torch.zeros(len(clicks), dtype=torch.int64),
    )
    return Batch((Bucket(ids, mask, torch.from_numpy(uses)),), target, *counts)


def padded(table: TextTable, news: np.ndarray, pad_id: int) -> tuple[Tensor, Tensor]:
    """Titles padded to a fixed length."""
    ids, mask = table.ids(news, pad_id=pad_id)
    missing = ((0, 0), (0, LENGTH - ids.shape[1]))
    wide = np.pad(ids, missing, constant_values=pad_id), np.pad(mask, missing)
    return torch.from_numpy(wide[0]), torch.from_numpy(wide[1].astype(np.int64))


def compare_evaluation(settings: TrainSettings, *, impressions: int) -> None:
    """Our evaluation of the whole test split, and the plain one of the first impressions."""
    torch.set_num_threads(settings.threads or 2)
    manifest = read_manifest(settings.data)
    models = assemble_pair(settings, manifest).eval().models()
    folder, world = Path(settings.data), World()
    start = time.perf_counter()
    data = SplitData(folder, manifest, "test", "recommendation", HISTORY)
    scores = score_models(models, data, world=world)
    seconds = time.perf_counter() - start
    count = manifest.rows("test", "recommendation")
    _, block = next(data.impressions())
    table = read_texts(folder, manifest)
    start = time.perf_counter()
    plain = plain_scores(models, table, block, impressions, pad_id=manifest.tokenizer.pad_id)
    plain_seconds = time.perf_counter() - start
    few = first_impressions(block, impressions)
    ours = few_scores(models, settings, few)
    say(
        "evaluation: each news of the split once against each mention",
        ratio=(plain_seconds / impressions) / (seconds / count),
        ours_impressions_per_second=count / seconds,
        plain_impressions_per_second=impressions / plain_seconds,
        impressions=count,
        plain_impressions=impressions,
        largest_score_difference=max(float(np.abs(ours[n] - plain[n]).max()) for n in models),
        auc={name: scores[name]["auc"] for name in models},
        plain_auc_of_the_first={
            n: float(np.nanmean(impression_metrics(plain[n], few.clicked, few.offsets)["auc"]))
            for n in models
        },
    )


def first_impressions(block: Impressions, count: int) -> Impressions:
    """The first impressions of a block."""
    read, offered = int(block.history_offsets[count]), int(block.offsets[count])
    return Impressions(
        block.history[:read],
        block.history_offsets[: count + 1],
        block.candidates[:offered],
        block.offsets[: count + 1],
        block.clicked[:offered],
    )


def few_scores(models: Models, settings: TrainSettings, few: Impressions) -> dict[str, np.ndarray]:
    """Our scores of a few impressions."""
    data = SplitData.of(settings, read_manifest(settings.data), "test")
    rows, world = np.unique(np.concatenate([few.history, few.candidates])), World()
    return dict(score_block(models, encode_news(models, data, rows, world=world), few, world=world))


@torch.inference_mode()
def plain_scores(
    models: Models, table: TextTable, block: Impressions, count: int, *, pad_id: int
) -> dict[str, np.ndarray]:
    """Scores of the first impressions, with every mention encoded."""
    embeddings: dict[str, list[np.ndarray]] = {name: [] for name in models}
    for i in range(count):
        read = block.history[block.history_offsets[i] : block.history_offsets[i + 1]]
        offered = block.candidates[block.offsets[i] : block.offsets[i + 1]]
        news = np.concatenate([read, np.zeros(HISTORY - len(read), np.int64), offered])
        ids, mask = padded(table, news, pad_id)
        present = (torch.arange(HISTORY) < len(read)).long()[None, :]
        for name, (encoder, top) in models.items():
            embedding = top.embed(encoder(ids, mask), mask)
            user = cast("ClickHead", top.head).encode_users(embedding[None, :HISTORY], present)
            embeddings[name].append((embedding[HISTORY:] @ user[0]).double().numpy())
    return {name: np.concatenate(parts) for name, parts in embeddings.items()}


if __name__ == "__main__":
    main()
