"""A few timed steps."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import pytest

from newsbert_ray.data.shards import ShardError
from newsbert_ray.ray_session import RaySession
from newsbert_ray.tune.estimate import calibrate, time_parts
from newsbert_ray.tune.resources import Place
from tests.conftest import MakeSettings


def test_every_part_is_timed_and_nothing_is_left(make_settings: MakeSettings, tmp_path: Path) -> None:
    """A part that was forgotten would count as free in every plan; a checkpoint left would fill the disk."""
    folder = tmp_path / "calibration"
    parts = time_parts(make_settings(**{"optimizer.accumulate": 2}), folder=folder)
    assert all(seconds > 0 for name, seconds in vars(parts).items() if name != "cold")
    assert parts.cold >= 0
    assert not folder.exists()


def test_more_work_takes_longer(make_settings: MakeSettings, tmp_path: Path) -> None:
    """The plan stands on these differences."""
    wide = {"layers": 8, "hidden": 64, "heads": 2, "feed_forward": 256}
    small = time_parts(make_settings(batch_size=8), folder=tmp_path / "a")
    large = time_parts(make_settings(batch_size=64, scratch=wide), folder=tmp_path / "b")
    assert large.step > 2 * small.step
    assert large.title > small.title


@pytest.mark.ray
def test_slots_are_timed_together_and_freed(
    ray: RaySession, make_settings: MakeSettings, tmp_path: Path
) -> None:
    """Neighbours slow each other down: timed alone, a step is too fast; actors that stay would block the
    sweep."""
    import ray as cluster

    place = Place(slots=2, cpus=1.0, gpus=0.0)
    kinds = [make_settings(), make_settings(**{"student.layers": 4})]
    found = calibrate(kinds, place, folder=tmp_path / "calibration")
    assert found.settings == tuple(kinds)
    assert all(part >= 0 for parts in found.parts for part in astuple(parts))
    assert found.process > 0
    assert found.seconds > found.process
    with pytest.raises(ShardError, match="no prepared shards"):
        calibrate([make_settings(data=str(tmp_path / "nowhere"))], place, folder=tmp_path / "calibration")

    @cluster.remote(num_cpus=2)
    def whole() -> str:
        return "free"

    assert cluster.get(whole.remote(), timeout=60) == "free"
    assert not (tmp_path / "calibration" / "slot-0").exists()
