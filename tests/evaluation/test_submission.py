"""MIND's prediction file: written, read back, checked against its behaviours."""

from __future__ import annotations

import math
import pickle
import random
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from newsbert_ray.evaluation import submission
from newsbert_ray.evaluation.metrics import impression_metrics, ranking_scores, tally
from newsbert_ray.evaluation.submission import (
    SubmissionError,
    check_submission,
    read_submission,
    write_submission,
)

Rows = list[tuple[str, npt.NDArray[np.int64]]]

IDS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(
    lambda text: text.isprintable() and " " not in text
)
RANKINGS = st.integers(1, 30).flatmap(lambda size: st.permutations(range(1, size + 1)))


def _rows(count: int, seed: int = 0) -> Rows:
    generator = np.random.default_rng(seed)
    return [(str(i), generator.permutation(generator.integers(1, 40)) + 1) for i in range(1, count + 1)]


def _sizes(rows: Rows) -> list[tuple[str, int]]:
    return [(impression, len(ranks)) for impression, ranks in rows]


def official_scores(path: Path, clicked: list[list[int]]) -> dict[str, float]:
    """MIND's official scores of a prediction file: the metrics of score 1/rank, all impressions labelled."""
    ranks = [ranks for _, ranks in read_submission(path)]
    offsets = np.cumsum([0, *map(len, ranks)])
    scores, labels = 1 / np.concatenate(ranks), np.concatenate(clicked)
    return ranking_scores([tally(impression_metrics(scores, labels, offsets))])


def test_the_bytes_of_a_line(tmp_path: Path) -> None:
    """MIND's script splits a line at blanks: one within the brackets and the upload fails after hours."""
    rows = [("1", np.array([2, 1])), ("2", np.array([1])), ("10", np.array([6, 2, 5, 3, 1, 4]))]
    assert write_submission(tmp_path / "prediction.txt", rows) == 3
    expected = b"1 [2,1]\n2 [1]\n10 [6,2,5,3,1,4]\n"
    assert (tmp_path / "prediction.txt").read_bytes() == expected
    assert write_submission(tmp_path / "out" / "any_name.ZIP", rows) == 3
    with zipfile.ZipFile(tmp_path / "out" / "any_name.ZIP") as archive:
        assert archive.namelist() == ["prediction.txt"]
        assert archive.read("prediction.txt") == expected
        assert archive.testzip() is None


def test_same_ranks_same_bytes(tmp_path: Path) -> None:
    """Two uploads of one model must compare equal by their hash, whatever the clock says."""
    for name in ("a.zip", "b.zip"):
        write_submission(tmp_path / name, _rows(50))
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.infolist()[0].date_time == (1980, 1, 1, 0, 0, 0)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


@pytest.mark.parametrize("suffix", ["zip", "txt"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=st.lists(st.tuples(IDS, RANKINGS), max_size=12))
def test_reads_what_it_writes(rows: list[tuple[str, list[int]]], suffix: str, tmp_path: Path) -> None:
    """A ranking that changes on its way through the file is scored as another model's."""
    path = tmp_path / f"prediction.{suffix}"
    assert write_submission(path, ((name, np.array(ranks)) for name, ranks in rows)) == len(rows)
    assert list(read_submission(path)) == rows
    assert check_submission(path, [(name, len(ranks)) for name, ranks in rows]) == len(rows)


@pytest.mark.parametrize(
    ("impression", "ranks", "message"),
    [
        ("7", [1, 3], "impression 7: rank 3 among 2 candidates; expected each of 1 to 2 once"),
        ("7", [1, 2, 2], "impression 7: rank 2 occurs twice"),
        ("7", [0, 1], "an id without blanks and at least one rank, all integers"),
        ("7", [], "at least one"),
        ("7", [1.0, 2.0], "all integers"),
        ("", [1], "an id without blanks"),
        ("a b", [1], "an id without blanks"),
        ("a\n8 [1]", [1], "an id without blanks"),
        ("\ufeff7", [1], "an id without blanks"),
    ],
)
def test_bad_ranks_are_not_written(impression: str, ranks: list[float], message: str, tmp_path: Path) -> None:
    """Half a file, or a good one replaced by half of one, is found out at the upload."""
    path = tmp_path / "prediction.zip"
    write_submission(path, _rows(3))
    before = path.read_bytes()
    with pytest.raises(SubmissionError, match=message):
        write_submission(path, [*_rows(5000), (impression, np.array(ranks))])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", ["zip", "txt"])
def test_interrupted_leaves_nothing(suffix: str, tmp_path: Path) -> None:
    """A Ctrl-C in the middle must not leave a file that looks finished."""

    def interrupted() -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
        yield from _rows(5000)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_submission(tmp_path / f"prediction.{suffix}", interrupted())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["prediction", "prediction.gz", "prediction.zip.tmp"])
