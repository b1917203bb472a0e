"""A student loaded from its run: embeddings, topics and rankings; the token cache changes no number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

import newsbert_ray
from newsbert_ray.config import SettingsError
from newsbert_ray.model.encoder import Encoder, EncoderError
from newsbert_ray.model.heads import ClickHead, TopicHead
from newsbert_ray.model.saved import load_student
from newsbert_ray.serving import predictor as predictors
from newsbert_ray.serving.predictor import Predictor, Student, TokenCache, load
from newsbert_ray.training.run import train
from tests.conftest import change_json

if TYPE_CHECKING:
    from tests.conftest import MakeSettings

TEXTS = [f"the team wins again in week {n % 9} of the season " + "and more " * (n % 5) for n in range(300)]


def test_predict(run: Path) -> None:
    """The classifier's softmax over the topics, best first."""
    model = newsbert_ray.load(run, device="cpu")
    predictions = model.predict(TEXTS[:3], top=2)
    _, top, description = load_student(run / "student")
    with torch.inference_mode():
        logits = cast("TopicHead", top.head).dense(torch.from_numpy(model.embed(TEXTS[:3])))
    for prediction, row in zip(predictions, torch.softmax(logits, -1), strict=True):
        best = int(row.argmax())
        assert prediction.topic == description["labels"][best]
        assert prediction.probability == pytest.approx(float(row[best]), abs=1e-6)
        assert [p for _, p in prediction.topics] == sorted((p for _, p in prediction.topics), reverse=True)
        assert len(prediction.topics) == 2
    assert model.predict([]) == []


def test_int8_is_close_to_fp32(run: Path) -> None:
    """Weights and inputs are rounded to 8 bits; a wrong scale or a forgotten bias would be far off."""
    exact = Predictor(Student.read(run / "student"), device="cpu")
    rough = Predictor(Student.read(run / "student"), precision="int8")
    maps = [type(module).__name__ for module in rough.encoder.layers.modules()]
    assert (maps.count("Linear"), maps.count("_Int8Linear")) == (0, 12)
    expected = exact.embed(TEXTS)
    assert 0 < np.abs(rough.embed(TEXTS) - expected).max() < 0.05 * np.abs(expected).max()
    with pytest.raises(SettingsError, match="int8 is for the processor; use bf16 on a GPU"):
        Predictor(Student.read(run / "student"), device="cuda", precision="int8")


def test_texts_of_one_length_need_no_mask(run: Path) -> None:
    """Attention without a mask is another kernel; its numbers must be those of training."""
    model = load(run, device="cpu")
    ids, mask = _read(model, [TEXTS[0]] * 3)
    assert mask.all()
    with torch.inference_mode():
        expected = model.top.embed(model.encoder(ids, mask), mask).numpy()
        np.testing.assert_allclose(model._read(ids.numpy(), mask.numpy().astype(bool)), expected, atol=1e-6)


def test_a_student_without_layers(static_run: Path) -> None:
    """Sums of a table's rows must be the encoder's and the pooling's numbers, also for no text at all."""
    model = load(static_run, device="cpu")
    texts = [*TEXTS, "", "rain"]
    ids, mask = _read(model, texts)
    with torch.inference_mode():
        expected = model.top.embed(model.encoder(ids, mask), mask).numpy()
    np.testing.assert_allclose(model.embed(texts), expected, atol=1e-5)
    assert model.embed([]).shape == (0, 16)


def _read(model: Predictor, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [torch.tensor(ids) for ids in model.tokenizer.encode(texts, max_tokens=model.max_tokens)]
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), mask


def test_rank_without_clicks(run: Path) -> None:
    """A topics student ranks by cosine: the text that was read comes first, and its opposite last."""
    ranked = load(run, device="cpu").rank(TEXTS[:1], [TEXTS[1], TEXTS[0]])
    assert (ranked[0].index, ranked[0].text) == (1, TEXTS[0])
    assert ranked[0].score == pytest.approx(1.0, abs=1e-5)


def test_rank_by_clicks(make_settings: MakeSettings) -> None:
    """The inner product of user encoder and candidate; a user without a history has the learned embedding."""
    settings = make_settings(task="recommendation", epochs=1)
    train(settings, quiet=True)
    model = load(settings.out, device="cpu")
    ranked = model.rank(TEXTS[:2], TEXTS[2:5])
    head = cast("ClickHead", model.top.head)
    with torch.inference_mode():
        user = head.encode_users(torch.from_numpy(model.embed(TEXTS[:2]))[None], torch.ones(1, 2))[0]
    expected = model.embed(TEXTS[2:5]) @ user.numpy()
    assert [one.score for one in ranked] == pytest.approx(sorted(expected.tolist(), reverse=True), abs=1e-5)
    scores = [one.score for one in sorted(model.rank([], TEXTS[2:5]), key=lambda one: one.index)]
    np.testing.assert_allclose(scores, model.embed(TEXTS[2:5]) @ head.newcomer.detach().numpy(), atol=1e-5)
    with pytest.raises(SettingsError, match="learned recommendation, not topics"):
        model.predict(TEXTS[:1])


