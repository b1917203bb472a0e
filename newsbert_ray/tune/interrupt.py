"""Ctrl-C that is never lost, even where it hits a library that swallows it. Knows no Ray."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def heeded() -> Iterator[Callable[[], None]]:
    """Notes each Ctrl-C for as long as the block runs, and raises KeyboardInterrupt as usual.

    Yields:
        A check to call now and then: raises KeyboardInterrupt where one came and was swallowed.
    """
    hits: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        hits.append(number)
        raise KeyboardInterrupt

    def check() -> None:
        if hits:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
