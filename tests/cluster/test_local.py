"""Sweeps on real clusters on this machine: autoscaled nodes; failures of processes, nodes and the head."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster.local import LocalCluster, descendants
from newsbert_ray.record import METRICS, RECORD, read_entries, read_record
from newsbert_ray.reporting.sweep_figures import node_and_trial_steps
from newsbert_ray.telemetry import read_events
from tests.benchmarks.soak_cluster import Soak, check, one_fault, running
from tests.test_ray_session import LOOPBACK, listeners

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

SPACE = """\
name: small
settings:
  teacher: scratch
  scratch: {layers: 2, hidden: 32, heads: 2, feed_forward: 64}
  epochs: EPOCHS
  batch_size: 8
  log_every: 1
  checkpoint: {every_steps: 10}
space:
  distill.beta: {grid: [0.0, 0.2]}
  student.layers: {grid: [1, 2]}
"""


def sweep_command(folder: Path, shards: Path, *, epochs: int) -> list[str]:
    """The sweep's command without --out."""
    (folder / "small.yaml").write_text(SPACE.replace("EPOCHS", str(epochs)), encoding="utf-8")
    cli = [sys.executable, "-m", "newsbert_ray.cli"]
    return [*cli, "sweep", str(folder / "small.yaml"), "--data", str(shards)]


def run(words: list[str], environment: Mapping[str, str], *, seconds: float = 300) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(
        words, env={**os.environ, **environment}, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_a_sweep_starts_nodes_and_releases_them(shards: Path, tmp_path: Path) -> None:
    """Without nodes the sweep would wait for ever; nodes that stay after the sweep cost money."""
    with LocalCluster(cpus=0, autoscale=2, idle_seconds=4) as cluster:
        out, sent = tmp_path / "sweep", tmp_path / "sent"
        sent.mkdir()
        python, module, name, *sweep = sweep_command(sent, shards, epochs=3)
        # The job's files are unpacked on each new node while the other nodes use theirs.
        words = [python, module, name, "submit", "--working_dir", str(sent), "--", *sweep]
        output = run([*words, "--out", str(out), "--concurrency", "2"], cluster.environment)
        assert "2 trials at once" in output
        assert "died" not in output
        addresses = listeners([cluster.head.process.pid, *descendants(cluster.head.process.pid)])
        assert addresses
        assert addresses <= LOOPBACK
        events = read_events(out)
        nodes, trials = (max(count for _, count in steps) for steps in node_and_trial_steps(events))
        assert (nodes, trials) == (3, 2), "two nodes and the head"
        assert len(list(out.glob(f"trials/*/{RECORD}"))) == 4
        assert (out / "report" / "nodes_and_trials.png").exists()
        end = time.monotonic() + 60
        while (left := raylets(cluster)) > 1 and time.monotonic() < end:
            time.sleep(0.5)
        assert left == 1, "only the head is left"


def raylets(cluster: LocalCluster) -> int:
    """Number of nodes that are running."""
    commands = (Path(f"/proc/{pid}/cmdline") for pid in descendants(cluster.head.process.pid))
    return sum(path.exists() and b"raylet/raylet" in path.read_bytes() for path in commands)


def test_failures_do_not_change_a_sweep(shards: Path, tmp_path: Path) -> None:
    """A dead process, node or head, or a preemption notice, loses no trial and changes none."""
    command = sweep_command(tmp_path, shards, epochs=28)
    run([*command, "--out", str(tmp_path / "alone")], {})
    with LocalCluster(cpus=0) as cluster:
        soak = Soak(cluster, command, tmp_path / "sweep", group=False)
        for kind in ("trial", "spot", "head", "node"):
            wait_for_trials(soak)
            if soak.ended:
                break
            row = one_fault(soak, kind)
            assert row.epochs_lost == 0, str(row)
            if kind == "spot":  # the next fault kills the driver, which must have missed the node before
                wait_for_event(soak, "node_gone")
        assert soak.driver.wait(300) == 0, (tmp_path / "soak.log").read_text(encoding="utf-8")[-3000:]
    check(tmp_path / "sweep", tmp_path / "alone", exact=True)
    seen = {event["event"] for event in read_events(tmp_path / "sweep")}
    assert {"trial_broke_off", "trial_retry", "node_gone", "resume"} <= seen


def wait_for_event(soak: Soak, name: str) -> None:
    """Wait until the sweep has logged an event, or has ended."""
    end = time.monotonic() + 60
    while not soak.ended and time.monotonic() < end:
        if name in {event["event"] for event in read_events(soak.out)}:
            return
        time.sleep(0.2)


def wait_for_trials(soak: Soak) -> None:
    """Wait until a trial has trained a few steps, or the sweep has ended."""
    end = time.monotonic() + 120
    while not running(soak.out) and not soak.ended and time.monotonic() < end:
        time.sleep(0.2)
    time.sleep(1)


def test_a_group_continues_with_fewer_workers_and_the_same_result(shards: Path, tmp_path: Path) -> None:
    """A group that lost a node must not wait for ever, nor train on different batches."""
    words = [sys.executable, "-m", "newsbert_ray.cli", "train", "--data", str(shards), "--teacher", "scratch"]
    words += ["--scratch.layers", "2", "--scratch.hidden", "32", "--scratch.heads", "2", "--epochs", "2"]
    words += ["--batch_size", "8", "--log_every", "1", "--threads", "1", "--checkpoint.every_steps", "10"]
    words += ["--workers", "2", "--min_workers", "1", "--precision", "fp32"]
    with LocalCluster(cpus=0) as cluster:
        nodes = [cluster.add_node(cpus=1) for _ in range(2)]
        run([*words, "--out", str(tmp_path / "whole")], cluster.environment)
        out = tmp_path / "broken"
        group = subprocess.Popen([*words, "--out", str(out)], env={**os.environ, **cluster.environment})
        end = time.monotonic() + 120
        while time.monotonic() < end and all(entry["step"] < 12 for entry in read_entries(out / METRICS)):
            time.sleep(0.05)
        cluster.kill_node(nodes[0])
        assert group.wait(300) == 0
    assert read_record(out).hardware["workers"] == 1, "the remaining node finished the run"
    assert any(event["event"] == "resume" for event in read_events(out)), "from a checkpoint"
    ours, theirs = (
        load_file(folder / "student" / "model.safetensors") for folder in (out, tmp_path / "whole")
    )
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=2e-5)
