"""prepare, from MIND's files to a folder of shards: complete, reused, or not there at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from newsbert_ray import ray_session
from newsbert_ray.config import PrepareSettings
from newsbert_ray.data import mind, sources
from newsbert_ray.data import prepare as module
from newsbert_ray.data.examples import find_clicks, impressions_of
from newsbert_ray.data.prepare import prepare
from newsbert_ray.data.shards import OFFSETS, SPLITS, TOKENS, Manifest, read_manifest, read_shard, read_texts
from newsbert_ray.data.sources import PrepareError
from newsbert_ray.data.synthetic import synthesize
from newsbert_ray.data.tokenizer import TokenizerError, load_tokenizer
from newsbert_ray.ray_session import ConnectError
from tests.data.conftest import news_ids, read_impressions_by_id

Corpus = tuple[Path, Path]
MIND = Path(__file__).parents[3] / "shared" / "data" / "mind"


def _prepare(
    out: Path, folders: tuple[Path, ...], teacher: Path | str, **changes: Any
) -> tuple[Manifest, list[str]]:
    messages: list[str] = []
    values = {"workers": 0, **changes}
    settings = PrepareSettings(
        source=[str(one) for one in folders], teacher=str(teacher), out=str(out), **values
    )
    return prepare(settings, say=messages.append), messages


def _rows(out: Path, kind: str = "splits", only: str = "") -> dict[str, dict[str, Any]]:
    """Every row, or only those of a split, by its split and id."""
    manifest = read_manifest(out)
    rows: dict[str, dict[str, Any]] = {}
    for split, shards in getattr(manifest, kind).items():
        for shard in shards if only in ("", split) else []:
            for row in read_shard(out, shard).to_pylist():
                rows[f"{split} {row.get('news_id') or row['impression_id']}"] = row
    return rows


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _copy(corpus: Corpus, target: Path) -> Corpus:
    train, dev = (shutil.copytree(folder, target / folder.name) for folder in corpus)
    return train, dev


def _edit(path: Path, change: Callable[[list[bytes]], object]) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    change(lines)
    path.write_bytes(b"".join(lines))


def _rejected(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]


def test_two_sources(tmp_path: Path, corpus: Corpus, teacher: Path) -> None:
    """Test news must be news that training has never seen, and nothing may be lost on the way."""
    manifest, messages = _prepare(tmp_path / "out", corpus, teacher)
    rows = _rows(tmp_path / "out")
    ids = {split: {key.split()[1] for key in rows if key.startswith(split)} for split in SPLITS}
    assert ids["train"] | ids["validation"] == {f"N{i}" for i in range(1, 241)}
    assert ids["test"] == {f"N{i}" for i in range(241, 301)}
    assert not ids["train"] & ids["validation"]
    assert 10 < len(ids["validation"]) < 40
    line = (corpus[0] / "news.tsv").read_text(encoding="utf-8").splitlines()[0].split("\t")
    row = next(row for key, row in rows.items() if key.endswith(" N1"))
    assert [row["news_id"], row["category"], row["subcategory"], row["title"]] == line[:4]
    assert manifest.labels[row["label"]] == row["category"]
    assert manifest.labels == sorted(manifest.labels)
    assert [manifest.rows(split, "recommendation") for split in SPLITS] == [54, 6, 30]
    assert [manifest.examples(split) for split in SPLITS] == [manifest.rows(split) for split in SPLITS]
    assert any("30 news" in line and "earlier source" in line for line in messages)
    flags = f"--data {tmp_path / 'out'} --teacher {teacher} --out RUN"
    assert messages[-2:] == [
        f"next: newsbert-ray train {flags}",
        f"or:   newsbert-ray train --task recommendation {flags}",
    ]
    clicks = [
        sum(sum(row["clicked"]) for row in _rows(tmp_path / "out", "behaviors", split).values())
        for split in SPLITS
    ]
    assert (
        "impressions: 54 train ({} clicks), 6 validation ({} clicks), 30 test ({} clicks)".format(*clicks)
        in messages
    )


def test_statistics_of_table_1(tmp_path: Path, corpus: Corpus, teacher: Path) -> None:
    """Table 1 counted otherwise than the paper's cannot be laid beside it."""
    manifest, _ = _prepare(tmp_path / "out", corpus, teacher)
    news, clicks = _rows(tmp_path / "out"), _rows(tmp_path / "out", "behaviors")
    assert manifest.statistics == {
        "users": 30,
        "news": 300,
        "news_categories": 3,
        "impressions": 90,
        "clicks": sum(sum(row["clicked"]) for row in clicks.values()),
        "words_per_title": pytest.approx(sum(len(row["title"].split()) for row in news.values()) / 300),
        "tokens_per_title": pytest.approx(sum(len(row["tokens"]) for row in news.values()) / 300),
        "unknown_clicks": 0,
    }


