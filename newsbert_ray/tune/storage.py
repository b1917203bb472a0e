"""Where a sweep's memory lies: a journal file in its folder, or a database by its URL. Knows no search space
and no study."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from newsbert_ray.files import first_line
from newsbert_ray.secrets import MASK, find_secrets, mask_url

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

JOURNAL = "optuna.journal"

_ELSEWHERE = "give another --search.storage, or none for a journal file in the sweep's folder"
_LATER = "once it can be written again, go on with --resume"


class StudyError(ValueError):
    """A storage that cannot be opened or written, or that holds another sweep; its text is one message."""


def shown_storage(url: str) -> str:
    """`url` with its password masked: the only form that is ever shown or written down."""
    if "://" not in url and "@" in url:
        return MASK
    return mask_url(url)


def absolute_storage(url: str) -> str:
    """`url` with an SQLite file's path absolute, so that a resume from another folder finds it."""
    scheme, found, path = url.partition(":///")
    if not found or scheme.partition("+")[0] != "sqlite" or not path or path.startswith((":", "/", "file:")):
        return url
    return f"{scheme}:///{Path(path).absolute()}"


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """Optuna's storage at `url`; without one the journal file in `folder`, mended after a kill.

    Raises:
        StudyError: it cannot be opened, or its driver is not installed.
    """
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    try:
        if url is not None:
            return RDBStorage(url)
        mend_journal(folder / JOURNAL)
        return JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    except Exception as error:
        # A database's driver raises exceptions of its own; as a cause one might show the password.
        raise _fault(error, url, folder, cure=_ELSEWHERE) from None


@contextmanager
def one_message(url: str | None, folder: Path) -> Iterator[None]:
    """A fault of an open storage (disk full, server gone) as one StudyError without its password."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (OSError, StorageInternalError, SQLAlchemyError) as error:
        raise _fault(error, url, folder, cure=_LATER) from None


def _fault(error: Exception, url: str | None, folder: Path, *, cure: str) -> StudyError:
    reason = first_line(_root_cause(error))
    if url is None and isinstance(error, OSError):
        return StudyError(f"{folder / JOURNAL}: cannot be read or written ({reason}); {_LATER}")
    if url is None:
        cure = "put it aside and go on with --resume: what trials have left in their folders counts"
        return StudyError(f"{folder / JOURNAL}: damaged ({type(error).__name__}: {reason}); {cure}")
    shown = shown_storage(url)
    reason = reason.replace(url, shown)
    for secret in find_secrets(url):
        reason = reason.replace(secret, MASK).replace(unquote(secret), MASK)
    if isinstance(error, ImportError):
        return StudyError(f"storage {shown}: its driver is not installed ({reason}); install it, or {cure}")
    return StudyError(f"storage {shown}: cannot be opened or written ({reason}); {cure}")


def mend_journal(path: Path) -> None:
    """Undo what a kill in the midst of a write leaves behind: half a last line, and Optuna's lock."""
    path.with_name(path.name + ".lock").unlink(missing_ok=True)
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with open(path, "r+b") as file:
            file.truncate(len(whole))


def _root_cause(error: BaseException) -> BaseException:
    """SQLAlchemy's own message has a page of SQL; its cause says what went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
