"""BiLSTM and NRMS encoders, NRMS's user encoder, word vectors, and students of word vectors alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn

from newsbert_ray.config import SettingsError
from newsbert_ray.data.shards import read_manifest
from newsbert_ray.data.word_vectors import VECTORS
from newsbert_ray.model.assemble import assemble_pair
from newsbert_ray.model.encoder import EncoderError
from newsbert_ray.model.families import load_exported
from newsbert_ray.model.heads import ClickHead
from newsbert_ray.model.pooling import HEAD_SIZE, HEADS, AttentivePooling, SelfAttention
from newsbert_ray.model.saved import load_student
from newsbert_ray.model.word_models import (
    NrmsEncoder,
    RecurrentEncoder,
    StaticEncoder,
    reduce_width,
    token_vectors,
)
from newsbert_ray.training.run import train

if TYPE_CHECKING:
    from tests.conftest import MakeSettings


IDS = torch.tensor([[5, 6, 7], [8, 9, 0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


@pytest.fixture
def encoder() -> NrmsEncoder:
    """NRMS over 20 words of width 4."""
    torch.manual_seed(0)
    return NrmsEncoder(nn.Embedding(20, 4), dropout=0.0)


def test_self_attention_is_the_papers() -> None:
    """Eqs. 1 and 2 of NRMS, one word and one head at a time."""
    torch.manual_seed(1)
    attention, states = SelfAttention(6), torch.randn(2, 3, 6)
    found = attention(states, MASK)
    assert found.shape == (2, 3, HEADS * HEAD_SIZE)
    for row, head, word in ((0, 0, 0), (0, 19, 2), (1, 7, 1)):
        place = slice(head * HEAD_SIZE, (head + 1) * HEAD_SIZE)
        length = int(MASK[row].sum())
        query = attention.query.weight[place] @ states[row, word]
        keys = states[row, :length] @ attention.key.weight[place].T
        values = states[row, :length] @ attention.value.weight[place].T
        shares = torch.softmax(keys @ query / math.sqrt(HEAD_SIZE), 0)
        torch.testing.assert_close(found[row, word, place], shares @ values)


def test_nrms_is_equal_after_saving(encoder: NrmsEncoder, tmp_path: Path) -> None:
    """A run's student is loaded from its folder."""
    encoder.save(tmp_path)
    again = load_exported(tmp_path)
    assert isinstance(again, NrmsEncoder)
    assert not again.training
    torch.testing.assert_close(again(IDS, MASK)[1], encoder(IDS, MASK)[1])
    assert (again.hidden_size, len(again.layers), again.word_embedding.num_embeddings) == (400, 1, 20)
    with pytest.raises(EncoderError, match="need a Transformer student"):
        encoder.encode(IDS, MASK, projections=True)


def test_padding_does_not_change_a_user() -> None:
    """Attention must not read a history's padding; an empty history gives the newcomer."""
    torch.manual_seed(2)
    head = ClickHead(400, 8, "self_attention")
    nn.init.normal_(head.newcomer)
    history = torch.randn(3, 4, 400)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    users = head.encode_users(history, mask)
    torch.testing.assert_close(users[1:2], head.encode_users(history[1:2, :2], mask[1:2, :2]))
    assert torch.equal(users[2], head.newcomer)
    assert not torch.allclose(users[0], ClickHead.encode_users(_plain(head), history, mask)[0])


def test_user_self_attention_needs_its_width(make_settings: MakeSettings) -> None:
    """20 heads of 20 do not fit an encoder of another width."""
    settings = make_settings(task="recommendation", **{"recommendation.user": "self_attention"})
    with pytest.raises(SettingsError, match=r"set student\.kind nrms"):
        assemble_pair(settings, read_manifest(settings.data))


