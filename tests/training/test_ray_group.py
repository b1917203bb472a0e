"""Several workers: the same result as one, after any death, and nothing left in the cluster."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from newsbert_ray.config import SettingsError, TrainSettings
from newsbert_ray.data.batches import Order
from newsbert_ray.data.reading import TrainingSchedule, read_updates
from newsbert_ray.data.shards import read_manifest
from newsbert_ray.model.saved import CHECKPOINTS
from newsbert_ray.ray_session import ray_session
from newsbert_ray.record import METRICS, read_entries, read_record
from newsbert_ray.training import ray_group
from newsbert_ray.training.checkpoint import step_folders
from newsbert_ray.training.ray_group import GroupError, is_idle, rank_zero_lock
from newsbert_ray.training.run import train


def test_a_group_waits_for_the_workers_of_an_earlier_start(tmp_path: Path) -> None:
    """Workers outlive a killed driver for seconds: two groups in one folder would mix their checkpoints."""
    order: list[str] = []
    inside = threading.Event()

    def earlier() -> None:
        with rank_zero_lock(tmp_path):
            inside.set()
            time.sleep(0.4)
            order.append("earlier ends")

    thread = threading.Thread(target=earlier)
    thread.start()
    inside.wait()
    assert not is_idle(tmp_path)
    with rank_zero_lock(tmp_path):
        order.append("next begins")
    thread.join()
    assert order == ["earlier ends", "next begins"]
    assert is_idle(tmp_path)


def test_workers_that_never_end_are_an_error(tmp_path: Path) -> None:
    """A start that waits for ever without a message looks like a hang."""
    with (
        rank_zero_lock(tmp_path),
        pytest.raises(GroupError, match=rf"{tmp_path}: workers of an earlier start .* after 0.3 s"),
        rank_zero_lock(tmp_path, wait_seconds=0.3),
    ):
        pass


def test_a_folder_without_a_group_is_idle(tmp_path: Path) -> None:
    """A trial that ended before its workers began must not be waited for."""
    assert is_idle(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    """One private cluster for this module; being inside it makes even one worker a group."""
    with ray_session(cpus=3, dashboard=True):
        yield


def settings(shards: Path, folder: Path, **values: Any) -> TrainSettings:
    """A small run without dropout, so that it may be divided among workers."""
    return TrainSettings.model_validate(
        {
            "data": str(shards),
            "teacher": "scratch",
            "out": str(folder),
            "scratch": {"layers": 4, "hidden": 16, "heads": 2, "feed_forward": 32},
            "model": {"dropout": 0.0},
            "learning_rate": 1e-3,
            "precision": "fp32",
            "epochs": 2,
            "batch_size": 31,
            "threads": 1,
            "log_every": 1,
            "checkpoint": {"every_steps": 2},
            **values,
        }
    )


def student(folder: Path) -> dict[str, torch.Tensor]:
    """The exported weights."""
    return {
        **load_file(folder / "student" / "model.safetensors"),
        **load_file(folder / "student" / "top.safetensors"),
    }


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_ray_data_streams_the_same_batches(shards: Path, session: None) -> None:
    """With Ray's own order of batches a group's run could be neither repeated nor resumed."""
    from newsbert_ray.data.stream import stream_updates

    order, manifest = Order(7, 20, 1, 2, 2), read_manifest(shards)
    of_titles = TrainSettings(data=str(shards), teacher="scratch", out="run", epochs=2)
    changes = {"task": "recommendation", "recommendation": {"npratio": 3}}
    of_clicks = TrainSettings.model_validate(of_titles.model_dump() | changes)
    titles, clicks = (TrainingSchedule(one, manifest, order) for one in (of_titles, of_clicks))
    order = replace(order, batch_size=8, beside=12)  # texts without labels
    mixed = [
        TrainingSchedule(one.model_copy(update={"train_rows": rows}), manifest, order)
        for one, rows in ((of_titles, 60), (of_clicks, 20))
    ]
    for schedule, done in ((titles, 0), (titles, 5), (clicks, 0), (clicks, 2), (mixed[0], 3), (mixed[1], 1)):
        direct, streamed = list(read_updates(schedule, done=done)), list(stream_updates(schedule, done=done))
        assert len(direct) == len(streamed) > 0
        for a, b in zip(direct, streamed, strict=True):
            assert (a.step, a.epoch, len(a.parts)) == (b.step, b.epoch, len(b.parts))
            for left, right in zip(a.parts, b.parts, strict=True):
                for ours, theirs in zip(left.buckets, right.buckets, strict=True):
                    assert torch.equal(ours.input_ids, theirs.input_ids)
                for field in fields(left.target):
                    values = (getattr(part.target, field.name) for part in (left, right))
                    assert torch.equal(*values)
                assert (left.rows, left.tokens, left.weight) == (right.rows, right.tokens, right.weight)
                assert left.labelled == right.labelled


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_two_workers_equal_one_and_survive_a_kill(shards: Path, session: None, tmp_path: Path) -> None:
    """Neither the number of workers nor a worker's death may change the result (1e-6, fp32, same batch)."""
    train(settings(shards, tmp_path / "one"), quiet=True)
    killed: list[int] = []
    open_to_others: list[str] = []
    killer = threading.Thread(
        target=kill_a_worker, args=(tmp_path / "two", killed, open_to_others), daemon=True
    )
    killer.start()
    record = train(settings(shards, tmp_path / "two", workers=2))
    killer.join()
    assert len(killed) == 1
    assert not open_to_others, open_to_others
    assert record.hardware["workers"] == 2
    one, two = student(tmp_path / "one"), student(tmp_path / "two")
    largest = max(float((one[name] - two[name]).abs().max()) for name in one)
    assert largest <= 1e-6 * max(1.0, max(float(one[name].abs().max()) for name in one)), largest
    for model, scores in read_record(tmp_path / "one").metrics["test"].items():
        assert record.metrics["test"][model] == pytest.approx(scores)
    steps = [e["step"] for e in read_entries(tmp_path / "two" / METRICS) if e["kind"] == "log"]
    assert steps == list(range(1, record.steps + 1))


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_workers_divide_clicks(
    shards: Path, session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers of recommendation, streamed by Ray Data, must give the student and metrics of one."""
    monkeypatch.setattr(ray_group, "MAX_WINDOWS_READ", 0)
    # Adam divides by a gradient's size: with a small epsilon rounding noise makes a whole step.
    values: dict[str, Any] = {"task": "recommendation", "epochs": 1, "batch_size": 16}
    values |= {"optimizer": {"epsilon": 1e-3}}
    train(settings(shards, tmp_path / "one", **values), quiet=True)
    record = train(settings(shards, tmp_path / "two", workers=2, **values))
    one, two = student(tmp_path / "one"), student(tmp_path / "two")
    largest = max(float((one[name] - two[name]).abs().max()) for name in one)
    assert largest <= 1e-6 * max(1.0, max(float(one[name].abs().max()) for name in one)), largest
    for model, scores in read_record(tmp_path / "one").metrics["test"].items():
        assert record.metrics["test"][model] == pytest.approx(scores)


def kill_a_worker(folder: Path, killed: list[int], open_to_others: list[str]) -> None:
    """SIGKILL one Train worker of this session after the run's fourth step; list open ports before that."""
    import psutil

    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        entries = [e for e in read_entries(folder / METRICS) if e["kind"] == "log"]
        if entries and entries[-1]["step"] >= 4:
            workers = [
                child
                for child in psutil.Process().children(recursive=True)
                if "RayTrainWorker" in " ".join(child.cmdline())
            ]
            open_to_others += listeners_beyond_loopback()
            os.kill(workers[0].pid, signal.SIGKILL)
            killed.append(workers[0].pid)
            return
        time.sleep(0.02)


def listeners_beyond_loopback() -> list[str]:
    """What this process's descendants listen on besides the loopback."""
    import psutil

    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            found += [
                f"{child.name()} {c.laddr.ip}:{c.laddr.port}"
                for c in child.net_connections(kind="inet")
                if c.status == psutil.CONN_LISTEN
                and c.laddr.ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
            ]
    return found


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_one_worker_in_a_cluster_is_a_group(
    shards: Path, session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job's driver runs on the head, but the GPUs are on other nodes."""
    seen: list[dict[str, Any]] = []
    record = train(settings(shards, tmp_path / "run", epochs=1), report=seen.append)
    printed = capsys.readouterr().out
    assert "Ray Train group of 1" in printed
    assert "student layer <- teacher layers" in printed
    assert [entry["kind"] for entry in seen] == ["evaluation"]
    assert record.curve[0]["validation"] == seen[0]["validation"]


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_an_interrupted_group_releases_everything(
    shards: Path, session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After Ctrl-C or Tune's stop in a report, a group that is left would hold its CPUs and keep writing."""
    import ray
    from ray._private.state import actors

    def interrupt(_: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(settings(shards, folder, workers=2), report=interrupt, quiet=True)
    assert is_idle(folder)
    names = {one["ActorClassName"] for one in actors().values() if one["State"] != "DEAD"}
    assert not names & {"TrainController", "RayTrainWorker", "PlacementGroupCleaner"}
    assert {one["state"] for one in ray.util.placement_group_table().values()} == {"REMOVED"}
    assert step_folders(folder / CHECKPOINTS)
    assert capsys.readouterr().out == ""


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_an_error_that_would_come_again_ends_the_run(shards: Path, session: None, tmp_path: Path) -> None:
    """A loss that is not finite would be the same after three more starts of half a minute."""
    with pytest.raises(GroupError, match=r"group failed: the loss is not finite at step \d+ .*learning_rate"):
        train(settings(shards, tmp_path / "run", workers=2, learning_rate=1e30), quiet=True)
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_more_workers_than_the_cluster_has(shards: Path, session: None, tmp_path: Path) -> None:
    """Ray would wait for CPUs for ever, without a message."""
    with pytest.raises(SettingsError, match="the cluster has 3 CPUs"):
        train(settings(shards, tmp_path / "run", workers=8))
