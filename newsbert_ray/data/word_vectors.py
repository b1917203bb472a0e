"""The words that a file of word vectors knows (GloVe, Pennington et al. 2014; word2vec; fastText), as a
tokeniser, and their vectors."""

from __future__ import annotations

import gzip
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from newsbert_ray.config import VECTOR_FILES
from newsbert_ray.data.tokenizer import SPECIAL_TOKENS, TitleTokenizer, TokenizerError, add_special_tokens
from newsbert_ray.files import sha256_of

Array = npt.NDArray[np.float32]

VECTORS = "vectors.npy"
"""Beside the shards: (V, W) float32, a row for each id of their tokeniser."""
_EXPECTED = "lines `word v1 v2 ...` (GloVe, fastText) or word2vec's .bin"


class WordVectors(NamedTuple):
    """The words of a corpus that a file knows, as a tokeniser; `table` (V, W) by its ids; the corpus's
    different `words`, how many of them are `known`, and the `share` of their occurrences that is."""

    tokenizer: TitleTokenizer
    table: Array
    words: int
    known: int
    share: float


def is_vectors(name: str) -> bool:
    """Whether an encoder's name is that of a file of word vectors."""
    return name.lower().endswith(VECTOR_FILES)


@lru_cache(maxsize=4)
def vectors_sha256(path: Path) -> str:
    """SHA-256 of a file of word vectors; TokenizerError where it cannot be read."""
    try:
        return sha256_of(path)
    except OSError as error:
        fault = f"{path}: cannot be read ({error.strerror}); give a file of word vectors ({_EXPECTED})"
        raise TokenizerError(fault) from error


def fit_vectors(path: Path, texts: Iterable[str]) -> WordVectors:
    """A word tokeniser of the words that `texts` and the file have in common, in the order of the file.

    Words are cut at blanks and punctuation. They are put in lower case unless the file knows at least as many
    of their occurrences as they are written. Each text begins with [CLS] and ends with [SEP], as an encoder's
    do. These, [UNK] and [MASK] get random vectors of the same spread as the others, padding gets zeros.

    Args:
        path: lines `word v1 ... vW`, separated by blanks or tabs, with or without a first line `words W`; or
            word2vec's binary form (.bin). Plain, .gz, or the only file in a .zip.
    Raises:
        TokenizerError: the file is missing or malformed, or knows none of the words.
    """
    from tokenizers import Tokenizer, models

    counts, known = _count_words(texts), {True: dict[str, Array](), False: dict[str, Array]()}
    for word, numbers in _read_rows(path):
        for cased in known:
            if word in counts[cased] and word not in known[cased]:
                known[cased][word] = _vector(path, word, numbers)
    occurrences = {cased: sum(counts[cased][word] for word in words) for cased, words in known.items()}
    has_capitals = any(word != word.lower() for word in known[True])
    cased = has_capitals and occurrences[True] >= occurrences[False]
    words = known[cased]
    if not words:
        raise TokenizerError(
            f"{path}: knows none of the corpus's {len(counts[cased]):,} words; is it of another language?"
        )
    table = np.stack(list(words.values()))
    special = np.random.default_rng(0).normal(0.0, table.std(), (len(SPECIAL_TOKENS), table.shape[1]))
    special[0] = 0.0
    table = np.concatenate([special.astype(np.float32), table])
    ids = {word: number for number, word in enumerate([*SPECIAL_TOKENS, *words])}
    backend = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = _cutters(cased=cased)
    add_special_tokens(backend)
    tokenizer = TitleTokenizer(backend, name=path.name, pad_id=ids["[PAD]"])
    share = occurrences[cased] / counts[cased].total()
    return WordVectors(tokenizer, table, len(counts[cased]), len(words), share)


def _count_words(texts: Iterable[str]) -> dict[bool, Counter[str]]:
    """Occurrences of each word: as written (True), and in lower case (False)."""
    written, lower = Counter[str](), Counter[str]()
    cased, cut = _cutters(cased=True)
    for text in texts:
        written.update(word for word, _ in cut.pre_tokenize_str(cased.normalize_str(text)))
    uncased, _ = _cutters(cased=False)
    for word, count in written.items():
        lower[uncased.normalize_str(word)] += count
    return {True: written, False: lower}


def _cutters(*, cased: bool) -> tuple[Any, Any]:
    """Normaliser and pre-tokeniser of a tokeniser of whole words."""
    from tokenizers import normalizers, pre_tokenizers

    normaliser = normalizers.BertNormalizer(lowercase=not cased, strip_accents=False)
    return normaliser, pre_tokenizers.BertPreTokenizer()


def _read_rows(path: Path) -> Iterator[tuple[str, list[str] | Array]]:
    try:
        with _open(path) as (file, name):
            yield from _read_binary(path, file) if name.endswith(".bin") else _read_text(path, file)
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise _malformed(path, str(error)) from error


def _read_text(path: Path, file: BinaryIO) -> Iterator[tuple[str, list[str] | Array]]:
    size = 0
    for number, line in enumerate(file, 1):
        fields = line.decode("utf-8", errors="replace").rstrip("\r\n \t").replace("\t", " ").split(" ")
        if number == 1 and len(fields) == 2 and all(field.isdecimal() for field in fields):
            size = int(fields[1])
            continue
        size = size or len(fields) - 1
        if not size or len(fields) <= size:
            raise _malformed(path, f"line {number} is not a word and {max(1, size)} numbers")
        # A word may hold blanks, as some of GloVe's do.
        word = " ".join(fields[: len(fields) - size])
        if word.strip():
            yield word, fields[len(fields) - size :]


def _read_binary(path: Path, file: BinaryIO) -> Iterator[tuple[str, list[str] | Array]]:
    header = file.readline(100).split()
    if len(header) != 2 or not all(field.isdigit() for field in header):
        raise _malformed(path, "the first line of a .bin has two numbers, words and width")
    count, width = map(int, header)
    for number in range(1, count + 1):
        letters = bytearray()
        while (letter := file.read(1)) not in (b" ", b""):
            letters += letter
        numbers = file.read(4 * width)
        if len(numbers) < 4 * width:
            raise _malformed(path, f"it ends in word {number:,} of {count:,}")
        word = letters.decode("utf-8", errors="replace").lstrip("\n")
        if word.strip():
            yield word, np.frombuffer(numbers, dtype="<f4").astype(np.float32)


@contextmanager
def _open(path: Path) -> Iterator[tuple[BinaryIO, str]]:
    """The file's bytes, decompressed, and its name without .gz or .zip."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            members = [name for name in archive.namelist() if name.lower().endswith(VECTOR_FILES)]
            if len(members) != 1:
                names = ", ".join(members[:8]) or "none"
                raise _malformed(path, f"one such file expected in this zip, found {names}; unpack one")
            with archive.open(members[0]) as file:
                yield cast("BinaryIO", file), members[0].lower()
    elif path.suffix == ".gz":
        with gzip.open(path) as file:
            yield cast("BinaryIO", file), path.stem.lower()
    else:
        with path.open("rb") as file:
            yield file, path.name.lower()


def _vector(path: Path, word: str, numbers: list[str] | Array) -> Array:
    try:
        vector = np.array(numbers, dtype=np.float32)
    except ValueError as error:
        raise _malformed(path, f"of {word!r}: {error}") from error
    if not np.isfinite(vector).all():
        raise _malformed(path, f"of {word!r}: a number that is not finite")
    return vector


def _malformed(path: Path, reason: str) -> TokenizerError:
    return TokenizerError(f"{path}: not a file of word vectors ({reason}); give {_EXPECTED}")
