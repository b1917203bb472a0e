"""Prepared shards, their manifest and the table of texts: their form, reading with checks, and writing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from newsbert_ray.files import require_intact, sha256_of
from newsbert_ray.methods import TASKS, TaskName
from newsbert_ray.record import Sealed, first_fault

MANIFEST = "manifest.json"
FORMAT = 2
"""Version of the layout; a reader refuses another."""

_NEEDS = {
    "topics": "sources with a news.tsv",
    "recommendation": "sources with a behaviors.tsv",
    "retrieval": "tables of query, text and clicked as sources",
}
_AGAIN = "prepare again with --overwrite"

Hashes = npt.NDArray[np.uint64]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

NEWS_SCHEMA = pa.schema(
    [
        ("news_id", pa.string()),
        ("title", pa.string()),
        ("category", pa.string()),
        ("subcategory", pa.string()),
        ("label", pa.int32()),
        ("tokens", pa.list_(pa.int32())),
    ]
)
"""A row of a news shard: `label` indexes the manifest's `labels`, `tokens` are ids with [CLS] and [SEP],
unpadded."""

BEHAVIORS_SCHEMA = pa.schema(
    [
        ("impression_id", pa.string()),
        ("user_id", pa.string()),
        ("time", pa.timestamp("ms")),
        ("history", pa.list_(pa.int32())),
        ("candidates", pa.list_(pa.int32())),
        ("clicked", pa.list_(pa.int8())),
    ]
)
"""A row of a behaviours shard: news are rows of the table of texts, in the order of the file, -1 a candidate
without a title (never in training); `clicked` is null for an impression without labels."""

PAIRS_SCHEMA = pa.schema([("query", pa.int32()), ("text", pa.int32()), ("clicked", pa.int8())])
"""A row of a retrieval shard: query and news text are rows of the table of texts, `clicked` is 0 or 1."""


def hash_ids(ids: Sequence[str]) -> Hashes:
    """64-bit BLAKE2b hashes of `ids`, shape (len(ids),); equal on every machine and in every version."""
    joined = b"".join([blake2b(text.encode(), digest_size=8).digest() for text in ids])
    return np.frombuffer(joined, dtype="<u8").astype(np.uint64, copy=False)


class ShardError(ValueError):
    """Shards that are missing, damaged or of another format. The text names the file and the cure."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Part(_Part):
    """One file."""

    file: str
    bytes: int
    sha256: str


class Shard(Part):
    """One Parquet file. `examples` counts what training learns from: titles, clicks that have a negative, or
    pairs."""

    rows: int
    examples: int


class Texts(_Part):
    """The table of texts. `tokens`: all ids one after another (little-endian int32, .npy). `offsets`: where
    each text begins, and the end of the last (rows + 1 int64, .npy)."""

    rows: int
    tokens: Part
    offsets: Part


class Source(_Part):
    """One source file: its name (no absolute path), size and SHA-256."""

    folder: str
    file: str
    bytes: int
    sha256: str
    rows: int
    rejected: int


class Tokenizer(_Part):
    """The tokeniser that made the ids; `sha256` is over its serialised form."""

    name: str
    sha256: str
    vocabulary: int
    pad_id: int


class Contents(BaseModel):
    """What a corpus has written.

    `splits` maps train, validation and test to their news shards, in order. So do `behaviors` and `pairs`,
    without the splits that have none. `others` are news of no split (label -1), which behaviours may name.
    `texts` is the table of texts: the rows of the news shards of train, validation, test and of `others`, in
    that order; or the queries and texts of the pairs.
    """

    texts: Texts
    statistics: dict[str, float]
    labels: list[str] = []
    splits: dict[Split, list[Shard]] = {}
    others: list[Shard] = []
    behaviors: dict[Split, list[Shard]] = {}
    pairs: dict[Split, list[Shard]] = {}


