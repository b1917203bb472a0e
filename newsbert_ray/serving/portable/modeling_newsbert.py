"""A distilled news encoder under attentive pooling, and its topic classifier, for transformers' Auto classes.

Exported by newsbert_ray into the folder that holds the weights: load it with trust_remote_code=True. Without
it, AutoModel gives the encoder alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput

from newsbert_ray.model.pooling import AttentivePooling


class NewsModel(PreTrainedModel):
    """The encoder; `pooler_output` is the news embedding (B, D)."""

    _supports_sdpa = True
    # The classifier's head lies in the same file.
    _keys_to_ignore_on_load_unexpected = [r"^dense\."]  # noqa: RUF012, the base class has it so

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        encoder = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None
        # Under the encoder's own name in its library, so that AutoModel finds it in the same file.
        self.encoder_name = encoder.base_model_prefix
        setattr(self, self.encoder_name, encoder)
        self.pooling = AttentivePooling(config.hidden_size, config.query_size)
        self._add_head(config)
        self.post_init()  # type: ignore[no-untyped-call]

    def _add_head(self, config: Any) -> None:
        """Nothing stands on the embedding."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """(B, L) token ids and mask, 1 where a token is real."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        states = getattr(self, self.encoder_name)(input_ids=input_ids, attention_mask=mask).last_hidden_state
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=self.pooling(states, mask))


class NewsForSequenceClassification(NewsModel):  # type: ignore[no-untyped-call]
    """The topic classifier: a dense layer on the news embedding."""

    def _add_head(self, config: Any) -> None:
        self.dense = nn.Linear(config.hidden_size, config.num_labels)

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> SequenceClassifierOutput:
        """Logits (B, topics)."""
        embedding = super().forward(input_ids, attention_mask).pooler_output
        return SequenceClassifierOutput(logits=self.dense(embedding))
