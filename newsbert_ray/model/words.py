"""What encoders of one layer over word embeddings have in common that are no Transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from newsbert_ray.model.encoder import Encoder, EncoderError, States

WEIGHTS = "model.safetensors"
E = TypeVar("E", bound="WordsEncoder")


class WordsEncoder(Encoder):
    """Word embeddings under one layer, D wide; a subclass has the layer."""

    kind: ClassVar[str]
    """`model_type` of its exported config.json."""
    lacks: ClassVar[str]
    """How its lack of attention is said."""
    words: nn.Embedding

    @property
    def word_table(self) -> nn.Embedding:
        """The word embedding table."""
        return self.words

    def read(self, input_ids: Tensor, attention_mask: Tensor, *, projections: bool = False) -> States:
        """Hidden states; there is no attention that a loss looks into.

        Raises:
            EncoderError: projections are asked for.
        """
        if projections:
            raise EncoderError(f"losses over attention need a Transformer; {self.lacks}")
        return States(self(input_ids, attention_mask))

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        from safetensors.torch import save_file

        config = {
            "model_type": self.kind,
            "vocab_size": self.words.num_embeddings,
            "embedding_size": self.words.embedding_dim,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": 1,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        save_file({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, folder / WEIGHTS)


def load_words_encoder(folder: Path, config: Mapping[str, Any], build: Callable[[nn.Embedding], E]) -> E:
    """What `save` wrote, in evaluation mode.

    Args:
        build: makes the encoder of its word table.
    Raises:
        KeyError, OSError, RuntimeError: it is not whole.
    """
    from safetensors.torch import load_file

    with torch.device("meta"):
        words = nn.Embedding(config["vocab_size"], config["embedding_size"])
    encoder = build(words.to_empty(device="cpu"))
    encoder.load_state_dict(load_file(folder / WEIGHTS))
    return encoder.eval()
