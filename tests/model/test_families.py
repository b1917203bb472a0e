"""Loading encoders: depth, dropout, vocabulary, and files that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from newsbert_ray.config import ENCODERS, ModelSettings, ScratchSettings
from newsbert_ray.distill.momentum import apply_momentum
from newsbert_ray.model.encoder import Encoder, EncoderError
from newsbert_ray.model.families import load_encoder, load_exported


def test_a_teacher_is_cut_to_its_first_layers() -> None:
    """The paper's teacher is the first 8 of 12 layers."""
    scratch = ScratchSettings(layers=4, hidden=8, heads=2, feed_forward=8)
    encoder = load_encoder("scratch", model=ModelSettings(teacher_layers=3), scratch=scratch, vocabulary=50)
    assert len(encoder.layers) == 3
    with pytest.raises(EncoderError, match="has only 4 layers"):
        load_encoder("scratch", model=ModelSettings(teacher_layers=5), scratch=scratch, vocabulary=50)


def test_loading_and_saving_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A report of missing pooler weights would tell a user to train a student that is finished."""
    from transformers.utils import logging

    logging.set_verbosity_warning()
    logging.enable_progress_bar()
    scratch = ScratchSettings(layers=2, hidden=8, heads=2, feed_forward=8)
    load_encoder("scratch", model=ModelSettings(), scratch=scratch, vocabulary=50).save(tmp_path)
    load_exported(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "no such type"}'])
def test_missing_teacher(tmp_path: Path, content: str | None) -> None:
    """A wrong folder must end in one message with the remedy, not in a library's traceback."""
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(EncoderError, match="no encoder found"):
        load_encoder(str(tmp_path), model=ModelSettings(), scratch=ScratchSettings(), vocabulary=50)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    """A pytorch_model.bin is a pickle: loading it can run arbitrary code."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    config.save_pretrained(tmp_path)
    torch.save(BertModel(config).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(EncoderError, match="safetensors"):
        load_encoder(str(tmp_path), model=ModelSettings(), scratch=ScratchSettings(), vocabulary=50)


def test_weights_of_other_names_are_refused(tmp_path: Path) -> None:
    """transformers fills missing weights with random numbers: such a teacher knows nothing."""
    from safetensors.torch import load_file, save_file
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    BertModel(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    renamed = {
        name.replace("layer.1.attention.self.query", "other"): value for name, value in weights.items()
    }
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match="2 weights are missing from its file"):
        load_encoder(str(tmp_path), model=ModelSettings(), scratch=ScratchSettings(), vocabulary=50)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(EncoderError, match="cannot be loaded as safetensors"):
        load_encoder(str(tmp_path), model=ModelSettings(), scratch=ScratchSettings(), vocabulary=50)


_SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
_OTHER_SIZES: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_heads": 4, "n_layers": 4},
    "electra": {"embedding_size": 32},
    "mobilebert": {"embedding_size": 32, "intra_bottleneck_size": 32, "use_bottleneck": False},
    "rembert": {"input_embedding_size": 32},
    "xmod": {"languages": ["en"], "default_language": "en"},
}
_QUICK = ("distilbert", "modernbert", "roberta-prelayernorm")


def write_family(kind: str, folder: Path, vocabulary: int, **values: Any) -> None:
    """A small encoder of a model type with random weights."""
    from transformers import AutoConfig, AutoModel

    sizes = {**_SIZES, "vocab_size": vocabulary, "max_position_embeddings": 64, "pad_token_id": 0}
    tokens = dict.fromkeys(("bos_token_id", "cls_token_id"), 2)
    tokens |= dict.fromkeys(("eos_token_id", "sep_token_id"), 3)
    try:
        config = AutoConfig.for_model(kind, **{**sizes, **tokens, **_OTHER_SIZES.get(kind, {}), **values})
    except ValueError as error:
        pytest.skip(f"this version of transformers: {error}"[:80])
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)


def load(folder: Path, vocabulary: int = 60) -> Encoder:
    """The encoder in evaluation mode."""
    encoder = load_encoder(
        str(folder), model=ModelSettings(), scratch=ScratchSettings(), vocabulary=vocabulary
    )
    return encoder.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in _QUICK else pytest.param(kind, marks=pytest.mark.slow)
        for kind in ENCODERS
        if kind != "unilmv2"
    ],
)
def test_every_family_trains_as_bert_does(tmp_path: Path, kind: str) -> None:
    """States of every level, none that reads padding; gradients; students that are the same after saving."""
    write_family(kind, tmp_path / "teacher", 60)
    encoder = load(tmp_path / "teacher")
    ids, mask = torch.randint(5, 60, (2, 12)), torch.ones(2, 12, dtype=torch.int64)
    ids[1, 7:] = mask[1, 7:] = 0
    states = encoder(ids, mask)
    assert [state.shape for state in states] == [(2, 12, 32)] * 5
    torch.testing.assert_close(encoder(ids[1:, :7], mask[1:, :7])[-1], states[-1][1:, :7], atol=1e-5, rtol=0)
    loss = torch.stack([state.square().mean() for state in states]).sum()
    loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
    student = encoder.pick_layers([1, 2]).eval()
    for layer in student.layers:
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
    apply_momentum(student.layers, encoder.layers, beta=1.0)
    assert all(
        any(p.grad.any() for p in layer.parameters() if p.grad is not None) for layer in student.layers
    )
    student.save(tmp_path)
    again = load_exported(tmp_path)
    torch.testing.assert_close(again(ids, mask)[-1][mask.bool()], student(ids, mask)[-1][mask.bool()])


def test_a_first_layer_of_another_kind(tmp_path: Path) -> None:
    """ModernBERT's has no norm before its attention: a saved student would lose that of its own."""
    write_family("modernbert", tmp_path, 60)
    encoder = load(tmp_path)
    kinds = encoder.backbone.config.layer_types
    assert encoder.pick_layers([1, 4]).backbone.config.layer_types == [kinds[0], kinds[3]]
    with pytest.raises(EncoderError, match=r"cannot begin with layer 2.*set student.start first"):
        encoder.pick_layers([2, 4])


def test_windows_of_attention_are_kept(tmp_path: Path) -> None:
    """With a ready mask for all layers ModernBERT's local layers would see the whole text."""
    from transformers import AutoModel

    write_family("modernbert", tmp_path, 60, local_attention=8)
    ids, mask = torch.randint(5, 60, (2, 40)), torch.ones(2, 40, dtype=torch.int64)
    with torch.no_grad():
        expected = AutoModel.from_pretrained(tmp_path)(input_ids=ids, attention_mask=mask)
        torch.testing.assert_close(load(tmp_path)(ids, mask)[-1], expected.last_hidden_state)


@pytest.mark.parametrize("kind", ["albert", "t5", "gpt2", "fnet"])
def test_other_families_are_refused(tmp_path: Path, kind: str) -> None:
    """In one line that names those that are supported, not by an internal error in the first step."""
    from transformers import AutoConfig

    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match=f"type '{kind}' is not supported; supported are bert, "):
        load(tmp_path)


def test_a_small_vocabulary_is_refused(tmp_path: Path) -> None:
    """Ids beyond the embedding table would crash in the middle of training."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="has 50 tokens, the shards use 51"):
        load_encoder(str(tmp_path), model=ModelSettings(), scratch=ScratchSettings(), vocabulary=51)
