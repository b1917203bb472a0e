"""Recommendation at MIND-large's shape (1 M users, 161,013 news, 15.8 M impressions), made synthetically at
shares of it: what prepare, reading, training and evaluation take, how that grows, and what follows on paper.

Every step is a process of its own, so that its peak memory is its own. The encoder is tiny: what is measured
is everything around it. Training takes `--train_clicks` clicks of the whole.

    python -m tests.benchmarks.study_scale [--shares 0.01 0.1] [--train_clicks 20000]
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.subject import say

USERS, NEWS, IMPRESSIONS_PER_USER = 1_000_000, 161_013, 16
HISTORY, CANDIDATES, POPULARITY = 66, 37, 0.8
"""Histories are drawn evenly from none to HISTORY clicks, 33 on average as MIND's."""
BATCH = 128

# On paper: a teacher of 8 layers and a student of 4, 768 wide, feed-forward 3072, as in the paper.
LAYER_PARAMETERS = 12 * 768 * 768
LAYERS = 8 + 4
TABLE_PARAMETERS = 2 * 30_522 * 768
TOKENS_A_TITLE = 16.3
"""Mean of MIND's mentions, [CLS] and [SEP] with it."""
TEXTS_A_CLICK = 14.1
"""Different news to encode for a click at 128 clicks a batch, of the real rows (bench_recommend)."""
CLICKS, EPOCHS = 24_155_470, 2
DEV_IMPRESSIONS, DEV_NEWS = 376_471, 72_000
GPU_FLOPS, UTILISATION = 989e12, 0.3
"""An H100's bf16 peak without sparsity, and the share of it that passes of some thousand tokens reach."""
LINK_BYTES = 50e9
"""Bytes a second that each GPU sends between machines (400 Gbit/s)."""
CLICKS_A_GPU = 128
ENCODER_SHARE_EVALUATION = 1 / 3
"""Forward alone, of forward and backward."""


