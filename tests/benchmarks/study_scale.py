"""Time and memory of recommendation at MIND-large's shape, measured on synthetic data at a share of its size.

    python -m tests.benchmarks.study_scale [--shares 0.01 0.1] [--train_clicks 20000] [--data SHARDS]

MIND-large has 1 M users, 161,013 news and 16 M training impressions. The study measures each step at several
shares, how it grows, and estimates the full size. Every step runs in a process of its own, so that its peak
memory is its own; the cost of imports is reported separately. The encoder is tiny, because everything else is
measured. `pass` is the first `--train_clicks` clicks of an ordinary pass over all clicks; `sample` is a whole
run, with two evaluations, on as many clicks sampled from all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
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
FEW_USERS = 2500
"""Enough for batches, which do not know how many users there are."""

# On paper, the model (NewsBERT 4.1): a teacher of 8 layers and a student of 4, feed-forward 4 x 768.
WIDTH, LAYERS = 768, 8 + 4
LAYER_PARAMETERS = 12 * WIDTH**2
TABLE_PARAMETERS = 2 * 30_522 * WIDTH
TOKENS_A_TITLE = 16.3
"""Mean of MIND's mentions, [CLS] and [SEP] included; padding is added as it is measured."""
# On paper, the work.
CLICKS, EPOCHS = 24_155_470, 2
DEV_IMPRESSIONS, EVALUATED_NEWS = 376_471, NEWS
"""Evaluation reads at most all news."""
CLICKS_A_GPU = (32, 128)
"""Clicks that a GPU takes at each step: the paper's batch, and one that suits a GPU."""
BACKWARD = 2
"""A backward pass costs two forward passes."""
# On paper, the machines: H100s, eight to a machine, nothing of exchange or reading hidden behind computing.
GPU_FLOPS, UTILISATION = 989e12, 0.3
"""bf16's peak without sparsity, and the share of it that passes of some thousand tokens reach (assumed)."""
MEMORY_BYTES, ADAM_BYTES = 3.35e12, 28
"""Bytes a second of a GPU's memory; those that fused Adam in fp32 reads and writes for a parameter."""
CORES_A_GPU = 8
"""CPU cores per GPU; they share the impressions to score evenly."""
LINK_BYTES = {1: math.inf, 8: 450e9, 64: 50e9}
"""Bytes a second that each GPU sends in a ring of so many: none, NVLink, 400 Gbit/s between machines."""
GRADIENT_BYTES = 4

GROWING = {"seconds": 0, "cpu_seconds": 0, "seconds_a_click": 1, "seconds_a_text": 1}
"""Figures that get an exponent; for a figure per click or per text, that of all clicks or texts."""

Step = Callable[[Path, float, int], dict[str, Any]]


def main() -> None:
    """Print one JSON line a figure, and the table of what the full set takes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.1])
    parser.add_argument("--train_clicks", type=int, default=20_000)
    parser.add_argument("--data", help="prepared shards, of whose batches there is to be a table too")
    parser.add_argument("--out", default="bench/scale")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        run_step(options.step, Path(options.out), options.shares[0], options.train_clicks)
        return
    figures = {share: measure(share, options) for share in options.shares}
    first, last = min(figures), max(figures)
    if first < last:
        compare(first, last, figures)
    batches = {f"all {NEWS:,} synthetic news": measure_catalogue(Path(options.out) / "catalogue")}
    if options.data:
        batches[options.data] = measure_batches(options.data)
    for name, shared in batches.items():
        say(f"batches of {name}", **shared)
        print(f"\nOn paper, batches as of {name}:\n\n{on_paper(figures[last], shared)}\n", flush=True)


def measure(share: float, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every step at one share, each in a process of its own."""
    folder = Path(options.out) / f"{share:g}"
    refuse_old(folder)
    figures = {}
    try:
        for step in STEPS:
            words = ["--step", step, "--out", str(folder), "--shares", str(share)]
            words += ["--train_clicks", str(options.train_clicks)]
            load = os.getloadavg()[0]
            done = subprocess.run(
                [sys.executable, "-m", "tests.benchmarks.study_scale", *words],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                sys.exit(f"{step} at {share:g} failed:\n{done.stderr[-2000:]}")
            figures[step] = json.loads(done.stdout.splitlines()[-1])
            say(f"{step} at {share:g} of MIND-large", **figures[step], load_before=load)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return figures


def refuse_old(folder: Path) -> None:
    """Exit if an earlier study left its files: they would count as finished work."""
    if folder.exists():
        sys.exit(f"{folder}: there already, its steps would find their work done; remove it")


def run_step(step: str, folder: Path, share: float, train_clicks: int) -> None:
    """One step in this process; its last line is what it took."""
    import_all()
    before, start, worked = peak_mb(), time.perf_counter(), time.process_time()
    numbers = STEPS[step](folder, share, train_clicks)
    took = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - worked}
    print(json.dumps({**took, "peak_mb": peak_mb(), "imports_mb": before, **numbers}))


