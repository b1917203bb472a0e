"""MIND's prediction file: written from ranks, read back, checked line by line, scored. Knows no model.

A line is `<impression id> [r1,r2,...]`: the rank, 1 the best, of each candidate in the order they are listed.
The lines stand in the order of behaviors.tsv, in `prediction.txt`, which is alone in a zip. All here streams.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from itertools import islice, pairwise
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
import numpy.typing as npt

from newsbert_ray.evaluation.metrics import FloatArray, impression_metrics, ranking_scores, tally
from newsbert_ray.files import replace_file

MEMBER = "prediction.txt"
LONGEST_LINE = 1 << 24
"""Bytes; an impression of a million candidates takes half of it."""
MOST_EXPANSION = 500
"""Times that a zip may grow: the same ranking in every line reaches 140, a bomb 1,030."""
BLOCK = 4096
"""Impressions scored at a time."""

_LINE = re.compile(r"(\S+) \[([1-9][0-9]{0,8}(?:,[1-9][0-9]{0,8})*)\]", re.ASCII)
_BUFFER = 1 << 20
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, UnicodeDecodeError)
"""What zipfile raises over altered bytes."""

Ranks = npt.NDArray[np.int64]
Truth = TypeVar("Truth")


class SubmissionError(ValueError):
    """A prediction file that cannot be written, or is not what MIND expects."""


def write_submission(path: str | Path, impressions: Iterable[tuple[str, Ranks]]) -> int:
    """Write a prediction file, whole or not at all, in constant memory.

    Args:
        path: ends in .zip (holds one `prediction.txt`) or in .txt (is one).
        impressions: id, and the rank of each candidate as listed; in the order of behaviors.tsv.
    Returns:
        Lines written.
    Raises:
        SubmissionError: another suffix, an id that is no single word, ranks that are no permutation of 1..n.
    """
    path = Path(path)
    zipped = require_suffix(path)
    if path.is_dir():
        raise SubmissionError(f"{path}: a folder; give the name of a file")
    lines = 0
    with (
        replace_file(path) as partial,
        partial.open("wb") as file,
        _zip_member(file) if zipped else nullcontext(file) as target,
    ):
        for impression, ranks in impressions:
            target.write(_format(impression, ranks))
            lines += 1
    return lines


def read_submission(path: str | Path) -> Iterator[tuple[str, Ranks]]:
    """Impression id and (n,) ranks of each line, as they stand: any positive numbers.

    Raises:
        SubmissionError: no such file, with its name and the line.
    """
    for _, impression, ranks in _read_lines(Path(path)):
        yield impression, np.array(ranks, np.int64)


def check_submission(path: str | Path, expected: Iterable[tuple[str, int]]) -> int:
    """Compare a prediction file with the behaviours it answers, line by line, in constant memory.

    Args:
        expected: id and number of candidates of each impression, in the order of behaviors.tsv.
    Returns:
        Lines checked.
    Raises:
        SubmissionError: the first fault, with file and line: another form, another impression, more or fewer
            ranks than candidates, ranks that are no permutation of 1..n, a line missing or left over.
    """
    return sum(1 for _ in _match(Path(path), ((impression, size, None) for impression, size in expected)))


def score_submission(path: str | Path, labelled: Iterable[tuple[str, list[int] | None]]) -> dict[str, float]:
    """MIND's official score of a prediction file: the metrics of score 1/rank over labelled impressions.

    Args:
        labelled: id, and 0 or 1 of each candidate, in the order of behaviors.tsv; None for an impression
            without labels, whose line must be there and is not scored.
    Returns:
        As `ranking_scores`.
    Raises:
        SubmissionError: as `check_submission`, or nothing that can be scored.
        ValueError: a label that is neither 0 nor 1.
    """
    path = Path(path)
    sizes = (
        (impression, None if clicked is None else len(clicked), clicked) for impression, clicked in labelled
    )
    scored = ((ranks, clicked) for ranks, clicked in _match(path, sizes) if clicked is not None)
    # In a list, 10 numbers for 4096 impressions.
    tallies = [_tally(block) for block in iter(lambda: list(islice(scored, BLOCK)), [])]
    try:
        return ranking_scores(tallies)
    except ValueError as error:
        raise SubmissionError(f"{path}: {error}") from error


def _tally(block: list[tuple[list[int], list[int]]]) -> FloatArray:
    ranks, clicked = (np.array([value for one in part for value in one]) for part in zip(*block, strict=True))
    offsets = np.cumsum([0, *(len(one) for one, _ in block)])
    return tally(impression_metrics(1 / ranks, clicked, offsets))


def _match(
    path: Path, expected: Iterable[tuple[str, int | None, Truth]]
) -> Iterator[tuple[list[int], Truth]]:
    """The ranks of each expected impression (id, candidates if known, truth) beside its truth."""
    number = 0
    with closing(_read_lines(path)) as lines:
        for impression, size, truth in expected:
            line = next(lines, None)
            if line is None:
                raise SubmissionError(
                    f"{path}: ends after {number} lines; impression {impression} is missing"
                )
            number, found, ranks = line
            if found != impression:
                raise SubmissionError(
                    f"{path}:{number}: impression {found[:40]}, where behaviors.tsv has {impression}"
                )
            if size is not None and len(ranks) != size:
                raise SubmissionError(
                    f"{path}:{number}: {len(ranks)} ranks of impression {impression}, {size} candidates"
                )
            _check_permutation(ranks, f"{path}:{number}")
            yield ranks, truth
        line = next(lines, None)
        if line is not None:
            raise SubmissionError(
                f"{path}:{line[0]}: impression {line[1][:40]} left over; behaviors.tsv ends after {number}"
            )


def _read_lines(path: Path) -> Generator[tuple[int, str, list[int]]]:
    """Number, impression id and ranks of each line."""
    with _open(path) as source:
        number = 0
        while line := _next_line(source, f"{path}:{number + 1}"):
            number += 1
            match = _LINE.fullmatch(line.removesuffix("\n"))
            if match is None or not match[1].isprintable():
                raise SubmissionError(
                    f"{path}:{number}: {line[:60]!r} is not of the form '<impression id> [r1,r2,...]', ranks "
                    "from 1, no blanks in the brackets, ended by LF"
                )
            yield number, match[1], [int(rank) for rank in match[2].split(",")]


def _next_line(source: IO[bytes], where: str) -> str:
    """A line with its end; empty at the end of the file."""
    try:
        line = source.readline(LONGEST_LINE + 1)
    except _DAMAGE as error:
        raise SubmissionError(f"{where}: damaged ({error}); write it again") from error
    if len(line) > LONGEST_LINE:
        raise SubmissionError(f"{where}: longer than {LONGEST_LINE} bytes; one impression a line expected")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise SubmissionError(f"{where}: byte {error.start + 1} is not UTF-8") from error


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """The lines' bytes, from a zip or as they are."""
    zipped = require_suffix(path)
    if not path.is_file():
        raise SubmissionError(f"{path}: no such file")
    if not zipped:
        with path.open("rb") as source:
            yield source
        return
    with ExitStack() as opened:
        try:
            archive = opened.enter_context(zipfile.ZipFile(path))
            member = archive.open(_only_member(path, archive))
        except _DAMAGE as error:
            raise SubmissionError(f"{path}: no zip, or a damaged one ({error}); write it again") from error
        yield opened.enter_context(io.BufferedReader(member, _BUFFER))  # type: ignore[type-var]