def main() -> None:
    """Print one JSON line a figure, and the table of what the full set takes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.1])
    parser.add_argument("--train_clicks", type=int, default=20_000)
    parser.add_argument("--out", default="bench/scale")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--step", choices=STEPS)
    options = parser.parse_args()
    if options.step:
        run_step(options.step, Path(options.out), options.shares[0], options.train_clicks)
        return
    found = {share: measure(share, options) for share in options.shares}
    first, last = min(found), max(found)
    if first < last:
        for step in STEPS:
            (a, b), unit = (found[first][step], found[last][step]), "per_click" if step == "train" else "all"
            n = 1.0 if step == "train" else 0.0
            say(
                f"growth of {step} from {first:g} to {last:g} of MIND-large",
                exponent=n + math.log(b["seconds"] / a["seconds"]) / math.log(last / first),
                seconds_of=unit,
                memory_ratio=b["peak_mb"] / a["peak_mb"],
            )
    print(on_paper())


def measure(share: float, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every step at one share, each in a process of its own."""
    folder = Path(options.out) / f"{share:g}"
    found = {}
    for step in STEPS:
        words = [sys.executable, "-m", "tests.benchmarks.study_scale", "--step", step, "--out", str(folder)]
        words += ["--shares", str(share), "--train_clicks", str(options.train_clicks)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{step} at {share:g} failed:\n{done.stderr[-2000:]}")
        found[step] = json.loads(done.stdout.splitlines()[-1])
        say(f"{step} at {share:g} of MIND-large", **found[step])
    if not options.keep:
        shutil.rmtree(folder)
    return found


def run_step(step: str, folder: Path, share: float, train_clicks: int) -> None:
    """One step in this process; its last line is what it took."""
    import newsbert_ray.evaluation.evaluate  # noqa: F401  (imports are the same at every size)

    start = time.perf_counter()
    numbers = STEPS[step](folder, share, train_clicks)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": numbers.pop("seconds", seconds), "peak_mb": peak, **numbers}))


def _synthesize(folder: Path, share: float, _: int) -> dict[str, Any]:
    from newsbert_ray.data.synthetic import synthesize

    synthesize(
        folder / "mind",
        news=round(NEWS * share),
        users=round(USERS * share),
        impressions_per_user=IMPRESSIONS_PER_USER,
        topics=18,
        history=HISTORY,
        candidates=CANDIDATES,
        popularity=POPULARITY,
    )
    return {"tsv_mb": sum(path.stat().st_size for path in folder.rglob("*.tsv")) / 1e6}


def _prepare(folder: Path, share: float, _: int) -> dict[str, Any]:
    from newsbert_ray.config import PrepareSettings, build_settings
    from newsbert_ray.data.prepare import prepare

    values = {
        "source": [str(folder / "mind" / f"synthetic_{name}") for name in ("train", "dev")],
        "teacher": "scratch",
        "out": str(folder / "shards"),
        "workers": 0,
    }
    manifest = prepare(build_settings(PrepareSettings, values), say=lambda _: None)
    return {
        "impressions": sum(manifest.rows(split, "recommendation") for split in manifest.behaviors),
        "clicks": manifest.examples("train", "recommendation"),
    }


def _settings(folder: Path, **values: Any) -> Any:
    from newsbert_ray.config import TrainSettings, build_settings

    tiny = {"layers": 1, "hidden": 16, "heads": 1, "feed_forward": 16}
    return build_settings(
        TrainSettings,
        {
            "task": "recommendation",
            "data": str(folder / "shards"),
            "teacher": "scratch",
            "out": str(folder / "run"),
            "scratch": tiny,
            "model": {"query_size": 8, "dropout": 0.0},
            "student": {"layers": 1},
            "batch_size": BATCH,
            "epochs": 1,
            "threads": 1,
            **values,
        },
    )


def _read(folder: Path, share: float, _: int) -> dict[str, Any]:
    from newsbert_ray.data.reading import course_of, read_updates
    from newsbert_ray.data.shards import read_manifest

    settings = _settings(folder)
    course = course_of(settings, read_manifest(settings.data))
    texts = mentions = 0
    for update in read_updates(course):
        texts += sum(len(bucket.input_ids) for bucket in update.parts[0].buckets)
        mentions += update.parts[0].texts
    return {"texts_a_click": texts / course.examples, "mentions_a_click": mentions / course.examples}


def _train(folder: Path, share: float, train_clicks: int) -> dict[str, Any]:
    from newsbert_ray.training.run import train

    record = train(_settings(folder, train_rows=train_clicks), quiet=True)
    seconds = (record.seconds["train"] + record.seconds["data"]) / train_clicks
    return {"seconds": seconds, "clicks_per_second": 1 / seconds}


def _evaluate(folder: Path, share: float, _: int) -> dict[str, Any]:
    from newsbert_ray.evaluation.evaluate import evaluate

    found = evaluate(folder / "run")
    return {"impressions": found["student"]["rows"], "auc": found["student"]["auc"]}


STEPS: dict[str, Callable[[Path, float, int], dict[str, Any]]] = {
    "synthesize": _synthesize,
    "prepare": _prepare,
    "read": _read,
    "train": _train,
    "evaluate": _evaluate,
}


def on_paper() -> str:
    """Hours of the full set on 1, 8 and 64 GPUs, from the constants above alone."""
    flops = 6 * LAYER_PARAMETERS * LAYERS * TOKENS_A_TITLE * TEXTS_A_CLICK  # forward and backward, a click
    exchanged = 4 * (LAYER_PARAMETERS * LAYERS + TABLE_PARAMETERS)  # fp32 gradients, a step
    lines = [
        "| GPUs | training, 2 epochs (hours) | of it exchange | encoding of dev (seconds) |",
        "|---:|---:|---:|---:|",
    ]
    for gpus in (1, 8, 64):
        steps = EPOCHS * CLICKS / (CLICKS_A_GPU * gpus)
        compute = steps * CLICKS_A_GPU * flops / (GPU_FLOPS * UTILISATION)
        exchange = steps * 2 * exchanged * (gpus - 1) / gpus / LINK_BYTES
        encode = DEV_NEWS * TOKENS_A_TITLE * 6 * LAYER_PARAMETERS * LAYERS * ENCODER_SHARE_EVALUATION
        evaluation = encode / (GPU_FLOPS * UTILISATION) / gpus
        hours = (compute + exchange) / 3600
        share = exchange / (compute + exchange)
        lines.append(f"| {gpus} | {hours:.1f} | {share:.0%} | {evaluation:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