@pytest.mark.parametrize("task", ["topics", "recommendation"])
def test_glove_trains_over_the_shards_vectors(
    make_settings: MakeSettings, shards: Path, tmp_path: Path, task: str
) -> None:
    """A Transformer for topics, NRMS for recommendation; both start from the word vectors."""
    data = tmp_path / "shards"
    _copy(shards, data)
    vocabulary = read_manifest(data).tokenizer.vocabulary
    table = np.random.default_rng(0).normal(size=(vocabulary, 16)).astype(np.float32)
    np.save(data / VECTORS, table)
    settings = make_settings(method="glove", task=task, data=str(data), epochs=1, **{"student.layers": 1})
    pair = assemble_pair(settings, read_manifest(data))
    assert torch.equal(pair.student.word_embedding.weight, torch.from_numpy(table))
    kind = "nrms" if task == "recommendation" else "transformer"
    assert (settings.student.kind, type(pair.student) is NrmsEncoder) == (kind, kind == "nrms")
    record = train(settings, quiet=True)
    encoder, top, _ = load_student(Path(settings.out) / "student")
    assert type(encoder) is type(pair.student)
    assert sum(p.numel() for p in encoder.parameters()) == record.metrics["parameters"]["student"]
    if task == "recommendation":
        assert isinstance(top.head, ClickHead)
        assert top.head.attention is not None


def test_vectors_of_another_width_are_refused(
    make_settings: MakeSettings, shards: Path, tmp_path: Path
) -> None:
    """They would otherwise be ignored silently."""
    data = tmp_path / "shards"
    _copy(shards, data)
    np.save(data / VECTORS, np.zeros((read_manifest(data).tokenizer.vocabulary, 50), dtype=np.float32))
    settings = make_settings(data=str(data))
    with pytest.raises(EncoderError, match=r"50 wide, the encoder 16: give --scratch\.hidden 50"):
        assemble_pair(settings, read_manifest(data))
    (data / VECTORS).write_bytes(b"no array")
    with pytest.raises(EncoderError, match="damaged word vectors"):
        assemble_pair(settings, read_manifest(data))


def _plain(head: ClickHead) -> ClickHead:
    """The same head without its attention."""
    plain = ClickHead(400, 8)
    plain.user, plain.newcomer = head.user, head.newcomer
    return plain


def _copy(shards: Path, to: Path) -> None:
    to.mkdir()
    for path in shards.iterdir():
        (to / path.name).symlink_to(path)


@pytest.fixture
def bilstm() -> RecurrentEncoder:
    """A BiLSTM of width 6 over 20 words of width 4."""
    torch.manual_seed(0)
    return RecurrentEncoder(nn.Embedding(20, 4), 6, dropout=0.0)


def test_padding_does_not_change_states(bilstm: RecurrentEncoder) -> None:
    """Otherwise the backward direction would start in the padding."""
    embedded, states = bilstm(IDS, MASK)
    assert (embedded.shape, states.shape) == ((2, 3, 4), (2, 3, 6))
    alone = bilstm(IDS[1:, :2], MASK[1:, :2])[1]
    torch.testing.assert_close(states[1:, :2], alone)
    assert not states[1, 2].any()


def test_bilstm_is_equal_after_saving(bilstm: RecurrentEncoder, tmp_path: Path) -> None:
    """A run's student is loaded from its folder."""
    bilstm.save(tmp_path)
    again = load_exported(tmp_path)
    assert isinstance(again, RecurrentEncoder)
    assert not again.training
    torch.testing.assert_close(again(IDS, MASK)[1], bilstm(IDS, MASK)[1])
    assert (again.hidden_size, len(again.layers), again.word_embedding.num_embeddings) == (6, 1, 20)


def test_word_embeddings_are_copied(bilstm: RecurrentEncoder) -> None:
    """Training the student must not change the teacher's word embeddings."""
    words = nn.Embedding(20, 4)
    own = RecurrentEncoder(words, 6, dropout=0.0)
    assert torch.equal(own.word_embedding.weight, words.weight)
    assert own.word_embedding.weight.data_ptr() != words.weight.data_ptr()


def test_bilstm_refuses_what_it_cannot_do(bilstm: RecurrentEncoder) -> None:
    """Losses on attention, and an odd width."""
    with pytest.raises(EncoderError, match="need a Transformer student"):
        bilstm.encode(IDS, MASK, projections=True)
    with pytest.raises(EncoderError, match="must be even"):
        RecurrentEncoder(nn.Embedding(20, 4), 7, dropout=0.0)


@pytest.fixture
def static() -> StaticEncoder:
    """20 words of width 4; 5 and 9 are special."""
    torch.manual_seed(0)
    return StaticEncoder(nn.Embedding(20, 4), [5, 9], dropout=0.0)


