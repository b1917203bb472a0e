"""MIND's two files: finding them in a folder or zip, and parsing their lines. Knows no tokeniser.

news.tsv has 8 columns, behaviors.tsv 5, separated by tabs, without header; a quote is an ordinary character.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable
from datetime import datetime
from functools import partial
from itertools import chain, compress
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from newsbert_ray.data import sources
from newsbert_ray.data.shards import Hashes, hash_ids
from newsbert_ray.data.sources import BadLine, Chunk, Fate, Fates, PrepareError, Shares

Codes = npt.NDArray[np.uint16]
Minutes = npt.NDArray[np.int64]
Kind = Literal["news", "behaviors", "texts"]
"""MIND's two files, and lines of JSON that `labelled` wrote."""

NEWS = "news.tsv"
BEHAVIORS = "behaviors.tsv"
NEWS_COLUMNS = 8
BEHAVIORS_COLUMNS = 5
LONGEST_NAME = 200
"""Characters of an id or a category; a longer one is refused."""

_DATE = re.compile(r"([0-9]{1,2})/([0-9]{1,2})/([0-9]{4}) ([0-9]{1,2}):([0-9]{2}):([0-9]{2}) ([AP])M")
_LABELS = {"-0", "-1"}
_LARGEST_RATIO = 200
_SMALL_BYTES = 64 << 20
"""A member of a zip up to this size may have any compression ratio."""


RARE = 20
"""Topics with fewer news than this in the training source, or with none left to train on, are not split."""
NO_CODE, NO_TOPIC = np.uint16(0xFFFF), np.uint16(0xFFFE)
"""Topic codes of a malformed line, and of a text without label."""
KEPT = (Fate.TRAIN, Fate.VALIDATION, Fate.TEST, Fate.UNSEEN_TOPIC)
"""Fates of the news that are kept, in the order of the table of texts. News of an unseen topic are no test of
topics, but users read them and impressions offer them."""


class News(NamedTuple):
    """The columns of news.tsv that are used; abstract, URL and entities are not."""

    news_id: str
    category: str
    subcategory: str
    title: str


class Impression(NamedTuple):
    """A line of behaviors.tsv. `clicked` is 0 or 1 for each candidate, None where the file has no labels."""

    impression_id: str
    user_id: str
    time: datetime
    history: list[str]
    candidates: list[str]
    clicked: list[int] | None


class Lines(NamedTuple):
    """Of each line: hash of the id, code of the topic (NO_CODE: malformed), minute of an impression."""

    hashes: Hashes
    codes: Codes
    minutes: Minutes

    @staticmethod
    def unread(count: int, kind: Kind) -> Lines:
        minutes = np.zeros(count if kind == "behaviors" else 0, dtype=np.int64)
        return Lines(np.zeros(count, dtype=np.uint64), np.full(count, NO_CODE, dtype=np.uint16), minutes)


def is_mind(source: str) -> bool:
    """Whether a source is a zip, or a folder that holds news.tsv, itself or in a subfolder."""
    path = Path(source).expanduser()
    if path.is_dir():
        return any(path.glob(NEWS)) or any(path.glob(f"*/{NEWS}"))
    if path.suffix.lower() == ".zip" or not path.is_file():
        return path.suffix.lower() == ".zip"
    with path.open("rb") as file:
        return file.read(4) == b"PK\3\4"


def find_files(source: str, *, unpacked: Path) -> tuple[str, dict[Kind, Path]]:
    """The name of one `--source`, and its files, of which behaviors.tsv may be missing; those of a zip are
    written to the folder `unpacked`. A folder holds news.tsv itself or in its only such subfolder.
    PrepareError for a missing path, or a zip that has no news.tsv or is damaged."""
    path = Path(source).expanduser()
    folder, name = path.resolve(), path.stem
    if not path.exists():
        raise PrepareError(f"source {source}: no such zip; give MIND's zip or folder")
    if not path.is_dir():
        _unpack(path, unpacked)
        folder = unpacked
    elif (folder / NEWS).is_file():
        name = folder.name
    else:
        inner = sorted(file.parent for file in folder.glob(f"*/{NEWS}"))
        if len(inner) > 1:
            names = ", ".join(one.name for one in inner)
            raise PrepareError(
                f"source {source}: {len(inner)} folders with a {NEWS} in it ({names}); give each as a "
                "--source"
            )
        folder, name = inner[0], inner[0].name
    files: dict[Kind, Path] = {"news": folder / NEWS, "behaviors": folder / BEHAVIORS}
    return name, {kind: file for kind, file in files.items() if file.is_file()}


