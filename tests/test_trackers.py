"""Runs and sweeps in MLflow and Weights & Biases, whose packages are optional."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import newsbert_ray
from newsbert_ray.config import SettingsError
from newsbert_ray.trackers import FILE, TrackedRun, Tracker, tracked
from tests.conftest import MakeSettings

# The packages' own use of SQLAlchemy and others.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
ENTRY = {"kind": "evaluation", "step": 8, "epoch": 1.0, "validation": {"student": {"accuracy": 0.7}}}


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of a store in a local file."""
    pytest.importorskip("mlflow", reason="`pip install mlflow-skinny` to test --track mlflow")
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return MlflowClient(tracking_uri=uri)


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Path]]:
    """The folders of offline runs, once everything is written."""
    package = pytest.importorskip("wandb", reason="`pip install wandb` to test --track wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))

    def folders() -> list[Path]:
        package.teardown()
        return sorted((tmp_path / "wandb").glob("offline-run-*"))

    return folders


def test_nothing_is_tracked_by_default(tmp_path: Path) -> None:
    """A run needs no tracker, and leaves no file of one."""
    with tracked(None, tmp_path, {}) as tracker:
        tracker(ENTRY)
    assert tracker.run is None
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_before_anything_is_written(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that fails at its first report, hours later."""
    monkeypatch.setattr("newsbert_ray.trackers.find_spec", lambda name: None)
    settings = make_settings(track="wandb")
    with pytest.raises(SettingsError, match="track = wandb: it is not installed here; pip install wandb"):
        newsbert_ray.train(settings)
    assert not Path(settings.out).exists()


def test_a_tracker_that_fails_later_does_not_end_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    """A server that is restarted costs a night of training."""

    def send(numbers: Any, step: int) -> None:
        raise ConnectionError("server gone")

    tracker = Tracker(TrackedRun("mlflow", "http://localhost", "1"), send)
    tracker(ENTRY)
    tracker(ENTRY)
    assert capsys.readouterr().err == "mlflow: server gone; no longer tracked\n"


def test_numbers_are_sent_under_tensorboards_names() -> None:
    """The same metric has two names in two places; a note ends the run."""
    sent = []
    tracker = Tracker(TrackedRun("wandb", ".", "1"), lambda numbers, step: sent.append((numbers, step)))
    tracker({**ENTRY, "note": "text", "is_best": True})
    tracker({"kind": "note", "step": 0, "text": "hello"})
    assert sent == [({"epoch": 1.0, "validation/student/accuracy": 0.7}, 8)]


def test_mlflow_keeps_children_under_their_parent(mlflow: Any, tmp_path: Path) -> None:
    """A sweep of a hundred trials fills the list of experiments; a resumed one doubles it."""
    folder, child = tmp_path / "sweep", tmp_path / "sweep" / "beta=0,seed=0"
    child.mkdir(parents=True)
    for _ in range(2):
        with tracked("mlflow", folder, {"space": {"name": "s"}}, kind="sweep") as sweep:
            trial = tracked("mlflow", child, {}, parent=sweep.run)
            with suppress(SystemExit), trial as tracker:
                tracker(ENTRY)
                raise SystemExit
            sweep.log({"best": {"accuracy": 0.7}}, 1)
    experiment = mlflow.get_experiment_by_name("newsbert_ray").experiment_id
    runs = {run.info.run_name: run for run in mlflow.search_runs([experiment])}
    assert set(runs) == {"sweep", "beta=0,seed=0"}
    assert sweep.run is not None
    assert runs["beta=0,seed=0"].data.tags["mlflow.parentRunId"] == sweep.run.id
    assert runs["beta=0,seed=0"].data.metrics == {"epoch": 1.0, "validation/student/accuracy": 0.7}
    assert [runs[name].info.status for name in ("sweep", "beta=0,seed=0")] == ["FINISHED", "KILLED"]
    assert runs["sweep"].data.params == {"space.name": "s"}


def test_wandb_groups_a_sweeps_trials(wandb: Callable[[], list[Path]], tmp_path: Path) -> None:
    """Offline, without an account: a run for the sweep and one for each trial, which share a group."""
    child = tmp_path / "sweep" / "beta=0,seed=0"
    child.mkdir(parents=True)
    with tracked("wandb", tmp_path / "sweep", {"epochs": 2}, kind="sweep") as sweep:
        with tracked("wandb", child, {}, parent=sweep.run, kind="trial") as trial:
            trial(ENTRY)
        sweep.log({"best": {"accuracy": 0.7}}, 1)
    assert sweep.run
    assert trial.run
    files = {path.name.rpartition("-")[2]: next(path.glob("run-*.wandb")) for path in wandb()}
    assert files.keys() == {sweep.run.id, trial.run.id}
    written = {name: file.read_bytes() for name, file in files.items()}
    assert all(sweep.run.id.encode() in content for content in written.values())  # the group
    assert b"validation/student/accuracy" in written[trial.run.id]


def test_a_run_is_tracked_from_its_first_step_to_its_test(mlflow: Any, make_settings: MakeSettings) -> None:
    """`--track mlflow` on a real run: settings, curves, the test split, and the end."""
    settings = make_settings(track="mlflow")
    record = newsbert_ray.train(settings, quiet=True)
    run = TrackedRun(**json.loads((Path(settings.out) / FILE).read_text()))
    found = mlflow.get_run(run.id)
    assert found.info.status == "FINISHED"
    assert found.data.params["distill.beta"] == str(settings.distill.beta)
    assert found.data.metrics["test/student/accuracy"] == record.metrics["test"]["student"]["accuracy"]
    curve = mlflow.get_metric_history(run.id, "validation/student/accuracy")
    assert [point.step for point in curve] == [entry["step"] for entry in record.curve]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_sweep_is_the_parent_of_its_trials(
    mlflow: Any, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`sweep --track mlflow`: trials run in other processes and folders, and must find store and parent."""
    monkeypatch.setattr("newsbert_ray.reporting.report.report", lambda folders, *, out: [])
    file, out = tmp_path / "space.yaml", tmp_path / "sweep"
    file.write_text(
        f"name: tracked\nsettings: {{data: {shards}, teacher: scratch, epochs: 1, batch_size: 32, "
        "student.layers: 1, scratch: {layers: 2, hidden: 16, heads: 2, feed_forward: 32}}\n"
        "space:\n  distill.beta: {grid: [0.0, 0.2]}\n"
    )
    result = newsbert_ray.sweep(file, out=out, track="mlflow")
    parent = TrackedRun(**json.loads((out / FILE).read_text())).id
    experiment = mlflow.get_experiment_by_name("newsbert_ray").experiment_id
    children = mlflow.search_runs([experiment], filter_string=f"tags.`mlflow.parentRunId` = '{parent}'")
    assert {run.info.run_name for run in children} == {t.name for p in result.points for t in p.trials}
    assert {run.info.status for run in children} == {"FINISHED"}
    assert result.best is not None
    best = mlflow.get_run(parent).data.metrics["best/validation/student/accuracy"]
    assert best == pytest.approx(result.best.means[0])
