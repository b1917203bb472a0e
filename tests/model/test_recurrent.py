"""The BiLSTM student: real tokens alone count, and it comes back as it was written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from newsbert_ray.model.encoder import EncoderError
from newsbert_ray.model.families import load_exported
from newsbert_ray.model.word_models import RecurrentEncoder

IDS = torch.tensor([[5, 6, 7], [8, 9, 0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


@pytest.fixture
def encoder() -> RecurrentEncoder:
    """Over 20 words 4 wide, 6 wide itself."""
    torch.manual_seed(0)
    return RecurrentEncoder(nn.Embedding(20, 4), 6, dropout=0.0)


def test_states_are_those_of_each_title_alone(encoder: RecurrentEncoder) -> None:
    """The backward direction would begin in the padding."""
    embedded, states = encoder(IDS, MASK)
    assert (embedded.shape, states.shape) == ((2, 3, 4), (2, 3, 6))
    alone = encoder(IDS[1:, :2], MASK[1:, :2])[1]
    torch.testing.assert_close(states[1:, :2], alone)
    assert not states[1, 2].any()


def test_a_written_encoder_is_read_again(encoder: RecurrentEncoder, tmp_path: Path) -> None:
    """A run's student is loaded by its folder alone."""
    encoder.save(tmp_path)
    again = load_exported(tmp_path)
    assert isinstance(again, RecurrentEncoder)
    assert not again.training
    torch.testing.assert_close(again(IDS, MASK)[1], encoder(IDS, MASK)[1])
    assert (again.hidden_size, len(again.layers), again.word_embedding.num_embeddings) == (6, 1, 20)


def test_its_words_are_its_own(encoder: RecurrentEncoder) -> None:
    """They start as the teacher's and must not drag those along."""
    words = nn.Embedding(20, 4)
    own = RecurrentEncoder(words, 6, dropout=0.0)
    assert torch.equal(own.word_embedding.weight, words.weight)
    assert own.word_embedding.weight.data_ptr() != words.weight.data_ptr()


def test_what_it_has_not_is_said(encoder: RecurrentEncoder) -> None:
    """Attention, and a half of an odd width."""
    with pytest.raises(EncoderError, match="need a Transformer student"):
        encoder.encode(IDS, MASK, projections=True)
    with pytest.raises(EncoderError, match="must be even"):
        RecurrentEncoder(nn.Embedding(20, 4), 7, dropout=0.0)
