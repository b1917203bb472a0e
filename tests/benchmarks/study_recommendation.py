"""Does distillation help to recommend? All training clicks, with news without clicks as unlabelled text.

    python -m tests.benchmarks.study_recommendation --data SHARDS --teacher NAME_OR_DIR --out DIR \
        [--seeds 0 1] [--minutes 90] [--set '{"steps": 348}'] [--dry-run]
    python -m tests.recommendation_tables DIR

Every update has as many clicks, whatever the method; the recipe reads news without clicks beside them. A
finished run appends one line to DIR/records.jsonl; a run whose line is there is skipped, and one that was
interrupted goes on from its last evaluation. DIR/impressions holds each model's metrics for each impression
of the test split; the second command compares them and keeps small lines in search_spaces/results.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.recommendation_tables import METRICS, Array, impressions_file, means, rounded

COMMON: dict[str, Any] = {
    "task": "recommendation",
    "steps": 348,  # two passes over 5,542 clicks
    "batch_size": 32,
    "evaluate_every": 87,
    "log_every": 500,
    "precision": "bf16",
    "threads": 1,
    "device": "cpu",
    "recommendation": {"history": 20},
    "checkpoint": {"every_minutes": None},
}
BASELINES = {
    **dict.fromkeys(("popularity", "tfidf", "encoder", "encoder, 1 layer")),
    **dict.fromkeys(("tfidf, 50 clicks", "encoder, 50 clicks"), 50),
}
"""Rankings that learned from no click, and the clicks of a history that they read; None as all runs."""

Arrays = dict[str, Array]
"""Metrics by name, (I,) each."""


@dataclass(frozen=True)
class Run:
    """One run of the plan; `values` are settings beyond COMMON and the method's own, by dotted name."""

    method: str
    layers: int
    seed: int
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def system(self) -> str:
        """Its name in tables' keys: the method, and what differs from its first run."""
        changes = [f"{key.rpartition('.')[2]} {value}" for key, value in sorted(self.values.items())]
        return ", ".join([self.method, *changes])

    @property
    def name(self) -> str:
        """A name for files."""
        return f"{self.system}, seed {self.seed}".replace(", ", "_").replace(" ", "=")


def make_plan(seeds: Sequence[int], *, depth: int) -> list[Run]:
    """All runs in their order: what compares the methods, then other rates and the recipe without news."""
    plan = []
    for seed in seeds:
        plan += [Run("teacher", depth, seed), *(Run(m, 1, seed) for m in ("finetune", "best", "newsbert"))]
        plan += [
            Run("finetune", 1, seed, {"learning_rate": 2e-4}),
            Run("best", 1, seed, {"learning_rate": 4e-4}),
            Run("best", 1, seed, {"unlabelled_share": 0.0}),
        ]
    return plan


