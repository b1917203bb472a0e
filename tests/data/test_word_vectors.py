"""Files of word vectors: formats, capitals, damage, and shards made with them."""

from __future__ import annotations

import gzip
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

from newsbert_ray.config import PrepareSettings, TrainSettings, build_settings
from newsbert_ray.data.prepare import prepare
from newsbert_ray.data.sources import PrepareError
from newsbert_ray.data.tokenizer import SPECIAL_TOKENS, TokenizerError, load_tokenizer
from newsbert_ray.data.word_vectors import VECTORS, fit_vectors, is_vectors

SENTENCES = ["Rams beat the Café Kings", "the rams, again"]
FILE = "the 1 0\nzebra 9 9\n, 0 2\nrams 0.5 -1\ncafé 3 4\nbeat 1 1\nnot there 7 7\n"


def write(folder: Path, text: str, name: str = "tiny.2d.txt") -> Path:
    """A file of word vectors."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_words_that_both_know_get_the_files_vectors(tmp_path: Path) -> None:
    """In the file's order after the special tokens; an accent is kept, a capital is not."""
    vectors = fit_vectors(write(tmp_path, FILE), SENTENCES)
    ids = list(vectors.tokenizer.encode(SENTENCES, max_tokens=30))
    words = [*SPECIAL_TOKENS, "the", ",", "rams", "café", "beat"]
    cls, sep, unknown = (words.index(name) for name in ("[CLS]", "[SEP]", "[UNK]"))
    assert ids[0] == [cls, *(words.index(w) for w in ("rams", "beat", "the", "café")), unknown, sep]
    assert ids[1] == [cls, words.index("the"), words.index("rams"), words.index(","), unknown, sep]
    assert vectors.table[len(SPECIAL_TOKENS) :].tolist() == [[1, 0], [0, 2], [0.5, -1], [3, 4], [1, 1]]
    assert not vectors.table[vectors.tokenizer.pad_id].any()
    assert vectors.table[unknown].any()
    assert (vectors.words, vectors.known, vectors.share) == (7, 5, 7 / 9)


def test_a_file_with_capitals_keeps_them(tmp_path: Path) -> None:
    """glove.840B tells Apple from apple."""
    vectors = fit_vectors(write(tmp_path, "Rams 1 2\nrams 3 4\nthe 5 6\n"), SENTENCES)
    (first,), (second,) = ([row[1:-1]] for row in vectors.tokenizer.encode(SENTENCES, max_tokens=30))
    assert first[0] == len(SPECIAL_TOKENS)
    assert second[:2] == [len(SPECIAL_TOKENS) + 2, len(SPECIAL_TOKENS) + 1]


def test_a_first_line_of_sizes_and_gzip_are_read(tmp_path: Path) -> None:
    """word2vec's and fastText's text form has that line; blanks in a word count to the word."""
    plain = fit_vectors(write(tmp_path, FILE), SENTENCES)
    zipped = tmp_path / "tiny.vec.gz"
    zipped.write_bytes(gzip.compress(f"7 2\n{FILE}".encode()))
    again = fit_vectors(zipped, SENTENCES)
    assert np.array_equal(plain.table, again.table)
    assert plain.tokenizer.sha256 == again.tokenizer.sha256


@pytest.mark.parametrize("extra", ["", "<UNK> 5 5\n", "  8 8\n"])
def test_one_capital_or_blank_word_changes_nothing(tmp_path: Path, extra: str) -> None:
    """A lower-case file with one line <UNK> more, read as cased, lost every word with a capital."""
    vectors = fit_vectors(write(tmp_path, FILE + extra), [title.title() for title in SENTENCES])
    assert vectors.share == 7 / 9
    assert vectors.known == 5


def _binary(text: str) -> bytes:
    """word2vec's binary form of lines of text, as gensim writes it."""
    rows = [line.rsplit(" ", 2) for line in text.splitlines()]
    content = b"".join(f"{w} ".encode() + np.array(v, "<f4").tobytes() + b"\n" for w, *v in rows)
    return f"{len(rows)} 2\n".encode() + content


