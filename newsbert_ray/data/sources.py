"""What all kinds of source share: files read in chunks of whole lines, bad rows, progress, and what `prepare`
asks of a kind of source. Knows no columns."""

from __future__ import annotations

import hashlib
import json
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from newsbert_ray.config import PrepareSettings
from newsbert_ray.data.shards import Hashes

CHUNK_BYTES = 2 << 20
"""Bytes read at once. A chunk ends at the last line end within them; a longer line is refused."""
REJECTED = "rejected.jsonl"
SHOWN_ROWS = 5
"""Bad rows quoted on the screen."""

_EXCERPT = 120  # characters of a bad row that are listed
_SAY_SECONDS = 5.0

Fates = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int32]
_HINTS = {"train": 0, "dev": 1, "valid": 1, "test": 2}
Say = Callable[[str], None]
MapAll = Callable[[Sequence[Any], Callable[[Any, Any], Any], Any], Iterable[Any]]
"""`function(item, shared)` for every item, in any order: in this process or as Ray tasks."""
Row = TypeVar("Row")


class Fate(IntEnum):
    """The split of a line, in the order of `shards.SPLITS`, or the reason why it is in none."""

    TRAIN = 0
    VALIDATION = 1
    TEST = 2
    MALFORMED = 3
    DUPLICATE = 4
    EARLIER = 5
    UNSEEN_TOPIC = 6


class PrepareError(ValueError):
    """Sources that cannot be prepared. The text is a whole message for the user."""


class BadLine(ValueError):
    """A line or table row that cannot be used. The text is the reason, `kind: details`.

    `number`: its line in the source, where that is not the one read.
    """

    def __init__(self, reason: str, number: int | None = None) -> None:
        super().__init__(reason, number)
        self.number = number

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, slots=True)
class Chunk:
    """Whole lines of a file: `lines` of them, from line `first_line` (from 1), in `length` bytes at `offset`.

    `checksum` is their CRC-32. `overlong`: a single line of more than CHUNK_BYTES, never read as a whole.
    """

    path: str
    file: str
    offset: int
    length: int
    first_line: int
    lines: int
    checksum: int
    overlong: bool


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that was read once. `folder` is its folder's name; `number` orders the files of a corpus."""

    folder: str
    name: str
    bytes: int
    sha256: str
    chunks: tuple[Chunk, ...]
    number: int = 0

    @property
    def label(self) -> str:
        return f"{self.folder}/{self.name}"

    @property
    def lines(self) -> int:
        return sum(chunk.lines for chunk in self.chunks)


