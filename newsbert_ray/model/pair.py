"""Teacher and student under one shared top (NewsBERT 3.1, Fig. 1), or each under its own. Knows no loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from newsbert_ray.config import SettingsError, UserKind
from newsbert_ray.data.batches import Batch
from newsbert_ray.methods import TaskName
from newsbert_ray.model.encoder import Encoder, Projections
from newsbert_ray.model.heads import build_head
from newsbert_ray.model.pooling import AttentivePooling


@dataclass(frozen=True)
class Output:
    """One model's outputs on a batch.

    Attributes:
        hidden_states: for each bucket n + 1 tensors (B, L, D), embeddings first.
        news_embedding: (M, D), the texts of all buckets in order.
        logits: (S, Y) over topics, over candidates, or over (no click, click).
        user_embedding: (S, D) in recommendation.
        mapped_states: the student's hidden states in the teacher's width, if a map is learned.
        projections: for each bucket the queries, keys and values of n layers, if a loss compares them.
    """

    hidden_states: tuple[tuple[Tensor, ...], ...]
    news_embedding: Tensor
    logits: Tensor
    user_embedding: Tensor | None = None
    mapped_states: tuple[tuple[Tensor, ...], ...] | None = None
    projections: tuple[tuple[Projections, ...], ...] = ()


class Top(nn.Module):
    """Attentive pooling and the task's head; by default teacher and student share one."""

    def __init__(
        self,
        hidden_size: int,
        *,
        query_size: int,
        topics: int,
        task: TaskName = "topics",
        user: UserKind = "pooling",
    ) -> None:
        super().__init__()
        self.pooling = AttentivePooling(hidden_size, query_size)
        self.head = build_head(task, hidden_size, query_size=query_size, topics=topics, user=user)

    def embed(self, hidden_states: tuple[Tensor, ...], attention_mask: Tensor) -> Tensor:
        """Text embeddings (B, D) from an encoder's hidden states, computed in fp32."""
        with torch.autocast(attention_mask.device.type, enabled=False):
            embedding: Tensor = self.pooling(hidden_states[-1].float(), attention_mask)
            return embedding

    def forward(self, hidden_states: list[tuple[Tensor, ...]], batch: Batch) -> Output:
        """Outputs from the hidden states of each bucket; pooling, head and losses compute in fp32."""
        states = tuple(tuple(state.float() for state in bucket) for bucket in hidden_states)
        masks = (bucket.attention_mask for bucket in batch.buckets)
        parts = [self.embed(state, mask) for state, mask in zip(states, masks, strict=True)]
        return replace(self.predict(torch.cat(parts), batch), hidden_states=states)

    def predict(self, embedding: Tensor, batch: Batch) -> Output:
        """Outputs without hidden states, from the embeddings (M, D) of a batch's texts; in fp32."""
        with torch.autocast(embedding.device.type, enabled=False):
            prediction = self.head(embedding, batch.target)
        return Output((), embedding, prediction.logits, prediction.user_embedding)


@dataclass(frozen=True)
class EmbeddingCache:
    """Embeddings (M, D) of texts by a frozen teacher, and the position in them of each row of their table."""

    positions: Tensor
    embeddings: Tensor

    def lookup(self, batch: Batch) -> Tensor:
        """The embeddings of a batch's texts, buckets in order."""
        rows = torch.cat([bucket.rows for bucket in batch.buckets if bucket.rows is not None])
        return self.embeddings[self.positions[rows]]


