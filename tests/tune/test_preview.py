"""What a sweep will take, said before it starts and held against what it took."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from newsbert_ray.config import SettingsError
from newsbert_ray.data.shards import ShardError
from newsbert_ray.ray_session import RaySession
from newsbert_ray.tune.preview import _subject, compared, preview
from newsbert_ray.tune.space_file import read_space
from newsbert_ray.tune.sweep import sweep
from newsbert_ray.tune.sweep_folder import ESTIMATE, SweepError

WriteSpace = Callable[..., Path]


def test_a_plan_is_held_against_its_own_sweep_only(write_space: WriteSpace, tmp_path: Path) -> None:
    """A plan for two trials is said to have missed by a thousand per cent because a hundred were run."""
    space = read_space(write_space())
    plan = {"of": _subject(space, {}), "slots": 2, "wall": 600.0}
    (tmp_path / ESTIMATE).write_text(json.dumps(plan))
    assert compared(tmp_path, space, {}, seconds=660.0, slots=2) == "planned 10.0 min, took 11.0 min (+10%)"
    assert compared(tmp_path, space, {}, seconds=660.0, slots=1) == ""
    assert compared(tmp_path, space, {"epochs": 9}, seconds=660.0, slots=2) == ""
    other = read_space(write_space(**{"[1, 2]": "[1]"}))
    assert compared(tmp_path, other, {}, seconds=660.0, slots=2) == ""
    (tmp_path / ESTIMATE).write_text("{")
    assert compared(tmp_path, space, {}, seconds=660.0, slots=2) == ""


def test_a_plan_of_what_cannot_be_ends_at_once(write_space: WriteSpace, shards: Path, tmp_path: Path) -> None:
    """A person waits for the calibration of a sweep that then refuses to start."""
    file = write_space(nowhere=str(shards))
    with pytest.raises(SettingsError, match="epochs = 0"):
        preview(file, out=tmp_path / "sweep", overrides={"epochs": 0})
    with pytest.raises(ShardError):
        preview(write_space(), out=tmp_path / "sweep")
    with pytest.raises(SettingsError, match=r"--curves .*no trial there has reported"):
        preview(write_space(nowhere=str(shards)), out=tmp_path / "sweep", curves=tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.jpg").touch()
    with pytest.raises(SweepError, match="holds other files"):
        preview(file, out=tmp_path / "other")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_sweep_follows_its_plan_and_says_how_near_it_was(
    ray: RaySession,
    write_space: WriteSpace,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The plan stands in the way of its own sweep, or nobody learns that plans are wrong."""
    small = (
        f"name: planned\nsettings: {{data: {shards}, teacher: scratch, epochs: 1, batch_size: 32, "
        "student.layers: 1, model.query_size: 8, scratch: {layers: 2, hidden: 16, heads: 2, "
        "feed_forward: 32}}\n"
        "space:\n  distill.beta: {grid: [0.0, 0.2]}\nprices: {cpu_hour: 0.5}\n"
    )
    file, out = write_space(small), tmp_path / "sweep"
    estimate = preview(file, out=out)
    said = capsys.readouterr().out
    assert (len(estimate.costs), estimate.place.slots) == (2, 2)
    assert "planned: 2 points, 2 trials, 18 steps, 2 epochs" in said
    assert sorted(path.name for path in out.iterdir()) == [".lock", "plan.json"]
    sweep(file, out=out)
    assert "planned " in capsys.readouterr().out