class Manifest(Sealed, Contents):
    """What a folder of shards holds and what it was made from.

    `fingerprint` is a SHA-256 over sources, tokeniser and the settings that alter a row. `tokenizer_files`
    has the SHA-256 of each file of the folder tokenizer/.
    """

    format: int
    fingerprint: str
    settings: dict[str, Any]
    sources: list[Source]
    tokenizer: Tokenizer
    rejected: dict[str, int]
    tokenizer_files: dict[str, str] = Field(default_factory=dict)

    @property
    def news(self) -> list[tuple[Shard, int]]:
        """Every news shard, in the order of the table of texts, and its first row there."""
        shards = [*(shard for split in SPLITS for shard in self.splits.get(split, [])), *self.others]
        ends = itertools.accumulate(shard.rows for shard in shards)
        return [(shard, end - shard.rows) for shard, end in zip(shards, ends, strict=True)]

    def parts(self) -> Iterator[Part]:
        for splits in (self.splits, self.behaviors, self.pairs):
            yield from itertools.chain.from_iterable(splits.values())
        yield from self.others
        yield from (self.texts.tokens, self.texts.offsets)

    def rows(self, split: Split, task: TaskName = "topics") -> int:
        """News, impressions or pairs in `split`."""
        return sum(shard.rows for shard in self.shards(split, task))

    def examples(self, split: Split, task: TaskName = "topics") -> int:
        return sum(shard.examples for shard in self.shards(split, task))

    def shards(self, split: Split, task: TaskName) -> list[Shard]:
        """The shards of a task's split, none where it has none."""
        of_task = {"topics": self.splits, "recommendation": self.behaviors, "retrieval": self.pairs}
        return of_task[task].get(split, [])

    def require(self, split: Split, task: TaskName, *, folder: str | Path) -> list[Shard]:
        """The shards of a task's split; ShardError where the folder has none."""
        shards = self.shards(split, task)
        if sum(shard.rows for shard in shards):
            return shards
        available = [name for name in TASKS if any(self.rows(one, name) for one in SPLITS)]
        if task not in available:
            raise ShardError(
                f"{folder}: prepared for {' and '.join(available)}, not for {task}; give {_NEEDS[task]}, "
                "then prepare with another --out"
            )
        raise ShardError(
            f"{folder}: no {TASKS[task].rows} in its {split} split; prepare sources that have some"
        )


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of the shards in `folder`; ShardError where it is missing, damaged or another format."""
    path = Path(folder) / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.parent.name == MANIFEST:
            at = path.parent
            raise ShardError(f"{at}: a file of prepared shards; give its folder, {at.parent}") from error
        is_source = path.parent.is_file() or (path.parent.is_dir() and any(path.parent.iterdir()))
        source, out = (path.parent, "SHARDS") if is_source else ("SOURCE", path.parent)
        raise ShardError(
            f"{path}: no prepared shards there; make them with: newsbert-ray prepare --source {source} "
            f"--teacher NAME_OR_DIR --out {out}"
        ) from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise ShardError(f"{path}: damaged manifest ({first_fault(error)}); {_AGAIN}") from error
    if manifest.format != FORMAT:
        raise ShardError(f"{path}: format {manifest.format}, this version reads {FORMAT}; {_AGAIN}")
    news = sum(shard.rows for shard, _ in manifest.news)
    if news and news != manifest.texts.rows:  # each row would be another title's tokens
        raise ShardError(
            f"{path}: shards of {news:,} news, but {manifest.texts.rows:,} tokenised texts; {_AGAIN}"
        )
    hashes = manifest.tokenizer_files
    require_intact(path.with_name("tokenizer"), hashes, lambda text: ShardError(f"{text}; {_AGAIN}"))
    return manifest


def require_tokenizer(other: Manifest, manifest: Manifest, *, folder: str) -> None:
    """Refuse, by a ShardError, shards for `unlabelled` of another tokeniser: their ids are other words."""
    if other.tokenizer.sha256 != manifest.tokenizer.sha256:
        raise ShardError(
            f"unlabelled {folder}: tokenised by '{other.tokenizer.name}', the shards by "
            f"'{manifest.tokenizer.name}'; prepare them with the same teacher"
        )


def write_shard(folder: Path, name: str, table: pa.Table, *, examples: int | None = None) -> Shard:
    """Write `table` as the Parquet file `name` and describe it; `examples` is its number of rows if None."""
    pq.write_table(table, folder / name, compression="zstd")
    examples = len(table) if examples is None else examples
    return Shard(**dict(_describe(folder / name)), rows=len(table), examples=examples)


def read_shard(folder: str | Path, shard: Shard, columns: list[str] | None = None) -> pa.Table:
    """The rows of one shard, after its hash is checked against the manifest; ShardError where it is missing,
    cut short or altered."""
    with pq.ParquetFile(_require_whole(Path(folder), shard)) as file:
        return file.read(columns)


TOKENS = "texts-tokens.npy"
OFFSETS = "texts-offsets.npy"
_BLOCK = 1 << 22
"""Tokens that `TextTable.words` has in memory at once."""

Ints = npt.NDArray[np.int64]


def offsets_of(lengths: npt.NDArray[np.integer]) -> Ints:
    """Where each of lists of these lengths begins, and the end of the last."""
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))


def gather(offsets: Ints, rows: npt.NDArray[np.integer]) -> tuple[Ints, Ints]:
    """Positions of the values of the lists at `rows`, one after another, and their new offsets."""
    lengths = offsets[rows + 1] - offsets[rows]
    new = offsets_of(lengths)
    return np.repeat(offsets[rows] - new[:-1], lengths) + np.arange(new[-1]), new


def pad(
    values: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer], *, fill: int = 0
) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Lists of these lengths (B,), one after another in `values`, as an array (B, L) padded with `fill`, and
    (B, L) whether a value is real."""
    mask = np.arange(int(lengths.max(initial=1)))[None, :] < lengths[:, None]
    padded = np.full(mask.shape, fill, np.int64)
    padded[mask] = values
    return padded, mask