def test_incomplete_runs(run: Path, tmp_path: Path) -> None:
    """No run, and a run of a sweep that kept no student."""
    with pytest.raises(Exception, match="no record there"):
        load(tmp_path)
    (tmp_path / "record.json").write_bytes((run / "record.json").read_bytes())
    with pytest.raises(EncoderError, match="its student was not kept"):
        load(tmp_path)


def test_changed_tokeniser_is_refused(run: Path, tmp_path: Path) -> None:
    """Other ids would be other words, and every number would be wrong without a message."""
    import shutil

    folder = tmp_path / "student"
    shutil.copytree(run / "student", folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = not tokenizer["normalizer"]["lowercase"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    change_json(folder / "top.json")
    with pytest.raises(EncoderError, match="not the tokeniser that the student was trained with"):
        Student.read(folder)


def count_tokens(predictor: Predictor, texts: list[str]) -> tuple[Any, int]:
    """Embeddings, and how many tokens went through the first layer's map for keys."""
    count = 0

    def add(_module: Any, inputs: Any, _output: Any) -> None:
        nonlocal count
        count += inputs[0].shape[:-1].numel()

    layer: Any = predictor.encoder.layers[0]
    handle = layer.attention.self.key.register_forward_hook(add)
    embeddings = predictor.embed(texts)
    handle.remove()
    return embeddings, count


def test_cache_changes_no_embedding(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each distinct token at its position is computed once in a group of texts, so that memory is bounded."""
    predictor = Predictor(Student.read(run / "student"), device="cpu")
    ids = list(predictor.tokenizer.encode(TEXTS, max_tokens=predictor.max_tokens))
    pairs = {(position, token) for row in ids for position, token in enumerate(row)}
    cached, few = count_tokens(predictor, TEXTS)
    assert few <= len(pairs) + predictor.max_tokens  # and padding, at most one at each position
    monkeypatch.setattr(predictors, "MIN_TEXTS", 10**6)
    plain, all_tokens = count_tokens(predictor, TEXTS)
    assert all_tokens >= sum(map(len, ids)) > 5 * few
    assert np.abs(plain).max() > 0.1
    np.testing.assert_allclose(cached, plain, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(predictors, "MIN_TEXTS", 8)
    monkeypatch.setattr(predictors, "GROUP_TEXTS", 200)
    monkeypatch.setattr(predictors, "CACHED_TOKENS", 1000)
    monkeypatch.setattr(predictors, "BATCH_TOKENS", 300)
    again, more = count_tokens(Predictor(Student.read(run / "student"), device="cpu"), TEXTS)
    assert few < more < all_tokens / 2
    np.testing.assert_allclose(again, plain, rtol=1e-5, atol=1e-6)


def test_cached_values_are_exact() -> None:
    """Also with random scales, shifts, biases and token types."""
    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    encoder = Encoder(BertModel(config)).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    cache = TokenCache.of(encoder)
    assert cache is not None
    batches = [torch.randint(30, (6, length), generator=generator) for length in (3, 7)]
    with torch.inference_mode(), cache.fill([ids.numpy() for ids in batches]):
        found = [encoder(ids, torch.ones_like(ids)) for ids in batches]
    for ids, states in zip(batches, found, strict=True):
        for state, expected in zip(states, encoder(ids, torch.ones_like(ids)), strict=True):
            torch.testing.assert_close(state, expected, rtol=1e-9, atol=1e-9)


def test_modules_are_restored_after_an_error() -> None:
    """Otherwise the next text would get the values of the last batch."""
    config = BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    encoder = Encoder(BertModel(config)).eval()
    cache = TokenCache.of(encoder)
    assert cache is not None
    ids = torch.tensor([[1, 2, 3], [3, 2, 1]])
    mask = torch.ones_like(ids)

    def fail() -> None:
        with cache.fill([ids.numpy()]):
            torch.testing.assert_close(encoder(ids, mask)[-1], before)
            raise RuntimeError("stop")

    with torch.inference_mode():
        before = encoder(ids, mask)[-1]
        with pytest.raises(RuntimeError, match="stop"):
            fail()
        torch.testing.assert_close(encoder(ids.flip(0), mask)[-1], before.flip(0))


def test_other_encoders_have_no_cache() -> None:
    """It relies on BERT's first layer."""
    config = DistilBertConfig(vocab_size=50, dim=8, hidden_dim=16, n_layers=1, n_heads=2)
    assert TokenCache.of(Encoder(DistilBertModel(config))) is None
