"""The split of each row, or why it is left out, for whole arrays at once. Knows no file and no tokeniser.

NewsBERT (Wu et al. 2021), section 4.1, tests topics only on news that are not in the training set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Codes = npt.NDArray[np.uint16]
Fates = npt.NDArray[np.uint8]
Minutes = npt.NDArray[np.int32]
Rows = npt.NDArray[np.int32]

RARE = 20
"""Topics with fewer news than this in the training source, or with none left to train on, are not split."""
_BLOCK = 1 << 16
NO_CODE = np.uint16(0xFFFF)
"""Topic code of a malformed line."""


class Fate(IntEnum):
    """The split of a line, in the order of `shards.SPLITS`, or the reason why it is in none."""

    TRAIN = 0
    VALIDATION = 1
    TEST = 2
    MALFORMED = 3
    DUPLICATE = 4
    EARLIER = 5
    UNSEEN_TOPIC = 6


KEPT = (Fate.TRAIN, Fate.VALIDATION, Fate.TEST, Fate.UNSEEN_TOPIC)
"""Fates of the news that are kept, in the order of the table of texts. News of an unseen topic are no test of
topics, but users read them and impressions offer them."""

_HINTS = {"train": 0, "dev": 1, "valid": 1, "test": 2}


def order_sources(names: Sequence[str]) -> list[int]:
    """Indices of the sources in the order training, validation, test.

    The names decide if each contains one of train, dev, valid and test, and only one of them train.
    Otherwise the order stays as it is.
    """
    ranks = [{rank for hint, rank in _HINTS.items() if hint in name.lower()} for name in names]
    clear = all(len(rank) == 1 for rank in ranks) and sum(rank == {0} for rank in ranks) == 1
    return sorted(range(len(names)), key=lambda i: min(ranks[i])) if clear else list(range(len(names)))


def role_of(position: int, sources: int) -> Fate:
    """The split that the source at `position` (after `order_sources`) is for."""
    if position == 0:
        return Fate.TRAIN
    return Fate.TEST if position == sources - 1 else Fate.VALIDATION


def describe_role(role: Fate, sources: int) -> str:
    """The splits that a source of this role gives rows to, as words."""
    if sources == 1:
        return "train, validation and test"
    return "train and validation" if role is Fate.TRAIN and sources == 2 else role.name.lower()


class Shares(NamedTuple):
    """Shares of the training source that are held out for validation and test."""

    validation: float
    test: float


def held_out(shares: Shares, *, sources: int) -> Shares:
    """`shares`, but 0 for a split that another source is for."""
    return Shares(shares.validation if sources < 3 else 0.0, shares.test if sources == 1 else 0.0)


def hash_ids(ids: Sequence[str]) -> Hashes:
    """64-bit BLAKE2b hashes of `ids`, shape (len(ids),); equal on every machine and in every version."""
    joined = b"".join([blake2b(text.encode(), digest_size=8).digest() for text in ids])
    return np.frombuffer(joined, dtype="<u8").astype(np.uint64, copy=False)


def draw_uniform(hashes: Hashes, *, seed: int) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each hash, a function of hash and seed alone (one SplitMix64 step)."""
    golden = 0x9E3779B97F4A7C15
    value = hashes + np.uint64((seed + 1) * golden % 2**64)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    value ^= value >> np.uint64(31)
    return (value >> np.uint64(11)).astype(np.float64) / 2.0**53


def split_by_hash(hashes: Hashes, shares: Shares, *, seed: int) -> Fates:
    """TRAIN, VALIDATION or TEST for each hash, shape as `hashes`; the shares hold on average."""
    fates = np.full(len(hashes), Fate.TRAIN, dtype=np.uint8)
    for start in range(0, len(hashes), _BLOCK):
        drawn = draw_uniform(hashes[start : start + _BLOCK], seed=seed)
        block = fates[start : start + _BLOCK]
        block[drawn < shares.validation + shares.test] = Fate.TEST
        block[drawn < shares.validation] = Fate.VALIDATION
    return fates


def split_by_time(minutes: Minutes, hashes: Hashes, counted: npt.NDArray[np.bool_], shares: Shares) -> Fates:
    """TRAIN, VALIDATION or TEST for each impression: the latest are test, those before them validation.

    The shares are rounded to whole impressions. Within the minute of a cut, larger hashes count as later.

    Args:
        minutes: shape (lines,); from `minutes_of`.
        hashes: shape (lines,); hash of the impression id.
        counted: shape (lines,); whether a line counts in the shares. Others are TRAIN.
    Returns:
        Shape (lines,).
    """
    fates = np.full(len(minutes), Fate.TRAIN, dtype=np.uint8)
    total = int(np.count_nonzero(counted))
    test = round(total * shares.test)
    for fate, count in ((Fate.VALIDATION, test + round(total * shares.validation)), (Fate.TEST, test)):
        fates[_find_latest(minutes, hashes, counted, min(count, total))] = fate
    return fates


