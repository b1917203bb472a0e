"""The study's plan, its settings and one small run."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks.study_recommendation import BASELINES, Run, make_plan, run_all, run_settings
from tests.recommendation_tables import METRICS, impressions_file


def options_of(shards: Path, out: Path) -> Namespace:
    """As the command line gives them."""
    tiny = {"scratch": {"hidden": 16, "heads": 2, "feed_forward": 16, "layers": 2, "vocabulary": 400}}
    values = json.dumps({"steps": 2, "batch_size": 8, "precision": "fp32", **tiny})
    return Namespace(data=str(shards), teacher="scratch", out=str(out), set=values, minutes=10)


def test_the_plan_has_each_run_once_and_its_teacher_before() -> None:
    plan = make_plan([0, 1], depth=6)
    names = [run.name for run in plan]
    assert len(names) == len(set(names))
    assert [run.method for run in plan[:4]] == ["teacher", "finetune", "best", "newsbert"]
    for seed in (0, 1):
        own = [run.method for run in plan if run.seed == seed]
        assert own.index("teacher") < own.index("best")


def test_every_update_has_as_many_clicks(shards: Path, tmp_path: Path) -> None:
    """The recipe's news come on top of them, and it reads the teacher of its seed."""
    options = options_of(shards, tmp_path)
    sizes = {}
    for run in make_plan([1], depth=2):
        values = run_settings(run, options)
        sizes[run.system] = values["batch_size"]
        if run.method == "best":
            assert values["distill"]["teacher_run"] == str(tmp_path / "runs" / "teacher_seed=1")
    assert sizes.pop("best") == sizes.pop("best, learning_rate 0.0004") == 32
    assert set(sizes.values()) == {8}


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A joint run gives a line for each model, and their metrics agree with the impressions'."""
    options = options_of(shards, tmp_path)
    for _ in range(2):
        run_all([Run("newsbert", 1, 0)], options)
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text("utf-8").splitlines()]
    systems = [line["system"] for line in lines]
    assert systems == [*BASELINES, "newsbert's teacher", "newsbert"]
    assert len(capsys.readouterr().out.splitlines()) == len(lines)
    for line in lines:
        arrays = dict(zip(METRICS, np.load(impressions_file(tmp_path, line)), strict=True))
        for name, values in arrays.items():
            assert line["test"][name] == pytest.approx(np.nanmean(values), abs=1e-5)