def test_other_suffix(name: str, tmp_path: Path) -> None:
    """A file that no one can upload is refused before hours of ranking, not after."""

    def never() -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
        raise AssertionError("asked for ranks")
        yield

    with pytest.raises(SubmissionError, match=r"\.zip \(as MIND accepts it\) or \.txt"):
        write_submission(tmp_path / name, never())
    with pytest.raises(SubmissionError, match=r"\.zip \(as MIND accepts it\) or \.txt"):
        check_submission(tmp_path / name, [])
    with pytest.raises(SubmissionError, match="a folder"):
        write_submission(_folder(tmp_path / "x.zip"), never())
    with pytest.raises(SubmissionError, match="no such file"):
        check_submission(tmp_path / "missing.zip", [])


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1 [1,2]\n2 [1, 2]\n", r":2: '2 \[1, 2\]\\n': expected"),
        (b"1 [1,2]\r\n2 [1]\r\n", ":1: .* a line feed at the end"),
        (b"1 [1,2]\n\n2 [1]\n", ":2: "),
        (b"1 [1,2]\n2 []\n", ":2: "),
        (b"1 [1,2]\n2 [0]\n", ":2: "),
        (b"1 [1,2]\n2 [01]\n", ":2: "),
        (b"1 [1,2]\n2 [1.0]\n", ":2: "),
        (b"1 [1,2]\n2 [-1]\n", ":2: "),
        (b"1 [1,2]\n2 [1,]\n", ":2: "),
        (b"1 [1,2]\n2 [1]x\n", ":2: "),
        (b"1 [1,2]\n2  [1]\n", ":2: "),
        (b"1 [1,2]\n2 1\n", ":2: "),
        (b"1 [1,2]\n[1]\n", ":2: "),
        (b"1 [1,2]\n2 [1", ":2: "),
        (b"1 [1,2]\n2 [12345678901234567890]\n", ":2: "),
        ("1 [1,2]\n2 [\u0661]\n".encode(), ":2: "),
        (b"\xef\xbb\xbf1 [1,2]\n2 [1]\n", ":1: "),
        (b"1 [1,2]\n2\x85 [1]\n", ":2: byte 2 is not UTF-8"),
        (b"1 [1,2]\n2\x00 [1]\n", ":2: "),
    ],
)
def test_lines_of_another_form(content: bytes, message: str, tmp_path: Path) -> None:
    """What a lenient reader mends, MIND's reader refuses or reads otherwise."""
    path = tmp_path / "prediction.txt"
    path.write_bytes(content)
    with pytest.raises(SubmissionError, match=f"^{path}{message}"):
        list(read_submission(path))


def test_last_line_without_its_end(tmp_path: Path) -> None:
    """An editor that drops the last line end has lost nothing."""
    path = tmp_path / "prediction.txt"
    path.write_bytes(b"1 [1,2]\n2 [1]")
    assert check_submission(path, [("1", 2), ("2", 1)]) == 2


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ([("1", 2), ("3", 3), ("2", 1)], ":2: impression 2, but behaviors.tsv has 3"),
        ([("1", 3), ("2", 1), ("3", 3)], ":1: 2 ranks for 3 candidates of impression 1"),
        ([("1", 2), ("2", 1), ("3", 3), ("4", 2)], ": ends after 3 lines; impression 4 is missing"),
        ([("1", 2), ("2", 1)], ":3: additional impression 3; behaviors.tsv ends after 2"),
        ([], ":1: additional impression 1"),
    ],
)
@pytest.mark.parametrize("suffix", ["zip", "txt"])
def test_other_behaviors(expected: list[tuple[str, int]], message: str, suffix: str, tmp_path: Path) -> None:
    """MIND's script pads a missing line with equal ranks and says nothing: a wrong split scores near 0.5."""
    path = tmp_path / f"prediction.{suffix}"
    write_submission(path, [("1", np.array([2, 1])), ("2", np.array([1])), ("3", np.array([3, 1, 2]))])
    with pytest.raises(SubmissionError, match=f"^{path}{message}"):
        check_submission(path, expected)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ("1,1,2", "rank 1 occurs twice; expected each of 1 to 3 once"),
        ("1,2,4", "rank 4 among 3 candidates"),
        ("3,3,3", "rank 3 occurs twice"),
    ],
)
def test_ranks_that_are_none(ranks: str, message: str, tmp_path: Path) -> None:
    """Scores sent as ranks, or ranks that tie, are scored by MIND without a word."""
    path = tmp_path / "prediction.txt"
    path.write_text(f"1 [1]\n2 [{ranks}]\n")
    with pytest.raises(SubmissionError, match=f":2: {message}"):
        check_submission(path, [("1", 1), ("2", 3)])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "contains nothing"),
        (["predictions.txt"], "contains 'predictions.txt'; expected one file, prediction.txt"),
        (["out/prediction.txt"], "contains 'out/prediction.txt'"),
        (["../prediction.txt"], "expected one file"),
        (["/prediction.txt"], "expected one file"),
        (["prediction.txt/"], "expected one file"),
        (
            ["prediction.txt", "__MACOSX/prediction.txt"],
            "contains 'prediction.txt', '__MACOSX/prediction.txt'",
        ),
        (["a", "b", "c", "d"], r"contains 'a', 'b', 'c', \.\.\.;"),
    ],
)
def test_zip_of_something_else(members: list[str], message: str, tmp_path: Path) -> None:
    """MIND unpacks and looks for one name: a folder in between, or a neighbour, and nothing is found."""
    path = tmp_path / "prediction.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for member in members:
            archive.writestr(member, "1 [1]\n")
    with pytest.raises(SubmissionError, match=message):
        check_submission(path, [("1", 1)])


