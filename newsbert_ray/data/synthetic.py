"""An invented corpus in MIND's own file form, learnable but not trivially: for demo, tests and benchmarks.

Every word is made up. A topic shows in three ways: its own words, words that it shares with its neighbour
topic, and pairs of words that each say nothing alone. Users have interests and click by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

_BLOCK = 10_000
_OWN, _SHARED, _PAIR = 30, 240, 8
_LONGEST, _SHORTEST = 12, 6
_HISTORY, _CANDIDATES = 10, 6
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
) -> list[Path]:
    """Write `out`/synthetic_<folder>, news.tsv and behaviors.tsv, for each of `folders`, in constant memory.

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
    Returns:
        The folders written.
    Raises:
        ValueError: an argument out of its range.
    """
    _require_sensible(news=news, users=users, impressions_per_user=impressions_per_user, topics=topics)
    words = _Words(topics, seed)
    written: list[Path] = []
    start, stop = 0, news
    for position, name in enumerate(folders):
        folder = Path(out) / f"synthetic_{name}"
        folder.mkdir(parents=True, exist_ok=True)
        _write_news(folder / "news.tsv", start, stop, words, seed)
        each = impressions_per_user if position == 0 else max(1, impressions_per_user // 4)
        when = datetime(2019, 11, 9) + timedelta(days=6 * position)
        _write_behaviors(
            folder / "behaviors.tsv", start, stop, users, each, topics, seed + 7919 * position, when, seed
        )
        written.append(folder)
        start, stop = stop - news // 8, stop + news // 4
    return written


class _Words:
    """The invented vocabulary: own words for each topic, shared words, and two rows of pair words."""

    def __init__(self, topics: int, seed: int) -> None:
        generator = np.random.default_rng([seed, 1])
        count = topics * (_OWN + 1) + _SHARED + 2 * _PAIR
        invented = _invent(generator, count)
        self.topics = topics
        self.all = np.array(invented, dtype=object)
        self.names = [f"{word}ics" for word in invented[topics * _OWN + _SHARED + 2 * _PAIR :]]
        self.shared_start = topics * _OWN
        self.pair_start = topics * _OWN + _SHARED


def _invent(generator: np.random.Generator, count: int) -> list[str]:
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
    own = np.minimum(generator.geometric(0.12, shape) - 1, _OWN - 1)
    shared = np.minimum(generator.geometric(0.012, shape) - 1, _SHARED - 1)
    kind = generator.random(shape)
    neighbour = (topic + np.where(generator.random(_BLOCK) < 0.5, 1, words.topics - 1)) % words.topics
    index = words.shared_start + shared
    index = np.where(kind < 0.44, topic[:, None] * _OWN + own, index)
    index = np.where((kind >= 0.44) & (kind < 0.53), neighbour[:, None] * _OWN + own, index)
    length = generator.integers(_SHORTEST, _LONGEST + 1, _BLOCK)
    paired = generator.random(_BLOCK) < 0.6
    left = generator.integers(0, _PAIR, _BLOCK)
    right = (left + topic) % _PAIR
    index[paired, 1] = words.pair_start + left[paired]
    index[paired, 4] = words.pair_start + _PAIR + right[paired]
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


def _write_behaviors(
    path: Path,
    start: int,
    stop: int,
    users: int,
    each: int,
    topics: int,
    stream: int,
    when: datetime,
    seed: int,
) -> None:
    topic = _topics_of(start, stop, topics, seed)
    by_topic = np.argsort(topic, kind="stable")
    counts = np.bincount(topic, minlength=topics)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    interests = np.random.default_rng([seed, 4]).integers(0, topics, (users, 2))
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for block, first in enumerate(range(0, users * each, _BLOCK)):
            generator = np.random.default_rng([seed, 5, stream, block])
            size = min(_BLOCK, users * each - first)
            user = (first + np.arange(size)) % users
            wanted = interests[user[:, None], generator.integers(0, 2, (size, _HISTORY))]
            read = by_topic[
                starts[wanted] + generator.integers(0, 2**40, wanted.shape) % np.maximum(counts[wanted], 1)
            ]
            offered = generator.integers(0, len(topic), (size, _CANDIDATES))
            liked = (topic[offered][:, :, None] == interests[user][:, None, :]).any(axis=2)
            score = liked * 1.5 + generator.random(offered.shape)
            clicked = (score >= score.max(axis=1, keepdims=True)) | (
                liked & (generator.random(offered.shape) < 0.3)
            )
            length = generator.integers(0, _HISTORY + 1, size)
            minutes = generator.integers(0, 6 * 24 * 60, size)
            file.writelines(
                _impression(
                    first + i + 1,
                    int(user[i]) + 1,
                    when + timedelta(minutes=int(minutes[i])),
                    (read[i, : length[i]] + start + 1).tolist(),
                    (offered[i] + start + 1).tolist(),
                    clicked[i].tolist(),
                )
                for i in range(size)
            )


def _impression(
    number: int, user: int, time: datetime, history: list[int], candidates: list[int], clicked: list[bool]
) -> str:
    read = " ".join(f"N{news}" for news in history)
    offered = " ".join(f"N{news}-{int(click)}" for news, click in zip(candidates, clicked, strict=True))
    clock = f"{time.hour % 12 or 12}:{time:%M:%S} {'PM' if time.hour >= 12 else 'AM'}"
    return f"{number}\tU{user}\t{time.month}/{time.day}/{time.year} {clock}\t{read}\t{offered}\n"


def _require_sensible(*, news: int, users: int, impressions_per_user: int, topics: int) -> None:
    ranges = {
        "news": (news, 8, 10**9),
        "users": (users, 1, 10**8),
        "impressions_per_user": (impressions_per_user, 1, 10**6),
        "topics": (topics, 2, 40),
    }
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise ValueError(f"synthetic corpus: {name} {value}, {low} to {high:,} expected")
