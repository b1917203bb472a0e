"""Measures what the teacher's gradients do to the student's updates, and the effect at the end of training.

    python -m tests.benchmarks.study_momentum --data SHARDS --teacher NAME_OR_DIR --layers 1 --steps 250

One run of joint training for each beta, from the same initial weights, on the same batches. For each block,
every `--every` updates: the norm ratio and cosine of the teacher block's mean gradient to the student
layer's, the angle by which mixing turns the gradient, and the angle by which it turns Adam's update (a
second Adam that receives the student's own gradients gives the update without mixing); and the norm of each
loss's gradient in the student's layers. At the end: test accuracy, and the share of test titles whose
prediction differs from beta 0, compared with the share that differs when only the dropout samples change.
Prints JSON lines.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from newsbert_ray.config import TrainSettings, build_settings
from newsbert_ray.data.reading import SplitData, make_schedule, read_updates
from newsbert_ray.data.shards import Manifest, read_manifest
from newsbert_ray.distill import momentum
from newsbert_ray.distill.joint import joint_losses
from newsbert_ray.model.assemble import assemble_pair
from newsbert_ray.model.pair import Pair
from newsbert_ray.training.step import Learner, build_learner, train_step
from tests.benchmarks.subject import add_subject, say, subject

_OTHER_DRAWS = 7_919
"""Added to the seed of dropout only."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_subject(parser)
    parser.add_argument("--layers", type=int, default=1, help="student layers N")
    parser.add_argument("--betas", type=float, nargs="+", default=[0.0, 0.1, 0.3, 1.0])
    parser.add_argument("--steps", type=int, default=250, help="updates of each run")
    parser.add_argument("--every", type=int, default=25, help="updates between two measurements")
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--teacher_learning_rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    values = {
        **subject(options),
        "out": "-",
        "seed": options.seed,
        "epochs": 1,
        "learning_rate": options.learning_rate,
        "optimizer.teacher_learning_rate": options.teacher_learning_rate,
        "student.layers": options.layers,
        "train_rows": options.steps * 32,
    }
    settings = build_settings(TrainSettings, {**values, "distill.beta": 0.0})
    manifest = read_manifest(settings.data)
    plain = _run(settings, manifest, options)
    twin = _run(settings, manifest, options, other_draws=True)
    say("other draws of dropout alone", **_compare(twin, plain))
    for beta in options.betas:
        if beta > 0:
            own = build_settings(TrainSettings, {**values, "distill.beta": beta})
            say(f"beta {beta:g} against beta 0", **_compare(_run(own, manifest, options), plain))


Found = tuple[Tensor, Tensor]
"""Predictions on the test split, and the labels."""


def _run(
    settings: TrainSettings, manifest: Manifest, options: argparse.Namespace, *, other_draws: bool = False
) -> Found:
    """Train one run and print the measurements."""
    pair = assemble_pair(settings, manifest)
    schedule = make_schedule(settings, manifest)
    learner = build_learner(pair, settings, total_steps=schedule.total_steps)
    if other_draws:
        learner.settings = settings.model_copy(update={"seed": settings.seed + _OTHER_DRAWS})
    shadow = _Shadow(pair, settings) if settings.distill.beta > 0 else None
    seen: list[dict[str, float]] = []
    for update in read_updates(schedule):
        look = update.step % options.every == 0
        if look and not other_draws:
            seen.append({"step": float(update.step), **_loss_norms(learner, update.parts[0])})
        if shadow:
            with shadow.listening():
                train_step(learner, update.parts, step=update.step)
            if look:
                seen[-1] |= shadow.angles()
        else:
            train_step(learner, update.parts, step=update.step)
    if seen:
        for entry in seen:
            say(f"beta {settings.distill.beta:g}", **{name: round(value, 4) for name, value in entry.items()})
        names = [name for name in seen[0] if name != "step"]
        means = {name: round(statistics.fmean(entry[name] for entry in seen), 4) for name in names}
        say(f"beta {settings.distill.beta:g}, mean over {len(seen)} looks", **means)
    return _predict(pair, settings, manifest)


