"""Rankings: every news of a split encoded once, the same numbers for any number of workers, and a submission
that says what was measured."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from newsbert_ray.config import PrepareSettings, SettingsError, build_settings
from newsbert_ray.data.prepare import prepare
from newsbert_ray.data.reading import read_impressions
from newsbert_ray.data.shards import ShardError, read_manifest, read_texts
from newsbert_ray.data.synthetic import synthesize
from newsbert_ray.evaluation import scoring as ranking
from newsbert_ray.evaluation.encoding import Pace
from newsbert_ray.evaluation.evaluate import evaluate, show
from newsbert_ray.evaluation.scoring import encode_news, score_rankings
from newsbert_ray.evaluation.submission import score_submission
from newsbert_ray.model.assemble import assemble_pair
from newsbert_ray.model.pair import Pair
from newsbert_ray.training.run import train
from newsbert_ray.world import World
from tests.conftest import MakeSettings

CPU = World()


class Together(World):
    """A worker that is a thread: its sums are over all threads of its group."""

    def __init__(self, rank: int, size: int, group: Group) -> None:
        super().__init__(rank, size)
        object.__setattr__(self, "group", group)

    def sum_tensor(self, values: Tensor) -> Tensor:
        return self.group.sum(self.rank, values)  # type: ignore[attr-defined,no-any-return]


class Group:
    """What the threads of a group have said."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.said: dict[int, Tensor] = {}

    def sum(self, rank: int, values: Tensor) -> Tensor:
        self.said[rank] = values
        self.barrier.wait(30)
        total = torch.stack([self.said[r] for r in sorted(self.said)]).sum(0)
        self.barrier.wait(30)
        return total


