"""Counts and scores to metrics, in numpy: accuracy and macro-F1 of topics, MIND's official metrics of
impressions, AUC of pairs. Knows no model.

"MIND" is `evaluate.py` of the MIND repository (Wu et al. 2020): each metric per impression, then the plain
mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from newsbert_ray.methods import TASKS

FloatArray = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

RANKING = tuple(metric.name for metric in TASKS["recommendation"].metrics)
"""Metrics of an impression, in the order a tally holds them."""
CUTOFFS = {"ndcg5": 5, "ndcg10": 10}
_COMPARED = 1 << 18
"""Scores compared at once, up to the end of an impression: what a processor's cache holds."""


def topic_metrics(confusion: npt.NDArray[np.int64]) -> dict[str, float]:
    """Accuracy and macro-F1 (NewsBERT 4.1), both 0 to 1.

    Args:
        confusion: (Y, Y) counts, rows true topics, columns predicted ones.
    Returns:
        `accuracy`; `macro_f1`, the plain mean of F1 over topics that occur as truth or prediction; `rows`.
    Raises:
        ValueError: no rows at all.
    """
    rows = int(confusion.sum())
    if rows == 0:
        raise ValueError("no titles to evaluate: the split is empty")
    accuracy = float(np.trace(confusion) / rows)
    return {"accuracy": accuracy, "macro_f1": float(np.nanmean(topic_f1(confusion))), "rows": float(rows)}


def topic_f1(confusion: npt.NDArray[np.int64]) -> FloatArray:
    """F1 of each topic (Y,), 0 to 1; NaN where it occurs neither as truth nor as prediction."""
    hits = np.diag(confusion).astype(float)
    seen = confusion.sum(axis=0) + confusion.sum(axis=1)  # (Y,) true + predicted
    f1: FloatArray = np.divide(2.0 * hits, seen, out=np.full(len(hits), math.nan), where=seen > 0)
    return f1


def impression_metrics(
    scores: npt.NDArray[np.floating], clicked: npt.NDArray[np.integer | np.bool_], offsets: Ints
) -> dict[str, FloatArray]:
    """MIND's four metrics of each impression; N candidates in all, I impressions.

    AUC counts a tie half. MRR is the mean reciprocal rank of all clicks, not of the first. nDCG has gain
    2^y - 1 and discount log2(rank + 1). Ranks are those of `rank_candidates`.

    Args:
        scores: (N,) finite; higher is better.
        clicked: (N,) 0 or 1.
        offsets: (I + 1,) impression i has the candidates offsets[i]:offsets[i + 1].
    Returns:
        `auc`, `mrr`, `ndcg5`, `ndcg10`: (I,) each, 0 to 1, NaN where an impression has no AUC: no click, only
        clicks, or no candidate.
    Raises:
        ValueError: shapes that do not fit, a score that is no number, a click that is neither 0 nor 1.
    """
    offsets = _check_candidates(scores, offsets)
    places = np.flatnonzero(_as_flags(clicked, len(scores)))  # of all clicks
    first = np.searchsorted(places, offsets)  # (I + 1,) impression i has the clicks first[i]:first[i + 1]
    count, size = np.diff(first), np.diff(offsets)
    owner = np.repeat(np.arange(len(size)), count)
    rank, beaten = _rank_clicks(scores, offsets, places, first)

    def sums(values: FloatArray | Ints) -> FloatArray:
        return np.bincount(owner, values, minlength=len(size)).astype(np.float64)

    with np.errstate(invalid="ignore", divide="ignore"):
        # Of what a click beats, other clicks and itself are taken off: together the square of their number.
        wins = sums(beaten) - count**2
        found = {"auc": wins / (2 * count * (size - count)), "mrr": sums(1 / rank) / count}
        gains = 1 / np.log2(rank + 1)
        for name, cutoff in CUTOFFS.items():
            ideal = np.cumsum(np.append(0, 1 / np.log2(np.arange(2, cutoff + 2))))
            found[name] = sums(np.where(rank <= cutoff, gains, 0.0)) / ideal[np.minimum(count, cutoff)]
    counted = (count > 0) & (count < size)
    return {name: np.where(counted, found[name], np.nan) for name in RANKING}


def rank_candidates(scores: npt.NDArray[np.floating], offsets: Ints) -> Ints:
    """Rank of each candidate within its impression, 1 the highest score.

    Among equal scores the later candidate comes first, as in MIND's `argsort(score)[::-1]`, its sort made
    stable.

    Args:
        scores: (N,) finite.
        offsets: (I + 1,) as in `impression_metrics`.
    Returns:
        (N,) ranks, 1 to the number of an impression's candidates.
    Raises:
        ValueError: as `impression_metrics`.
    """
    offsets = _check_candidates(scores, offsets)
    ranks = np.empty(len(scores), np.int64)
    ranks[_order(scores, offsets)] = np.arange(1, len(scores) + 1)
    ranks -= np.repeat(offsets[:-1], np.diff(offsets))
    return ranks


