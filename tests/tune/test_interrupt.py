"""Ctrl-C, wherever it hits."""

from __future__ import annotations

import signal
import threading
from contextlib import suppress

import pytest

from newsbert_ray.tune.sweep import heeded


def test_a_swallowed_ctrl_c_is_raised_again() -> None:
    """Ctrl-C while Ray starts is swallowed there, and the sweep runs on until the morning."""
    before = signal.getsignal(signal.SIGINT)
    with heeded() as check:
        check()
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            check()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_sweep_in_a_thread_of_a_notebook_goes_without() -> None:
    """Python sets signals from its main thread only, and the sweep ends before it has begun."""
    said: list[str] = []

    def inside() -> None:
        with heeded() as check:
            check()
            said.append("through")

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert said == ["through"]
