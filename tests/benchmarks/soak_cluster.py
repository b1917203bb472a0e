"""Breaks a local cluster at random during a sweep and checks that no trial is lost, repeated or changed.

    python -m tests.benchmarks.soak_cluster --faults 20 --seed 1 --news 5000 --epochs 6   # make soak

A real head and two nodes on this machine (cluster/local.py) run a sweep. Every few seconds one of these
fails: a trial's process, a node in mid-epoch, a node after a preemption notice, the sweep's driver, the
head with all its processes, a worker of a group. What failed is replaced as on a real cluster: another node
starts, the job is submitted again with --resume. For each fault a line is printed: what failed, the steps
that the running trials had to repeat, the seconds until they were back at the same step, and finished
epochs that were lost (goal: none). At the end every trial must have finished once, with the weights of the
same sweep without faults: bit for bit, and to 2e-5 for groups.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from cluster.local import LocalCluster, Node, descendants
from newsbert_ray.record import METRICS, RECORD, read_entries

SPACE = """\
name: soak
settings:
  teacher: scratch
  scratch: {{layers: 2, hidden: 32, heads: 2, feed_forward: 64}}
  model: {{dropout: 0.1}}
  epochs: {epochs}
  learning_rate: 1e-3
  log_every: 1
  workers: {workers}
  min_workers: 1
  checkpoint: {{every_steps: 20}}
space:
  distill.beta: {{grid: [0.0, 0.1, 0.2, 0.3]}}
  student.layers: {{grid: [1, 2]}}
