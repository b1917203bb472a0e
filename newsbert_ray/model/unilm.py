"""UniLMv2 (unilm2-base-uncased, also called tnlrv3): BERT with one relative position bias for all layers.

Its checkpoints come in a form of their own, which transformers does not know; here they become BertModel's
weights and a bias that goes in with the attention mask. Names and numbers are those of Bao et al. 2020 and
their published configuration; the buckets are T5's.
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

from newsbert_ray.model.encoder import Encoder, EncoderError, States

if TYPE_CHECKING:
    from transformers import BertConfig, PreTrainedModel

MODEL_TYPE = "unilmv2"
"""`model_type` of a student's config.json; the original's has none."""
WEIGHTS = "model.safetensors"
_BIAS = "rel_pos_bias.weight"
_NOT_OURS = ("cls.", "pooler.", "embeddings.position_ids")
"""Parts of a checkpoint for its pre-training."""
_OWN = ("rel_pos_bins", "max_rel_pos")


class UniLMEncoder(Encoder):
    """BERT's layers under a bias that depends on how far a key stands from its query."""

    def __init__(self, backbone: PreTrainedModel, bias: nn.Linear, *, reach: int) -> None:
        """
        Args:
            bias: weight (heads, buckets): what is added to the scaled scores of each distance.
            reach: distance from which all count as one.
        """
        super().__init__(backbone)
        self.rel_pos_bias = bias
        self._reach = reach

    def position_bias(self, length: int) -> Tensor:
        """(heads, L, L): for each query (row) and key (column)."""
        weight = self.rel_pos_bias.weight
        buckets = relative_buckets(length, buckets=weight.shape[1], reach=self._reach).to(weight.device)
        return weight[:, buckets]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """As for every encoder; the mask goes in with the bias added."""
        bias = self.position_bias(input_ids.shape[1])
        hidden = torch.zeros_like(attention_mask, dtype=bias.dtype)
        hidden = hidden.masked_fill(attention_mask == 0, torch.finfo(bias.dtype).min)
        output = self.backbone(
            input_ids=input_ids, attention_mask=bias + hidden[:, None, None, :], output_hidden_states=True
        )
        return cast("tuple[Tensor, ...]", output.hidden_states)

    def read(self, input_ids: Tensor, attention_mask: Tensor, *, projections: bool = False) -> States:
        """As for every encoder; the projections know the bias."""
        found = super().read(input_ids, attention_mask, projections=projections)
        bias = self.position_bias(input_ids.shape[1]) if projections else None
        return States(found.hidden, tuple(layer._replace(bias=bias) for layer in found.projections))

    def pick_layers(self, numbers: Sequence[int]) -> Encoder:
        """As for every encoder, with a bias of its own."""
        layers = super().pick_layers(numbers)
        return UniLMEncoder(layers.backbone, copy.deepcopy(self.rel_pos_bias), reach=self._reach)

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors, in the checkpoints' own form."""
        from safetensors.torch import save_file

        config = self.backbone.config.to_dict()
        own = {"model_type": MODEL_TYPE, "rel_pos_bins": self.rel_pos_bias.weight.shape[1]}
        text = json.dumps({**config, **own, "max_rel_pos": self._reach}, indent=1)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        weights = {f"bert.{name}": value for name, value in self.backbone.state_dict().items()}
        weights[f"bert.{_BIAS}"] = self.rel_pos_bias.weight
        save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, folder / WEIGHTS)


def relative_buckets(length: int, *, buckets: int, reach: int) -> Tensor:
    """The bucket (L, L) of each distance from query (row) to key (column): half of them for keys behind, half
    for keys ahead; a half of each half exact, the rest logarithmic to `reach` (Raffel et al. 2020, 2.1)."""
    places = torch.arange(length)
    distance = places[None, :] - places[:, None]
    half = buckets // 2
    exact = half // 2
    far = distance.abs()
    scaled = torch.log(far.float().clamp_min(1) / exact) / math.log(reach / exact) * (half - exact)
    logarithmic = (exact + scaled.long()).clamp_max(half - 1)
    return torch.where(far < exact, far, logarithmic) + half * (distance > 0)


def is_unilm(name: str | Path) -> bool:
    """Whether a folder holds a checkpoint of UniLMv2's form, known by its bias."""
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
    """The sizes of a checkpoint as BERT's configuration, with `rel_pos_bins` and `max_rel_pos`.

    Raises:
        EncoderError: no config.json, or one that does not say them.
    """
    from transformers import BertConfig

    try:
        values: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        known = {"rel_pos_bins": 32, "max_rel_pos": 128, **values}
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        own = {name: int(known[name]) for name in (*sizes, *_OWN)}
        given = {
            n: v for n, v in known.items() if n not in ("model_type", "architectures", "transformers_version")
        }
        return BertConfig(**{**given, **own})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EncoderError(
            f"{folder}/config.json: does not tell the sizes of UniLMv2 ({type(error).__name__}: {error}); "
            "give the configuration that came with the checkpoint, as config.json"
        ) from error


def load_unilm(folder: Path, config: BertConfig) -> UniLMEncoder:
    """A checkpoint's first `config.num_hidden_layers` layers, whose dropout is the configuration's.

    Raises:
        EncoderError: weights are missing, or of other sizes.
    """
    from safetensors.torch import load_file
    from transformers import BertModel

    weights = bert_weights(load_file(folder / WEIGHTS))
    table = weights.pop(_BIAS, None)
    reach = int(cast("Any", config).max_rel_pos)
    backbone = BertModel._from_config(config, attn_implementation="sdpa", add_pooling_layer=False)  # type: ignore[no-untyped-call]
    depth = int(config.num_hidden_layers)
    kept = {name: value for name, value in weights.items() if _layer_of(name) < depth}
    wanted = backbone.state_dict()
    wrong = [name for name in wanted if name not in kept or kept[name].shape != wanted[name].shape]
    if table is None or wrong:
        raise EncoderError(
            f"{folder}/{WEIGHTS}: {len(wrong)} of UniLMv2's weights are missing or of another size "
            f"({', '.join(wrong[:3]) or _BIAS}); convert the whole checkpoint"
        )
    backbone.load_state_dict({name: kept[name] for name in wanted})
    bias = nn.Linear(table.shape[1], table.shape[0], bias=False)
    bias.weight.data.copy_(table)
    return UniLMEncoder(backbone, bias, reach=reach)


def bert_weights(checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors by BertModel's names, and the bias (heads, buckets) as `rel_pos_bias.weight`.

    Queries, keys and values may stand in one matrix (`qkv_linear`, rows in that order, with `q_bias` and
    `v_bias`): a bias of the keys adds the same to all scores of a query, so that it is left 0.
    """
    found: dict[str, Tensor] = {}
    for key, value in checkpoint.items():
        name = key.removeprefix("bert.")
        tensor = value.float()
        if name.startswith(_NOT_OURS):
            continue
        if name.endswith(_BIAS):
            found[_BIAS] = tensor
        elif name.endswith("self.qkv_linear.weight"):
            base = name.removesuffix("qkv_linear.weight")
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                found[f"{base}{part}.weight"] = rows
            found.setdefault(f"{base}key.bias", tensor.new_zeros(len(tensor) // 3))
        elif name.endswith(("self.q_bias", "self.v_bias")):
            part = "query" if name.endswith("q_bias") else "value"
            found[f"{name[: -len('q_bias')]}{part}.bias"] = tensor.reshape(-1)
        else:
            found[name] = tensor
    return found


def _layer_of(name: str) -> int:
    """The number of a weight's layer, from 0; -1 for the embeddings'."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["encoder", "layer"] else -1
