"""The invented retrieval table: our own form, the same for the same seed, learnable."""

from __future__ import annotations

import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from math import log
from pathlib import Path

import numpy as np
import pytest

from newsbert_ray.data.mind import parse_news
from newsbert_ray.data.synthetic import synthesize, synthesize_pairs
from newsbert_ray.data.tables import Pair, open_table, read_pairs


def _pairs(path: Path) -> list[Pair]:
    rows = [line.row for line in read_pairs(open_table(str(path)))]
    pairs = [row for row in rows if isinstance(row, Pair)]
    assert len(pairs) == len(rows)
    return pairs


def _auc(scores: Sequence[float], clicked: Sequence[int]) -> float:
    """Share of (clicked, other) pairs in the right order, ties half."""
    values, labels = np.array(scores), np.array(clicked)
    wins = np.sign(values[labels == 1][:, None] - values[labels == 0][None, :])
    return float((wins.mean() + 1) / 2)


def test_sizes_are_those_asked(tmp_path: Path) -> None:
    """A benchmark of another size than it says measures something else."""
    train, dev = synthesize_pairs(tmp_path, pairs=401, queries=80, words=50)
    assert [path.name for path in (train, dev)] == ["synthetic_pairs_train.tsv", "synthetic_pairs_dev.tsv"]
    first, second = _pairs(train), _pairs(dev)
    assert (len(first), len(second)) == (401, 100)
    by_query = Counter(pair.query for pair in first)
    assert sorted(by_query.values()) == [5] * 79 + [6]
    assert not by_query.keys() & {pair.query for pair in second}
    assert len({pair.query for pair in second}) == 20
    assert 10 < np.mean([len(pair.query.split()) for pair in first]) < 14
    assert 45 < np.mean([len(pair.text.split()) for pair in first]) < 55
    assert len({(pair.query, pair.text) for pair in first}) == 401
    assert {pair.text for pair in first} & {pair.text for pair in second}
    assert {pair.text for pair in second} - {pair.text for pair in first}


@pytest.mark.parametrize("queries", [1, 7, 40])
def test_any_number_of_candidates(tmp_path: Path, queries: int) -> None:
    """A query that runs out of texts would leave the table shorter than it says."""
    for path, size in zip(
        synthesize_pairs(tmp_path, pairs=40, queries=queries, words=9), (40, 10), strict=True
    ):
        pairs = _pairs(path)
        assert len(pairs) == len({(pair.query, pair.text) for pair in pairs}) == size


def test_seed_decides_every_byte(tmp_path: Path) -> None:
    """A table that differs between two runs makes their figures incomparable."""
    read = [
        [path.read_bytes() for path in synthesize_pairs(tmp_path / name, pairs=100, words=40, seed=seed)]
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    ]
    assert read[0] == read[1]
    assert all(one != other for one, other in zip(read[0], read[2], strict=True))


def test_clicks_can_be_learned_but_not_for_nothing(tmp_path: Path) -> None:
    """A table without signal, or solved by counting words, would show no difference between students."""
    train, dev = synthesize_pairs(tmp_path, pairs=4000, words=200)
    rows = _pairs(dev)
    seen: Counter[str] = Counter()
    texts = {pair.text for pair in _pairs(train)}
    for text in texts:
        seen.update(set(text.split()))

    def judge(score: Callable[[Pair], float]) -> float:
        return _auc([score(pair) for pair in rows], [pair.clicked for pair in rows])

    def common(pair: Pair) -> float:
        return sum(word in pair.text.split() for word in pair.query.split())

    def rare_in_common(pair: Pair) -> float:
        words = set(pair.text.split())
        return sum(log(len(texts) / (1 + seen[word])) for word in pair.query.split() if word in words)

    assert 0.2 < np.mean([pair.clicked for pair in rows]) < 0.4
    assert 0.55 < judge(common) < 0.75
    assert 0.78 < judge(rare_in_common) < 0.92
    assert 0.45 < judge(lambda pair: len(pair.text)) < 0.55


def test_a_topic_is_clicked_without_a_rare_word(tmp_path: Path) -> None:
    """If only exact words told a click, an encoder of topics would be worth nothing here."""
    rows = _pairs(synthesize_pairs(tmp_path, pairs=4000, words=200)[0])
    own = _topic_words(tmp_path, seed=0)
    shares = defaultdict(list)
    for pair in rows:
        same = _topic(pair.query, own) == _topic(pair.text, own)
        if not {word for word in pair.query.split() if word not in own} & set(pair.text.split()):
            shares[same].append(pair.clicked)
    assert np.mean(shares[True]) > 2 * np.mean(shares[False])


def _topic_words(folder: Path, *, seed: int) -> dict[str, str]:
    """Words that nearly always stand in titles of one category of the invented news."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    news = synthesize(folder / "mind", news=4000, seed=seed)[0] / "news.tsv"
    for line in news.read_text(encoding="utf-8").splitlines():
        row = parse_news(line)
        for word in row.title.replace('"', "").split():
            counts[word][row.category] += 1
    best = {word: found.most_common(1)[0] for word, found in counts.items()}
    return {
        word: topic
        for word, (topic, count) in best.items()
        if counts[word].total() >= 5 and count > 0.6 * counts[word].total()
    }


def _topic(text: str, own: dict[str, str]) -> str | None:
    found = Counter(own[word] for word in text.split() if word in own)
    return found.most_common(1)[0][0] if found else None


def test_topics_speak_as_the_invented_news_do(tmp_path: Path) -> None:
    """An encoder distilled on the invented news could carry nothing over to a table in another tongue."""
    own = _topic_words(tmp_path, seed=4)
    assert len(own) > 100
    pairs = _pairs(synthesize_pairs(tmp_path, pairs=400, words=100, seed=4)[0])
    topics = Counter(_topic(pair.text, own) for pair in pairs)
    assert len(topics) == 8
    words = Counter(word for pair in pairs for word in pair.text.split())
    assert sum(count for word, count in words.items() if word in own) > 0.1 * words.total()


def test_memory_is_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of a million rows is made to measure memory, and must not need it itself."""
    monkeypatch.setattr("newsbert_ray.data.synthetic._CACHED_TEXTS", 64)
    peaks = []
    for pairs in (500, 2_500):
        tracemalloc.start()
        synthesize_pairs(tmp_path / str(pairs), pairs=pairs, words=5)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize(
    "wrong", [{"pairs": 3}, {"queries": 0}, {"queries": 2001}, {"topics": 1}, {"words": 2}]
)
def test_refuses_sizes_that_make_no_table(tmp_path: Path, wrong: dict[str, int]) -> None:
    """One topic or no query fails far from its cause otherwise."""
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} {next(iter(wrong.values()))}"):
        synthesize_pairs(tmp_path, **wrong)  # type: ignore[arg-type]
