"""Splits, on arrays made by hand."""

from __future__ import annotations

from datetime import datetime

import numpy as np
import pytest

from newsbert_ray.data.split import (
    NO_CODE,
    RARE,
    Fate,
    Shares,
    draw_uniform,
    find_duplicates,
    hash_ids,
    held_out,
    is_known,
    minutes_of,
    number_news,
    order_sources,
    role_of,
    split_by_hash,
    split_by_time,
    split_news,
)

IDS = [f"N{i}" for i in range(4000)]


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["MINDsmall_dev", "MINDsmall_train"], [1, 0]),
        (["test", "dev", "train"], [2, 1, 0]),
        (["a", "b"], [0, 1]),
        (["train_a", "train_b"], [0, 1]),
        (["validation", "test"], [0, 1]),
        (["b_test_train", "a_train"], [0, 1]),
    ],
)
def test_names_decide_the_order_only_where_they_are_clear(names: list[str], order: list[int]) -> None:
    """Training on the test folder because it was named first would make every number too good."""
    assert order_sources(names) == order


def test_roles() -> None:
    """With two sources the second is test, not validation."""
    assert [role_of(i, 1) for i in range(1)] == [Fate.TRAIN]
    assert [role_of(i, 2) for i in range(2)] == [Fate.TRAIN, Fate.TEST]
    assert [role_of(i, 4) for i in range(4)] == [Fate.TRAIN, Fate.VALIDATION, Fate.VALIDATION, Fate.TEST]


def test_a_split_with_a_source_of_its_own_takes_nothing_from_training() -> None:
    """Training news spent on a split that has its own folder are lost for nothing."""
    assert [held_out(Shares(0.1, 0.2), sources=n) for n in (1, 2, 3)] == [(0.1, 0.2), (0.1, 0.0), (0.0, 0.0)]


def test_hashes_are_the_same_for_ever() -> None:
    """Another hash in a later version would silently move news between train and test."""
    hashes = hash_ids(["N1", "N2"])
    assert hashes.tolist() == [4870954943910693542, 17677784663273689699]
    assert draw_uniform(hashes, seed=3).tolist() == [_split_mix(number, 3) for number in hashes.tolist()]


def _split_mix(number: int, seed: int) -> float:
    """SplitMix64 in Python's integers, from its authors' C."""
    wrap = 2**64
    value = (number + (seed + 1) * 0x9E3779B97F4A7C15) % wrap
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % wrap
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % wrap
    return ((value ^ (value >> 31)) >> 11) / 2**53


def test_shares_and_seeds() -> None:
    """A share of the wrong end, or a seed without effect, would not show in one run's counts."""
    hashes = hash_ids(IDS)
    fates = split_by_hash(hashes, Shares(0.1, 0.2), seed=0)
    shares = np.bincount(fates, minlength=3) / len(IDS)
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.02)
    assert (split_by_hash(hashes, Shares(0.1, 0.2), seed=0) == fates).all()
    assert (split_by_hash(hashes, Shares(0.1, 0.2), seed=1) != fates).mean() > 0.3
    assert (split_by_hash(hashes[::-1], Shares(0.1, 0.2), seed=0) == fates[::-1]).all()


def test_first_well_formed_line_wins() -> None:
    """A damaged first copy must not take the good second one with it."""
    hashes = hash_ids(["a", "b", "a", "b", "a"])
    assert find_duplicates(hashes, np.array([True, False, True, True, True])) == {2: 0, 4: 0}
    assert find_duplicates(hashes, np.array([False, False, False, True, True])) == {}


def test_known() -> None:
    """The last of a sorted table is where a binary search goes wrong."""
    known = np.sort(hash_ids(["a", "b", "c"]))
    assert is_known(hash_ids(["a", "x", "c", "b"]), known).tolist() == [True, False, True, True]
    assert is_known(hash_ids(["a"]), known[:0]).tolist() == [False]
    assert is_known(np.array([2**64 - 1], dtype=np.uint64), known).tolist() == [False]


def test_news_are_found_at_their_rows() -> None:
    """A history that names its neighbours' rows trains on titles that nobody clicked."""
    known = number_news(hash_ids(["c", "a", "d", "b"]))
    assert known.find(hash_ids(["a", "b", "x", "c", "d", "a"])).tolist() == [1, 3, -1, 0, 2, 1]
    assert number_news(hash_ids([])).find(hash_ids(["a"])).tolist() == [-1]


def test_minutes() -> None:
    """Another unit, or a time that wraps around, would turn the order of time over."""
    times = [
        datetime(1970, 1, 1, 0, 1, 59),
        datetime(1969, 12, 31, 23, 59),
        datetime(2019, 11, 15, 8, 55),
        datetime(6052, 1, 1),
        datetime(9999, 12, 31, 23, 59),
    ]
    days = 49 * 365 + 12 + 318  # years, leap days from 1972 to 2016, and days before 15 November
    assert minutes_of(times)[:3].tolist() == [1, -1, days * 1440 + 8 * 60 + 55]
    assert (np.diff(minutes_of(sorted(times))) > 0).all()


