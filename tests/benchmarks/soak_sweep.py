"""Kills a sweep again and again, resumes it each time, and checks that no trial is lost or counted twice.

    python -m tests.benchmarks.soak_sweep --kills 12 --out /tmp/soak

A sweep on a synthetic corpus runs from the command line. At random times one of these is killed: the driver
(SIGKILL), a trial's process (SIGKILL), the driver with all its child processes (SIGKILL), or the driver by
Ctrl-C, once or twice in a row. Only child processes of the sweep are ever killed. At the end Optuna must know
every point once, every trial must have ended exactly once, no process may be left, and with the grid the
students must equal those of the same sweep without kills, byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from cluster.local import alive, descendants, kill_all

GRID = """\
name: soak
settings:
  teacher: scratch
  scratch: {layers: 2, hidden: 32, heads: 2, feed_forward: 64}
  epochs: 3
  learning_rate: 1e-3
  checkpoint: {every_steps: 5}
space:
  distill.beta: {grid: [0.0, 0.1, 0.2, 0.3]}
  student.layers: {grid: [1, 2]}
seeds: [0, 1]
"""
TPE = """\
name: soak
settings:
  teacher: scratch
  scratch: {layers: 2, hidden: 32, heads: 2, feed_forward: 64}
  epochs: 3
  checkpoint: {every_steps: 5}
space:
  distill.beta: {float: [0.0, 0.3]}
  learning_rate: {float: [1e-4, 1e-2], log: true}
search: {trials: 16}
"""
GONE = 120.0
"""Longest time for all processes of a killed sweep to end; Ray's agents check periodically."""
PATIENCE = 600.0
"""Time after which a sweep that has not ended counts as hanging."""


