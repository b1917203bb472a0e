"""The tokeniser of a corpus: its teacher's own, or one that is made of the corpus's texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from newsbert_ray.config import SCRATCH, PrepareSettings
from newsbert_ray.data.tokens import TitleTokenizer, learn_tokenizer, load_tokenizer
from newsbert_ray.data.vectors import VECTORS, fit_vectors, is_vectors
from newsbert_ray.inputs import brought
from newsbert_ray.methods import METHODS
from newsbert_ray.storage import local

Texts = Callable[[], Iterator[str]]


def own_tokenizer(settings: PrepareSettings) -> TitleTokenizer | None:
    """The teacher's own; None where it has none, and one is to be made.

    Raises:
        TokenizerError: it cannot be had.
    """
    if settings.teacher == SCRATCH or is_vectors(settings.teacher):
        return None
    return load_tokenizer(brought(settings.teacher))


def make_tokenizer(
    settings: PrepareSettings, folder: Path, *, training: Texts, all_texts: Texts, say: Callable[[str], None]
) -> TitleTokenizer:
    """WordPieces learned from the training texts, or the words that a file of word vectors knows of all
    texts; of these the vectors are written into the shards' folder.

    Raises:
        TokenizerError: no word vectors there.
    """
    if settings.teacher == SCRATCH:
        say(f"learning up to {settings.scratch.vocabulary:,} WordPieces from the training texts")
        return learn_tokenizer(training, vocabulary=settings.scratch.vocabulary)
    path = Path(brought(settings.teacher)).expanduser()
    say(f"reading {path.name}: which of the corpus's words it knows")
    found = fit_vectors(path, all_texts())
    np.save(folder / VECTORS, found.table)
    say(
        f"{path.name} knows {found.known:,} of {found.words:,} words, {found.share:.1%} of all there stand; "
        f"vectors {found.table.shape[1]} wide"
    )
    return found.tokenizer


def training_flags(settings: PrepareSettings) -> str:
    """What `newsbert-ray train` is told of the encoder, for shards of these settings."""
    if not is_vectors(settings.teacher):
        return f"--teacher {settings.teacher}"
    width = int(np.load(local(settings.out).expanduser() / VECTORS, mmap_mode="r").shape[1])
    usual = METHODS["glove"]["scratch"]["hidden"]
    heads = next(n for n in range(12, 0, -1) if width % n == 0)
    sizes = "" if width == usual else f" --scratch.hidden {width} --scratch.heads {heads}"
    return f"--method glove --teacher {SCRATCH}{sizes}"
