"""Teacher, student and the top they share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from newsbert_ray.config import ModelSettings, ScratchSettings, TrainSettings
from newsbert_ray.data.shards import read_manifest
from newsbert_ray.distill.losses import relation
from newsbert_ray.model.assemble import assemble_pair
from newsbert_ray.model.encoder import Encoder, EncoderError
from newsbert_ray.model.families import load_encoder
from newsbert_ray.model.pair import block_map
from newsbert_ray.model.saved import load_student, write_student
from tests.conftest import topic_batch

MakeSettings = Callable[..., TrainSettings]


def test_block_map() -> None:
    """Blocks are [(i - 1)K + 1, ..., iK]; another cut would mix gradients of the wrong layers."""
    assert block_map(6, 2) == [[1, 2, 3], [4, 5, 6]]
    assert block_map(4, 4) == [[1], [2], [3], [4]]


def test_a_depth_that_does_not_divide_names_those_that_do() -> None:
    """The message must be the cure."""
    with pytest.raises(
        ValueError, match="8 teacher layers do not divide into 3 student layers; choose 1, 2, 4 or 8"
    ):
        block_map(8, 3)


def test_student_starts_as_the_teachers_first_layers(make_settings: MakeSettings) -> None:
    """A student from nothing, or one that shares the teacher's tensors, is another method."""
    settings = make_settings()
    pair = assemble_pair(settings, read_manifest(settings.data)).eval()
    assert len(pair.teacher.layers) == 4
    assert len(pair.student.layers) == 2
    teacher, student = pair(topic_batch(torch.tensor([[2, 9, 3]])))
    for level in range(3):
        assert torch.equal(teacher.hidden_states[0][level], student.hidden_states[0][level])
    own = {p.data_ptr() for p in pair.student.parameters()}
    assert not own & {p.data_ptr() for p in pair.teacher.parameters()}


def test_both_models_train_with_dropout(make_settings: MakeSettings) -> None:
    """`from_pretrained` hands out a model in evaluation mode: dropout would be off unnoticed."""
    settings = make_settings()
    pair = assemble_pair(settings, read_manifest(settings.data))
    batch = topic_batch(torch.tensor([[2, 9, 8, 7, 3]]))
    first, second = pair(batch), pair(batch)
    for a, b in zip(first, second, strict=True):
        assert not torch.equal(a.hidden_states[0][1], b.hidden_states[0][1])
    rates = {m.p for m in pair.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.2}


def test_a_teacher_without_dropout_gives_the_states_of_evaluation_and_learns(
    make_settings: MakeSettings,
) -> None:
    """The student would be given noise as its target, or the teacher would stop learning with it."""
    settings = make_settings(**{"distill.teacher_dropout": False})
    pair = assemble_pair(settings, read_manifest(settings.data))
    batch = topic_batch(torch.tensor([[2, 9, 8, 7, 3]]))
    (teacher, student), (again, other) = pair(batch), pair(batch)
    assert torch.equal(teacher.logits, again.logits)
    assert not torch.equal(student.logits, other.logits)
    assert teacher.logits.requires_grad
    assert not pair.eval().student.training
    assert pair.train().student.training
    assert not pair.teacher.training


