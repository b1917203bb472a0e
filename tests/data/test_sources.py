"""Reading source files: lines, line ends, bad bytes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from newsbert_ray.config import PrepareSettings
from newsbert_ray.data.mind import parse_news
from newsbert_ray.data.shards import hash_ids
from newsbert_ray.data.sources import (
    BadLine,
    Fate,
    HashIndex,
    Rejected,
    Shares,
    draw_uniform,
    is_known,
    order_sources,
    parse_lines,
    shares_of,
    split_by_hash,
)

NEWS = "N1\tsports\tsoccer\tA title\tAn abstract\thttps://example.invalid/1\t[]\t[]"


def _parsed(content: bytes, *, is_start: bool = True) -> list[str]:
    rows = parse_lines(content, parse_news, is_start=is_start)
    return [str(row) if isinstance(row, BadLine) else row.news_id for _, row in rows]


def test_one_bad_line_leaves_the_others() -> None:
    """One bad byte must not lose a chunk of ten thousand news."""
    good = NEWS.encode()
    content = b"\n".join(
        [good, good.replace(b"A", b"\xff"), good.replace(b"A", b"\0"), good.replace(b"N1", b"N9")]
    )
    first, second, third, last = _parsed(content + b"\n")
    assert (first, last) == ("N1", "N9")
    assert second.startswith("encoding: byte 0xff at column 18")
    assert third.startswith("encoding: NUL byte at column 18")


def test_line_ends_and_byte_order_mark() -> None:
    """A file saved by an editor must not read as another corpus."""
    lines = [NEWS.encode(), NEWS.replace("N1", "N2").encode()]
    plain = _parsed(b"\n".join(lines) + b"\n")
    assert plain == ["N1", "N2"]
    assert _parsed(b"\r\n".join(lines) + b"\r\n") == plain
    assert _parsed(b"\n".join(lines)) == plain
    assert _parsed(b"\xef\xbb\xbf" + b"\n".join(lines)) == plain
    assert _parsed(b"\xef\xbb\xbf" + b"\n".join(lines), is_start=False) != plain


def test_blank_lines_are_named() -> None:
    """A skipped blank line would shift every later line number."""
    assert _parsed(NEWS.encode() + b"\n\n" + NEWS.encode() + b"\n\n") == [
        "N1", "columns: 0 found, 8 expected", "N1", "columns: 0 found, 8 expected",
    ]  # fmt: skip


def test_a_listed_row_is_short() -> None:
    """A line of megabytes must not fill rejected.jsonl."""
    listed = Rejected().add("a/news.tsv", 3, "columns: 1 found", "x" * 5000)
    assert json.loads(listed)["text"] == "x" * 120


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
    assert [index for index, _, _ in order_sources(names)] == order


def test_roles() -> None:
    """With two sources the second is test, not validation."""
    assert order_sources(["a"]) == [(0, Fate.TRAIN, "train, validation and test")]
    two = [(0, Fate.TRAIN, "train and validation"), (1, Fate.TEST, "test")]
    assert order_sources(["a", "b"]) == two
    roles = [role for _, role, _ in order_sources(["a", "b", "c", "d"])]
    assert roles == [Fate.TRAIN, Fate.VALIDATION, Fate.VALIDATION, Fate.TEST]


def test_a_split_with_a_source_of_its_own_takes_nothing_from_training() -> None:
    """Training news spent on a split that has its own folder are lost for nothing."""
    settings = PrepareSettings(source=["x"], teacher="t", out="y", validation_share=0.1, test_share=0.2)
    assert [shares_of(settings, sources=n) for n in (1, 2, 3)] == [(0.1, 0.2), (0.1, 0.0), (0.0, 0.0)]


def _split_mix(number: int, seed: int) -> float:
    """SplitMix64 in Python's integers, from its authors' C."""
    wrap = 2**64
    value = (number + (seed + 1) * 0x9E3779B97F4A7C15) % wrap
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % wrap
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % wrap
    return ((value ^ (value >> 31)) >> 11) / 2**53


def test_hashes_are_the_same_for_ever() -> None:
    """Another hash in a later version would silently move news between train and test."""
    hashes = hash_ids(["N1", "N2"])
    assert hashes.tolist() == [4870954943910693542, 17677784663273689699]
    assert draw_uniform(hashes, seed=3).tolist() == [_split_mix(number, 3) for number in hashes.tolist()]


def test_shares_and_seeds() -> None:
    """A share of the wrong end, or a seed without effect, would not show in one run's counts."""
    hashes = hash_ids(IDS)
    fates = split_by_hash(hashes, Shares(0.1, 0.2), seed=0)
    shares = np.bincount(fates, minlength=3) / len(IDS)
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.02)
    assert (split_by_hash(hashes, Shares(0.1, 0.2), seed=0) == fates).all()
    assert (split_by_hash(hashes, Shares(0.1, 0.2), seed=1) != fates).mean() > 0.3
    assert (split_by_hash(hashes[::-1], Shares(0.1, 0.2), seed=0) == fates[::-1]).all()


def test_known() -> None:
    """The last of a sorted table is where a binary search goes wrong."""
    known = np.sort(hash_ids(["a", "b", "c"]))
    assert is_known(hash_ids(["a", "x", "c", "b"]), known).tolist() == [True, False, True, True]
    assert is_known(hash_ids(["a"]), known[:0]).tolist() == [False]
    assert is_known(np.array([2**64 - 1], dtype=np.uint64), known).tolist() == [False]


def test_rows_of_the_table_of_texts_by_hand() -> None:
    """A row number that points elsewhere trains on another text, and nothing would fail."""
    index = HashIndex()
    rows, new = index.add(hash_ids(["b", "a", "b", "c"]))
    assert (rows.tolist(), new) == ([0, 1, 0, 2], [0, 1, 3])
    rows, new = index.add(hash_ids(["d", "c", "e", "d", "a"]))
    assert (rows.tolist(), new) == ([3, 2, 4, 3, 1], [0, 2])
    rows, new = index.add(hash_ids([]))
    assert (rows.tolist(), new) == ([], [])


@given(st.lists(st.lists(st.sampled_from("abcdefgh")), max_size=6))
def test_rows_are_those_of_a_dictionary(blocks: list[list[str]]) -> None:
    """The sorted arrays must number strings just as a plain dictionary does."""
    index, known = HashIndex(), dict[str, int]()
    for block in blocks:
        expected_new = [
            i for i, string in enumerate(block) if string not in known and string not in block[:i]
        ]
        rows, new = index.add(hash_ids(block))
        for string in block:
            known.setdefault(string, len(known))
        assert (rows.tolist(), new) == ([known[string] for string in block], expected_new)


def test_hashes_are_found_at_their_rows() -> None:
    """A history that names its neighbours' rows trains on titles that nobody clicked."""
    index = HashIndex()
    assert index.find(hash_ids(["a"])).tolist() == [-1]
    index.add(hash_ids(["c", "a", "d", "b"]))
    assert index.find(hash_ids(["a", "b", "x", "c", "d", "a"])).tolist() == [1, 3, -1, 0, 2, 1]
