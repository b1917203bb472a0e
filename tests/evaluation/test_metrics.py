"""Topic metrics by hand and against scikit-learn's definition; metrics of impressions and of pairs by hand,
against a loop written from the definitions, and by their identities."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from newsbert_ray.evaluation.metrics import (
    RANKING,
    TopicRow,
    impression_metrics,
    pooled_auc,
    rank_candidates,
    ranking_scores,
    tally,
    topic_metrics,
    topic_rows,
)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Impression = list[tuple[float, int]]
"""Score and click of each candidate."""

SCORE = st.one_of(
    st.sampled_from([0.0, -0.0, 0.5, 1.0, 5e-324, 1.7e308, -1.7e308, 1 / 3, math.nextafter(1.0, 2.0)]),
    st.floats(allow_nan=False, allow_infinity=False),
)
IMPRESSIONS = st.lists(st.lists(st.tuples(SCORE, st.integers(0, 1)), max_size=15), max_size=8)


def test_by_hand() -> None:
    """3 of 5 right; F1 of the topics 2*2/(3+3), 2*1/(2+1) and 0/(0+1); a topic nobody has or gives does not
    count."""
    confusion = np.array([[2, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    found = topic_metrics(confusion)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["macro_f1"] == pytest.approx((4 / 6 + 2 / 3 + 0) / 3)
    assert found["rows"] == 5


def test_against_precision_and_recall() -> None:
    """F1 written as the harmonic mean of precision and recall, on random predictions."""
    generator = np.random.default_rng(0)
    truth, predicted = generator.integers(0, 6, 500), generator.integers(0, 6, 500)
    confusion = np.zeros((6, 6), dtype=np.int64)
    np.add.at(confusion, (truth, predicted), 1)
    scores = []
    for topic in range(6):
        hits = int(((truth == topic) & (predicted == topic)).sum())
        precision, recall = hits / (predicted == topic).sum(), hits / (truth == topic).sum()
        scores.append(2 * precision * recall / (precision + recall))
    found = topic_metrics(confusion)
    assert found["accuracy"] == pytest.approx((truth == predicted).mean())
    assert found["macro_f1"] == pytest.approx(np.mean(scores))


def test_impression_by_hand() -> None:
    """Six candidates, clicks at ranks 2 and 6: a first-hit MRR, or an ideal that forgets the second click,
    gives other numbers."""
    scores, clicked = np.array([0.1, 0.9, 0.8, 0.5, 0.4, 0.3]), np.array([1, 0, 1, 0, 0, 0])
    found = impression_metrics(scores, clicked, np.array([0, 6]))
    ideal = 1 + 1 / math.log2(3)
    assert found["auc"].item() == 3 / 8  # pairs won: three of the four others by rank 2, none by rank 6
    assert found["mrr"].item() == pytest.approx((1 / 2 + 1 / 6) / 2, abs=1e-15)
    assert found["ndcg5"].item() == pytest.approx((1 / math.log2(3)) / ideal, abs=1e-15)
    assert found["ndcg10"].item() == pytest.approx((1 / math.log2(3) + 1 / math.log2(7)) / ideal, abs=1e-15)


def test_ties_by_hand() -> None:
    """MIND's script reverses an ascending sort: of equal scores the last comes first, and a submission that
    misses a line is judged by that; AUC must not depend on it."""
    tied = np.full(4, 0.25)
    first, last = (np.array(clicks) for clicks in ([1, 0, 0, 0], [0, 0, 0, 1]))
    for clicked, rank in ((first, 4), (last, 1)):
        found = impression_metrics(tied, clicked, np.array([0, 4]))
        assert found["auc"].item() == 0.5
        assert found["mrr"].item() == 1 / rank
    assert rank_candidates(np.array([0.5, 0.5, 0.2, 0.1, 0.5]), np.array([0, 5])).tolist() == [3, 2, 4, 5, 1]


def test_ranks_stay_within_their_impression() -> None:
    """A sort over all candidates that lets a neighbour's score in ranks the wrong news."""
    scores = np.array([1.0, 2.0, 9.0, -5.0, 0.0, 7.0, 8.0])
    assert rank_candidates(scores, np.array([0, 2, 2, 3, 7])).tolist() == [2, 1, 1, 4, 3, 2, 1]


