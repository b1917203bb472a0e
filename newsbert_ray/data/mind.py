"""Lines of MIND's news.tsv (8 columns) and behaviors.tsv (5) -> rows. Knows no file, split or tokeniser.

A quote is a character like any other: MIND's files are tab-separated text without quoting or header.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import compress
from typing import NamedTuple, TypeVar

NEWS_COLUMNS = 8
BEHAVIORS_COLUMNS = 5
LONGEST_NAME = 200
"""Characters of an id or a category; anything longer is damage."""

_DATE = re.compile(r"([0-9]{1,2})/([0-9]{1,2})/([0-9]{4}) ([0-9]{1,2}):([0-9]{2}):([0-9]{2}) ([AP])M")
_EXCERPT = 120
_LABELS = {"-0", "-1"}


class News(NamedTuple):
    """One line of news.tsv, as far as it is used: entities, url and abstract stay behind."""

    news_id: str
    category: str
    subcategory: str
    title: str


class Impression(NamedTuple):
    """One line of behaviors.tsv; `clicked`, 0 or 1 a candidate, is None where the file carries no labels."""

    impression_id: str
    user_id: str
    time: datetime
    history: list[str]
    candidates: list[str]
    clicked: list[int] | None


class Header(NamedTuple):
    """A line of behaviors.tsv whose columns, ids and date are good; history and candidates as they stand."""

    impression_id: str
    user_id: str
    time: datetime
    history: str
    candidates: str


class BadLine(ValueError):
    """A line that is no row; the text is the reason, `kind: details`."""


Row = TypeVar("Row")


def parse_news(line: str) -> News:
    """One line of news.tsv, without its line end.

    Raises:
        BadLine: another number of columns, or an id, category or title that is missing or no name.
    """
    columns = line.split("\t")
    if len(columns) != NEWS_COLUMNS:
        raise BadLine(_wrong_columns(line, NEWS_COLUMNS))
    news_id, category, subcategory, title = columns[:4]
    if not _is_id(news_id):
        raise BadLine(_wrong_id("news id", news_id))
    if not category.isalnum() and (
        not category.isprintable() or category != category.strip() or not category
    ):
        raise BadLine(f"label: category {category[:40]!r} is empty or has outer blanks or control characters")
    if len(category) > LONGEST_NAME:
        raise BadLine(f"label: category is {len(category)} characters long, at most {LONGEST_NAME} expected")
    if not title or title.isspace():
        raise BadLine("title: empty")
    return News(news_id, category, subcategory, title)


def parse_header(line: str) -> Header:
    """One line of behaviors.tsv, without its line end, as far as its date: several times quicker than whole.

    Raises:
        BadLine: another number of columns, an id that is missing, or a date that is none.
    """
    columns = line.split("\t")
    if len(columns) != BEHAVIORS_COLUMNS:
        raise BadLine(_wrong_columns(line, BEHAVIORS_COLUMNS))
    impression_id, user_id, time, history, candidates = columns
    if not _is_id(impression_id):
        raise BadLine(_wrong_id("impression id", impression_id))
    if not _is_id(user_id):
        raise BadLine(_wrong_id("user id", user_id))
    return Header(impression_id, user_id, parse_time(time), history, candidates)


def parse_behaviors(line: str) -> Impression:
    """One line of behaviors.tsv, without its line end.

    Raises:
        BadLine: as `parse_header`; no candidates, or candidates of which only some are labelled.
    """
    header = parse_header(line)
    ids, clicked = _parse_candidates(header.candidates.split())
    return Impression(*header[:3], header.history.split(), ids, clicked)


def count_examples(impression: Impression) -> int:
    """Clicks of an impression that training can learn from.

    All of them, or none where no candidate can stand against them: one that is listed without a click, and
    not clicked where it is listed a second time. None without labels.
    """
    if impression.clicked is None:
        return 0
    clicked = set(compress(impression.candidates, impression.clicked))
    return sum(impression.clicked) if len(clicked) < len(set(impression.candidates)) else 0


def parse_time(text: str) -> datetime:
    """MIND's date, `11/15/2019 8:55:22 AM` (%m/%d/%Y %I:%M:%S %p).

    Raises:
        BadLine: another form, or a day or hour that the calendar lacks.
    """
    match = _DATE.fullmatch(text)
    if match is None:
        raise BadLine(f"date: {text[:40]!r} is not of the form 11/15/2019 8:55:22 AM")
    month, day, year, hour, minute, second = map(int, match.groups()[:6])
    if not 1 <= hour <= 12:
        raise BadLine(f"date: {text!r} has hour {hour}, 1 to 12 expected")
    try:
        return datetime(year, month, day, hour % 12 + 12 * (match[7] == "P"), minute, second)
    except ValueError as error:
        raise BadLine(f"date: {text!r}, {error}") from error


def parse_lines(
    content: bytes, parse: Callable[[str], Row], *, is_start: bool
) -> Iterator[tuple[str, Row | BadLine]]:
    """Each line of `content` as (excerpt source, row or the reason why it is none).

    Args:
        content: whole lines, each ended by LF or CRLF (the last perhaps by nothing).
        parse: `parse_news` or `parse_behaviors`.
        is_start: `content` begins the file, where a UTF-8 byte order mark is passed over.
    """
    for line in _decode_lines(content, is_start=is_start):
        if isinstance(line, str):
            try:
                yield line, parse(line)
            except BadLine as bad:
                yield line, bad
        else:
            yield line


def excerpt(line: str) -> str:
    """The first 120 characters of a line."""
    return line[:_EXCERPT]


def _decode_lines(content: bytes, *, is_start: bool) -> Iterator[str | tuple[str, BadLine]]:
    if is_start:
        content = content.removeprefix(b"\xef\xbb\xbf")
    content = content.removesuffix(b"\n")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" not in text:
        yield from (line.removesuffix("\r") for line in text.split("\n"))
        return
    for raw in content.split(b"\n"):
        yield _decode_line(raw.removesuffix(b"\r"))


def _decode_line(raw: bytes) -> str | tuple[str, BadLine]:
    shown = raw[: 4 * _EXCERPT].decode("utf-8", errors="replace")
    if b"\0" in raw:
        return shown, BadLine(f"encoding: NUL byte at column {raw.index(0) + 1}")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        return shown, BadLine(f"encoding: byte 0x{byte:02x} at column {error.start + 1} is not UTF-8")


def _parse_candidates(tokens: list[str]) -> tuple[list[str], list[int] | None]:
    if not tokens:
        raise BadLine("candidates: none")
    ends = [token[-2:] for token in tokens]
    kinds = set(ends)
    if kinds <= _LABELS:
        return [token[:-2] for token in tokens], [1 if end == "-1" else 0 for end in ends]
    if kinds.isdisjoint(_LABELS):
        return tokens, None
    odd = next(token for token, end in zip(tokens, ends, strict=True) if end not in _LABELS)
    raise BadLine(f"candidates: {odd[:40]!r} has no label -0 or -1, others of the line do")


def _is_id(text: str) -> bool:
    return (text.isalnum() and len(text) <= LONGEST_NAME) or (
        0 < len(text) <= LONGEST_NAME
        and text.isprintable()
        and len(text.split()) == 1
        and text == text.strip()
    )


def _wrong_id(what: str, value: str) -> str:
    return (
        f"id: {what} is empty"
        if not value
        else f"id: {what} {value[:40]!r} has blanks or control characters, or is too long"
    )


def _wrong_columns(line: str, expected: int) -> str:
    return f"columns: {line.count(chr(9)) + 1 if line else 0} found, {expected} expected"