def _lines_by_id(folder: Path, name: str) -> dict[str, list[str]]:
    lines = (folder / name).read_text(encoding="utf-8").split("\n")
    return {line.split("\t")[0]: line.split("\t") for line in lines if line}


@pytest.mark.parametrize("chunk_bytes", [sources.CHUNK_BYTES, 700])
def test_behaviors_name_the_news_of_their_line(
    tmp_path: Path, corpus: Corpus, teacher: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    """A row number one off trains each click on its neighbour's title without any error."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", chunk_bytes)
    train, dev = _copy(corpus, tmp_path)

    def rename(lines: list[bytes]) -> None:
        """Some of the new news get a topic of their own."""
        for i in (40, 50, 60, 70):
            lines[i] = b"\t".join([lines[i].split(b"\t")[0], b"unheard", *lines[i].split(b"\t")[2:]])

    _edit(dev / "news.tsv", rename)
    out = tmp_path / "out"
    manifest, _ = _prepare(out, (train, dev), teacher)
    assert sum(shard.rows for shard in manifest.others) == 4
    table, names = read_texts(out, manifest), news_ids(out)
    news = {**_lines_by_id(dev, "news.tsv"), **_lines_by_id(train, "news.tsv")}
    assert (len(table), sorted(names)) == (300, sorted(news))
    expected = load_tokenizer(str(teacher)).encode([news[name][3] for name in names], max_tokens=30)
    for at, ids in enumerate(expected):
        assert table.tokens[table.offsets[at] : table.offsets[at + 1]].tolist() == ids
    impressions = read_impressions_by_id(out)
    assert len(impressions) == 90
    for key, row in impressions.items():
        split, _, name = key.partition(" ")
        line = _lines_by_id(dev if split == "test" else train, "behaviors.tsv")[name]
        assert " ".join(row["history"]) == line[3]
        offered = zip(row["candidates"], row["clicked"], strict=True)
        assert " ".join(f"{news}-{click}" for news, click in offered) == line[4]


def test_a_topic_without_training_is_for_recommendation_only(
    tmp_path: Path, corpus: Corpus, teacher: Path
) -> None:
    """Left out, such a news would take with it every impression that offers it; labelled, it is a false
    topic."""
    train, dev = _copy(corpus, tmp_path)
    _edit(dev / "news.tsv", lambda lines: lines.append(lines[-1].replace(b"N300\t", b"N301\tunheard", 1)))
    line = b"31\tU1\t11/20/2019 1:00:00 AM\tN301 N1\tN301-1 N2-0\n"
    _edit(dev / "behaviors.tsv", lambda lines: lines.append(line))
    later = shutil.copytree(dev, tmp_path / "synthetic_test")
    more = "".join(f"M{i}\t{i}" + "\t".join(["x"] * 7) + "\n" for i in range(20))
    (later / "news.tsv").write_text((later / "news.tsv").read_text(encoding="utf-8") + more, encoding="utf-8")
    fresh = (corpus[0] / "news.tsv").read_text(encoding="utf-8").splitlines(keepends=True)[0]
    with (later / "news.tsv").open("a", encoding="utf-8") as file:
        file.write(fresh.replace("N1\t", "N500\t", 1))
    manifest, messages = _prepare(tmp_path / "out", (train, dev, later), teacher)
    assert manifest.rejected == {}
    assert "no topic of the training news: 21 news, for recommendation only" in messages
    assert [manifest.rows(split) for split in SPLITS] == [240, 60, 1]
    # N301 is repeated in the last source, and kept once.
    rows = [row for shard in manifest.others for row in read_shard(tmp_path / "out", shard).to_pylist()]
    assert [row["news_id"] for row in rows] == ["N301", *(f"M{i}" for i in range(20))]
    assert {row["label"] for row in rows} == {-1}
    assert [shard.file for shard in manifest.others] == [
        "other-news-02-00000.parquet",
        "other-news-04-00000.parquet",
    ]
    path = tmp_path / "out" / manifest.others[1].file
    path.unlink()
    _, messages = _prepare(tmp_path / "out", (train, dev, later), teacher)
    assert any(f"{path}: missing or damaged" in line for line in messages)
    row = read_impressions_by_id(tmp_path / "out")["validation 31"]
    assert (row["history"], row["candidates"]) == (["N301", "N1"], ["N301", "N2"])
    assert [manifest.rows(split, "recommendation") for split in SPLITS] == [60, 31, 31]


def test_what_the_lines_of_behaviors_may_hold(tmp_path: Path, corpus: Corpus, teacher: Path) -> None:
    """Unknown reading, nothing clicked, a candidate twice, no labels: none may stop a run or skew a count."""
    train, dev = _copy(corpus, tmp_path)
    when = "11/20/2019 1:00:00 AM"
    lines = [
        f"31\tU1\t{when}\tX1 N1 X2 N2\tN3-1 N4-0\n",
        f"32\tU1\t{when}\tX1 X2\tN3-0 N4-0\n",
        f"33\tU1\t{when}\t\tN3-1 N3-0 N4-1 N3-1 N5-0\n",
        f"34\tU1\t{when}\tN1\tN3-1 N3-0\n",
        f"35\tU1\t{when}\tN1\tN3 N4\n",
        f"36\tU1\t{when}\tN1\tN3-1 X1-0\n",
    ]
    _edit(dev / "behaviors.tsv", lambda old: old.extend(line.encode() for line in lines))
    out = tmp_path / "out"
    manifest, messages = _prepare(out, (train, dev), teacher, max_rejected_share=0.1)
    rows = read_impressions_by_id(out)
    kept = {name: rows.get(f"test {name}") for name in ("31", "32", "33", "34", "35", "36")}
    assert {
        name: row and (row["history"], row["candidates"], row["clicked"]) for name, row in kept.items()
    } == {
        "31": (["N1", "N2"], ["N3", "N4"], [1, 0]),
        "32": ([], ["N3", "N4"], [0, 0]),
        "33": ([], ["N3", "N3", "N4", "N3", "N5"], [1, 0, 1, 1, 0]),
        "34": (["N1"], ["N3", "N3"], [1, 0]),
        "35": (["N1"], ["N3", "N4"], None),
        "36": (["N1"], ["N3", None], [1, 0]),  # for the submission
    }
    before, _ = _prepare(tmp_path / "before", corpus, teacher)
    assert manifest.examples("test", "recommendation") - before.examples("test", "recommendation") == 1 + 3
    assert manifest.statistics["clicks"] - before.statistics["clicks"] == 1 + 3 + 1 + 1
    assert manifest.statistics["unknown_clicks"] == 4
    assert "clicks in histories on news that the sources do not have, left out: 4" in messages
    assert "test: 1 impressions without labels" in messages
    assert manifest.rejected == {}
    assert manifest.statistics["unknown_candidates"] == 1
    assert "candidates without a title, ranked last and in no metric: 1" in messages
    with pytest.raises(PrepareError, match="1 of 36 impressions offer news without a title"):
        _prepare(tmp_path / "strict", (train, dev), teacher)
    _edit(train / "behaviors.tsv", lambda old: old.append(lines[-1].encode()))
    manifest, _ = _prepare(tmp_path / "both", (train, dev), teacher, max_rejected_share=0.1)
    assert manifest.rejected == {"unknown id": 1}
    (listed,) = _rejected(tmp_path / "both")
    assert listed["reason"] == "unknown id: candidate 'X1' is not in the news of the sources"


def test_examples_are_what_training_finds(tmp_path: Path, corpus: Corpus, teacher: Path) -> None:
    """Steps are planned from the manifest: another count than training's would end an epoch early."""
    manifest, _ = _prepare(tmp_path / "out", corpus, teacher)
    shards = [shard for split in SPLITS for shard in manifest.behaviors[split]]
    assert len(shards) == 3
    for shard in shards:
        clicks, _, _ = find_clicks(impressions_of(read_shard(tmp_path / "out", shard), history=50))
        assert shard.examples == len(clicks) > 0


def test_a_folder_without_labels(tmp_path: Path, teacher: Path) -> None:
    """MIND's test file tells no clicks: its impressions are to be ranked, and none may count as unclicked."""
    folders = synthesize(
        tmp_path, news=240, users=30, topics=3, folders=("train", "dev", "test"), unlabelled=("test",)
    )
    manifest, messages = _prepare(tmp_path / "out", tuple(folders), teacher)
    assert [manifest.rows(split, "recommendation") for split in SPLITS] == [150, 30, 30]
    assert manifest.examples("test", "recommendation") == 0
    assert all(row["clicked"] is None for row in _rows(tmp_path / "out", "behaviors", "test").values())
    assert "test: 30 impressions without labels" in messages
    assert not any("train:" in line or "validation:" in line for line in messages)


@pytest.mark.parametrize("folders", [1, 2])
def test_impressions_split_by_time(
    tmp_path: Path, corpus: Corpus, teacher: Path, monkeypatch: pytest.MonkeyPatch, folders: int
) -> None:
    """Clicks of the same hour on both sides let a model remember what it should foretell."""
    shares = {"validation_share": 0.2, "test_share": 0.15}
    _prepare(tmp_path / "out", corpus[:folders], teacher, **shares)
    rows = read_impressions_by_id(tmp_path / "out")
    lines = _lines_by_id(corpus[0], "behaviors.tsv")
    parts = [[row for key, row in rows.items() if key.startswith(split)] for split in SPLITS]
    assert [len(part) for part in parts] == ([39, 12, 9] if folders == 1 else [48, 12, 30])
    for part in parts:
        assert [row["impression_id"] for row in part] == sorted(
            (row["impression_id"] for row in part), key=list(lines).index
        )
    for earlier, later in pairwise(parts):
        assert max(row["time"] for row in earlier) <= min(row["time"] for row in later)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 700)
    _prepare(tmp_path / "pieces", corpus[:folders], teacher, **shares)
    assert read_impressions_by_id(tmp_path / "pieces") == rows