def tally(per_impression: Mapping[str, FloatArray]) -> FloatArray:
    """Impressions summed up, to be added to other tallies.

    Args:
        per_impression: what `impression_metrics` gives.
    Returns:
        (10,) impressions counted, impressions left out (NaN), each metric's sum, each one's sum of squares.
    """
    values = np.stack([per_impression[name] for name in RANKING])  # (4, I)
    counted = values.compress(~np.isnan(values[0]), axis=1)
    numbers = [counted.shape[1], values.shape[1] - counted.shape[1]]
    return np.concatenate([numbers, counted.sum(axis=1), np.square(counted).sum(axis=1)])


def ranking_scores(tallies: Iterable[FloatArray]) -> dict[str, float]:
    """The plain mean over impressions of each metric.

    Args:
        tallies: one of each batch, (batches, 10) or an iterable. They are added in this order: the same
            batches give the same bits, whoever worked on them.
    Returns:
        `auc`, `mrr`, `ndcg5`, `ndcg10`; of each `<metric>_error`, the mean's standard error over impressions
        (left out for a single one); `rows`, impressions counted; `left_out`, those without a metric.
    Raises:
        ValueError: no impression counts.
    """
    total = np.zeros(2 + 2 * len(RANKING))
    for one in tallies:
        total += one
    rows, left_out = int(total[0]), int(total[1])
    if rows == 0 and left_out == 0:
        raise ValueError("no impressions to evaluate: the split is empty")
    if rows == 0:
        raise ValueError(
            f"no impression can be evaluated: of {left_out} each has no click or only clicks; at least one "
            "with clicked and other candidates expected"
        )
    means, squares = total[2 : 2 + len(RANKING)] / rows, total[2 + len(RANKING) :]
    found = {name: float(mean) for name, mean in zip(RANKING, means, strict=True)}
    if rows > 1:
        variances = np.maximum(0.0, squares - rows * means**2) / (rows - 1)
        for name, variance in zip(RANKING, variances, strict=True):
            found[f"{name}_error"] = math.sqrt(variance / rows)
    return {**found, "rows": float(rows), "left_out": float(left_out)}


def pooled_auc(
    scores: npt.NDArray[np.floating], clicked: npt.NDArray[np.integer | np.bool_]
) -> dict[str, float]:
    """AUC over all pairs at once (retrieval, NewsBERT 4.3), a tie counting half.

    The standard error is DeLong's (DeLong, DeLong and Clarke-Pearson 1988, computed by mean ranks as in Sun
    and Xu 2014). It takes pairs as independent; those of one query are not quite.

    Args:
        scores: (N,) finite; higher is better.
        clicked: (N,) 0 or 1.
    Returns:
        `auc`, 0 to 1; `auc_error`, left out with fewer than two clicks or two others; `rows`, N.
    Raises:
        ValueError: as `impression_metrics`, or clicks only, or none.
    """
    _check_candidates(scores, np.array([0, np.size(scores)]))
    clicks = _as_flags(clicked, len(scores))
    m = int(clicks.sum())
    n = len(clicks) - m
    if m == 0 or n == 0:
        raise ValueError(
            f"no AUC of {len(clicks)} pairs, {m} of them clicked: at least one clicked and one other expected"
        )
    among_all = _doubled_mean_ranks(scores)
    # (m,) twice the others that each click beats; (n,) twice the clicks that beat each of the others.
    beaten = 2 * len(clicks) - among_all[clicks] - (2 * m - _doubled_mean_ranks(scores[clicks]))
    beaten_by = among_all[~clicks] - _doubled_mean_ranks(scores[~clicks])
    found = {"auc": int(beaten.sum()) / (2 * m * n)}
    if m > 1 and n > 1:
        variance = np.var(beaten / (2 * n), ddof=1) / m + np.var(beaten_by / (2 * m), ddof=1) / n
        found["auc_error"] = math.sqrt(variance)
    return {**found, "rows": float(len(clicks))}


