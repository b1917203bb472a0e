"""Attentive pooling as a module of Sentence Transformers.

Exported by newsbert_ray into the folder that holds the weights: load it with trust_remote_code=True.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sentence_transformers.models import Module

from newsbert_ray.model.pooling import AttentivePooling


class NewsPooling(Module):  # type: ignore[misc]
    """Tokens' states to the news embedding."""

    config_keys = ["hidden_size", "query_size"]  # noqa: RUF012

    def __init__(self, hidden_size: int, query_size: int) -> None:
        super().__init__()
        self.hidden_size, self.query_size = hidden_size, query_size
        self.pooling = AttentivePooling(hidden_size, query_size)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds `sentence_embedding` (B, D) to token_embeddings (B, L, D) and attention_mask (B, L)."""
        states, mask = features["token_embeddings"], features["attention_mask"]
        features["sentence_embedding"] = self.pooling(states, mask)
        return features

    def get_embedding_dimension(self) -> int:
        """D."""
        return self.hidden_size

    get_sentence_embedding_dimension = get_embedding_dimension

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write config.json and the weights; copy this code into the model's folder, which loads it."""
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)
        here = Path(__file__)
        for name in (here.name, "attentive_pooling.py"):
            shutil.copyfile(here.with_name(name), Path(output_path).absolute().parent / name)

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs: Any) -> NewsPooling:
        """What `save` wrote."""
        names = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        options = {name: kwargs[name] for name in names if name in kwargs}
        model = cls(**cls.load_config(model_name_or_path, **options))
        loaded: NewsPooling = cls.load_torch_weights(model_name_or_path, model=model, **options)
        return loaded
