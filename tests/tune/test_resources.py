"""Where trials run: as many as fit, and never one that Ray would wait for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from newsbert_ray.config import SettingsError, TrainSettings, build_settings
from newsbert_ray.ray_session import RaySession
from newsbert_ray.storage.workdir import WorkDir
from newsbert_ray.tune.resources import (
    NodeError,
    Resources,
    Retention,
    check_nodes,
    node_fault,
    plan_resources,
    require_seen,
)
from newsbert_ray.tune.space_file import read_space
from newsbert_ray.tune.study import SweepStudy
from newsbert_ray.tune.trials import Trials


@pytest.mark.parametrize(
    ("nodes", "values", "concurrency", "trials", "expected"),
    [
        ([(8, 0)], {}, None, 100, (8, 1, 0)),
        ([(8, 0)], {}, 3, 100, (3, 1, 0)),
        ([(8, 0)], {}, 30, 100, (8, 1, 0)),
        ([(8, 0)], {}, None, 5, (5, 1, 0)),
        ([(8, 0)], {"threads": 3}, None, 100, (2, 3, 0)),
        ([(0, 0), (4, 0), (7, 0)], {"threads": 3}, None, 100, (3, 3, 0)),
        ([(4, 0), (2, 0)], {"threads": 4}, None, 100, (1, 4, 0)),
        ([(16, 1)], {}, None, 100, (4, 1, 0.25)),
        ([(16, 1)], {}, 8, 100, (8, 1, 0.125)),
        ([(8, 2), (8, 2)], {}, 2, 100, (2, 1, 1)),
        ([(64, 0), (2, 1)], {}, None, 100, (2, 1, 0.5)),
        ([(16, 1)], {"device": "cpu"}, None, 100, (16, 1, 0)),
        ([(5, 0), (2, 0)], {"workers": 2}, None, 100, (3, 1, 0)),
        ([(5, 0), (3, 0)], {"workers": 2, "threads": 2}, None, 100, (1, 2, 0)),
        ([(8, 4)], {"workers": 2}, None, 100, (2, 1, 1)),
    ],
)
def test_trials_at_once_follow_the_resources(
    nodes: list[tuple[int, int]],
    values: dict[str, Any],
    concurrency: int | None,
    trials: int,
    expected: tuple[float, ...],
) -> None:
    """Trials wait for ever for resources that do not exist, or leave the machine idle."""
    resources = plan_resources(settings_with(values), cluster(*nodes), trials=trials, concurrency=concurrency)
    assert (resources.slots, resources.cpus, resources.gpus) == expected


@pytest.mark.parametrize(
    ("nodes", "values", "message"),
    [
        ([(2, 0)], {"threads": 4}, "needs 4 CPUs of one node, and Ray's largest node has 2"),
        ([(4, 0), (4, 0)], {"threads": 8}, "needs 8 CPUs of one node, and Ray's largest node has 4"),
        ([(8, 0), (4, 1)], {"threads": 8}, "largest node with a GPU has 4"),
        ([(0, 0)], {}, "largest node has 0"),
        ([(2, 0)], {"device": "cuda"}, "Ray has no GPU"),
        ([(2, 0)], {"workers": 3}, "workers = 3: each needs 1 CPUs of one node, and 2 fit"),
        ([(8, 1)], {"workers": 2}, "workers = 2: each needs 1 CPUs and 1 GPUs of one node, and 1 fit"),
    ],
)
def test_a_trial_that_does_not_fit_is_refused_at_once(
    nodes: list[tuple[int, int]], values: dict[str, Any], message: str
) -> None:
    """Ray would wait for ever for a larger machine."""
    with pytest.raises(SettingsError, match=message):
        plan_resources(settings_with(values), cluster(*nodes), trials=1, concurrency=None)


@pytest.mark.parametrize(
    ("nodes", "gpus", "concurrency", "expected"),
    [
        ([(16, 1)], 0.25, None, (4, 0.25)),
        ([(16, 1)], 0.3, None, (3, 0.3)),
        ([(2, 1)], 0.25, None, (2, 0.25)),
        ([(16, 2)], 1.0, None, (2, 1.0)),
        ([(16, 2)], 2.0, 8, (1, 2.0)),
    ],
)
def test_the_gpu_share_is_the_requested_one(
    nodes: list[tuple[int, int]], gpus: float, concurrency: int | None, expected: tuple[float, ...]
) -> None:
    """Five trials share a GPU that holds four, and all die for lack of memory."""
    resources = plan_resources(
        settings_with({}), cluster(*nodes), trials=100, concurrency=concurrency, gpus=gpus
    )
    assert (resources.slots, resources.gpus) == expected


def test_a_gpu_share_without_gpus_is_refused() -> None:
    """Trials priced for a GPU run for days on a CPU."""
    with pytest.raises(SettingsError, match=r"gpus = 0.25: Ray has no GPU"):
        plan_resources(settings_with({}), cluster((8, 0)), trials=1, gpus=0.25)


def test_a_groups_driver_holds_no_cpu() -> None:
    """Drivers hold all CPUs and their workers wait for ever."""
    resources = plan_resources(settings_with({"workers": 2}), cluster((4, 0)), trials=9)
    assert (resources.nested, resources.slots, resources.tune_request["CPU"]) == (True, 2, 0)


def settings_with(values: dict[str, Any]) -> TrainSettings:
    """Settings of a trial."""
    return build_settings(TrainSettings, {"data": "d", "teacher": "scratch", "out": "o", **values})


def cluster(*nodes: tuple[int, int]) -> list[dict[str, float]]:
    """Nodes of so many CPUs and GPUs, as Ray describes them."""
    return [{"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {}) for cpus, gpus in nodes]


def test_checkpoints_are_removed_and_the_best_students_are_kept(
    write_space: Callable[..., Path], tmp_path: Path
) -> None:
    """A sweep of hundreds of trials fills the disk; or the best model is the one that was removed."""
    space = read_space(write_space(**{"seeds: [0]": "seeds: [0]\nkeep_students: 2"}))
    trials = Trials(space, SweepStudy(space, tmp_path), WorkDir.at(tmp_path))
    keeper = Retention(trials, Resources(slots=2, cpus=1.0, gpus=0.0), checkpoints=1)
    folders = []
    for value in (0.2, 0.4, 0.1, 0.3):
        spec = trials.next_trial()
        assert spec is not None
        for name, size in (("checkpoints/step-1", 3000), ("checkpoints/best-1", 1000), ("student", 500)):
            (spec.out / name).mkdir(parents=True)
            (spec.out / name / "weights").write_bytes(bytes(size))
        keeper.reported(spec)
        trials.finish(spec, (value,))
        keeper.ended(spec)
        folders.append(spec.out)
    assert [(folder / "student").exists() for folder in folders] == [False, True, False, True]
    assert not any((folder / "checkpoints").exists() for folder in folders)
    assert keeper.line() == (
        "disk: 2 students kept, 1.0 kB (keep_students: 2); checkpoints 0 B now, at most 16.0 kB during the "
        "sweep (2 trials at once)"
    )


def test_a_machine_says_what_it_cannot_read(shards: Path, tmp_path: Path) -> None:
    """A trial on a machine without the shared disk leaves its results where nobody finds them."""
    (tmp_path / "probe").touch()
    seen, out = tmp_path / "probe", WorkDir.at(tmp_path)
    assert node_fault(out, seen, [str(shards)], [str(tmp_path)]) == ""
    assert "does not see" in node_fault(out, tmp_path / "gone", [], [])
    assert "nowhere: give as --data a folder that all nodes share" in node_fault(out, seen, ["nowhere"], [])
    assert "nowhere: give as --teacher" in node_fault(out, seen, [], ["nowhere"])
    assert "cannot be written" in node_fault(WorkDir("/proc/here"), seen, [], [])


def test_a_machine_that_joins_later_is_checked_too(tmp_path: Path) -> None:
    """The cluster grows during the sweep, and the new machine does not see the folder."""
    require_seen(None)
    require_seen(WorkDir("s3://shelf/sweep"))
    with pytest.raises(
        NodeError, match=r"this node does not see .*give as --out a folder that all nodes share"
    ):
        require_seen(WorkDir.at(tmp_path))
    (tmp_path / "sweep.json").touch()
    require_seen(WorkDir.at(tmp_path))


@pytest.mark.ray
def test_every_machine_is_checked(ray: RaySession, shards: Path, tmp_path: Path) -> None:
    """The driver's machine sees everything; the others may not."""
    check_nodes(WorkDir.at(tmp_path), data=[str(shards)])
    assert not list(tmp_path.glob(".probe*"))
    with pytest.raises(NodeError, match=r"node 127\.0\.0\.1 \(\w+\): does not see .*nowhere"):
        check_nodes(WorkDir.at(tmp_path), data=[str(tmp_path / "nowhere")])
    assert not list(tmp_path.glob(".probe*"))
