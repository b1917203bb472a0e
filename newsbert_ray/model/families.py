"""Loads encoders: by Hugging Face name, from a folder, from scratch, or as a run exported them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from newsbert_ray.config import ENCODERS, SCRATCH, ModelSettings, ScratchSettings
from newsbert_ray.files import first_line
from newsbert_ray.model.encoder import Encoder, EncoderError, quiet_transformers, set_layers
from newsbert_ray.model.unilm import is_unilm, load_unilm, unilm_config
from newsbert_ray.model.word_models import WORD_MODELS, load_word_model

if TYPE_CHECKING:
    from transformers import BertConfig, PretrainedConfig, PreTrainedModel


_POSITIONS_AFTER_PADDING = (
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert"),
    *("mpnet", "data2vec-text", "xmod"),
)
"""Model types whose position ids start after the padding id."""
_DROPOUTS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"),
    *("embedding_dropout", "mlp_dropout", "hidden_dropout", "activation_dropout"),
)


def load_encoder(
    name: str,
    *,
    model: ModelSettings,
    scratch: ScratchSettings,
    vocabulary: int,
    pad_id: int = 0,
    max_tokens: int = 0,
) -> Encoder:
    """The teacher's encoder, in training mode; EncoderError: not found, no safetensors, or too few layers,
    positions or tokens.

    Args:
        name: Hugging Face name or folder with safetensors weights; `scratch` for a small BERT with random
            weights (drawn from torch's generator).
        vocabulary: number of token ids in the shards; the encoder needs at least as many word embeddings.
        pad_id: padding id of the shards, for a scratch BERT.
        max_tokens: longest text in the shards; the encoder needs as many positions.
    """
    config = _scratch_config(scratch, vocabulary, pad_id) if name == SCRATCH else _pretrained_config(name)
    depth = int(config.num_hidden_layers)
    wanted = model.teacher_layers or depth
    if wanted > depth:
        raise EncoderError(f"model.teacher_layers {wanted}: '{name}' has only {depth} layers")
    set_layers(config, range(1, wanted + 1))
    for attribute in _DROPOUTS:
        if hasattr(config, attribute):
            setattr(config, attribute, model.dropout)
    if int(config.vocab_size) < vocabulary:
        raise EncoderError(
            f"'{name}' has {config.vocab_size} tokens, the shards use {vocabulary}; prepare the shards with "
            "this teacher"
        )
    positions = getattr(config, "max_position_embeddings", None)
    reserved = 2 if config.model_type in _POSITIONS_AFTER_PADDING else 0
    if isinstance(positions, int) and 0 < positions < max_tokens + reserved:
        raise EncoderError(
            f"'{name}' has {positions} positions, too few for texts of {max_tokens} tokens; "
            "prepare the shards with a smaller --max_tokens"
        )
    unilm = is_unilm(name)
    encoder = load_unilm(Path(name), cast("BertConfig", config)) if unilm else Encoder(_build(name, config))
    assert len(encoder.layers) == wanted, f"{len(encoder.layers)} layers instead of {wanted}"
    return encoder.train()


def encoder_depth(name: str, model: ModelSettings, scratch: ScratchSettings) -> int:
    """Number of layers of the teacher that `load_encoder` returns; EncoderError where there is none."""
    if model.teacher_layers is not None:
        return model.teacher_layers
    return scratch.layers if name == SCRATCH else int(_pretrained_config(name).num_hidden_layers)


def load_exported(folder: Path) -> Encoder:
    """The encoder of an exported student, in evaluation mode; KeyError, OSError, RuntimeError or ValueError
    if a file is missing or damaged."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] in WORD_MODELS:
        return load_word_model(folder, config)
    if is_unilm(folder):
        return load_unilm(folder, unilm_config(folder)).eval()
    return Encoder(_build(str(folder), _pretrained_config(str(folder)))).eval()


def _build(name: str, config: PretrainedConfig) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import AutoModel

    if name == SCRATCH:
        return cast("PreTrainedModel", AutoModel.from_config(config, attn_implementation="sdpa"))
    options: dict[str, Any] = {"config": config, "use_safetensors": True, "output_loading_info": True}
    options |= {"trust_remote_code": False, "dtype": torch.float32}
    try:
        with quiet_transformers():
            try:
                model, info = AutoModel.from_pretrained(name, attn_implementation="sdpa", **options)
            except ValueError as error:
                if "scaled_dot_product_attention" not in str(error):
                    raise
                model, info = AutoModel.from_pretrained(name, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise EncoderError(
            f"teacher '{name}': its weights cannot be loaded as safetensors ({first_line(error)}); "
            "give a Hugging Face name or a folder that holds config.json and model.safetensors, as "
            "save_pretrained of transformers writes them"
        ) from error
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise EncoderError(
            f"teacher '{name}': {len(missing)} weights are missing from its file ({', '.join(missing[:3])}) "
            "and would be random; give weights with the names of the model type in config.json"
        )
    return cast("PreTrainedModel", model)


def _pretrained_config(name: str) -> PretrainedConfig:
    from transformers import AutoConfig

    if is_unilm(name):
        return unilm_config(Path(name))
    try:
        config = cast("PretrainedConfig", AutoConfig.from_pretrained(name, trust_remote_code=False))
    except (OSError, ValueError, KeyError) as error:
        raise EncoderError(
            f"teacher '{name}': no encoder found ({first_line(error)}); give a Hugging Face name, a folder "
            f"with config.json and model.safetensors, or '{SCRATCH}'"
        ) from error
    if config.model_type not in ENCODERS:
        raise EncoderError(
            f"teacher '{name}': an encoder of type '{config.model_type}' is not supported; supported are "
            + ", ".join(ENCODERS)
        )
    return config


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