def parse_news(line: str) -> News:
    """One line of news.tsv, without its line end; BadLine where it has another number of columns, or an id,
    category or title is missing or malformed."""
    news_id, category, subcategory, title = _split(line, NEWS_COLUMNS)[:4]
    _require_id("news id", news_id)
    if not category.isalnum() and (
        not category.isprintable() or category != category.strip() or not category
    ):
        raise BadLine(f"label: category {category[:40]!r} is empty or has outer blanks or control characters")
    if len(category) > LONGEST_NAME:
        raise BadLine(f"label: category is {len(category)} characters long, at most {LONGEST_NAME} expected")
    if not title or title.isspace():
        raise BadLine("title: empty")
    return News(news_id, category, subcategory, title)


def parse_text(line: str) -> News:
    """One line of JSON: id, label ("" for none) and text; or a bad row's number and reason, as BadLine."""
    row = json.loads(line)
    if isinstance(row[0], int):
        raise BadLine(row[1], row[0])
    return News(row[0], row[1], "", row[2])


def parse_behaviors(line: str, *, whole: bool = True) -> Impression:
    """One line of behaviors.tsv, without its line end; BadLine where a column is missing or malformed, there
    are no candidates, or only some are labelled. Not `whole`, it skips history and candidates, for speed."""
    impression_id, user_id, time, history, candidates = _split(line, BEHAVIORS_COLUMNS)
    _require_id("impression id", impression_id)
    _require_id("user id", user_id)
    when = parse_time(time)
    if not whole:
        return Impression(impression_id, user_id, when, [], [], None)
    return Impression(impression_id, user_id, when, history.split(), *_parse_candidates(candidates.split()))


NEWS_PARSERS: dict[Kind, Callable[[str], News]] = {"news": parse_news, "texts": parse_text}


def scan_chunk(work: tuple[Kind, Chunk], shared: None = None) -> tuple[Chunk, Lines, list[str]]:
    """Ids and topics of a chunk of news.tsv; ids and times of one of behaviors.tsv.

    The codes of the lines index the list of topics.
    """
    kind, chunk = work
    lines, topics = Lines.unread(chunk.lines, kind), dict[str, int]()
    ids = [""] * chunk.lines
    times: dict[int, datetime] = {}
    parse: Callable[[str], News | Impression] = NEWS_PARSERS.get(kind, partial(parse_behaviors, whole=False))
    for position, (_, row) in enumerate(sources.parse_chunk(chunk, parse)):
        if isinstance(row, BadLine):
            continue
        ids[position] = row[0]
        if isinstance(row, News):
            code = topics.setdefault(row.category, len(topics)) if row.category else NO_TOPIC
            lines.codes[position] = min(code, NO_TOPIC)
        else:
            times[position] = row.time
    lines.hashes[:] = hash_ids(ids)
    if times:
        lines.codes[list(times)] = 0
        lines.minutes[list(times)] = np.array(list(times.values()), "datetime64[m]").astype(np.int64)
    return chunk, lines, list(topics)


