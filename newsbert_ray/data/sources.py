"""What `--source` names: folders or zips, made into files with a hash and a table of chunks. Knows no row."""

from __future__ import annotations

import hashlib
import shutil
import stat
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

NEWS = "news.tsv"
BEHAVIORS = "behaviors.tsv"
CHUNK_BYTES = 2 << 20
"""Bytes read at once: a chunk ends at the last line end within them. A line longer than this is damage."""

_ABSURD_RATIO = 200
_ALWAYS_FINE_BYTES = 64 << 20


class PrepareError(ValueError):
    """Sources that cannot be prepared; the text is one whole message for a person."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Whole lines of a file: `lines` of them from `first_line` (from 1) in `length` bytes at `offset`.

    `checksum` is their CRC-32. `overlong`: one line of more than CHUNK_BYTES, which is never read as a whole.
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
    """A file that was read through once; `folder` is its folder's name as given, without the way there."""

    folder: str
    name: str
    bytes: int
    sha256: str
    chunks: tuple[Chunk, ...]

    @property
    def lines(self) -> int:
        """Lines, damaged ones included."""
        return sum(chunk.lines for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class SourceFolder:
    """Where one source's files lie; `behaviors` may be missing."""

    name: str
    news: Path
    behaviors: Path | None


def find_source(given: str, *, unpacked: Path) -> SourceFolder:
    """The files of one `--source`.

    Args:
        given: folder with news.tsv (itself or in its only such subfolder), or a zip of one.
        unpacked: folder that a zip's files may be written to.
    Raises:
        PrepareError: nothing there, no news.tsv in it, or a zip that is damaged or hostile.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        return _find_in_folder(path)
    if not path.exists():
        raise PrepareError(
            f"source {given}: no such folder or zip; give a folder with {NEWS} and {BEHAVIORS}"
        )
    if not zipfile.is_zipfile(path):
        raise PrepareError(
            f"source {given}: neither a folder nor a zip; give a folder with {NEWS} and {BEHAVIORS}"
        )
    return _unpack(path, unpacked)


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
                length, rest = _pass_over_line(file, digest, len(buffer))
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


def read_chunk(chunk: Chunk) -> bytes:
    """The bytes of `chunk`; of an overlong line only the beginning.

    Raises:
        PrepareError: the file is another than when its chunks were cut.
    """
    with open(chunk.path, "rb") as file:
        file.seek(chunk.offset)
        if chunk.overlong:
            return file.read(1024)
        content = file.read(chunk.length)
    if zlib.crc32(content) != chunk.checksum:
        raise PrepareError(
            f"{chunk.file}: changed while it was read; prepare again when nothing writes to it"
        )
    return content


def _chunk(path: Path, label: str, content: bytes, offset: int, line: int) -> Chunk:
    lines = content.count(b"\n") + (not content.endswith(b"\n"))
    return Chunk(str(path), label, offset, len(content), line, lines, zlib.crc32(content), False)


def _pass_over_line(file: BinaryIO, digest: hashlib._Hash, length: int) -> tuple[int, bytes]:
    """Read on to the end of an overlong line: its length, and what was read after it."""
    while block := file.read(CHUNK_BYTES):
        digest.update(block)
        cut = block.find(b"\n") + 1
        if cut:
            return length + cut, block[cut:]
        length += len(block)
    return length, b""


def _find_in_folder(folder: Path) -> SourceFolder:
    if (folder / NEWS).is_file():
        return _source_folder(folder.resolve().name, folder)
    inner = sorted(path.parent for path in folder.glob(f"*/{NEWS}"))
    if len(inner) == 1:
        return _source_folder(inner[0].name, inner[0])
    if inner:
        names = ", ".join(path.name for path in inner)
        raise PrepareError(
            f"source {folder}: {len(inner)} folders with a {NEWS} in it ({names}); give each as a --source"
        )
    raise PrepareError(f"source {folder}: no {NEWS} in it; give a folder with {NEWS} and {BEHAVIORS}")


def _source_folder(name: str, folder: Path) -> SourceFolder:
    behaviors = folder / BEHAVIORS
    return SourceFolder(name, folder / NEWS, behaviors if behaviors.is_file() else None)


def _unpack(path: Path, unpacked: Path) -> SourceFolder:
    """Write the zip's news.tsv and behaviors.tsv, and nothing else, under names of our own."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            for member in members:
                _require_harmless(path, member)
            wanted = {name: _only_member(path, members, name) for name in (NEWS, BEHAVIORS)}
            if wanted[NEWS] is None:
                raise PrepareError(f"source {path}: no {NEWS} in this zip; give one of MIND's own zips")
            _require_room(path, [member for member in wanted.values() if member], unpacked)
            unpacked.mkdir(parents=True)
            for name, found in wanted.items():
                if found is not None:
                    with archive.open(found) as packed, (unpacked / name).open("wb") as file:
                        shutil.copyfileobj(packed, file, CHUNK_BYTES)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise PrepareError(f"source {path}: damaged or encrypted zip ({error}); fetch it again") from error
    return _source_folder(path.stem, unpacked)


def _only_member(path: Path, members: Sequence[zipfile.ZipInfo], name: str) -> zipfile.ZipInfo | None:
    found = [m for m in members if PurePosixPath(m.filename).name == name and "__MACOSX" not in m.filename]
    if len(found) > 1:
        raise PrepareError(
            f"source {path}: {len(found)} files named {name} in this zip; unpack it and give the folders"
        )
    return found[0] if found else None


def _require_harmless(path: Path, member: zipfile.ZipInfo) -> None:
    name = member.filename.replace("\\", "/")
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or (parts and parts[0].endswith(":")):
        raise PrepareError(
            f"source {path}: member {member.filename!r} points outside of the zip; this is no zip of MIND's"
        )
    if stat.S_ISLNK(member.external_attr >> 16):
        raise PrepareError(f"source {path}: member {member.filename!r} is a link; this is no zip of MIND's")
    size = member.file_size
    if size > _ALWAYS_FINE_BYTES and size > _ABSURD_RATIO * max(1, member.compress_size):
        raise PrepareError(
            f"source {path}: member {member.filename!r} would grow from {member.compress_size:,} bytes to "
            f"{size:,}; unpack it yourself if you trust it, and give the folder"
        )


def _require_room(path: Path, members: Sequence[zipfile.ZipInfo], unpacked: Path) -> None:
    needed = sum(member.file_size for member in members)
    free = shutil.disk_usage(unpacked.parent).free
    if needed > free:
        raise PrepareError(f"source {path}: needs {needed:,} bytes unpacked, {free:,} are free beside --out")
