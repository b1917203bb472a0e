"""Metrics in numpy: accuracy and macro-F1 of topics, MIND's metrics of impressions, AUC of pairs.

"MIND" is `evaluate.py` of the MIND repository (Wu et al. 2020): each metric per impression, then the mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from newsbert_ray.methods import TASKS

FloatArray = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

RANKING = tuple(metric.name for metric in TASKS["recommendation"].metrics)
"""Metrics of an impression, in the order of a tally."""
CUTOFFS = {"ndcg5": 5, "ndcg10": 10}
_COMPARED = 1 << 18
"""Scores compared at once, rounded up to whole impressions: they fit in a processor's cache."""


def topic_metrics(confusion: npt.NDArray[np.int64]) -> dict[str, float]:
    """`accuracy` and `macro_f1` (NewsBERT 4.1), the mean of F1 over topics that occur as truth or prediction,
    both 0 to 1, and `rows`, of a confusion matrix (Y, Y): rows are true topics, columns predicted ones."""
    rows = int(confusion.sum())
    assert rows, "no titles to evaluate"
    accuracy = float(np.trace(confusion) / rows)
    return {"accuracy": accuracy, "macro_f1": float(np.nanmean(topic_f1(confusion))), "rows": float(rows)}


def topic_f1(confusion: npt.NDArray[np.int64]) -> FloatArray:
    """F1 of each topic (Y,), 0 to 1; NaN if it occurs neither as truth nor as prediction."""
    hits = np.diag(confusion).astype(float)
    seen = confusion.sum(axis=0) + confusion.sum(axis=1)  # (Y,) true + predicted
    f1: FloatArray = np.divide(2.0 * hits, seen, out=np.full(len(hits), math.nan), where=seen > 0)
    return f1


class TopicRow(NamedTuple):
    """One topic's results: its titles, those predicted as it, and the other topic it is most often taken for.
    A share of nothing is None."""

    topic: str
    titles: int
    predicted: int
    precision: float | None
    recall: float | None
    f1: float
    taken_for: str | None


def topic_rows(confusion: Ints, labels: Sequence[str]) -> list[TopicRow]:
    """Results of the topics that occur, most frequent first; `confusion` as in `topic_metrics`."""
    rows = []
    errors = confusion - np.diag(np.diag(confusion))
    for i, (topic, f1) in enumerate(zip(labels, topic_f1(confusion).tolist(), strict=True)):
        titles, predicted, hits = int(confusion[i].sum()), int(confusion[:, i].sum()), int(confusion[i, i])
        shares = (hits / predicted if predicted else None, hits / titles if titles else None)
        taken_for = labels[int(errors[i].argmax())] if errors[i].any() else None
        rows += [TopicRow(topic, titles, predicted, *shares, f1, taken_for)] if titles or predicted else []
    return sorted(rows, key=lambda row: -row.titles)


