"""A distilled news encoder with attentive pooling, and its topic classifier, for transformers' Auto classes.

newsbert_ray writes this file beside the weights: load the folder with trust_remote_code=True. Without it,
AutoModel gives the encoder alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    SequenceClassifierOutput,
)

from newsbert_ray.model.pooling import AttentivePooling


class NewsConfig(PretrainedConfig):  # type: ignore[misc]
    """Of a student without layers. Of another, the encoder's is used; this one tells pipelines its name."""

    model_type = "newsbert_student"


class WordVectors(nn.Module):
    """The encoder of a student without layers."""

    base_model_prefix = "words"

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)

    def get_input_embeddings(self) -> nn.Module:
        """The table of token embeddings."""
        return self.words

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace it."""
        self.words = value  # type: ignore[assignment]

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutput:
        """(B, L) token ids to their vectors (B, L, D)."""
        states = self.words(input_ids)
        return BaseModelOutput(states, (states,))


class NewsModel(PreTrainedModel):  # type: ignore[misc]
    """The encoder; `pooler_output` is the news embedding (B, D)."""

    _supports_sdpa = True
    # The classifier's head is in the same file.
    _keys_to_ignore_on_load_unexpected = [r"^dense\."]  # noqa: RUF012, as in the base class

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        build: Any = WordVectors if config.model_type == NewsConfig.model_type else AutoModel.from_config
        try:
            encoder = build(config)
        except ValueError:  # this encoder has no sdpa, which this class has asked for
            encoder = build(config, attn_implementation="eager")
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None
        # Under the encoder's own name in transformers, so that AutoModel finds it in the same file.
        self.encoder_name = encoder.base_model_prefix
        setattr(self, self.encoder_name, encoder)
        self.pooling = AttentivePooling(config.hidden_size, config.query_size)
        self._add_head(config)
        self.post_init()

    def _add_head(self, config: Any) -> None:
        """No head on the embedding."""

    def get_input_embeddings(self) -> nn.Module:
        """The table of token embeddings."""
        table: nn.Module = getattr(self, self.encoder_name).get_input_embeddings()
        return table

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace it."""
        getattr(self, self.encoder_name).set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """(B, L) token ids and mask, 1 where a token is real."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        options = {"output_hidden_states": True} if output_hidden_states else {}
        outputs = getattr(self, self.encoder_name)(input_ids=input_ids, attention_mask=mask, **options)
        states = outputs.last_hidden_state
        hidden_states = outputs.hidden_states if output_hidden_states else None
        return BaseModelOutputWithPooling(states, self.pooling(states, mask), hidden_states)


class NewsForSequenceClassification(NewsModel):
    """The topic classifier: a dense layer on the news embedding."""

    config_class = NewsConfig

    def _add_head(self, config: Any) -> None:
        self.dense = nn.Linear(config.hidden_size, config.num_labels)
        AutoModelForSequenceClassification.register(NewsConfig, type(self), exist_ok=True)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits (B, topics); with labels (B,) also their mean cross entropy."""
        outputs = super().forward(input_ids, attention_mask, output_hidden_states)
        logits = self.dense(outputs.pooler_output)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states)
