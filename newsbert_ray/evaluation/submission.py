"""MIND's prediction file: written from ranks, read, checked line by line. Knows no model.

A line is `<impression id> [r1,r2,...]`: the rank of each candidate in the order of behaviors.tsv, 1 the best.
The lines are in the order of behaviors.tsv, in `prediction.txt`, the only file of a zip. Everything here
works line by line in constant memory.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from newsbert_ray.files import replace_file

MEMBER = "prediction.txt"
LONGEST_LINE = 1 << 24
"""Bytes; an impression of a million candidates needs half of it."""
MOST_EXPANSION = 500
"""Largest ratio of unpacked to packed bytes: equal rankings in every line reach 140, a zip bomb 1,030."""

_LINE = re.compile(r"(\S+) \[([1-9][0-9]{0,8}(?:,[1-9][0-9]{0,8})*)\]", re.ASCII)
_BUFFER = 1 << 20
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, UnicodeDecodeError)
"""Errors of zipfile for damaged files."""

Ranks = npt.NDArray[np.int64]


class SubmissionError(ValueError):
    """A prediction file that cannot be written, or that MIND would not accept."""


def write_submission(path: str | Path, impressions: Iterable[tuple[str, Ranks]]) -> int:
    """Write a complete prediction file or, on an error, none.

    Args:
        path: ends in .zip (contains `prediction.txt`) or .txt (the lines themselves).
        impressions: id and the rank of each candidate, in the order of behaviors.tsv.
    Returns:
        Lines written.
    Raises:
        SubmissionError: another suffix, an id with blanks, or ranks that are not a permutation of 1..n.
    """
    path = Path(path)
    zipped = require_suffix(path)
    if path.is_dir():
        raise SubmissionError(f"{path}: is a folder; give the name of a file")
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


def read_submission(path: str | Path) -> Generator[tuple[str, list[int]]]:
    """Impression id and ranks of each line; the ranks may be any positive numbers.

    Raises:
        SubmissionError: not a prediction file; the message names file and line.
    """
    path = Path(path)
    with _open(path) as source:
        number = 0
        while line := _next_line(source, f"{path}:{number + 1}"):
            number += 1
            match = _LINE.fullmatch(line.removesuffix("\n"))
            if match is None or not match[1].isprintable():
                raise SubmissionError(
                    f"{path}:{number}: {line[:60]!r}: expected '<impression id> [r1,r2,...]' with ranks from "
                    "1, no blanks in the brackets, and a line feed at the end"
                )
            yield match[1], [int(rank) for rank in match[2].split(",")]


def check_submission(path: str | Path, expected: Iterable[tuple[str, int]]) -> int:
    """Compare a prediction file with its behaviours, line by line.

    Args:
        expected: id and number of candidates of each impression, in the order of behaviors.tsv.
    Returns:
        Lines checked.
    Raises:
        SubmissionError: the first error, with file and line: a malformed line, another impression, a wrong
            number of ranks, ranks that are not a permutation of 1..n, a missing or an additional line.
    """
    number = 0
    with closing(read_submission(path)) as lines:
        for number, (impression, size) in enumerate(expected, 1):
            line = next(lines, None)
            if line is None:
                raise SubmissionError(
                    f"{path}: ends after {number - 1} lines; impression {impression} is missing"
                )
            name, ranks = line
            if name != impression:
                raise SubmissionError(
                    f"{path}:{number}: impression {name[:40]}, but behaviors.tsv has {impression}"
                )
            if len(ranks) != size:
                raise SubmissionError(
                    f"{path}:{number}: {len(ranks)} ranks for {size} candidates of impression {impression}"
                )
            _check_permutation(ranks, f"{path}:{number}")
        line = next(lines, None)
        if line is not None:
            raise SubmissionError(
                f"{path}:{number + 1}: additional impression {line[0][:40]}; behaviors.tsv ends after "
                f"{number}"
            )
    return number


def _next_line(source: IO[bytes], where: str) -> str:
    """A line with its line feed; empty at the end of the file."""
    try:
        line = source.readline(LONGEST_LINE + 1)
    except _DAMAGE as error:
        raise SubmissionError(f"{where}: damaged ({error}); write it again") from error
    if len(line) > LONGEST_LINE:
        raise SubmissionError(f"{where}: longer than {LONGEST_LINE} bytes; expected one impression per line")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise SubmissionError(f"{where}: byte {error.start + 1} is not UTF-8") from error


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """The lines as bytes, unpacked if the file is a zip."""
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
            raise SubmissionError(f"{path}: not a zip, or damaged ({error}); write it again") from error
        yield opened.enter_context(io.BufferedReader(member, _BUFFER))  # type: ignore[type-var]


def _only_member(path: Path, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    members = archive.infolist()
    names = [member.orig_filename for member in members]  # `filename` is cut at a NUL
    if names != [MEMBER]:
        listed = ", ".join(repr(name[:60]) for name in names[:3]) + (", ..." if len(names) > 3 else "")
        raise SubmissionError(f"{path}: contains {listed or 'nothing'}; expected one file, {MEMBER}")
    member = members[0]
    if member.flag_bits & 1:
        raise SubmissionError(f"{path}: {MEMBER} is encrypted; write it without a password")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise SubmissionError(f"{path}: compression method {member.compress_type}; expected deflate")
    if member.file_size > MOST_EXPANSION * max(1, member.compress_size):
        raise SubmissionError(
            f"{path}: {member.compress_size} bytes unpack to {member.file_size}; predictions grow at most "
            f"{MOST_EXPANSION} times"
        )
    return member


@contextmanager
def _zip_member(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """A file object that writes the only member of a zip."""
    info = zipfile.ZipInfo(MEMBER)  # dated 1980, so that the same ranks give the same bytes
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
            f"impression {impression[:40]!r} with ranks {line[-40:]!r}: expected an id without blanks and at "
            "least one rank, all integers"
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
    raise SubmissionError(f"{where}: {fault}; expected each of 1 to {len(ranks)} once")


def require_suffix(path: Path) -> bool:
    """Whether a prediction file is a zip, according to its name.

    Raises:
        SubmissionError: neither .zip nor .txt.
    """
    suffix = path.suffix.lower()
    if suffix not in (".zip", ".txt"):
        raise SubmissionError(
            f"{path}: ends in {suffix or 'nothing'!r}; expected .zip (as MIND accepts it) or .txt (the lines "
            "only)"
        )
    return suffix == ".zip"
