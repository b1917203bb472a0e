"""Loading encoders: depth, dropout, vocabulary, and files that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from newsbert_ray.config import ModelSettings, ScratchSettings
from newsbert_ray.model.encoder import EncoderError
from newsbert_ray.model.families import load_encoder


def test_a_teacher_is_cut_to_its_first_layers() -> None:
    """The paper's teacher is the first 8 of 12 layers."""
    scratch = ScratchSettings(layers=4, hidden=8, heads=2, feed_forward=8)
    encoder = load_encoder("scratch", model=ModelSettings(teacher_layers=3), scratch=scratch, vocabulary=50)
    assert len(encoder.layers) == 3
    with pytest.raises(EncoderError, match="has only 4 layers"):
        load_encoder("scratch", model=ModelSettings(teacher_layers=5), scratch=scratch, vocabulary=50)


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


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "electra", "mpnet"])
def test_other_encoders_by_folder(tmp_path: Path, kind: str) -> None:
    """Any encoder with a list of layers works, and student and teacher parameters correspond."""
    from transformers import AutoConfig, AutoModel

    sizes = {"dim": 8, "hidden_dim": 16, "n_heads": 2, "n_layers": 4} if kind == "distilbert" else {
        "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 4
    }  # fmt: skip
    if kind == "electra":
        sizes["embedding_size"] = 8
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=60, **sizes)
    AutoModel.from_config(config).save_pretrained(tmp_path)  # type: ignore[no-untyped-call]
    encoder = load_encoder(str(tmp_path), model=ModelSettings(), scratch=ScratchSettings(), vocabulary=60)
    student = encoder.pick_layers([1, 2])
    ids, mask = torch.tensor([[2, 9, 3]]), torch.ones(1, 3, dtype=torch.int64)
    assert len(encoder(ids, mask)) == 5
    assert [h.shape for h in student(ids, mask)] == [(1, 3, 8)] * 3
    names = [[n for n, _ in layer.named_parameters()] for layer in (*encoder.layers, *student.layers)]
    assert all(n == names[0] for n in names)


def test_a_small_vocabulary_is_refused(tmp_path: Path) -> None:
    """Ids beyond the embedding table would crash in the middle of training."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="has 50 tokens, the shards use 51"):
        load_encoder(str(tmp_path), model=ModelSettings(), scratch=ScratchSettings(), vocabulary=51)
