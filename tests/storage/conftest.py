"""Fixtures of the storage's tests: files of a folder, and another machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


def write_files(folder: Path, **contents: str) -> None:
    """write_files(folder, record="{}") writes record.json; __ stands for a slash."""
    for name, content in contents.items():
        path = folder / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, this process is on another machine: it has another cache."""

    def leave() -> None:
        monkeypatch.setenv("NEWSBERT_CACHE", str(tmp_path / "another machine"))

    return leave
