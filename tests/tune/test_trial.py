"""One trial: its configuration, its reports, and that its failure ends it alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray import tune

from newsbert_ray.config import TrainSettings, build_settings
from newsbert_ray.ray_session import RaySession
from newsbert_ray.storage.bucket import Remote
from newsbert_ray.storage.workdir import WorkDir
from newsbert_ray.tune.trial import (
    CONFIG,
    NodeError,
    TrialConfig,
    check_nodes,
    node_fault,
    require_seen,
    run_trial,
)


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the trial reports to Tune."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(tune, "report", found.append)
    return found


@pytest.fixture
def config(tmp_path: Path) -> dict[str, TrialConfig]:
    """Tune's configuration of a trial."""
    values = {"data": "nowhere", "teacher": "scratch", "out": str(tmp_path / "trials" / "one")}
    settings = build_settings(TrainSettings, values)
    failures = WorkDir.at(tmp_path / "failures")
    trial = TrialConfig(settings, ("validation.student.accuracy",), failures)
    return {CONFIG: trial}


def test_a_failure_leaves_its_stack_trace(
    reports: list[dict[str, Any]], config: dict[str, TrialConfig], make_train: Any, tmp_path: Path
) -> None:
    """A person has one line, and looks for the fault in vain; or a repeated trial is not believed."""
    note = tmp_path / "failures" / "one.txt"
    run_trial(config, train=make_train(fails={"epochs": 2}))
    assert reports[-1] == {"failure": "ValueError: the loss is not a number"}
    assert "the loss is not a number" in note.read_text()
    run_trial(config, train=make_train())
    assert reports[-1] == {"values": [pytest.approx(0.62)]}


def test_a_full_disk_is_the_trials_reason_and_no_more(
    reports: list[dict[str, Any]],
    config: dict[str, TrialConfig],
    make_train: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The stack trace cannot be written either, and the trial seems to have died for lack of memory."""

    def full(remote: Remote, name: str, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Remote, "write", full)
    run_trial(config, train=make_train(fails={"epochs": 2}))
    assert reports[-1] == {"failure": "ValueError: the loss is not a number"}


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
