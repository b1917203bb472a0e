"""Reading tables: formats, damage, memory. Rows are pairs of query and text."""

from __future__ import annotations

import csv
import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from newsbert_ray.data.pairs_source import COLUMNS, Pair, read_pairs
from newsbert_ray.data.sources import CHUNK_BYTES, BadLine, PrepareError
from newsbert_ray.data.tables import SUFFIXES, open_table, table_suffix

GOOD = [
    Pair("cup final", "The cup was won by a goal in the last minute.", 1),
    Pair("cup final", 'Rain, wind and "sleet" are on their way', 0),
    Pair("wetter für morgen", "Regen über Köln, 8 °C", 1),
    Pair("news, today", "One text; with, commas", 0),
]


def _write(path: Path, rows: Sequence[Sequence[Any]], columns: Sequence[str] = COLUMNS) -> Path:
    """`rows` as a table in the format that `path` names."""
    if path.suffix == ".parquet":
        values = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in columns]
        table = pa.table(dict(zip(columns, values, strict=True)))
        pq.write_table(table, path, data_page_size=1 << 14, use_dictionary=False)
    elif path.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
    else:
        lines = ["\t".join(map(str, row)) for row in (columns, *rows)]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def _read(path: Path) -> tuple[list[Pair], dict[int, str]]:
    """Good rows, and the reasons of bad ones by their place."""
    lines = list(read_pairs(open_table(str(path), columns=COLUMNS)))
    good = [line.values for line in lines if isinstance(line.values, Pair)]
    return good, {line.number: str(line.values) for line in lines if isinstance(line.values, BadLine)}


def test_named_like_a_table() -> None:
    """A folder of MIND taken for a table, or a table for a folder, fails far from its cause."""
    assert all(map(table_suffix, ("a.tsv", "b.CSV", "c.jsonl", "d.parquet")))
    assert not any(table_suffix(name) for name in ("MINDsmall_train", "MINDsmall_train.zip", "a.txt", "tsv"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_formats_mean_the_same(tmp_path: Path, suffix: str) -> None:
    """A format that reads a row otherwise trains another model on the same table."""
    assert _read(_write(tmp_path / f"table{suffix}", GOOD)) == (GOOD, {})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_columns_have_names_not_places(tmp_path: Path, suffix: str) -> None:
    """A column read by its place takes a market for a query."""
    rows = [("en-gb", pair.clicked, pair.text, 7, pair.query) for pair in GOOD]
    path = _write(tmp_path / f"table{suffix}", rows, ["market", "clicked", "text", "rank", "query"])
    assert _read(path) == (GOOD, {})


def test_csv_has_quotes_and_tsv_has_none(tmp_path: Path) -> None:
    """One stray quote in a .tsv would swallow all rows up to the next."""
    tsv = tmp_path / "a.tsv"
    tsv.write_text('query\ttext\tclicked\n"open\tnever closed\t1\nnext\trow\t0\n', encoding="utf-8")
    assert _read(tsv) == ([Pair('"open', "never closed", 1), Pair("next", "row", 0)], {})
    lines = tmp_path / "a.csv"
    lines.write_text('query,text,clicked\r\nq,"two\r\nlines, ""quoted""",1\r\nnext,,0\r\n', encoding="utf-8")
    good, bad = _read(lines)
    assert good == [Pair("q", 'two\r\nlines, "quoted"', 1)]
    assert bad == {4: "text: empty"}


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl"])
def test_line_ends_and_byte_order_mark(tmp_path: Path, suffix: str) -> None:
    """A table saved by Excel begins with a mark that would be part of its first column's name."""
    path = _write(tmp_path / f"table{suffix}", GOOD)
    content = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n").removesuffix(b"\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + content)
    assert _read(path) == (GOOD, {})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (("", "text", 1), "query: empty"),
        ((" \u00a0", "text", 1), "query: empty"),
        (("query", "", 0), "text: empty"),
        (("query", "text", 2), "label: clicked 2 is not 0 or 1"),
        (("query", "text", -1), "label: clicked -1 is not 0 or 1"),
    ],
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_bad_row_is_named(tmp_path: Path, suffix: str, row: tuple[str, str, int], reason: str) -> None:
    """A row without a text or with a third kind of click would alter a number in silence."""
    good, bad = _read(_write(tmp_path / f"table{suffix}", [*GOOD[:2], row, *GOOD[2:]]))
    quoted = reason if suffix in (".jsonl", ".parquet") else reason.replace(f" {row[2]} ", f" '{row[2]}' ")
    assert good == GOOD
    assert bad == {3 if suffix in (".jsonl", ".parquet") else 4: quoted}


