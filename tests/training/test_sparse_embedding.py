"""Gradients of word embeddings: equal to autograd's dense ones."""

from __future__ import annotations

from itertools import islice

import torch

from newsbert_ray.config import TrainSettings
from newsbert_ray.data.reading import Update, World, make_schedule, read_updates
from newsbert_ray.data.shards import read_manifest
from newsbert_ray.model.assemble import assemble_pair
from newsbert_ray.training.sparse_embedding import SparseEmbeddingGradients
from newsbert_ray.training.step import Learner, build_learner, train_step
from tests.conftest import MakeSettings


def start(
    settings: TrainSettings, *, rank: int = 0, world_size: int = 1, steps: int = 12
) -> tuple[Learner, list[Update]]:
    """A fresh learner and its first updates."""
    manifest = read_manifest(settings.data)
    schedule = make_schedule(settings, manifest, World(rank, world_size))
    learner = build_learner(assemble_pair(settings, manifest), settings, total_steps=schedule.total_steps)
    return learner, list(islice(read_updates(schedule), steps))


def test_equal_to_autograds_dense_gradients(make_settings: MakeSettings) -> None:
    """Touching only a batch's rows must give Adam the gradient that autograd would."""
    settings = make_settings()
    learner, updates = start(settings)
    manifest = read_manifest(settings.data)
    dense = build_learner(assemble_pair(settings, manifest), settings, total_steps=12)
    for table in dense.sparse_embedding.embeddings:
        table.sparse = False
    dense.sparse_embedding = SparseEmbeddingGradients([])
    for update in updates:
        train_step(learner, update.parts, step=update.step)
        train_step(dense, update.parts, step=update.step)
    for a, b in zip(learner.pair.parameters(), dense.pair.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
