"""The table of texts: what is written is mapped back, and trusted only when whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from newsbert_ray.data.shards import (
    OFFSETS,
    TOKENS,
    Manifest,
    ShardError,
    TextTable,
    TextWriter,
    Tokenizer,
    read_texts,
)

BLOCKS = [([5, 6, 7, 8, 9], [2, 3]), ([], []), ([1], [1]), ([2, 3], [2])]


def written(folder: Path) -> Manifest:
    """A manifest that holds nothing but a table of four texts."""
    with TextWriter(folder) as writer:
        for ids, lengths in BLOCKS:
            writer.add(np.array(ids, np.int32), np.array(lengths, np.int64))
    texts = writer.describe()
    return Manifest(
        format=2,
        fingerprint="",
        settings={},
        sources=[],
        tokenizer=Tokenizer(name="", sha256="", vocabulary=10, pad_id=0),
        labels=[],
        splits={},
        others=[],
        behaviors={},
        pairs={},
        texts=texts,
        statistics={},
        rejected={},
    )


def test_what_is_written_is_mapped(tmp_path: Path) -> None:
    """Offsets wrong by one would give every news its neighbour's words."""
    table = read_texts(tmp_path, written(tmp_path))
    assert isinstance(table.tokens, np.memmap)
    assert len(table) == 4
    assert table.lengths(np.array([3, 0])).tolist() == [2, 2]
    ids, mask = table.ids(np.array([1, 2, 0, 1]), pad_id=99)
    assert ids.tolist() == [[7, 8, 9], [1, 99, 99], [5, 6, 99], [7, 8, 9]]
    assert mask.tolist() == [[True] * 3, [True, False, False], [True, True, False], [True] * 3]
    assert np.load(tmp_path / TOKENS).tolist() == [5, 6, 7, 8, 9, 1, 2, 3]


def test_no_texts_asked(tmp_path: Path) -> None:
    """A batch without a history must not end in numpy's frames."""
    ids, mask = TextTable(np.arange(3, dtype=np.int32), np.array([0, 3])).ids(np.zeros(0, np.int64), pad_id=0)
    assert ids.shape == mask.shape == (0, 1)


@pytest.mark.parametrize("name", [TOKENS, OFFSETS])
def test_a_damaged_table_is_refused(tmp_path: Path, name: str) -> None:
    """One bit of a token id would train on another word, in silence."""
    manifest = written(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ShardError, match=rf"{name}: damaged; prepare again"):
        read_texts(tmp_path, manifest)
    (tmp_path / name).unlink()
    with pytest.raises(ShardError, match=rf"{name}: missing; prepare again"):
        read_texts(tmp_path, manifest)
