"""Metrics of each impression of a split: of a run's models, and of rankings that learned from no click."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor, nn

from newsbert_ray.config import ModelSettings, ScratchSettings
from newsbert_ray.data.reading import SplitData, World
from newsbert_ray.evaluation.metrics import impression_metrics
from newsbert_ray.evaluation.scoring import (
    Models,
    ProfileScores,
    count_clicks,
    encode_news,
    read_blocks,
    score_block,
)
from newsbert_ray.model.families import load_encoder
from newsbert_ray.model.pair import Top
from tests.recommendation_tables import METRICS, Array

Arrays = dict[str, Array]
"""Metrics by name, (I,) each; NaN where an impression has none."""


def score_models(models: Models, data: SplitData, world: World) -> dict[str, Arrays]:
    """Of each model."""
    news = encode_news(models, data, data.news_rows(), world=world)
    blocks = [(block, score_block(models, news, block, world=world)) for _, block in read_blocks(data)]
    return {model: _metrics((block, scores[model]) for block, scores in blocks) for model in models}


def score_words(data: SplitData) -> Arrays:
    """Of the TF-IDF profile of the user."""
    profiles = ProfileScores(data)
    return _metrics((block, profiles.score(block)) for _, block in read_blocks(data))


def score_popularity(data: SplitData) -> Arrays:
    """Of the number of clicks in training."""
    clicks = count_clicks(data).astype(np.float64)
    return _metrics((block, clicks[block.candidates]) for _, block in read_blocks(data))


def score_encoder(data: SplitData, teacher: str, layers: int | None) -> Arrays:
    """Of a pretrained encoder as it comes, or its first `layers`.

    The score is the cosine of a candidate and the mean of the clicked news, each the mean of its tokens.
    """
    model, manifest = ModelSettings(teacher_layers=layers), data.manifest
    encoder = load_encoder(
        teacher, model=model, scratch=ScratchSettings(), vocabulary=manifest.tokenizer.vocabulary
    )
    models = {"encoder": (encoder.eval(), _Mean(encoder.hidden_size).eval())}
    return score_models(models, data, World())["encoder"]


class _Mean(Top):
    """Means instead of attentive pooling: all queries are zero. Embeddings have length 1."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, query_size=1, topics=0, task="recommendation")
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def embed(self, hidden_states: tuple[Tensor, ...], attention_mask: Tensor) -> Tensor:
        return nn.functional.normalize(super().embed(hidden_states, attention_mask), dim=-1)


def _metrics(blocks: Iterable[tuple[Any, Array]]) -> Arrays:
    parts = [impression_metrics(scores, block.clicked, block.offsets) for block, scores in blocks]
    return {name: np.concatenate([part[name] for part in parts]) for name in METRICS}