def parse_impressions(
    chunk: Chunk, known: sources.HashIndex, *, complete: bool
) -> tuple[list[tuple[str, Impression | BadLine]], dict[str, int]]:
    """Rows of a chunk of behaviors.tsv, and the row in the table of texts of each known news in them.

    If they must be `complete`, an impression with an unknown candidate is refused: training cannot use it.
    """
    lines = list(sources.parse_chunk(chunk, parse_behaviors))
    impressions = [row for _, row in lines if isinstance(row, Impression)]
    named = list(set(chain.from_iterable((*row.history, *row.candidates) for row in impressions)))
    rows = known.find(hash_ids(named)).tolist()
    row_of = {name: row for name, row in zip(named, rows, strict=True) if row >= 0}
    for position, (text, row) in enumerate(lines if complete and len(row_of) < len(named) else []):
        if isinstance(row, Impression):
            unknown = next((name for name in row.candidates if name not in row_of), None)
            if unknown is not None:
                reason = f"unknown id: candidate {unknown[:40]!r} is not in the news of the sources"
                lines[position] = (text, BadLine(reason))
    return lines, row_of


def split_news(
    hashes: Hashes,
    topics: Codes,
    *,
    role: Fate,
    earlier: Hashes,
    trained: Codes | None,
    seed: int,
    shares: Shares,
) -> tuple[Fates, npt.NDArray[np.int64]]:
    """The fate of every line of one news file, and its original as `find_originals`.

    Args:
        hashes: shape (lines,); hash of the news id.
        topics: shape (lines,); code of the category; NO_CODE: malformed line, NO_TOPIC: no category.
        role: split that the file is for.
        earlier: sorted hashes of the news of earlier files, which are not repeated.
        trained: codes of the training topics; None for the training file itself.
        shares: held out of the training file by hash.
    """
    well_formed = topics != NO_CODE
    originals = find_originals(hashes, well_formed)
    if role is Fate.TRAIN:
        fates = sources.split_by_hash(hashes, shares, seed=seed)
    else:
        fates = np.full(len(hashes), role, dtype=np.uint8)
    fates[~well_formed] = Fate.MALFORMED
    fates[originals > 0] = Fate.DUPLICATE
    kept = fates <= Fate.TEST
    fates[kept & sources.is_known(hashes, earlier)] = Fate.EARLIER
    kept = fates <= Fate.TEST
    if trained is None:
        counts = np.bincount(topics[kept], minlength=int(NO_CODE) + 1)
        trains = np.bincount(topics[fates == Fate.TRAIN], minlength=int(NO_CODE) + 1)
        fates[kept & ((counts < RARE) | (trains == 0))[topics]] = Fate.TRAIN
    else:
        fates[kept & ~np.isin(topics, trained)] = Fate.UNSEEN_TOPIC
    # Texts without labels train; those of later files belong to no split.
    fates[kept & (topics == NO_TOPIC)] = Fate.TRAIN if role is Fate.TRAIN else Fate.UNSEEN_TOPIC
    return fates, originals