@dataclass
class Rejected:
    """Bad rows of a file: how many of each kind, and the first few."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, file: str, line: int, reason: str, text: str) -> str:
        """Count a bad row; returns its line for rejected.jsonl."""
        self.counts[reason.partition(":")[0]] += 1
        if len(self.examples) < SHOWN_ROWS:
            self.examples.append(f"{file}:{line}: {reason}")
        return json.dumps({"file": file, "line": line, "reason": reason, "text": text[:_EXCERPT]}) + "\n"

    def merge(self, later: Rejected) -> None:
        self.counts += later.counts
        self.examples = [*self.examples, *later.examples][:SHOWN_ROWS]


@dataclass(frozen=True)
class Workspace:
    """What a kind of source works with: the `folder` to write to, where to keep the list of bad rows if the
    sources are `rejected`, whom to tell of progress, and what runs a function over chunks."""

    folder: Path
    rejected: Path
    say: Say
    map_all: MapAll

    def refuse(self, file: str, rows: int, rejected: Rejected, allowed: float, *, form: str = "") -> NoReturn:
        """Refuse a file with too many bad lines and keep their list; `form` describes a good one."""
        (self.folder / REJECTED).replace(self.rejected)
        raise PrepareError(
            f"{file}: {rejected.counts.total():,} of {rows:,} lines are bad, at most {allowed:.1%} may be: "
            f"{'; '.join(rejected.examples[:3])}. All are listed in {self.rejected}. Correct the file{form}, "
            "or allow more with --max_rejected_share"
        )


def order_sources(names: Sequence[str]) -> list[tuple[int, Fate, str]]:
    """Of each source its index, the split it is for, and all splits it gives rows to, in words.

    The first is for training, the last for test. The names decide the order if each contains one of train,
    dev, valid and test, and only one of them train; otherwise it stays as it is.
    """
    ranks = [{rank for hint, rank in _HINTS.items() if hint in name.lower()} for name in names]
    order = list(range(len(names)))
    if all(len(rank) == 1 for rank in ranks) and sum(rank == {0} for rank in ranks) == 1:
        order.sort(key=lambda i: min(ranks[i]))
    if len(names) == 1:
        return [(0, Fate.TRAIN, "train, validation and test")]
    first = "train and validation" if len(names) == 2 else "train"
    words = [first, *["validation"] * (len(names) - 2), "test"]
    roles = [Fate.TRAIN, *[Fate.VALIDATION] * (len(names) - 2), Fate.TEST]
    return list(zip(order, roles, words, strict=True))


class Shares(NamedTuple):
    """Shares of the training source that are held out for validation and test."""

    validation: float
    test: float


def shares_of(settings: PrepareSettings, *, sources: int) -> Shares:
    """The shares to hold out: 0 for a split that another source is for."""
    validation = settings.validation_share if sources < 3 else 0.0
    return Shares(validation, settings.test_share if sources == 1 else 0.0)


def draw_uniform(hashes: Hashes, *, seed: int) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each hash, a function of hash and seed alone (one SplitMix64 step)."""
    golden = 0x9E3779B97F4A7C15
    value = hashes + np.uint64((seed + 1) * golden % 2**64)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    value ^= value >> np.uint64(31)
    return (value >> np.uint64(11)).astype(np.float64) / 2.0**53


def split_by_hash(hashes: Hashes, shares: Shares, *, seed: int) -> Fates:
    """TRAIN, VALIDATION or TEST for each hash, shape as `hashes`; the shares hold on average."""
    drawn = draw_uniform(hashes, seed=seed)
    fates = np.full(len(hashes), Fate.TRAIN, dtype=np.uint8)
    fates[drawn < shares.validation + shares.test] = Fate.TEST
    fates[drawn < shares.validation] = Fate.VALIDATION
    return fates


def is_known(hashes: Hashes, known: Hashes) -> npt.NDArray[np.bool_]:
    """Whether each of `hashes` is in `known` (sorted), shape as `hashes`."""
    if not len(known):
        return np.zeros(len(hashes), dtype=np.bool_)
    positions = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    return np.equal(known[positions], hashes)


class HashIndex:
    """The row of every different hash in a table, numbered as they are added: 12 bytes each."""

    def __init__(self) -> None:
        self._hashes: Hashes = np.zeros(0, dtype=np.uint64)
        self._rows: Rows = np.zeros(0, dtype=np.int32)

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, hashes: Hashes) -> Rows:
        """The row of each of `hashes`, -1 for others; shape as `hashes`."""
        rows = np.full(len(hashes), -1, dtype=np.int32)
        known = is_known(hashes, self._hashes)
        rows[known] = self._rows[np.searchsorted(self._hashes, hashes[known])]
        return rows

    def add(self, hashes: Hashes) -> tuple[Rows, list[int]]:
        """Each hash's row, and the positions of new hashes, which get the next rows in that order."""
        different, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        rows = self.find(different)
        new = np.flatnonzero(rows < 0)
        in_order = new[np.argsort(first[new])]
        rows[in_order] = len(self) + np.arange(len(new))
        positions = np.searchsorted(self._hashes, different[new])
        self._hashes = np.insert(self._hashes, positions, different[new])
        self._rows = np.insert(self._rows, positions, rows[new])
        return rows[inverse], first[in_order].tolist()