@pytest.mark.parametrize(
    ("suffix", "line", "reason"),
    [
        (".tsv", b"query\ttext", "columns: 2 found, 3 expected"),
        (".tsv", b"query\ttext\t1\tmore", "columns: 4 found, 3 expected"),
        (".tsv", b"", "columns: 0 found, 3 expected"),
        (".tsv", b"query\ttext\tyes", "label: clicked 'yes' is not 0 or 1"),
        (".tsv", b"qu\xffery\ttext\t1", "encoding: byte 0xff at character 3 of query is not UTF-8"),
        (".tsv", b"query\tte\0xt\t1", "encoding: NUL in text"),
        (".csv", b"query,text", "columns: 2 found, 3 expected"),
        (".csv", b"", "columns: 0 found, 3 expected"),
        (".csv", b"query,text,1.0", "label: clicked '1.0' is not 0 or 1"),
        (".csv", b"qu\xffery,text,1", "encoding: byte 0xff at character 3 of query is not UTF-8"),
        (".csv", b"query,te\0xt,1", "encoding: NUL in text"),
        (".csv", b'"query"x,text,1', "csv: ',' expected after '\"'"),
        (".csv", b"query,te\rxt,1", "csv: new-line character seen in unquoted field"),
        (".jsonl", b"", "json: Expecting value"),
        (".jsonl", b"[1, 2]", "json: list found, an object expected"),
        (".jsonl", b"[" * 100_000, "json: maximum recursion depth exceeded"),
        (
            ".jsonl",
            b'{"query": "q", "text": "t", "clicked": ' + b"1" * 5000 + b"}",
            "json: Exceeds the limit",
        ),
        (".jsonl", b'{"query": "q", "text": "t"}', "columns: clicked is missing"),
        (".jsonl", b'{"query": "q", "text": 5, "clicked": 1}', "text: int found, text expected"),
        (".jsonl", b'{"query": null, "text": "t", "clicked": 1}', "query: empty"),
        (".jsonl", b'{"query": "q", "text": "t", "clicked": null}', "label: clicked None is not 0 or 1"),
        (".jsonl", b'{"query": "q", "text": "t", "clicked": NaN}', "label: clicked nan is not 0 or 1"),
        (".jsonl", b'{"query": "q", "text": "t", "clicked": [1]}', "label: clicked [1] is not 0 or 1"),
        (
            ".jsonl",
            b'{"query": "\\ud83d", "text": "t", "clicked": 1}',
            "encoding: '\\ud83d' at character 1 of query is not UTF-8",
        ),
        (".jsonl", b'{"query": "q", "text": "t\\u0000", "clicked": 1}', "encoding: NUL in text"),
    ],
    ids=str,
)
def test_damage_in_a_line_is_named(tmp_path: Path, suffix: str, line: bytes, reason: str) -> None:
    """Damage that passes alters a number; damage that takes its neighbours with it loses more than a row."""
    path = _write(tmp_path / f"table{suffix}", GOOD)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], line, *lines[2:]]) + b"\n")
    good, bad = _read(path)
    assert good == GOOD
    assert list(bad) == [3]
    assert bad[3].startswith(reason)


