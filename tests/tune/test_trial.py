"""One trial: its configuration, its reports, and that its failure ends it alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray import tune

from newsbert_ray.config import TrainSettings, build_settings
from newsbert_ray.storage import workdir as storage
from newsbert_ray.storage.workdir import WorkDir
from newsbert_ray.tune.trial import CONFIG, TrialConfig, run_trial


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


def test_a_failures_stack_trace_is_removed_once_the_trial_succeeds(
    reports: list[dict[str, Any]], config: dict[str, TrialConfig], make_train: Any, tmp_path: Path
) -> None:
    """A person looks for the fault of a trial that has been fixed."""
    note = tmp_path / "failures" / "one.txt"
    run_trial(config, train=make_train(fails={"epochs": 2}))
    assert reports[-1] == {"failure": "ValueError: the loss is not a number"}
    assert "the loss is not a number" in note.read_text()
    run_trial(config, train=make_train())
    assert reports[-1] == {"values": [pytest.approx(0.62)]}
    assert not note.exists()


def test_a_full_disk_is_the_trials_reason_and_no_more(
    reports: list[dict[str, Any]],
    config: dict[str, TrialConfig],
    make_train: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The stack trace cannot be written either, and the trial seems to have died for lack of memory."""

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "write_text", full)
    run_trial(config, train=make_train(fails={"epochs": 2}))
    assert reports[-1] == {"failure": "ValueError: the loss is not a number"}