class _Shadow:
    """Adam's updates without mixing, along the weights of a learner that mixes."""

    def __init__(self, pair: Pair, settings: TrainSettings) -> None:
        self._pair = pair
        self._betas = (settings.optimizer.beta1, settings.optimizer.beta2)
        self._epsilon, self._step = settings.optimizer.epsilon, 0
        self._own = [(torch.zeros(0), torch.zeros(0))] * len(pair.student.layers)
        self._mixed = list(self._own)
        self._found: dict[str, float] = {}

    def listening(self) -> Any:
        """During a step: read each layer's gradients before and after mixing."""
        from unittest.mock import patch

        return patch("newsbert_ray.training.step.apply_momentum", self._mix)

    def _mix(self, student: nn.ModuleList, teacher: nn.ModuleList, *, beta: float) -> None:
        blocks = momentum.block_statistics(student, teacher)
        own = [_flat(layer) for layer in student]
        momentum.apply_momentum(student, teacher, beta=beta)
        self._step += 1
        for i, (layer, block, before) in enumerate(zip(student, blocks, own, strict=True)):
            after = _flat(layer)
            self._own[i], plain = self._adam(self._own[i], before)
            self._mixed[i], turned = self._adam(self._mixed[i], after)
            self._found |= {
                f"block_{i + 1}_ratio": block.ratio,
                f"block_{i + 1}_cosine": block.cosine,
                f"block_{i + 1}_gradient_degrees": _degrees(before, after),
                f"block_{i + 1}_update_degrees": _degrees(plain, turned),
                f"block_{i + 1}_update_norm": float(turned.norm() / plain.norm()),
            }

    def _adam(self, state: tuple[Tensor, Tensor], gradient: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        one, two = self._betas
        first, second = state if state[0].numel() else (torch.zeros_like(gradient),) * 2
        first = one * first + (1 - one) * gradient
        second = two * second + (1 - two) * gradient.square()
        root = (second / (1 - two**self._step)).sqrt() + self._epsilon
        return (first, second), first / (1 - one**self._step) / root

    def angles(self) -> dict[str, float]:
        """Measurements of the last update."""
        return self._found


def _flat(layer: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None])


def _degrees(one: Tensor, other: Tensor) -> float:
    cosine = torch.dot(one, other) / (one.norm() * other.norm()).clamp_min(torch.finfo(one.dtype).tiny)
    return math.degrees(math.acos(float(cosine.clamp(-1.0, 1.0))))


def _loss_norms(learner: Learner, batch: Any) -> dict[str, float]:
    """Norm of each loss's gradient in the student's layers, and its cosine to the label loss's gradient."""
    torch.manual_seed(0)
    parameters = [p for layer in learner.pair.student.layers for p in layer.parameters()]
    teacher, student = learner.pair(batch)
    losses = joint_losses(teacher, student, batch, learner.settings.distill)
    gradients = {}
    for name, loss in losses.items():
        if name not in ("teacher_task", "embedding"):
            values = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            gradients[name] = torch.cat([g.flatten() for g in values if g is not None])
    task = gradients["student_task"]
    result = {f"norm_{name}": float(gradient.norm()) for name, gradient in gradients.items()}
    for name, gradient in gradients.items():
        if name != "student_task":
            result[f"cosine_{name}"] = math.cos(math.radians(_degrees(task, gradient)))
    return result


@torch.inference_mode()
def _predict(pair: Pair, settings: TrainSettings, manifest: Manifest) -> Found:
    pair.eval()
    encoder, top = pair.models()["student"]
    values, labels = [], []
    for batch in SplitData.of(settings, manifest, "test").batches(256):
        states = [encoder(bucket.input_ids, bucket.attention_mask) for bucket in batch.buckets]
        values.append(top(states, batch).logits.argmax(-1))
        labels.append(batch.target.labels)
    return torch.cat(values), torch.cat(labels)


def _compare(one: Found, plain: Found) -> dict[str, float]:
    """Accuracies, and the share of titles with a different prediction, in percent."""
    right = [100 * float((values == labels).float().mean()) for values, labels in (one, plain)]
    other = 100 * float((one[0] != plain[0]).float().mean())
    return {
        "accuracy": round(right[0], 2),
        "of_plain": round(right[1], 2),
        "predicted_otherwise": round(other, 2),
    }


if __name__ == "__main__":
    main()
