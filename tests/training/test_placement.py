"""What a group holds of the cluster and the disk, and that it gives all of it back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from newsbert_ray.ray_session import ray_session
from newsbert_ray.training.placement import (
    PlacementError,
    at_rest,
    first_worker_alone,
    release_orphans,
)


def test_the_next_group_waits_for_the_last_ones_worker(tmp_path: Path) -> None:
    """Workers outlive a killed driver for seconds: two groups in one folder would mix their checkpoints."""
    order: list[str] = []
    inside = threading.Event()

    def earlier() -> None:
        with first_worker_alone(tmp_path):
            inside.set()
            time.sleep(0.4)
            order.append("earlier ends")

    thread = threading.Thread(target=earlier)
    thread.start()
    inside.wait()
    assert not at_rest(tmp_path)
    with first_worker_alone(tmp_path):
        order.append("next begins")
    thread.join()
    assert order == ["earlier ends", "next begins"]
    assert at_rest(tmp_path)


def test_a_worker_that_never_ends_is_named(tmp_path: Path) -> None:
    """Waiting for ever in silence is a hang; the message names the folder and the cure."""
    with (
        first_worker_alone(tmp_path),
        pytest.raises(PlacementError, match=rf"{tmp_path}: workers of an earlier start .* after 0.3 s"),
        first_worker_alone(tmp_path, seconds=0.3),
    ):
        pass


def test_a_folder_without_a_group_is_at_rest(tmp_path: Path) -> None:
    """A trial that ended before its workers began must not be waited for."""
    assert at_rest(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
def test_only_a_dead_makers_placement_group_is_removed() -> None:
    """Ray keeps it, with its CPUs, until the job ends; a living group's, or Tune's own, must stay."""
    with ray_session(cpus=3):
        import ray
        from ray.util.placement_group import placement_group

        class Maker:
            def make(self) -> Any:
                group = placement_group([{"CPU": 1}])
                group.wait(20)
                return group

        maker: Any = ray.remote(num_cpus=0)(Maker)
        dead, living = maker.remote(), maker.remote()
        left, held = ray.get(dead.make.remote()), ray.get(living.make.remote())
        own = placement_group([{"CPU": 1}])
        assert own.wait(20)
        assert release_orphans() == 2
        ray.kill(dead)
        wait_until(lambda: release_orphans() == 1)
        states = [ray.util.placement_group_table(one)["state"] for one in (left, held, own)]
        assert states == ["REMOVED", "CREATED", "CREATED"]


def wait_until(true: Callable[[], bool], *, seconds: float = 20.0) -> None:
    """Until it is true, which it must become."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)
