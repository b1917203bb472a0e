"""An encoder as a stack of layers: tokens in, embedding output and every layer's hidden states out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROJECTIONS = (
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),
)
"""What encoders call the linear maps that give an attention its queries, keys and values."""


class Projections(NamedTuple):
    """What one layer's attention works on: queries, keys and values, each (B, heads, L, D / heads), and what
    is added to the scaled scores, (heads, L, L), where positions count relative to each other."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None = None

    def float(self) -> Projections:
        """The same in fp32."""
        bias = None if self.bias is None else self.bias.float()
        return Projections(self.query.float(), self.key.float(), self.value.float(), bias)


class States(NamedTuple):
    """What an encoder makes of texts: n + 1 hidden states (B, L, D), and if asked n layers' projections."""

    hidden: tuple[Tensor, ...]
    projections: tuple[Projections, ...] = ()


class EncoderError(ValueError):
    """An encoder that cannot be had or cannot serve; the text says why and what to do."""


class Encoder(nn.Module):
    """A Hugging Face encoder, seen as an embedding layer and a list of Transformer layers."""

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        if getattr(backbone, "pooler", None) is not None:
            cast("Any", backbone).pooler = None  # unused: news embeddings come from attentive pooling
        self.backbone = backbone

    def save(self, folder: Path) -> None:
        """Write it as a Hugging Face folder (config.json, model.safetensors)."""
        self.backbone.save_pretrained(folder)

    @property
    def layers(self) -> nn.ModuleList:
        """The Transformer layers, first to last."""
        return _find_layers(self.backbone)[2]

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.backbone.config.hidden_size)

    @property
    def word_table(self) -> nn.Embedding:
        """The word embedding table."""
        return cast("nn.Embedding", self.backbone.get_input_embeddings())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Hidden states of every level.

        Args:
            input_ids: (B, L) token ids.
            attention_mask: (B, L) 1 where a token is real.
        Returns:
            n + 1 tensors (B, L, D): the embedding layer's output, then each layer's.
        """
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        return cast("tuple[Tensor, ...]", output.hidden_states)

    @property
    def heads(self) -> int:
        """Attention heads of a layer."""
        config = self.backbone.config
        return int(getattr(config, "num_attention_heads", 0) or config.n_heads)

    def read(self, input_ids: Tensor, attention_mask: Tensor, *, projections: bool = False) -> States:
        """Hidden states as `forward` gives them; with `projections` also each layer's queries, keys, values.

        Raises:
            EncoderError: the encoder does not say where its projections are.
        """
        if not projections:
            return States(self(input_ids, attention_mask))
        caught: list[dict[int, Tensor]] = [{} for _ in self.layers]
        handles = [
            module.register_forward_hook(_catcher(found, number))
            for layer, found in zip(self.layers, caught, strict=True)
            for number, module in enumerate(_projection_maps(layer))
        ]
        try:
            hidden = self(input_ids, attention_mask)
        finally:
            for handle in handles:
                handle.remove()
        heads = self.heads
        split = [
            Projections(*(found[n].view(*found[n].shape[:2], heads, -1).transpose(1, 2) for n in range(3)))
            for found in caught
        ]
        return States(hidden, tuple(split))

    def pick_layers(self, numbers: Sequence[int]) -> Encoder:
        """A copy with the embeddings and some layers, by their numbers from 1: how a student starts (NewsBERT
        4.1: the first ones)."""
        backbone = copy.deepcopy(self.backbone)
        parent, name, layers = _find_layers(backbone)
        setattr(parent, name, nn.ModuleList([layers[number - 1] for number in numbers]))
        backbone.config.num_hidden_layers = len(numbers)
        return Encoder(backbone)


def _find_layers(backbone: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """The one list of as many modules as the configuration says layers: where it hangs, its name, the
    list."""
    config = cast("Any", backbone).config
    depth = int(config.num_hidden_layers)
    found = [
        (parent, name, child)
        for parent in backbone.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == depth
    ]
    if not found:
        raise EncoderError(
            f"an encoder of type '{config.model_type}' shares or hides its layers; momentum needs one "
            "module a "
            "layer, as in BERT, DistilBERT, RoBERTa, MPNet or ELECTRA"
        )
    return found[0]


def _projection_maps(layer: nn.Module) -> list[nn.Module]:
    named = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
    for names in _PROJECTIONS:
        if all(name in named for name in names):
            return [named[name] for name in names]
    raise EncoderError(
        "losses over attention need an encoder with separate query, key and value maps, as BERT, RoBERTa, "
        "DistilBERT, MPNet and ELECTRA have them"
    )


def _catcher(found: dict[int, Tensor], number: int) -> Any:
    def catch(_module: nn.Module, _given: Any, output: Tensor) -> None:
        found[number] = output

    return catch
