"""Word vectors in GloVe's text form (Pennington et al. 2014): which of a corpus's words they know, as a
tokeniser, and those words' vectors. Knows no tensor and no Ray."""

from __future__ import annotations

import gzip
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from newsbert_ray.config import VECTOR_FILES
from newsbert_ray.data.tokenizer import SPECIAL_TOKENS, TitleTokenizer, TokenizerError

if TYPE_CHECKING:
    from tokenizers.normalizers import Normalizer
    from tokenizers.pre_tokenizers import PreTokenizer


VECTORS = "vectors.npy"
"""Beside the shards: (V, W) float32, a row for each id of their tokeniser."""
_SEED = 0

Array = npt.NDArray[np.float32]


class WordVectors(NamedTuple):
    """The words of a corpus that a file knows, as a tokeniser; `table` (V, W) by its ids; and how many of the
    corpus's words, and of their occurrences, that is."""

    tokenizer: TitleTokenizer
    table: Array
    words: int
    known: int
    share: float


def is_vectors(name: str) -> bool:
    """Whether an encoder's name is that of a file of word vectors."""
    return name.lower().endswith(VECTOR_FILES)


@lru_cache(maxsize=4)
def identity(path: Path) -> str:
    """SHA-256 of the file.

    Raises:
        TokenizerError: no such file.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise TokenizerError(
            f"{path}: cannot be read ({error.strerror}); give a file of word vectors in GloVe's text form"
        ) from error


def fit_vectors(path: Path, texts: Iterable[str]) -> WordVectors:
    """A word tokeniser of what `texts` and the file have in common, in the order of the file.

    Words are cut at blanks and punctuation, and put in lower case where the file has no capitals. Each text
    is framed by [CLS] and [SEP] as an encoder's are; these, [UNK] and [MASK] get random vectors of the
    others' spread, padding gets zeros.

    Args:
        path: lines `word v1 ... vW`, a first line `words W` is passed over; plain or gzip.
        texts: of all splits.
    Raises:
        TokenizerError: the file is missing or not in that form, or knows none of the words.
    """
    cased = any(word != word.lower() for word, _ in _read_lines(path))
    counts = _count_words(texts, cased=cased)
    words: dict[str, Array] = {}
    for word, numbers in _read_lines(path):
        if word in counts and word not in words:
            words[word] = _vector(path, word, numbers)
    if not words:
        raise TokenizerError(
            f"{path}: knows none of the corpus's {len(counts):,} words; is it another language's?"
        )
    known = np.stack(list(words.values()))
    special = np.random.default_rng(_SEED).normal(0.0, known.std(), (len(SPECIAL_TOKENS), known.shape[1]))
    special[0] = 0.0
    share = sum(counts[word] for word in words) / counts.total()
    table = np.concatenate([special.astype(np.float32), known])
    return WordVectors(_tokenizer(path.name, words, cased=cased), table, len(counts), len(words), share)


def _read_lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Each word of the file with its numbers as they stand; a word may hold blanks, as some of GloVe's do."""
    opened = gzip.open if path.suffix == ".gz" else open
    size = 0
    try:
        with opened(path, "rt", encoding="utf-8", errors="replace", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                fields = line.rstrip("\r\n ").split(" ")
                if number == 1 and len(fields) == 2:
                    continue
                size = size or len(fields) - 1
                if not size or len(fields) <= size or not fields[0]:
                    raise _not_vectors(path, f"line {number} is no word and {max(1, size)} numbers")
                yield " ".join(fields[: len(fields) - size]), fields[len(fields) - size :]
    except (OSError, EOFError) as error:
        raise _not_vectors(path, str(error)) from error


def _vector(path: Path, word: str, numbers: list[str]) -> Array:
    try:
        vector = np.array(numbers, dtype=np.float32)
    except ValueError as error:
        raise _not_vectors(path, f"of {word!r}: {error}") from error
    if not np.isfinite(vector).all():
        raise _not_vectors(path, f"of {word!r}: a number that is not finite")
    return vector


def _not_vectors(path: Path, why: str) -> TokenizerError:
    return TokenizerError(
        f"{path}: no word vectors in GloVe's text form ({why}); give a file of lines `word v1 v2 ...`"
    )


def _count_words(texts: Iterable[str], *, cased: bool) -> Counter[str]:
    normalise, cut = _pieces(cased=cased)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in cut.pre_tokenize_str(normalise.normalize_str(text)))
    return counts


def _pieces(*, cased: bool) -> tuple[Normalizer, PreTokenizer]:
    from tokenizers import normalizers, pre_tokenizers

    normalise = normalizers.BertNormalizer(lowercase=not cased, strip_accents=False)
    return normalise, pre_tokenizers.BertPreTokenizer()


def _tokenizer(name: str, words: Iterable[str], *, cased: bool) -> TitleTokenizer:
    from tokenizers import Tokenizer, models, processors

    ids = {word: number for number, word in enumerate([*SPECIAL_TOKENS, *words])}
    backend = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = _pieces(cased=cased)
    backend.add_special_tokens(SPECIAL_TOKENS)
    backend.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    return TitleTokenizer(backend, name=name, pad_id=ids["[PAD]"])
