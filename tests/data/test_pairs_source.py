"""Tables of query-text pairs, from files to a folder of shards."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from newsbert_ray.config import PrepareSettings
from newsbert_ray.data import pairs_source
from newsbert_ray.data.pairs_source import (
    COLUMNS,
)
from newsbert_ray.data.prepare import prepare
from newsbert_ray.data.shards import (
    PAIRS_SCHEMA,
    SPLITS,
    Manifest,
    ShardError,
    Split,
    TextTable,
    read_manifest,
    read_shard,
    read_texts,
)
from newsbert_ray.data.sources import PrepareError
from newsbert_ray.data.tokenizer import TokenizerError, learn_tokenizer, load_tokenizer

Row = tuple[str, str, int]


def _rows(queries: int = 60, *, start: int = 0) -> list[Row]:
    """Three candidates a query, of which one is clicked; a text is offered to several queries."""
    return [
        (f"query number {q}", f"the text of news {(q + c) % 50}", int(c == q % 3))
        for q in range(start, start + queries)
        for c in range(3)
    ]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokeniser that tells every row of `_rows` from the others."""
    folder = tmp_path_factory.mktemp("encoders") / "letters"
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    learn_tokenizer(lambda: iter([letters, *letters]), vocabulary=90).save(folder)
    return folder


