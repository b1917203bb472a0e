"""One trial: what it leaves behind, and that its failure stays its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray import tune

from newsbert_ray.config import TrainSettings, build_settings
from newsbert_ray.storage import workdir as storage
from newsbert_ray.tune.trial import run_trial


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the trial reports to Tune."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(tune, "report", found.append)
    return found


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """What a trial gets."""
    values = {"data": "nowhere", "teacher": "scratch", "out": str(tmp_path / "trials" / "one")}
    settings = build_settings(TrainSettings, values).model_dump()
    return {
        "settings": settings,
        "metrics": ["validation.student.accuracy"],
        "notes": str(tmp_path / "failures"),
    }


def test_the_frames_of_a_failure_go_once_the_trial_succeeds(
    reports: list[dict[str, Any]], config: dict[str, Any], make_train: Any, tmp_path: Path
) -> None:
    """A person looks for the fault of a trial that has long been mended."""
    note = tmp_path / "failures" / "one.txt"
    run_trial(config, train=make_train(fails={"epochs": 2}))
    assert reports[-1] == {"failure": "ValueError: the loss is not a number"}
    assert "the loss is not a number" in note.read_text()
    run_trial(config, train=make_train())
    assert reports[-1] == {"values": [pytest.approx(0.62)]}
    assert not note.exists()


def test_a_full_disk_is_the_trials_reason_and_no_more(
    reports: list[dict[str, Any]],
    config: dict[str, Any],
    make_train: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The frames cannot be written either, and the trial is said to have died for want of memory."""

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "write_text", full)
    run_trial(config, train=make_train(fails={"epochs": 2}))
    assert reports[-1] == {"failure": "ValueError: the loss is not a number"}