@given(impressions=IMPRESSIONS)
def test_equals_the_definitions(impressions: list[Impression]) -> None:
    """Ties, one candidate, only clicks, no click, no candidate, huge scores: at such edges, too, the
    vectorised form must give what the definitions say."""
    _compare(impressions)


@pytest.mark.parametrize("levels", [1, 2, 7, 0])
def test_equals_the_definitions_in_bulk(levels: int) -> None:
    """Sums over a million candidates lose digits if they run on from one impression to the next."""
    generator = np.random.default_rng(levels)
    sizes = generator.integers(0, 74, 3000)
    sizes[::500] = 300
    impressions: list[Impression] = []
    for size in sizes:
        values = (
            generator.integers(0, levels, size) / levels if levels else generator.standard_normal(size) * 1e9
        )
        clicks = generator.random(size) < generator.choice([0.03, 0.5])
        impressions.append(list(zip(values.tolist(), clicks.astype(int).tolist(), strict=True)))
    _compare(impressions)


def test_more_than_is_compared_at_once() -> None:
    """A block that ends too early, or numbers its clicks from the wrong one, shows in large splits only; one
    impression is larger than a block here, some have no candidate, and one has 200 clicks."""
    generator = np.random.default_rng(5)
    sizes = generator.integers(0, 40, 20_000)
    sizes[[4000, 9000]] = 300_000, 400
    offsets = np.append(0, np.cumsum(sizes))
    scores, clicked = generator.integers(0, 99, offsets[-1]) / 99, generator.random(offsets[-1]) < 0.05
    clicked[offsets[4000] : offsets[4001]] = np.arange(300_000) % 75_000 == 7
    clicked[offsets[9000] : offsets[9001]] = np.arange(400) % 2
    whole, bounds = impression_metrics(scores, clicked, offsets), range(0, 20_001, 1000)
    parts = [
        impression_metrics(
            scores[offsets[a] : offsets[b]], clicked[offsets[a] : offsets[b]], offsets[a : b + 1] - offsets[a]
        )
        for a, b in pairwise(bounds)
    ]
    for name in RANKING:
        np.testing.assert_array_equal(whole[name], np.concatenate([part[name] for part in parts]))
    for i in (4000, 9000):
        of = slice(offsets[i], offsets[i + 1])
        expected = definitions(list(zip(scores[of].tolist(), clicked[of].astype(int).tolist(), strict=True)))
        for name in RANKING:
            assert whole[name][i].item() == pytest.approx(expected[name], abs=1e-12)


def test_single_precision_scores() -> None:
    """What a model gives is float32; a cast to another width must not make or break ties."""
    generator = np.random.default_rng(3)
    scores = generator.standard_normal(4000).round(1).astype(np.float32)
    clicked, offsets = generator.integers(0, 2, 4000), np.arange(0, 4001, 20)
    narrow, wide = (impression_metrics(values, clicked, offsets) for values in (scores, scores.astype(float)))
    assert all(np.array_equal(narrow[name], wide[name]) for name in RANKING)


