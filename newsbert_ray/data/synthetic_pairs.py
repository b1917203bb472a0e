"""An invented retrieval table, learnable but not trivially: for demo, tests and benchmarks.

Topics have the words of `data.synthetic`'s corpus of the same seed and topics, so that an encoder distilled
there knows them. A text is clicked often where it has its query's topic, and most where it also has rare
words that the query asks for; clicks are drawn, so that no model can be right always.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from newsbert_ray.data.pairs_table import COLUMNS
from newsbert_ray.data.synthetic import OWN, PAIR, SHARED, invent_words

_RARE = 1000
_RARE_OF_TEXT = 6
_SHORTEST_QUERY, _LONGEST_QUERY = 9, 15
_CANDIDATES = 5
_REMEMBERED = 1024
_CLICKED_WANTED, _CLICKED_TOPIC, _CLICKED_OTHER = 0.85, 0.4, 0.06


def synthesize_pairs(
    out: str | Path,
    *,
    pairs: int = 2000,
    queries: int | None = None,
    topics: int = 8,
    words: int = 600,
    seed: int = 0,
    tables: Sequence[str] = ("train", "dev"),
) -> list[Path]:
    """Write `out`/synthetic_pairs_<name>.tsv for each of `tables`, in constant memory.

    The first table has `pairs` rows; each later one a quarter as many, with queries of its own and half its
    texts new. The same arguments give the same bytes.

    Args:
        pairs: rows of the first table, at least 8.
        queries: its queries; a fifth of `pairs` where nothing else is asked.
        topics: 2 to 40.
        words: of a text, on average; a query has about 12.
        seed: of all that is drawn.
        tables: names, in the order of time.
    Returns:
        The files written.
    Raises:
        ValueError: an argument out of its range.
    """
    queries = max(1, pairs // _CANDIDATES) if queries is None else queries
    _require_sensible(
        pairs=(pairs, 8, 10**9), queries=(queries, 1, pairs), topics=(topics, 2, 40), words=(words, 3, 10**5)
    )
    corpus = _Corpus(topics, words, seed)
    Path(out).mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for position, name in enumerate(tables):
        size = pairs if position == 0 else max(8, pairs // 4)
        asked = queries if position == 0 else max(1, min(size, queries // 4))
        # Enough for the query with the most rows, too.
        texts = max(topics, size // 2, -(-size // asked))
        path = Path(out) / f"synthetic_pairs_{name}.tsv"
        _write_table(path, corpus, size, asked, range(position * texts // 2, position * texts // 2 + texts))
        written.append(path)
        corpus.asked += asked
    return written


class _Corpus:
    """The vocabulary, and every text and query as a function of seed and number alone."""

    def __init__(self, topics: int, words: int, seed: int) -> None:
        # The first words of this stream are the topics' own and the shared ones of `data.synthetic`.
        known = topics * (OWN + 1) + SHARED + 2 * PAIR
        self._all = np.array(invent_words(np.random.default_rng([seed, 1]), known + _RARE), dtype=object)
        self._rare_start = known
        self._words, self._seed = words, seed
        self.topics = topics
        self.asked = 0
        """Queries of earlier tables."""
        self.text: Callable[[int], str] = lru_cache(maxsize=_REMEMBERED)(self._make_text)

    def generator(self, kind: int, number: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, kind, number])

    def draw(self, generator: np.random.Generator, text: int, size: int, shares: Sequence[float]) -> str:
        """`size` words: of the text's topic, of a neighbour's, its rare ones, and shared ones."""
        topic = text % self.topics
        neighbour = (topic + (1 if generator.random() < 0.5 else self.topics - 1)) % self.topics
        own = np.minimum(generator.geometric(0.12, size) - 1, OWN - 1)
        shared = np.minimum(generator.geometric(0.012, size) - 1, SHARED - 1)
        rare = self.generator(11, text).integers(0, _RARE, _RARE_OF_TEXT)[
            generator.integers(0, _RARE_OF_TEXT, size)
        ]
        kind = np.searchsorted(np.cumsum(shares), generator.random(size), side="right")
        choices = [topic * OWN + own, neighbour * OWN + own, self._rare_start + rare]
        index = np.choose(kind, [*choices, self.topics * OWN + shared])
        return " ".join(self._all[index].tolist())

    def _make_text(self, number: int) -> str:
        generator = self.generator(12, number)
        size = max(1, int(self._words * generator.uniform(0.75, 1.25)))
        return self.draw(generator, number, size, (0.10, 0.06, 0.03))


def _write_table(path: Path, corpus: _Corpus, pairs: int, queries: int, texts: range) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write("\t".join(COLUMNS) + "\n")
        for number in range(queries):
            generator = corpus.generator(13, corpus.asked + number)
            wanted = texts[int(generator.integers(len(texts)))]
            size = int(generator.integers(_SHORTEST_QUERY, _LONGEST_QUERY + 1))
            query = corpus.draw(generator, wanted, size, (0.22, 0.08, 0.20))
            # Every text once at most, the wanted one and one of its topic among them.
            count = pairs // queries + (number < pairs % queries)
            like = [
                text for text in _drawn(generator, texts, 8) if text % corpus.topics == wanted % corpus.topics
            ]
            others = _drawn(generator, texts, 4 * count)
            offered = list(dict.fromkeys([wanted, *like[:1], *others, *texts[:count]]))[:count]
            for place in generator.permutation(len(offered)).tolist():
                text = offered[place]
                share = _CLICKED_TOPIC if text % corpus.topics == wanted % corpus.topics else _CLICKED_OTHER
                share = _CLICKED_WANTED if text == wanted else share
                file.write(f"{query}\t{corpus.text(text)}\t{int(generator.random() < share)}\n")


def _drawn(generator: np.random.Generator, texts: range, count: int) -> list[int]:
    return [texts[i] for i in generator.integers(0, len(texts), count).tolist()]


def _require_sensible(**ranges: tuple[int, int, int]) -> None:
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise ValueError(f"synthetic pairs: {name} {value}, {low} to {high:,} expected")