def test_an_open_quote_ends_somewhere(tmp_path: Path) -> None:
    """A quote that is never closed may swallow what follows, but must say so and not fill the memory."""
    path = tmp_path / "table.csv"
    path.write_text('query,text,clicked\na,b,1\nc,"d,0\ne,f,0\n', encoding="utf-8")
    assert _read(path) == ([Pair("a", "b", 1)], {3: "csv: unexpected end of data in lines 3 to 4"})
    rows = "e,f,0\n" * 60_000
    path.write_text(f'query,text,clicked\na,b,1\nc,"d,0\n{rows}', encoding="utf-8")
    good, bad = _read(path)
    assert list(bad) == [3]
    assert bad[3].startswith("csv: field larger than field limit (131072) in lines 3 to ")
    assert len(good) > 60_000 - 131_072 // 6 - 3


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl"])
def test_an_overlong_line_is_damage(tmp_path: Path, suffix: str) -> None:
    """A binary file without line ends must not be read into memory as one line."""
    path = _write(tmp_path / f"table{suffix}", GOOD)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], b"x" * (2 * CHUNK_BYTES + 5), *lines[2:]]) + b"\n")
    good, bad = _read(path)
    assert good == GOOD
    long = "csv: field larger than field limit (131072)"
    assert bad == {3: long if suffix == ".csv" else f"columns: line of more than {CHUNK_BYTES:,} bytes"}


