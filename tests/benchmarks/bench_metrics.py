"""MIND's metrics over all impressions at once, compared with loops over single impressions.

    python -m tests.benchmarks.bench_metrics [--impressions 70000] [--candidates 37] [--rounds 3]

The first loop works like MIND's own script: for each impression the area under the ROC curve, an argsort and
sums in numpy for MRR and both nDCG, then the mean. The area is computed with numpy. If scikit-learn is
installed, which MIND's script uses, a second loop takes its function. The last loop is plain Python on lists,
written from the definitions; for short impressions it is faster than numpy. All take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from newsbert_ray.evaluation.metrics import RANKING, impression_metrics, ranking_scores, tally
from tests.benchmarks.subject import say
from tests.evaluation.test_metrics import definitions

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Area = Callable[[Ints, Floats], float]
Loop = Callable[[Floats, Ints, Ints], Floats]


def main() -> None:
    """Print one JSON line per figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--impressions", type=int, default=70_000)
    parser.add_argument("--candidates", type=int, default=37, help="mean number of an impression")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    scores, clicked, offsets = invent(options.impressions, options.candidates)
    for name, area in areas():
        loop = partial(plain_loop, area=area)
        compare(f"a loop with {name}'s AUC", loop, scores, clicked, offsets, options.rounds)
    compare("a loop in plain Python", python_loop, scores, clicked, offsets, options.rounds)


def invent(impressions: int, candidates: int) -> tuple[Floats, Ints, Ints]:
    """Scores (some tied), clicks and offsets: 2 to twice the mean candidates, one click and 2 % more."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(2, 2 * candidates - 1, impressions)
    offsets = np.append(0, np.cumsum(sizes))
    clicked = (generator.random(offsets[-1]) < 0.02).astype(np.int64)
    clicked[offsets[:-1] + (generator.random(impressions) * sizes).astype(np.int64)] = 1
    return generator.standard_normal(offsets[-1]).round(4), clicked, offsets


def areas() -> Iterator[tuple[str, Area]]:
    """Functions for an impression's AUC, by name."""
    yield "numpy", area_under_curve
    try:
        from sklearn.metrics import roc_auc_score  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        return
    yield "scikit-learn", roc_auc_score


def compare(name: str, loop: Loop, scores: Floats, clicked: Ints, offsets: Ints, rounds: int) -> None:
    """Time both in turns; print their ratio and their largest difference."""
    ours, plain = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        per_impression = impression_metrics(scores, clicked, offsets)
        result = ranking_scores([tally(per_impression)])
        middle = time.perf_counter()
        rows = loop(scores, clicked, offsets)
        means = np.nanmean(rows, axis=0)
        plain.append(time.perf_counter() - middle)
        ours.append(middle - start)
    apart = max(float(np.nanmax(np.abs(per_impression[key] - rows[:, i]))) for i, key in enumerate(RANKING))
    count = len(offsets) - 1
    say(
        f"metrics of all impressions against {name}",
        impressions=count,
        candidates=len(scores),
        ours_seconds=statistics.median(ours),
        plain_seconds=statistics.median(plain),
        ours_impressions_per_second=count / statistics.median(ours),
        plain_impressions_per_second=count / statistics.median(plain),
        ratio_median=statistics.median(b / a for a, b in zip(ours, plain, strict=True)),
        largest_difference=apart,
        largest_difference_of_means=max(abs(result[key] - means[i]) for i, key in enumerate(RANKING)),
        same_left_out=bool((np.isnan(rows[:, 0]) == np.isnan(per_impression["auc"])).all()),
    )


def plain_loop(scores: Floats, clicked: Ints, offsets: Ints, area: Area) -> Floats:
    """Metrics (I, 4), one impression at a time."""
    rows = np.full((len(offsets) - 1, len(RANKING)), np.nan)
    for i, (start, end) in enumerate(pairwise(offsets)):
        truth, predicted = clicked[start:end], scores[start:end]
        if 0 < truth.sum() < len(truth):
            rows[i] = (
                area(truth, predicted),
                reciprocal(truth, predicted),
                gain(truth, predicted, 5),
                gain(truth, predicted, 10),
            )
    return rows


def python_loop(scores: Floats, clicked: Ints, offsets: Ints) -> Floats:
    """Metrics (I, 4), one impression at a time, from the definitions."""
    predicted, truth = scores.tolist(), clicked.tolist()
    rows = (
        definitions(list(zip(predicted[start:end], truth[start:end], strict=True)))
        for start, end in pairwise(offsets.tolist())
    )  # not kept, so that the garbage collector does not scan them
    return np.array([one[name] for one in rows for name in RANKING]).reshape(-1, len(RANKING))


def area_under_curve(truth: Ints, scores: Floats) -> float:
    """Area under the ROC curve by trapezoids, one point for each distinct score."""
    order = np.argsort(scores, kind="stable")[::-1]
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    hits = np.cumsum(truth[order])[ends]
    misses = ends + 1 - hits
    heights, widths = np.append(0, hits), np.diff(misses, prepend=0)
    return float((widths * (heights[1:] + heights[:-1])).sum() / (2 * hits[-1] * misses[-1]))


def reciprocal(truth: Ints, scores: Floats) -> float:
    """MRR over all clicks."""
    listed = truth[np.argsort(scores, kind="stable")[::-1]]
    return float((listed / np.arange(1, len(listed) + 1)).sum() / listed.sum())


def gain(truth: Ints, scores: Floats, cutoff: int) -> float:
    """nDCG@cutoff."""

    def discounted(by: Floats | Ints) -> float:
        listed = truth[np.argsort(by, kind="stable")[::-1][:cutoff]]
        return float(((2.0**listed - 1) / np.log2(np.arange(2, len(listed) + 2))).sum())

    return discounted(scores) / discounted(truth)


if __name__ == "__main__":
    main()