def _table(path: Path, rows: Iterable[tuple[object, ...]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ("\t".join(map(str, row)) + "\n" for row in itertools.chain([COLUMNS], rows))
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)
    return path


def _prepare(
    out: Path, tables: Iterable[Path], teacher: Path | str, **changes: Any
) -> tuple[Manifest, list[str]]:
    messages: list[str] = []
    values = {"max_tokens": 512, **changes}
    sources = [str(table) for table in tables]
    prepare_settings = PrepareSettings(source=sources, teacher=str(teacher), out=str(out), **values)
    return prepare(prepare_settings, say=messages.append), messages


def _ids(out: Path, split: Split) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Every pair of a split as token ids."""
    manifest = read_manifest(out)
    texts = read_texts(out, manifest)
    return [
        (_text(texts, row["query"]), _text(texts, row["text"]), row["clicked"])
        for shard in manifest.pairs[split]
        for row in read_shard(out, shard).to_pylist()
    ]


def _text(texts: TextTable, row: int) -> tuple[int, ...]:
    return tuple(texts.tokens[texts.offsets[row] : texts.offsets[row + 1]].tolist())


def _encoded(teacher: Path, rows: Iterable[Row]) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
    tokenizer = load_tokenizer(str(teacher))

    def encode(text: str) -> tuple[int, ...]:
        return tuple(next(tokenizer.encode([text], max_tokens=512)))

    return [(encode(query), encode(text), clicked) for query, text, clicked in rows]


def _contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_three_tables(tmp_path: Path, teacher: Path) -> None:
    """Every pair must arrive in its split, in its order, with its own click; names decide, not the order."""
    parts = {"dev": _rows(20, start=100), "test": _rows(20, start=200), "train": _rows()}
    tables = [_table(tmp_path / f"{name}.tsv", rows) for name, rows in parts.items()]
    manifest, messages = _prepare(tmp_path / "out", tables, teacher)
    for split, name in zip(SPLITS, ("train", "dev", "test"), strict=True):
        assert _ids(tmp_path / "out", split) == _encoded(teacher, parts[name])
        assert manifest.rows(split, "retrieval") == manifest.examples(split, "retrieval") == len(parts[name])
    assert manifest == read_manifest(tmp_path / "out")
    assert read_shard(tmp_path / "out", manifest.pairs["train"][0]).schema == PAIRS_SCHEMA
    assert [source.file for source in manifest.sources] == ["train.tsv", "dev.tsv", "test.tsv"]
    assert (manifest.labels, manifest.splits, manifest.behaviors, manifest.others) == ([], {}, {}, [])
    assert load_tokenizer(str(tmp_path / "out" / "tokenizer")).sha256 == manifest.tokenizer.sha256
    assert any(
        line.startswith(f"{tmp_path.name}/train.tsv: ") and line.endswith(" kB, for train")
        for line in messages
    )
    assert messages[-1] == (
        f"next: newsbert-ray train --task retrieval --data {tmp_path / 'out'} --teacher {teacher} --out RUN"
    )


def test_statistics(tmp_path: Path, teacher: Path) -> None:
    """Counts that miss a row or count one twice describe another table."""
    rows = _rows()
    manifest, messages = _prepare(tmp_path / "out", [_table(tmp_path / "a.tsv", rows)], teacher)
    queries = {query for query, _, _ in _encoded(teacher, rows)}
    texts = {text for _, text, _ in _encoded(teacher, rows)}
    assert manifest.statistics == {
        "queries": 60,
        "texts": 50,
        "pairs": 180,
        "clicked": 60,
        "words_per_query": pytest.approx(sum(len(q.split()) for q in {q for q, _, _ in rows}) / 60),
        "words_per_text": pytest.approx(sum(len(t.split()) for t in {t for _, t, _ in rows}) / 50),
        "tokens_per_query": pytest.approx(sum(map(len, queries)) / 60),
        "tokens_per_text": pytest.approx(sum(map(len, texts)) / 50),
    }
    assert any("60 different queries of" in line for line in messages)
    assert any("33.3% of train" in line for line in messages)


@pytest.mark.parametrize("tables", [1, 2])
def test_a_query_is_in_one_split(tmp_path: Path, teacher: Path, tables: int) -> None:
    """A query in training and test tells the test what was clicked; case and blanks make no other query."""
    rows = [
        (query.upper() if i % 2 else f" {query}  ", text, c) for i, (query, text, c) in enumerate(_rows(200))
    ]
    paths = [_table(tmp_path / "train.tsv", rows), _table(tmp_path / "dev.tsv", _rows(20, start=500))]
    _prepare(tmp_path / "out", paths[:tables], teacher, validation_share=0.2, test_share=0.2)
    pairs = {split: _ids(tmp_path / "out", split) for split in SPLITS}
    split_here = SPLITS[: 4 - tables]
    queries = [{query for query, _, _ in pairs[split]} for split in split_here]
    assert sum(map(len, queries)) == len(set().union(*queries)) == 200
    assert all(20 < len(part) < 70 for part in queries[1:])
    expected = _encoded(teacher, rows + (_rows(20, start=500) if tables == 2 else []))
    assert sorted(pair for split in SPLITS for pair in pairs[split]) == sorted(expected)
    # Inside a split the order is the table's.
    assert pairs["train"] == [pair for pair in expected if pair[0] in queries[0]]


def test_seed_and_shares_decide_the_split(tmp_path: Path, teacher: Path) -> None:
    """The same settings must hold out the same queries on every machine, others others."""
    path = _table(tmp_path / "a.tsv", _rows(200))
    tests = []
    for name, changes in (("a", {"seed": 1}), ("b", {"seed": 1}), ("c", {"seed": 2})):
        _prepare(tmp_path / name, [path], teacher, **changes)
        tests.append(_ids(tmp_path / name, "test"))
    assert tests[0] == tests[1]
    assert tests[0] != tests[2]
    assert _contents(tmp_path / "a") == _contents(tmp_path / "b")


def test_equal_strings_are_one_text(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A news that a thousand queries are offered must be tokenised and encoded once, blocks apart too."""
    monkeypatch.setattr("newsbert_ray.data.pairs_source._BLOCK_ROWS", 7)
    monkeypatch.setattr(pairs_source, "SHARD_ROWS", 20)
    rows = [("news 1", "news 1", 1), *_rows(), ("news 1", "news 1", 0), *_rows(start=500)]
    paths = [_table(tmp_path / "a.tsv", rows), _table(tmp_path / "b.tsv", _rows(20))]
    manifest, _ = _prepare(tmp_path / "out", paths, teacher)
    # A query is cut otherwise than a text, so that one string can be both.
    assert manifest.texts.rows == 121 + 51
    assert manifest.statistics["queries"] == 121
    assert len(manifest.pairs["train"]) > 10
    assert all(20 <= shard.rows < 27 for shard in manifest.pairs["train"][:-1])
    names = [shard.file for split in SPLITS for shard in manifest.pairs[split]]
    assert len(set(names)) == len(names)
    assert "test-pairs-01-00000.parquet" in names
    found = [pair for split in SPLITS for pair in _ids(tmp_path / "out", split)]
    assert sorted(found) == sorted(_encoded(teacher, rows + _rows(20)))


def test_formats_give_the_same_folder(tmp_path: Path, teacher: Path) -> None:
    """The format of a table must not alter one byte of its shards."""
    rows = _rows()
    table = pa.table(dict(zip(COLUMNS, zip(*rows, strict=True), strict=True)))
    paths = {suffix: tmp_path / suffix / f"table.{suffix}" for suffix in ("tsv", "csv", "jsonl", "parquet")}
    for path in paths.values():
        path.parent.mkdir()
    _table(paths["tsv"], rows)
    pa_csv.write_csv(table, paths["csv"])
    pq.write_table(table, paths["parquet"])
    paths["jsonl"].write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()), encoding="utf-8")
    contents = {}
    for suffix, path in paths.items():
        manifest, _ = _prepare(tmp_path / f"out-{suffix}", [path], teacher)
        contents[suffix] = _contents(tmp_path / f"out-{suffix}")
        contents[suffix].pop("manifest.json")
        contents[suffix]["statistics"] = repr(manifest.statistics).encode()
    assert len(contents["tsv"]) > 6
    assert contents["csv"] == contents["jsonl"] == contents["parquet"] == contents["tsv"]


