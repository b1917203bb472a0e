"""Titles to ids: special tokens, truncation, identity, files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from newsbert_ray.data.tokenizer import (
    SPECIAL_TOKENS,
    TokenizerError,
    check_encoder,
    learn_tokenizer,
    load_tokenizer,
    restore_tokenizer,
)

TITLES = ['The quick "brown" fox', "Quick foxes jump over lazy dogs", "Dogs & foxes: a study"] * 5


def test_special_tokens_survive_truncation() -> None:
    """A title cut without its [SEP] is none that the encoder was trained on."""
    tokenizer = learn_tokenizer(TITLES.__iter__, vocabulary=200)
    short, long = tokenizer.encode(["fox", " ".join(["fox"] * 50)], max_tokens=6)
    cls, sep = SPECIAL_TOKENS.index("[CLS]"), SPECIAL_TOKENS.index("[SEP]")
    assert (short[0], short[-1], long[0], long[-1]) == (cls, sep, cls, sep)
    assert len(long) == 6
    assert len(short) < 6
    assert next(tokenizer.encode(["\u200b"], max_tokens=6)) == [cls, sep]


def test_learning_is_the_same_in_another_process() -> None:
    """Vocabularies that differ between runs make every shard a new one."""
    code = (
        "import sys, json; from newsbert_ray.data.tokenizer import learn_tokenizer;"
        "print(learn_tokenizer(json.loads(sys.argv[1]).__iter__, vocabulary=200).sha256)"
    )
    command = [sys.executable, "-c", code, json.dumps(TITLES)]
    other = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    assert learn_tokenizer(TITLES.__iter__, vocabulary=200).sha256 == other


def test_a_saved_tokeniser_is_the_same(tmp_path: Path) -> None:
    """A run that exports another tokeniser than it trained with hands out a broken student."""
    first = learn_tokenizer(TITLES.__iter__, vocabulary=200)
    first.save(tmp_path / "a")
    second = load_tokenizer(str(tmp_path / "a"))
    second.save(tmp_path / "b")
    third = load_tokenizer(str(tmp_path / "b"))
    travelled = restore_tokenizer(first.serialised, name="x", pad_id=first.pad_id)
    for other in (second, third, travelled):
        assert (other.sha256, other.vocabulary, other.pad_id) == (first.sha256, first.vocabulary, 0)
        assert list(other.encode(TITLES, max_tokens=8)) == list(first.encode(TITLES, max_tokens=8))


def test_transformers_reads_a_learned_tokeniser(tmp_path: Path) -> None:
    """A student's folder must load in transformers as any other."""
    transformers = pytest.importorskip("transformers")
    ours = learn_tokenizer(TITLES.__iter__, vocabulary=200)
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert theirs(TITLES, truncation=True, max_length=8)["input_ids"] == list(
        ours.encode(TITLES, max_tokens=8)
    )
    assert theirs.pad_token_id == ours.pad_id


def test_padding_and_truncation_of_the_folder_do_not_count(tmp_path: Path) -> None:
    """Sentence encoders' tokenizer.json pads every title to 128."""
    plain = learn_tokenizer(TITLES.__iter__, vocabulary=200)
    plain.save(tmp_path)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    stored["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    padded = load_tokenizer(str(tmp_path))
    assert padded.sha256 == plain.sha256
    assert list(padded.encode(TITLES, max_tokens=30)) == list(plain.encode(TITLES, max_tokens=30))


def test_pad_token_of_the_configuration_counts(tmp_path: Path) -> None:
    """Not every vocabulary pads with 0."""
    learn_tokenizer(TITLES.__iter__, vocabulary=200).save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**config, "pad_token": {"content": "[MASK]"}})
    )
    assert load_tokenizer(str(tmp_path)).pad_id == SPECIAL_TOKENS.index("[MASK]")


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"version": "1.0"'])
def test_a_damaged_file_is_one_message(tmp_path: Path, content: str) -> None:
    """The Rust library's panic is no message for a person."""
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not a tokeniser"):
        load_tokenizer(str(tmp_path))


def test_a_folder_without_tokeniser(tmp_path: Path) -> None:
    """A folder of weights alone must not end in a page of frames, nor in a call over the network."""
    pytest.importorskip("transformers")
    with pytest.raises(
        TokenizerError, match=r"no tokeniser in this folder.*give a folder with a tokenizer\.json"
    ):
        load_tokenizer(str(tmp_path))
    with pytest.raises(TokenizerError, match="no such folder"):
        load_tokenizer(str(tmp_path / "missing"))