def pair_of(make_settings: MakeSettings) -> tuple[Pair, Path]:
    """A fresh recommendation pair in evaluation mode, and its shards' folder."""
    settings = make_settings(task="recommendation")
    return assemble_pair(settings, read_manifest(settings.data)).eval(), Path(settings.data)


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_workers_gives_the_same_numbers(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Metrics that moved with the number of workers could not be compared between two clusters."""
    monkeypatch.setattr(ranking, "BLOCK", 3)
    pair, folder = pair_of(make_settings)
    manifest = read_manifest(folder)
    alone = score_rankings(pair.models(), folder, manifest, "train", history=50, world=CPU, baselines=True)
    group = Group(size)
    found: dict[int, Any] = {}

    def work(rank: int) -> None:
        world = Together(rank, size, group)
        found[rank] = score_rankings(
            pair.models(), folder, manifest, "train", history=50, world=world, baselines=True
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[rank] for rank in range(size)] == [alone] * size
    assert set(alone) == {"teacher", "student", "popularity", "random"}


def test_scores_are_those_of_each_mention_encoded_alone(make_settings: MakeSettings) -> None:
    """A news looked up under another's number would be a metric of something else (AUC .5 unnoticed)."""
    pair, folder = pair_of(make_settings)
    manifest = read_manifest(folder)
    table = read_texts(folder, manifest)
    news = encode_news(pair.models(), folder, manifest, "test", history=50, world=CPU)
    _, block = next(read_impressions(folder, manifest, "test", history=50))
    found = ranking.score_block(pair.models(), news, block, world=CPU)["student"]

    def embed(row: int) -> Tensor:
        ids, mask = (torch.from_numpy(a) for a in table.ids(np.array([row]), pad_id=0))
        return pair.top.embed(pair.student(ids, mask.long()), mask.long())[0]

    with torch.inference_mode():
        for i in range(len(block)):
            read = block.history[block.history_offsets[i] : block.history_offsets[i + 1]]
            history = torch.stack([embed(row) for row in read]) if len(read) else torch.zeros(1, 16)
            mask = torch.full((1, len(history)), int(len(read) > 0))
            user = pair.top.head.encode_users(history[None], mask)[0]  # type: ignore[operator]
            for place in range(block.offsets[i], block.offsets[i + 1]):
                score = float(embed(block.candidates[place]) @ user)
                assert found[place] == pytest.approx(score, rel=1e-4, abs=1e-5)


def test_each_news_is_encoded_once(make_settings: MakeSettings) -> None:
    """Evaluation's speed is that of the number of different news, not of mentions."""
    pair, folder = pair_of(make_settings)
    manifest = read_manifest(folder)
    pace = Pace()
    score_rankings(pair.models(), folder, manifest, "test", history=50, world=CPU, pace=pace)
    named = ranking.find_news(folder, manifest, "test", history=50)
    assert pace.titles == len(named) == len(set(named.tolist()))
    blocks = [block for _, block in read_impressions(folder, manifest, "test", history=50)]
    mentioned = {int(row) for b in blocks for row in [*b.history, *b.candidates]}
    assert set(named.tolist()) == mentioned


def test_popularity_counts_training_clicks(make_settings: MakeSettings) -> None:
    """A baseline that saw the test's clicks would beat every model."""
    _, folder = pair_of(make_settings)
    manifest = read_manifest(folder)
    counts = ranking.count_clicks(folder, manifest)
    by_hand = np.zeros(manifest.texts.rows, int)
    for _, block in read_impressions(folder, manifest, "train", history=50):
        for row, click in zip(block.candidates.tolist(), block.clicked.tolist(), strict=True):
            by_hand[row] += click
    assert counts.tolist() == by_hand.tolist()
    assert counts.sum() > 0


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
    """Train on clicks, find the record's numbers again, and write what MIND's scorer would score alike."""
    settings = make_settings(task="recommendation", **{"checkpoint.keep": 1})
    record = train(settings, quiet=True)
    assert record.settings["distill"]["beta"] == 0.15
    assert record.curve[0]["train"].keys() >= {"user_embedding", "soft_labels", "teacher_task"}
    target = tmp_path / "prediction.zip"
    found = evaluate(settings.out, submission=target)
    for model in ("teacher", "student"):
        assert found[model] == pytest.approx(record.metrics["test"][model])
    manifest = read_manifest(settings.data)
    labelled: list[tuple[str, list[int] | None]] = []
    for rows, block in read_impressions(settings.data, manifest, "test", history=1):
        clicks = np.split(block.clicked, block.offsets[1:-1])
        labelled += zip(rows.column("impression_id").to_pylist(), (c.tolist() for c in clicks), strict=True)
    assert found["submission"]["lines"] == len(labelled)
    official = score_submission(target, iter(labelled))
    for metric in ("auc", "mrr", "ndcg5", "ndcg10"):
        assert official[metric] == pytest.approx(found["student"][metric], abs=1e-12)


def test_a_test_split_without_labels(make_settings: MakeSettings, unlabelled: Path, tmp_path: Path) -> None:
    """MIND's own test set carries none: a run must end well, and its ranking be written all the same."""
    settings = make_settings(task="recommendation", data=str(unlabelled), epochs=1)
    record = train(settings, quiet=True)
    assert record.metrics["test"] == {}
    found = evaluate(settings.out, submission=tmp_path / "prediction.txt")
    assert "student" not in found
    assert found["submission"]["lines"] == read_manifest(unlabelled).rows("test", "recommendation")
    (shown, *_) = show(settings.out, "U1")
    assert {offer.clicked for offer in shown.offers} == {None}


def test_a_user_is_shown(make_settings: MakeSettings) -> None:
    """People want to see it: what was read, and the candidates best first, by their own titles."""
    settings = make_settings(task="recommendation", epochs=1)
    train(settings, quiet=True)
    manifest = read_manifest(settings.data)
    shown = show(settings.out, "U3")
    blocks = list(read_impressions(settings.data, manifest, "test", history=50))
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
        show(settings.out, "U999")
    with pytest.raises(SettingsError, match="model 'nobody': the run keeps student and teacher"):
        show(settings.out, "U3", model="nobody")


def corpus_lines(shards: str) -> list[str]:
    """All lines of the news files behind the shared test shards."""
    files = sorted((Path(shards).parent / "mind").glob("*/news.tsv"))
    return [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def test_training_data_without_labels(make_settings: MakeSettings, tmp_path: Path) -> None:
    """Unlabelled behaviours given to training must end in one message, before a model is loaded."""
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
    """A topic model has no ranking to hand in."""
    settings = make_settings(epochs=1)
    train(settings, quiet=True)
    with pytest.raises(SettingsError, match="a submission needs a run of task recommendation"):
        evaluate(settings.out, submission=tmp_path / "p.zip")
    assert json.loads((Path(settings.out) / "student" / "top.json").read_text())["task"] == "topics"
