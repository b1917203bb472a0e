"""Where `embed` puts its shards, a folder or a bucket: whose they are, which are there, what stands in them.
Knows no model and no Ray."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from newsbert_ray import storage
from newsbert_ray.remote import Remote, is_url
from newsbert_ray.serving.texts import Piece

EMBEDDED = "embedded.json"
REJECTED = "rejected"
"""In a shard's metadata: why rows of its piece were left out."""


class EmbedError(ValueError):
    """An output folder that may not be written to, or texts that are mostly damage; the text says more."""


class Footer(NamedTuple):
    """What a shard says of itself: rows, numbers in an embedding, and why rows of its piece were left out."""

    rows: int
    width: int
    rejected: list[str]


def shard_name(piece: Piece) -> str:
    """The file of a piece."""
    return f"part-{piece.number:05d}.parquet"


class Shelf:
    """A folder or URL of shards; cheap to make anew on every machine that writes one."""

    def __init__(self, place: str | Path) -> None:
        self.place = str(place)
        self._remote = Remote(self.place) if is_url(self.place) else None

    def names(self) -> set[str]:
        """The whole files that are there."""
        return {name for name in storage.sizes(self.place) if "/" not in name}

    def put(self, name: str, table: pa.Table) -> None:
        """Write a shard, whole or not at all."""
        if self._remote is None:
            partial = Path(self.place) / f".{name}.{os.getpid()}"
            pq.write_table(table, partial)
            os.replace(partial, Path(self.place) / name)
            return
        with tempfile.TemporaryDirectory() as folder:
            pq.write_table(table, Path(folder) / name)
            self._remote.upload(Path(folder), [name])

    def footer(self, name: str) -> Footer:
        """What the shard says of itself.

        Raises:
            EmbedError: it is not there, though it was written.
        """
        try:
            opened = (Path(self.place) / name).open("rb") if self._remote is None else self._remote.open(name)
        except FileNotFoundError as error:
            raise EmbedError(
                f"{self.place}: {name} was written by another machine, which has a folder of its own there; "
                "give an --out that all machines share, or a URL such as s3://bucket/vectors"
            ) from error
        with opened as file:
            found = pq.read_metadata(file)
        schema = found.schema.to_arrow_schema()
        rejected = json.loads((schema.metadata or {}).get(REJECTED.encode(), b"[]"))
        return Footer(found.num_rows, schema.field("embedding").type.list_size, rejected)

    def described(self) -> dict[str, Any] | None:
        """What embedded.json holds; None where there is none."""
        if self._remote is None:
            path = Path(self.place) / EMBEDDED
            content = path.read_bytes() if path.is_file() else None
        else:
            content = self._remote.read(EMBEDDED)
        try:
            found: dict[str, Any] | None = json.loads(content) if content else None
        except ValueError:
            return None
        return found

    def describe(self, described: dict[str, Any]) -> None:
        """Write embedded.json."""
        storage.leave(self.place, EMBEDDED, json.dumps(described, indent=1) + "\n")

    def claim(self, made_of: dict[str, Any], *, overwrite: bool) -> None:
        """Make the place that of embeddings made of this, or go on with it.

        Raises:
            EmbedError: it holds something else.
        """
        if self._remote is None:
            Path(self.place).mkdir(parents=True, exist_ok=True)
            there = any(Path(self.place).iterdir())
        else:
            there = bool(self._remote.files())
        known, shown = self.described(), storage.shown(self.place)
        if known is not None:
            known = {"precision": "fp32", **known}  # which older ones do not name
        if known is None and there:
            raise EmbedError(f"--out {shown}: there already, and no folder of embeddings; give another --out")
        if known is not None and {name: known.get(name) for name in made_of} != made_of:
            if not overwrite:
                raise EmbedError(
                    f"--out {shown}: embeddings of other texts, by another model or in another "
                    "precision; add --overwrite, or give another --out"
                )
            self._clear()
            known = None
        if known is None:
            self.describe({**made_of, "state": "under way"})

    def _clear(self) -> None:
        """Remove every shard."""
        if self._remote is None:
            for part in Path(self.place).glob("*part-*.parquet*"):
                part.unlink()
        else:
            self._remote.remove(name for name in self.names() if name.startswith("part-"))
