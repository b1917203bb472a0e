"""The invented corpus: MIND's form, the same for the same seed, learnable."""

from __future__ import annotations

import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from datetime import datetime
from math import log
from pathlib import Path

import numpy as np
import pytest

from newsbert_ray.data.mind import News, parse_behaviors, parse_news
from newsbert_ray.data.pairs_source import COLUMNS, Pair, read_pairs
from newsbert_ray.data.synthetic import synthesize, synthesize_pairs
from newsbert_ray.data.tables import open_table


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


def test_each_byte_of_behaviors_has_its_place(tmp_path: Path) -> None:
    """Lines are laid out in cells and packed: a cell too narrow or too many blanks would alter ids unseen."""
    folders = synthesize(tmp_path, news=1500, users=120, history=5, candidates=3, unlabelled=("dev",))
    for folder, labelled in zip(folders, (True, False), strict=True):
        content = (folder / "behaviors.tsv").read_text(encoding="utf-8")
        rows = [parse_behaviors(line) for line in content.splitlines()]
        assert [row.impression_id for row in rows] == [str(i + 1) for i in range(len(rows))]
        assert content == "".join(
            f"{row.impression_id}\t{row.user_id}\t{_clock(row.time)}\t{' '.join(row.history)}\t"
            + " ".join(
                name + (f"-{click}" if labelled else "")
                for name, click in zip(row.candidates, row.clicked or [0] * 3, strict=True)
            )
            + "\n"
            for row in rows
        )
        assert {len(row.history) for row in rows} == set(range(6))
        assert {len(row.candidates) for row in rows} == {3}
        assert {row.clicked is None for row in rows} == {not labelled}


def _clock(time: datetime) -> str:
    return f"{time.month}/{time.day}/{time.year} {int(f'{time:%I}')}:{time:%M:%S %p}"


def test_without_labels_nothing_else_changes(tmp_path: Path) -> None:
    """The unlabelled file and its labelled twin are how a submission is checked."""
    labelled = synthesize(tmp_path / "told", news=64, users=9)[1]
    unlabelled_folder = synthesize(tmp_path / "untold", news=64, users=9, unlabelled=("dev",))[1]
    for with_labels, without in zip(
        _lines(labelled, "behaviors.tsv"), _lines(unlabelled_folder, "behaviors.tsv"), strict=True
    ):
        assert with_labels.replace("-0", "").replace("-1", "") == without


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.7])
def test_offers_follow_zipfs_law(tmp_path: Path, exponent: float) -> None:
    """A law that is wrong for popular news repeats another share of news in a batch, and gives a false
    speed."""
    sizes = {"users": 20_000, "candidates": 1, "history": 0}
    (folder,) = synthesize(tmp_path, news=40, folders=("train",), popularity=exponent, **sizes)  # type: ignore[arg-type]
    offered = Counter(line.split("\t")[4][:-2] for line in _lines(folder, "behaviors.tsv"))
    shares = np.array([count for _, count in offered.most_common()]) / offered.total()
    weights = np.arange(1, 41) ** -exponent
    expected = weights / weights.sum()
    # Five standard errors of a share.
    assert (np.abs(shares - expected) < 5 * np.sqrt(expected / offered.total())).all()


def test_popular_news_are_offered_and_read_by_many(tmp_path: Path) -> None:
    """Evenly read news hardly repeat in a batch; real ones do, and no impression offers one twice."""
    folder = synthesize(tmp_path, news=600, users=400, candidates=20, popularity=1.0)[0]
    news = _news(folder)
    rows = [parse_behaviors(line) for line in _lines(folder, "behaviors.tsv")]
    assert all(len(set(row.candidates)) == 20 for row in rows)
    offered = Counter(name for row in rows for name in row.candidates)
    read = Counter(name for row in rows for name in row.history)
    best = [name for name, _ in offered.most_common(30)]
    assert sum(offered[name] for name in best) > 0.3 * offered.total()
    assert sum(read[name] for name in best) > 0.3 * read.total()
    # Interests still decide the topic, not popularity.
    assert all(len({news[name].category for name in row.history}) <= 2 for row in rows)


def test_a_small_corpus_of_many_topics(tmp_path: Path) -> None:
    """A topic without news must not end the writing of a test's little corpus."""
    for popularity in (0.0, 1.0):
        train, _ = synthesize(tmp_path, news=8, topics=40, candidates=12, popularity=popularity)
        news = _news(train)
        rows = [parse_behaviors(line) for line in _lines(train, "behaviors.tsv")]
        assert all(name in news for row in rows for name in (*row.history, *row.candidates))


@pytest.mark.parametrize(
    "wrong",
    [
        {"news": 3},
        {"topics": 1},
        {"users": 0},
        {"topics": 99},
        {"history": -1},
        {"candidates": 0},
        {"popularity": -0.5},
        {"unlabelled": ("test",)},
    ],
)
def test_refuses_sizes_that_make_no_corpus(tmp_path: Path, wrong: dict[str, object]) -> None:
    """One topic or no user fails far from its cause otherwise."""
    ((name, value),) = wrong.items()
    shown = value[0] if isinstance(value, tuple) else value
    with pytest.raises(ValueError, match=f"{name} {shown}, .* expected"):
        synthesize(tmp_path, **wrong)  # type: ignore[arg-type]


def _pairs(path: Path) -> list[Pair]:
    rows = [record.values for record in read_pairs(open_table(str(path), columns=COLUMNS))]
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


def test_seed_decides_every_byte_synthetic_pairs(tmp_path: Path) -> None:
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
    monkeypatch.setattr("newsbert_ray.data.synthetic._NEAR_TEXTS", 64)
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


def test_names_in_one_word_are_refused(tmp_path: Path) -> None:
    """`--folders train,test` would be a folder of that name."""
    functions: tuple[tuple[Callable[..., object], str], ...] = (
        (synthesize, "folders"),
        (synthesize_pairs, "tables"),
    )
    for function, setting in functions:
        with pytest.raises(
            ValueError, match=f"'train,test': not a name; give several apart: --{setting} train"
        ):
            function(tmp_path, **{setting: ["train,test"]})
    assert not list(tmp_path.iterdir())