def _rank_clicks(
    scores: npt.NDArray[np.floating], offsets: Ints, places: Ints, first: Ints
) -> tuple[Ints, Ints]:
    """How the clicks stand in their impressions, without sorting: each is held against its own candidates.

    Every impression's first click is compared at once, then every second one, and so on.

    Args:
        places: (P,) which candidates were clicked, ascending.
        first: (I + 1,) impression i has the clicks first[i]:first[i + 1].
    Returns:
        (P,) ranks as those of `rank_candidates`; (P,) twice the candidates with a lower score, plus those
        with an equal one, itself included.
    """
    rank, beaten = np.empty(len(places), np.int64), np.empty(len(places), np.int64)
    column = places - np.repeat(offsets[:-1], np.diff(first))
    cuts = np.searchsorted(offsets, np.arange(0, len(scores), _COMPARED))
    for low, high in pairwise([*cuts, len(offsets) - 1]):
        others = scores[offsets[low] : offsets[high]]
        size, left = np.diff(offsets[low : high + 1]), np.diff(first[low : high + 1])
        click = first[low:high]
        while left.any():
            if not left.all():
                others = others[np.repeat(left > 0, size)]
                size, click, left = size[left > 0], click[left > 0], left[left > 0]
            starts = np.cumsum(size) - size
            own, itself = np.repeat(scores[places[click]], size), starts + column[click]
            higher = np.add.reduceat(others > own, starts, dtype=np.int64)
            equal = others == own
            equal[itself] = False
            ties = np.flatnonzero(equal)
            row = np.searchsorted(starts, ties, side="right") - 1  # whose tie
            rank[click] = higher + 1 + np.bincount(row[ties > itself[row]], minlength=len(click))
            beaten[click] = 2 * (size - higher) - 1 - np.bincount(row, minlength=len(click))
            click, left = click + 1, left - 1
    return rank, beaten


def _order(scores: npt.NDArray[np.floating], offsets: Ints) -> Ints:
    """(N,) candidates, impression after impression, best first, the later first among equals.

    Impressions of one length are sorted as the rows of a matrix: six times as fast as one lexsort over all,
    whose sort does not know that impressions lie together already.
    """
    order = np.empty(len(scores), np.int64)
    size = np.diff(offsets)
    by_size = np.argsort(size, kind="stable")
    for rows in np.split(by_size, np.flatnonzero(np.diff(size[by_size])) + 1):
        places = offsets[rows, None] + np.arange(size[rows[0]] if len(rows) else 0)  # (rows, length)
        ascending = np.argsort(scores[places], axis=1, kind="stable")
        order[places] = offsets[rows, None] + ascending[:, ::-1]
    return order


def _doubled_ranks(ordered: npt.NDArray[np.floating], offsets: Ints, places: Ints) -> Ints:
    """Twice the mean rank of all with an equal score in the same impression, so that it is whole.

    Args:
        ordered: (N,) scores, impression after impression, best first.
        places: (P,) which of them to rank.
    Returns:
        (P,) ranks as if all were one impression: an impression's own are lower by twice its offset.
    """
    starts = np.ones(len(ordered) + 1, np.bool_)
    starts[1:-1] = ordered[1:] != ordered[:-1]
    starts[offsets] = True
    first = np.flatnonzero(starts)  # of each run of equals, and N
    run = np.searchsorted(first, places, side="right")
    return first[run - 1] + first[run] + 1


def _doubled_mean_ranks(scores: npt.NDArray[np.floating]) -> Ints:
    """(N,) twice the rank of each score among all, 1 the highest, equals sharing their mean rank."""
    whole = np.array([0, len(scores)])
    order = _order(scores, whole)
    ranks = np.empty(len(scores), np.int64)
    ranks[order] = _doubled_ranks(scores[order], whole, np.arange(len(scores)))
    return ranks


def _check_candidates(scores: npt.NDArray[np.floating], offsets: Ints) -> Ints:
    if np.ndim(scores) != 1:
        raise ValueError(f"scores of shape {np.shape(scores)}: one flat array of all candidates expected")
    if np.ndim(offsets) != 1 or len(offsets) == 0 or not np.issubdtype(offsets.dtype, np.integer):
        raise ValueError(f"offsets of shape {np.shape(offsets)}: one more integer than impressions expected")
    offsets = offsets.astype(np.int64)
    if offsets[0] != 0 or offsets[-1] != len(scores) or (np.diff(offsets) < 0).any():
        raise ValueError(
            f"offsets from {offsets[0]} to {offsets[-1]}: ascending from 0 to {len(scores)}, the number of "
            "scores, expected"
        )
    finite = np.isfinite(scores)
    if not finite.all():
        place = int(np.argmin(finite))
        raise ValueError(f"score {scores[place]} of candidate {place}: a finite number expected")
    return offsets


def _as_flags(clicked: npt.NDArray[np.integer | np.bool_], count: int) -> npt.NDArray[np.bool_]:
    if np.shape(clicked) != (count,):
        raise ValueError(f"clicked of shape {np.shape(clicked)}: one for each of {count} scores expected")
    flags: npt.NDArray[np.bool_] = clicked == 1
    odd = ~flags & (clicked != 0)
    if odd.any():
        place = int(np.argmax(odd))
        raise ValueError(
            f"clicked {clicked[place]} of candidate {place}: 0 or 1 expected; unlabelled rows have no metric"
        )
    return flags