def _by_time(
    minutes: list[int], *, skip: tuple[int, ...] = (), validation: float = 0.2, test: float = 0.0
) -> list[int]:
    counted = np.array([i not in skip for i in range(len(minutes))])
    hashes = np.arange(len(minutes), dtype=np.uint64)
    fates: list[int] = split_by_time(
        np.array(minutes, np.int32), hashes, counted, Shares(validation, test)
    ).tolist()
    return fates


def test_the_last_by_time_are_held_out() -> None:
    """Validation on clicks older than those trained on asks for the past to be foretold."""
    assert _by_time([9, 1, 5, 7, 3]) == [1, 0, 0, 0, 0]
    assert _by_time([9, 1, 5, 7, 3], test=0.4) == [2, 0, 1, 2, 0]
    assert _by_time([9, 1, 5, 7, 3], validation=0.0, test=0.2) == [2, 0, 0, 0, 0]
    # The line at minute 9 is no row: of the four others one is the fifth.
    assert _by_time([9, 1, 5, 7, 3], skip=(0,)) == [0, 0, 0, 1, 0]
    assert _by_time([]) == []


def test_ties_at_the_cut_are_settled_by_hash() -> None:
    """MIND's minutes hold hundreds of impressions: without a rule the counts, or two runs, would differ."""
    assert _by_time([4, 4, 4, 4, 4], validation=0.4) == [0, 0, 0, 1, 1]
    assert _by_time([4, 9, 4, 1, 4], validation=0.4) == [0, 1, 0, 0, 1]
    assert _by_time([4, 4, 4, 4, 4], validation=0.4, test=0.2) == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_shares_of_time_are_exact_and_in_order(seed: int) -> None:
    """Any order of the lines gives each the same split: train, then validation, then test."""
    generator = np.random.default_rng(seed)
    minutes = generator.integers(0, 50, 997).astype(np.int32)
    hashes = generator.permutation(997).astype(np.uint64)
    counted = generator.random(997) < 0.9
    shares = Shares(0.1, 0.25)
    fates = split_by_time(minutes, hashes, counted, shares)
    total = counted.sum()
    assert np.bincount(fates[counted]).tolist()[1:] == [round(total * 0.1), round(total * 0.25)]
    assert set(fates[~counted].tolist()) == {Fate.TRAIN}
    key = minutes.astype(np.int64) * 1000 + hashes.astype(np.int64)
    for earlier, later in ((Fate.TRAIN, Fate.VALIDATION), (Fate.VALIDATION, Fate.TEST)):
        assert key[counted & (fates == earlier)].max() < key[counted & (fates == later)].min()
    order = generator.permutation(997)
    again = split_by_time(minutes[order], hashes[order], counted[order], shares)
    assert (again == fates[order]).all()


def _split(ids: list[str], topics: list[int], **changes: object) -> list[int]:
    settings: dict[str, object] = {
        "role": Fate.TRAIN,
        "earlier": hash_ids([]),
        "trained": None,
        "seed": 0,
        "shares": Shares(0.3, 0.3),
    } | changes
    codes = np.array(topics, dtype=np.uint16)
    fates: list[int] = split_news(hash_ids(ids), codes, **settings)[0].tolist()  # type: ignore[arg-type]
    return fates


def test_a_rare_topic_trains_whole() -> None:
    """A topic of two news split by hash could be tested without ever being trained."""
    fates = _split(IDS[: 60 + RARE - 1], [0] * 60 + [1] * (RARE - 1))
    assert set(fates[60:]) == {Fate.TRAIN}
    assert set(fates[:60]) == {Fate.TRAIN, Fate.VALIDATION, Fate.TEST}
    assert len(set(_split(IDS[: 60 + RARE], [0] * 60 + [1] * RARE)[60:])) > 1


def test_a_topic_that_the_hash_leaves_without_training_trains_whole() -> None:
    """Shares near one could give all of a topic away."""
    assert set(_split(IDS[:25], [0] * 25, shares=Shares(0.5, 0.5))) == {Fate.TRAIN}


def test_later_sources_hold_unseen_news_of_trained_topics() -> None:
    """Seen news would make the test too easy; an untrained topic cannot be predicted."""
    fates = _split(
        ["a", "b", "c", "d", "d"],
        [0, 0, 5, int(NO_CODE), 1],
        role=Fate.TEST,
        earlier=np.sort(hash_ids(["a", "z"])),
        trained=np.array([0, 1], dtype=np.uint16),
    )
    assert fates == [Fate.EARLIER, Fate.TEST, Fate.UNSEEN_TOPIC, Fate.MALFORMED, Fate.TEST]
