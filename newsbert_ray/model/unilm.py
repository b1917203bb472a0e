"""UniLMv2 (unilm2-base-uncased, also called tnlrv3): BERT with one relative position bias for all layers.

transformers cannot read its checkpoints. Here they become weights of BertModel and a bias that is added to
the attention mask. Names and numbers follow Bao et al. 2020 and their configuration; the buckets are T5's.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from newsbert_ray.model.encoder import WEIGHTS, Encoder, EncoderError, States, write_encoder

if TYPE_CHECKING:
    from transformers import BertConfig, PreTrainedModel

MODEL_TYPE = "unilmv2"
"""`model_type` in an exported student's config.json; the original has none."""
_BIAS = "rel_pos_bias.weight"
_UNUSED = ("cls.", "pooler.", "embeddings.position_ids")
"""Parts of a checkpoint that only pre-training needs."""


class UniLMEncoder(Encoder):
    """BERT with an attention bias that depends on the distance between key and query."""

    _buckets: Tensor
    """Of all lengths, on the encoder's device: a GPU would otherwise wait for each batch's copy."""

    def __init__(self, backbone: PreTrainedModel, bias: nn.Linear, *, reach: int) -> None:
        """The weight of `bias` (heads, buckets) is added to the scaled scores by bucket of distance; all
        distances from `reach` on share one bucket."""
        super().__init__(backbone)
        self.rel_pos_bias = bias
        self._reach = reach
        buckets = relative_buckets(
            int(backbone.config.max_position_embeddings), buckets=bias.weight.shape[1], reach=reach
        )
        self.register_buffer("_buckets", buckets, persistent=False)

    def position_bias(self, length: int) -> Tensor:
        """Bias (heads, L, L) of each query (row) and key (column)."""
        return self.rel_pos_bias.weight[:, self._buckets[:length, :length]]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        bias = self.position_bias(input_ids.shape[1])
        padding = torch.zeros_like(attention_mask, dtype=bias.dtype)
        padding = padding.masked_fill(attention_mask == 0, torch.finfo(bias.dtype).min)
        output = self.backbone(
            input_ids=input_ids, attention_mask=bias + padding[:, None, None, :], output_hidden_states=True
        )
        return cast("tuple[Tensor, ...]", output.hidden_states)

    def encode(self, input_ids: Tensor, attention_mask: Tensor, *, projections: bool = False) -> States:
        """As in `Encoder`; the projections include the bias."""
        states = super().encode(input_ids, attention_mask, projections=projections)
        bias = self.position_bias(input_ids.shape[1]) if projections else None
        return States(states.hidden, tuple(layer._replace(bias=bias) for layer in states.projections))

    def pick_layers(self, numbers: Sequence[int]) -> Encoder:
        layers = super().pick_layers(numbers)
        return UniLMEncoder(layers.backbone, copy.deepcopy(self.rel_pos_bias), reach=self._reach)

    def save(self, folder: Path) -> None:
        config = {
            **self.backbone.config.to_dict(),
            "model_type": MODEL_TYPE,
            "rel_pos_bins": self.rel_pos_bias.weight.shape[1],
            "max_rel_pos": self._reach,
        }
        weights = {f"bert.{name}": value for name, value in self.backbone.state_dict().items()}
        weights[f"bert.{_BIAS}"] = self.rel_pos_bias.weight
        write_encoder(folder, config, weights)


def relative_buckets(length: int, *, buckets: int, reach: int) -> Tensor:
    """Bucket (L, L) of each distance from query (row) to key (column) (Raffel et al. 2020, section 2.1).

    One half of the buckets is for keys before the query, the other for keys after it. In each half the first
    half of the buckets is one per distance, the rest grow logarithmically up to `reach`.
    """
    positions = torch.arange(length)
    distance = positions[None, :] - positions[:, None]
    half = buckets // 2
    exact = half // 2
    far = distance.abs()
    scaled = torch.log(far.float().clamp_min(1) / exact) / math.log(reach / exact) * (half - exact)
    logarithmic = (exact + scaled.long()).clamp_max(half - 1)
    return torch.where(far < exact, far, logarithmic) + half * (distance > 0)


def is_unilm(name: str | Path) -> bool:
    """Whether a folder holds a UniLMv2 checkpoint, recognised by its position bias."""
    from safetensors import SafetensorError, safe_open

    path = Path(name) / WEIGHTS
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            return any(key.endswith(_BIAS) for key in file.keys())  # noqa: SIM118 (it is no mapping)
    except (OSError, SafetensorError):
        return False


def unilm_config(folder: Path) -> BertConfig:
    """A checkpoint's configuration as BERT's, with `rel_pos_bins` and `max_rel_pos`; EncoderError if
    config.json is missing or lacks a size."""
    from transformers import BertConfig

    try:
        values: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        bias_sizes = {"rel_pos_bins": 32, "max_rel_pos": 128}
        known = {**bias_sizes, **values}
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        sizes_as_int = {name: int(known[name]) for name in (*sizes, *bias_sizes)}
        for name in ("model_type", "architectures", "transformers_version"):
            known.pop(name, None)
        return BertConfig(**{**known, **sizes_as_int})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EncoderError(
            f"{folder}/config.json: lacks UniLMv2's sizes ({type(error).__name__}: {error}); use the "
            "configuration that came with the checkpoint, renamed to config.json"
        ) from error


def load_unilm(folder: Path, config: BertConfig) -> UniLMEncoder:
    """The first `config.num_hidden_layers` layers of a checkpoint; EncoderError if weights are missing."""
    from safetensors.torch import load_file
    from transformers import BertModel

    weights = bert_weights(load_file(folder / WEIGHTS))
    table = weights.pop(_BIAS, None)
    reach = int(cast("Any", config).max_rel_pos)
    backbone = BertModel._from_config(config, attn_implementation="sdpa", add_pooling_layer=False)
    wanted = backbone.state_dict()  # the weights of later layers are left out
    wrong = [name for name in wanted if name not in weights or weights[name].shape != wanted[name].shape]
    if table is None or wrong:
        raise EncoderError(
            f"{folder}/{WEIGHTS}: {len(wrong)} of UniLMv2's weights are missing or have another size "
            f"({', '.join(wrong[:3]) or _BIAS}); convert the complete checkpoint"
        )
    backbone.load_state_dict({name: weights[name] for name in wanted})
    bias = nn.Linear(table.shape[1], table.shape[0], bias=False)
    bias.weight.data.copy_(table)
    return UniLMEncoder(backbone, bias, reach=reach)


def bert_weights(checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors under BertModel's names, the bias (heads, buckets) as `rel_pos_bias.weight`.

    Queries, keys and values may be one matrix (`qkv_linear`, rows in that order, with `q_bias` and `v_bias`).
    A key bias would add the same to all scores of a query; it is 0.
    """
    weights: dict[str, Tensor] = {}
    for key, value in checkpoint.items():
        name = key.removeprefix("bert.")
        tensor = value.float()
        if name.startswith(_UNUSED):
            continue
        if name.endswith(_BIAS):
            weights[_BIAS] = tensor
        elif name.endswith("self.qkv_linear.weight"):
            base = name.removesuffix("qkv_linear.weight")
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                weights[f"{base}{part}.weight"] = rows
            weights.setdefault(f"{base}key.bias", tensor.new_zeros(len(tensor) // 3))
        elif name.endswith(("self.q_bias", "self.v_bias")):
            part = "query" if name.endswith("q_bias") else "value"
            weights[f"{name[: -len('q_bias')]}{part}.bias"] = tensor.reshape(-1)
        else:
            weights[name] = tensor
    return weights
