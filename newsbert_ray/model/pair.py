"""Teacher and student under one shared top (NewsBERT 3.1, Fig. 1). Knows no loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from newsbert_ray.config import SettingsError
from newsbert_ray.data.batches import Batch
from newsbert_ray.model.encoder import Encoder
from newsbert_ray.model.heads import build_head
from newsbert_ray.model.pooling import AttentivePooling
from newsbert_ray.tasks import TaskName


@dataclass(frozen=True)
class Output:
    """What one model makes of a batch.

    Attributes:
        hidden_states: for each bucket n + 1 tensors (B, L, D), embeddings first.
        news_embedding: (M, D), of all buckets' texts in order.
        logits: (S, Y) of topics, of candidates, or of no click and click.
        user_embedding: (S, D) in recommendation.
    """

    hidden_states: tuple[tuple[Tensor, ...], ...]
    news_embedding: Tensor
    logits: Tensor
    user_embedding: Tensor | None = None


class Top(nn.Module):
    """Attentive pooling and the task's head: one set of parameters that both models stand under."""

    def __init__(self, hidden_size: int, *, query_size: int, topics: int, task: TaskName = "topics") -> None:
        super().__init__()
        self.pooling = AttentivePooling(hidden_size, query_size)
        self.head = build_head(task, hidden_size, query_size=query_size, topics=topics)

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
        embedding = torch.cat(parts)
        with torch.autocast(embedding.device.type, enabled=False):
            predicted = self.head(embedding, batch.target)
        return Output(states, embedding, predicted.logits, predicted.user_embedding)


class Pair(nn.Module):
    """The teacher with NK layers, the student with N, and the top they share.

    Where the student learns `alone` the teacher is not computed.
    """

    def __init__(self, teacher: Encoder, student: Encoder, top: Top, *, alone: bool = False) -> None:
        super().__init__()
        self.teacher = teacher
        self.student = student
        self.top = top
        self.alone = alone

    def models(self) -> dict[str, tuple[Encoder, Top]]:
        """The models that are learned, by name."""
        student = {"student": (self.student, self.top)}
        return student if self.alone else {"teacher": (self.teacher, self.top), **student}

    def word_tables(self) -> list[nn.Embedding]:
        """Both models' word embedding tables."""
        return [encoder.word_table for encoder in (self.teacher, self.student)]

    def forward(self, batch: Batch) -> tuple[Output | None, Output]:
        """Both models' outputs on the same texts: (teacher's, student's)."""
        teacher = None if self.alone else self._outputs(self.teacher, batch)
        return teacher, self._outputs(self.student, batch)

    def _outputs(self, encoder: Encoder, batch: Batch) -> Output:
        states = [encoder(bucket.input_ids, bucket.attention_mask) for bucket in batch.buckets]
        output: Output = self.top(states, batch)
        return output


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


def build_pair(
    teacher: Encoder,
    *,
    student_layers: int,
    query_size: int,
    topics: int,
    task: TaskName = "topics",
    alone: bool = False,
) -> Pair:
    """A pair whose student starts from the teacher's embeddings and first layers.

    Raises:
        SettingsError: the student's layers do not divide the teacher's.
    """
    block_map(len(teacher.layers), student_layers)
    top = Top(teacher.hidden_size, query_size=query_size, topics=topics, task=task)
    return Pair(teacher, teacher.first_layers(student_layers), top, alone=alone).train()
