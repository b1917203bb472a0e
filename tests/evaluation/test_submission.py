"""MIND's prediction file: written, read back, checked against its behaviours."""

from __future__ import annotations

import math
import re
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from newsbert_ray.evaluation.evaluate import SubmissionError, check_submission, write_submission
from newsbert_ray.evaluation.metrics import impression_metrics, ranking_scores, tally

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


def _read(path: Path) -> str:
    """The lines of a prediction file, as MIND would read them."""
    if path.suffix == ".txt":
        return path.read_text(encoding="utf-8")
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["prediction.txt"]
        return archive.read("prediction.txt").decode()


def official_scores(path: Path, clicked: list[list[int]]) -> dict[str, float]:
    """MIND's official scores of a prediction file: the metrics of score 1/rank, all impressions labelled."""
    ranks = [[int(rank) for rank in line[:-1].split("[")[1].split(",")] for line in _read(path).splitlines()]
    offsets = np.cumsum([0, *map(len, ranks)])
    scores, labels = 1 / np.concatenate(ranks), np.concatenate(clicked)
    return ranking_scores([tally(impression_metrics(scores, labels, offsets))])


def test_the_bytes_of_a_line(tmp_path: Path) -> None:
    """MIND's script splits a line at blanks: one within the brackets and the upload fails after hours."""
    rows = [("1", np.array([2, 1])), ("2", np.array([1])), ("10", np.array([6, 2, 5, 3, 1, 4]))]
    write_submission(tmp_path / "prediction.txt", rows)
    expected = b"1 [2,1]\n2 [1]\n10 [6,2,5,3,1,4]\n"
    assert (tmp_path / "prediction.txt").read_bytes() == expected
    write_submission(tmp_path / "out" / "any_name.ZIP", rows)
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
    write_submission(path, ((name, np.array(ranks)) for name, ranks in rows))
    lines = [re.fullmatch(r"(\S+) \[(.+)\]", line) for line in _read(path).split("\n")[:-1]]
    assert [(m[1], [int(rank) for rank in m[2].split(",")]) for m in lines if m] == rows
    assert check_submission(path, [(name, len(ranks)) for name, ranks in rows]) == len(rows)


def test_half_a_file_is_not_left(tmp_path: Path) -> None:
    """Half a file, or a good one replaced by half of one, is found out at the upload."""
    path = tmp_path / "prediction.zip"
    write_submission(path, _rows(3))
    before = path.read_bytes()

    def rows() -> Iterator[tuple[str, Any]]:
        yield from _rows(5000)
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_submission(path, rows())
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


@pytest.mark.parametrize("suffix", ["zip", "txt"])
@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ([("1", 2), ("3", 1)], ":2: expected impression 3 with each rank of 1 to 1 once, but it is 2"),
        ([("1", 3), ("2", 1)], ":1: expected impression 1 with each rank of 1 to 3"),
        ([("1", 2), ("2", 1), ("3", 1)], ":3: ends here; impression 3 is missing"),
        ([("1", 2)], ":2: a line too many"),
    ],
)
def test_other_behaviors(expected: list[tuple[str, int]], message: str, suffix: str, tmp_path: Path) -> None:
    """MIND's script pads a missing line with equal ranks and says nothing: a wrong split scores near 0.5."""
    path = tmp_path / f"prediction.{suffix}"
    write_submission(path, [("1", np.array([2, 1])), ("2", np.array([1]))])
    with pytest.raises(SubmissionError, match=message):
        check_submission(path, expected)


@pytest.mark.parametrize("ranks", ["1,1", "0,1", "1,3"])
def test_ranks_that_are_none(ranks: str, tmp_path: Path) -> None:
    """Scores sent as ranks, or ranks that tie, are scored by MIND without a word."""
    path = tmp_path / "prediction.txt"
    path.write_text(f"7 [{ranks}]\n")
    with pytest.raises(SubmissionError, match="each rank of 1 to 2 once"):
        check_submission(path, [("7", 2)])


def test_memory_is_constant(tmp_path: Path) -> None:
    """MIND-large has 2.4 million test impressions; neither writing nor checking may hold them all."""
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
