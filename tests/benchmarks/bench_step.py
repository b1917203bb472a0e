"""A joint training step compared with a plain loop over the same batches, and the parts of a step's time.

    python -m tests.benchmarks.bench_step [--data SHARDS --teacher NAME_OR_DIR] [--layers 1] [--steps 60]

The plain loop uses the same models and losses in fp32, pads every title to `--plain_length`, uses unfused
Adam, mixes gradients one tensor at a time and zeroes the whole gradient of an embedding table. Both take
turns, update by update.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor, nn

from newsbert_ray.config import TrainSettings, build_settings, merge
from newsbert_ray.data.batches import Batch, Bucket
from newsbert_ray.data.reading import (
    TrainingSchedule,
    Update,
    World,
    make_schedule,
    read_updates,
    training_texts,
)
from newsbert_ray.data.shards import read_manifest
from newsbert_ray.distill.joint import joint_losses
from newsbert_ray.distill.losses import weighted_total
from newsbert_ray.distill.momentum import apply_momentum
from newsbert_ray.model.assemble import assemble_pair
from newsbert_ray.training.step import Learner, build_learner, train_step
from newsbert_ray.training.worker import build_worker_learner
from tests.benchmarks.subject import add_subject, say, subject

WARM_UP = 5


def main() -> None:
    """Print one JSON line per figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_subject(parser)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--train_rows", type=int, default=None)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--precision", default="fp32", help="of our step; the plain loop has fp32")
    parser.add_argument("--compile", action="store_true", help="our encoders' layers")
    parser.add_argument("--plain_length", type=int, default=30)
    parser.add_argument("--vocabulary", type=int, default=250_000, help="a multilingual encoder's words")
    options = parser.parse_args()
    values = {
        **subject(options),
        "out": "unused",
        "student.layers": options.layers,
        "model.dropout": options.dropout,
        "batch_size": options.batch_size,
        "train_rows": options.train_rows,
        "threads": options.threads,
        "precision": options.precision,
        "compile": options.compile,
        "epochs": 100,
    }
    settings = build_settings(TrainSettings, merge(values))
    manifest = read_manifest(settings.data)
    schedule = make_schedule(settings, manifest)
    compare(
        settings,
        schedule,
        steps=options.steps,
        plain_length=options.plain_length,
        vocabulary=options.vocabulary,
    )


