"""Invented corpora, learnable but not trivially, for demo, tests and benchmarks: folders in MIND's form, and
tables of query-text pairs.

Every word is made up. A topic shows in its own words, in words that it shares with its neighbour topic, and
(in titles) in pairs of words of which neither says anything alone. Users have interests and click by them.
Both corpora use the same words for the same seed. The same arguments give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from newsbert_ray.data.pairs_source import COLUMNS
from newsbert_ray.settings import SettingsError

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

OWN, SHARED, PAIR, RARE = 30, 240, 8, 1000
"""Words of a topic's own, words that all topics share, pair words of a row, and rare words of texts."""
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_BLOCK = 10_000
_LONGEST, _SHORTEST = 12, 6
_MINUTES = 6 * 24 * 60
_LINES = csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")

_RARE_OF_TEXT = 6
_SHORTEST_QUERY, _LONGEST_QUERY = 9, 15
_CANDIDATES = 5
_NEAR_TEXTS, _CACHED_TEXTS = 512, 1024
_CLICKED_WANTED, _CLICKED_TOPIC, _CLICKED_OTHER = 0.85, 0.4, 0.06


def synthesize(
    out: str | Path,
    *,
    news: int = 2000,
    users: int = 200,
    impressions_per_user: int = 5,
    topics: int = 8,
    seed: int = 0,
    folders: Sequence[str] = ("train", "dev"),
    history: int = 10,
    candidates: int = 6,
    unlabelled: Sequence[str] = (),
    popularity: float = 0.0,
) -> list[Path]:
    """The verb `synthesize`. Arguments, result and errors are those of `newsbert_ray.synthesize`."""
    _require_ranges(
        "corpus",
        news=(news, 8, 10**9),
        users=(users, 1, 10**8),
        impressions_per_user=(impressions_per_user, 1, 10**6),
        topics=(topics, 2, 40),
        history=(history, 0, 1000),
        candidates=(candidates, 1, 1000),
        popularity=(popularity, 0, 10),
    )
    _require_names("folders", folders)
    if unknown := [name for name in unlabelled if name not in folders]:
        raise SettingsError(
            f"synthetic corpus: unlabelled {', '.join(unknown)}, some of {', '.join(folders)} expected"
        )
    language = _Language(topics, seed)
    interests = language.generator(4).integers(0, topics, (users, 2))
    written: list[Path] = []
    start, stop = 0, news
    for position, name in enumerate(folders):
        folder = Path(out) / f"synthetic_{name}"
        folder.mkdir(parents=True, exist_ok=True)
        _write_news(folder / "news.tsv", start, stop, language)
        ends = ("", "") if name in unlabelled else ("-0", "-1")
        when = datetime(2019, 11, 9) + timedelta(days=6 * position)
        behaviors = _Behaviors(start, stop, interests, when, language, ends=ends, popularity=popularity)
        count = users * (impressions_per_user if position == 0 else max(1, impressions_per_user // 4))
        with (folder / "behaviors.tsv").open("wb") as file:
            for first in range(0, count, _BLOCK):
                size = min(_BLOCK, count - first)
                csv.write_csv(behaviors.draw(first, size, history, candidates), file, _LINES)
        written.append(folder)
        start, stop = stop - news // 8, stop + news // 4
    return written


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
    """Write `out`/synthetic_pairs_<name>.tsv for each of `tables`: `newsbert_ray.synthesize_pairs`."""
    queries = max(1, pairs // _CANDIDATES) if queries is None else queries
    _require_ranges(
        "pairs",
        pairs=(pairs, 8, 10**9),
        queries=(queries, 1, pairs),
        topics=(topics, 2, 40),
        words=(words, 3, 10**5),
    )
    _require_names("tables", tables)
    texts = _Texts(_Language(topics, seed), words)
    Path(out).mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    first_query = last_text = 0
    for position, name in enumerate(tables):
        rows = pairs if position == 0 else max(8, pairs // 4)
        own_queries = queries if position == 0 else max(1, min(rows, queries // 4))
        # Enough texts for the query with the most rows, too.
        count = max(topics, rows // 2, -(-rows // own_queries))
        first_text = max(0, last_text - count // 2)
        last_text = first_text + count
        path = Path(out) / f"synthetic_pairs_{name}.tsv"
        numbers = range(first_query, first_query + own_queries)
        _write_pairs(path, texts, rows, numbers, range(first_text, last_text))
        written.append(path)
        first_query += own_queries
    return written


class _Language:
    """The invented words in order: each topic's own, shared, two rows of pair words, names, rare ones."""

    def __init__(self, topics: int, seed: int) -> None:
        self.topics, self.seed = topics, seed
        self.shared_start = topics * OWN
        self.pair_start = self.shared_start + SHARED
        names_start = self.pair_start + 2 * PAIR
        self.rare_start = names_start + topics
        words = invent_words(self.generator(1), self.rare_start + RARE)
        self.words = np.array(words, dtype=object)
        self.names = [f"{word}ics" for word in words[names_start : self.rare_start]]

    def generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])


def invent_words(generator: np.random.Generator, count: int) -> list[str]:
    """Distinct words of two or three syllables."""
    words: dict[str, None] = {}
    while len(words) < count:
        syllables = generator.integers(2, 4)
        letters = [
            _CONSONANTS[generator.integers(len(_CONSONANTS))] + _VOWELS[generator.integers(len(_VOWELS))]
            for _ in range(syllables)
        ]
        words["".join(letters)] = None
    return list(words)


def _word_ranks(generator: np.random.Generator, shape: int | tuple[int, int]) -> tuple[Integers, Integers]:
    """Numbers of own and of shared words, frequent and rare as in a language."""
    own = np.minimum(generator.geometric(0.12, shape) - 1, OWN - 1)
    return own, np.minimum(generator.geometric(0.012, shape) - 1, SHARED - 1)


def _draw_topics(block: int, language: _Language) -> Integers:
    """The topic of each news of a block; uneven, as MIND's topics are, yet none is rare."""
    weights = 1.0 / (3.0 + np.arange(language.topics))
    generator = language.generator(2, block)
    return generator.choice(language.topics, size=_BLOCK, p=weights / weights.sum()).astype(np.int64)


def _draw_titles(block: int, language: _Language, topic: Integers) -> list[str]:
    """A title for each news of a block, whose topics are `topic` (_BLOCK,)."""
    generator = language.generator(3, block)
    shape = (_BLOCK, _LONGEST)
    own, shared = _word_ranks(generator, shape)
    kind = generator.random(shape)
    step = np.where(generator.random(_BLOCK) < 0.5, 1, language.topics - 1)
    neighbour = (topic + step) % language.topics
    index = language.shared_start + shared
    index = np.where(kind < 0.44, topic[:, None] * OWN + own, index)
    index = np.where((kind >= 0.44) & (kind < 0.53), neighbour[:, None] * OWN + own, index)
    length = generator.integers(_SHORTEST, _LONGEST + 1, _BLOCK)
    paired = generator.random(_BLOCK) < 0.6
    left = generator.integers(0, PAIR, _BLOCK)
    right = (left + topic) % PAIR
    index[paired, 1] = language.pair_start + left[paired]
    index[paired, 4] = language.pair_start + PAIR + right[paired]
    words = language.words[index].tolist()
    titles = [" ".join(row[:size]) for row, size in zip(words, length.tolist(), strict=True)]
    for number in np.flatnonzero(generator.random(_BLOCK) < 0.05).tolist():
        titles[number] = f'"{titles[number].replace(" ", chr(34) + " ", 1)}'
    return titles


def _write_news(path: Path, start: int, stop: int, language: _Language) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for block in range(start // _BLOCK, -(-stop // _BLOCK)):
            topic = _draw_topics(block, language)
            titles = _draw_titles(block, language, topic)
            first, last = max(start - block * _BLOCK, 0), min(stop - block * _BLOCK, _BLOCK)
            for i in range(first, last):
                number, name = block * _BLOCK + 1 + i, language.names[topic[i]]
                url = f"https://example.invalid/{number}"
                file.write(f"N{number}\t{name}\t{name}{i % 3}\t{titles[i]}\t\t{url}\t[]\t[]\n")


class _Behaviors:
    """Impressions of readers with these `interests` (U, 2), of the news `start` to `stop`, in the six days
    from `when` on."""

    def __init__(
        self,
        start: int,
        stop: int,
        interests: Integers,
        when: datetime,
        language: _Language,
        *,
        ends: tuple[str, str],
        popularity: float,
    ) -> None:
        self._start, self._interests, self._language = start, interests, language
        names = [f"N{number + 1}" for number in range(start, stop)]
        times = (when + timedelta(minutes=n) for n in range(_MINUTES))
        self._times = pa.array([f"{time:%-m/%-d/%Y %-I:%M:%S %p}" for time in times])
        self._names = pa.array(names)
        self._offers = pa.array([name + end for end in ends for name in names])
        blocks = range(start // _BLOCK, -(-stop // _BLOCK))
        topics = np.concatenate([_draw_topics(block, language) for block in blocks])
        self._topics = topics[start - blocks.start * _BLOCK :][: stop - start]
        self._by_topic = np.argsort(self._topics, kind="stable")
        # A news is drawn in proportion to its weight, r^-popularity for the one of rank r: `_by_topic[i]`
        # owns the interval that ends at `_ends[i]`, and the news of topic t those from `_edges[t]` on.
        ranks = language.generator(6, start).permutation(stop - start) + 1.0
        self._ends = np.cumsum(ranks**-popularity)
        counts = np.bincount(self._topics, minlength=language.topics)
        self._edges = np.append(0.0, self._ends)[np.append(0, np.cumsum(counts))]

    def draw(self, first: int, size: int, history: int, candidates: int) -> pa.Table:
        """`size` lines from number `first` on."""
        generator = self._language.generator(5, self._start, first)
        reader = np.arange(first, first + size) % len(self._interests)
        interests = self._interests[reader]
        lengths = generator.integers(0, history + 1, size)
        wanted = np.repeat(interests, lengths, axis=0)
        wanted = wanted[np.arange(len(wanted)), generator.integers(0, 2, len(wanted))]
        read = self._draw_news(generator, self._edges[wanted], self._edges[wanted + 1])
        offered = self._draw_different(generator, size, candidates)
        liked = (self._topics[offered][:, :, None] == interests[:, None, :]).any(axis=2)
        score = liked * 1.5 + generator.random(offered.shape)
        clicked = score >= score.max(axis=1, keepdims=True)
        clicked |= liked & (generator.random(offered.shape) < 0.3)
        offers = self._offers.take(pa.array((offered + len(self._names) * clicked).ravel()))
        columns = {
            "impression": pa.array(np.arange(first, first + size) + 1),
            "user": pa.array([f"U{number + 1}" for number in reader.tolist()]),
            "time": self._times.take(pa.array(generator.integers(0, _MINUTES, size))),
            "history": _join(self._names.take(pa.array(read)), lengths),
            "candidates": _join(offers, np.full(size, candidates)),
        }
        return pa.table(columns)

    def _draw_news(self, generator: np.random.Generator, low: Floats, high: Floats) -> Integers:
        """A news of each interval. A small folder may lack a topic: then a news of another one is drawn."""
        drawn = np.searchsorted(self._ends, low + (high - low) * generator.random(low.shape), side="right")
        return self._by_topic[np.minimum(drawn, len(self._ends) - 1)]

    def _draw_different(self, generator: np.random.Generator, size: int, candidates: int) -> Integers:
        """News offered in each impression, (size, candidates); repetitions are drawn again a few times."""

        def draw(*shape: int) -> Integers:
            return self._draw_news(generator, np.zeros(shape), np.full(shape, self._ends[-1]))

        offered = draw(size, candidates)
        rows = np.arange(size)
        for _ in range(20):
            columns = np.argsort(offered[rows], axis=1, kind="stable")
            ordered = np.take_along_axis(offered[rows], columns, axis=1)
            row, column = np.nonzero(ordered[:, 1:] == ordered[:, :-1])
            offered[rows[row], columns[row, column + 1]] = draw(len(row))
            rows = rows[np.unique(row)]
        return offered


def _join(words: pa.StringArray, lengths: Integers) -> pa.StringArray:
    """`words` in lists of these lengths, separated by blanks."""
    offsets = pa.array(np.append(0, np.cumsum(lengths)), pa.int32())
    return pc.binary_join(pa.ListArray.from_arrays(offsets, words), " ")


class _Texts:
    """Every text and query of the pairs, as a function of seed and number alone."""

    def __init__(self, language: _Language, words: int) -> None:
        self.language, self._words = language, words
        self.text: Callable[[int], str] = lru_cache(maxsize=_CACHED_TEXTS)(self._make_text)

    def query(self, generator: np.random.Generator, text: int) -> str:
        """A query that the text number `text` answers."""
        size = int(generator.integers(_SHORTEST_QUERY, _LONGEST_QUERY + 1))
        _, rare = self._start(text)
        return self._draw(generator, text, rare, size, (0.22, 0.08, 0.20))

    def _make_text(self, number: int) -> str:
        generator, rare = self._start(number)
        size = max(1, int(self._words * generator.uniform(0.75, 1.25)))
        return self._draw(generator, number, rare, size, (0.10, 0.06, 0.03))

    def _start(self, number: int) -> tuple[np.random.Generator, Integers]:
        """The generator of a text, and its rare words."""
        generator = self.language.generator(12, number)
        return generator, self.language.rare_start + generator.integers(0, RARE, _RARE_OF_TEXT)

    def _draw(
        self, generator: np.random.Generator, text: int, rare: Integers, size: int, shares: Sequence[float]
    ) -> str:
        """`size` words: shares of the text's topic, of a neighbour's and of `rare`; the rest shared ones."""
        language = self.language
        topic = text % language.topics
        neighbour = (topic + generator.choice([1, language.topics - 1])) % language.topics
        own, shared = _word_ranks(generator, size)
        kind = np.searchsorted(np.cumsum(shares), generator.random(size), side="right")
        choices = [topic * OWN + own, neighbour * OWN + own, generator.choice(rare, size)]
        index = np.choose(kind, [*choices, language.shared_start + shared])
        return " ".join(language.words[index].tolist())


def _write_pairs(path: Path, texts: _Texts, rows: int, queries: range, offered: range) -> None:
    """A table of `rows` rows over all queries, which come by their number; `offered` numbers its texts."""
    topics = texts.language.topics
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write("\t".join(COLUMNS) + "\n")
        for position, number in enumerate(queries):
            generator = texts.language.generator(13, number)
            count = rows // len(queries) + (position < rows % len(queries))
            # Each query takes its texts from a few that are near each other: these are made once.
            near = min(len(offered), max(_NEAR_TEXTS, count))
            low = (len(offered) - near) * position // len(queries)
            order = generator.permutation(offered[low : low + near]).tolist()
            wanted = order[0]
            alike = next((text for text in order[1:] if (text - wanted) % topics == 0), wanted)
            chosen = list(dict.fromkeys([wanted, alike, *order]))[:count]
            query = texts.query(generator, wanted)
            for index in generator.permutation(len(chosen)).tolist():
                text = chosen[index]
                share = _CLICKED_TOPIC if (text - wanted) % topics == 0 else _CLICKED_OTHER
                share = _CLICKED_WANTED if text == wanted else share
                file.write(f"{query}\t{texts.text(text)}\t{int(generator.random() < share)}\n")


def _require_ranges(kind: str, **ranges: tuple[float, float, float]) -> None:
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise SettingsError(f"synthetic {kind}: {name} {value}, {low} to {high:,} expected")


def _require_names(setting: str, names: Sequence[str]) -> None:
    for name in names:
        if not name or set(name) & set(",/ "):
            raise SettingsError(f"{setting} {name!r}: not a name; give several apart: --{setting} train dev")
