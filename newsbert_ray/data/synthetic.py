"""An invented corpus in MIND's own file form, learnable but not trivially: for demo, tests and benchmarks.

Every word is made up. A topic shows in three ways: its own words, words that it shares with its neighbour
topic, and pairs of words that each say nothing alone. Users have interests and click by them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from newsbert_ray.data.tables import COLUMNS

Integers = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

_BLOCK = 10_000
OWN, SHARED, PAIR = 30, 240, 8
"""Words of a topic's own, words that all topics share, and pair words of a row."""
_LONGEST, _SHORTEST = 12, 6
_MINUTES = 6 * 24 * 60
_REDRAWS = 8
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


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

    Memory is constant, but for some 40 bytes a news and 16 a user.

    The first folder has `news` news; each later one a quarter as many that are new, and an eighth that the
    folder before it has too, as MIND's have. The same arguments give the same bytes.

    Args:
        news: news of the first folder, at least 8.
        users: readers, the same in all folders.
        impressions_per_user: impressions of each reader in the first folder; a quarter, at least one, in
            the others.
        topics: categories, 2 to 40.
        seed: of all that is drawn.
        folders: names, in the order of time.
        history: longest history of an impression; it has 0 to this many news, evenly.
        candidates: news offered in each impression.
        unlabelled: those of the folders whose behaviours do not tell clicks, like MIND's test file.
        popularity: exponent of Zipf's law by which news are offered, and read among those of a topic; 0
            offers and reads them evenly. Above 0 no news is offered twice in an impression.
    Returns:
        The folders written.
    Raises:
        ValueError: an argument out of its range.
    """
    _require_sensible(
        news=news,
        users=users,
        impressions_per_user=impressions_per_user,
        topics=topics,
        history=history,
        candidates=candidates,
        popularity=popularity,
    )
    if unknown := [name for name in unlabelled if name not in folders]:
        raise ValueError(
            f"synthetic corpus: unlabelled {', '.join(unknown)}, some of {', '.join(folders)} expected"
        )
    words = _Words(topics, seed)
    written: list[Path] = []
    start, stop = 0, news
    for position, name in enumerate(folders):
        folder = Path(out) / f"synthetic_{name}"
        folder.mkdir(parents=True, exist_ok=True)
        _write_news(folder / "news.tsv", start, stop, words, seed)
        each = impressions_per_user if position == 0 else max(1, impressions_per_user // 4)
        stream = seed + 7919 * position
        reading = _Reading(
            start,
            stop,
            users=users,
            topics=topics,
            history=history,
            candidates=candidates,
            popularity=popularity,
            seed=seed,
            stream=stream,
        )
        when = datetime(2019, 11, 9) + timedelta(days=6 * position)
        _write_behaviors(
            folder / "behaviors.tsv", reading, users * each, when, labelled=name not in unlabelled
        )
        written.append(folder)
        start, stop = stop - news // 8, stop + news // 4
    return written


class _Words:
    """The invented vocabulary: own words for each topic, shared words, and two rows of pair words."""

    def __init__(self, topics: int, seed: int) -> None:
        generator = np.random.default_rng([seed, 1])
        count = topics * (OWN + 1) + SHARED + 2 * PAIR
        invented = invent_words(generator, count)
        self.topics = topics
        self.all = np.array(invented, dtype=object)
        self.names = [f"{word}ics" for word in invented[topics * OWN + SHARED + 2 * PAIR :]]
        self.shared_start = topics * OWN
        self.pair_start = topics * OWN + SHARED


def invent_words(generator: np.random.Generator, count: int) -> list[str]:
    """Distinct words of two or three syllables."""
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = generator.integers(2, 4)
        letters = [
            _CONSONANTS[generator.integers(len(_CONSONANTS))] + _VOWELS[generator.integers(len(_VOWELS))]
            for _ in range(syllables)
        ]
        found["".join(letters)] = None
    return list(found)


def _topics_of(start: int, stop: int, topics: int, seed: int) -> Integers:
    """Topic of every news from `start` to `stop`; a function of its number alone. Shape (stop - start,)."""
    first, last = start // _BLOCK, -(-stop // _BLOCK)
    drawn = [_draw_topics(block, topics, seed) for block in range(first, last)]
    return np.concatenate(drawn)[start - first * _BLOCK : stop - first * _BLOCK]


def _draw_topics(block: int, topics: int, seed: int) -> Integers:
    # Uneven, as MIND's topics are, yet none is rare.
    weights = 1.0 / (3.0 + np.arange(topics))
    generator = np.random.default_rng([seed, 2, block])
    return generator.choice(topics, size=_BLOCK, p=weights / weights.sum()).astype(np.int64)


def _titles(block: int, words: _Words, topic: Integers, seed: int) -> list[str]:
    """A title for every news of `block`, whose topics are `topic` of shape (_BLOCK,)."""
    generator = np.random.default_rng([seed, 3, block])
    shape = (_BLOCK, _LONGEST)
    # Frequent and rare words, as in a language.
    own = np.minimum(generator.geometric(0.12, shape) - 1, OWN - 1)
    shared = np.minimum(generator.geometric(0.012, shape) - 1, SHARED - 1)
    kind = generator.random(shape)
    neighbour = (topic + np.where(generator.random(_BLOCK) < 0.5, 1, words.topics - 1)) % words.topics
    index = words.shared_start + shared
    index = np.where(kind < 0.44, topic[:, None] * OWN + own, index)
    index = np.where((kind >= 0.44) & (kind < 0.53), neighbour[:, None] * OWN + own, index)
    length = generator.integers(_SHORTEST, _LONGEST + 1, _BLOCK)
    paired = generator.random(_BLOCK) < 0.6
    left = generator.integers(0, PAIR, _BLOCK)
    right = (left + topic) % PAIR
    index[paired, 1] = words.pair_start + left[paired]
    index[paired, 4] = words.pair_start + PAIR + right[paired]
    chosen = words.all[index].tolist()
    titles = [" ".join(row[:size]) for row, size in zip(chosen, length.tolist(), strict=True)]
    for number in np.flatnonzero(generator.random(_BLOCK) < 0.05).tolist():
        titles[number] = f'"{titles[number].replace(" ", chr(34) + " ", 1)}'
    return titles


def _write_news(path: Path, start: int, stop: int, words: _Words, seed: int) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for block in range(start // _BLOCK, -(-stop // _BLOCK)):
            topic = _draw_topics(block, words.topics, seed)
            titles = _titles(block, words, topic, seed)
            first, last = max(start - block * _BLOCK, 0), min(stop - block * _BLOCK, _BLOCK)
            base = block * _BLOCK + 1
            file.writelines(
                f"N{base + i}\t{words.names[topic[i]]}\t{words.names[topic[i]]}{i % 3}\t{titles[i]}\t\t"
                f"https://example.invalid/{base + i}\t[]\t[]\n"
                for i in range(first, last)
            )


class _Impressions(NamedTuple):
    """A block of impressions: user (S,), history (S, T) of which `length` (S,) count, offered and clicked
    (S, C), minute (S,). News by their number less that of the folder's first."""

    user: Integers
    history: Integers
    length: Integers
    offered: Integers
    clicked: npt.NDArray[np.bool_]
    minute: Integers


