"""MIND's lines, by hand."""

from __future__ import annotations

from datetime import datetime

import pytest

from newsbert_ray.data.mind import (
    Impression,
    News,
    count_examples,
    parse_behaviors,
    parse_header,
    parse_news,
    parse_time,
)
from newsbert_ray.data.sources import BadLine

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


def test_a_header_is_the_line_without_its_news() -> None:
    """The quick look decides the split; where it reads another time or id, a row lands in the wrong one."""
    assert parse_header(IMPRESSION)[:3] == parse_behaviors(IMPRESSION)[:3]
    assert parse_header(IMPRESSION)[3:] == ("N1 N2", "N3-1 N4-0")
    for damaged in (IMPRESSION.replace("U3", ""), IMPRESSION.replace("AM", "XM"), IMPRESSION + "\t"):
        with pytest.raises(BadLine) as header:
            parse_header(damaged)
        with pytest.raises(BadLine) as whole:
            parse_behaviors(damaged)
        assert str(header.value) == str(whole.value)


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