def test_same_name_twice(tmp_path: Path) -> None:
    """Of two members with one name, the checker could read one and MIND the other."""
    path = tmp_path / "prediction.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("prediction.txt", "1 [1]\n")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("prediction.txt", "1 [1]\n")
    with pytest.raises(SubmissionError, match="expected one file"):
        check_submission(path, [("1", 1)])


def test_name_that_is_cut_at_a_nul(tmp_path: Path) -> None:
    """Python shows `prediction.txt`, another unpacker the whole name."""
    path = tmp_path / "prediction.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("prediction.txt_x", "1 [1]\n")
    path.write_bytes(path.read_bytes().replace(b"prediction.txt_x", b"prediction.txt\0x"))
    with pytest.raises(SubmissionError, match="expected one file"):
        check_submission(path, [("1", 1)])


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compression(method: int, tmp_path: Path) -> None:
    """Not every unpacker knows these, and they can grow a million times."""
    path = tmp_path / "prediction.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("prediction.txt", "1 [1]\n")
    with pytest.raises(SubmissionError, match="expected deflate"):
        check_submission(path, [("1", 1)])


def test_bomb(tmp_path: Path) -> None:
    """A file of 30 kB must not fill the memory of who checks it."""
    path = tmp_path / "prediction.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("prediction.txt", b"1" * 30_000_000)
    with pytest.raises(SubmissionError, match="unpack to 30000000; predictions grow at most 500 times"):
        check_submission(path, [("1", 1)])


def test_endless_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bomb without a zip: a line that never ends is read to its limit only."""
    monkeypatch.setattr(submission, "LONGEST_LINE", 100)
    path = tmp_path / "prediction.txt"
    path.write_bytes(b"1 [1]\n2 [" + b"1" * 1000)
    with pytest.raises(SubmissionError, match=":2: longer than 100 bytes"):
        list(read_submission(path))


def test_most_even_predictions_are_no_bomb(tmp_path: Path) -> None:
    """A model that ties everything writes nearly the same line again and again; that is valid."""
    path = tmp_path / "prediction.zip"
    ranks = np.arange(1000, 0, -1)
    assert write_submission(path, ((str(i), ranks) for i in range(2000))) == 2000
    assert check_submission(path, ((str(i), 1000) for i in range(2000))) == 2000


def test_damaged_bytes(tmp_path: Path) -> None:
    """Whatever a broken transfer did to a zip: one clear error, or the same lines; no other exception."""
    path, rows = tmp_path / "prediction.zip", _rows(30)
    write_submission(path, rows)
    whole, chance = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(600):
        damaged = bytearray(whole)
        place = chance.choice(
            [chance.randrange(len(whole)), -1 - chance.randrange(100), chance.randrange(60)]
        )
        damaged[place] = chance.randrange(256)
        path.write_bytes(damaged[: chance.randrange(len(whole))] if chance.random() < 0.1 else damaged)
        try:
            lines = list(read_submission(path))
        except SubmissionError:
            refused += 1
        else:
            assert lines == [(name, ranks.tolist()) for name, ranks in rows]
    assert refused > 250


def test_memory_is_constant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MIND-large has 2.4 million test impressions; neither writing nor checking may hold them all."""
    monkeypatch.setattr(submission, "_BUFFER", 1 << 12)
    path = tmp_path / "prediction.zip"
    ranks = np.arange(1, 41)

    def peak(count: int) -> int:
        tracemalloc.start()
        write_submission(path, ((str(i), ranks) for i in range(count)))
        check_submission(path, ((str(i), 40) for i in range(count)))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    small, large = peak(500), peak(5000)
    assert large < 1.2 * small


def test_official_scores_by_hand(tmp_path: Path) -> None:
    """Clicks at rank 2 of 3, and at ranks 1 and 4 of 4."""
    path = tmp_path / "prediction.zip"
    rows = [("1", [2, 1, 3]), ("3", [4, 1, 2, 3]), ("4", [1, 2])]
    write_submission(path, ((name, np.array(ranks)) for name, ranks in rows))
    scores = official_scores(path, [[1, 0, 0], [1, 1, 0, 0], [0, 0]])
    assert scores["rows"] == 2
    assert scores["left_out"] == 1
    assert scores["auc"] == pytest.approx((1 / 2 + 2 / 4) / 2, abs=1e-15)
    assert scores["mrr"] == pytest.approx((1 / 2 + (1 + 1 / 4) / 2) / 2, abs=1e-15)
    second = (1 + 1 / math.log2(5)) / (1 + 1 / math.log2(3))
    assert scores["ndcg5"] == pytest.approx((1 / math.log2(3) + second) / 2, abs=1e-15)


def test_error_survives_pickling() -> None:
    """An error of a worker that cannot travel arrives as another one."""
    assert str(pickle.loads(pickle.dumps(SubmissionError("line 3")))) == "line 3"
