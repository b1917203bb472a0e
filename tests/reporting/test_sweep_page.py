"""What the page about a sweep says."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from newsbert_ray.reporting.page import Picture, to_html, to_markdown
from newsbert_ray.reporting.sweep_data import read_sweep
from newsbert_ray.reporting.sweep_page import points_csv, sweep_page

MakeSweep = Callable[..., Path]
AXES = ["learning_rate", "optimizer.decay", "optimizer.warmup_share", "student.layers"]
FIGURES: dict[str, Picture | str] = {
    "pareto_front": Picture("pareto_front.png", "<svg></svg>", "a front", "Front."),
    "metric_over_settings": Picture("metric_over_settings.png", "<svg></svg>", "dots", "Dots."),
    "importances": "too few points to say which settings mattered",
    "learning_curves": Picture("learning_curves.png", "<svg></svg>", "lines", "Lines."),
    "fig7_beta": "no beta",
    "seconds_by_part": "no time",
}


def _said(folder: Path) -> str:
    page = sweep_page(read_sweep(folder), FIGURES)
    assert to_html(page).count("<section") == len(page.sections)
    return to_markdown(page)


def _change(folder: Path, **changes: Any) -> None:
    path = folder / "sweep.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_sections_answer_in_order(make_sweep: MakeSweep) -> None:
    """What was searched, how it ended, the best, what mattered, what it cost: as a reader asks."""
    text = _said(make_sweep(points=6))
    headings = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        "What was searched",
        "How it ended",
        "The best settings",
        "Metric over each setting",
        "Which settings mattered",
        "Learning curves",
        "What it cost",
        "What it ran on",
    ]
    assert "Too few points to say which settings mattered." in text


def test_search_is_told_whole(make_sweep: MakeSweep) -> None:
    """Without ranges, sampler, scheduler and seeds nobody can judge or repeat the search."""
    text = _said(
        make_sweep(
            axes=AXES,
            points=12,
            stopped=0.5,
            stopping={"scheduler": "asha", "grace": 2, "factor": 4},
            limits={"hours": 2.5, "cost": 10.0},
            start=[{"learning_rate": 3e-5, "optimizer.decay": "none", "student.layers": 2}],
        )
    )
    assert "- search space: invented (space.yaml)" in text
    assert "- judged by: validation.student.accuracy, more is better" in text
    assert "- seeds of each point: 0, 1; their mean counts" in text
    assert "- points chosen by: multivariate tree-structured Parzen estimator (TPE), seed 0" in text
    assert "- tried first: 1 point that the search space names" in text
    assert "- early stopping: ASHA, one in 4 goes on from each rung; each trial had 2 epochs at least" in text
    assert "- limits: 2.5 hours of wall time, a cost of 10" in text
    assert "- the same in all: epochs 9" in text
    assert "| learning_rate | 1e-05 to 0.01 | evenly over the logarithm |  |" in text
    assert "| optimizer.warmup_share | 0 to 0.5 | evenly | optimizer.decay is linear or cosine |" in text


def test_end_counts_points_and_names_failures(make_sweep: MakeSweep) -> None:
    """A failure without its reason is found again in a month."""
    folder = make_sweep(points=9, stopped=0.5, failed=1, state="finished with failures")
    _change(folder, ends="3 failures")
    text = _said(folder)
    assert "- state: finished with failures (3 failures)" in text
    assert "- points: 4 finished, 4 stopped early, 1 failed; 9 asked for" in text
    assert "- trials: 8 finished, 4 stopped early, 1 failed; 18 asked for" in text
    assert "| LossError: the loss is \\<nan> at step 10 |" in text
    assert f"newsbert-ray sweep space.yaml --out {folder} --resume" in text


def test_many_failures_do_not_fill_the_page(make_sweep: MakeSweep) -> None:
    """Two hundred times the same reason hides the rest; how many are left out is said."""
    folder = make_sweep(points=1)
    _change(folder, failures={f"beta={i},seed=0": "no memory" for i in range(30)})
    text = _said(folder)
    assert "Trials that failed, the first 20 of 30" in text
    assert text.count("no memory") == 20
    assert "- points: 1 finished, 30 failed; 1 asked for" in text


def test_point_chosen_again_is_explained(make_sweep: MakeSweep) -> None:
    """Forty asked for and thirty there would look like ten that were lost."""
    folder = make_sweep(points=3, seeds=(0,))
    _change(folder, trials=5)
    assert "; 5 asked for (2 times the sampler chose a point again, which is run once)" in _said(folder)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("running", "was cut off while it ran"),
        ("interrupted", "interrupted"),
        ("broken off", "broken off (disk full)"),
    ],
)
def test_sweep_that_can_go_on_says_how(make_sweep: MakeSweep, state: str, said: str) -> None:
    """Whoever finds an interrupted sweep needs the command, not a guess."""
    folder = make_sweep(points=2, state=state)
    _change(folder, ends="disk full" if state == "broken off" else "")
    text = _said(folder)
    assert f"- state: {said}" in text
    assert f"newsbert-ray sweep space.yaml --out {folder} --resume" in text
    assert "The command that trains it again stands here once the sweep has ended." in text


def test_best_has_its_command_its_teacher_and_its_test_split(make_sweep: MakeSweep) -> None:
    """A number without its teacher, its spread and its test split is half a result."""
    folder = make_sweep(axes=["student.layers"], points=2, seeds=(0, 1))
    sweep = read_sweep(folder)
    best = sweep.finished[0]
    summary = best.summary()
    assert summary is not None
    text = _said(folder)
    value = f"{100 * summary.mean:.2f} ± {100 * (summary.sd or 0):.2f}"
    assert f"Its validation accuracy: {value} %, its teacher 84.77 ± 0.00 %." in text
    assert f"| validation accuracy (%) | {value} | 84.77 ± 0.00 |" in text
    assert "| test accuracy (%) | " in text
    assert f"newsbert-ray train --student.layers {best.values['student.layers']}" in text


def test_front_is_a_table_and_a_figure(make_sweep: MakeSweep) -> None:
    """With two goals there is no best point, only choices; all of them must be there."""
    goals = [
        {"metric": "validation.student.accuracy", "mode": "max"},
        {"metric": "speed.student_titles_per_second", "mode": "max"},
    ]
    folder = make_sweep(axes=["student.layers", "distill.beta"], points=9, goals=goals)
    text = _said(folder)
    front = len(read_sweep(folder).front)
    assert text.startswith(
        f"# Sweep invented\n\n{front} of 9 finished points lie on the Pareto front of validation accuracy "
        "and student's titles/s."
    )
    assert f"The Pareto front: {front} points, mean ± sd over 2 seeds" in text
    assert "](pareto_front.png)" in text
    assert "Best by the first goal, validation.student.accuracy:" in text


def test_cost_says_what_was_saved_and_what_is_unknown(make_sweep: MakeSweep) -> None:
    """Early stopping pays only if somebody can see that it did."""
    text = _said(make_sweep(points=5, stopped=0.5, failed=1, prices={"cpu_hour": 3.6}))
    assert "- wall time: 20.6 min, all starts together" in text
    assert "- in training loops: 2.3 min over all trials; 1 trials (failed, or under way) wrote none" in text
    assert "- processors: 0.0389 CPU-hours, 0 GPU-hours" in text
    assert "- money: 0.14 (3.6 a CPU-hour; the training loops alone)" in text
    assert "34 epochs that were not trained, about 2.1 min at 3.68 s an epoch: 47% of what all" in text


def test_nothing_finished_still_says_what_is_searched(make_sweep: MakeSweep) -> None:
    """A report of a sweep that has just begun is asked for most."""
    text = _said(make_sweep(points=2, under_way=2, state="running"))
    assert "No point has finished yet, so there is no best one." in text
    assert "- points: 0 finished, 2 under way; 2 asked for" in text
    assert "- versions: python 3.11.7, torch 2.13.0" in text


def test_csv_holds_every_point(make_sweep: MakeSweep) -> None:
    """What the figures show must be there in full precision, stopped and failed points too."""
    sweep = read_sweep(make_sweep(points=6, stopped=0.5, failed=1))
    rows = list(csv.DictReader(io.StringIO(points_csv(sweep))))
    assert [row["state"] for row in rows] == ["finished"] * 3 + ["stopped"] * 2 + ["failed"]
    best = sweep.finished[0]
    assert float(rows[0]["distill.beta"]) == best.values["distill.beta"]
    assert float(rows[0]["validation.student.accuracy"]) == best.mean()
    assert rows[0]["n_seeds"] == "2"
    assert rows[3]["epochs"] == "1.0"
    assert rows[3]["validation.student.accuracy_sd"] == ""
    assert rows[5]["validation.student.accuracy"] == ""