def _only_member(path: Path, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    members = archive.infolist()
    names = [member.orig_filename for member in members]  # not cut at a NUL, as `filename` is
    if names != [MEMBER]:
        listed = ", ".join(repr(name[:60]) for name in names[:3]) + (", ..." if len(names) > 3 else "")
        raise SubmissionError(f"{path}: holds {listed or 'nothing'}; exactly one member, {MEMBER}, expected")
    member = members[0]
    if member.flag_bits & 1:
        raise SubmissionError(f"{path}: {MEMBER} is encrypted; nobody could read it")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise SubmissionError(f"{path}: compressed by method {member.compress_type}; deflate expected")
    if member.file_size > MOST_EXPANSION * max(1, member.compress_size):
        raise SubmissionError(
            f"{path}: {member.compress_size} bytes that unpack to {member.file_size}; predictions grow at "
            f"most {MOST_EXPANSION} times"
        )
    return member


@contextmanager
def _zip_member(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """What is written goes into the only member of a zip."""
    info = zipfile.ZipInfo(MEMBER)  # of 1980, not of now: the same ranks give the same bytes
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = 0o644 << 16
    with (
        zipfile.ZipFile(file, "w") as archive,
        archive.open(info, "w", force_zip64=True) as member,
        io.BufferedWriter(member, _BUFFER) as target,
    ):
        yield target


def _format(impression: str, ranks: Ranks) -> bytes:
    values = ranks.tolist()
    line = f"{impression} [{','.join(map(str, values))}]"
    if not impression.isprintable() or _LINE.fullmatch(line) is None:
        raise SubmissionError(
            f"impression {impression[:40]!r} with ranks {line[-40:]!r}: an id without blanks, and whole "
            "ranks, at least one, expected"
        )
    _check_permutation(values, f"impression {impression}")
    return f"{line}\n".encode()


def _check_permutation(ranks: list[int], where: str) -> None:
    ordered = sorted(ranks)
    if ordered == list(range(1, len(ranks) + 1)):
        return
    twice = next((rank for rank, after in pairwise(ordered) if rank == after), None)
    fault = (
        f"rank {ordered[-1]} among {len(ranks)} candidates" if twice is None else f"rank {twice} occurs twice"
    )
    raise SubmissionError(f"{where}: {fault}; each of 1 to {len(ranks)} once expected")


def require_suffix(path: Path) -> bool:
    """Whether a prediction file is a zip, by its name.

    Raises:
        SubmissionError: neither .zip nor .txt.
    """
    suffix = path.suffix.lower()
    if suffix not in (".zip", ".txt"):
        raise SubmissionError(
            f"{path}: ends in {suffix or 'nothing'!r}; .zip (as MIND takes it) or .txt (the lines alone) "
            "expected"
        )
    return suffix == ".zip"
