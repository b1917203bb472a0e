"""One update: forward, losses, backward, momentum, clipping, Adam. Knows no epoch, no file and no Ray."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from newsbert_ray.config import LossWeights, TrainSettings
from newsbert_ray.data.batches import Batch
from newsbert_ray.distill.joint import joint_losses
from newsbert_ray.distill.losses import weighted_total
from newsbert_ray.distill.momentum import apply_momentum, block_statistics, mixed_updates
from newsbert_ray.methods import STATE_LOSSES, TEACHER_LOSSES
from newsbert_ray.model.pair import Pair

TOTAL = "total"
BLOCK = "block_"
"""Prefix of a block's gradient statistics: block_1_ratio, block_1_cosine, ..."""


class LossModel(nn.Module):
    """The pair and its losses in one module, so that DDP sees which parameters the losses use."""

    def __init__(self, pair: Pair, settings: TrainSettings) -> None:
        super().__init__()
        self.pair = pair
        self._settings = settings

    def forward(self, batch: Batch, weights: LossWeights) -> dict[str, Tensor]:
        """Each unweighted loss by name and, as `total`, their weighted sum."""
        device, is_bf16 = batch.buckets[0].input_ids.device, self._settings.precision == "bf16"
        # Backward of PyTorch's fused attention takes ten times as long in bf16 as in fp32 on CPUs.
        attention = sdpa_kernel(SDPBackend.MATH) if is_bf16 and device.type == "cpu" else nullcontext()
        with attention, torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
            teacher, student = self.pair(batch, states=needs_states(weights))
        losses = joint_losses(teacher, student, batch, self._settings.distill, weights)
        total = weighted_total(losses, weights)
        return {**{name: loss.detach() for name, loss in losses.items()}, TOTAL: total}


@dataclass
class Learner:
    """Everything that an update changes. `model` computes the losses; with several workers it is wrapped by
    DDP, which leaves out the gradients of word embeddings: `sparse_embedding` has them."""

    pair: Pair
    model: nn.Module
    optimizer: torch.optim.Adam
    settings: TrainSettings
    total_steps: int
    sparse_embedding: SparseEmbeddingGradients
    world_size: int = 1


def build_learner(
    pair: Pair,
    settings: TrainSettings,
    *,
    total_steps: int,
    world_size: int = 1,
    words: npt.NDArray[np.integer] | None = None,
) -> Learner:
    """A learner with a fresh Adam, one parameter group each for teacher, student and top. With several
    workers the caller wraps `model` by DDP. `words` as in SparseEmbeddingGradients."""
    optimizer = settings.optimizer
    if settings.distill.losses.isdisjoint(TEACHER_LOSSES):
        pair.teacher.requires_grad_(False)
    embeddings = [embedding for embedding in pair.word_embeddings() if embedding.weight.requires_grad]
    sparse = SparseEmbeddingGradients(embeddings, words=words, world_size=world_size)
    modules = {
        "teacher": (pair.teacher, pair.teacher_top),
        "student": (pair.student, pair.state_map),
        "top": (pair.top,),
    }
    groups: list[dict[str, Any]] = []
    for name, members in modules.items():
        own = [p for m in members if m is not None for p in m.parameters() if p.requires_grad]
        learned, rate = list(map(sparse.learned, own)), settings.learning_rates[name]
        groups.append({"params": learned, "lr": rate, "full_lr": rate, "name": name})
    adam = torch.optim.Adam(
        groups, betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.epsilon, fused=True
    )
    return Learner(pair, LossModel(pair, settings), adam, settings, total_steps, sparse, world_size)


def learning_rate_factor(step: int, settings: TrainSettings, *, total_steps: int) -> float:
    """Factor, 0 to 1, on every learning rate at `step` (from 1): warm-up, then the chosen decay."""
    warmup = round(settings.optimizer.warmup_share * total_steps)
    if step <= warmup:
        return step / warmup
    done = (step - 1 - warmup) / max(1, total_steps - warmup)
    if settings.optimizer.decay == "linear":
        return 1.0 - done
    if settings.optimizer.decay == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0


