"""UniLMv2 checkpoints against a forward pass written from their format, with random weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from newsbert_ray.config import ModelSettings, ScratchSettings
from newsbert_ray.data.shards import read_manifest
from newsbert_ray.distill.losses import attention_scores
from newsbert_ray.model.assemble import assemble_pair
from newsbert_ray.model.encoder import Encoder, EncoderError
from newsbert_ray.model.families import encoder_depth, load_encoder, load_exported
from newsbert_ray.model.unilm import UniLMEncoder, relative_buckets
from tests.waits import Waits

if TYPE_CHECKING:
    from tests.conftest import MakeSettings

D, HEADS, LAYERS, INNER, WORDS, BINS = 12, 3, 4, 20, 60, 32
CONFIG = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": D,
    "intermediate_size": INNER,
    "max_position_embeddings": 512,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "type_vocab_size": 2,
    "vocab_size": WORDS,
    "rel_pos_bins": BINS,
    "max_rel_pos": 128,
}
IDS = torch.tensor([[5, 9, 2, 40, 7, 33, 12, 50, 3, 4, 1, 59], [8, 6, 7, 11, 0, 0, 0, 0, 0, 0, 0, 0]])
MASK = (IDS > 0).long()


def checkpoint(*, joined: bool, words: int = WORDS) -> dict[str, Tensor]:
    """Random weights under the original names; queries, keys and values in one matrix or separate."""
    torch.manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape) * 0.3

    found = {
        "bert.embeddings.word_embeddings.weight": draw(words, D),
        "bert.embeddings.position_embeddings.weight": draw(512, D),
        "bert.embeddings.token_type_embeddings.weight": draw(2, D),
        "bert.embeddings.LayerNorm.weight": 1 + draw(D),
        "bert.embeddings.LayerNorm.bias": draw(D),
        "bert.encoder.rel_pos_bias.weight": draw(HEADS, BINS) * 5,
        "bert.pooler.dense.weight": draw(D, D),
        "cls.predictions.bias": draw(words),
    }
    for layer in range(LAYERS):
        base = f"bert.encoder.layer.{layer}."
        qkv, q_bias, v_bias = draw(3 * D, D), draw(1, D), draw(D)
        if joined:
            found |= {f"{base}attention.self.qkv_linear.weight": qkv}
            found |= {f"{base}attention.self.q_bias": q_bias, f"{base}attention.self.v_bias": v_bias}
        else:
            biases = {"query": q_bias[0], "key": draw(D), "value": v_bias}
            for part, rows in zip(biases, qkv.chunk(3), strict=True):
                found[f"{base}attention.self.{part}.weight"] = rows.clone()
                found[f"{base}attention.self.{part}.bias"] = biases[part]
        for name, high, wide in (
            ("attention.output.dense", D, D),
            ("intermediate.dense", INNER, D),
            ("output.dense", D, INNER),
        ):
            found[f"{base}{name}.weight"], found[f"{base}{name}.bias"] = draw(high, wide), draw(high)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            found[f"{base}{name}.weight"], found[f"{base}{name}.bias"] = 1 + draw(D), draw(D)
    return found


def write(folder: Path, weights: dict[str, Tensor], **config: object) -> Path:
    """A folder as it is after converting the checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(weights, folder / "model.safetensors")
    return folder


def load(folder: Path, layers: int | None = None) -> Encoder:
    """The encoder in evaluation mode."""
    settings = ModelSettings(teacher_layers=layers)
    return load_encoder(str(folder), model=settings, scratch=ScratchSettings(), vocabulary=WORDS).eval()