def find_originals(hashes: Hashes, well_formed: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """For each repeated well-formed line the number (from 1) of the first with the same id; 0 for others."""
    lines, originals = np.flatnonzero(well_formed), np.zeros(len(hashes), np.int64)
    _, first, inverse = np.unique(hashes[lines], return_index=True, return_inverse=True)
    repeated = first[inverse] != np.arange(len(lines))
    originals[lines[repeated]] = lines[first[inverse]][repeated] + 1
    return originals


def split_by_time(minutes: Minutes, hashes: Hashes, counted: npt.NDArray[np.bool_], shares: Shares) -> Fates:
    """TRAIN, VALIDATION or TEST for each impression: the latest are test, those before them validation.

    The shares are rounded to whole impressions. Within the minute of a cut, larger hashes count as later.

    Args:
        minutes: shape (lines,); minutes since 1970.
        hashes: shape (lines,); hash of the impression id.
        counted: shape (lines,); whether a line counts in the shares. Others are TRAIN.
    """
    fates = np.full(len(minutes), Fate.TRAIN, dtype=np.uint8)
    lines = np.flatnonzero(counted)
    in_order = lines[np.lexsort((hashes[lines], minutes[lines]))]
    test = round(len(lines) * shares.test)
    first = len(lines) - test - round(len(lines) * shares.validation)
    fates[in_order[max(0, first) :]] = Fate.VALIDATION
    fates[in_order[len(lines) - test :]] = Fate.TEST
    return fates


def count_examples(impression: Impression) -> int:
    """Clicks to learn from: all if there is a negative (a candidate nowhere listed as clicked), else none."""
    if impression.clicked is None:
        return 0
    clicked = set(compress(impression.candidates, impression.clicked))
    return sum(impression.clicked) if len(clicked) < len(set(impression.candidates)) else 0


def parse_time(text: str) -> datetime:
    """MIND's date, `11/15/2019 8:55:22 AM` (%m/%d/%Y %I:%M:%S %p); BadLine where it is none."""
    match = _DATE.fullmatch(text)
    if match is None:
        raise BadLine(f"date: {text[:40]!r} is not of the form 11/15/2019 8:55:22 AM")
    month, day, year, hour, minute, second = map(int, match.groups()[:6])
    if not 1 <= hour <= 12:
        raise BadLine(f"date: {text!r} has hour {hour}, 1 to 12 expected")
    try:
        return datetime(year, month, day, hour % 12 + 12 * (match[7] == "P"), minute, second)
    except ValueError as error:
        raise BadLine(f"date: {text!r}, {error}") from error


def _parse_candidates(tokens: list[str]) -> tuple[list[str], list[int] | None]:
    if not tokens:
        raise BadLine("candidates: none")
    endings = [token[-2:] for token in tokens]
    different = set(endings)
    if different <= _LABELS:
        return [token[:-2] for token in tokens], [1 if ending == "-1" else 0 for ending in endings]
    if different.isdisjoint(_LABELS):
        return tokens, None
    unlabelled = next(token for token, ending in zip(tokens, endings, strict=True) if ending not in _LABELS)
    raise BadLine(f"candidates: {unlabelled[:40]!r} has no label -0 or -1, others of the line do")


def _split(line: str, expected: int) -> list[str]:
    columns = line.split("\t")
    if len(columns) != expected:
        raise BadLine(f"columns: {len(columns) if line else 0} found, {expected} expected")
    return columns


def _require_id(name: str, value: str) -> None:
    if value.isalnum() and len(value) <= LONGEST_NAME:
        return
    if not value:
        raise BadLine(f"id: {name} is empty")
    if len(value) > LONGEST_NAME or not value.isprintable() or value.split() != [value]:
        raise BadLine(f"id: {name} {value[:40]!r} has blanks or control characters, or is too long")


def _unpack(path: Path, unpacked: Path) -> None:
    """Write the zip's news.tsv and behaviors.tsv, and nothing else, under these names."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name: _only_member(path, archive, name) for name in (NEWS, BEHAVIORS)}
            if members[NEWS] is None:
                raise PrepareError(f"source {path}: no {NEWS} in this zip; give one of MIND's own zips")
            unpacked.mkdir(parents=True)
            for name, member in members.items():
                if member is not None:
                    with archive.open(member) as packed, (unpacked / name).open("wb") as file:
                        shutil.copyfileobj(packed, file, sources.CHUNK_BYTES)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise PrepareError(
            f"source {path}: damaged or encrypted zip of {path.stat().st_size:,} bytes ({error}); download "
            "it again"
        ) from error


def _only_member(path: Path, archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo | None:
    """The member of this name, None where there is none; its folders do not matter."""
    members = [
        member
        for member in archive.infolist()
        if PurePosixPath(member.filename).name == name and "__MACOSX" not in member.filename
    ]
    if len(members) > 1:
        raise PrepareError(
            f"source {path}: {len(members)} files named {name} in this zip; unpack it and give the folders"
        )
    for member in members:
        if member.file_size > max(_SMALL_BYTES, _LARGEST_RATIO * member.compress_size):
            raise PrepareError(
                f"source {path}: member {member.filename!r} would grow from {member.compress_size:,} bytes "
                f"to {member.file_size:,}; unpack it yourself if you trust it, and give the folder"
            )
    return members[0] if members else None
