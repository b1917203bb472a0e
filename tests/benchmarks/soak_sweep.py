"""Kill a sweep again and again, resume it each time, and count: is a trial lost, is one counted twice?

    python -m tests.benchmarks.soak_sweep --kills 12 --out /tmp/soak

A sweep over a synthetic corpus runs from the command line. At random moments one of these is hit: the driver
(SIGKILL), a trial's process (SIGKILL), the driver with everything below it (SIGKILL), or the driver by
Ctrl-C, once or twice at once. Only processes below the sweep's own are ever hit. In the end every point must
have been told to Optuna once, every trial must have left exactly one end, no process may be left, and with
the grid the students must be those of the same sweep left alone, byte for byte.
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
"""Seconds in which all processes of a killed sweep must be gone: Ray's agents look now and then."""
PATIENCE = 600.0
"""Seconds after which a start of the sweep that has not ended counts as hanging."""


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
    """newsbert-ray in a process group of its own; its words go to the screen's log."""
    return subprocess.Popen(
        [sys.executable, "-m", "newsbert_ray.cli", *words], start_new_session=True, stdout=subprocess.DEVNULL
    )


def start(file: Path, shards: Path, out: Path, *, first: bool) -> subprocess.Popen[bytes]:
    """The sweep, begun or resumed."""
    how = [] if first else ["--resume"]
    return cli("sweep", str(file), "--data", str(shards), "--out", str(out), *how)


def one_kill(file: Path, shards: Path, out: Path, kind: str, wait: float, *, first: bool) -> str:
    """Start the sweep, hit it after `wait` seconds, wait until all of its processes are gone."""
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
    """Every trial once, in the folders and in Optuna."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    study = optuna.load_study(
        study_name="soak", storage=JournalStorage(JournalFileBackend(str(out / "optuna.journal")))
    )
    states: dict[str, int] = {}
    for trial in study.trials:
        states[trial.state.name] = states.get(trial.state.name, 0) + 1
    told = states.get("COMPLETE", 0) + states.get("PRUNED", 0)
    points = 8 if kind == "grid" else 16
    records, stops = len(list(out.glob("trials/*/record.json"))), len(list(out.glob("trials/*/stopped.json")))
    print(f"points told to Optuna {told} of {points} ({states}); {records} records, {stops} early ends")
    assert told == points
    assert set(states) <= {"COMPLETE", "PRUNED", "FAIL"}
    assert records + stops == (16 if kind == "grid" else points)
    assert not list(out.glob("trials/*/checkpoints"))
    for folder in out.glob("trials/*/"):
        entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        epochs = [entry["epoch"] for entry in entries if entry["kind"] == "evaluation"]
        assert epochs == sorted(set(epochs)), f"{folder.name}: evaluations {epochs}"


def compare(one: Path, other: Path) -> None:
    """The students of both sweeps, byte for byte; of those that both kept."""
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
    """How many trials have ended."""
    done = [*out.glob("trials/*/record.json"), *out.glob("trials/*/stopped.json")]
    return f"{len(done):2d} trials ended"


def command(pid: int) -> bytes:
    """A process's command line; empty once it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


if __name__ == "__main__":
    main()