class _Reading:
    """Who reads what in one folder, whose news are those from `start` to `stop`."""

    def __init__(
        self,
        start: int,
        stop: int,
        *,
        users: int,
        topics: int,
        history: int,
        candidates: int,
        popularity: float,
        seed: int,
        stream: int,
    ) -> None:
        self.start, self.stop = start, stop
        self._history, self._candidates, self._popularity = history, candidates, popularity
        self._seed, self._stream = seed, stream
        self._topic = _topics_of(start, stop, topics, seed)
        # News from the most popular on: of all, and of each topic.
        self._order = np.arange(stop - start)
        if popularity:
            self._order = np.random.default_rng([seed, 6, stream]).permutation(stop - start)
        self._by_topic = self._order[np.argsort(self._topic[self._order], kind="stable")]
        self._counts = np.bincount(self._topic, minlength=topics)
        self._starts = np.concatenate([[0], np.cumsum(self._counts)[:-1]])
        self._interests = np.random.default_rng([seed, 4]).integers(0, topics, (users, 2))

    def draw(self, block: int, first: int, size: int) -> _Impressions:
        """The impressions from `first` on, as many as `size`; a function of `block` alone."""
        generator = np.random.default_rng([self._seed, 5, self._stream, block])
        user = (first + np.arange(size)) % len(self._interests)
        wanted = self._interests[user[:, None], generator.integers(0, 2, (size, self._history))]
        history = self._read(generator, wanted)
        offered = self._offer(generator, size)
        liked = (self._topic[offered][:, :, None] == self._interests[user][:, None, :]).any(axis=2)
        score = liked * 1.5 + generator.random(offered.shape)
        clicked = (score >= score.max(axis=1, keepdims=True)) | (
            liked & (generator.random(offered.shape) < 0.3)
        )
        length = generator.integers(0, self._history + 1, size)
        return _Impressions(user, history, length, offered, clicked, generator.integers(0, _MINUTES, size))

    def _read(self, generator: np.random.Generator, wanted: Integers) -> Integers:
        """A news of each topic in `wanted`, shape as `wanted`."""
        counts = np.maximum(self._counts[wanted], 1)
        if self._popularity:
            ranks = draw_ranks(generator, counts, self._popularity)
        else:
            ranks = generator.integers(0, 2**40, wanted.shape) % counts
        # A small folder may lack a topic: its reader finds a news of another.
        return self._by_topic[np.minimum(self._starts[wanted] + ranks, len(self._by_topic) - 1)]

    def _offer(self, generator: np.random.Generator, size: int) -> Integers:
        count = len(self._order)
        if not self._popularity:
            return generator.integers(0, count, (size, self._candidates))
        counts = np.full((size, self._candidates), count)
        offered = self._order[draw_ranks(generator, counts, self._popularity)]
        rows = np.arange(size)
        for _ in range(_REDRAWS if count > self._candidates else 0):
            places = np.argsort(offered[rows], axis=1, kind="stable")
            ordered = np.take_along_axis(offered[rows], places, axis=1)
            row, column = np.nonzero(ordered[:, 1:] == ordered[:, :-1])
            again = draw_ranks(generator, np.full(len(row), count), self._popularity)
            offered[rows[row], places[row, column + 1]] = self._order[again]
            rows = rows[np.unique(row)]
        return offered


