"""What people call the methods."""

from __future__ import annotations

from collections.abc import Mapping

NAMES: Mapping[str, str] = {
    "finetune": "fine-tuned",
    "newsbert": "NewsBERT",
    "twinbert": "TwinBERT",
    "tinybert": "TinyBERT",
    "pkd": "BERT-PKD",
    "distilbert": "DistilBERT",
    "minilm": "MiniLM",
    "bilstm_soft": "BiLSTM-soft",
    "glove": "GloVe",
    "mutual": "mutual learning",
    "disjoint": "NewsBERT, disjoint",
    "no_momentum": "NewsBERT without momentum",
    "no_soft_labels": "NewsBERT without soft labels",
    "no_hidden": "NewsBERT without hidden losses",
    "no_embedding": "NewsBERT without the embeddings' loss",
    "no_layers": "NewsBERT without the layers' loss",
    "no_news_embedding": "NewsBERT without the news embeddings' loss",
}
"""Systems as a person calls them."""
