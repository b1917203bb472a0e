"""The lock of a worker group's rank 0."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from newsbert_ray.training.ray_group import GroupError, is_idle, rank_zero_lock


def test_the_next_group_waits_for_the_last_ones_worker(tmp_path: Path) -> None:
    """Workers outlive a killed driver for seconds: two groups in one folder would mix their checkpoints."""
    order: list[str] = []
    inside = threading.Event()

    def earlier() -> None:
        with rank_zero_lock(tmp_path):
            inside.set()
            time.sleep(0.4)
            order.append("earlier ends")

    thread = threading.Thread(target=earlier)
    thread.start()
    inside.wait()
    assert not is_idle(tmp_path)
    with rank_zero_lock(tmp_path):
        order.append("next begins")
    thread.join()
    assert order == ["earlier ends", "next begins"]
    assert is_idle(tmp_path)


def test_a_worker_that_never_ends_is_named(tmp_path: Path) -> None:
    """Waiting for ever in silence is a hang; the message names the folder and the cure."""
    with (
        rank_zero_lock(tmp_path),
        pytest.raises(GroupError, match=rf"{tmp_path}: workers of an earlier start .* after 0.3 s"),
        rank_zero_lock(tmp_path, wait_seconds=0.3),
    ):
        pass


def test_a_folder_without_a_group_is_at_rest(tmp_path: Path) -> None:
    """A trial that ended before its workers began must not be waited for."""
    assert is_idle(tmp_path)
    assert list(tmp_path.iterdir()) == []