def test_files_as_people_have_them(tmp_path: Path) -> None:
    """Tabs, a zip, word2vec's binary form: each must give the vectors of the plain file."""
    plain = fit_vectors(write(tmp_path, FILE), SENTENCES)
    rows = (line.rsplit(" ", 2) for line in FILE.splitlines())
    tabs = write(tmp_path, "".join("\t".join(row) + "\n" for row in rows), "tabs.txt")
    binary, zipped = tmp_path / "v.bin", tmp_path / "glove.zip"
    binary.write_bytes(_binary(FILE))
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("tiny.txt", FILE)
    for path in (tabs, binary, zipped):
        assert np.array_equal(fit_vectors(path, SENTENCES).table, plain.table)
    with zipfile.ZipFile(zipped, "a") as archive:
        archive.writestr("other.txt", FILE)
    with pytest.raises(TokenizerError, match=r"expected in this zip, found tiny.txt, other.txt"):
        fit_vectors(zipped, SENTENCES)
    binary.write_bytes(_binary(FILE)[:-9])
    with pytest.raises(TokenizerError, match="ends in word 7 of 7"):
        fit_vectors(binary, SENTENCES)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("the 1 0\nrams 1\n", "line 2 is not a word and 2 numbers"),
        ("the 1 0\nrams one two\n", "of 'rams': could not convert"),
        ("the 1 nan\n", "not finite"),
        ("<html>\n", "line 1 is not a word"),
        ("", "knows none of the corpus's 7 words"),
        ("zebra 1 2\n", "knows none of the corpus's 7 words"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str, why: str) -> None:
    """A wrong file must not become a vocabulary of nothing."""
    with pytest.raises(TokenizerError, match=why):
        fit_vectors(write(tmp_path, text), SENTENCES)


def test_shards_of_word_vectors(tmp_path: Path, corpus: tuple[Path, Path]) -> None:
    """prepare takes the file where an encoder stands: words of all splits, the vectors beside the shards, and
    another file is another corpus."""
    letters = np.random.default_rng(0).normal(size=(3, 4)).round(3)
    lines = [line.split("\t")[3] for folder in corpus for line in _news(folder)]
    words = sorted({word.lower() for title in lines for word in re.findall(r"\w+|[^\w\s]", title)})
    text = "".join(f"{w} {' '.join(map(str, letters[i % 3]))}\n" for i, w in enumerate(words))
    path, out, messages = write(tmp_path, text), tmp_path / "shards", list[str]()
    values = {
        "source": [str(folder) for folder in corpus],
        "teacher": str(path),
        "out": str(out),
        "workers": 0,
    }
    settings = build_settings(PrepareSettings, values)
    manifest = prepare(settings, say=messages.append)
    assert (manifest.tokenizer.name, manifest.tokenizer.sha256) == (
        path.name,
        load_tokenizer(str(out / "tokenizer")).sha256,
    )
    assert np.load(out / VECTORS).shape == (manifest.tokenizer.vocabulary, 4)
    assert any("100.0% of all occurrences; vectors 4 wide" in line for line in messages)
    flags = "--method glove --teacher scratch --scratch.hidden 4 --scratch.heads 4 --out RUN"
    assert messages[-1].endswith(f"--task recommendation --data {out} {flags}")
    assert prepare(settings, say=messages.append) == manifest
    assert messages[-1].startswith("already prepared")
    other = settings.model_copy(
        update={"teacher": str(write(tmp_path, text.replace("0.", "1."), "other.txt"))}
    )
    with pytest.raises(PrepareError, match="vectors"):
        prepare(other, say=messages.append)
    scratch = settings.model_copy(update={"teacher": "scratch"})
    with pytest.raises(PrepareError, match=r"tokeniser tiny.2d.txt then, scratch now"):
        prepare(scratch, say=messages.append)


def test_names_of_files_and_of_encoders() -> None:
    """A folder or a name at Hugging Face is an encoder."""
    assert is_vectors("glove.6B.300d.txt")
    assert is_vectors("s3://bucket/wiki.vec.gz")
    assert not any(map(is_vectors, ("scratch", "bert-base-uncased", "models/glove")))


def test_word_vectors_are_no_teacher_to_train_with() -> None:
    """They come with the shards."""
    with pytest.raises(ValueError, match="set teacher scratch"):
        build_settings(TrainSettings, {"data": "d", "teacher": "glove.6B.300d.txt", "out": "o"})


def _news(folder: Path) -> list[str]:
    return (folder / "news.tsv").read_text(encoding="utf-8").splitlines()