def impression_metrics(
    scores: npt.NDArray[np.floating], clicked: npt.NDArray[np.integer | np.bool_], offsets: Ints
) -> dict[str, FloatArray]:
    """MIND's four metrics of I impressions with N candidates together.

    In AUC a tie counts half. MRR is the mean reciprocal rank of all clicks, not of the first. nDCG has gain
    2^y - 1 and discount log2(rank + 1). Ranks are those of `rank_candidates`.

    Args:
        scores: (N,) finite, otherwise ValueError; higher is better.
        clicked: (N,) 0 or 1.
        offsets: (I + 1,) impression i has the candidates offsets[i]:offsets[i + 1].
    Returns:
        `auc`, `mrr`, `ndcg5`, `ndcg10`: (I,) each, 0 to 1; NaN for an impression without AUC: no click, only
        clicks, or no candidate.
    """
    offsets = _check_candidates(scores, offsets)
    positions = np.flatnonzero(_as_flags(clicked, len(scores)))  # of all clicks
    first = np.searchsorted(positions, offsets)  # (I + 1,) impression i has the clicks first[i]:first[i + 1]
    count, size = np.diff(first), np.diff(offsets)
    owner = np.repeat(np.arange(len(size)), count)
    rank, beaten = _rank_clicks(scores, offsets, positions, first)

    def sums(values: FloatArray | Ints) -> FloatArray:
        return np.bincount(owner, values, minlength=len(size)).astype(np.float64)

    with np.errstate(invalid="ignore", divide="ignore"):
        # `beaten` includes the clicks themselves: together the square of their number.
        wins = sums(beaten) - count**2
        metrics = {"auc": wins / (2 * count * (size - count)), "mrr": sums(1 / rank) / count}
        gains = 1 / np.log2(rank + 1)
        for name, cutoff in CUTOFFS.items():
            ideal = np.cumsum(np.append(0, 1 / np.log2(np.arange(2, cutoff + 2))))
            metrics[name] = sums(np.where(rank <= cutoff, gains, 0.0)) / ideal[np.minimum(count, cutoff)]
    counted = (count > 0) & (count < size)
    return {name: np.where(counted, metrics[name], np.nan) for name in RANKING}


def rank_candidates(scores: npt.NDArray[np.floating], offsets: Ints) -> Ints:
    """Rank (N,) of each candidate within its impression; 1 is the highest score. Arguments and errors are
    those of `impression_metrics`.

    Among equal scores the later candidate comes first, as in MIND's stable `argsort(score)[::-1]`.
    """
    offsets = _check_candidates(scores, offsets)
    positions, size = np.arange(len(scores)), np.diff(offsets)
    best_first = np.lexsort((-positions, -scores, np.repeat(np.arange(len(size)), size)))
    ranks = np.empty(len(scores), np.int64)
    ranks[best_first] = positions + 1 - np.repeat(offsets[:-1], size)
    return ranks


def tally(per_impression: Mapping[str, FloatArray]) -> FloatArray:
    """Sums over impressions, which can be added to other tallies, of what `impression_metrics` returns: (10,)
    impressions counted, impressions left out (NaN), each metric's sum, each one's sum of squares."""
    values = np.stack([per_impression[name] for name in RANKING])  # (4, I)
    counted = values.compress(~np.isnan(values[0]), axis=1)
    numbers = [counted.shape[1], values.shape[1] - counted.shape[1]]
    return np.concatenate([numbers, counted.sum(axis=1), np.square(counted).sum(axis=1)])


def ranking_scores(tallies: Iterable[FloatArray]) -> dict[str, float]:
    """Mean of each metric over impressions; ValueError where none has metrics.

    Args:
        tallies: one per batch. They are added in this order, so that the same batches give the same bits on
            any number of workers.
    Returns:
        `auc`, `mrr`, `ndcg5`, `ndcg10`; for each `<metric>_error`, the standard error of the mean (omitted
        for a single impression); `rows`, impressions counted; `left_out`, those without metrics.
    """
    total = np.zeros(2 + 2 * len(RANKING))
    for part in tallies:
        total += part
    rows, left_out = int(total[0]), int(total[1])
    if rows == 0:
        raise ValueError(
            f"no impression can be evaluated: all {left_out} have no click or only clicks; at least one with "
            "clicked and other candidates expected"
        )
    means, squares = total[2 : 2 + len(RANKING)] / rows, total[2 + len(RANKING) :]
    scores = {name: float(mean) for name, mean in zip(RANKING, means, strict=True)}
    if rows > 1:
        variances = np.maximum(0.0, squares - rows * means**2) / (rows - 1)
        for name, variance in zip(RANKING, variances, strict=True):
            scores[f"{name}_error"] = math.sqrt(variance / rows)
    return {**scores, "rows": float(rows), "left_out": float(left_out)}


