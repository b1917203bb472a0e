"""Every row of every format once, in order; a bad one with its reason."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from newsbert_ray.config import SettingsError
from newsbert_ray.data.sources import PrepareError
from newsbert_ray.serving.texts import TextsError, open_texts

ROWS = [(f"N{n}", f"title {n}, of the news") for n in range(5)]


def _lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _parquet(path: Path) -> None:
    pq.write_table(pa.table({"title": [t for _, t in ROWS], "id": [n for n, _ in ROWS]}), path)


WRITERS: dict[str, Callable[[Path], object]] = {
    "news.tsv": lambda path: _lines(path, [f"{n}\tnews\tx\t{t}\t\thttps://a\t[]\t[]" for n, t in ROWS]),
    "named.tsv": lambda path: _lines(path, ["nid\ttitle\tmore", *(f"{n}\t{t}\t" for n, t in ROWS)]),
    "news.csv": lambda path: _lines(path, ["text,news_id", *(f'"{t}",{n}' for n, t in ROWS)]),
    "news.jsonl": lambda path: _lines(path, [json.dumps({"id": n, "text": t}) for n, t in ROWS]),
    "news.parquet": _parquet,
    "news.csv.gz": lambda path: path.write_bytes(
        gzip.compress("\n".join(["text,id", *(f'"{t}",{n}' for n, t in ROWS)]).encode())
    ),
    "news.jsonl.gz": lambda path: path.write_bytes(
        gzip.compress("".join(json.dumps({"id": n, "text": t}) + "\n" for n, t in ROWS).encode())
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_formats(tmp_path: Path, name: str) -> None:
    """Columns by their names, in any order; MIND's file has no header."""
    WRITERS[name](tmp_path / name)
    texts = open_texts(tmp_path / name)
    assert list(texts.rows) == ROWS
    assert 5 <= texts.lines <= 6
    assert len(texts.sha256) == 64


def test_texts_without_ids(tmp_path: Path) -> None:
    """A text's id is the number of its line or row; blank lines count and are left out."""
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\ntwo, and more\nlast".encode())
    assert list(open_texts(tmp_path / "a.txt").rows) == [("1", "one"), ("3", "two, and more"), ("4", "last")]
    (tmp_path / "a.csv").write_text("text\none\ntwo\n")
    assert list(open_texts(tmp_path / "a.csv").rows) == [("1", "one"), ("2", "two")]


def test_named_columns(tmp_path: Path) -> None:
    """As `prepare` reads them; ids may be missing."""
    (tmp_path / "a.csv").write_bytes("Kopf;Rumpf;nr\nÄpfel;rot;a1\nBirnen;;\n".encode("latin-1"))
    columns = {"text": "Kopf,Rumpf", "id": "nr", "encoding": "latin-1", "delimiter": ";"}
    assert list(open_texts(tmp_path / "a.csv", columns).rows) == [("a1", "Äpfel rot"), ("2", "Birnen")]
    with pytest.raises(SettingsError, match=r"columns: unknown setting 'txt'.*did you mean 'text'"):
        open_texts(tmp_path / "a.csv", {"txt": "Kopf"})


def test_bad_rows(tmp_path: Path) -> None:
    """Each with its reason, in its place; ids may be numbers."""
    pq.write_table(pa.table({"id": [1, 2, 3], "title": ["a", None, "c"]}), tmp_path / "a.parquet")
    first, bad, last = open_texts(tmp_path / "a.parquet").rows
    assert (first, str(bad), last) == (("1", "a"), "title: empty", ("3", "c"))
    (tmp_path / "a.tsv").write_text("nid\ttitle\nN1\tone\nN3\n\n")
    assert [str(row) for row in open_texts(tmp_path / "a.tsv").rows][1:] == ["columns: 1 found, 2 expected"]
    (tmp_path / "b.jsonl").write_text('{"id": 1, "text": "a"}\n{"id": [1], "text": "a"}\n')
    assert str(list(open_texts(tmp_path / "b.jsonl").rows)[1]) == "id: list found, a word or number expected"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xlsx", "x", "give a .tsv, .csv, .jsonl, .parquet .* or .txt file"),
        ("a.csv", "name,value\n1,2\n", "no text column; found 'name', 'value'; name it by --columns.text"),
        ("a.tsv", "one\ttwo\n", "no text column; found 'one', 'two'; name it by"),
    ],
)
def test_unreadable_file(tmp_path: Path, name: str, content: str, message: str) -> None:
    """One line that says what a good file has."""
    (tmp_path / name).write_text(content)
    with pytest.raises((TextsError, PrepareError), match=message):
        open_texts(tmp_path / name)