def reference(w: dict[str, Tensor], title: Tensor) -> list[Tensor]:
    """Hidden states (L, D) of one title without padding, computed with loops."""

    def bucket(distance: int) -> int:
        if abs(distance) < 8:
            place = abs(distance)
        else:
            place = min(15, 8 + int(math.log(abs(distance) / 8) / math.log(128 / 8) * 8))
        return place + (16 if distance > 0 else 0)

    length = len(title)
    table = w["bert.encoder.rel_pos_bias.weight"]
    state = w["bert.embeddings.word_embeddings.weight"][title]
    state = state + w["bert.embeddings.position_embeddings.weight"][:length]
    state = state + w["bert.embeddings.token_type_embeddings.weight"][0]

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, (D,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

    state = norm(state, "bert.embeddings.LayerNorm")
    states = [state]
    for layer in range(LAYERS):
        base = f"bert.encoder.layer.{layer}."
        own = f"{base}attention.self."
        if f"{own}qkv_linear.weight" in w:
            q, k, v = (state @ part.T for part in w[f"{own}qkv_linear.weight"].chunk(3))
            q, v = q + w[f"{own}q_bias"].reshape(-1), v + w[f"{own}v_bias"]
        else:
            q, k, v = (
                state @ w[f"{own}{p}.weight"].T + w[f"{own}{p}.bias"] for p in ("query", "key", "value")
            )
        heads = []
        for head in range(HEADS):
            part = slice(head * D // HEADS, (head + 1) * D // HEADS)
            scores = torch.empty(length, length)
            for i in range(length):
                for j in range(length):
                    scores[i, j] = q[i, part] @ k[j, part] / math.sqrt(D / HEADS) + table[head, bucket(j - i)]
            heads.append(torch.softmax(scores, -1) @ v[:, part])
        joined = torch.cat(heads, -1) @ w[f"{base}attention.output.dense.weight"].T
        state = norm(
            state + joined + w[f"{base}attention.output.dense.bias"], f"{base}attention.output.LayerNorm"
        )
        inner = gelu(state @ w[f"{base}intermediate.dense.weight"].T + w[f"{base}intermediate.dense.bias"])
        outer = inner @ w[f"{base}output.dense.weight"].T + w[f"{base}output.dense.bias"]
        state = norm(state + outer, f"{base}output.LayerNorm")
        states.append(state)
    return states


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_states_are_the_references(tmp_path: Path, joined: bool, attention: str) -> None:
    """A bias of the wrong sign, bucket, head or scale would silently give a useless model."""
    weights = checkpoint(joined=joined)
    encoder = load(write(tmp_path, weights))
    encoder.backbone.set_attn_implementation(attention)
    with torch.no_grad():
        found = encoder(IDS, MASK)
    assert len(found) == LAYERS + 1
    for title, length in enumerate(MASK.sum(-1).tolist()):
        for mine, theirs in zip(found, reference(weights, IDS[title, :length]), strict=True):
            torch.testing.assert_close(mine[title, :length], theirs, rtol=1e-4, atol=2e-5)


def test_buckets_are_t5s() -> None:
    """One bucket per distance below 8, logarithmic to 128, keys after the query 16 later."""
    found = relative_buckets(300, buckets=32, reach=128)
    assert found[0, :9].tolist() == [0, 17, 18, 19, 20, 21, 22, 23, 24]
    assert found[:9, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert found[0, [11, 12, 16, 32, 64, 127, 128, 299]].tolist() == [24, 25, 26, 28, 30, 31, 31, 31]


def test_a_teacher_is_cut_and_its_student_has_a_bias_of_its_own(tmp_path: Path) -> None:
    """The teacher is cut to its first layers, and the student's bias is trained separately."""
    weights = checkpoint(joined=True)
    teacher = load(write(tmp_path, weights), layers=3)
    assert (len(teacher.layers), encoder_depth(str(tmp_path), ModelSettings(), ScratchSettings())) == (
        3,
        LAYERS,
    )
    student = teacher.pick_layers([1])
    assert isinstance(student, UniLMEncoder)
    assert isinstance(teacher, UniLMEncoder)
    assert student.rel_pos_bias.weight.data_ptr() != teacher.rel_pos_bias.weight.data_ptr()
    with torch.no_grad():
        torch.testing.assert_close(student(IDS, MASK)[1], teacher(IDS, MASK)[1])


def test_an_exported_student_is_read_again(tmp_path: Path) -> None:
    """BERT's folder format has no place for the bias."""
    student = load(write(tmp_path / "teacher", checkpoint(joined=True))).pick_layers([1, 2]).eval()
    (tmp_path / "student").mkdir()
    student.save(tmp_path / "student")
    again = load_exported(tmp_path / "student")
    assert not again.training
    with torch.no_grad():
        torch.testing.assert_close(again(IDS, MASK)[-1], student(IDS, MASK)[-1])
    assert len(load(tmp_path / "student").layers) == 2  # and can teach


def test_attention_losses_see_the_bias(tmp_path: Path) -> None:
    """TinyBERT compares the scores that the softmax receives."""
    encoder = load(write(tmp_path, checkpoint(joined=False)))
    assert isinstance(encoder, UniLMEncoder)
    with torch.no_grad():
        layer = encoder.encode(IDS, MASK, projections=True).projections[0]
        plain = layer._replace(bias=None)
        added = attention_scores(layer) - attention_scores(plain)
    torch.testing.assert_close(added[0], encoder.position_bias(IDS.shape[1]), rtol=1e-4, atol=1e-5)


def test_the_bias_needs_nothing_from_the_cpu(tmp_path: Path) -> None:
    """A GPU would wait for a copy in each batch."""
    encoder = load(write(tmp_path, checkpoint(joined=False)))
    assert isinstance(encoder, UniLMEncoder)
    encoder.to("meta")
    with Waits() as waits:
        assert encoder.position_bias(7).shape == (HEADS, 7, 7)
    assert not waits.count


def test_missing_weights_are_named(tmp_path: Path) -> None:
    """Random numbers in place of missing weights would make a useless teacher."""
    weights = checkpoint(joined=True)
    del weights["bert.encoder.layer.1.output.dense.weight"]
    with pytest.raises(EncoderError, match=r"1 of UniLMv2's weights are missing .*layer\.1\.output\.dense"):
        load(write(tmp_path / "lost", weights))
    folder = write(tmp_path / "sizes", checkpoint(joined=True))
    (folder / "config.json").write_text("{}")
    with pytest.raises(EncoderError, match="lacks UniLMv2's sizes"):
        load(folder)


def test_a_pair_trains_with_it(make_settings: MakeSettings, tmp_path: Path) -> None:
    """From folder to a joint step, and back from an exported student."""
    first = make_settings()
    manifest = read_manifest(first.data)
    words = manifest.tokenizer.vocabulary
    folder = write(tmp_path / "unilm", checkpoint(joined=True, words=words), vocab_size=words)
    for path in (Path(first.data) / "tokenizer").iterdir():
        if path.name != "config.json":
            (folder / path.name).write_bytes(path.read_bytes())
    settings = make_settings(teacher=str(folder), epochs=1)
    from newsbert_ray.training.run import train

    record = train(settings, quiet=True)
    assert record.layer_map == [[1, 2], [3, 4]]
    assert set(record.metrics["test"]) == {"teacher", "student"}
    written = load_file(Path(settings.out) / "student" / "model.safetensors")
    assert "bert.rel_pos_bias.weight" in written
    pair = assemble_pair(settings, manifest)
    assert pair.layers_match
    assert isinstance(pair.student, UniLMEncoder)
