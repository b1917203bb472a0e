"""The study's plan and its order: what is ready, what is tuned, what is skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from newsbert_ray.data.shards import read_manifest, read_shard, read_texts
from newsbert_ray.files import files_in
from tests.benchmarks.study_student import (
    PARTS,
    RATES,
    SIZES,
    Run,
    Study,
    draw_shards,
    make_plan,
    run_settings,
)


def record(run: Run, accuracy: float, rate: float) -> dict[str, Any]:
    """What a worker sends."""
    scores = {"accuracy": accuracy, "macro_f1": 0.5}
    own = {"name": run.name, "method": run.method, "layers": run.layers, "rate": rate, "stage": run.stage}
    return {**own, "validation": scores, "test": scores, "seconds": 2.0, "values": dict(run.values)}


def test_the_plan_has_each_run_once_and_teachers_first() -> None:
    plan = make_plan([*PARTS, "small", "linear"], depth=6)
    names = [run.name for run in plan]
    assert len(names) == len(set(names))
    assert {run.method for run in plan[: 5 * len(SIZES)]} == {"teacher"}
    for run in make_plan(["small"], depth=6):
        assert run.rate is not None, "no tuning there"


def test_a_run_waits_for_its_teacher_and_its_rate(tmp_path: Path) -> None:
    """The best rate of the tuning runs on validation is used, and its run is not trained twice."""
    tuning = [Run("tuning", "best", 1000, 1, 0, rate) for rate in RATES]
    final = [Run("main", "best", 1000, 1, seed) for seed in (0, 1)]
    study = Study([*final, *tuning], tmp_path, tmp_path)
    assert study.next([], seconds_left=100) is None
    for name in ("L1000_s0", "L1000_s1"):
        (tmp_path / "teachers" / name).mkdir(parents=True)
        (tmp_path / "teachers" / name / "record.json").touch()
    assert study.next([], seconds_left=100) == (tuning[0], RATES[0])
    assert study.next([], seconds_left=1) is None
    for run, accuracy in zip(tuning, (0.5, 0.7, 0.6, 0.4), strict=True):
        assert run.rate is not None
        study.finish(record(run, accuracy, run.rate))
    assert study.next([], seconds_left=100) == (final[1], RATES[1])
    assert study.records[final[0].name]["stage"] == "main"
    study.finish({"name": final[1].name, "error": "ValueError: no"})
    assert study.left() == 0
    again = Study([*final, *tuning], tmp_path, tmp_path)
    assert again.next([], seconds_left=100) == (final[1], RATES[1]), "a failed run is tried again"


def test_a_draw_labels_some_titles_and_keeps_the_others(shards: Path, tmp_path: Path) -> None:
    """Two seeds label different titles; the texts and their order stay."""
    whole, before = read_manifest(shards), files_in(shards)
    labelled = []
    for seed in (0, 1):
        folder = draw_shards(shards, tmp_path, seed=seed, labels=50, validation=0.5)
        manifest = read_manifest(folder)
        tables = [read_shard(folder, shard) for shard in manifest.splits["train"]]
        labels = np.concatenate([table.column("label").to_numpy() for table in tables])
        assert (labels >= 0).sum() == manifest.examples("train") == 50
        assert manifest.rows("train") == whole.rows("train")
        assert abs(2 * manifest.rows("validation") - whole.rows("validation")) <= 2
        texts = read_texts(folder, manifest)
        for shard, first in manifest.news:  # the table of texts has the tokens of each title
            tokens = read_shard(folder, shard).column("tokens").to_pylist()
            assert [part.tolist() for part in texts.split(first + np.arange(shard.rows))] == tokens
        labelled.append(set(np.flatnonzero(labels >= 0)))
    assert labelled[0] != labelled[1]
    assert files_in(shards) == before


def test_settings_of_a_run(shards: Path, tmp_path: Path) -> None:
    """A run's own values win; a distilled student reads the other titles and its teacher's run."""
    options = {"data": str(shards), "teacher": "T", "out": str(tmp_path), "scratch": str(tmp_path / "s")}
    options |= {"device": "cpu", "set": '{"steps": 7}', "validation": "1"}
    values = run_settings(Run("main", "twinbert", 60, 1, 0, None, {"steps": 9}), options, 1e-3)
    assert (values["steps"], values["unlabelled_share"], values["learning_rate"]) == (9, 0.75, 1e-3)
    assert values["distill"]["teacher_run"].endswith("teachers/L60_s0")
    assert "unlabelled_share" not in run_settings(Run("main", "finetune", 60, 1, 0), options, 1e-3)
