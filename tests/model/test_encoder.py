"""An encoder's layers and projections."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from newsbert_ray.distill.losses import relation
from newsbert_ray.model.encoder import Encoder, EncoderError, on_cpu
from tests.waits import Waits


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "electra"])
def test_projections_are_those_of_the_attention(tmp_path: Path, kind: str) -> None:
    """Losses on attention must compare what the encoder really attends with."""
    from transformers import AutoConfig, AutoModel

    sizes = {"dim": 8, "hidden_dim": 16, "n_heads": 2, "n_layers": 2} if kind == "distilbert" else {
        "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=60, attn_implementation="eager", **sizes)
    eager = AutoModel.from_config(config, attn_implementation="eager").eval()
    encoder = Encoder(eager)
    ids, mask = torch.tensor([[2, 9, 3], [4, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    encoder(ids, mask)
    hooks = [len(module._forward_hooks) for module in encoder.modules()]
    found = encoder.encode(ids, mask, projections=True)
    assert [len(module._forward_hooks) for module in encoder.modules()] == hooks
    expected = eager(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    for layer, maps in zip(found.projections, expected, strict=True):
        scores = relation(layer.query, layer.key).masked_fill(mask[:, None, None] == 0, -1e9)
        torch.testing.assert_close(torch.softmax(scores, -1), maps)
    assert encoder.encode(ids, mask).projections == ()


def test_saving_waits_once_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint has hundreds of tensors, and a wait for each of them stops the GPU as often."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    waited: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append("all"))
    with FakeTensorMode():  # a GPU's tensors without a GPU
        tensors = {str(n): torch.empty(3, device="cuda") for n in range(4)}
        with Waits() as waits:
            copies = on_cpu(tensors)
        assert not waits.count
        with Waits() as waits:
            tensors["0"].cpu()
        assert waits.count == {"_to_copy": 1}
    assert [copy.device.type for copy in copies.values()] == ["cpu"] * 4
    assert waited == ["all"]
    on_cpu({"weight": torch.ones(2)})
    assert waited == ["all"]


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own message comes at the first step, in a hundred lines."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(EncoderError, match=r"no C\+\+ compiler 'no-such-compiler'; install g"):
        random_encoder().compile_layers()
    monkeypatch.delenv("CXX")
    encoder, compiled = random_encoder(), []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda layer, **options: compiled.append((layer, options))
    )
    encoder.compile_layers()
    options = {"dynamic": True, "options": {"pattern_matcher": False}}
    assert compiled == [(layer, options) for layer in encoder.layers]


def random_encoder() -> Encoder:
    """A BERT of two small layers."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=60, hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2
    )
    return Encoder(BertModel(config))
