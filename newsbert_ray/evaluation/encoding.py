"""Texts of the table -> embeddings, each text once by each model, over all workers. Knows no task."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from newsbert_ray.data.batches import cut_buckets
from newsbert_ray.data.reading import EVALUATION_TOKENS
from newsbert_ray.data.texts import TextTable
from newsbert_ray.evaluation.place import Models, Pace, Place, device_seconds


@torch.inference_mode()
def encode_texts(
    models: Models,
    table: TextTable,
    rows: npt.NDArray[np.integer],
    *,
    pad_id: int,
    place: Place,
    pace: Pace | None = None,
) -> Mapping[str, Tensor]:
    """Embeddings of texts, the same bits on every worker and for any number of workers.

    Args:
        rows: (M,) different rows of the table.
        pace: gets this worker's titles and seconds added.
    Returns:
        name -> (M, D), in the order of `rows`, on the place's device.
    """
    lengths = table.lengths(rows)
    order = np.argsort(lengths, kind="stable")
    found = {
        name: torch.zeros(len(rows), encoder.hidden_size, device=place.device)
        for name, (encoder, _) in models.items()
    }
    for number, (start, stop) in enumerate(cut_buckets(lengths[order], budget=EVALUATION_TOKENS)):
        if not place.mine(number):
            continue
        chosen = order[start:stop]
        both = table.ids(rows[chosen], pad_id=pad_id)
        ids, mask = (torch.from_numpy(array).to(place.device) for array in both)
        where = torch.from_numpy(chosen).to(place.device)
        if pace:
            pace.titles += len(chosen)
        for name, (encoder, top) in models.items():
            began = device_seconds(place.device) if pace else 0.0
            attention_mask = mask.long()
            found[name][where] = top.embed(encoder(ids, attention_mask), attention_mask)
            if pace:
                pace.charge(name, began, place.device)
    return {name: place.sum(embedding) for name, embedding in found.items()}
