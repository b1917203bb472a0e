"""The loop's checkpoint triggers, and what it writes before a machine is taken away."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from newsbert_ray.data.batches import Batch
from newsbert_ray.data.reading import Update, World, make_schedule, read_updates
from newsbert_ray.data.shards import read_manifest
from newsbert_ray.model.assemble import assemble_pair
from newsbert_ray.training.checkpoint import Progress, resume, step_folders
from newsbert_ray.training.loop import (
    READ_AHEAD,
    TRIGGER_STEPS,
    CheckpointTriggers,
    LossError,
    PreemptedError,
    TrainingLoop,
    read_ahead,
)
from newsbert_ray.training.run import train
from newsbert_ray.training.step import Learner, build_learner, train_step

if TYPE_CHECKING:
    from tests.conftest import MakeSettings


class Pretended(World):
    """A worker of two whose partner sends the same values."""

    def sum_values(self, values: Mapping[str, float]) -> dict[str, float]:
        return {name: 2 * value for name, value in values.items()}


def test_timer_starts_again_after_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timer that is not restarted writes a checkpoint at every step."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    triggers = CheckpointTriggers(1.0, World(), lambda: "")
    now[0] = 59.0
    assert triggers.check(1) == (False, "")
    now[0] = 60.0
    assert triggers.check(2) == (True, "")
    triggers.restart_timer()
    assert triggers.check(3) == (False, "")
    assert CheckpointTriggers(None, World(), lambda: "").check(1) == (False, "")


def test_a_group_exchanges_triggers_every_few_steps() -> None:
    """An exchange at every step would cost more than it saves; workers that disagree would hang."""
    triggers = CheckpointTriggers(None, Pretended(0, 2), lambda: "preempted")
    preempted = [triggers.check(step)[1] for step in range(1, 2 * TRIGGER_STEPS + 1)]
    assert [step for step, value in enumerate(preempted, 1) if value] == [TRIGGER_STEPS, 2 * TRIGGER_STEPS]


@pytest.mark.parametrize("reason", ["preempted", "stopped"])
def test_a_worker_that_has_to_end_leaves_its_last_step(
    make_settings: MakeSettings, tmp_path: Path, reason: str
) -> None:
    """Without a checkpoint of its own, a spot machine's warning would be of no use."""
    settings = make_settings()
    manifest = read_manifest(settings.data)
    schedule = make_schedule(settings, manifest)
    learner = build_learner(assemble_pair(settings, manifest), settings, total_steps=schedule.total_steps)
    entries: list[dict[str, Any]] = []
    progress = Progress()
    loop = TrainingLoop(
        learner,
        schedule,
        progress,
        World(),
        evaluate=dict,
        report=entries.append,
        checkpoints=tmp_path,
        leaving=lambda: reason if progress.step == 3 else "",
    )
    with pytest.raises(PreemptedError, match="step 3 is in a checkpoint"):
        loop.run(read_updates(schedule))
    assert entries[-1] == {"kind": "checkpoint", "step": 3, "preempted": reason == "preempted"}
    assert [path.name for path in step_folders(tmp_path)] == ["step-000000003"]
    assert resume(tmp_path, learner, say=lambda _: None).step == 3


@pytest.mark.parametrize("log_every", [2, 100])
def test_a_loss_that_is_not_finite_stops_the_run(
    make_settings: MakeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    """It is noticed at the next log entry or checkpoint; NaN weights in a checkpoint would spoil a resume."""
    settings = make_settings(log_every=log_every, **{"checkpoint.every_steps": 5})
    manifest = read_manifest(settings.data)
    schedule = make_schedule(settings, manifest)
    learner = build_learner(assemble_pair(settings, manifest), settings, total_steps=schedule.total_steps)
    entries: list[dict[str, Any]] = []

    def spoilt_step(learner: Learner, parts: Sequence[Batch], *, step: int, **options: Any) -> Any:
        if step == 3:
            with torch.no_grad():
                learner.pair.get_parameter("top.head.dense.bias")[0] = float("nan")
        return train_step(learner, parts, step=step, **options)

    monkeypatch.setattr("newsbert_ray.training.loop.train_step", spoilt_step)
    loop = TrainingLoop(
        learner,
        schedule,
        Progress(),
        World(),
        evaluate=dict,
        report=entries.append,
        checkpoints=tmp_path,
        leaving=lambda: "",
    )
    with pytest.raises(LossError, match=r"not finite at step 3 \(.*total nan.*lower learning_rate"):
        loop.run(read_updates(schedule))
    logged = [entry["step"] for entry in entries if entry["kind"] == "log"]
    assert logged == ([1, 2] if log_every == 2 else [1])
    assert loop.progress.step == (4 if log_every == 2 else 5)
    assert list(tmp_path.iterdir()) == []


def test_evaluations_without_checkpoints(make_settings: MakeSettings) -> None:
    """A short run that is evaluated often would spend its time on checkpoints; the result is the same."""
    curves, steps = [], []
    for at_evaluation in (True, False):
        out = {"out": f"{make_settings().out}-{at_evaluation}"}
        checkpoint = {"at_evaluation": at_evaluation, "every_steps": 7}
        settings = make_settings(**out, evaluate_every=5, checkpoint=checkpoint, epochs=1)
        entries: list[Any] = []

        def look(entry: dict[str, Any], folder: Path = Path(out["out"]), seen: Any = entries) -> None:
            seen.append([path.name[-2:] for path in step_folders(folder / "checkpoints")])

        curves.append(train(settings, quiet=True, report=look).curve)
        steps.append(entries[-1])
    assert curves[0] == curves[1]
    assert steps[1] == ["07"]
    assert len(steps[0]) == 2


def test_reading_ahead_keeps_order_bounds_and_errors(make_settings: MakeSettings) -> None:
    """A run must get the same updates, hold few of them, and stop with what reading raised."""
    schedule = make_schedule(make_settings(), read_manifest(make_settings().data))
    read: list[int] = []

    def updates(fails: int) -> Iterator[Update]:
        for update in read_updates(schedule):
            read.append(update.step)
            if update.step == fails:
                raise OSError("shard is gone")
            yield update

    ahead = read_ahead(updates(-1), torch.device("cpu"))
    for expected in read_updates(schedule):
        found = next(ahead)
        assert found.step == expected.step
        assert torch.equal(found.parts[0].buckets[0].input_ids, expected.parts[0].buckets[0].input_ids)
        assert max(read) <= found.step + READ_AHEAD + 2
    with pytest.raises(StopIteration):
        next(ahead)
    ahead = read_ahead(updates(3), torch.device("cpu"))
    assert [next(ahead).step, next(ahead).step] == [1, 2]
    with pytest.raises(OSError, match="shard is gone"):
        next(ahead)


def test_the_reader_ends_with_the_run(make_settings: MakeSettings) -> None:
    """A thread that is left behind would read a trial's shards during the next one."""
    schedule = make_schedule(make_settings(), read_manifest(make_settings().data))
    ahead = read_ahead(read_updates(schedule), torch.device("cpu"))
    next(ahead)
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]
