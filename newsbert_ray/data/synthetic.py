"""Invented corpora, learnable but not trivially, for demo, tests and benchmarks: folders in MIND's form, and
tables of query-text pairs.

Every word is made up. A topic shows in its own words, in words that it shares with its neighbour topic, and
(in titles) in pairs of words of which neither says anything alone. Users have interests and click by them.
Both corpora use the same words for the same seed. The same arguments give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from newsbert_ray.data.tables import COLUMNS
from newsbert_ray.settings import SettingsError

Integers = npt.NDArray[np.int64]

OWN, SHARED, PAIR, RARE = 30, 240, 8, 1000
"""Words of a topic's own, words that all topics share, pair words of a row, and rare words of texts."""
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_BLOCK = 10_000
_LONGEST, _SHORTEST = 12, 6
_MINUTES = 6 * 24 * 60
_REDRAWS = 8

_RARE_OF_TEXT = 6
_SHORTEST_QUERY, _LONGEST_QUERY = 9, 15
_CANDIDATES = 5
_CACHED_TEXTS = 1024
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
    """Write `out`/synthetic_<folder>, news.tsv and behaviors.tsv, for each of `folders`.

    Arguments, result and errors are those of `newsbert_ray.synthesize`.
    """
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
    if unknown := [name for name in unlabelled if name not in folders]:
        raise SettingsError(
            f"synthetic corpus: unlabelled {', '.join(unknown)}, some of {', '.join(folders)} expected"
        )
    language = _Language(topics, seed)
    habits = _Habits(users, history, candidates, popularity)
    written: list[Path] = []
    start, stop = 0, news
    for position, name in enumerate(folders):
        folder = Path(out) / f"synthetic_{name}"
        folder.mkdir(parents=True, exist_ok=True)
        _write_news(folder / "news.tsv", start, stop, language)
        each = impressions_per_user if position == 0 else max(1, impressions_per_user // 4)
        readers = _Readers(start, stop, habits, language, stream=seed + 7919 * position)
        when = datetime(2019, 11, 9) + timedelta(days=6 * position)
        path = folder / "behaviors.tsv"
        _write_behaviors(path, readers, users * each, when, labelled=name not in unlabelled)
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
    """Write `out`/synthetic_pairs_<name>.tsv for each of `tables`, in constant memory.

    Arguments, result and errors are those of `newsbert_ray.synthesize_pairs`.
    """
    queries = max(1, pairs // _CANDIDATES) if queries is None else queries
    _require_ranges(
        "pairs",
        pairs=(pairs, 8, 10**9),
        queries=(queries, 1, pairs),
        topics=(topics, 2, 40),
        words=(words, 3, 10**5),
    )
    texts = _Texts(_Language(topics, seed), words)
    Path(out).mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    first_query = 0
    for position, name in enumerate(tables):
        rows = pairs if position == 0 else max(8, pairs // 4)
        own_queries = queries if position == 0 else max(1, min(rows, queries // 4))
        # Enough texts for the query with the most rows, too.
        count = max(topics, rows // 2, -(-rows // own_queries))
        offered = range(position * count // 2, position * count // 2 + count)
        path = Path(out) / f"synthetic_pairs_{name}.tsv"
        _write_pairs(path, texts, rows, range(first_query, first_query + own_queries), offered)
        written.append(path)
        first_query += own_queries
    return written


class _Language:
    """The invented words, in this order: each topic's own, shared ones, two rows of pair words, a name for
    each topic, rare ones."""

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
        """A generator that is a function of seed and key."""
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


def _topics_of(start: int, stop: int, language: _Language) -> Integers:
    """The topic of each news from `start` to `stop`, (stop - start,); a function of its number alone."""
    first, last = start // _BLOCK, -(-stop // _BLOCK)
    drawn = [_draw_topics(block, language) for block in range(first, last)]
    return np.concatenate(drawn)[start - first * _BLOCK : stop - first * _BLOCK]


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


@dataclass(frozen=True)
class _Habits:
    """How many users read, how much, and what is popular; see `synthesize`."""

    users: int
    history: int
    candidates: int
    popularity: float


class _Impressions(NamedTuple):
    """A block of impressions: user (S,), history (S, T) of which `length` (S,) count, offered and clicked
    (S, C), minute (S,). News are numbered from the folder's first."""

    user: Integers
    history: Integers
    length: Integers
    offered: Integers
    clicked: npt.NDArray[np.bool_]
    minute: Integers


class _Readers:
    """The users of one folder, whose news are those from `start` to `stop`."""

    def __init__(self, start: int, stop: int, habits: _Habits, language: _Language, *, stream: int) -> None:
        self.start, self.stop = start, stop
        self._habits, self._language, self._stream = habits, language, stream
        self._topic = _topics_of(start, stop, language)
        # News from the most popular on: of all, and of each topic.
        self._order = np.arange(stop - start)
        if habits.popularity:
            self._order = language.generator(6, stream).permutation(stop - start)
        self._by_topic = self._order[np.argsort(self._topic[self._order], kind="stable")]
        self._counts = np.bincount(self._topic, minlength=language.topics)
        self._starts = np.concatenate([[0], np.cumsum(self._counts)[:-1]])
        self._interests = language.generator(4).integers(0, language.topics, (habits.users, 2))

    def draw(self, block: int, first: int, size: int) -> _Impressions:
        """`size` impressions from number `first` on; a function of `block` alone."""
        generator = self._language.generator(5, self._stream, block)
        longest = self._habits.history
        user = (first + np.arange(size)) % len(self._interests)
        wanted = self._interests[user[:, None], generator.integers(0, 2, (size, longest))]
        history = self._read(generator, wanted)
        offered = self._offer(generator, size)
        liked = (self._topic[offered][:, :, None] == self._interests[user][:, None, :]).any(axis=2)
        score = liked * 1.5 + generator.random(offered.shape)
        clicked = (score >= score.max(axis=1, keepdims=True)) | (
            liked & (generator.random(offered.shape) < 0.3)
        )
        length = generator.integers(0, longest + 1, size)
        return _Impressions(user, history, length, offered, clicked, generator.integers(0, _MINUTES, size))

    def _read(self, generator: np.random.Generator, wanted: Integers) -> Integers:
        """A news of each topic in `wanted`, shape as `wanted`."""
        counts = np.maximum(self._counts[wanted], 1)
        if self._habits.popularity:
            ranks = draw_ranks(generator, counts, self._habits.popularity)
        else:
            ranks = generator.integers(0, 2**40, wanted.shape) % counts
        # A small folder may lack a topic: then a news of another one is read.
        return self._by_topic[np.minimum(self._starts[wanted] + ranks, len(self._by_topic) - 1)]

    def _offer(self, generator: np.random.Generator, size: int) -> Integers:
        """News offered in `size` impressions, (size, C); with popularity, nearly all different in each."""
        count, candidates = len(self._order), self._habits.candidates
        if not self._habits.popularity:
            return generator.integers(0, count, (size, candidates))
        counts = np.full((size, candidates), count)
        offered = self._order[draw_ranks(generator, counts, self._habits.popularity)]
        rows = np.arange(size)
        for _ in range(_REDRAWS if count > candidates else 0):
            columns = np.argsort(offered[rows], axis=1, kind="stable")
            ordered = np.take_along_axis(offered[rows], columns, axis=1)
            row, column = np.nonzero(ordered[:, 1:] == ordered[:, :-1])
            again = draw_ranks(generator, np.full(len(row), count), self._habits.popularity)
            offered[rows[row], columns[row, column + 1]] = self._order[again]
            rows = rows[np.unique(row)]
        return offered


def draw_ranks(generator: np.random.Generator, counts: Integers, exponent: float) -> Integers:
    """Ranks from 0, each below its count, by a smoothed Zipf's law: P(rank r) is proportional to the integral
    of x^-exponent from r + 1 to r + 2. Shape as `counts`."""
    drawn = generator.random(counts.shape)
    largest = np.log1p(counts)
    if exponent == 1.0:
        logarithm = drawn * largest
    else:
        logarithm = np.log1p(drawn * np.expm1((1.0 - exponent) * largest)) / (1.0 - exponent)
    return np.clip(np.exp(logarithm).astype(np.int64) - 1, 0, counts - 1)


def _write_behaviors(path: Path, readers: _Readers, count: int, when: datetime, *, labelled: bool) -> None:
    names = np.array([f"N{number + 1}" for number in range(readers.start, readers.stop)], dtype=object)
    # (2, news): the name of each news where it is not clicked, and where it is.
    offers = np.stack([names + "-0", names + "-1"]) if labelled else np.stack([names, names])
    times = [_format_time(when + timedelta(minutes=minute)) for minute in range(_MINUTES)]
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for block, first in enumerate(range(0, count, _BLOCK)):
            drawn = readers.draw(block, first, min(_BLOCK, count - first))
            columns = zip(
                drawn.user.tolist(),
                drawn.minute.tolist(),
                names[drawn.history].tolist(),
                drawn.length.tolist(),
                offers[drawn.clicked.astype(np.int64), drawn.offered].tolist(),
                strict=True,
            )
            file.writelines(
                f"{number}\tU{user + 1}\t{times[minute]}\t{' '.join(history[:length])}\t{' '.join(offered)}\n"
                for number, (user, minute, history, length, offered) in enumerate(columns, first + 1)
            )


def _format_time(time: datetime) -> str:
    noon = "PM" if time.hour >= 12 else "AM"
    return f"{time.month}/{time.day}/{time.year} {time.hour % 12 or 12}:{time:%M:%S} {noon}"


class _Texts:
    """Every text and query of the pairs, as a function of seed and number alone."""

    def __init__(self, language: _Language, words: int) -> None:
        self.language, self._words = language, words
        self.text: Callable[[int], str] = lru_cache(maxsize=_CACHED_TEXTS)(self._make_text)

    def draw(self, generator: np.random.Generator, text: int, size: int, shares: Sequence[float]) -> str:
        """`size` words: of the text's topic, of a neighbour's, its rare ones, and shared ones."""
        language = self.language
        topic = text % language.topics
        neighbour = (topic + (1 if generator.random() < 0.5 else language.topics - 1)) % language.topics
        own, shared = _word_ranks(generator, size)
        rare = language.generator(11, text).integers(0, RARE, _RARE_OF_TEXT)[
            generator.integers(0, _RARE_OF_TEXT, size)
        ]
        kind = np.searchsorted(np.cumsum(shares), generator.random(size), side="right")
        choices = [topic * OWN + own, neighbour * OWN + own, language.rare_start + rare]
        index = np.choose(kind, [*choices, language.shared_start + shared])
        return " ".join(language.words[index].tolist())

    def _make_text(self, number: int) -> str:
        generator = self.language.generator(12, number)
        size = max(1, int(self._words * generator.uniform(0.75, 1.25)))
        return self.draw(generator, number, size, (0.10, 0.06, 0.03))


def _write_pairs(path: Path, texts: _Texts, rows: int, queries: range, offered: range) -> None:
    """A table of `rows` rows over all queries, which come by their number; `offered` numbers its texts."""
    topics = texts.language.topics
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write("\t".join(COLUMNS) + "\n")
        for position, number in enumerate(queries):
            generator = texts.language.generator(13, number)
            wanted = offered[int(generator.integers(len(offered)))]
            size = int(generator.integers(_SHORTEST_QUERY, _LONGEST_QUERY + 1))
            query = texts.draw(generator, wanted, size, (0.22, 0.08, 0.20))
            # Every text once at most, the wanted one and one of its topic among them.
            count = rows // len(queries) + (position < rows % len(queries))
            alike = [text for text in _sample(generator, offered, 8) if (text - wanted) % topics == 0]
            others = _sample(generator, offered, 4 * count)
            chosen = list(dict.fromkeys([wanted, *alike[:1], *others, *offered[:count]]))[:count]
            for index in generator.permutation(len(chosen)).tolist():
                text = chosen[index]
                share = _CLICKED_TOPIC if (text - wanted) % topics == 0 else _CLICKED_OTHER
                share = _CLICKED_WANTED if text == wanted else share
                file.write(f"{query}\t{texts.text(text)}\t{int(generator.random() < share)}\n")


def _sample(generator: np.random.Generator, numbers: range, count: int) -> list[int]:
    return [numbers[i] for i in generator.integers(0, len(numbers), count).tolist()]


def _require_ranges(kind: str, **ranges: tuple[float, float, float]) -> None:
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise SettingsError(f"synthetic {kind}: {name} {value}, {low} to {high:,} expected")