def test_lengths_of_query_and_text(tmp_path: Path, teacher: Path) -> None:
    """A text cut like a title loses its body; a query that is not cut can be a whole page."""
    rows = [(f"{query} " + "word " * 60, f"{text} " + "long " * 700, c) for query, text, c in _rows()]
    path = _table(tmp_path / "a.tsv", rows)
    _prepare(tmp_path / "out", [path], teacher)
    query, text, _ = _ids(tmp_path / "out", "train")[0]
    assert (len(query), len(text)) == (30, 512)
    _prepare(tmp_path / "short", [path], teacher, max_tokens=100)
    assert len(_ids(tmp_path / "short", "train")[0][1]) == 100


def test_scratch_learns_from_training_pairs_alone(tmp_path: Path) -> None:
    """A vocabulary that has seen the test's words makes the test easier than the world."""
    paths = [
        _table(tmp_path / "train.tsv", _rows(100)),
        _table(tmp_path / "dev.tsv", [(f"zebra {q}", f"quagga {t}", c) for q, t, c in _rows(20, start=500)]),
    ]
    _, messages = _prepare(tmp_path / "out", paths, "scratch", scratch={"vocabulary": 200})
    vocabulary = (tmp_path / "out" / "tokenizer" / "vocab.txt").read_text(encoding="utf-8").split("\n")
    assert {"query", "news", "number"} <= set(vocabulary)
    assert not any("z" in word or "g" in word for word in vocabulary)
    assert "learning up to 200 WordPieces from the training texts" in messages
    before = _contents(tmp_path / "out")
    _, messages = _prepare(tmp_path / "out", paths, "scratch", scratch={"vocabulary": 200})
    assert messages[-1].startswith("already prepared")
    assert _contents(tmp_path / "out") == before
    with pytest.raises(PrepareError, match=r"scratch\.vocabulary 200 then, 150 now"):
        _prepare(tmp_path / "out", paths, "scratch", scratch={"vocabulary": 150})


def test_a_change_is_noticed_and_named(tmp_path: Path, teacher: Path) -> None:
    """Shards of another table under the same name give figures that nobody can explain."""
    path = _table(tmp_path / "a.tsv", _rows())
    out = tmp_path / "out"
    first, _ = _prepare(out, [path], teacher)
    before = _contents(out)
    with pytest.raises(PrepareError, match="max_tokens 512 then, 64 now; add --overwrite"):
        _prepare(out, [path], teacher, max_tokens=64)
    with pytest.raises(PrepareError, match=r"source .*/b.tsv is new"):
        _prepare(out, [path, _table(tmp_path / "b.tsv", _rows(20, start=200))], teacher)
    _table(path, _rows(61))
    with pytest.raises(PrepareError, match=r"source .*/a.tsv has changed"):
        _prepare(out, [path], teacher)
    assert _contents(out) == before
    second, _ = _prepare(out, [path], teacher, overwrite=True)
    assert second.fingerprint != first.fingerprint
    assert second.statistics["pairs"] == 183