def pooled_auc(
    scores: npt.NDArray[np.floating], clicked: npt.NDArray[np.integer | np.bool_]
) -> dict[str, float]:
    """AUC over all pairs together (retrieval, NewsBERT 4.3); a tie counts half.

    The standard error is DeLong's (DeLong, DeLong and Clarke-Pearson 1988), computed by mean ranks (Sun and
    Xu 2014). It assumes independent pairs; pairs of the same query are not quite.

    Args:
        scores: (N,) finite, otherwise ValueError; higher is better.
        clicked: (N,) 0 or 1.
    Returns:
        `auc`, 0 to 1; `auc_error`, omitted with fewer than two clicks or two others; `rows`, N.
    """
    _check_candidates(scores, np.array([0, np.size(scores)]))
    clicks = _as_flags(clicked, len(scores))
    m = int(clicks.sum())
    n = len(clicks) - m
    assert 0 < m < len(clicks), "both clicked and other pairs expected"
    among_all = _doubled_mean_ranks(scores)
    # (m,) twice the others that each click beats; (n,) twice the clicks that beat each of the others.
    beaten = 2 * len(clicks) - among_all[clicks] - (2 * m - _doubled_mean_ranks(scores[clicks]))
    beaten_by = among_all[~clicks] - _doubled_mean_ranks(scores[~clicks])
    result = {"auc": int(beaten.sum()) / (2 * m * n)}
    if m > 1 and n > 1:
        variance = np.var(beaten / (2 * n), ddof=1) / m + np.var(beaten_by / (2 * m), ddof=1) / n
        result["auc_error"] = math.sqrt(variance)
    return {**result, "rows": float(len(clicks))}


def _rank_clicks(
    scores: npt.NDArray[np.floating], offsets: Ints, positions: Ints, first: Ints
) -> tuple[Ints, Ints]:
    """(P,) ranks of the clicks, without sorting; (P,) twice the candidates with a lower score plus the equal
    ones, itself included. Compares the first click of every impression with its candidates, then every second
    click, and so on."""
    rank, beaten = np.empty(len(positions), np.int64), np.empty(len(positions), np.int64)
    column = positions - np.repeat(offsets[:-1], np.diff(first))
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
            own, itself = np.repeat(scores[positions[click]], size), starts + column[click]
            higher = np.add.reduceat(others > own, starts, dtype=np.int64)
            equal = others == own
            equal[itself] = False
            ties = np.flatnonzero(equal)
            row = np.searchsorted(starts, ties, side="right") - 1  # impression of each tie
            rank[click] = higher + 1 + np.bincount(row[ties > itself[row]], minlength=len(click))
            beaten[click] = 2 * (size - higher) - 1 - np.bincount(row, minlength=len(click))
            click, left = click + 1, left - 1
    return rank, beaten


def _doubled_mean_ranks(scores: npt.NDArray[np.floating]) -> Ints:
    """(N,) twice the rank of each score among all, 1 the highest; equal scores share their mean rank."""
    from scipy.stats import rankdata  # type: ignore[import-untyped]

    ranks: Ints = (2 * rankdata(-scores)).astype(np.int64)
    return ranks


def _check_candidates(scores: npt.NDArray[np.floating], offsets: Ints) -> Ints:
    assert scores.ndim == offsets.ndim == 1, "flat arrays expected"
    offsets = offsets.astype(np.int64)
    assert (*offsets[:1], *offsets[-1:]) == (0, len(scores)), "offsets from 0 to all scores expected"
    assert (np.diff(offsets) >= 0).all(), "ascending offsets expected"
    finite = np.isfinite(scores)
    if not finite.all():
        index = int(np.argmin(finite))
        raise ValueError(f"score {scores[index]} of candidate {index}: a finite number expected")
    return offsets


def _as_flags(clicked: npt.NDArray[np.integer | np.bool_], count: int) -> npt.NDArray[np.bool_]:
    flags: npt.NDArray[np.bool_] = clicked == 1
    assert flags.shape == (count,), "0 or 1 for each score expected"
    assert (flags | (clicked == 0)).all(), "0 or 1 for each score expected"
    return flags