def test_a_teacher_is_cut_to_its_first_layers() -> None:
    """The paper's teacher is the first 8 of 12 layers."""
    scratch = ScratchSettings(layers=4, hidden=8, heads=2, feed_forward=8)
    encoder = load_encoder("scratch", model=ModelSettings(teacher_layers=3), scratch=scratch, vocabulary=50)
    assert len(encoder.layers) == 3
    with pytest.raises(EncoderError, match="has only 4 layers"):
        load_encoder("scratch", model=ModelSettings(teacher_layers=5), scratch=scratch, vocabulary=50)


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "no such type"}'])
def test_a_teacher_that_is_none(tmp_path: Path, content: str | None) -> None:
    """A wrong folder must end in one message that says what to give, not in a library's stack of frames."""
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(EncoderError, match="no encoder found"):
        load_encoder(str(tmp_path), model=ModelSettings(), scratch=ScratchSettings(), vocabulary=50)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    """A pytorch_model.bin is a pickle: loading one can run anybody's code."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    config.save_pretrained(tmp_path)
    torch.save(BertModel(config).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(EncoderError, match="safetensors"):
        load_encoder(str(tmp_path), model=ModelSettings(), scratch=ScratchSettings(), vocabulary=50)


def test_weights_of_other_names_are_refused(tmp_path: Path) -> None:
    """transformers fills what it does not find with random numbers: a teacher that knows nothing would
    teach."""
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
    """Any encoder with a list of layers serves: its student's parameters pair with the teacher's by place."""
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


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "electra"])
def test_projections_are_those_of_the_attention(tmp_path: Path, kind: str) -> None:
    """Losses over attention would compare something else than what the encoder attends to."""
    from transformers import AutoConfig, AutoModel

    sizes = {"dim": 8, "hidden_dim": 16, "n_heads": 2, "n_layers": 2} if kind == "distilbert" else {
        "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=60, attn_implementation="eager", **sizes)
    eager = AutoModel.from_config(config, attn_implementation="eager").eval()  # type: ignore[no-untyped-call]
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


def test_a_small_vocabulary_is_refused(tmp_path: Path) -> None:
    """Ids beyond the table would crash in mid-training, or on a GPU poison the device."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="has 50 tokens, the shards use 51"):
        load_encoder(str(tmp_path), model=ModelSettings(), scratch=ScratchSettings(), vocabulary=51)


def test_exported_student_computes_the_same(make_settings: MakeSettings, tmp_path: Path) -> None:
    """What a service loads must give the logits that the run measured."""
    settings = make_settings()
    manifest = read_manifest(settings.data)
    pair = assemble_pair(settings, manifest).eval()
    write_student(tmp_path / "student", pair, manifest, tokenizer=Path(settings.data) / "tokenizer")
    encoder, top, described = load_student(tmp_path / "student")
    ids, mask = torch.tensor([[2, 9, 8, 3]]), torch.ones(1, 4, dtype=torch.int64)
    with torch.inference_mode():
        batch = topic_batch(ids)
        assert torch.equal(pair(batch)[1].logits, top([encoder(ids, mask)], batch).logits)
    assert described["labels"] == manifest.labels


@pytest.mark.parametrize("name", ["top.safetensors", "model.safetensors", "top.json"])
def test_a_cut_student_is_an_error_of_ours(make_settings: MakeSettings, tmp_path: Path, name: str) -> None:
    """A student cut short by a copy must be named, not end in a library's frames."""
    settings = make_settings()
    manifest = read_manifest(settings.data)
    write_student(tmp_path / "student", assemble_pair(settings, manifest), manifest, tokenizer=tmp_path)
    content = (tmp_path / "student" / name).read_bytes()
    (tmp_path / "student" / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(EncoderError, match=r"student|safetensors"):
        load_student(tmp_path / "student")


def test_exported_student_opens_in_transformers_alone(make_settings: MakeSettings, tmp_path: Path) -> None:
    """The folder must serve people who do not have this package."""
    from transformers import AutoModel, AutoTokenizer

    settings = make_settings()
    manifest = read_manifest(settings.data)
    pair = assemble_pair(settings, manifest).eval()
    write_student(tmp_path / "student", pair, manifest, tokenizer=Path(settings.data) / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    model = AutoModel.from_pretrained(tmp_path / "student").eval()
    tokens = tokenizer("bado kelu", return_tensors="pt")
    with torch.inference_mode():
        ours = pair.student(tokens["input_ids"], tokens["attention_mask"])[-1]
        torch.testing.assert_close(model(**tokens).last_hidden_state, ours)
