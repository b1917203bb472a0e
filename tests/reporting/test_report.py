"""The report of runs and of sweeps, with all its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from newsbert_ray.record import RecordError, write_record
from newsbert_ray.reporting import statistics as importance
from newsbert_ray.reporting.report import report
from tests.reporting.conftest import BROWSER, GOALS, MakeRecord, MakeSweep, open_pages


def _write_sweep(folder: Path, make_record: MakeRecord) -> None:
    for i, (beta, seed) in enumerate((beta, seed) for beta in (0.0, 0.1) for seed in (0, 1)):
        record = make_record(accuracy=0.6 + beta + 0.01 * seed, seed=seed, **{"distill.beta": beta})
        write_record(folder / str(i), record)


def _write_run(folder: Path, make_record: MakeRecord) -> None:
    record = make_record(accuracy=0.712)
    speed = {"student_titles_per_second": 900.0, "teacher_titles_per_second": 300.0, "times_teacher": 3.0}
    write_record(folder, record.model_copy(update={"metrics": {**record.metrics, "speed": speed}}))
    log = {"kind": "log", "steps": 8, "epochs": 1, "train": {"student_task": 1.0}}
    lines = [json.dumps({**log, "step": step}) for step in (4, 8)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    titles = {"topic": [0, 1, 1], "x": [0.0, 1.0, 2.0], "y": [0.0] * 3}
    titles |= {"split": "test", "labels": ["news", "sport"], "share": 1.0, "confusion": [[1, 0], [1, 1]]}
    titles["mistakes"] = [{"title": "Rain " * 20, "topic": 1, "predicted": 0, "probability": 0.99}]
    (folder / "map.json").write_text(json.dumps(titles))


def test_report_of_runs_is_complete(tmp_path: Path, make_record: MakeRecord) -> None:
    """Table, settings and every figure that the page names, each in both forms."""
    _write_sweep(tmp_path / "sweep", make_record)
    written = report([tmp_path / "sweep"], out=tmp_path / "out")
    names = [path.name for path in written]
    assert names == [
        "report.md",
        "report.html",
        "report.csv",
        "tables.tex",
        "fig7_beta.png",
        "fig7_beta.svg",
        "learning_curves.png",
        "learning_curves.svg",
    ]
    assert all(path.stat().st_size > 100 for path in written)
    page = written[0].read_text()
    assert "4 runs, test split" in page
    assert "| 0.0 | 2 | 60.5 ± 0.7 |" in page
    assert "highest 70.5 at β = 0.1 (N = 2)" in page
    assert "](fig7_beta.png)" in page
    assert "- data: synthetic_train (ab12cd34), 1,800 train, 400 test" in page
    assert "- settings that vary: distill.beta" in page


@pytest.mark.usefixtures("_undrawn")
def test_figures_of_an_earlier_report_are_removed(
    tmp_path: Path, make_record: MakeRecord, make_sweep: MakeSweep
) -> None:
    """They would be taken for figures of this report; other files stay."""
    earlier = report([make_sweep(points=3, goals=GOALS)], out=tmp_path / "out")
    assert {"pareto_front.png", "metric_over_settings_2.svg"} <= {path.name for path in earlier}
    (tmp_path / "out" / "mine.png").touch()
    write_record(tmp_path / "run", make_record(epochs=1))
    report([tmp_path / "run"], out=tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "mine.png",
        "report.csv",
        "report.html",
        "report.md",
        "tables.tex",
    ]


@pytest.mark.usefixtures("_undrawn")
def test_folder_named_twice_counts_once(tmp_path: Path, make_record: MakeRecord) -> None:
    """`report sweep sweep/0` must not count a run twice."""
    _write_sweep(tmp_path / "sweep", make_record)
    page = report([tmp_path / "sweep", tmp_path / "sweep" / "0"], out=tmp_path / "out")[0].read_text()
    assert "4 runs, test split" in page
    assert "left out" not in page


NOTES = {
    "copies": [
        "Fig. 7 (metric over beta) is left out: beta does not vary",
        "1 repeats of a run (same settings and seed) are left out",
    ],
    "versions": ["- versions (they differ): python 3.11.7, torch 2.13.0; torch 2.6.0"],
    "an older record": ["- data: shards"],
}


@pytest.mark.usefixtures("_undrawn")
@pytest.mark.parametrize("case", NOTES)
def test_what_a_reader_must_know_is_noted(tmp_path: Path, make_record: MakeRecord, case: str) -> None:
    """A figure left out, a repeated run, two versions of torch; a record without details of its data."""
    other = make_record(seed=1).model_copy(update={"versions": {"torch": "2.6.0"}})
    older = make_record(described={})
    cases = {"copies": [make_record()] * 2, "versions": [make_record(), other], "an older record": [older]}
    for index, record in enumerate(cases[case]):
        write_record(tmp_path / str(index), record)
    page = report([tmp_path], out=tmp_path / "out")[0].read_text()
    assert all(note in page for note in NOTES[case])


@pytest.mark.usefixtures("_undrawn")
def test_single_run_starts_with_its_result(tmp_path: Path, make_record: MakeRecord) -> None:
    """The page of one run has its metric, its teacher's and its losses; beta cannot vary over one run."""
    _write_run(tmp_path / "run", make_record)
    page = report([tmp_path / "run"], out=tmp_path / "out")[0].read_text()
    assert "Its student's test accuracy: 71.2 %; its teacher's: 80.0 %." in page
    assert "| test accuracy (%) | 71.2 | 80.0 |" in page
    assert "| titles/s at work | 900 | 300 |" in page
    assert "| times its teacher's titles/s | 3.0 |  |" in page
    assert "| sport | news | 99.0 |" in page
    assert "](losses.png)" in page
    assert "| sport | news | 2 | 100.0 | 50.0 | 66.7 |" in page
    assert "Fig. 7" not in page


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_reports_open_in_a_browser(
    tmp_path: Path,
    make_record: MakeRecord,
    make_sweep: MakeSweep,
    monkeypatch: pytest.MonkeyPatch,
    dark: bool,
) -> None:
    """A run's and a sweep's page: no overflow, no error on the console, every figure is drawn."""
    monkeypatch.setattr(importance, "REPEATS", 2)
    _write_run(tmp_path / "run", make_record)
    sweep = make_sweep(axes=["learning_rate", "distill.beta"], points=16, stopped=0.5, failed=1)
    pages = [report([folder], out=tmp_path / "out")[1].read_text() for folder in (tmp_path / "run", sweep)]
    figures = [page.count("<figure") for page in pages]
    assert min(figures) >= 3
    assert open_pages(pages, tmp_path, dark=dark) == [[0, count] for count in figures for _ in range(2)]