"""
KINDS = ("trial", "node", "spot", "driver", "head")
PATIENCE = 240.0
"""Longest time for the running trials to get back to their step before a fault."""


@dataclass
class Row:
    """A fault: what failed, and what it cost."""

    kind: str
    running: int
    repeated: int
    seconds: float
    epochs_lost: int

    def __str__(self) -> str:
        return (
            f"{self.kind:<8} {self.running} running  {self.repeated:4d} steps repeated  "
            f"{self.seconds:5.1f} s to be there again  {self.epochs_lost} finished epochs lost"
        )


class Soak:
    """A sweep on a cluster with repeated faults."""

    def __init__(self, cluster: LocalCluster, command: list[str], out: Path, *, group: bool) -> None:
        self.cluster, self.out, self.group = cluster, out, group
        self._command = command
        self.nodes: list[Node] = [cluster.add_node(cpus=1) for _ in range(2)]
        self.driver = self._submit()

    @property
    def ended(self) -> bool:
        """Whether the sweep has ended by itself."""
        return self.driver.poll() is not None

    def hit(self, kind: str) -> None:
        """Cause a fault, and replace what a cluster would replace."""
        if kind == "trial":
            wanted = b"ray::RayTrainWorker" if self.group else b"ray::ImplicitFunc"
            pids = [
                pid for node in self.nodes for pid in descendants(node.process.pid) if wanted in _command(pid)
            ]
            for pid in pids[:1]:
                os.kill(pid, signal.SIGKILL)
        elif kind in ("node", "spot"):
            node = self.nodes.pop(0)
            if kind == "spot":
                self.cluster.drain_node(node, seconds=10)
                time.sleep(6)
            self.cluster.kill_node(node)
            self.nodes.append(self.cluster.add_node(cpus=1))
        elif kind == "driver":
            self.driver.kill()
            self.driver.wait()
            self.driver = self._submit()
        elif kind == "head":
            self.cluster.restart_head()
            self.driver.wait(PATIENCE)
            self.nodes = [self.cluster.add_node(cpus=1) for _ in range(2)]
            self.driver = self._submit()

    def _submit(self) -> subprocess.Popen[bytes]:
        log = (self.out.parent / "soak.log").open("ab")
        environment = {**os.environ, **self.cluster.environment}
        words = [*self._command, "--out", str(self.out), "--concurrency", "2", "--resume"]
        with log:
            return subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)


def one_fault(soak: Soak, kind: str) -> Row:
    """Cause a fault, then wait until every running trial is past its earlier step."""
    before = {folder: state(folder) for folder in running(soak.out)}
    began = time.monotonic()
    soak.hit(kind)
    least = {folder: steps for folder, (steps, _) in before.items()}
    waiting = set(before)
    lost = 0
    while waiting and time.monotonic() - began < PATIENCE and not soak.ended:
        for folder in list(waiting):
            steps, epochs = state(folder)
            least[folder] = min(least[folder], steps)
            if (folder / RECORD).exists() or steps > before[folder][0]:
                lost += max(0, before[folder][1] - epochs)
                waiting.remove(folder)
        time.sleep(0.1)
    repeated = sum(before[folder][0] - least[folder] for folder in before)
    return Row(kind, len(before), repeated, time.monotonic() - began, lost)


def running(out: Path) -> list[Path]:
    """Trials that have started and not ended."""
    return [path.parent for path in out.glob(f"trials/*/{METRICS}") if not (path.parent / RECORD).exists()]


def state(folder: Path) -> tuple[int, int]:
    """The last step that the trial has logged, and its finished epochs."""
    entries = read_entries(folder / METRICS)
    logged = max((entry["step"] for entry in entries), default=0)
    return logged, sum(entry["kind"] == "evaluation" for entry in entries)


def check(out: Path, alone: Path, *, exact: bool) -> None:
    """Check that every trial finished once, with the weights of the undisturbed sweep."""
    records, twins = sorted(out.glob(f"trials/*/{RECORD}")), sorted(alone.glob(f"trials/*/{RECORD}"))
    assert [r.parent.name for r in records] == [t.parent.name for t in twins], "trials lost or doubled"
    largest = 0.0
    for record, twin in zip(records, twins, strict=True):
        steps = [e["step"] for e in read_entries(record.parent / METRICS) if e["kind"] == "log"]
        assert steps == list(range(1, len(steps) + 1)), f"{record.parent.name}: steps {steps}"
        ours, theirs = (load_file(one.parent / "student/model.safetensors") for one in (record, twin))
        largest = max(largest, *(float((ours[n] - theirs[n]).abs().max()) for n in ours))
        same = all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert same or not exact, f"{record.parent.name}: other weights than undisturbed ({largest:g})"
    summary = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    print(
        f"{len(records)} trials, each once ({summary['state']}); largest difference of a student's weight "
        f"from the sweep left alone: {largest:g}"
    )
    assert largest <= 2e-5


def main() -> None:
    """Run the soak and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--group", action="store_true", help="trials are elastic groups of up to two workers")
    parser.add_argument("--news", type=int, default=6000, help="titles of the corpus: how long a trial takes")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("soak"))
    words = parser.parse_args()
    dice = random.Random(words.seed)
    out = words.out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    shards = prepare(out, words.news)
    file = out / "soak.yaml"
    file.write_text(SPACE.format(epochs=words.epochs, workers=2 if words.group else 1), encoding="utf-8")
    command = [*_CLI, "sweep", str(file), "--data", str(shards)]
    print("the sweep left alone ...", flush=True)
    subprocess.run([*command, "--out", str(out / "alone")], check=True, stdout=subprocess.DEVNULL)
    number = 0
    with LocalCluster(cpus=0) as cluster:
        soak = Soak(cluster, command, out / "sweep", group=words.group)
        while number < words.faults and not soak.ended:
            time.sleep(dice.uniform(3, 12))
            if not running(soak.out):
                time.sleep(1)
                continue
            number += 1
            print(f"{number:3d}  {one_fault(soak, dice.choice(KINDS))}", flush=True)
        code = soak.driver.wait(1800)
        assert code == 0, f"the sweep ended with {code}; see {out / 'soak.log'}"
    check(out / "sweep", out / "alone", exact=not words.group)
    print(f"{number} faults")


def prepare(out: Path, news: int) -> Path:
    """A corpus and its shards."""
    quiet = {"check": True, "stdout": subprocess.DEVNULL}
    subprocess.run([*_CLI, "synthesize", "--news", str(news), "--out", str(out / "corpus")], **quiet)  # type: ignore[call-overload]
    sources = [word for part in ("train", "dev") for word in ("--source", f"{out}/corpus/synthetic_{part}")]
    words = ["prepare", *sources, "--teacher", "scratch", "--out", str(out / "shards"), "--workers", "0"]
    subprocess.run([*_CLI, *words], **quiet)  # type: ignore[call-overload]
    return out / "shards"


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


_CLI = (sys.executable, "-m", "newsbert_ray.cli")

if __name__ == "__main__":
    main()