def import_all() -> None:
    """Import what any step imports, models too, so that seconds and memory of imports are the same in all;
    one thread, since two that wait for each other on a busy machine take several times as long."""
    import pyarrow.dataset  # noqa: F401
    import torch
    from transformers import BertConfig, BertModel

    import newsbert_ray.data.prepare
    import newsbert_ray.evaluation.evaluate
    import newsbert_ray.training.run
    import newsbert_ray.training.worker  # noqa: F401

    torch.set_num_threads(1)
    BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16))


def peak_mb() -> float:
    """Most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def compare(first: float, last: float, figures: dict[float, dict[str, dict[str, Any]]]) -> None:
    """A line for each step: how seconds and memory grow from the smallest to the largest share."""
    for step in STEPS:
        a, b = figures[first][step], figures[last][step]
        say(
            f"growth of {step} from {first:g} to {last:g} of MIND-large",
            **{
                f"exponent_of_{unit}": n + math.log(b[unit] / a[unit]) / math.log(last / first)
                for unit, n in GROWING.items()
                if unit in a
            },
            peak_ratio=b["peak_mb"] / a["peak_mb"],
            above_imports_mb=[one["peak_mb"] - one["imports_mb"] for one in (a, b)],
        )


def _synthesize(folder: Path, share: float, _: int) -> dict[str, Any]:
    write_corpus(folder, news=round(NEWS * share), users=round(USERS * share))
    return {"tsv_mb": sum(path.stat().st_size for path in folder.rglob("*.tsv")) / 1e6}


def write_corpus(folder: Path, *, news: int, users: int) -> None:
    """MIND-large's shape with so many news and users."""
    from newsbert_ray.data.synthetic import synthesize

    synthesize(
        folder / "mind",
        news=news,
        users=users,
        impressions_per_user=IMPRESSIONS_PER_USER,
        topics=18,
        history=HISTORY,
        candidates=CANDIDATES,
        popularity=POPULARITY,
    )


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
        "shards": sum(map(len, manifest.behaviors.values())),
    }


def settings_of(data: str | Path, **values: Any) -> Any:
    """A run of the tiny encoder in clicks."""
    from newsbert_ray.config import TrainSettings, build_settings

    tiny = {"layers": 1, "hidden": 16, "heads": 1, "feed_forward": 16}
    common: dict[str, Any] = {
        "task": "recommendation",
        "data": str(data),
        "teacher": "scratch",
        "scratch": tiny,
    }
    common |= {"out": str(Path(data).with_name("run")), "student": {"layers": 1}}
    common |= {"model": {"query_size": 8, "dropout": 0.0}, "batch_size": BATCH, "epochs": 1, "threads": 1}
    return build_settings(TrainSettings, {**common, **values})


def updates_of(settings: Any) -> tuple[Any, Any]:
    """A run's schedule, and its updates as they are read and batched in this process."""
    from newsbert_ray.data.reading import make_schedule, read_updates
    from newsbert_ray.data.shards import read_manifest

    schedule = make_schedule(settings, read_manifest(settings.data))
    return schedule, read_updates(schedule)


def _read(folder: Path, share: float, _: int) -> dict[str, Any]:
    start = time.perf_counter()
    schedule, updates = updates_of(settings_of(folder / "shards"))
    examples = schedule.manifest.examples("train", schedule.settings.task)
    texts = mentions = 0
    for update in updates:
        texts += sum(len(bucket.input_ids) for bucket in update.parts[0].buckets)
        mentions += update.parts[0].texts
    return {
        "seconds_a_click": (time.perf_counter() - start) / examples,
        "texts_a_click": texts / examples,
        "mentions_a_click": mentions / examples,
    }


def _pass(folder: Path, share: float, train_clicks: int) -> dict[str, Any]:

    from newsbert_ray.data.reading import World
    from newsbert_ray.training.step import train_step
    from newsbert_ray.training.worker import build_worker_learner

    settings = settings_of(folder / "shards")
    schedule, updates = updates_of(settings)
    world = World()
    learner = build_worker_learner(settings, schedule, world)
    clicks = texts = 0
    reading, last = 0.0, time.perf_counter()
    start = last
    for update in updates:
        reading += time.perf_counter() - last
        train_step(learner, list(update.parts), step=update.step, statistics=False)
        clicks += update.parts[0].rows
        texts += sum(len(bucket.input_ids) for bucket in update.parts[0].buckets)
        if clicks >= train_clicks:
            break
        last = time.perf_counter()
    seconds = time.perf_counter() - start
    return {
        "trained_clicks": clicks,
        "seconds_a_click": seconds / clicks,
        "seconds_a_text": seconds / texts,
        "reading_share": reading / seconds,
        "texts_a_click": texts / clicks,
    }


