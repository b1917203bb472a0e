"""Where a sweep's memory lies: passwords stay hidden, faults are one message."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from newsbert_ray.tune.storage import JOURNAL, StudyError, absolute_storage, open_storage, shown_storage


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:///study.db", "sqlite:///study.db"),
        ("postgresql://me:secret@host:5432/db", "postgresql://me:***@host:5432/db"),
        ("postgresql+psycopg://me:se:cr@et@host/db", "postgresql+psycopg://me:***@host/db"),
        ("mysql://me@host/db?password=secret&ssl=1", "mysql://me@host/db?password=***&ssl=1"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("postgresql:/me:secret@host", "***"),
        ("me:secret@host", "***"),
    ],
)
def test_a_password_is_masked(url: str, shown: str) -> None:
    """A password stands in a terminal, a log or sweep.json."""
    assert shown_storage(url) == shown


@given(secret=st.text(st.characters(codec="utf-8", exclude_characters="*"), min_size=4, max_size=12))
def test_no_password_is_ever_shown(secret: str) -> None:
    """A password with a sign that nobody thought of is shown."""
    assert secret not in shown_storage(f"a://b:{secret}@c/d").removeprefix("a://b:").removesuffix("@c/d")


def test_a_relative_file_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume from another folder begins an empty study beside the old one."""
    monkeypatch.chdir(tmp_path)
    assert absolute_storage("sqlite:///study.db") == f"sqlite:///{tmp_path / 'study.db'}"
    for same in ("sqlite:////tmp/study.db", "sqlite:///:memory:", "postgresql://host/db", "sqlite://"):
        assert absolute_storage(same) == same


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:////nowhere/study.db", "unable to open database file"),
        ("nonsense://me:secret@host/db", "storage nonsense://me:[*]{3}@host/db: cannot be opened"),
        ("postgresql+psycopg9://me:secret@host/db", "psycopg9"),
        ("sqlite://me:secret@host/db", "Invalid SQLite URL"),
        ("postgresql://me:secret@host:port/db", "port"),
    ],
)
def test_a_storage_that_cannot_be_opened_is_one_message(url: str, message: str, tmp_path: Path) -> None:
    """A database that is not there ends in a page of frames, with its password."""
    with pytest.raises(StudyError, match=message) as caught:
        open_storage(url, tmp_path)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_driver_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows what to install."""
    import optuna

    def refuse(url: str) -> None:
        raise ImportError("Failed to import DB access module") from ModuleNotFoundError(
            "No module named 'pymysql'"
        )

    monkeypatch.setattr(optuna.storages, "RDBStorage", refuse)
    with pytest.raises(StudyError, match=r"driver is not installed \(No module .*'pymysql'\); install it"):
        open_storage("mysql+pymysql://me:secret@host/db", tmp_path)


def test_a_damaged_or_unwritable_journal_is_one_message(tmp_path: Path) -> None:
    """A journal that something else has written to ends in frames at each resume."""
    (tmp_path / JOURNAL).write_text('{"op_code": "x"}\n{}\n')
    with pytest.raises(StudyError, match=r"optuna\.journal: damaged .*put it aside"):
        open_storage(None, tmp_path)
    with pytest.raises(StudyError, match=r"optuna\.journal: cannot be read or written"):
        open_storage(None, tmp_path / "missing")