def read_through(path: Path, *, folder: str) -> SourceFile:
    """Hash a file and cut it into chunks, in constant memory."""
    digest = hashlib.sha256()
    chunks: list[Chunk] = []
    label = f"{folder}/{path.name}"
    offset, line, rest = 0, 1, b""
    with path.open("rb") as file:
        while block := file.read(CHUNK_BYTES):
            digest.update(block)
            buffer = rest + block
            cut = buffer.rfind(b"\n") + 1
            if cut == 0 and len(buffer) > CHUNK_BYTES:
                length, rest = _skip_line(file, digest, len(buffer))
                chunks.append(Chunk(str(path), label, offset, length, line, 1, 0, True))
                offset, line = offset + length, line + 1
                continue
            rest = buffer[cut:]
            if cut:
                chunks.append(_chunk(path, label, buffer[:cut], offset, line))
                offset, line = offset + cut, line + chunks[-1].lines
    if rest:
        chunks.append(_chunk(path, label, rest, offset, line))
    size = offset + len(rest)
    return SourceFile(folder, path.name, size, digest.hexdigest(), tuple(chunks))


def changed(file: str) -> PrepareError:
    return PrepareError(f"{file}: changed while it was read; prepare again when nothing writes to it")


def parse_chunk(chunk: Chunk, parse: Callable[[str], Row]) -> Iterator[tuple[str, Row | BadLine]]:
    """Each line of `chunk` as (its text, its row or the reason why it has none); of an overlong line the
    beginning. PrepareError where the file has changed."""
    with open(chunk.path, "rb") as file:
        file.seek(chunk.offset)
        content = file.read(1024 if chunk.overlong else chunk.length)
    if chunk.overlong:
        yield content.decode(errors="replace"), BadLine(f"columns: line of more than {CHUNK_BYTES:,} bytes")
        return
    if zlib.crc32(content) != chunk.checksum:
        raise changed(chunk.file)
    yield from parse_lines(content, parse, is_start=chunk.offset == 0)


def parse_lines(
    content: bytes, parse: Callable[[str], Row], *, is_start: bool
) -> Iterator[tuple[str, Row | BadLine]]:
    """Each line of `content` as (its text, its row or the reason why it has none). Lines end by LF or CRLF,
    the last perhaps without; at a file's start a UTF-8 byte order mark is skipped."""
    content = content.removeprefix(b"\xef\xbb\xbf") if is_start else content
    for raw in content.removesuffix(b"\n").split(b"\n"):
        yield _parse_line(raw.removesuffix(b"\r"), parse)


@contextmanager
def show_progress(say: Say, verb: str, *, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with the amount of work done since its last call.

    On a terminal it draws a bar, elsewhere it says a line every few seconds: the share of `total` and the
    time left, or how many rows are done where the total is unknown.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (TextColumn(verb), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(verb, total=total)
            yield lambda amount: progress.advance(task, amount)
        return
    started = last_said = time.perf_counter()
    done = 0

    def advance(amount: int) -> None:
        nonlocal done, last_said
        done += amount
        now = time.perf_counter()
        if now - last_said < _SAY_SECONDS or done == total:
            return
        last_said = now
        if total is None:
            say(f"{verb} {done:,} rows")
        else:
            left = (now - started) * (total - done) / done
            say(f"{verb} {100 * done / total:.0f} %, about {left:.0f} s left")

    yield advance


def _chunk(path: Path, label: str, content: bytes, offset: int, line: int) -> Chunk:
    lines = content.count(b"\n") + (not content.endswith(b"\n"))
    return Chunk(str(path), label, offset, len(content), line, lines, zlib.crc32(content), False)


def _skip_line(file: BinaryIO, digest: hashlib._Hash, length: int) -> tuple[int, bytes]:
    """Read to the end of an overlong line: its length, and what was read after it."""
    while block := file.read(CHUNK_BYTES):
        digest.update(block)
        cut = block.find(b"\n") + 1
        if cut:
            return length + cut, block[cut:]
        length += len(block)
    return length, b""


def _parse_line(raw: bytes, parse: Callable[[str], Row]) -> tuple[str, Row | BadLine]:
    line = raw[: 4 * _EXCERPT].decode("utf-8", errors="replace")
    if b"\0" in raw:
        return line, BadLine(f"encoding: NUL byte at column {raw.index(0) + 1}")
    try:
        line = raw.decode("utf-8")
        return line, parse(line)
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        return line, BadLine(f"encoding: byte 0x{byte:02x} at column {error.start + 1} is not UTF-8")
    except BadLine as bad:
        return line, bad
