"""MIND's lines, by hand."""

from __future__ import annotations

from datetime import datetime

import numpy as np
import pytest

from newsbert_ray.data.mind import (
    NO_CODE,
    RARE,
    Impression,
    News,
    count_examples,
    find_originals,
    parse_behaviors,
    parse_news,
    parse_time,
    split_by_time,
    split_news,
)
from newsbert_ray.data.shards import hash_ids
from newsbert_ray.data.sources import (
    BadLine,
    Fate,
    Shares,
)

NEWS = "N1\tsports\tsoccer\tA title\tAn abstract\thttps://example.invalid/1\t[]\t[]"
IMPRESSION = "7\tU3\t11/15/2019 8:55:22 AM\tN1 N2\tN3-1 N4-0"


def test_reads_a_line_of_news() -> None:
    """A column read as its neighbour would train on the wrong text."""
    assert parse_news(NEWS) == News("N1", "sports", "soccer", "A title")


@pytest.mark.parametrize(
    "title", ['He said "no', '"Quoted" whole', 'a "" b', "it's", "\\", "#tag, with; marks"]
)
def test_quotes_are_text(title: str) -> None:
    """A quoting reader joins lines at a bare quote and loses hundreds of news."""
    assert parse_news(NEWS.replace("A title", title)).title == title


def test_empty_subcategory_abstract_and_entities_are_normal() -> None:
    """MIND has thousands of news without an abstract."""
    assert parse_news("N1\tsports\t\tA title\t\t\t\t") == News("N1", "sports", "", "A title")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "columns: 0 found, 8 expected"),
        (NEWS + "\t", "columns: 9 found, 8 expected"),
        ("N1\tsports", "columns: 2 found"),
        (NEWS.replace("N1\t", "\t", 1), "id: news id is empty"),
        (NEWS.replace("N1\t", "N 1\t", 1), "id: news id 'N 1' has blanks"),
        (NEWS.replace("N1\t", "N1\u2028\t", 1), "id: news id"),
        (NEWS.replace("N1\t", "N" * 300 + "\t", 1), "id: news id"),
        (NEWS.replace("sports", ""), "label: category '' is empty"),
        (NEWS.replace("sports", " sports"), "label: category ' sports'"),
        (NEWS.replace("sports", "spo\x01rts"), "label: category"),
        (NEWS.replace("sports", "s" * 300), "label: category is 300 characters long"),
        (NEWS.replace("A title", ""), "title: empty"),
        (NEWS.replace("A title", " \u00a0 "), "title: empty"),
    ],
)
def test_names_what_is_wrong_with_news(line: str, reason: str) -> None:
    """A damaged line that passes becomes a wrong label or an empty title."""
    with pytest.raises(BadLine, match=reason):
        parse_news(line)


def test_reads_a_line_of_behaviors() -> None:
    """A click given to another candidate would train the opposite."""
    assert parse_behaviors(IMPRESSION) == Impression(
        "7", "U3", datetime(2019, 11, 15, 8, 55, 22), ["N1", "N2"], ["N3", "N4"], [1, 0]
    )


def test_history_may_be_empty_and_labels_absent() -> None:
    """New users have no history, and MIND's test file has no labels."""
    row = parse_behaviors("7\tU3\t11/15/2019 8:55:22 AM\t\tN3 N4")
    assert (row.history, row.candidates, row.clicked) == ([], ["N3", "N4"], None)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("7\tU3\t11/15/2019 8:55:22 AM\tN1", "columns: 4 found, 5 expected"),
        (IMPRESSION.replace("7\t", "\t", 1), "id: impression id is empty"),
        (IMPRESSION.replace("U3", ""), "id: user id is empty"),
        (IMPRESSION.replace("N3-1 N4-0", " "), "candidates: none"),
        (IMPRESSION.replace("N4-0", "N4"), "candidates: 'N4' has no label"),
        (IMPRESSION.replace("N4-0", "N4-2"), "candidates: 'N4-2' has no label"),
        (IMPRESSION.replace(" AM", ""), "date: '11/15/2019 8:55:22' is not of the form"),
    ],
)
def test_names_what_is_wrong_with_behaviors(line: str, reason: str) -> None:
    """A half-labelled impression would count a missing label as no click."""
    with pytest.raises(BadLine, match=reason):
        parse_behaviors(line)


