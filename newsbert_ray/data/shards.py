"""Prepared shards and their manifest: what a reader needs to trust and read them. Writing is
`data.prepare`'s."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from newsbert_ray.record import first_fault

MANIFEST = "manifest.json"
FORMAT = 1
"""Version of the layout; a reader refuses another."""

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
        ("history", pa.list_(pa.string())),
        ("candidates", pa.list_(pa.string())),
        ("clicked", pa.list_(pa.int8())),
    ]
)
"""A row of a behaviours shard; `clicked` is null where the impression carries no labels."""


class ShardError(ValueError):
    """Shards that cannot be trusted or read; the text names the file and the cure."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Part):
    """One Parquet file."""

    file: str
    rows: int
    bytes: int
    sha256: str


class Source(_Part):
    """One file that was read: its name as given (no absolute path), size and SHA-256."""

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


class Manifest(_Part):
    """What a folder of shards is and what it was made from.

    `splits` maps train, validation and test to their news shards, in order; `behaviors` likewise (splits
    without behaviours are absent). `fingerprint` is a SHA-256 over sources, tokeniser and the settings that
    alter a row.
    """

    format: int
    fingerprint: str
    settings: dict[str, Any]
    sources: list[Source]
    tokenizer: Tokenizer
    labels: list[str]
    splits: dict[Split, list[Shard]]
    behaviors: dict[Split, list[Shard]]
    statistics: dict[str, float]
    rejected: dict[str, int]

    def rows(self, split: Split) -> int:
        """News in `split`."""
        return sum(shard.rows for shard in self.splits[split])


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of the shards in `folder`.

    Raises:
        ShardError: none there, damaged, or of another format.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ShardError(
            f"{path}: no prepared shards there; make them with: newsbert-ray prepare --source MIND_FOLDER "
            f"--teacher NAME_OR_DIR --out {folder}"
        ) from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise ShardError(
            f"{path}: damaged manifest ({first_fault(error)}); prepare again with --overwrite true"
        ) from error
    if manifest.format != FORMAT:
        raise ShardError(
            f"{path}: format {manifest.format}, this version reads {FORMAT}; "
            "prepare again with --overwrite true"
        )
    return manifest


def read_shard(folder: str | Path, shard: Shard, columns: list[str] | None = None) -> pa.Table:
    """The rows of one shard, after its size and hash were checked against the manifest.

    Raises:
        ShardError: missing, cut short or altered.
    """
    path = Path(folder) / shard.file
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ShardError(f"{path}: shard is missing; prepare again with --overwrite true") from error
    if len(content) != shard.bytes or hashlib.sha256(content).hexdigest() != shard.sha256:
        raise ShardError(
            f"{path}: shard is damaged ({len(content)} bytes, {shard.bytes} expected, or another hash); "
            "prepare again with --overwrite true"
        )
    return pq.read_table(pa.BufferReader(content), columns=columns)
