"""Teacher and student under one shared top (NewsBERT 3.1, Fig. 1). Knows no loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from newsbert_ray.config import SettingsError
from newsbert_ray.model.encoder import Encoder
from newsbert_ray.model.heads import TopicHead
from newsbert_ray.model.pooling import AttentivePooling


@dataclass(frozen=True)
class Output:
    """What one model makes of a batch: n + 1 hidden states (B, L, D), news embedding (B, D), logits (B,
    Y)."""

    hidden_states: tuple[Tensor, ...]
    news_embedding: Tensor
    logits: Tensor


class Top(nn.Module):
    """Attentive pooling and topic head: one set of parameters that both models stand under."""

    def __init__(self, hidden_size: int, *, query_size: int, topics: int) -> None:
        super().__init__()
        self.pooling = AttentivePooling(hidden_size, query_size)
        self.head = TopicHead(hidden_size, topics)

    def forward(self, hidden_states: tuple[Tensor, ...], attention_mask: Tensor) -> Output:
        """Hidden states to an Output; losses and top compute in fp32 whatever the encoder computed in."""
        states = tuple(state.float() for state in hidden_states)
        with torch.autocast(attention_mask.device.type, enabled=False):
            embedding = self.pooling(states[-1], attention_mask)
            return Output(states, embedding, self.head(embedding))


class Pair(nn.Module):
    """The teacher with NK layers, the student with N, and the top they share."""

    def __init__(self, teacher: Encoder, student: Encoder, top: Top) -> None:
        super().__init__()
        self.teacher = teacher
        self.student = student
        self.top = top

    def word_tables(self) -> list[nn.Embedding]:
        """Both models' word embedding tables."""
        return [encoder.word_table for encoder in (self.teacher, self.student)]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Output, Output]:
        """Both models' outputs on the same tokens: (teacher's, student's)."""
        teacher = self.top(self.teacher(input_ids, attention_mask), attention_mask)
        student = self.top(self.student(input_ids, attention_mask), attention_mask)
        return teacher, student


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


def build_pair(teacher: Encoder, *, student_layers: int, query_size: int, topics: int) -> Pair:
    """A pair whose student starts from the teacher's embeddings and first layers.

    Raises:
        SettingsError: the student's layers do not divide the teacher's.
    """
    block_map(len(teacher.layers), student_layers)
    top = Top(teacher.hidden_size, query_size=query_size, topics=topics)
    return Pair(teacher, teacher.first_layers(student_layers), top).train()
