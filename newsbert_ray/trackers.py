"""Sends a run's numbers to MLflow or Weights & Biases; a sweep is the parent of its trials' runs.

Both read their usual environment variables (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, WANDB_PROJECT,
WANDB_MODE, ...).
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from newsbert_ray.files import first_line, write_json
from newsbert_ray.secrets import mask_fields
from newsbert_ray.settings import SettingsError, flatten

TrackerName = Literal["mlflow", "wandb"]
FILE = "tracker.json"
"""In a run's folder: its run in the tracker, which a resume continues."""
PROJECT = "newsbert_ray"
"""Experiment or project, where the environment names no other."""


class TrackedRun(NamedTuple):
    """A run in a tracker: which tracker, its store (MLflow's URI, W&B's folder), and the run's id there."""

    tracker: TrackerName
    store: str
    id: str


def require_tracker(tracker: TrackerName | None) -> None:
    """Raise SettingsError where the tracker's package is not installed."""
    if tracker and find_spec(tracker) is None:
        raise SettingsError(f"track = {tracker}: it is not installed here; pip install {tracker}")


class Tracker:
    """Receives the entries of a training loop; does nothing without a run. A tracker that fails after its
    start is given up with one line: it must not end a run."""

    def __init__(self, run: TrackedRun | None = None, send: Callable[..., object] | None = None) -> None:
        """`send(numbers, step)` sends numbers by name."""
        self.run, self._send = run, send

    def __call__(self, entry: Mapping[str, Any]) -> None:
        """Send the numbers of a log entry or an evaluation."""
        if entry["kind"] in ("log", "evaluation"):
            self.log({k: v for k, v in entry.items() if k not in ("step", "steps", "epochs")}, entry["step"])

    def log(self, numbers: Mapping[str, Any], step: int) -> None:
        """Send the numbers in a nested mapping, named as in TensorBoard (`validation/student/accuracy`)."""
        if self.run and self._send:
            flat = flatten(numbers).items()
            try:
                self._send({name.replace(".", "/"): v for name, v in flat if type(v) in (int, float)}, step)
            except Exception as error:  # the tracker's own, or its server's
                self._send = None
                print(f"{self.run.tracker}: {first_line(error)}; no longer tracked", file=sys.stderr)


@contextmanager
def tracked(
    tracker: TrackerName | None,
    folder: Path,
    values: Mapping[str, Any],
    *,
    parent: TrackedRun | None = None,
    kind: str = "train",
) -> Iterator[Tracker]:
    """Track a run for as long as the block runs; a resumed one is continued. `folder`, the run's or sweep's,
    gives the name; `values` are settings to show, secrets masked; `parent` is the sweep's run, `kind` W&B's
    job type. SettingsError: the tracker is not installed, or cannot be reached."""
    if tracker is None:
        yield Tracker()
        return
    require_tracker(tracker)
    known = TrackedRun(tracker, parent.store if parent else "", "")
    with suppress(OSError, ValueError, TypeError):  # no earlier start
        before = TrackedRun(**json.loads((folder / FILE).read_text(encoding="utf-8")))
        known = before if before.tracker == tracker else known
    try:
        connect = _mlflow if tracker == "mlflow" else _wandb
        run, send, end = connect(known, parent, folder.name, mask_fields(flatten(values)), kind)
    except Exception as error:  # each tracker has its own
        raise SettingsError(f"track = {tracker}: cannot be opened ({first_line(error)})") from error
    write_json(folder / FILE, run._asdict())
    state = "FAILED"
    try:
        yield Tracker(run, send)
        state = "FINISHED"
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, or stopped early by a sweep
        state = "KILLED"
        raise
    finally:
        Tracker(run, lambda *_: end(state)).log({}, 0)


Connection = tuple[TrackedRun, Callable[..., object], Callable[[str], object]]


def _mlflow(
    known: TrackedRun, parent: TrackedRun | None, name: str, values: Mapping[str, Any], kind: str
) -> Connection:
    from mlflow import MlflowClient, get_tracking_uri
    from mlflow.entities import Metric, Param

    store, run = known.store or get_tracking_uri(), known.id
    client = MlflowClient(tracking_uri=store)
    if run:
        client.update_run(run, status="RUNNING")
    else:
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        existing = client.get_experiment_by_name(project)
        experiment = existing.experiment_id if existing else client.create_experiment(project)
        tags = {"newsbert_ray.kind": kind} | ({"mlflow.parentRunId": parent.id} if parent else {})
        run = client.create_run(experiment, run_name=name, tags=tags).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in values.items()]
        for first in range(0, len(params), 100):  # MLflow's limit
            client.log_batch(run, params=params[first : first + 100])

    def send(numbers: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        client.log_batch(run, metrics=[Metric(name, value, now, step) for name, value in numbers.items()])

    return TrackedRun("mlflow", store, run), send, lambda state: client.set_terminated(run, state)


def _wandb(
    known: TrackedRun, parent: TrackedRun | None, name: str, values: Mapping[str, Any], kind: str
) -> Connection:
    import wandb

    store = known.store or os.path.abspath(os.environ.get("WANDB_DIR", "."))
    own = known.id or secrets.token_hex(4)
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=name,
        id=own,
        resume="allow",
        dir=store,
        group=parent.id if parent else own if kind == "sweep" else None,
        job_type=kind,
        config=dict(values),
        reinit="create_new",  # an actor runs one trial after the other
        settings=wandb.Settings(console="off"),  # ours is what a person reads
    )

    def end(state: str) -> None:
        run.finish(exit_code=int(state == "FAILED"))

    return TrackedRun("wandb", store, own), lambda numbers, step: run.log(numbers, step=step), end
