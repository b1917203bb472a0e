"""Folders wherever pyarrow reaches: paths, s3://, gs:// and other URLs. Knows no run and no Ray."""

from __future__ import annotations

import secrets


class StorageError(ValueError):
    """A place that cannot be reached, read or written; the text names it and the cure."""


def check_writable(place: str) -> None:
    """Write a small file below `place`, a URL, read it back and remove it.

    Raises:
        StorageError: one of these is not possible.
    """
    from pyarrow import fs

    probe = f".probe-{secrets.token_hex(6)}"
    try:
        system, path = fs.FileSystem.from_uri(place)
        with system.open_output_stream(f"{path}/{probe}") as file:
            file.write(probe.encode())
        with system.open_input_stream(f"{path}/{probe}") as file:
            same = file.read() == probe.encode()
        system.delete_file(f"{path}/{probe}")
    except (OSError, ValueError) as error:
        raise StorageError(f"{place}: cannot be written ({error})") from error
    if not same:
        raise StorageError(f"{place}: what was written is read back otherwise")
