"""The page and the CSV of a sweep."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from rich.console import Console

from newsbert_ray.reporting.page import Picture
from newsbert_ray.reporting.sweep_data import read_sweep
from newsbert_ray.reporting.sweep_page import equal_points, points_csv, sweep_page, terminal_points
from tests.reporting.conftest import GOALS, MakeSweep, change_plan

AXES = ["learning_rate", "optimizer.decay", "optimizer.warmup_share", "student.layers"]
FIGURES: dict[str, Picture | str] = {
    "pareto_front": Picture("pareto_front.png", "<svg></svg>", "a front", "Front."),
    "metric_over_settings": Picture("metric_over_settings.png", "<svg></svg>", "dots", "Dots."),
    "importances": "too few points to say which settings mattered",
    "learning_curves": Picture("learning_curves.png", "<svg></svg>", "lines", "Lines."),
    "fig7_beta": "no beta",
    "seconds_by_part": "no time",
}


def _markdown(folder: Path) -> str:
    page = sweep_page(read_sweep(folder), FIGURES)
    assert page.html().count("<section") == len(page.sections)
    return page.markdown()


def test_sections_are_in_order(make_sweep: MakeSweep) -> None:
    """A reader finds the search first, then the best settings, then what mattered and what it cost."""
    text = _markdown(make_sweep(points=6))
    headings = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        "What was searched",
        "How it ended",
        "The best settings",
        "Metric over each setting",
        "Which settings mattered",
        "Learning curves",
        "What it cost",
        "Data, versions and hardware",
    ]
    assert "Too few points to say which settings mattered." in text


def test_search_is_described_completely(make_sweep: MakeSweep) -> None:
    """Without ranges, sampler, scheduler and seeds nobody can judge or repeat the search."""
    text = _markdown(
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
    assert "- goal: validation.student.accuracy, more is better" in text
    assert "- seeds of each point: 0, 1; their mean counts" in text
    assert "- points chosen by: multivariate tree-structured Parzen estimator (TPE), seed 0" in text
    assert "- tried first: 1 point of the search space" in text
    assert "- early stopping: ASHA, one in 4 continues from each rung; each trial had at least 2" in text
    assert "- limits: 2.5 hours of wall time, a cost of 10" in text
    assert "- fixed settings: epochs 9" in text
    assert "| learning_rate | 1e-05 to 0.01 | evenly over the logarithm |  |" in text
    assert "| optimizer.warmup_share | 0 to 0.5 | evenly | optimizer.decay is linear or cosine |" in text


def test_end_counts_points_and_names_failures(make_sweep: MakeSweep) -> None:
    """A failure shown without its reason has to be investigated again."""
    folder = make_sweep(points=9, stopped=0.5, failed=1, state="finished with failures")
    change_plan(folder, ends="3 failures")
    text = _markdown(folder)
    assert "- state: finished with failures (3 failures)" in text
    assert "- points: 4 finished, 4 stopped early, 1 failed; 9 requested" in text
    assert "- trials: 8 finished, 4 stopped early, 1 failed; 18 requested" in text
    assert "| LossError: the loss is \\<nan> at step 10 |" in text
    assert f"newsbert-ray sweep space.yaml --out {folder} --resume" in text


def test_many_failures_do_not_fill_the_page(make_sweep: MakeSweep) -> None:
    """Two hundred equal reasons would hide the rest; the caption says how many are left out."""
    folder = make_sweep(points=1)
    change_plan(folder, failures={f"beta={i},seed=0": "no memory" for i in range(30)})
    text = _markdown(folder)
    assert "Trials that failed, the first 20 of 30" in text
    assert text.count("no memory") == 20
    assert "- points: 1 finished, 30 failed; 1 requested" in text


def test_point_chosen_again_is_explained(make_sweep: MakeSweep) -> None:
    """Forty requested and thirty there would look like ten that were lost."""
    folder = make_sweep(points=3, seeds=(0,))
    change_plan(folder, trials=5)
    assert "; 5 requested (2 times the sampler chose a known point again, which is run once)" in _markdown(
        folder
    )


@pytest.mark.parametrize(
    ("state", "shown"),
    [
        ("running", "was interrupted"),
        ("interrupted", "interrupted"),
        ("broken off", "broken off (disk full)"),
    ],
)
def test_unfinished_sweep_shows_its_resume_command(make_sweep: MakeSweep, state: str, shown: str) -> None:
    """Somebody who finds an interrupted sweep must not have to guess the command."""
    folder = make_sweep(points=2, state=state)
    change_plan(folder, ends="disk full" if state == "broken off" else "")
    text = _markdown(folder)
    assert f"- state: {shown}" in text
    assert f"newsbert-ray sweep space.yaml --out {folder} --resume" in text
    assert "The command that trains it again appears here once the sweep has ended." in text


def test_best_has_its_command_its_teacher_and_its_test_split(make_sweep: MakeSweep) -> None:
    """A number without its teacher, spread and test split cannot be judged."""
    folder = make_sweep(axes=["student.layers"], points=2, seeds=(0, 1))
    sweep = read_sweep(folder)
    best = sweep.finished[0]
    summary = best.summary()
    assert summary is not None
    text = _markdown(folder)
    value = f"{100 * summary.mean:.2f} ± {100 * (summary.sd or 0):.2f}"
    assert f"Its validation accuracy: {value} %, its teacher's 84.77 ± 0.00 %." in text
    assert f"| validation accuracy (%) | {value} | 84.77 ± 0.00 |" in text
    assert "| test accuracy (%) | " in text
    assert f"newsbert-ray train --student.layers {best.values['student.layers']}" in text


def test_points_within_the_spread_are_equal(make_sweep: MakeSweep) -> None:
    """A difference smaller than the seeds' spread must not be presented as a ranking."""
    folder = make_sweep(axes=["learning_rate"], points=4)
    sweep = read_sweep(folder)
    best, *others = (point.summary() for point in sweep.finished)
    assert best is not None
    near = [s for s in others if s and best.mean - s.mean <= max(best.sd or 0.0, s.sd or 0.0)]
    assert equal_points(sweep) == 1 + len(near) < 4
    level = make_sweep("level", axes=["distill.temperature"], points=4)
    assert (count := equal_points(read_sweep(level))) > 1
    assert f"{count} of 4 finished points are equally good: they differ by no more" in _markdown(level)
    single = read_sweep(make_sweep("single", axes=["learning_rate"], points=4, seeds=(0,)))
    assert equal_points(single) == 1
    page = sweep_page(single, FIGURES).markdown()
    assert "equally good" not in page
    assert "One seed has no spread" in page