def _find_latest(
    minutes: Minutes, hashes: Hashes, counted: npt.NDArray[np.bool_], count: int
) -> npt.NDArray[np.bool_]:
    """Whether a line is among the latest `count` of those counted."""
    if not count:
        return np.zeros(len(minutes), dtype=np.bool_)
    times = minutes[counted]
    cut = np.partition(times, len(times) - count)[len(times) - count]
    latest: npt.NDArray[np.bool_] = counted & (minutes > cut)
    tied = np.flatnonzero(counted & (minutes == cut))
    missing = count - int(np.count_nonzero(latest))
    latest[tied[np.argsort(hashes[tied], kind="stable")[len(tied) - missing :]]] = True
    return latest


def minutes_of(times: Sequence[datetime]) -> Minutes:
    """Minutes since 1970, shape (len(times),); times after the year 6052 are cut to its end."""
    minutes = np.array(times, "datetime64[m]").astype(np.int64)
    return np.minimum(minutes, np.iinfo(np.int32).max).astype(np.int32)


def find_duplicates(hashes: Hashes, well_formed: npt.NDArray[np.bool_]) -> dict[int, int]:
    """Position of every repeated well-formed line -> position of the first with the same id; ascending."""
    good = hashes[well_formed]
    good.sort()
    repeated = np.unique(good[1:][good[1:] == good[:-1]])
    original: dict[int, int] = {}
    duplicates: dict[int, int] = {}
    for position in np.flatnonzero(well_formed & np.isin(hashes, repeated)).tolist():
        earliest = original.setdefault(int(hashes[position]), position)
        if earliest != position:
            duplicates[position] = earliest
    return duplicates


def is_known(hashes: Hashes, known: Hashes) -> npt.NDArray[np.bool_]:
    """Whether each of `hashes` is in `known` (sorted), shape as `hashes`."""
    if not len(known):
        return np.zeros(len(hashes), dtype=np.bool_)
    positions = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    return np.equal(known[positions], hashes)


@dataclass(frozen=True)
class KnownNews:
    """The news kept: sorted hashes of their ids, and the row of each in the table of texts; 12 bytes each."""

    hashes: Hashes
    rows: Rows

    def find(self, hashes: Hashes) -> Rows:
        """The row of each of `hashes`, -1 for other news; shape as `hashes`."""
        rows = np.full(len(hashes), -1, dtype=np.int32)
        known = is_known(hashes, self.hashes)
        rows[known] = self.rows[np.searchsorted(self.hashes, hashes[known])]
        return rows


def number_news(hashes: Hashes) -> KnownNews:
    """The news whose `hashes` are in the order of the table of texts."""
    order = np.argsort(hashes)
    return KnownNews(hashes[order], order.astype(np.int32))


def split_news(
    hashes: Hashes,
    topics: Codes,
    *,
    role: Fate,
    earlier: Hashes,
    trained: Codes | None,
    seed: int,
    shares: Shares,
) -> tuple[Fates, dict[int, int]]:
    """The fate of every line of one news file.

    Args:
        hashes: shape (lines,); hash of the news id.
        topics: shape (lines,); code of the category, NO_CODE where the line is malformed.
        role: split that the file is for.
        earlier: sorted hashes of the news of earlier files, which are not repeated.
        trained: codes of the training topics; None for the training file itself.
        shares: held out of the training file by hash.
    Returns:
        Fates of shape (lines,), and the duplicates (position -> position of the first).
    """
    well_formed = topics != NO_CODE
    duplicates = find_duplicates(hashes, well_formed)
    if role is Fate.TRAIN:
        fates = split_by_hash(hashes, shares, seed=seed)
    else:
        fates = np.full(len(hashes), role, dtype=np.uint8)
    fates[~well_formed] = Fate.MALFORMED
    fates[list(duplicates)] = Fate.DUPLICATE
    kept = fates <= Fate.TEST
    fates[kept & is_known(hashes, earlier)] = Fate.EARLIER
    kept = fates <= Fate.TEST
    if trained is None:
        counts = np.bincount(topics[kept], minlength=int(NO_CODE) + 1)
        trains = np.bincount(topics[fates == Fate.TRAIN], minlength=int(NO_CODE) + 1)
        fates[kept & ((counts < RARE) | (trains == 0))[topics]] = Fate.TRAIN
    else:
        fates[kept & ~np.isin(topics, trained)] = Fate.UNSEEN_TOPIC
    return fates, duplicates
