"""Retrieval: a split's query-text pairs -> scores -> AUC over all of them."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch

from newsbert_ray.data.reading import read_pairs
from newsbert_ray.data.shards import Manifest, Split
from newsbert_ray.data.texts import read_texts
from newsbert_ray.evaluation.encoding import encode_texts
from newsbert_ray.evaluation.metrics import pooled_auc
from newsbert_ray.evaluation.place import Models, Pace, Place, Scores
from newsbert_ray.model.heads import PairHead


@torch.inference_mode()
def score_matches(
    models: Models, folder: Path, manifest: Manifest, split: Split, *, place: Place, pace: Pace | None = None
) -> Scores:
    """AUC of each model over all pairs of a split: {"auc", "auc_error", "rows"}.

    Each different text of a shard is encoded once by each model; memory holds one shard's embeddings.
    """
    table = read_texts(folder, manifest)
    scores: dict[str, list[torch.Tensor]] = {name: [] for name in models}
    clicked = []
    for pairs in read_pairs(folder, manifest, split):
        rows, places = np.unique(np.concatenate([pairs.queries, pairs.texts]), return_inverse=True)
        pad_id = manifest.tokenizer.pad_id
        found = encode_texts(models, table, rows, pad_id=pad_id, place=place, pace=pace)
        queries, texts = (torch.from_numpy(half).to(place.device) for half in np.split(places, 2))
        for name, (_, top) in models.items():
            embedding = found[name]
            head = cast("PairHead", top.head)
            scores[name].append(head.scores(embedding[queries], embedding[texts]).double().cpu())
        clicked.append(pairs.clicked)
    labels = np.concatenate(clicked)
    return {name: pooled_auc(torch.cat(parts).numpy(), labels) for name, parts in scores.items()}