def draw_ranks(generator: np.random.Generator, counts: Integers, exponent: float) -> Integers:
    """Ranks from 0, each below its count, by Zipf's law smoothed: P(rank r) is proportional to the integral
    of x^-exponent from r + 1 to r + 2. Shape as `counts`."""
    drawn = generator.random(counts.shape)
    largest = np.log1p(counts)
    if exponent == 1.0:
        logarithm = drawn * largest
    else:
        logarithm = np.log1p(drawn * np.expm1((1.0 - exponent) * largest)) / (1.0 - exponent)
    return np.clip(np.exp(logarithm).astype(np.int64) - 1, 0, counts - 1)


def _write_behaviors(path: Path, reading: _Reading, count: int, when: datetime, *, labelled: bool) -> None:
    names = _letters([f"N{number + 1}" for number in range(reading.start, reading.stop)])
    times = _letters([_clock(when + timedelta(minutes=minute)) for minute in range(_MINUTES)])
    with path.open("wb") as file:
        for block, first in enumerate(range(0, count, _BLOCK)):
            drawn = reading.draw(block, first, min(_BLOCK, count - first))
            file.write(_lines(first, drawn, names, times, labelled=labelled))


def _lines(first: int, drawn: _Impressions, names: Bytes, times: Bytes, *, labelled: bool) -> bytes:
    """The block's lines. All are laid out in cells of fixed width, then the empty ones fall out: a Python
    string for each news took ten times as long."""
    size = len(drawn.user)
    history = _listed(names, drawn.history)
    history *= (np.arange(history.shape[1]) < drawn.length[:, None])[:, :, None]
    offered = _listed(names, drawn.offered, labels=drawn.clicked if labelled else None)
    tab, end = np.full((size, 1), ord("\t"), np.uint8), np.full((size, 1), ord("\n"), np.uint8)
    numbers = _letters([f"{first + i + 1}" for i in range(size)])
    users = _letters([f"U{user + 1}" for user in drawn.user.tolist()])
    cells = np.concatenate(
        [
            *(numbers, tab, users, tab, times[drawn.minute], tab),
            *(history.reshape(size, -1), tab, offered.reshape(size, -1), end),
        ],
        axis=1,
    )
    content: bytes = cells[cells != 0].tobytes()
    return content


def _listed(names: Bytes, news: Integers, *, labels: npt.NDArray[np.bool_] | None = None) -> Bytes:
    """News (S, T) as cells (S, T, W): a blank before each but the first, the name, the label."""
    width = names.shape[1]
    cells = np.zeros((*news.shape, 1 + width + (0 if labels is None else 2)), np.uint8)
    cells[:, 1:, 0] = ord(" ")
    cells[:, :, 1 : 1 + width] = names[news]
    if labels is not None:
        cells[:, :, -2] = ord("-")
        cells[:, :, -1] = ord("0") + labels
    return cells


def _letters(texts: Sequence[str]) -> Bytes:
    """ASCII texts as cells, zero where a text has ended; shape (len(texts), longest)."""
    found = np.array(texts, dtype="S")
    return found.view(np.uint8).reshape(len(texts), found.itemsize)


def _clock(time: datetime) -> str:
    noon = "PM" if time.hour >= 12 else "AM"
    return f"{time.month}/{time.day}/{time.year} {time.hour % 12 or 12}:{time:%M:%S} {noon}"


def _require_sensible(**given: float) -> None:
    ranges = {
        "news": (8, 10**9),
        "users": (1, 10**8),
        "impressions_per_user": (1, 10**6),
        "topics": (2, 40),
        "history": (0, 1000),
        "candidates": (1, 1000),
        "popularity": (0, 10),
    }
    for name, value in given.items():
        low, high = ranges[name]
        if not low <= value <= high:
            raise ValueError(f"synthetic corpus: {name} {value}, {low} to {high:,} expected")


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
    _require_sensible_synthetic_pairs(
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


def _require_sensible_synthetic_pairs(**ranges: tuple[int, int, int]) -> None:
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise ValueError(f"synthetic pairs: {name} {value}, {low} to {high:,} expected")