def main() -> None:
    """Run the soak and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--kind", choices=["grid", "tpe"], default="grid")
    parser.add_argument("--news", type=int, default=3000, help="titles of the corpus: how long a trial takes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least", type=float, default=12.0, help="least seconds between start and kill")
    parser.add_argument("--most", type=float, default=35.0, help="most seconds between start and kill")
    parser.add_argument("--out", type=Path, required=True)
    words = parser.parse_args()
    dice = random.Random(words.seed)
    shutil.rmtree(words.out, ignore_errors=True)
    shards = prepare(words.out, words.news)
    file = words.out / "soak.yaml"
    file.write_text(GRID if words.kind == "grid" else TPE, encoding="utf-8")
    rows = []
    for number in range(words.kills):
        kind = dice.choice(KINDS)
        wait = dice.uniform(words.least, words.most)
        rows.append(one_kill(file, shards, words.out / "sweep", kind, wait, first=number == 0))
        print(f"{number + 1:3d}  {rows[-1]}", flush=True)
        if rows[-1].endswith("the sweep had ended"):
            break
    finish(file, shards, words.out / "sweep", first=not rows)
    check(words.out / "sweep", words.kind)
    if words.kind == "grid":
        finish(file, shards, words.out / "alone", first=True)
        compare(words.out / "sweep", words.out / "alone")


def prepare(out: Path, news: int) -> Path:
    """A corpus and its shards."""
    cli("synthesize", "--news", str(news), "--out", str(out / "corpus")).wait()
    sources = [word for part in ("train", "dev") for word in ("--source", f"{out}/corpus/synthetic_{part}")]
    cli("prepare", *sources, "--teacher", "scratch", "--out", str(out / "shards"), "--workers", "0").wait()
    return out / "shards"


def cli(*words: str) -> subprocess.Popen[bytes]:
    """Start newsbert-ray in a process group of its own; its output goes to a log."""
    return subprocess.Popen(
        [sys.executable, "-m", "newsbert_ray.cli", *words], start_new_session=True, stdout=subprocess.DEVNULL
    )


def start(file: Path, shards: Path, out: Path, *, first: bool) -> subprocess.Popen[bytes]:
    """Start or resume the sweep."""
    how = [] if first else ["--resume"]
    return cli("sweep", str(file), "--data", str(shards), "--out", str(out), *how)


def one_kill(file: Path, shards: Path, out: Path, kind: str, wait: float, *, first: bool) -> str:
    """Start the sweep, kill it after `wait` seconds, and wait until all its processes have ended."""
    process = start(file, shards, out, first=first)
    time.sleep(wait)
    if process.poll() is not None:
        return f"{kind:<14} after {wait:4.1f} s  {ends(out)}  the sweep had ended"
    family = descendants(process.pid)
    if kind == "trial":
        trials = [pid for pid in family if command(pid).startswith(b"ray::Impl")]
        for pid in trials[:1]:
            os.kill(pid, signal.SIGKILL)
        time.sleep(8)
        process.send_signal(signal.SIGINT)
    elif kind == "everything":
        kill_all([process.pid, *family])
    elif kind == "driver":
        process.kill()
    else:
        process.send_signal(signal.SIGINT)
        if kind == "ctrl-c twice":
            time.sleep(0.05)
            process.send_signal(signal.SIGINT)
    began = time.monotonic()
    code = process.wait(PATIENCE)
    while any(alive(pid) for pid in family) and time.monotonic() - began < GONE:
        time.sleep(0.2)
    left = [pid for pid in family if alive(pid)]
    assert not left, f"{kind}: processes left: {[command(pid).split(bytes(1))[0] for pid in left]}"
    return (
        f"{kind:<14} after {wait:4.1f} s  {ends(out)}  exit {code}, gone in {time.monotonic() - began:.1f} s"
    )


KINDS = ["driver", "trial", "everything", "ctrl-c", "ctrl-c twice"]


def finish(file: Path, shards: Path, out: Path, *, first: bool) -> None:
    """Run the sweep to its end."""
    code = start(file, shards, out, first=first).wait(3 * PATIENCE)
    assert code == 0, f"the sweep ended with {code}"


def check(out: Path, kind: str) -> None:
    """Check that every trial is there once, in the folders and in Optuna."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    study = optuna.load_study(
        study_name="soak", storage=JournalStorage(JournalFileBackend(str(out / "optuna.journal")))
    )
    states: dict[str, int] = {}
    for trial in study.trials:
        states[trial.state.name] = states.get(trial.state.name, 0) + 1
    finished = states.get("COMPLETE", 0) + states.get("PRUNED", 0)
    points = 8 if kind == "grid" else 16
    records, stops = len(list(out.glob("trials/*/record.json"))), len(list(out.glob("trials/*/stopped.json")))
    print(f"points told to Optuna {finished} of {points} ({states}); {records} records, {stops} early ends")
    assert finished == points
    assert set(states) <= {"COMPLETE", "PRUNED", "FAIL"}
    assert records + stops == (16 if kind == "grid" else points)
    assert not list(out.glob("trials/*/checkpoints"))
    for folder in out.glob("trials/*/"):
        entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        epochs = [entry["epoch"] for entry in entries if entry["kind"] == "evaluation"]
        assert epochs == sorted(set(epochs)), f"{folder.name}: evaluations {epochs}"


def compare(one: Path, other: Path) -> None:
    """Compare the students that both sweeps kept, byte for byte."""
    same = 0
    for path in sorted(one.glob("trials/*/student/model.safetensors")):
        twin = other / path.relative_to(one)
        if twin.exists():
            assert digest(path) == digest(twin), f"{path}: differs from the one that was left alone"
            same += 1
    print(f"{same} students equal those of the sweep that was left alone, byte for byte")
    assert same


def digest(path: Path) -> str:
    """A file's hash."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def ends(out: Path) -> str:
    """Number of trials that have ended."""
    done = [*out.glob("trials/*/record.json"), *out.glob("trials/*/stopped.json")]
    return f"{len(done):2d} trials ended"


def command(pid: int) -> bytes:
    """A process's command line; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


if __name__ == "__main__":
    main()