def _sample(folder: Path, share: float, train_clicks: int) -> dict[str, Any]:
    from newsbert_ray.data.shards import read_manifest
    from newsbert_ray.training.run import train

    clicks = min(train_clicks, read_manifest(folder / "shards").examples("train", "recommendation"))
    record = train(settings_of(folder / "shards", train_rows=clicks), quiet=True)
    parts = {f"{name}_seconds": record.seconds[name] for name in ("train", "data", "evaluate")}
    return {"trained_clicks": clicks, **parts}


def _evaluate(folder: Path, share: float, _: int) -> dict[str, Any]:
    from newsbert_ray.evaluation.evaluate import evaluate

    figures = evaluate(folder / "run")
    return {"impressions": figures["student"]["rows"], "auc": figures["student"]["auc"]}


STEPS: dict[str, Step] = {
    "synthesize": _synthesize,
    "prepare": _prepare,
    "read": _read,
    "pass": _pass,
    "sample": _sample,
    "evaluate": _evaluate,
}


def measure_catalogue(folder: Path) -> dict[str, Any]:
    """The batches of a few users' clicks among as many news as the full set has."""
    refuse_old(folder)
    try:
        write_corpus(folder, news=NEWS, users=FEW_USERS)
        _prepare(folder, 1.0, 0)
        return measure_batches(folder / "shards")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure_batches(data: str | Path, *, clicks: int = 20_000) -> dict[str, Any]:
    """How many different news and mentions a click brings, and tokens and padding a text, by batch."""
    figures: dict[str, Any] = {}
    for size in CLICKS_A_GPU:
        read = texts = mentions = tokens = padded = 0
        _, updates = updates_of(settings_of(data, batch_size=size))
        for update in updates:
            (batch,) = update.parts
            read += batch.rows
            texts += sum(len(bucket.input_ids) for bucket in batch.buckets)
            mentions += batch.texts
            tokens += sum(int(bucket.attention_mask.sum()) for bucket in batch.buckets)
            padded += batch.padded_tokens
            if read >= clicks:
                break
        figures[f"texts_a_click_at_{size}"] = texts / read
        figures[f"mentions_a_click_at_{size}"] = mentions / read
        figures[f"tokens_a_text_at_{size}"] = tokens / texts
        figures[f"padding_at_{size}"] = padded / tokens
    return figures


def flops_a_token() -> float:
    """Forward through all layers of both encoders: multiplications with weights, and attention."""
    return LAYERS * (2 * LAYER_PARAMETERS + 4 * TOKENS_A_TITLE * WIDTH)


def on_paper(measured: dict[str, dict[str, Any]], shared: dict[str, Any]) -> str:
    """The full set on 1, 8 and 64 GPUs, from the constants above and what was measured here.

    Args:
        measured: the largest share's steps: what a click or an impression takes a CPU core beside encoding.
        shared: as `measure_batches`; how many different news a click brings.
    Returns:
        A row for each number of GPUs and of clicks at each. Prepare is left out: its lines take longer
        among more news, so that no share tells it.
    """
    parameters = LAYER_PARAMETERS * LAYERS + TABLE_PARAMETERS
    passed = GPU_FLOPS * UTILISATION / (flops_a_token() * TOKENS_A_TITLE)  # titles a second, forward
    reading = measured["read"]["seconds_a_click"]
    scoring = measured["evaluate"]["cpu_seconds"] / measured["evaluate"]["impressions"]
    scored = scoring * DEV_IMPRESSIONS / CORES_A_GPU
    lines = [
        "| GPUs | clicks a GPU | different news a click | 2 epochs (h) | if no news were shared (h) "
        "| of it exchange | of it Adam | reading cores | dev: encode (s) | dev: score (s) |",
        "|" + "---:|" * 10,
    ]
    for gpus, link in LINK_BYTES.items():
        for size in CLICKS_A_GPU:
            texts, mentions = (shared[f"{name}_a_click_at_{size}"] for name in ("texts", "mentions"))
            learned = passed / shared[f"padding_at_{size}"] / (1 + BACKWARD)
            steps = EPOCHS * CLICKS / (size * gpus)
            exchange = steps * 2 * GRADIENT_BYTES * parameters * (gpus - 1) / gpus / link
            adam = steps * ADAM_BYTES * parameters / MEMORY_BYTES
            total, alone = (steps * size * count / learned + exchange + adam for count in (texts, mentions))
            lines.append(
                f"| {gpus} | {size} | {texts:.1f} | {total / 3600:.2f} | {alone / 3600:.2f} "
                f"| {exchange / total:.0%} | {adam / total:.0%} | {EPOCHS * CLICKS * reading / total:.1f} "
                f"| {EVALUATED_NEWS / passed / gpus:.2f} | {scored / gpus:.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