def test_one_source_splits_by_hash(tmp_path: Path, corpus: Corpus, teacher: Path) -> None:
    """Without a later source there is still a test split, the same for the same seed only."""
    first, _ = _prepare(tmp_path / "a", corpus[:1], teacher, seed=1, test_share=0.3)
    again, _ = _prepare(tmp_path / "b", corpus[:1], teacher, seed=1, test_share=0.3)
    other, _ = _prepare(tmp_path / "c", corpus[:1], teacher, seed=2, test_share=0.3)
    assert sum(first.rows(split) for split in SPLITS) == 240
    assert 50 < first.rows("test") < 100
    assert set(first.behaviors) == set(SPLITS)
    assert _rows(tmp_path / "a") == _rows(tmp_path / "b")
    assert again.fingerprint == first.fingerprint != other.fingerprint
    assert _rows(tmp_path / "a").keys() != _rows(tmp_path / "c").keys()


def test_three_sources(tmp_path: Path, corpus: Corpus, teacher: Path) -> None:
    """With a folder for validation, no training news is spent on it, whatever order the folders come in."""
    later = shutil.copytree(corpus[1], tmp_path / "synthetic_test")
    text = (later / "news.tsv").read_text(encoding="utf-8")
    (later / "news.tsv").write_text(text + text.replace("N", "M"), encoding="utf-8")
    manifest, _ = _prepare(tmp_path / "out", (later, corpus[1], corpus[0]), teacher, max_rejected_share=0.0)
    assert [manifest.rows(split) for split in SPLITS] == [240, 60, 90]
    assert [source.folder for source in manifest.sources][::2] == [
        "synthetic_train",
        "synthetic_dev",
        "synthetic_test",
    ]