def train_step(
    learner: Learner, parts: Sequence[Batch], *, step: int, statistics: bool = False
) -> dict[str, Tensor | float]:
    """One update from this worker's parts of a batch.

    One backward of L_t + L_s for each part, gradients averaged over workers, then mix, clip, Adam. Dropout
    depends on seed, step and the part's number in the update only, so that a resumed run, or one on fewer
    workers, draws the same.

    Args:
        parts: batches of one update; their losses add up to the whole batch's.
        step: number of the update, from 1.
        statistics: also return each block's gradient ratio and cosine before mixing.
    Returns:
        This worker's share of each unweighted loss and of the weighted `total` (the sum over workers is the
        whole), and the learning rate factor. The losses are not read from the device and may be NaN.
    """
    settings = learner.settings
    weights = settings.distill.weights_at(step, learner.total_steps)
    learner.sparse_embedding.clear()
    learner.optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    for index, batch in enumerate(parts):
        is_last = index == len(parts) - 1
        _seed((settings.seed * 1_000_003 + step) * 1_009 + batch.piece, batch.buckets[0].input_ids.device)
        with nullcontext() if is_last else _without_averaging(learner.model):
            losses = learner.model(batch, weights)
            (losses[TOTAL] * (learner.world_size * batch.weight)).backward()
        for name, loss in losses.items():
            share = loss.detach() if batch.weight == 1 else loss.detach() * batch.weight
            sums[name] = sums[name] + share if name in sums else share
    learner.sparse_embedding.gather()
    statistics = statistics and weights.teacher_task > 0 and learner.pair.layers_match
    block_numbers = _block_numbers(learner) if statistics else {}
    layers, distill = (learner.pair.student.layers, learner.pair.teacher.layers), settings.distill
    last, rescaled = distill.blocks == "last", distill.momentum == "rescaled"
    if distill.momentum != "update":
        apply_momentum(*layers, beta=distill.beta, last=last, rescaled=rescaled)
    if settings.optimizer.clip_norm is not None:
        learned = map(learner.sparse_embedding.learned, learner.pair.parameters())
        torch.nn.utils.clip_grad_norm_(learned, settings.optimizer.clip_norm)
    factor = learning_rate_factor(step, settings, total_steps=learner.total_steps)
    for group in learner.optimizer.param_groups:
        group["lr"] = group["full_lr"] * factor
    if distill.momentum == "update":
        rates = {group["name"]: group["full_lr"] for group in learner.optimizer.param_groups}
        scale = rates["student"] / rates["teacher"]
        with mixed_updates(*layers, beta=distill.beta, last=last, scale=scale):
            learner.optimizer.step()
    else:
        learner.optimizer.step()
    return {**sums, **block_numbers, "learning_rate_factor": factor}


def needs_states(weights: LossWeights) -> bool:
    """Whether any loss reads the teacher's layers, not only its embeddings and predictions."""
    return any(getattr(weights, name) for name in STATE_LOSSES)


def _seed(seed: int, device: torch.device) -> None:
    """What torch.manual_seed does, for the device that is used; that looks for every kind of device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _without_averaging(model: nn.Module) -> AbstractContextManager[None]:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


def _block_numbers(learner: Learner) -> dict[str, float]:
    last = learner.settings.distill.blocks == "last"
    blocks = block_statistics(learner.pair.student.layers, learner.pair.teacher.layers, last=last)
    return {
        f"{BLOCK}{i}_{name}": value
        for i, block in enumerate(blocks, 1)
        for name, value in block._asdict().items()
    }


class SparseEmbeddingGradients:
    """The gradient of each embedding: this worker's, or the mean over `world_size` workers.

    Autograd's dense gradient allocates and clears a row for every word of the vocabulary in every step. Here
    autograd returns the touched rows only. They are added into one dense gradient per embedding that is kept
    between steps, and only they are cleared again. Workers exchange touched rows, not whole embeddings.

    With `words` (K,), the only ids in batches, ascending, Adam has the rows of these alone: the others' never
    change. For that they become the first rows; ids stay as they were, and so do saved and loaded weights.
    """

    def __init__(
        self,
        embeddings: Sequence[nn.Embedding],
        *,
        words: npt.NDArray[np.integer] | None = None,
        world_size: int = 1,
    ) -> None:
        self.embeddings = list(embeddings)
        self.world_size = world_size
        self.words = None if words is None else torch.from_numpy(words.astype(np.int64))
        self._padding = [embedding.padding_idx for embedding in self.embeddings]
        self._learned: dict[Tensor, Tensor] = {}
        for index, embedding in enumerate(self.embeddings):
            embedding.sparse = True
            embedding.padding_idx = None  # autograd would wait for the device to count its rows; see `gather`
            self._learned[embedding.weight] = embedding.weight
            if self.words is not None:
                row_of = _bring_to_front(embedding, self.words.to(embedding.weight.device))
                self._learned[embedding.weight] = nn.Parameter(embedding.weight.data[: len(self.words)])
                padding = self._padding[index]
                row = len(self.words) if padding is None else int(row_of[padding])
                self._padding[index] = row if row < len(self.words) else None
        self._dense = [torch.zeros_like(self.learned(one.weight)) for one in self.embeddings]
        self._touched: list[Tensor | None] = [None] * len(self.embeddings)

    def learned(self, parameter: Tensor) -> Tensor:
        """What Adam has for a parameter: itself, or the first rows of a word embedding, in its memory."""
        return self._learned.get(parameter, parameter)

    def clear(self) -> None:
        """Before backward: clear the last step's gradients."""
        for embedding, dense, touched in zip(self.embeddings, self._dense, self._touched, strict=True):
            if touched is not None:
                dense.index_fill_(0, touched, 0.0)
            embedding.weight.grad = None

    def gather(self) -> None:
        """After the last backward: set each `.grad` to the dense gradient. Every worker must call it."""
        for index, embedding in enumerate(self.embeddings):
            sparse, dense = embedding.weight.grad, self._dense[index]
            if sparse is None:
                continue
            touched, rows = sparse._indices()[0], sparse._values()
            if self.world_size > 1:
                merge = rows.device.type == "cpu"
                touched, rows = mean_rows(touched, rows, world_size=self.world_size, merge=merge)
            dense.index_add_(0, touched, rows)
            if (padding := self._padding[index]) is not None:
                dense[padding].zero_()
            self._touched[index] = touched
            embedding.weight.grad = None
            self.learned(embedding.weight).grad = dense


