"""The invented corpus: MIND's form, the same for the same seed, learnable."""

from __future__ import annotations

from collections import Counter, defaultdict
from math import log
from pathlib import Path

import pytest

from newsbert_ray.data.mind import News, parse_behaviors, parse_news
from newsbert_ray.data.synthetic import synthesize


def _lines(folder: Path, name: str) -> list[str]:
    return (folder / name).read_text(encoding="utf-8").splitlines()


def _news(folder: Path) -> dict[str, News]:
    rows = [parse_news(line) for line in _lines(folder, "news.tsv")]
    assert len({row.news_id for row in rows}) == len(rows)
    return {row.news_id: row for row in rows}


def test_every_line_is_minds(tmp_path: Path) -> None:
    """A demo corpus in another form would test another reader."""
    train, dev = synthesize(tmp_path, news=400, users=30, impressions_per_user=4, topics=3)
    first, second = _news(train), _news(dev)
    assert (len(first), len(second), len(first.keys() & second.keys())) == (400, 150, 50)
    assert all(first[name] == second[name] for name in first.keys() & second.keys())
    assert any('"' in row.title for row in first.values())
    assert len({row.category for row in first.values()}) == 3
    for folder, news, count in ((train, first, 120), (dev, second, 30)):
        rows = [parse_behaviors(line) for line in _lines(folder, "behaviors.tsv")]
        assert len(rows) == count
        assert all(row.clicked and sum(row.clicked) for row in rows)
        assert all(name in news for row in rows for name in (*row.history, *row.candidates))


def test_seed_decides_every_byte(tmp_path: Path) -> None:
    """A corpus that differs between two runs makes their figures incomparable."""
    read = [
        [
            path.read_bytes()
            for folder in synthesize(tmp_path / name, news=300, seed=seed)
            for path in sorted(folder.iterdir())
        ]
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    ]
    assert read[0] == read[1]
    assert all(one != other for one, other in zip(read[0], read[2], strict=True))


def test_a_larger_corpus_starts_like_a_smaller(tmp_path: Path) -> None:
    """News drawn as one long stream would need as much memory as there are news."""
    small = _lines(synthesize(tmp_path / "small", news=64)[0], "news.tsv")
    large = _lines(synthesize(tmp_path / "large", news=20_500)[0], "news.tsv")
    assert large[:64] == small
    assert len(set(large)) == 20_500


def test_topics_can_be_learned_but_not_for_nothing(tmp_path: Path) -> None:
    """A corpus without signal, or solved by a word count, would show no difference between students."""
    train, dev = synthesize(tmp_path, news=4000)
    seen = _news(train)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in seen.values():
        counts[row.category].update(row.title.split())
    unseen = [row for name, row in _news(dev).items() if name not in seen]

    def guess(row: News) -> str:
        def score(topic: str) -> float:
            total = counts[topic].total()
            return sum(log((counts[topic][word] + 0.1) / total) for word in row.title.split())

        return max(counts, key=score)

    accuracy = sum(guess(row) == row.category for row in unseen) / len(unseen)
    assert 0.7 < accuracy < 0.95


def test_users_click_what_interests_them(tmp_path: Path) -> None:
    """Clicks by chance would leave a recommender nothing to learn."""
    folder = synthesize(tmp_path, news=1000, users=100)[0]
    news = _news(folder)
    hits = misses = 0
    for line in _lines(folder, "behaviors.tsv"):
        row = parse_behaviors(line)
        liked = {news[name].category for name in row.history}
        if len(liked) == 2 and row.clicked:
            for name, click in zip(row.candidates, row.clicked, strict=True):
                inside = news[name].category in liked
                hits, misses = hits + (click and inside), misses + (click and not inside)
    assert hits > 2 * misses


@pytest.mark.parametrize("wrong", [{"news": 3}, {"topics": 1}, {"users": 0}, {"topics": 99}])
def test_refuses_sizes_that_make_no_corpus(tmp_path: Path, wrong: dict[str, int]) -> None:
    """One topic or no user fails far from its cause otherwise."""
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} {next(iter(wrong.values()))}"):
        synthesize(tmp_path, **wrong)  # type: ignore[arg-type]