@given(impressions=IMPRESSIONS, data=st.data())
def test_order_of_candidates_does_not_matter_without_ties(
    impressions: list[Impression], data: st.DataObject
) -> None:
    """A ranking that depends on how candidates are listed judges the list, not the model."""
    distinct = [list({score + 0.0: (score, click) for score, click in rows}.values()) for rows in impressions]
    shuffled = [data.draw(st.permutations(rows)) for rows in distinct]
    before, after = impression_metrics(*_flat(distinct)), impression_metrics(*_flat(shuffled))
    for name in RANKING:
        np.testing.assert_allclose(before[name], after[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "mapped", [lambda s: 1 / (1 + np.exp(-s)), lambda s: 3 * s - 1, np.exp], ids=["sigmoid", "affine", "exp"]
)
def test_monotone_map_leaves_all_alone(mapped: Callable[[Floats], Floats]) -> None:
    """Inner products or probabilities: only their order may count."""
    generator = np.random.default_rng(1)
    scores, offsets = generator.integers(-20, 20, 2000) / 8, np.arange(0, 2001, 25)
    clicked = generator.integers(0, 2, 2000)
    plain = impression_metrics(scores, clicked, offsets)
    other = impression_metrics(mapped(scores), clicked, offsets)
    assert all(np.array_equal(plain[name], other[name]) for name in RANKING)
    pooled, again = (pooled_auc(values, clicked) for values in (scores, mapped(scores)))
    assert pooled == again


def test_ideal_and_worst_order() -> None:
    """Clicks on top give 1, clicks at the end give AUC 0, however many there are."""
    generator = np.random.default_rng(2)
    offsets = np.arange(0, 1501, 15)
    clicked = (generator.random((100, 15)) < 0.4).astype(np.int64)
    clicked[:, 0], clicked[:, 1] = 1, 0
    scores = clicked.ravel() + generator.random(1500) / 2
    best, worst = (impression_metrics(sign * scores, clicked.ravel(), offsets) for sign in (1, -1))
    for name in ("auc", "ndcg5", "ndcg10"):
        np.testing.assert_allclose(best[name], 1.0, rtol=0, atol=1e-15)
    assert (worst["auc"] == 0).all()


@given(impressions=IMPRESSIONS, cuts=st.lists(st.integers(0, 8), max_size=5))
def test_tallies_add_up_over_any_batches(impressions: list[Impression], cuts: list[int]) -> None:
    """Workers that split a split otherwise may not come to other metrics, nor lose or count twice a row."""
    bounds = sorted({0, len(impressions), *(cut for cut in cuts if cut < len(impressions))})
    parts = [impressions[a:b] for a, b in pairwise(bounds)] or [[]]
    whole = tally(impression_metrics(*_flat(impressions)))
    split = np.stack([tally(impression_metrics(*_flat(part))) for part in parts])
    np.testing.assert_allclose(split.sum(axis=0), whole, rtol=0, atol=1e-12)
    assert whole[0] + whole[1] == len(impressions)
    if whole[0]:
        assert ranking_scores(split) == ranking_scores(iter(split))


def test_scores_of_a_split() -> None:
    """The mean is over impressions that count, and its error is that of this mean: s / sqrt(n)."""
    impressions: list[Impression] = [
        [(0.9, 1), (0.1, 0)],
        [(0.1, 1), (0.9, 0), (0.5, 0)],
        [(0.3, 0), (0.2, 0)],
        [(0.2, 1), (0.5, 1), (0.3, 0)],
        [],
        [(0.4, 1)],
    ]
    found = ranking_scores([tally(impression_metrics(*_flat([one]))) for one in impressions])
    assert found["rows"] == 3
    assert found["left_out"] == 3
    mrr = [1.0, 1 / 3, (1 + 1 / 3) / 2]
    assert found["auc"] == pytest.approx((1 + 0 + 0.5) / 3, abs=1e-15)
    assert found["mrr"] == pytest.approx(np.mean(mrr), abs=1e-15)
    assert found["auc_error"] == pytest.approx(0.5 / math.sqrt(3), abs=1e-12)
    assert found["mrr_error"] == pytest.approx(np.std(mrr, ddof=1) / math.sqrt(3), abs=1e-12)
    assert set(found) == {*RANKING, *(f"{name}_error" for name in RANKING), "rows", "left_out"}


def test_single_impression_has_no_error() -> None:
    """A spread of one number is not 0: an error bar of 0 would look certain."""
    found = ranking_scores([tally(impression_metrics(*_flat([[(0.9, 1), (0.1, 0)]])))])
    assert set(found) == {*RANKING, "rows", "left_out"}


def test_nothing_to_rank() -> None:
    """A mean of nothing is no number, and the reader wants to know which nothing."""
    with pytest.raises(ValueError, match="all 2 have no click or only clicks"):
        ranking_scores([tally(impression_metrics(*_flat([[(0.1, 0)], [(0.1, 1), (0.2, 1)]])))])


@pytest.mark.parametrize(
    ("scores", "clicked", "offsets", "message"),
    [
        ([0.1, math.nan], [0, 1], [0, 2], "score nan of candidate 1"),
        ([math.inf, 0.2], [0, 1], [0, 2], "score inf of candidate 0"),
        ([[0.1, 0.2]], [[0, 1]], [0, 2], "flat arrays"),
        ([0.1, 0.2], [0], [0, 2], "0 or 1 for each"),
        ([0.1, 0.2], [0, 2], [0, 2], "0 or 1 for each"),
        ([0.1, 0.2], [-1, -1], [0, 2], "0 or 1 for each"),
        ([0.1, 0.2], [0, 1], [0, 3], "offsets from 0"),
        ([0.1, 0.2], [0, 1], [1, 2], "offsets from 0"),
        ([0.1, 0.2], [0, 1], [0, 2, 1, 2], "ascending"),
        ([0.1, 0.2], [0, 1], [], "offsets from 0"),
        ([0.1, 0.2], [0, 1], [[0, 2]], "flat arrays"),
    ],
)
def test_bad_impressions(scores: list[Any], clicked: list[Any], offsets: list[Any], message: str) -> None:
    """NaN sorts somewhere and a wrong shape broadcasts: each gives a number that looks like any other."""
    with pytest.raises((ValueError, AssertionError), match=message):
        impression_metrics(np.array(scores), np.array(clicked), np.array(offsets))


def test_descending_unsigned_offsets() -> None:
    """A difference of unsigned numbers is never negative, so this damage would pass unseen."""
    with pytest.raises(AssertionError, match="ascending"):
        rank_candidates(np.array([0.1, 0.2]), np.array([0, 2, 1, 2], np.uint64))


def test_pairs_by_hand() -> None:
    """Clicks 3, 2, 1 against 2, 0: five pairs, one of them a tie, of six; and DeLong's error from each one's
    share."""
    found = pooled_auc(np.array([3.0, 2.0, 1.0, 2.0, 0.0]), np.array([1, 1, 1, 0, 0]))
    of_clicks, of_others = [1.0, 0.75, 0.5], [1.5 / 3, 1.0]
    error = math.sqrt(np.var(of_clicks, ddof=1) / 3 + np.var(of_others, ddof=1) / 2)
    assert found["auc"] == 4.5 / 6
    assert found["auc_error"] == pytest.approx(error, abs=1e-15)
    assert found["rows"] == 5


@given(pairs=st.lists(st.tuples(SCORE, st.integers(0, 1)), max_size=40))
def test_pairs_equal_the_definition(pairs: Impression) -> None:
    """AUC and its error by counting every pair of a click and another."""
    scores, clicked, _ = _flat([pairs])
    clicks, others = scores[clicked == 1], scores[clicked == 0]
    if len(clicks) == 0 or len(others) == 0:
        with pytest.raises(AssertionError, match="both clicked and other pairs"):
            pooled_auc(scores, clicked)
        return
    won = np.array([[(a > b) + (a == b) / 2 for b in others] for a in clicks])
    found = pooled_auc(scores, clicked)
    assert found["auc"] == pytest.approx(won.mean(), abs=1e-12)
    assert ("auc_error" in found) == (len(clicks) > 1 and len(others) > 1)
    if "auc_error" in found:
        spread = won.mean(1).var(ddof=1) / len(clicks) + won.mean(0).var(ddof=1) / len(others)
        assert found["auc_error"] == pytest.approx(math.sqrt(spread), abs=1e-12)


def test_error_of_pairs_is_the_spread_of_repetitions() -> None:
    """An error bar that is off by a factor would call noise a gain, or a gain noise."""
    generator = np.random.default_rng(4)
    clicked = np.repeat([1, 0], [60, 140])
    found = [pooled_auc(generator.standard_normal(200) + clicked, clicked) for _ in range(2000)]
    spread = float(np.std([one["auc"] for one in found], ddof=1))
    assert np.mean([one["auc_error"] for one in found]) == pytest.approx(spread, rel=0.06)


def test_bad_pairs() -> None:
    """One class only has no AUC; 0.5 would look like a model that guesses."""
    with pytest.raises(AssertionError, match="both clicked and other pairs"):
        pooled_auc(np.arange(3.0), np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="score nan"):
        pooled_auc(np.array([math.nan, 1.0]), np.array([0, 1]))
    with pytest.raises(AssertionError, match="0 or 1 for each"):
        pooled_auc(np.arange(2.0), np.array([-1, 1]))


def definitions(impression: Impression) -> dict[str, float]:
    """One impression's metrics, each as its definition reads, in plain Python."""
    clicks = [score for score, click in impression if click]
    others = [score for score, click in impression if not click]
    if not clicks or not others:
        return dict.fromkeys(RANKING, math.nan)
    won = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in clicks for b in others)
    order = sorted(range(len(impression)), key=lambda place: (impression[place][0], place), reverse=True)
    listed = [impression[place][1] for place in order]
    ideal = sorted(listed, reverse=True)
    found = {
        "auc": won / (len(clicks) * len(others)),
        "mrr": sum(click / rank for rank, click in enumerate(listed, 1)) / sum(listed),
    }
    for cutoff in (5, 10):
        gains = [
            sum((2**click - 1) / math.log2(rank + 1) for rank, click in enumerate(clicked[:cutoff], 1))
            for clicked in (listed, ideal)
        ]
        found[f"ndcg{cutoff}"] = gains[0] / gains[1]
    return found