def test_small_chunks_give_the_same_rows(
    tmp_path: Path, corpus: Corpus, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row at the border of two chunks must be neither lost nor halved."""
    _prepare(tmp_path / "whole", corpus, teacher)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 700)
    manifest, _ = _prepare(tmp_path / "pieces", corpus, teacher)
    assert len(manifest.splits["train"]) > 20
    for kind in ("splits", "behaviors"):
        assert list(_rows(tmp_path / "pieces", kind).values()) == list(
            _rows(tmp_path / "whole", kind).values()
        )


def test_a_second_run_does_nothing(tmp_path: Path, corpus: Corpus, teacher: Path) -> None:
    """Each trial of a sweep calls for the same shards; tokenising again would cost more than training."""
    out = tmp_path / "out"
    first, _ = _prepare(out, corpus, teacher)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    second, messages = _prepare(out, corpus, teacher)
    assert second == first
    assert "already prepared" in messages[-1]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    moved = _copy(corpus, tmp_path / "elsewhere")
    assert "already prepared" in _prepare(out, moved, teacher)[1][-1]


def test_a_change_is_noticed_and_named(tmp_path: Path, corpus: Corpus, teacher: Path) -> None:
    """Training on the shards of another corpus or tokeniser gives a number without a meaning."""
    out, changed = tmp_path / "out", _copy(corpus, tmp_path)
    _prepare(out, changed, teacher)
    before = _contents(out)
    other = shutil.copytree(teacher, tmp_path / "other")
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(
        text.replace('"lowercase":true', '"lowercase":false'), encoding="utf-8"
    )
    cases: list[tuple[tuple[Path, ...], Path | str, dict[str, Any], str]] = [
        (changed, other, {}, "tokeniser tiny then, other now"),
        (changed, "scratch", {}, "tokeniser tiny then, scratch now"),
        (changed, teacher, {"max_tokens": 12}, "max_tokens 30 then, 12 now"),
        (changed, teacher, {"seed": 4}, "seed 0 then, 4 now"),
        (changed[:1], teacher, {}, "source synthetic_dev/news.tsv is not given now"),
    ]
    for folders, encoder, settings, message in cases:
        with pytest.raises(PrepareError, match=message):
            _prepare(out, folders, encoder, **settings)
    _edit(changed[1] / "news.tsv", lambda lines: lines.pop(7))
    with pytest.raises(PrepareError, match=r"source synthetic_dev/news\.tsv has changed; add --overwrite"):
        _prepare(out, changed, teacher)
    assert _contents(out) == before
    manifest, _ = _prepare(out, changed, teacher, overwrite=True)
    assert [source.rows for source in manifest.sources] == [240, 60, 89, 30]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "other",
        "out",
        "synthetic_dev",
        "synthetic_train",
    ]


@pytest.mark.parametrize("file", ["train-news-00-00000.parquet", TOKENS, OFFSETS])
def test_a_damaged_file_is_prepared_again(tmp_path: Path, corpus: Corpus, teacher: Path, file: str) -> None:
    """Shards found by their name alone would hand a flipped byte to every trial."""
    out = tmp_path / "out"
    _prepare(out, corpus, teacher)
    before = _contents(out)
    path = out / file
    path.write_bytes(path.read_bytes()[:-5])
    _, messages = _prepare(out, corpus, teacher)
    assert any(f"{path}: missing or damaged" in line for line in messages)
    assert _contents(out) == before


@pytest.mark.parametrize("content", [{"notes.txt": "mine"}, {"manifest.json": "{}"}])
def test_a_folder_that_is_not_ours_is_left_alone(
    tmp_path: Path, corpus: Corpus, teacher: Path, content: dict[str, str]
) -> None:
    """An --out mistyped as someone's folder must not be replaced."""
    out = tmp_path / "out"
    out.mkdir()
    for name, text in content.items():
        (out / name).write_text(text)
    before = _contents(out)
    with pytest.raises(PrepareError, match=str(out)):
        _prepare(out, corpus, teacher)
    assert _contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_scratch_learns_from_training_titles_alone(tmp_path: Path, corpus: Corpus) -> None:
    """Words of the test titles in the vocabulary would be a leak; two runs must agree on every id."""
    first, _ = _prepare(tmp_path / "a", corpus, "scratch", scratch={"vocabulary": 200})
    second, _ = _prepare(tmp_path / "b", corpus, "scratch", scratch={"vocabulary": 200})
    assert first == second
    assert _contents(tmp_path / "a") == _contents(tmp_path / "b")
    assert (first.tokenizer.name, first.tokenizer.vocabulary) == ("scratch", 200)
    assert (
        "already prepared" in _prepare(tmp_path / "a", corpus, "scratch", scratch={"vocabulary": 200})[1][-1]
    )
    with pytest.raises(PrepareError, match=r"scratch\.vocabulary 200 then, 300 now"):
        _prepare(tmp_path / "a", corpus, "scratch", scratch={"vocabulary": 300})


def test_bad_lines_are_listed_and_left_out(tmp_path: Path, corpus: Corpus, teacher: Path) -> None:
    """A damaged line must be found again by file and line number, and cost no other row."""
    _prepare(tmp_path / "good", corpus, teacher)
    train, dev = _copy(corpus, tmp_path)

    def damage(lines: list[bytes]) -> None:
        lines[4] = b"N5\tonly\n"
        lines[9] = lines[8]
        lines[20] = lines[20].replace(b"\t", b"\xff\t", 1)

    _edit(train / "news.tsv", damage)
    _edit(dev / "behaviors.tsv", lambda lines: lines.append(lines[-1].replace(b"N", b"X", 1)))
    manifest, messages = _prepare(tmp_path / "out", (train, dev), teacher, max_rejected_share=0.6)
    listed = [
        (entry["file"], entry["line"], entry["reason"].split(":")[0]) for entry in _rejected(tmp_path / "out")
    ]
    news = [entry for entry in listed if entry[0].endswith("news.tsv")]
    assert news == [
        ("synthetic_train/news.tsv", 5, "columns"),
        ("synthetic_train/news.tsv", 10, "duplicate id"),
        ("synthetic_train/news.tsv", 21, "encoding"),
    ]
    assert _rejected(tmp_path / "out")[1]["reason"] == "duplicate id: first at line 9"
    assert ("synthetic_dev/behaviors.tsv", 31, "duplicate id") in listed
    assert sum(manifest.rejected.values()) == len(listed)
    assert any("synthetic_train/news.tsv:5: columns: 2 found, 8 expected" in line for line in messages)
    good, left = _rows(tmp_path / "good"), _rows(tmp_path / "out")
    assert {key.split()[1] for key in good.keys() - left.keys()} == {"N5", "N10", "N21"}
    assert all(row == good[key] for key, row in left.items())


def test_too_many_bad_lines_are_an_error(tmp_path: Path, corpus: Corpus, teacher: Path) -> None:
    """A file of another kind must not become a corpus of the few lines that happen to fit."""
    out = tmp_path / "out"
    train, dev = _copy(corpus, tmp_path)
    _edit(train / "news.tsv", lambda lines: lines.extend([b"x\n"] * 3))
    message = (
        r"synthetic_train/news\.tsv: 3 of 243 lines are bad, at most 1\.0% may be: .*news\.tsv:241: columns"
    )
    with pytest.raises(PrepareError, match=message) as caught:
        _prepare(out, (train, dev), teacher)
    listed = tmp_path / "out.rejected.jsonl"
    assert str(listed) in str(caught.value)
    assert [json.loads(line)["line"] for line in listed.read_text().splitlines()] == [241, 242, 243]
    assert not out.exists()
    assert not list(tmp_path.glob(".out.*"))


def test_the_first_whole_copy_of_an_impression_counts(tmp_path: Path, corpus: Corpus, teacher: Path) -> None:
    """A damaged copy before the good line must not take its place."""
    train, dev = _copy(corpus, tmp_path)
    _edit(train / "behaviors.tsv", lambda lines: lines.insert(3, lines[3].replace(b"2019", b"20x9")))
    manifest, _ = _prepare(tmp_path / "out", (train, dev), teacher, max_rejected_share=0.1)
    assert manifest.rejected == {"date": 1}
    assert manifest.rows("train", "recommendation") + manifest.rows("validation", "recommendation") == 60


def test_a_repeated_impression_takes_no_share(tmp_path: Path, corpus: Corpus, teacher: Path) -> None:
    """Six copies of the last impression would leave nothing to validate on."""
    train, dev = _copy(corpus, tmp_path)
    _prepare(tmp_path / "whole", corpus, teacher)
    rows = _rows(tmp_path / "whole", "behaviors", "validation").values()
    last = max(rows, key=lambda row: row["time"])["impression_id"]
    line = "\t".join(_lines_by_id(train, "behaviors.tsv")[last]) + "\n"
    copies = [line.encode()] * 6
    _edit(train / "behaviors.tsv", lambda lines: lines.extend(copies))
    manifest, _ = _prepare(tmp_path / "out", (train, dev), teacher, max_rejected_share=0.1)
    assert manifest.rejected == {"duplicate id": 6}
    assert [manifest.rows(split, "recommendation") for split in SPLITS] == [54, 6, 30]


@pytest.mark.parametrize("missing", ["validation", "test"])
def test_an_empty_split_is_an_error(tmp_path: Path, corpus: Corpus, teacher: Path, missing: str) -> None:
    """An accuracy over no titles is not zero, and not one."""
    folders = (corpus[0], _copy(corpus, tmp_path)[0]) if missing == "test" else corpus
    share = 0.0001 if missing == "validation" else 0.1
    with pytest.raises(PrepareError, match=f"{missing} would be empty"):
        _prepare(tmp_path / "out", folders, teacher, validation_share=share)
    assert not (tmp_path / "out").exists()


def test_an_overlong_line_is_damage(tmp_path: Path, corpus: Corpus, teacher: Path) -> None:
    """A binary file without line ends must not be read into memory as one line."""
    train, dev = _copy(corpus, tmp_path)
    size = 3 * sources.CHUNK_BYTES
    _edit(train / "news.tsv", lambda lines: lines.insert(2, b"x" * size + b"\n"))
    _prepare(tmp_path / "out", (train, dev), teacher)
    (entry,) = _rejected(tmp_path / "out")
    assert (entry["line"], entry["text"]) == (3, "x" * 120)
    assert len(_rows(tmp_path / "out")) == 300


@pytest.mark.parametrize("kind", ["missing", "no news", "a file", "twice", "two inside", "nothing in it"])
def test_sources_that_are_none(tmp_path: Path, corpus: Corpus, teacher: Path, kind: str) -> None:
    """A mistyped source must be named before anything is written."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no zip")
    (tmp_path / "void").mkdir()
    for name in ("news.tsv", "behaviors.tsv"):
        (tmp_path / "void" / name).touch()
    folders, message = {
        "missing": ((tmp_path / "nowhere",), "nowhere: no such file or folder"),
        "no news": ((tmp_path / "empty",), r"empty: no news\.tsv of MIND in it"),
        "a file": ((tmp_path / "file",), "file: neither a folder, a zip nor a table"),
        "twice": ((corpus[0], corpus[0]), "one is given twice"),
        "nothing in it": ((tmp_path / "void",), "train would be empty: none of the 0 news lines of void"),
        "two inside": ((corpus[0].parent,), r"2 folders with a news\.tsv"),
    }[kind]
    with pytest.raises(PrepareError, match=message):
        _prepare(tmp_path / "out", folders, teacher)
    assert not (tmp_path / "out").exists()


def test_a_missing_teacher_is_one_message(tmp_path: Path, corpus: Corpus) -> None:
    """A mistyped folder must not be looked for on the network."""
    with pytest.raises(TokenizerError, match="no such folder"):
        _prepare(tmp_path / "out", corpus, tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_behaviors_may_be_missing(tmp_path: Path, corpus: Corpus, teacher: Path) -> None:
    """Topics need no clicks; their absence must be messages, not guessed."""
    train, dev = _copy(corpus, tmp_path)
    (dev / "behaviors.tsv").unlink()
    manifest, messages = _prepare(tmp_path / "out", (train, dev), teacher)
    assert set(manifest.behaviors) == {"train", "validation"}
    assert "synthetic_dev: no behaviors.tsv, so news only" in messages
    (train / "behaviors.tsv").unlink()
    manifest, messages = _prepare(tmp_path / "none", (train, dev), teacher)
    assert manifest.behaviors == {}
    assert messages[-1].startswith("next: newsbert-ray train --data")


def _zip(path: Path, folder: Path, prefix: str = "") -> Path:
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("news.tsv", "behaviors.tsv"):
            archive.write(folder / name, prefix + name)
    return path


def test_zips_give_the_same_shards(tmp_path: Path, corpus: Corpus, teacher: Path) -> None:
    """MIND comes as zips; unpacking by hand is where a wrong file gets in."""
    _prepare(tmp_path / "folders", corpus, teacher)
    train = _zip(tmp_path / "synthetic_train.zip", corpus[0])
    dev = _zip(tmp_path / "synthetic_dev.zip", corpus[1], "synthetic_dev/")
    _prepare(tmp_path / "zips", (train, dev), teacher)
    assert _contents(tmp_path / "zips") == _contents(tmp_path / "folders")
    assert "already prepared" in _prepare(tmp_path / "folders", (train, dev), teacher)[1][-1]


def test_no_other_member_of_a_zip_is_written(tmp_path: Path, corpus: Corpus, teacher: Path) -> None:
    """A zip from somewhere must not write elsewhere, nor what nobody reads."""
    path = _zip(tmp_path / "in" / "train.zip", corpus[0])
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        for name in ("../../escaped.txt", str(tmp_path / "escaped.txt"), "C:\\escaped.txt", link):
            archive.writestr(name, "/etc/passwd")
    assert _prepare(tmp_path / "in" / "out", (path, corpus[1]), teacher)[0].rows("train")
    assert [one.name for one in tmp_path.iterdir()] == ["in"]
    assert sorted(one.name for one in (tmp_path / "in").iterdir()) == ["out", "train.zip"]
    assert not list((tmp_path / "in" / "out").rglob("*escaped*"))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("bomb", "would grow from"),
        ("twice", r"2 files named news\.tsv"),
        ("cut", "damaged or encrypted zip of [0-9,]+ bytes"),
        ("flipped", "damaged or encrypted zip"),
    ],
)
def test_hostile_and_damaged_zips(
    tmp_path: Path, corpus: Corpus, teacher: Path, kind: str, message: str
) -> None:
    """A zip from somewhere must not fill the disk, or pass with a flipped byte."""
    path = _zip(tmp_path / "train.zip", corpus[0])
    if kind == "twice":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("again/news.tsv", "x")
    if kind == "bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("news.tsv", b"\0" * (65 << 20))
    content = path.read_bytes()
    if kind == "cut":
        path.write_bytes(content[: len(content) // 2])
    if kind == "flipped":
        path.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    with pytest.raises(PrepareError, match=message):
        _prepare(tmp_path / "out", (path, corpus[1]), teacher)
    assert [path.name for path in tmp_path.iterdir()] == ["train.zip"]


@pytest.mark.parametrize("when", [0, 2])
def test_a_full_disk_is_one_message(
    tmp_path: Path, corpus: Corpus, teacher: Path, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    """Half of the shards must not be left for a reader, nor a partial folder on a disk that is full."""
    write, calls = pq.write_table, iter(range(99))

    def fill(table: pa.Table, path: Path, **keywords: Any) -> None:
        if next(calls) == when:
            raise OSError(errno.ENOSPC, f"Error writing bytes to file: {os.strerror(errno.ENOSPC)}")
        write(table, path, **keywords)

    monkeypatch.setattr(pq, "write_table", fill)
    with pytest.raises(PrepareError, match=r"No space left on device.*free some room"):
        _prepare(tmp_path / "out", corpus, teacher)
    assert not list(tmp_path.iterdir())


def test_an_exception_leaves_what_was_there(
    tmp_path: Path, corpus: Corpus, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted --overwrite must not cost the shards that it was to replace."""
    out = tmp_path / "out"
    _prepare(out, corpus, teacher)
    before = _contents(out)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("newsbert_ray.data.shards.write_shard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _prepare(out, corpus, teacher, seed=9, overwrite=True)
    assert _contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_source_that_changes_meanwhile_is_noticed(
    tmp_path: Path, corpus: Corpus, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashes of one file and rows of another would make the manifest a lie."""
    train, dev = _copy(corpus, tmp_path)
    scan = mind.scan_chunk

    def scan_then_change(
        work: tuple[mind.Kind, sources.Chunk], _: None
    ) -> tuple[sources.Chunk, mind.Lines, list[str]]:
        result = scan(work)
        _edit(Path(work[1].path), lambda lines: lines.reverse())
        return result

    monkeypatch.setattr(mind, "scan_chunk", scan_then_change)
    with pytest.raises(PrepareError, match=r"synthetic_train/news\.tsv: changed while it was read"):
        _prepare(tmp_path / "out", (train, dev), teacher)


_KILLED = """
import sys, time
from newsbert_ray import ray_session
from newsbert_ray.config import PrepareSettings
from newsbert_ray.data import mind_source, prepare
run = mind_source.write_chunk
def slow(job, shared):
    summary = run(job, shared)
    print("wrote", flush=True)
    time.sleep(60)
    return summary
mind_source.write_chunk = slow
out, teacher, *sources = sys.argv[1:]
prepare.prepare(PrepareSettings(source=sources, teacher=teacher, out=out, workers=0), say=lambda line: None)
"""


def test_a_killed_run_leaves_nothing_and_is_cleared_away(
    tmp_path: Path, corpus: Corpus, teacher: Path
) -> None:
    """SIGKILL runs no clean-up: what it leaves must not look whole, nor stay for ever."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", _KILLED, str(out), str(teacher), *map(str, corpus)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "wrote\n"
        partial = [path for path in tmp_path.glob(".out.*") if path.is_dir()]
        assert len(partial) == 1
        assert not out.exists()
        assert not (partial[0] / "manifest.json").exists()
        _prepare(tmp_path / "out", corpus, teacher)
        assert partial[0].exists(), "a living run's folder was taken away"
        shutil.rmtree(out)
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while partial[0].exists() and time.monotonic() < deadline:
        _prepare(out, corpus, teacher, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(_rows(out)) == 300


def test_small_sources_need_no_ray(
    tmp_path: Path, corpus: Corpus, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray takes ten seconds to start, a few thousand titles one to prepare."""

    def start(**_: Any) -> None:
        raise ConnectError("Ray starts")

    monkeypatch.setattr(ray_session, "ray_session", start)
    _prepare(tmp_path / "here", corpus, teacher)
    _prepare(tmp_path / "default", corpus, teacher, workers=None)
    assert _contents(tmp_path / "default") == _contents(tmp_path / "here")
    monkeypatch.setattr(module, "_FEW_CHUNKS", 0)
    with pytest.raises(ConnectError, match="Ray starts"):
        _prepare(tmp_path / "large", corpus, teacher, workers=None)


@pytest.mark.ray
def test_ray_gives_the_same_bytes(tmp_path: Path, corpus: Corpus, teacher: Path) -> None:
    """A corpus that depends on who prepared it makes two machines' numbers incomparable."""
    _prepare(tmp_path / "here", corpus, teacher)
    _prepare(tmp_path / "ray", corpus, teacher, workers=2)
    assert _contents(tmp_path / "ray") == _contents(tmp_path / "here")


@pytest.mark.slow
@pytest.mark.skipif(
    not MIND.is_dir(), reason="MIND's rows are not beside this checkout (../shared/data/mind)"
)
def test_real_mind(tmp_path: Path) -> None:
    """What is true of invented files may fail on real ones: quotes, empty fields, known counts."""
    folders = (MIND / "MINDsmall_train", MIND / "MINDsmall_dev")
    manifest, _ = _prepare(tmp_path / "out", folders, "scratch", scratch={"vocabulary": 2000})
    assert manifest.rows("train") + manifest.rows("validation") == 44_688
    assert manifest.rows("test") == 6_594
    assert manifest.rejected == {}
    assert (manifest.statistics["users"], manifest.statistics["impressions"]) == (4716, 5097)
    assert [manifest.rows(split, "recommendation") for split in SPLITS] == [3703, 412, 982]
    assert manifest.statistics["unknown_clicks"] == 0
    titles = [row["title"] for row in _rows(tmp_path / "out").values()]
    assert sum('"' in title for title in titles) > 50