@dataclass(frozen=True, eq=False)
class TextTable:
    """Token ids of many texts: ids flat, text i at offsets[i]:offsets[i + 1]. Hashed by identity."""

    tokens: npt.NDArray[np.int32]
    offsets: Ints

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self, rows: npt.NDArray[np.integer]) -> Ints:
        """Tokens of each of `rows`, shape as `rows`."""
        lengths: Ints = self.offsets[rows + 1] - self.offsets[rows]
        return lengths

    def split(self, rows: npt.NDArray[np.integer]) -> list[npt.NDArray[np.int32]]:
        tokens = np.asarray(self.tokens)
        ends = zip(self.offsets[rows].tolist(), self.offsets[rows + 1].tolist(), strict=True)
        return [tokens[start:end] for start, end in ends]

    def words(self, pad_id: int) -> npt.NDArray[np.int32]:
        """Distinct ids in all texts, and that of padding, ascending."""
        blocks = [self.tokens[start : start + _BLOCK] for start in range(0, len(self.tokens), _BLOCK)]
        return np.unique(np.concatenate([np.array([pad_id], np.int32), *map(np.unique, blocks)]))

    def ids(self, rows: npt.NDArray[np.integer], *, pad_id: int) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Texts at `rows` (B,) as ids (B, L), padded with `pad_id` to the longest of them, and (B, L) whether
        a token is real."""
        return pad(self.tokens[gather(self.offsets, rows)[0]], self.lengths(rows), fill=pad_id)


class TextWriter:
    """Writes the table of texts, a block of texts at a time; keeps 8 bytes a text in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._count = 0
        self._file = (folder / TOKENS).open("wb")
        self._write_header()

    def add(self, tokens: npt.NDArray[np.int32], lengths: npt.NDArray[np.integer]) -> None:
        """Append texts: their ids one after another, and how many each has."""
        self._file.write(np.ascontiguousarray(tokens, "<i4").tobytes())
        self._count += len(tokens)
        self._lengths.append(lengths.astype(np.int32))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def describe(self) -> Texts:
        """Write the offsets, once the tokens are written, and describe both files."""
        lengths = np.concatenate([np.zeros(1, np.int32), *self._lengths])
        np.save(self._folder / OFFSETS, np.cumsum(lengths, dtype="<i8"), allow_pickle=False)
        return Texts(
            rows=len(lengths) - 1,
            tokens=_describe(self._folder / TOKENS),
            offsets=_describe(self._folder / OFFSETS),
        )

    def _write_header(self) -> None:
        # numpy leaves room for any count: the header is written again at the end, when it is known.
        header = {"descr": "<i4", "fortran_order": False, "shape": (self._count,)}
        np.lib.format.write_array_header_1_0(self._file, header)


def read_texts(folder: str | Path, manifest: Manifest) -> TextTable:
    """The table of texts of prepared shards, memory-mapped; its hashes are checked once a process. ShardError
    where it is missing, cut short or altered."""
    return _read_texts(str(folder), manifest.texts)


@lru_cache(maxsize=2)
def _read_texts(folder: str, texts: Texts) -> TextTable:
    tokens, offsets = (
        np.load(_require_whole(Path(folder), part), mmap_mode="r", allow_pickle=False)
        for part in (texts.tokens, texts.offsets)
    )
    return TextTable(tokens, np.array(offsets))


def _require_whole(folder: Path, part: Part) -> Path:
    """The path of a file; ShardError where it is missing or altered."""
    path = folder / part.file
    if not path.is_file():
        raise ShardError(f"{path}: missing; {_AGAIN}")
    if not is_whole(folder, part):
        sizes = f"{path.stat().st_size} bytes, {part.bytes} expected"
        raise ShardError(f"{path}: damaged ({sizes}, or another hash); {_AGAIN}")
    return path


def is_whole(folder: Path, part: Part) -> bool:
    path = folder / part.file
    return path.is_file() and sha256_of(path) == part.sha256


def _describe(path: Path) -> Part:
    return Part(file=path.name, bytes=path.stat().st_size, sha256=sha256_of(path))