class Pair(nn.Module):
    """The teacher with NK layers, the student with N, and their tops.

    `top` is the student's; the teacher shares it unless it has a `teacher_top`. A teacher that does not learn
    (the student learns `alone`, or the teacher is `frozen`) is not among the pair's parameters and state. A
    frozen teacher runs without dropout and gradients; one that learns has dropout in training unless
    `teacher_dropout` is false.
    """

    teacher: Encoder
    teacher_top: Top | None

    def __init__(
        self,
        teacher: Encoder,
        student: Encoder,
        top: Top,
        *,
        teacher_top: Top | None = None,
        state_map: nn.Linear | None = None,
        alone: bool = False,
        frozen: bool = False,
        teacher_dropout: bool = True,
        projections: bool = False,
    ) -> None:
        """`state_map` is a learned map from the student's width to the teacher's; `projections`: also return
        queries, keys and values of every layer."""
        super().__init__()
        self.alone = alone
        self.frozen = frozen
        self.teacher_cache: EmbeddingCache | None = None
        """A frozen teacher's embeddings of every text that training uses."""
        self._teacher_dropout = teacher_dropout
        self._projections = projections
        if alone or frozen:
            # In __dict__, nn.Module does not register them.
            modules = [module for module in (teacher, teacher_top) if module is not None]
            self.__dict__["_not_learning"] = [module.eval().requires_grad_(False) for module in modules]
            self.__dict__["teacher"], self.__dict__["teacher_top"] = teacher, teacher_top
        else:
            self.teacher = teacher
            self.teacher_top = teacher_top
        self.student = student
        self.top = top
        self.state_map = state_map

    @property
    def layers_match(self) -> bool:
        """Whether student and teacher layers have parameters of the same shapes, as momentum needs."""
        student, teacher = (
            [[parameter.shape for parameter in layer.parameters()] for layer in encoder.layers[:1]]
            for encoder in (self.student, self.teacher)
        )
        return student in ([], teacher)

    def models(self) -> dict[str, tuple[Encoder, Top]]:
        """Encoder and top of each model that is computed, by name."""
        student = {"student": (self.student, self.top)}
        return student if self.alone else {"teacher": (self.teacher, self.teacher_top or self.top), **student}

    def word_embeddings(self) -> list[nn.Embedding]:
        """The word embeddings that are learned."""
        encoders = (self.student,) if self.alone or self.frozen else (self.teacher, self.student)
        return [encoder.word_embedding for encoder in encoders]

    def forward(self, batch: Batch, *, states: bool = True) -> tuple[Output | None, Output]:
        """Outputs of both models on the same texts: (teacher's, student's). Without `states`, a frozen
        teacher's come from `teacher_cache` where there is one."""
        teacher = None
        if not self.alone:
            top = self.teacher_top or self.top
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
                if self.teacher_cache is not None and not states:
                    teacher = top.predict(self.teacher_cache.lookup(batch), batch)
                else:
                    teacher = self._outputs(self.teacher, top, batch)
        return teacher, self._outputs(self.student, self.top, batch, self.state_map)

    def _outputs(
        self, encoder: Encoder, top: Top, batch: Batch, state_map: nn.Linear | None = None
    ) -> Output:
        states = [
            encoder.encode(bucket.input_ids, bucket.attention_mask, projections=self._projections)
            for bucket in batch.buckets
        ]
        output: Output = top([bucket.hidden for bucket in states], batch)
        mapped = None
        if state_map is not None:
            with torch.autocast(output.news_embedding.device.type, enabled=False):
                mapped = tuple(tuple(map(state_map, bucket)) for bucket in output.hidden_states)
        projections = tuple(tuple(layer.float() for layer in bucket.projections) for bucket in states)
        return replace(output, mapped_states=mapped, projections=projections)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if not self._teacher_dropout:
            self.teacher.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for module in self.__dict__.get("_not_learning", ()):
            module._apply(fn, recurse)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def block_map(teacher_layers: int, student_layers: int, *, last: bool = False) -> list[list[int]]:
    """Teacher layers (from 1) of each student layer's block: [(i - 1)K + 1, ..., iK] (NewsBERT 3.2).

    With `last` the block of layer i is the one teacher layer N(K - 1) + i. A student without layers has none.
    SettingsError where N does not divide NK; the message lists the depths that do.
    """
    if not student_layers:
        return []
    if teacher_layers % student_layers:
        divisors = [n for n in range(1, teacher_layers + 1) if teacher_layers % n == 0]
        choices = ", ".join(map(str, divisors[:-1])) + (" or " if divisors[:-1] else "") + str(divisors[-1])
        raise SettingsError(
            f"{teacher_layers} teacher layers do not divide into {student_layers} student layers; "
            f"choose {choices}"
        )
    size, first = teacher_layers // student_layers, teacher_layers - student_layers
    if last:
        return [[first + i] for i in range(1, student_layers + 1)]
    return [list(range(i * size + 1, (i + 1) * size + 1)) for i in range(student_layers)]
