"""Finished runs evaluated again: topics, users, rankings and prediction files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import newsbert_ray
from newsbert_ray import cli
from newsbert_ray.config import PrepareSettings, SettingsError, build_settings
from newsbert_ray.data.prepare import prepare
from newsbert_ray.data.reading import SplitData
from newsbert_ray.data.shards import MANIFEST, ShardError, read_manifest
from newsbert_ray.data.synthetic import synthesize
from newsbert_ray.evaluation.evaluate import SubmissionError, evaluate
from newsbert_ray.training.run import train
from tests.conftest import MakeSettings, change_json
from tests.evaluation.test_submission import official_scores

if TYPE_CHECKING:
    from tests.conftest import MakeSettings


def test_a_run_by_topic(make_settings: MakeSettings, capsys: pytest.CaptureFixture[str]) -> None:
    """The rows add up to `evaluate`'s numbers, and the command line prints them."""
    settings = make_settings(epochs=1)
    train(settings, quiet=True)
    for model in ("student", "teacher"):
        rows = evaluate(settings.out, by_topic=True, model=model)
        whole = evaluate(settings.out)[model]
        assert sum(row.titles for row in rows) == sum(row.predicted for row in rows) == whole["rows"]
        assert sum(row.f1 for row in rows) / len(rows) == pytest.approx(whole["macro_f1"])
        assert [row.titles for row in rows] == sorted((row.titles for row in rows), reverse=True)
    with pytest.raises(SettingsError, match=r"split = 'all'.*'train'"):
        newsbert_ray.evaluate(settings.out, split="all", by_topic=True)  # type: ignore[arg-type]
    capsys.readouterr()
    assert cli.main(["evaluate", settings.out, "--by_topic", "--split", "validation"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("precision", "recall", "F1", "most often taken for", "macro-F1"))
    assert cli.main(["evaluate", settings.out, "--by_topic", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == [row._asdict() for row in evaluate(settings.out, by_topic=True)]
    assert cli.main(["evaluate", settings.out, "--by_topic", "--show", "U1"]) == 2
    assert "give only one of submission, by_topic and show" in capsys.readouterr().err


def test_clicks_have_no_topics(make_settings: MakeSettings) -> None:
    """A run of another task gets a message that names its task."""
    settings = make_settings(task="recommendation", epochs=1, **{"recommendation.history": 5})
    train(settings, quiet=True)
    with pytest.raises(SettingsError, match="needs a run of task topics"):
        evaluate(settings.out, by_topic=True)


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with an unlabelled test split."""
    folder = tmp_path_factory.mktemp("unlabelled")
    sources = synthesize(
        folder / "mind", news=320, users=10, topics=4, seed=3, folders=("train", "dev", "test"),
        unlabelled=("test",),
    )  # fmt: skip
    values = {
        "source": [str(source) for source in sources], "teacher": "scratch", "out": str(folder / "shards"),
        "workers": 0, "scratch": {"vocabulary": 400},
    }  # fmt: skip
    prepare(build_settings(PrepareSettings, values), say=lambda _: None)
    return folder / "shards"


def test_a_recommendation_run_from_end_to_end(
    make_settings: MakeSettings, unlabelled: Path, tmp_path: Path
) -> None:
    """Train on clicks, compute the record's numbers again, and write a prediction file with MIND's score."""
    settings = make_settings(task="recommendation", **{"checkpoint.keep": 1})
    record = train(settings, quiet=True)
    assert record.settings["distill"]["beta"] == 0.15
    assert record.curve[0]["train"].keys() >= {"user_embedding", "soft_labels", "teacher_task"}
    target = tmp_path / "prediction.zip"
    with pytest.raises(SubmissionError, match=r"\.zip \(as MIND accepts it\) or \.txt"):
        evaluate(settings.out, submission=tmp_path / "prediction.gz")
    found = evaluate(settings.out, submission=target)
    for model in ("teacher", "student"):
        assert found[model] == pytest.approx(record.metrics["test"][model])
    manifest = read_manifest(settings.data)
    clicked: list[list[int]] = []
    newcomers = 0
    for _, block in SplitData(Path(settings.data), manifest, "test", history=1).impressions():
        newcomers += int((np.diff(block.history_offsets) == 0).sum())
        clicked += [clicks.tolist() for clicks in np.split(block.clicked, block.offsets[1:-1])]
    assert found["submission"]["lines"] == len(clicked)
    assert newcomers  # their candidates may not tie: the file would order them, and score them differently
    official = official_scores(target, clicked)
    for metric in ("auc", "mrr", "ndcg5", "ndcg10"):
        assert official[metric] == pytest.approx(found["student"][metric], abs=1e-12)


def test_a_test_split_without_labels(make_settings: MakeSettings, unlabelled: Path, tmp_path: Path) -> None:
    """MIND's own test set has no labels: the run must finish and its ranking can be written."""
    settings = make_settings(task="recommendation", data=str(unlabelled), epochs=1)
    record = train(settings, quiet=True)
    assert record.metrics["test"] == {}
    found = evaluate(settings.out, submission=tmp_path / "prediction.txt")
    assert "student" not in found
    assert found["submission"]["lines"] == read_manifest(unlabelled).rows("test", "recommendation")
    (shown, *_) = evaluate(settings.out, show="U1")
    assert {offer.clicked for offer in shown.offers} == {None}


def test_submission_of_shards_that_lack_lines(
    make_settings: MakeSettings, unlabelled: Path, tmp_path: Path
) -> None:
    """MIND refuses a file with fewer lines than behaviors.tsv; a check against the shards cannot see it."""
    settings = make_settings(task="recommendation", data=str(unlabelled), epochs=1)
    train(settings, quiet=True)
    shards = tmp_path / "shards"
    shutil.copytree(unlabelled, shards)
    manifest = json.loads((shards / MANIFEST).read_text())
    source = next(s for s in reversed(manifest["sources"]) if s["file"] == "behaviors.tsv")
    source |= {"rows": source["rows"] + 2, "rejected": 2}
    change_json(shards / MANIFEST, sources=manifest["sources"])
    with pytest.raises(SubmissionError, match=r"test/behaviors.tsv has \d+ lines, .* lack 2,"):
        evaluate(settings.out, data=shards, submission=tmp_path / "p.zip")
    assert not (tmp_path / "p.zip").exists()
    assert evaluate(settings.out, data=shards, split="validation")["split"] == "validation"


def test_a_user_is_shown(make_settings: MakeSettings) -> None:
    """The user's history and candidates are shown with their titles, best first."""
    settings = make_settings(task="recommendation", epochs=1)
    train(settings, quiet=True)
    manifest = read_manifest(settings.data)
    shown = evaluate(settings.out, show="U3")
    blocks = list(SplitData(Path(settings.data), manifest, "test").impressions())
    users = [user for rows, _ in blocks for user in rows.column("user_id").to_pylist()]
    assert len(shown) == users.count("U3") > 0
    for one in shown:
        scores = [offer.score for offer in one.offers]
        assert scores == sorted(scores, reverse=True)
    ids = [rows.column("impression_id").to_pylist() for rows, _ in blocks]
    assert {one.impression_id for one in shown} <= {i for part in ids for i in part}
    titles = {line.split("\t")[0]: line.split("\t")[3] for line in corpus_lines(settings.data)}
    for one in shown:
        for news in [*one.history, *(offer.news for offer in one.offers)]:
            assert titles[news.news_id] == news.title
    with pytest.raises(ShardError, match="user 'U999': no impression in the test split; U1 has one"):
        evaluate(settings.out, show="U999")
    with pytest.raises(SettingsError, match="model 'nobody': the run keeps student and teacher"):
        evaluate(settings.out, show="U3", model="nobody")


def corpus_lines(shards: str) -> list[str]:
    """All lines of the news files of the shared test shards."""
    files = sorted((Path(shards).parent / "mind").glob("*/news.tsv"))
    return [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def test_training_data_without_labels(make_settings: MakeSettings, tmp_path: Path) -> None:
    """Unlabelled training data must give one message before a model is loaded."""
    sources = synthesize(tmp_path / "mind", news=320, users=10, topics=4, unlabelled=("train",))
    values = {
        "source": [str(source) for source in sources], "teacher": "scratch",
        "out": str(tmp_path / "shards"), "workers": 0, "scratch": {"vocabulary": 400},
    }  # fmt: skip
    prepare(build_settings(PrepareSettings, values), say=lambda _: None)
    settings = make_settings(task="recommendation", data=str(tmp_path / "shards"))
    with pytest.raises(ShardError, match="its train split has no clicks to train on"):
        train(settings, quiet=True)
    with pytest.raises(ShardError, match=r"prepared for topics and recommendation, not for retrieval"):
        train(make_settings(task="retrieval", out=str(tmp_path / "other")), quiet=True)


def test_a_submission_needs_a_recommendation_run(make_settings: MakeSettings, tmp_path: Path) -> None:
    """A topic model ranks nothing."""
    settings = make_settings(epochs=1)
    train(settings, quiet=True)
    with pytest.raises(SettingsError, match="a submission needs a run of task recommendation"):
        evaluate(settings.out, submission=tmp_path / "p.zip")
    assert json.loads((Path(settings.out) / "student" / "top.json").read_text())["task"] == "topics"