def test_special_tokens_have_no_vector(static: StaticEncoder, tmp_path: Path) -> None:
    """They would add the same vector to every text, which the exported StaticEmbedding does not read."""
    (states,) = static(IDS, MASK)
    assert torch.equal(states[0, 1:], static.words.weight[[6, 7]])
    assert not states[0, 0].any()
    states.sum().backward()
    gradient = static.words.weight.grad
    assert gradient is not None
    assert not gradient[[5, 9]].any()
    static.save(tmp_path)
    again = load_exported(tmp_path)
    assert isinstance(again, StaticEncoder)
    assert torch.equal(again(IDS, MASK)[0], states)
    assert (again.hidden_size, len(again.layers)) == (4, 0)
    with pytest.raises(EncoderError, match="need a Transformer student, not static"):
        static.encode(IDS, MASK, projections=True)


def test_weighted_vectors_are_attentive_pooling(static: StaticEncoder) -> None:
    """One sum over a table must give what pooling gives, or a served student answers otherwise."""
    torch.manual_seed(1)
    pooling = AttentivePooling(4, 8)
    nn.init.normal_(pooling.query.weight, std=3.0)
    with torch.no_grad():
        expected = pooling(static(IDS, MASK)[0], MASK)
    rows = static.weighted_vectors(pooling)[IDS] * MASK.unsqueeze(-1)
    sums = rows.sum(1)
    torch.testing.assert_close(sums[:, :-1] / sums[:, -1:], expected)


def test_vectors_are_the_teachers_outputs(make_settings: MakeSettings) -> None:
    """Each token alone between [CLS] and [SEP], without dropout; the teacher goes on training."""
    settings = make_settings(**{"student.layers": 0})
    pair = assemble_pair(settings, read_manifest(settings.data))
    vectors = token_vectors(pair.teacher, 60, before=[2], after=[3])
    assert pair.teacher.training
    pair.eval()
    ids = torch.tensor([[2, 41, 3]])
    with torch.no_grad():
        expected = pair.teacher(ids, torch.ones_like(ids))[-1][0, 1]
    torch.testing.assert_close(vectors[41], expected)
    torch.testing.assert_close(pair.student.word_embedding.weight[41], expected)
    assert not pair.student.word_embedding.weight[[2, 3]].any()


def test_principal_components_by_hand() -> None:
    """The widest direction comes first; distances in it stay."""
    vectors = torch.tensor([[0.0, 1.0], [10.0, 1.0], [4.0, 1.1]])
    narrow = reduce_width(vectors, 1).flatten()
    torch.testing.assert_close((narrow - narrow[0]).abs(), vectors[:, 0], atol=1e-2, rtol=0)
    assert torch.equal(reduce_width(vectors, 2), vectors)


@pytest.mark.parametrize("method", ["newsbert", "pkd"])
def test_a_student_without_layers_trains(make_settings: MakeSettings, method: str) -> None:
    """Jointly and from a finished teacher; momentum and losses on layers have nothing to do."""
    settings = make_settings(method=method, epochs=4, learning_rate=3e-2, **{"student.layers": 0})
    record = train(settings, quiet=True)
    first, last = record.curve[0], record.curve[-1]
    assert record.layer_map == []
    assert last["train"]["student_task"] < 0.95 * first["train"]["student_task"]
    assert "block_1_ratio" not in last["train"]
    assert record.metrics["test"]["student"]["accuracy"] > 0.3


def test_what_a_student_without_layers_cannot_do(make_settings: MakeSettings) -> None:
    """Losses on attention, a narrow student under a shared top, and another start."""
    narrow = make_settings(**{"student.layers": 0, "student.width": 8})
    manifest = read_manifest(narrow.data)
    with pytest.raises(SettingsError, match="the student is 8 wide and the teacher 16"):
        assemble_pair(narrow, manifest)
    attention = make_settings(**{"student.layers": 0, "distill.weights.attention_maps": 1})
    with pytest.raises(EncoderError, match="need a Transformer student, not static"):
        assemble_pair(attention, manifest)
    with pytest.raises(SettingsError, match=r"student\.width needs|is the size of word vectors"):
        make_settings(**{"student.width": 8})
    with pytest.raises(SettingsError, match="from the teacher"):
        make_settings(**{"student.layers": 0, "student.encoder": "other"})
    alone = make_settings(method="finetune", **{"student.layers": 0, "student.width": 8})
    assert assemble_pair(alone, manifest).student.hidden_size == 8