def common_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Settings of all runs."""
    from newsbert_ray.settings import merge

    return merge(COMMON, json.loads(options.set))


def run_settings(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """All settings of a run, as `newsbert_ray.train` takes them."""
    from newsbert_ray.config import TrainSettings, build_settings
    from newsbert_ray.settings import merge

    out = Path(options.out).absolute()
    values = merge(
        common_settings(options),
        {
            "method": "finetune" if run.method == "teacher" else run.method,
            "data": options.data,
            "teacher": options.teacher,
            "student": {"layers": run.layers},
            "seed": run.seed,
            "out": str(out / "runs" / run.name),
        },
    )
    if run.method == "teacher":
        values["learning_rate"] = 1e-4
    if run.method == "best":
        teacher = out / "runs" / Run("teacher", 0, run.seed).name
        values = merge(values, {"distill.teacher_run": str(teacher)})
    values = merge(values, run.values)
    share = build_settings(TrainSettings, values).unlabelled_share
    return {**values, "batch_size": round(values["batch_size"] / (1 - share))}  # news come on top of clicks


def train_run(run: Run, options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Arrays]]:
    """Train and score: a record and the metrics of each test impression, of student and joint teacher."""
    import newsbert_ray
    from newsbert_ray.evaluation.evaluate import load_trained
    from tests.benchmarks.impressions import score_models

    began, settings = time.perf_counter(), run_settings(run, options)
    record = newsbert_ray.train(quiet=True, **settings)
    trained = load_trained(settings["out"], "test")
    scored = score_models(trained.models, trained.data, trained.world)
    used = record.settings
    shutil.rmtree(Path(settings["out"]) / "checkpoints", ignore_errors=True)
    for model, arrays in scored.items():
        system = run.system if model == "student" else f"{run.system}'s teacher"
        rate = trained.settings.learning_rates["student" if model == "student" else "teacher"]
        yield (
            {
                "system": system,
                "method": run.method,
                "layers": run.layers if model == "student" else sum(map(len, record.layer_map)),
                "seed": run.seed,
                "rate": rate,
                "values": dict(run.values),
                "steps": record.steps,
                "batch_size": used["batch_size"],
                "clicks": round(used["batch_size"] * (1 - used["unlabelled_share"])),
                "history": used["recommendation"]["history"],
                "best_step": record.metrics["best_step"],
                "validation": rounded(record.metrics["validation"][model]),
                "test": means(arrays),
                "curve": [[e["step"], round(e["validation"][model]["auc"], 4)] for e in record.curve],
                "seconds": round(time.perf_counter() - began),
                "train_seconds": round(record.seconds["train"]),
            },
            arrays,
        )


def score_baselines(
    options: argparse.Namespace, done: Container[Any]
) -> Iterator[tuple[dict[str, Any], Arrays]]:
    """Records of what learned from no click, and the metrics of each test impression."""
    from newsbert_ray.data.reading import SplitData
    from newsbert_ray.data.shards import read_manifest
    from tests.benchmarks.impressions import score_encoder, score_popularity, score_words

    manifest = read_manifest(options.data)
    for name, clicks in BASELINES.items():
        if (name, None) in done:
            continue
        method, _, change = name.partition(", ")
        layers = 1 if "layer" in change else None
        history = clicks or common_settings(options)["recommendation"]["history"]
        scored = {}
        for split in ("validation", "test"):
            data = SplitData(Path(options.data), manifest, split, "recommendation", history)
            if method == "encoder":
                scored[split] = score_encoder(data, options.teacher, layers)
            else:
                scored[split] = score_popularity(data) if method == "popularity" else score_words(data)
        usual: dict[str, Any] = {"method": method, "layers": layers, "seed": None, "rate": None, "values": {}}
        scores = {split: means(arrays) for split, arrays in scored.items()}
        yield {"system": name, **usual, "history": history, **scores}, scored["test"]


def run_all(plan: Sequence[Run], options: argparse.Namespace) -> None:
    """Score the baselines, then train what has no record, in order, while minutes are left."""
    out, began = Path(options.out).absolute(), time.monotonic()
    (out / "impressions").mkdir(parents=True, exist_ok=True)
    path = out / "records.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.exists() else ()
    done = {(record["system"], record["seed"]) for record in map(json.loads, lines)}

    def finish(record: dict[str, Any], arrays: Arrays) -> None:
        np.save(impressions_file(out, record), np.stack([arrays[name] for name in METRICS]))
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        seconds = time.monotonic() - began
        print(f"{seconds:7.0f} s  {record['system']}: test AUC {record['test']['auc']:.4f}", flush=True)

    for record, arrays in score_baselines(options, done):
        finish(record, arrays)
    for run in plan:
        if (run.system, run.seed) in done:
            continue
        if time.monotonic() - began > 60 * options.minutes:
            break
        for record, arrays in train_run(run, options):
            finish(record, arrays)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the plan."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--minutes", type=float, default=1e6, help="start no run after these")
    parser.add_argument("--set", default="{}", help="further settings of all runs, as JSON")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and end")
    options = parser.parse_args(arguments)
    from newsbert_ray.config import ModelSettings, ScratchSettings
    from newsbert_ray.model.families import encoder_depth

    plan = make_plan(options.seeds, depth=encoder_depth(options.teacher, ModelSettings(), ScratchSettings()))
    if options.dry_run:
        print("\n".join(run.name for run in plan))
        return
    import torch

    torch.set_num_threads(1)
    run_all(plan, options)


if __name__ == "__main__":
    main()