def test_ids_and_time_can_be_read_alone() -> None:
    """The first pass must find a line good or bad as the second does, but for its candidates."""
    assert parse_behaviors(IMPRESSION, whole=False)[:3] == parse_behaviors(IMPRESSION)[:3]
    assert parse_behaviors("7\tU3\t11/15/2019 8:55:22 AM\t\t", whole=False).candidates == []
    with pytest.raises(BadLine, match="date"):
        parse_behaviors(IMPRESSION.replace("2019", "20x9"), whole=False)


@pytest.mark.parametrize(
    ("candidates", "examples"),
    [
        ("N1-1 N2-0", 1),
        ("N1-1 N2-0 N3-1", 2),
        ("N1-0 N2-0", 0),
        ("N1-1 N2-1", 0),
        ("N1-1", 0),
        ("N1-1 N1-0", 0),
        ("N1-1 N1-0 N2-0", 1),
        ("N1-1 N1-1 N2-0", 2),
        ("N1 N2", 0),
    ],
)
def test_counts_the_clicks_that_can_be_learned_from(candidates: str, examples: int) -> None:
    """A click without anything against it has no loss; counted, it would shift every later step."""
    assert count_examples(parse_behaviors(IMPRESSION.replace("N3-1 N4-0", candidates))) == examples


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("11/9/2019 12:00:01 AM", datetime(2019, 11, 9, 0, 0, 1)),
        ("11/9/2019 12:00:01 PM", datetime(2019, 11, 9, 12, 0, 1)),
        ("02/29/2020 01:59:59 PM", datetime(2020, 2, 29, 13, 59, 59)),
        ("1/1/2020 11:00:00 PM", datetime(2020, 1, 1, 23, 0, 0)),
    ],
)
def test_reads_the_twelve_hour_clock(text: str, time: datetime) -> None:
    """Noon and midnight are where a twelve-hour clock is misread."""
    assert parse_time(text) == time == datetime.strptime(text, "%m/%d/%Y %I:%M:%S %p")


@pytest.mark.parametrize(
    "text",
    [
        "13/1/2019 1:00:00 AM",
        "2/30/2019 1:00:00 AM",
        "11/9/2019 13:00:00 AM",
        "11/9/2019 0:10:00 AM",
        "11/9/2019 1:60:00 AM",
        "2019-11-09 01:00:00",
        "11/9/2019 1:00:00 XM",
        "11/9/2019 1:00:00 AM ",
        "\u0661/9/2019 1:00:00 AM",
        "0/0/0000 1:00:00 AM",
        "",
    ],
)
def test_refuses_what_is_no_date(text: str) -> None:
    """A guessed date would put an impression on the wrong side of the split."""
    with pytest.raises(BadLine, match="date"):
        parse_time(text)


IDS = [f"N{i}" for i in range(4000)]


def test_first_well_formed_line_wins() -> None:
    """A damaged first copy must not take the good second one with it."""
    hashes = hash_ids(["a", "b", "a", "b", "a"])
    assert find_originals(hashes, np.array([True, False, True, True, True])).tolist() == [0, 0, 1, 0, 1]
    assert not find_originals(hashes, np.array([False, False, False, True, True])).any()


def _by_time(
    minutes: list[int], *, skip: tuple[int, ...] = (), validation: float = 0.2, test: float = 0.0
) -> list[int]:
    counted = np.array([i not in skip for i in range(len(minutes))])
    hashes = np.arange(len(minutes), dtype=np.uint64)
    fates: list[int] = split_by_time(
        np.array(minutes, np.int64), hashes, counted, Shares(validation, test)
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
    minutes = generator.integers(0, 50, 997)
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
