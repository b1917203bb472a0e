"""Labelled texts as people have them: tables, folders and data sets become news shards, or one clear line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import newsbert_ray
from newsbert_ray.data.shards import SPLITS, Manifest, Split, read_shard
from newsbert_ray.data.sources import PrepareError

TOPICS = ("money", "sport", "tech")
ROWS = [(f"{topic} news number {i} about {topic}", topic) for i in range(30) for topic in TOPICS]


def _lines(path: Path, *, header: str = "title,category", mark: str = ",", encoding: str = "utf-8") -> Path:
    lines = ([header] if header else []) + [mark.join(row) for row in ROWS]
    path.write_bytes("\r\n".join(lines).encode(encoding))
    return path


def _rows(out: Path, manifest: Manifest, split: Split) -> list[dict[str, Any]]:
    return [row for shard in manifest.splits[split] for row in read_shard(out, shard).to_pylist()]


def _prepare(out: Path, *sources: Path | str, **values: Any) -> tuple[Manifest, list[dict[str, Any]]]:
    """The manifest, and all rows of all splits."""
    manifest = newsbert_ray.prepare(
        source=[str(one) for one in sources], teacher="scratch", out=str(out), workers=0,
        say=lambda _: None, validation_share=0.2, test_share=0.2, **values,
    )  # fmt: skip
    return manifest, [row for split in SPLITS for row in _rows(out, manifest, split)]


def _json(path: Path, label: Callable[[str], Any] = str) -> Path:
    path.write_text("".join(json.dumps({"text": text, "label": label(topic)}) + "\n" for text, topic in ROWS))
    return path


def _gzip(path: Path) -> Path:
    path.write_bytes(gzip.compress(_lines(path.with_name("plain.csv")).read_bytes()))
    return path


def _parquet(path: Path) -> Path:
    texts, topics = zip(*ROWS, strict=True)
    pq.write_table(pa.table({"content": texts, "class": pa.array(topics).dictionary_encode()}), path)
    return path


def _folder(path: Path) -> Path:
    for i, (text, topic) in enumerate(ROWS):
        (path / topic).mkdir(parents=True, exist_ok=True)
        (path / topic / f"{i}.txt").write_text(text, encoding="utf-8")
    return path


def _saved(path: Path) -> Path:
    data = {"text": [text for text, _ in ROWS], "label": [TOPICS.index(topic) for _, topic in ROWS]}
    label = datasets.ClassLabel(names=list(TOPICS))
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    datasets.Dataset.from_dict(data, features=features).save_to_disk(str(path))
    return path


FORMS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "a.csv": (_lines, {}),
    "semicolons.csv": (lambda path: _lines(path, header="title;category", mark=";"), {}),
    "carets.csv": (lambda path: _lines(path, header="t^c", mark="^"),
                   {"columns.delimiter": "^", "columns.text": "t", "columns.label": "c"}),
    "a.tsv": (lambda path: _lines(path, header="Title\tCategory Name", mark="\t"), {}),
    "mark.csv": (lambda path: _lines(path, encoding="utf-8-sig"), {}),
    "utf16.csv": (lambda path: _lines(path, encoding="utf-16"), {}),
    "bare.csv": (lambda path: _lines(path, header=""), {"columns.text": "1", "columns.label": "2"}),
    "a.jsonl": (_json, {}),
    "z.csv.gz": (_gzip, {}),
    "a.parquet": (_parquet, {}),
    "folder": (_folder, {}),
    "saved": (_saved, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    """A form that is read otherwise trains another model on the same corpus."""
    write, values = FORMS[name]
    manifest, rows = _prepare(tmp_path / "out", write(tmp_path / name), **values)
    assert sorted((row["title"], row["category"]) for row in rows) == sorted(ROWS)
    assert manifest.labels == list(TOPICS)
    assert all(manifest.labels[row["label"]] == row["category"] for row in rows)
    assert len({row["news_id"] for row in rows}) == len(ROWS)
    assert all(manifest.rows(split) for split in SPLITS)
    assert manifest.rejected == {}


WRONG: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "names.csv": (b"a,b\nx,y\n", {}, "no text column; found 'a', 'b'; name it by"),
    "one.csv": (b"text\nx\n", {}, "no label column; found 'text'; name it by --columns.label"),
    "other.csv": (b"text,label\nx,y\n",
        {"columns.text": "title"}, "no column 'title'; found 'text', 'label'"),
    "mark.csv": (b"text^label\nx^y\n", {}, "found 'text.label'; .* see --columns.delimiter"),
    "latin.csv": (b"text,label\ncaf\xe9,y\n", {}, "byte 0xe9 at character 4 .* --columns.encoding"),
    "no.csv": (b"text,label\nx,y\n", {"columns.encoding": "klingon"}, "klingon: no such encoding"),
    "ascii.csv": (b"text,label\ncaf\xe9,y\n",
        {"columns.encoding": "ascii"}, "not ascii .* --columns.encoding"),
    "empty.csv": (b"", {}, "empty; a table with text and label expected"),
    "header.csv": (b"text,label\n", {}, "train would be empty: none of the 0 .*header.csv"),
    "single.csv": (b"text,label\n" + b"x,y\n" * 90, {}, r"a single topic \(y\)"),
    "ragged.tsv": (b"text\tlabel\n" + b"x\ty\tz\n" * 9,
        {}, "9 of 9 lines are bad, .*columns: 3 found, 2 exp"),
    "list.jsonl": (b'{"text": "x", "label": ["y"]}\n', {}, "label: list found, a word or number expected"),
    "blank.csv": (b"text,label\n   ,y\n", {}, "text: empty"),
    "ids.csv": (b"id,text,label\n" + b"1,x,y\n" * 9, {}, "8 of 9 lines are bad, .*duplicate id"),
    "cut.csv.gz": (gzip.compress(b"text,label\n" + bytes(range(256)) * 9)[:99], {}, "damaged gzip"),
    "bad.parquet": (b"PAR1", {}, "no readable Parquet file"),
    "cut.zip": (b"PK\3\4 and so on", {}, "damaged or encrypted zip of 14 bytes"),
    "zip": (b"PK\3\4 and so on", {}, "damaged or encrypted zip of 14 bytes"),
    "notes.txt": (b"text", {}, "neither a folder, a zip nor a table"),
    "folder/a.txt": (b"text", {}, r"no news.tsv of MIND in it, no LABEL/\*.txt"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_one_line_with_its_cure(tmp_path: Path, name: str) -> None:
    """A person has to learn what was found and which flag mends it, not read a stack of frames."""
    content, values, message = WRONG[name]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    source = path.parent if "/" in name else path
    with pytest.raises(PrepareError, match=message) as caught:
        _prepare(tmp_path / "out", source, **values)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_texts_without_labels_train(tmp_path: Path) -> None:
    """A lost text cannot teach; one with an invented label teaches something false."""
    path = _json(tmp_path / "a.jsonl", lambda topic: None if topic == "tech" else topic)
    manifest, rows = _prepare(tmp_path / "out", path)
    bare = [row for row in rows if row["label"] < 0]
    assert len(rows) == 90
    assert sorted(row["title"] for row in bare) == sorted(text for text, topic in ROWS if topic == "tech")
    assert all(row["label"] >= 0 for split in SPLITS[1:] for row in _rows(tmp_path / "out", manifest, split))
    assert manifest.examples("train") == manifest.rows("train") - 30
    manifest, _ = _prepare(tmp_path / "none", path, **{"columns.label": "none"})
    assert (manifest.rows("train"), manifest.examples("train"), manifest.labels) == (90, 0, [])


def test_splits_and_classes_of_a_data_set(tmp_path: Path) -> None:
    """A test split that is drawn anew is no longer the public one."""
    one = datasets.load_from_disk(str(_saved(tmp_path / "one")))
    bare = one.select(range(6)).map(lambda row: {**row, "label": -1})
    parts = {"train": one.select(range(60)), "test": one.select(range(60, 90)), "unsupervised": bare}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "parts"))
    manifest, _ = _prepare(tmp_path / "out", tmp_path / "parts")
    test = _rows(tmp_path / "out", manifest, "test")
    assert [row["title"] for row in test] == [text for text, _ in ROWS[60:]]
    assert test[0]["news_id"] == "test-1"
    assert manifest.rows("train") - manifest.examples("train") == 6
    assert {*manifest.labels} == {*TOPICS}


def test_several_columns_are_joined_and_named(tmp_path: Path) -> None:
    """The columns that are read must be said, or a title alone is trained on unnoticed."""
    path = tmp_path / "a.csv"
    path.write_text("Class Index,Title,Description\n" + "".join(f"{i % 3},t{i},d {i}\n" for i in range(90)))
    said: list[str] = []
    values: dict[str, Any] = {"source": [str(path)], "teacher": "scratch", "workers": 0, "say": said.append}
    newsbert_ray.prepare(out=str(tmp_path / "a"), **values)
    assert f"{tmp_path.name}/a.csv: text from Title; label from Class Index" in said
    assert any(line.startswith("texts: ") for line in said)
    assert not any("news" in line or "Table 1" in line for line in said[:-1])
    text = {"columns.text": "Title,Description"}
    manifest, rows = _prepare(tmp_path / "b", path, **text)
    assert {row["title"] for row in rows} == {f"t{i} d {i}" for i in range(90)}
    with pytest.raises(PrepareError, match=r"columns .* then, .* now; add --overwrite"):
        _prepare(tmp_path / "b", path)
    assert manifest.labels == ["0", "1", "2"]