def compare(
    settings: TrainSettings, schedule: TrainingSchedule, *, steps: int, plain_length: int, vocabulary: int
) -> None:
    """Alternate the two programs over the same updates and print their ratio and their last losses."""
    learner = build_worker_learner(settings, schedule, World())
    plain = PlainLoop(settings, schedule, plain_length)
    ours: list[float] = []
    theirs: list[float] = []
    last: list[tuple[float, float]] = []
    for update in islice(read_updates(schedule), WARM_UP + steps):
        start = time.perf_counter()
        numbers = train_step(learner, update.parts, step=update.step)
        middle = time.perf_counter()
        loss = plain.step(update)
        end = time.perf_counter()
        ours.append(middle - start)
        theirs.append(end - middle)
        last.append((float(numbers["total"]), loss))
    ours, theirs = ours[WARM_UP:], theirs[WARM_UP:]
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    rows = settings.batch_size
    ours_in = "" if settings.precision == "fp32" else f", {settings.precision}"
    ours_in += ", compiled" if settings.compile else ""
    say(
        f"joint step against a plain loop{ours_in}",
        ours_titles_per_second=rows / statistics.median(ours),
        plain_titles_per_second=rows / statistics.median(theirs),
        ratio_median=statistics.median(ratios),
        ratio_quartiles=[ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
        total_ratio=sum(theirs) / sum(ours),
        last_losses=last[-1],
        largest_loss_difference=max(abs(a - b) for a, b in last),
    )
    say(f"mixing{ours_in}", share_of_step=mixing_seconds(learner.pair, settings) / statistics.median(ours))
    say(f"Adam{ours_in}", share_of_step=adam_seconds(learner) / statistics.median(ours))
    for size in () if settings.compile else (None, vocabulary):
        say(f"words{ours_in}", **words_numbers(settings, schedule, size, steps=max(10, steps // 3)))
    say("dropout", step_with_over_without=dropout_cost(settings, schedule, steps=max(10, steps // 2)))
    say("matmul", **matmul_share(settings, schedule, statistics.median(ours)))


class PlainLoop:
    """The reference program."""

    def __init__(self, settings: TrainSettings, schedule: TrainingSchedule, length: int) -> None:
        self.settings = settings
        self.length = length
        self.pad_id = schedule.manifest.tokenizer.pad_id
        self.pair = assemble_pair(settings, schedule.manifest)
        self.optimizer = torch.optim.Adam(self.pair.parameters(), lr=settings.learning_rate)

    def step(self, update: Update) -> float:
        torch.manual_seed(update.step)
        batch = pad_to(update.parts[0], self.length, self.pad_id)
        self.optimizer.zero_grad()
        teacher, student = self.pair(batch)
        losses = joint_losses(teacher, student, batch, self.settings.distill)
        total = weighted_total(losses, self.settings.distill.weights)
        total.backward()  # type: ignore[no-untyped-call]
        mix_one_by_one(self.pair.student.layers, self.pair.teacher.layers, self.settings.distill.beta)
        self.optimizer.step()
        return float(total)


def mix_one_by_one(student: nn.ModuleList, teacher: nn.ModuleList, beta: float) -> None:
    """Eqs. 7-8, one tensor at a time."""
    size = len(teacher) // len(student)
    for i, layer in enumerate(student):
        for name, parameter in layer.named_parameters():
            block = [teacher[i * size + j].get_parameter(name).grad for j in range(size)]
            mean = torch.stack([g for g in block if g is not None]).mean(0)
            assert parameter.grad is not None
            parameter.grad.copy_(beta * mean + (1 - beta) * parameter.grad)


def pad_to(batch: Batch, length: int, pad_id: int) -> Batch:
    """The same titles padded to a fixed length."""
    (bucket,) = batch.buckets
    missing = length - bucket.input_ids.shape[1]

    def padded(ids: Tensor, value: int) -> Tensor:
        return nn.functional.pad(ids, (0, missing), value=value)

    wide = Bucket(padded(bucket.input_ids, pad_id), padded(bucket.attention_mask, 0))
    return replace(batch, buckets=(wide,))


def mixing_seconds(pair: nn.Module, settings: TrainSettings) -> float:
    """Median seconds of one mixing of all blocks."""
    for parameter in pair.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        apply_momentum(pair.student.layers, pair.teacher.layers, beta=settings.distill.beta or 0.1)  # type: ignore[arg-type,union-attr]
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def adam_seconds(learner: Learner) -> float:
    """Median seconds of Adam alone."""
    times = []
    for _ in range(20):
        start = time.perf_counter()
        learner.optimizer.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def words_numbers(
    settings: TrainSettings, schedule: TrainingSchedule, vocabulary: int | None, *, steps: int
) -> dict[str, float]:
    """Median ratio of a step whose Adam has all words of the vocabulary to one with the corpus's alone, in
    turns; `vocabulary`: as if the tokeniser had so many words."""
    words = training_texts(schedule).words(schedule.manifest.tokenizer.pad_id)
    learners: list[Learner] = []
    for known in (None, words):
        pair = assemble_pair(settings, schedule.manifest)
        for encoder in (pair.teacher, pair.student):
            if vocabulary is not None:
                encoder.backbone.resize_token_embeddings(vocabulary, mean_resizing=False)
        learners.append(build_learner(pair, settings, total_steps=schedule.total_steps, words=known))
    size = len(learners[0].sparse_embedding.embeddings[0].weight)
    return {
        "vocabulary": size,
        "words_in_corpus": len(words) / size,
        "step_with_all_over_ours": median_ratio(learners, schedule, steps=steps),
    }


def dropout_cost(settings: TrainSettings, schedule: TrainingSchedule, *, steps: int) -> float:
    """Median ratio of a step with dropout 0.2 to one without, in turns."""
    world = World()
    learners = [
        build_worker_learner(
            settings.model_copy(update={"model": settings.model.model_copy(update={"dropout": rate})}),
            schedule,
            world,
        )
        for rate in (0.2, 0.0)
    ]
    return median_ratio(learners, schedule, steps=steps)


def median_ratio(learners: list[Learner], schedule: TrainingSchedule, *, steps: int) -> float:
    """Median ratio of the first of two learners' time for a step to the second's, in turns."""
    ratios = []
    for update in islice(read_updates(schedule), WARM_UP + steps):
        times = []
        for learner in learners:
            start = time.perf_counter()
            train_step(learner, update.parts, step=update.step)
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
    return statistics.median(ratios[WARM_UP:])


def matmul_share(
    settings: TrainSettings, schedule: TrainingSchedule, step_seconds: float
) -> dict[str, float]:
    """Time of the step's matrix products compared with plain products of the same shapes."""
    pair = assemble_pair(settings, schedule.manifest)
    config = pair.teacher.backbone.config
    hidden, inner = int(config.hidden_size), int(config.intermediate_size)
    layers = len(pair.teacher.layers) + len(pair.student.layers)
    tokens = statistics.mean(u.parts[0].padded_tokens for u in islice(read_updates(schedule), 20))
    operations = 3 * 2 * tokens * (4 * hidden * hidden + 2 * hidden * inner) * layers
    ceiling, bf16 = (product_speed(int(tokens), hidden, inner, t) for t in (torch.float32, torch.bfloat16))
    achieved = operations / step_seconds
    return {
        "bf16_ceiling_gflops": bf16 / 1e9,
        "ceiling_gflops": ceiling / 1e9,
        "step_gflops": achieved / 1e9,
        "share_of_ceiling": achieved / ceiling,
    }


def product_speed(rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
    """Operations a second of a matrix product."""
    a, b = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
    times = []
    for _ in range(40):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * rows * inner * columns / statistics.median(times)


if __name__ == "__main__":
    main()