def test_front_is_a_table_and_a_figure(make_sweep: MakeSweep) -> None:
    """With two goals there is no best point, only choices; all of them must be there."""
    folder = make_sweep(axes=["student.layers", "distill.beta"], points=9, goals=GOALS)
    text = _markdown(folder)
    front = len(read_sweep(folder).front)
    assert text.startswith(
        f"# Sweep invented\n\n{front} of 9 finished points lie on the Pareto front of validation accuracy "
        "and student's titles/s."
    )
    assert f"The Pareto front: {front} points, mean ± sd over 2 seeds" in text
    assert "](pareto_front.png)" in text
    assert "Best by the first goal, validation.student.accuracy:" in text


def test_cost_shows_savings_and_unknown_times(make_sweep: MakeSweep) -> None:
    """Without the saving nobody can judge whether early stopping pays."""
    text = _markdown(make_sweep(points=5, stopped=0.5, failed=1, prices={"cpu_hour": 3.6}))
    assert "- wall time: 20.6 min, all sessions together" in text
    assert "- training loops: 2.3 min over all trials; 1 trials (failed or unfinished) recorded none" in text
    assert "- processors: 0.0389 CPU-hours, 0 GPU-hours" in text
    assert "- money: 0.14 (3.6 per CPU-hour; training loops only)" in text
    assert "34 epochs, about 2.1 min at 3.68 s per epoch: 47% of the time without early stopping" in text


def test_sweep_without_finished_points_has_a_page(make_sweep: MakeSweep) -> None:
    """A report of a sweep that has just begun is requested most."""
    text = _markdown(make_sweep(points=2, under_way=2, state="running"))
    assert "No point has finished yet, so there is no best one." in text
    assert "- points: 0 finished, 2 unfinished; 2 requested" in text
    assert "- versions: python 3.11.7, torch 2.13.0" in text


def test_csv_holds_every_point(make_sweep: MakeSweep) -> None:
    """The CSV has the numbers of the figures in full precision, also of stopped and failed points."""
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


def test_points_for_a_terminal(make_sweep: MakeSweep, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best first; a narrow terminal leaves out columns, but neither the goal nor a digit of it."""
    axes = ["learning_rate", "distill.beta", "student.layers", "distill.temperature", "batch_size"]
    sweep = read_sweep(make_sweep(axes=axes, points=5, under_way=1))
    for width, few in ((300, False), (70, True)):
        monkeypatch.setenv("COLUMNS", str(width))
        table = terminal_points(sweep)
        assert table is not None
        console = Console(width=width, file=io.StringIO(), record=True)
        console.print(table)
        text = console.export_text()
        places = [text.index(f"{100 * point.mean():.2f} ± ") for point in sweep.finished]
        assert places == sorted(places)
        assert len(places) == 4
        assert ("seconds" not in text) == few
        assert "…" not in text
    assert terminal_points(read_sweep(make_sweep("new", points=0, state="running"))) is None