def test_a_folder_that_lost_its_vocabulary(tmp_path: Path) -> None:
    """transformers makes an empty tokeniser of it, and every title would be unknown words."""
    pytest.importorskip("transformers")
    learn_tokenizer(TITLES.__iter__, vocabulary=200).save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert load_tokenizer(str(tmp_path)).vocabulary > len(SPECIAL_TOKENS)
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(TokenizerError, match=r"knows no words, .*vocab\.txt is missing"):
        load_tokenizer(str(tmp_path))


def test_a_name_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped name, or no network, must say what to give instead."""
    transformers = pytest.importorskip("transformers")

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no/such-encoder is not a local folder\nand a page of advice")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(TokenizerError, match="teacher 'no/such-encoder': no such folder") as caught:
        load_tokenizer("no/such-encoder")
    assert "\n" not in str(caught.value)


def test_a_vocabulary_alone_is_berts(tmp_path: Path) -> None:
    """UniLMv2 was released as weights, a configuration without a kind, and vocab.txt."""
    pytest.importorskip("transformers")
    learn_tokenizer(TITLES.__iter__, vocabulary=200).save(tmp_path / "whole")
    folder = tmp_path / "released"
    folder.mkdir()
    (folder / "vocab.txt").write_bytes((tmp_path / "whole" / "vocab.txt").read_bytes())
    (folder / "config.json").write_text('{"hidden_size": 768}')
    found, whole = (load_tokenizer(str(path)) for path in (folder, tmp_path / "whole"))
    assert list(found.encode(TITLES, max_tokens=30)) == list(whole.encode(TITLES, max_tokens=30))


def test_a_vocabulary_with_capitals_is_cased(tmp_path: Path) -> None:
    """As BioBERT and SciBERT are released; one word with a capital does not make a vocabulary cased."""
    words = [*SPECIAL_TOKENS, "Apple", "US", "Storm", "apple", "us", "storm", "in", "the"]
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')

    def read(vocabulary: list[str]) -> list[str]:
        (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
        (ids,) = load_tokenizer(str(tmp_path)).encode(["Storm in the US"], max_tokens=30)
        return [vocabulary[number] for number in ids[1:-1]]

    assert read(words) == ["Storm", "in", "the", "US"]
    assert read([*words[:5], "Odd", *words[8:], *(f"w{n}" for n in range(200))]) == [
        "storm",
        "in",
        "the",
        "us",
    ]
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    assert read(words) == ["Storm", "in", "the", "US"]
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "BertTokenizer", "do_lower_case": true}'
    )
    assert read(words) == ["storm", "in", "the", "us"]


def test_a_sentencepiece_model_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks for tiktoken, which cannot read it."""
    (tmp_path / "config.json").write_text('{"model_type": "deberta-v2"}')
    (tmp_path / "spm.model").write_bytes(b"\x0a\x0e")
    monkeypatch.setattr("newsbert_ray.data.tokenizer.find_spec", lambda _: None)
    with pytest.raises(TokenizerError, match=r"needs a package more: pip install sentencepiece$"):
        load_tokenizer(str(tmp_path))


def test_scores_of_pieces_survive_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library rounds them when it reads them: a student would then refuse its own tokeniser."""
    transformers = pytest.importorskip("transformers")
    scores = np.random.default_rng(0).normal(-5.0, 2.0, 300)
    pieces = [("<unk>", 0.0), *((f"w{n}", float(score)) for n, score in enumerate(scores))]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: fast)
    tokenizer = load_tokenizer(str(tmp_path))
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved")).sha256 == tokenizer.sha256


def test_an_encoder_that_cannot_be_trained(tmp_path: Path) -> None:
    """prepare must say so before its work, not training after it."""
    tokenizer = learn_tokenizer(TITLES.__iter__, vocabulary=200)
    tokenizer.save(tmp_path)
    check_encoder(str(tmp_path), tokenizer)  # a tokeniser alone
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "bert", "vocab_size": tokenizer.vocabulary}))
    check_encoder(str(tmp_path), tokenizer)
    config.write_text(json.dumps({"model_type": "bert", "vocab_size": tokenizer.vocabulary - 1}))
    with pytest.raises(TokenizerError, match=r"tokens, and the encoder only \d+ word embeddings"):
        check_encoder(str(tmp_path), tokenizer)
    config.write_text(json.dumps({"model_type": "longformer"}))
    with pytest.raises(TokenizerError, match="type 'longformer' is not supported; supported are bert, "):
        check_encoder(str(tmp_path), tokenizer)