def _bring_to_front(embedding: nn.Embedding, words: Tensor) -> Tensor:
    """Make the rows of `words` (K,) the first ones; returns each word's row. The ids that the module takes,
    and the weights that it saves and loads, keep their order."""
    weight = embedding.weight
    others = torch.ones(len(weight), dtype=torch.bool, device=weight.device).index_fill(0, words, False)
    order = torch.cat([words, others.nonzero()[:, 0]])
    row_of = torch.argsort(order)
    weight.data = weight.data[order]

    def save(_: nn.Module, tensors: dict[str, Tensor], prefix: str, __: Any) -> None:
        tensors[f"{prefix}weight"] = tensors[f"{prefix}weight"][row_of]

    def load(_: nn.Module, tensors: dict[str, Tensor], prefix: str, *__: Any) -> None:
        tensors[f"{prefix}weight"] = tensors[f"{prefix}weight"].to(order.device)[order]

    embedding.register_forward_pre_hook(lambda _, ids: row_of[ids[0]])
    embedding.register_state_dict_post_hook(save)  # type: ignore[no-untyped-call]
    embedding.register_load_state_dict_pre_hook(load)  # type: ignore[no-untyped-call]
    return row_of


def mean_rows(touched: Tensor, rows: Tensor, *, world_size: int, merge: bool = True) -> tuple[Tensor, Tensor]:
    """All workers' gradient rows divided by the number of workers, in rank order.

    Args:
        touched: (R,) int64, this worker's row numbers; a row may occur several times.
        rows: (R, D) gradients of these rows.
        merge: add up each row's gradients before the exchange. Less is sent, but a GPU's workers would wait
            for the number of different rows.
    Returns:
        (S,) row numbers and (S, D) gradients of all workers; some of them are zero.
    """
    if merge:
        touched, inverse = torch.unique(touched, return_inverse=True)
        rows = rows.new_zeros(len(touched), rows.shape[1]).index_add_(0, inverse, rows)
    longest = np.array([len(touched)])  # shapes are known without the device
    dist.all_reduce(torch.from_numpy(longest), op=dist.ReduceOp.MAX)
    # all_gather needs equal shapes: pad with zero gradients for row 0.
    padding = int(longest[0]) - len(touched)
    padded_touched = nn.functional.pad(touched, (0, padding))
    padded_rows = nn.functional.pad(rows, (0, 0, 0, padding)) / world_size
    all_touched = [torch.empty_like(padded_touched) for _ in range(world_size)]
    all_rows = [torch.empty_like(padded_rows) for _ in range(world_size)]
    dist.all_gather(all_touched, padded_touched)
    dist.all_gather(all_rows, padded_rows)
    return torch.cat(all_touched), torch.cat(all_rows)