def test_missing_folder_is_named(tmp_path: Path) -> None:
    """A mistyped folder must not give a report of the others alone."""
    with pytest.raises(RecordError, match="nowhere: no such folder"):
        report([tmp_path / "nowhere"], out=tmp_path / "out")


def test_damaged_record_ends_the_report(tmp_path: Path, make_record: MakeRecord) -> None:
    """Leaving out a damaged run would change the mean without a message."""
    _write_sweep(tmp_path / "sweep", make_record)
    (tmp_path / "sweep" / "2" / "record.json").write_text("{")
    with pytest.raises(RecordError, match=r"2/record\.json: not a complete run record"):
        report([tmp_path / "sweep"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sweep_gets_its_own_page(
    tmp_path: Path, make_sweep: MakeSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every figure that the page names exists, in both forms and in the same order."""
    monkeypatch.setattr(importance, "REPEATS", 2)
    folder = make_sweep(axes=["learning_rate", "distill.beta"], points=16, stopped=0.5, failed=1)
    written = report([folder], out=tmp_path / "out")
    names = [path.name for path in written]
    drawn = ["metric_over_settings", "importances", "learning_curves", "seconds_by_part"]
    assert names[:4] == ["report.md", "report.html", "report.csv", "tables.tex"]
    assert [name for name in names if name.endswith(".png") and name != "fig7_beta.png"] == [
        f"{name}.png" for name in drawn
    ]
    page = written[0].read_text()
    assert page.startswith("# Sweep invented\n\n")
    places = [page.index(f"]({name}.png)") for name in drawn]
    assert places == sorted(places)
    assert written[1].read_text().count("<svg ") == page.count("![")


def test_sweep_that_has_just_begun_is_reported(tmp_path: Path, make_sweep: MakeSweep) -> None:
    """A sweep without results has a page that says so."""
    folder = make_sweep(points=0, state="running")
    md, html, rows, _, *figures = report([folder], out=tmp_path / "out")
    assert "No point has finished yet" in md.read_text()
    assert "No point has finished yet" in html.read_text()
    assert rows.read_text().startswith("distill.beta,state,n_seeds,epochs,validation.student.accuracy,")
    assert figures == []


@pytest.mark.usefixtures("_undrawn")
def test_sweep_among_other_folders_gives_its_records(
    tmp_path: Path, make_sweep: MakeSweep, make_record: MakeRecord
) -> None:
    """A run and a sweep's trials can be compared in one table."""
    write_record(tmp_path / "run", make_record(accuracy=0.9, epochs=1))
    folder = make_sweep(points=1, seeds=(0,))
    page = report([folder, tmp_path / "run"], out=tmp_path / "out")[0].read_text()
    assert page.startswith("# Report\n\n2 runs, test split.")


@pytest.mark.usefixtures("_undrawn")
def test_tasks_have_their_own_tables_and_figures(tmp_path: Path, make_record: MakeRecord) -> None:
    """Runs of two tasks must be neither compared in one table nor averaged in one figure."""
    for seed in (0, 1):
        write_record(tmp_path / "runs" / f"topics-{seed}", make_record(seed=seed, accuracy=0.75))
        record = make_record(seed=seed, task="recommendation", auc=0.625)
        write_record(tmp_path / "runs" / f"clicks-{seed}", record)
    written = report([tmp_path / "runs"], out=tmp_path / "out")
    page = written[0].read_text()
    assert page.index("Topics: 2 runs.") < page.index("| seeds | accuracy % ")
    assert page.index("| seeds | accuracy % ") < page.index(
        "Recommendation: 2 runs, 397 impressions (3 left out)"
    )
    assert "AUC 0.8, MRR 0.8, nDCG@5 0.8, nDCG@10 0.8." in page
    assert "| 2 | 62.5 ± 0.0 |" in page
    assert "recommendation: Fig. 7 (metric over beta) is left out" in page
    assert {path.name for path in written if path.suffix == ".png"} == {
        "learning_curves_topics.png",
        "learning_curves_recommendation.png",
    }


@pytest.mark.usefixtures("_undrawn")
def test_run_without_test_labels_is_reported(tmp_path: Path, make_record: MakeRecord) -> None:
    """A run on MIND's own test set must have a page that says why it has no numbers."""
    write_record(tmp_path / "run", make_record(task="recommendation", method="finetune", labelled=False))
    page = report([tmp_path / "run"], out=tmp_path / "out")[0].read_text()
    assert "Recommendation: 1 run, 1 on a test split without labels." in page


@pytest.mark.usefixtures("_undrawn")
def test_sweep_of_recommendation_uses_its_own_metrics(tmp_path: Path, make_sweep: MakeSweep) -> None:
    """Its page must not speak of accuracy and titles."""
    folder = make_sweep(task="recommendation", points=3)
    md, _, rows, *_ = report([folder], out=tmp_path / "out")
    page = md.read_text()
    assert "Its validation AUC: " in page
    assert "| test nDCG@10 (%) | " in page
    assert "clicks/s in training" in page
    assert "accuracy" not in page
    goal = "validation.student.auc,validation.student.auc_sd"
    assert rows.read_text().startswith(f"distill.beta,state,n_seeds,epochs,{goal},auc,auc_sd,mrr,")


@pytest.mark.usefixtures("_undrawn")
def test_failed_trials_of_several_sweeps_are_shown(
    tmp_path: Path, make_record: MakeRecord, make_sweep: MakeSweep
) -> None:
    """As in the report of one sweep."""
    runs = [make_record(method=method, **{"student.layers": 2}) for method in ("newsbert", "finetune")]
    folder = make_sweep(axes=["student.layers"], points=2, seeds=(0,), failed=2)
    write_record(tmp_path / "run", runs[0])
    write_record(folder / "trials" / "other", runs[1])
    plan = json.loads((folder / "sweep.json").read_text())
    plan["space"]["axes"].append({"name": "method", "values": ["pkd"]})
    lost = {f"layers={n},method=pkd,seed=0": "no memory" for n in (1, 2)}
    (folder / "sweep.json").write_text(json.dumps({**plan, "failures": lost}))
    written = report([tmp_path / "run", folder], out=tmp_path / "out")
    rows = [line for line in written[0].read_text().splitlines() if line.startswith("| BERT-PKD")]
    assert [row.split("|")[3].strip() for row in rows] == ["0 (1 failed)"] * 2
