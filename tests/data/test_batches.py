"""Batches: what they hold, and buckets of texts with the least padding."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from newsbert_ray.data.batches import Topics, cut_buckets
from newsbert_ray.data.examples import Part, Titles, collate
from newsbert_ray.data.shards import TextTable


def test_collate_by_hand() -> None:
    """Columns, shapes and dtypes that every model relies on."""
    table = TextTable(np.array([7, 8, 9, 5, 6], np.int32), np.array([0, 3, 5]))
    two = Titles(table, np.array([1, 0]), np.array([1, 0]))
    batch = collate(Part(two, rows=4, texts=4, tokens=11), pad_id=99, budget=512)
    (bucket,) = batch.buckets
    assert bucket.rows is not None
    assert bucket.rows.tolist() == [1, 0]
    assert isinstance(batch.target, Topics)
    assert bucket.input_ids.tolist() == [[5, 6, 99], [7, 8, 9]]
    assert bucket.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert bucket.uses is None
    assert batch.target.labels.tolist() == [1, 0]
    assert (batch.rows, batch.texts, batch.tokens) == (4, 4, 11)
    kinds = {str(t.dtype) for t in (bucket.input_ids, bucket.attention_mask, batch.target.labels)}
    assert kinds == {"torch.int64"}
    pieces = collate(Part(two, rows=4, texts=4, tokens=11), pad_id=99, budget=3).buckets
    assert [piece.input_ids.tolist() for piece in pieces] == [[[5, 6]], [[7, 8, 9]]]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(40, 200), st.integers(0, 60))
def test_buckets_hold_every_text_and_waste_least(lengths: list[int], budget: int, start: int) -> None:
    """A text left out of all buckets would be no news; padding beyond the best cuts is time for nothing."""
    ordered = np.sort(np.array(lengths))
    cuts = list(cut_buckets(ordered, budget=budget, start_tokens=start))
    assert [a for a, _ in cuts] == [0, *(b for _, b in cuts[:-1])]
    assert cuts[-1][1] == len(ordered)
    for a, b in cuts:
        assert b > a
        assert (b - a) * ordered[b - 1] <= budget + ordered[b - 1]
    unlimited = list(cut_buckets(ordered, budget=10**9, start_tokens=start))
    cost = sum((b - a) * int(ordered[b - 1]) + start for a, b in unlimited)
    # Never worse than one bucket, nor than one for each length.
    assert cost <= len(ordered) * int(ordered[-1]) + start
    assert cost <= int(ordered.sum()) + start * len(set(lengths))


def test_buckets_are_the_best_ones() -> None:
    """Against all possible cuts, tried one by one."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        ordered = np.sort(generator.integers(1, 20, 7))
        best = min(
            sum((b - a) * int(ordered[b - 1]) + 9 for a, b in zip([0, *cut], [*cut, 7], strict=True))
            for bits in range(64)
            for cut in [[i + 1 for i in range(6) if bits >> i & 1]]
        )
        cuts = cut_buckets(ordered, budget=10**6, start_tokens=9)
        assert sum((b - a) * int(ordered[b - 1]) + 9 for a, b in cuts) == best