def test_bytes_and_codes_in_parquet(tmp_path: Path) -> None:
    """Bytes that are no UTF-8 end Arrow's own reading; a table of codes is what pandas' categories become."""
    path = tmp_path / "table.parquet"
    queries = pa.array([b"good", b"b\xffd", None], pa.binary())
    texts = pa.array(["one", "one", "two"]).dictionary_encode()
    clicks = pa.array([True, False, True])
    pq.write_table(pa.table({"query": queries, "text": texts, "clicked": clicks}), path)
    assert _read(path) == (
        [Pair("good", "one", 1)],
        {2: "encoding: byte 0xff at character 2 of query is not UTF-8", 3: "query: empty"},
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_column_is_one_message(tmp_path: Path, suffix: str) -> None:
    """A table of other names must say which names it has, not reject a million rows one by one."""
    path = _write(tmp_path / f"table{suffix}", [pair[:2] for pair in GOOD], ["query", "title"])
    with pytest.raises(
        PrepareError, match="no column text, clicked; found 'query', 'title', expected query, t"
    ):
        open_table(str(path), columns=COLUMNS)


def test_a_column_twice_is_one_message(tmp_path: Path) -> None:
    """Which of two columns is meant cannot be guessed."""
    path = tmp_path / "table.csv"
    path.write_text("query,text,clicked,text\na,b,1,c\n", encoding="utf-8")
    with pytest.raises(PrepareError, match="column text is there twice"):
        open_table(str(path), columns=COLUMNS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.tsv", b"", "empty; a table with the columns query, text, clicked expected"),
        ("empty.jsonl", b"", "empty; a table with the columns query, text, clicked expected"),
        ("mark.csv", b"\xef\xbb\xbf", "no header"),
        ("header.tsv", b"qu\xffery\ttext\tclicked\n", "no column query; found 'qu"),
        (
            "news.tsv",
            b"N1\tlifestyle\troyals\ta title\n",
            "no column query, text, clicked; found 'N1', 'life",
        ),
        ("carets.csv", b"query^text^clicked\n", "found 'query.text.clicked'"),
        ("blank.jsonl", b"\n\n", "no column query, text, clicked; found none"),
        ("empty.parquet", b"", "empty; a table"),
        ("text.parquet", b"query\ttext\tclicked\n", "no readable Parquet file"),
    ],
)
def test_files_that_are_no_table(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """A wrong file is one message with its cure, not a stack of frames or a shard of nothing."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PrepareError, match=message):
        open_table(str(tmp_path / name), columns=COLUMNS)


def test_no_file_is_one_message(tmp_path: Path) -> None:
    """A misspelt name must be named."""
    with pytest.raises(PrepareError, match="no such file"):
        open_table(str(tmp_path / "missing.tsv"), columns=COLUMNS)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("query", [1, 2], "query: int found, text expected"),
        ("clicked", [0.5, 1.0], "label: clicked 0.5 is not"),
    ],
)
def test_parquet_of_other_types(tmp_path: Path, column: str, values: list[float], message: str) -> None:
    """Numbers for queries would be read as texts of digits."""
    table = {"query": ["a", "b"], "text": ["c", "d"], "clicked": [0, 1], column: values}
    pq.write_table(pa.table(table), tmp_path / "table.parquet")
    good, bad = _read(tmp_path / "table.parquet")
    assert good == []
    assert bad[1].startswith(message)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_table_that_changes_meanwhile_is_noticed(tmp_path: Path, suffix: str) -> None:
    """Rows of two versions under the hash of one are a table that never was."""
    path = _write(tmp_path / f"table{suffix}", GOOD)
    table = open_table(str(path), columns=COLUMNS)
    _write(path, [*GOOD[::-1], Pair("one", "more", 0)])
    with pytest.raises(PrepareError, match="changed while it was read"):
        list(read_pairs(table))


@pytest.mark.parametrize("cut", [0.2, 0.5, 0.9])
def test_a_damaged_parquet_is_one_message(tmp_path: Path, cut: float) -> None:
    """A download that broke off, or bytes altered inside, must not become rows."""
    path = _write(tmp_path / "table.parquet", [Pair(f"q{i}", f"text {i} " * 9, i % 2) for i in range(4000)])
    content = path.read_bytes()
    path.write_bytes(content[: int(cut * len(content))])
    with pytest.raises(PrepareError, match="no readable Parquet file"):
        open_table(str(path), columns=COLUMNS)
    middle = int(cut * 0.9 * len(content))
    path.write_bytes(content[:middle] + bytes(200) + content[middle + 200 :])
    with pytest.raises(PrepareError, match=r"damaged after row|no readable Parquet"):
        list(read_pairs(open_table(str(path), columns=COLUMNS)))


def _change(content: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for kind, place, piece in changes:
        at = int(place * len(content))
        if kind == "insert":
            content = content[:at] + piece + content[at:]
        elif kind == "replace":
            content = content[:at] + piece + content[at + len(piece) :]
        elif kind == "delete":
            content = content[:at] + content[at + len(piece) :]
        else:
            content = content[:at]
    return content


PIECES = st.one_of(
    st.sampled_from(
        [b"\n", b"\r", b"\t", b",", b'"', b"\0", b"\xff", b"\xe2\x82", b"{", b"\\u", b"\\ud800", b"1" * 5000]
    ),
    st.binary(min_size=1, max_size=8),
)
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["insert", "replace", "delete", "cut"]), st.floats(0, 1, exclude_max=True), PIECES
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(changes=CHANGES)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_damage_is_a_crash(tmp_path: Path, suffix: str, changes: list[tuple[str, float, bytes]]) -> None:
    """Whatever is in a file, a person gets rows, reasons or one message; never another exception."""
    path = _write(tmp_path / f"table{suffix}", GOOD * 3)
    path.write_bytes(_change(path.read_bytes(), changes))
    try:
        good, bad = _read(path)
    except PrepareError:
        return
    assert all(row.query.strip() and row.text.strip() and row.clicked in (0, 1) for row in good)
    assert all(row.query.encode() and row.text.encode() for row in good)
    assert all(reason.partition(":")[0].isalpha() for reason in bad.values())


def _long_rows(count: int) -> list[tuple[str, str, int]]:
    return [(f"query {i}", f"{i} and a text of some length, " * 20, i % 2) for i in range(count)]


def _peak(path: Path) -> int:
    """Most bytes that reading a table holds, in Python and in Arrow."""
    before, held = pa.total_allocated_bytes(), 0
    tracemalloc.start()
    try:
        table = open_table(str(path), columns=COLUMNS)
        assert table.source.sha256
        for line in read_pairs(table):
            if line.number % 50 == 0:
                held = max(held, pa.total_allocated_bytes() - before)
        return held + tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_reading_a_table_needs_constant_memory(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log of a hundred gigabytes must be read by a machine that has eight."""
    monkeypatch.setattr("newsbert_ray.data.tables.CHUNK_BYTES", 1 << 17)
    monkeypatch.setattr("newsbert_ray.data.tables._BUFFER_BYTES", 1 << 17)
    small, large = (_write(tmp_path / f"{count}{suffix}", _long_rows(count)) for count in (1_000, 12_000))
    assert _peak(large) < 1.2 * _peak(small) + 50_000
