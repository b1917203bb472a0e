"""Counts to metrics, in numpy: accuracy and macro-F1 of topics. Knows no model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


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
    hits = np.diag(confusion).astype(float)
    seen = confusion.sum(axis=0) + confusion.sum(axis=1)  # (Y,) true + predicted
    f1 = 2.0 * hits[seen > 0] / seen[seen > 0]
    return {"accuracy": float(hits.sum() / rows), "macro_f1": float(f1.mean()), "rows": float(rows)}