def test_a_damaged_file_is_prepared_again(tmp_path: Path, teacher: Path) -> None:
    """A disk that lost a byte must cost a minute, not a wrong figure."""
    path, victim = _table(tmp_path / "a.tsv", _rows()), "train-pairs-00-00000.parquet"
    out = tmp_path / "out"
    manifest, _ = _prepare(out, [path], teacher)
    before = _contents(out)
    content = bytearray(before[victim])
    content[-3] ^= 1
    (out / victim).write_bytes(bytes(content))
    with pytest.raises(ShardError, match="damaged"):
        read_shard(out, manifest.pairs["train"][0])
    _, messages = _prepare(out, [path], teacher)
    assert any(f"{victim}: missing or damaged (1 in all)" in line for line in messages)
    assert _contents(out) == before


def test_bad_rows_are_listed_and_left_out(tmp_path: Path, teacher: Path) -> None:
    """A bad row must be found by its file and line, and take no other with it."""
    rows: list[tuple[object, ...]] = [*_rows()]
    rows[10:10] = [("query", "text", 2), ("", "text", 1), ("query", "  ", 0), ("query", "text")]
    path = _table(tmp_path / "logs" / "a.tsv", rows)
    manifest, messages = _prepare(tmp_path / "out", [path], teacher, max_rejected_share=0.1)
    lines = (tmp_path / "out" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    listed = [json.loads(line) for line in lines]
    assert [(entry["file"], entry["line"], entry["reason"]) for entry in listed] == [
        ("logs/a.tsv", 12, "label: clicked '2' is not 0 or 1"),
        ("logs/a.tsv", 13, "query: empty"),
        ("logs/a.tsv", 14, "text: empty"),
        ("logs/a.tsv", 15, "columns: 2 found, 3 expected"),
    ]
    assert listed[0]["text"] == "query\ttext\t2"
    assert manifest.rejected == {"columns": 1, "label": 1, "query": 1, "text": 1}
    assert (manifest.sources[0].rows, manifest.sources[0].rejected) == (184, 4)
    assert "rejected, label: 1" in messages
    assert "  logs/a.tsv:13: query: empty" in messages
    pairs = [pair for split in SPLITS for pair in _ids(tmp_path / "out", split)]
    assert sorted(pairs) == sorted(_encoded(teacher, _rows()))


def test_too_many_bad_rows_are_an_error(tmp_path: Path, teacher: Path) -> None:
    """A table with its columns mixed up must not leave the few rows that happen to pass."""
    path = _table(tmp_path / "a.tsv", [*_rows(), *[("query", "text", "x")] * 5])
    with pytest.raises(
        PrepareError, match=r"a.tsv: 5 of 185 lines are bad, at most 1.0% may be: .*a.tsv:182: lab"
    ):
        _prepare(tmp_path / "out", [path], teacher)
    assert not (tmp_path / "out").exists()
    assert len((tmp_path / "out.rejected.jsonl").read_text(encoding="utf-8").splitlines()) == 5


def test_a_single_class_is_an_error(tmp_path: Path, teacher: Path) -> None:
    """With clicks alone the loss falls to nothing and the AUC is undefined."""
    clicked = [(query, text, 1) for query, text, _ in _rows()]
    with pytest.raises(PrepareError, match=r"train would have a single class: .* clicked and 0 other pairs"):
        _prepare(tmp_path / "out", [_table(tmp_path / "a.tsv", clicked)], teacher)
    tables = [_table(tmp_path / "train.tsv", _rows()), _table(tmp_path / "dev.tsv", clicked)]
    with pytest.raises(PrepareError, match="test would have a single class"):
        _prepare(tmp_path / "out", tables, teacher)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rows", [[], _rows(1)])
def test_an_empty_split_is_an_error(tmp_path: Path, teacher: Path, rows: list[Row]) -> None:
    """A split without pairs would alter every number that is made from it."""
    with pytest.raises(PrepareError, match="would be empty: none of the"):
        _prepare(tmp_path / "out", [_table(tmp_path / "a.tsv", rows)], teacher)


def test_sources_that_do_not_go_together(tmp_path: Path, teacher: Path) -> None:
    """A table twice would test on what was trained; a folder of MIND beside a table has no pairs."""
    path = _table(tmp_path / "a.tsv", _rows())
    with pytest.raises(PrepareError, match="one is given twice"):
        _prepare(tmp_path / "out", [path, tmp_path / "." / "a.tsv"], teacher)
    with pytest.raises(PrepareError, match="prepare folders of MIND and tables separately"):
        _prepare(tmp_path / "out", [path, tmp_path], teacher)
    with pytest.raises(TokenizerError, match="no such folder"):
        _prepare(tmp_path / "out", [path], tmp_path / "missing")
    assert not (tmp_path / "out").exists()


def test_progress_is_shown(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence for an hour cannot be told from a hang."""
    monkeypatch.setattr("newsbert_ray.data.sources._SAY_SECONDS", 0.0)
    monkeypatch.setattr("newsbert_ray.data.pairs_source._BLOCK_ROWS", 50)
    _, messages = _prepare(tmp_path / "out", [_table(tmp_path / "a.tsv", _rows(100))], teacher)
    assert [line for line in messages if line.startswith("looked")] == [
        f"looked through {rows} rows" for rows in range(50, 301, 50)
    ]
    progress = [line for line in messages if line.startswith("prepared")]
    assert [line.partition(",")[0] for line in progress] == [
        f"prepared {share} %" for share in (17, 33, 50, 67, 83)
    ]
    assert progress[-1].endswith("s left")


LINES = st.lists(
    st.one_of(
        st.binary(max_size=30).filter(lambda line: b"\n" not in line),
        st.sampled_from(
            [b"", b"q\tt\t1", b"q\tt\t0", b"q\tt", b"\tt\t1", b"q\t\xff\t1", b"q\tt\t2", b'"\t"\t1']
        ),
    ),
    max_size=12,
)


@given(lines=LINES, at=st.integers(0, 180))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_leaves_other_pairs_alone(tmp_path: Path, teacher: Path, lines: list[bytes], at: int) -> None:
    """Whatever is between two rows, both must stay as they are."""
    path = _table(tmp_path / "a.tsv", _rows())
    whole = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*whole[: at + 1], *lines, *whole[at + 1 :]]) + b"\n")
    manifest, _ = _prepare(tmp_path / "out", [path], teacher, max_rejected_share=1.0, overwrite=True)
    rejected = sum(manifest.rejected.values())
    pairs = [pair for split in SPLITS for pair in _ids(tmp_path / "out", split)]
    assert len(pairs) + rejected == 180 + len(lines)
    for pair in _encoded(teacher, _rows()):
        pairs.remove(pair)


def test_memory_is_flat(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log of a hundred million rows must not need as much memory as it has rows."""
    monkeypatch.setattr("newsbert_ray.data.tables.CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr("newsbert_ray.data.pairs_source._BLOCK_ROWS", 200)
    monkeypatch.setattr(pairs_source, "SHARD_ROWS", 500)
    peaks, sizes = [], (1_000, 5_000)
    for count in sizes:
        rows = (
            (f"query {i // 4}", f"{i} is the number of a news text that is new", i % 2) for i in range(count)
        )
        path = _table(tmp_path / f"{count}.tsv", rows)
        tracemalloc.start()
        _prepare(tmp_path / f"out{count}", [path], teacher)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Of a row there stay its texts' hashes and lengths; its strings alone would be 200 bytes.
    assert peaks[1] - peaks[0] < 40 * (sizes[1] - sizes[0])
    manifest = read_manifest(tmp_path / "out5000")
    assert np.array_equal(
        np.diff(read_texts(tmp_path / "out5000", manifest).offsets) > 2, np.ones(manifest.texts.rows, bool)
    )
