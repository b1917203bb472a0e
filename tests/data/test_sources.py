"""Reading source files: lines, line ends, bad bytes."""

from __future__ import annotations

import json

from newsbert_ray.data.mind import parse_news
from newsbert_ray.data.sources import BadLine, Rejected, parse_lines

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