def _compare(impressions: list[Impression]) -> None:
    found = impression_metrics(*_flat(impressions))
    expected = [definitions(one) for one in impressions]
    for name in RANKING:
        values = np.array([one[name] for one in expected], float)
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-12, equal_nan=True)
    ranks = rank_candidates(*_flat(impressions)[::2])
    for one, given_ranks in zip(impressions, _split(ranks, impressions), strict=True):
        order = sorted(range(len(one)), key=lambda place: (-one[place][0], -place))
        assert [order.index(place) + 1 for place in range(len(one))] == given_ranks


def _flat(impressions: list[Impression]) -> tuple[Floats, Ints, Ints]:
    scores = np.array([score for one in impressions for score, _ in one], float)
    clicked = np.array([click for one in impressions for _, click in one], np.int64)
    return scores, clicked, np.cumsum([0, *(len(one) for one in impressions)])


def _split(ranks: Ints, impressions: list[Impression]) -> list[list[int]]:
    return [part.tolist() for part in np.split(ranks, np.cumsum([len(one) for one in impressions])[:-1])][
        : len(impressions)
    ]


def test_topic_rows_by_hand() -> None:
    """Most titles first; never predicted: no precision; no titles: no recall; neither: no row."""
    confusion = np.array(
        [[3, 1, 0, 0, 2], [0, 8, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    )
    rows = topic_rows(confusion, ["tv", "news", "kids", "none", "autos"])
    assert rows == [
        TopicRow("news", 8, 10, 0.8, 1.0, 16 / 18, None),
        TopicRow("tv", 6, 3, 1.0, 0.5, 6 / 9, "autos"),
        TopicRow("kids", 1, 0, None, 0.0, 0.0, "news"),
        TopicRow("autos", 0, 2, 0.0, None, 0.0, None),
    ]
    mean = sum(row.f1 for row in rows) / 4
    assert topic_metrics(confusion)["macro_f1"] == pytest.approx(mean)
