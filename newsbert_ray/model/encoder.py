"""First n layers of a pretrained encoder: tokens in, embedding output and every layer's hidden states out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from newsbert_ray.config import SCRATCH, ModelSettings, ScratchSettings

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet")
"""Model types whose positions start after their padding id."""
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")


class EncoderError(ValueError):
    """An encoder that cannot be had or cannot serve; the text says why and what to do."""


class Encoder(nn.Module):
    """A Hugging Face encoder, seen as an embedding layer and a list of Transformer layers."""

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        if getattr(backbone, "pooler", None) is not None:
            cast("Any", backbone).pooler = None  # unused: news embeddings come from attentive pooling
        self.backbone = backbone

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

    def first_layers(self, count: int) -> Encoder:
        """A copy with the embeddings and the first `count` layers: how a student starts (NewsBERT 4.1)."""
        backbone = copy.deepcopy(self.backbone)
        parent, name, layers = _find_layers(backbone)
        setattr(parent, name, nn.ModuleList(list(layers)[:count]))
        backbone.config.num_hidden_layers = count
        return Encoder(backbone)


def load_encoder(
    name: str,
    *,
    model: ModelSettings,
    scratch: ScratchSettings,
    vocabulary: int,
    pad_id: int = 0,
    max_tokens: int = 0,
) -> Encoder:
    """The teacher's encoder, in training mode.

    Args:
        name: Hugging Face name or folder with safetensors weights; `scratch` for a small BERT with random
            weights (drawn from torch's generator).
        vocabulary: token ids in the shards; the embedding table must have at least as many rows.
        pad_id: id of the shards' padding, for a scratch BERT.
        max_tokens: longest title in the shards; the encoder must have as many positions.
    Raises:
        EncoderError: not found, no safetensors, too few layers, too small a vocabulary, or no list of layers.
    """
    config = _scratch_config(scratch, vocabulary, pad_id) if name == SCRATCH else _pretrained_config(name)
    depth = int(config.num_hidden_layers)
    wanted = model.teacher_layers or depth
    if wanted > depth:
        raise EncoderError(f"model.teacher_layers {wanted}: '{name}' has only {depth} layers")
    config.num_hidden_layers = wanted
    for attribute in _DROPOUTS:
        if hasattr(config, attribute):
            setattr(config, attribute, model.dropout)
    if int(config.vocab_size) < vocabulary:
        raise EncoderError(
            f"'{name}' knows {config.vocab_size} tokens, the shards use {vocabulary}; prepare them "
            "with this teacher"
        )
    positions = getattr(config, "max_position_embeddings", None)
    reserved = 2 if config.model_type in _POSITIONS_AFTER_PADDING else 0
    if isinstance(positions, int) and 0 < positions < max_tokens + reserved:
        raise EncoderError(
            f"'{name}' has {positions} positions, too few for texts of {max_tokens} tokens; "
            "prepare the shards with a smaller --max_tokens"
        )
    encoder = Encoder(_build(name, config))
    found = len(encoder.layers)
    assert found == wanted, f"{found} layers found, {wanted} asked"
    return encoder.train()


def load_exported(folder: str | Path) -> Encoder:
    """The encoder in a Hugging Face folder that a run exported, in evaluation mode."""
    return Encoder(_build(str(folder), _pretrained_config(str(folder)))).eval()


def _build(name: str, config: PretrainedConfig) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import AutoModel

    if name == SCRATCH:
        blank = AutoModel.from_config(config, attn_implementation="sdpa")  # type: ignore[no-untyped-call]
        return cast("PreTrainedModel", blank)
    options: dict[str, Any] = {"config": config, "use_safetensors": True, "output_loading_info": True}
    options |= {"trust_remote_code": False, "dtype": torch.float32}
    try:
        try:
            found, info = AutoModel.from_pretrained(name, attn_implementation="sdpa", **options)
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            found, info = AutoModel.from_pretrained(name, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise EncoderError(
            f"teacher '{name}': its weights cannot be loaded as safetensors ({_first_line(error)}); "
            "give a Hugging Face name or a folder that holds config.json and model.safetensors"
        ) from error
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise EncoderError(
            f"teacher '{name}': {len(missing)} of its weights are not in its file ({', '.join(missing[:3])}) "
            "and would be random; give weights whose names are those of its config.json's model type"
        )
    return cast("PreTrainedModel", found)


def _pretrained_config(name: str) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        return cast("PretrainedConfig", AutoConfig.from_pretrained(name, trust_remote_code=False))
    except (OSError, ValueError, KeyError) as error:
        raise EncoderError(
            f"teacher '{name}': no encoder found ({_first_line(error)}); give a Hugging Face name, a "
            "folder with "
            f"config.json and model.safetensors, or '{SCRATCH}'"
        ) from error


def _scratch_config(scratch: ScratchSettings, vocabulary: int, pad_id: int) -> PretrainedConfig:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=scratch.hidden,
        num_hidden_layers=scratch.layers,
        num_attention_heads=scratch.heads,
        intermediate_size=scratch.feed_forward,
        max_position_embeddings=512,
        pad_token_id=pad_id,
    )


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


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
