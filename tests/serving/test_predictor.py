"""What tokens share is made once: the same embeddings, fewer tokens through the first layer's maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

from newsbert_ray.data.tokenizer import load_tokenizer
from newsbert_ray.model.encoder import Encoder
from newsbert_ray.model.saved import load_student
from newsbert_ray.serving import predictor as encoding
from newsbert_ray.serving.predictor import Contextless, TextEncoder

TEXTS = [f"the team wins again in week {n % 9} of the season " + "and more " * (n % 5) for n in range(300)]


def encoder_of(run: Path) -> TextEncoder:
    """A new one, which no other test has seen."""
    encoder, top, described = load_student(run / "student")
    return TextEncoder(encoder, top, load_tokenizer(str(run / "student")), longest=described["max_tokens"])


def projected(encoder: TextEncoder, texts: list[str]) -> tuple[Any, int]:
    """Embeddings, and how many tokens went through the first layer's map for keys."""
    seen = 0

    def count(_module: Any, given: Any, _output: Any) -> None:
        nonlocal seen
        seen += given[0].shape[:-1].numel()

    attention: Any = encoder.encoder.layers[0]
    handle = attention.attention.self.key.register_forward_hook(count)
    found = encoder.encode(texts)
    handle.remove()
    return found, seen


def test_same_embeddings_from_fewer_tokens(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each different token at its position goes through the maps once for all texts, in each group anew, so
    that memory is bounded."""
    encoder = encoder_of(run)
    ids = list(encoder.tokenizer.encode(TEXTS, max_tokens=encoder.longest))
    pairs = {(place, token) for one in ids for place, token in enumerate(one)}
    shared, few = projected(encoder, TEXTS)
    assert few <= len(pairs) + encoder.longest  # and padding, at most one at each position
    monkeypatch.setattr(encoding, "FEW", 10**6)
    plain, all_tokens = projected(encoder, TEXTS)
    assert all_tokens >= sum(map(len, ids)) > 5 * few
    assert np.abs(plain).max() > 0.1
    np.testing.assert_allclose(shared, plain, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(encoding, "FEW", 8)
    monkeypatch.setattr(encoding, "GROUP", 200)
    monkeypatch.setattr(encoding, "SHARED", 1000)
    monkeypatch.setattr(encoding, "TOKENS", 300)
    again, more = projected(encoder, TEXTS)
    assert few < more < all_tokens / 2
    np.testing.assert_allclose(again, plain, rtol=1e-5, atol=1e-6)


def test_products_of_words_and_positions_add_up() -> None:
    """Also where scales, shifts, biases and a text's type are not what they begin as."""
    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    encoder = Encoder(BertModel(config)).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    shared = Contextless.of(encoder)
    assert shared is not None
    batches = [torch.randint(30, (6, length), generator=generator) for length in (3, 7)]
    with torch.inference_mode(), shared.remembered([ids.numpy() for ids in batches]) as turns:
        found = [encoder(ids, torch.ones_like(ids)) for ids, _ in zip(batches, turns, strict=True)]
    for ids, states in zip(batches, found, strict=True):
        for one, other in zip(states, encoder(ids, torch.ones_like(ids)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_modules_stand_again_where_they_stood() -> None:
    """Also after an error, or the next text would be answered from the last batch's tables."""
    config = BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    encoder = Encoder(BertModel(config)).eval()
    shared = Contextless.of(encoder)
    assert shared is not None
    ids = torch.tensor([[1, 2, 3], [3, 2, 1]])
    mask = torch.ones_like(ids)

    def fail() -> None:
        with shared.remembered([ids.numpy()]) as turns:
            next(turns)
            torch.testing.assert_close(encoder(ids, mask)[-1], before)
            raise RuntimeError("stop")

    with torch.inference_mode():
        before = encoder(ids, mask)[-1]
        with pytest.raises(RuntimeError, match="stop"):
            fail()
        torch.testing.assert_close(encoder(ids.flip(0), mask)[-1], before.flip(0))


def test_other_encoders_read_every_token() -> None:
    """Only where the first layer is known to see one token at a time."""
    config = DistilBertConfig(vocab_size=50, dim=8, hidden_dim=16, n_layers=1, n_heads=2)
    assert Contextless.of(Encoder(DistilBertModel(config))) is None
