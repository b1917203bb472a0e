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
    """What one model makes of a batch.

    Attributes:
        hidden_states: for each bucket n + 1 tensors (B, L, D), embeddings first.
        news_embedding: (M, D), of all buckets' texts in order.
        logits: (S, Y) of topics, of candidates, or of no click and click.
        user_embedding: (S, D) in recommendation.
        mapped: a student's hidden states in the teacher's width, where a map is learned.
        projections: for each bucket n layers' queries, keys and values, where losses compare them.
    """

    hidden_states: tuple[tuple[Tensor, ...], ...]
    news_embedding: Tensor
    logits: Tensor
    user_embedding: Tensor | None = None
    mapped: tuple[tuple[Tensor, ...], ...] | None = None
    projections: tuple[tuple[Projections, ...], ...] = ()

    @property
    def compared(self) -> tuple[tuple[Tensor, ...], ...]:
        """The hidden states that are compared with the other model's."""
        return self.hidden_states if self.mapped is None else self.mapped


class Top(nn.Module):
    """Attentive pooling and the task's head: one set of parameters that both models stand under."""

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
        """Texts' embeddings (B, D) from an encoder's hidden states; in fp32 whatever it computed in."""
        with torch.autocast(attention_mask.device.type, enabled=False):
            embedding: Tensor = self.pooling(hidden_states[-1].float(), attention_mask)
            return embedding

    def forward(self, hidden_states: list[tuple[Tensor, ...]], batch: Batch) -> Output:
        """Hidden states of each bucket to an Output; losses and top compute in fp32."""
        states = tuple(tuple(state.float() for state in bucket) for bucket in hidden_states)
        parts = [
            self.embed(state, bucket.attention_mask)
            for state, bucket in zip(states, batch.buckets, strict=True)
        ]
        return replace(self.answer(torch.cat(parts), batch), hidden_states=states)

    def answer(self, embedding: Tensor, batch: Batch) -> Output:
        """Embeddings (M, D) of a batch's texts to an Output without hidden states; in fp32."""
        with torch.autocast(embedding.device.type, enabled=False):
            predicted = self.head(embedding, batch.target)
        return Output((), embedding, predicted.logits, predicted.user_embedding)


@dataclass(frozen=True)
class Remembered:
    """Embeddings that a model once made: `places[row]` is a text's position in `embeddings` (M, D), by its
    row of the table of texts."""

    places: Tensor
    embeddings: Tensor

    def take(self, batch: Batch) -> Tensor:
        """The embeddings of a batch's texts, in the order of its buckets."""
        rows = torch.cat([bucket.rows for bucket in batch.buckets if bucket.rows is not None])
        return self.embeddings[self.places[rows]]


class Pair(nn.Module):
    """The teacher with NK layers, the student with N, and what stands on them.

    `top` is the student's; the teacher shares it, or has a `teacher_top` of its own. A teacher that does not
    learn (because the student learns `alone`, or it is `frozen`) is no part of the pair's parameters and
    state; a frozen one is computed, without dropout and gradients. One that learns has dropout in training
    unless `teacher_dropout` is false.
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
        """
        Args:
            state_map: learned with the student, its width to the teacher's.
            projections: give attention's inputs too.
        """
        super().__init__()
        self.alone = alone
        self.frozen = frozen
        self.remembered: Remembered | None = None
        """A frozen teacher's embeddings of all texts that training names."""
        self._teacher_dropout = teacher_dropout
        self._projections = projections
        if alone or frozen:
            aside = [module for module in (teacher, teacher_top) if module is not None]
            self.__dict__["_aside"] = [module.eval().requires_grad_(False) for module in aside]
            self.__dict__["teacher"], self.__dict__["teacher_top"] = teacher, teacher_top
        else:
            self.teacher = teacher
            self.teacher_top = teacher_top
        self.student = student
        self.top = top
        self.state_map = state_map

    @property
    def alike(self) -> bool:
        """Whether a student's layer has the parameters of a teacher's, so that gradients can be compared."""
        own, other = (
            [parameter.shape for parameter in encoder.layers[0].parameters()]
            for encoder in (self.student, self.teacher)
        )
        return own == other

    def models(self) -> dict[str, tuple[Encoder, Top]]:
        """The models that are computed, by name."""
        student = {"student": (self.student, self.top)}
        return student if self.alone else {"teacher": (self.teacher, self.teacher_top or self.top), **student}

    def word_tables(self) -> list[nn.Embedding]:
        """The word embedding tables that are learned."""
        encoders = (self.student,) if self.alone or self.frozen else (self.teacher, self.student)
        return [encoder.word_table for encoder in encoders]

    def forward(self, batch: Batch, *, states: bool = True) -> tuple[Output | None, Output]:
        """Both models' outputs on the same texts: (teacher's, student's).

        Args:
            states: whether the teacher's hidden states are asked for; without them a frozen one's outputs
                come from `remembered` embeddings, where there are any.
        """
        teacher = None
        if not self.alone:
            top = self.teacher_top or self.top
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
                if self.remembered is not None and not states:
                    teacher = top.answer(self.remembered.take(batch), batch)
                else:
                    teacher = self._outputs(self.teacher, top, batch)
        return teacher, self._outputs(self.student, self.top, batch, self.state_map)

    def _outputs(
        self, encoder: Encoder, top: Top, batch: Batch, state_map: nn.Linear | None = None
    ) -> Output:
        states = [
            encoder.read(bucket.input_ids, bucket.attention_mask, projections=self._projections)
            for bucket in batch.buckets
        ]
        output: Output = top([found.hidden for found in states], batch)
        mapped = None
        if state_map is not None:
            mapped = tuple(tuple(state_map(state) for state in bucket) for bucket in output.hidden_states)
        projections = tuple(tuple(layer.float() for layer in found.projections) for found in states)
        return replace(output, mapped=mapped, projections=projections)

    def train(self, mode: bool = True) -> Self:
        """Both in training mode, but for a teacher without dropout."""
        super().train(mode)
        if not self._teacher_dropout:
            self.teacher.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for module in self.__dict__.get("_aside", ()):
            module._apply(fn, recurse)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def block_map(teacher_layers: int, student_layers: int) -> list[list[int]]:
    """Teacher layers (from 1) of the block behind each student layer: [(i - 1)K + 1, ..., iK] (NewsBERT 3.2).

    Raises:
        SettingsError: N does not divide NK; the message lists the depths that do.
    """
    if teacher_layers % student_layers:
        divisors = [n for n in range(1, teacher_layers + 1) if teacher_layers % n == 0]
        choices = ", ".join(map(str, divisors[:-1])) + (" or " if divisors[:-1] else "") + str(divisors[-1])
        raise SettingsError(
            f"{teacher_layers} teacher layers do not divide into {student_layers} student layers; "
            f"choose {choices}"
        )
    size = teacher_layers // student_layers
    return [list(range(i * size + 1, (i + 1) * size + 1)) for i in range(student_layers)]
