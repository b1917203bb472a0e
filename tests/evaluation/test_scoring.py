"""Scoring: equal numbers for any number of workers, the measured speed, and the map of titles."""

from __future__ import annotations

import copy
import json
import math
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from newsbert_ray.data.reading import SplitData, World
from newsbert_ray.data.shards import Split, read_manifest, read_texts
from newsbert_ray.evaluation import scoring as ranking
from newsbert_ray.evaluation.metrics import rank_candidates
from newsbert_ray.evaluation.scoring import (
    MISTAKES,
    Pace,
    between_topics,
    encode_news,
    map_titles,
    score_models,
    score_rankings,
)
from newsbert_ray.model.assemble import assemble_pair
from newsbert_ray.model.pair import Pair
from newsbert_ray.model.saved import load_student
from newsbert_ray.record import MAP, RunRecord, write_record
from newsbert_ray.reporting.figures import OTHERS, NothingToDraw, map_figure
from newsbert_ray.reporting.report import report
from newsbert_ray.serving.predictor import load
from newsbert_ray.training.run import train
from tests.conftest import MakeSettings


def test_speed_is_titles_over_each_models_own_seconds() -> None:
    """Swapped models or an inverted ratio would turn the Pareto front around."""
    speed = Pace(titles=600, seconds={"teacher": 3.0, "student": 1.5}).speed
    assert speed == {
        "student_titles_per_second": 400.0,
        "teacher_titles_per_second": 200.0,
        "times_teacher": 2.0,
    }


def test_timing_leaves_the_scores_alone(make_settings: MakeSettings) -> None:
    """Metrics must be equal bit for bit with and without timing."""
    settings = make_settings()
    manifest = read_manifest(settings.data)
    models = assemble_pair(settings, manifest).eval().models()
    data, pace = SplitData.of(settings, manifest, "test"), Pace()
    plain, timed = (score_models(models, data, world=CPU, pace=measured) for measured in (None, pace))
    assert plain == timed
    assert pace.titles == manifest.rows("test")
    assert set(pace.seconds) == {"teacher", "student"}
    assert min(pace.seconds.values()) > 0.0


def test_a_record_says_how_fast_its_student_is(make_settings: MakeSettings) -> None:
    """Sweeps over quality and speed use these numbers; a deeper teacher is slower."""
    sizes = {"layers": 8, "hidden": 64, "heads": 2, "feed_forward": 256}
    settings = make_settings(scratch=sizes, epochs=1, **{"student.layers": 1})
    speed = train(settings, quiet=True).metrics["speed"]
    ratio = speed["student_titles_per_second"] / speed["teacher_titles_per_second"]
    assert speed["times_teacher"] == pytest.approx(ratio)
    assert speed["times_teacher"] > 1.5


CPU = World()


class Together(World):
    """A worker that is a thread; its sums are over all threads of its group."""

    def __init__(self, rank: int, size: int, group: Group) -> None:
        super().__init__(rank, size)
        object.__setattr__(self, "group", group)

    def sum_tensor(self, values: Tensor) -> Tensor:
        return self.group.sum(self.rank, values)  # type: ignore[attr-defined,no-any-return]


class Group:
    """Values that the threads of a group have contributed."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.said: dict[int, Tensor] = {}

    def sum(self, rank: int, values: Tensor) -> Tensor:
        self.said[rank] = values
        self.barrier.wait(120)
        total = torch.stack([self.said[r] for r in sorted(self.said)]).sum(0)
        self.barrier.wait(120)
        return total


def pair_and_data(make_settings: MakeSettings, split: Split) -> tuple[Pair, SplitData]:
    """A fresh recommendation pair in evaluation mode, and a split of its shards."""
    settings = make_settings(task="recommendation")
    manifest = read_manifest(settings.data)
    return assemble_pair(settings, manifest).eval(), SplitData.of(settings, manifest, split)


def rank(pair: Pair, data: SplitData, world: World) -> Any:
    """The metrics of both models and of the baselines."""
    news = encode_news(pair.models(), data, data.news_rows(), world=world)
    return score_rankings(pair.models(), data, news, world=world, baselines=True)


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_workers_gives_the_same_numbers(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Metrics that depend on the number of workers could not be compared between clusters."""
    monkeypatch.setattr(ranking, "BLOCK", 3)
    pair, data = pair_and_data(make_settings, "train")
    alone = rank(pair, data, CPU)
    group = Group(size)
    scores: dict[int, Any] = {}
    own = [copy.deepcopy(pair) for _ in range(size)]  # transformers 5.0 can't run one model in two threads

    def work(number: int) -> None:
        scores[number] = rank(own[number], data, Together(number, size, group))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [scores[number] for number in range(size)] == [alone] * size
    assert set(alone) == {"teacher", "student", "popularity", "tfidf", "random"}


def test_scores_are_those_of_each_mention_encoded_alone(make_settings: MakeSettings) -> None:
    """Scores with a wrong news embedding would be near AUC 0.5 without an error."""
    pair, data = pair_and_data(make_settings, "test")
    table = read_texts(data.folder, data.manifest)
    news = encode_news(pair.models(), data, data.news_rows(), world=CPU)
    _, block = next(data.impressions())
    scores = ranking.score_block(pair.models(), news, block, world=CPU)["student"]

    def embed(row: int) -> Tensor:
        ids, mask = (torch.from_numpy(a) for a in table.ids(np.array([row]), pad_id=0))
        return pair.top.embed(pair.student(ids, mask.long()), mask.long())[0]

    with torch.inference_mode():
        for i in range(len(block)):
            read = block.history[block.history_offsets[i] : block.history_offsets[i + 1]]
            history = torch.stack([embed(row) for row in read]) if len(read) else torch.zeros(1, 16)
            mask = torch.full((1, len(history)), int(len(read) > 0))
            user = pair.top.head.encode_users(history[None], mask)[0]  # type: ignore[operator]
            for index in range(block.offsets[i], block.offsets[i + 1]):
                score = float(embed(block.candidates[index]) @ user)
                assert scores[index] == pytest.approx(score, rel=1e-4, abs=1e-5)


def test_each_news_is_encoded_once(make_settings: MakeSettings) -> None:
    """Evaluation time must depend on the number of different news, not of mentions."""
    pair, data = pair_and_data(make_settings, "test")
    pace = Pace()
    score_models(pair.models(), data, world=CPU, pace=pace)
    named = data.news_rows()
    assert pace.titles == len(named) == len(set(named.tolist()))
    blocks = [block for _, block in data.impressions()]
    mentioned = {int(row) for b in blocks for row in [*b.history, *b.candidates]}
    assert set(named.tolist()) == mentioned


def test_candidates_without_a_title_come_last(make_settings: MakeSettings) -> None:
    """A submission needs a rank for each; a metric over guessed ranks would mean nothing."""
    pair, data = pair_and_data(make_settings, "test")
    news = encode_news(pair.models(), data, data.news_rows(), world=CPU)
    _, block = next(data.impressions())
    first, size = int(block.offsets[1]), int(block.offsets[2] - block.offsets[1])
    candidates = block.candidates.copy()
    candidates[[first, first + 2]] = -1
    hole = replace(block, candidates=candidates)
    whole, scores = (ranking.score_block(pair.models(), news, b, world=CPU)["student"] for b in (block, hole))
    known = candidates >= 0
    assert (scores[known] == whole[known]).all()
    ranks = rank_candidates(scores, block.offsets)
    assert ranks[[first, first + 2]].tolist() == [size - 1, size]
    of_all, of_known = ranking._tally(whole, block), ranking._tally(scores, hole)
    assert of_known[:2].tolist() == [of_all[0] - 1, of_all[1] + 1]


def test_titles_without_a_label_are_not_counted(make_settings: MakeSettings) -> None:
    """They would be counted as errors of some topic."""
    settings = make_settings()
    manifest = read_manifest(settings.data)
    models = assemble_pair(settings, manifest).eval().models()
    first, *others = SplitData.of(settings, manifest, "test").batches(16)
    hidden = [
        replace(b, target=replace(b.target, labels=torch.full_like(b.target.labels, -1))) for b in others
    ]
    count = partial(ranking.count_topics, models, topics=len(manifest.labels), world=CPU)
    alone, beside = count([first]), count([first, *hidden])
    assert (alone["student"] == beside["student"]).all()
    assert alone["student"].sum() == 16


def test_a_profile_is_the_sum_of_what_was_clicked(make_settings: MakeSettings) -> None:
    """Against the definition, one user and one candidate at a time."""
    _, data = pair_and_data(make_settings, "test")
    table = read_texts(data.folder, data.manifest)
    texts = [tokens.tolist() for tokens in table.split(np.arange(len(table)))]
    among = Counter(token for text in texts for token in set(text))

    def vector(row: int) -> Counter[int]:
        weights = {
            t: (1 + math.log(n)) * math.log(len(texts) / among[t]) for t, n in Counter(texts[row]).items()
        }
        length = math.hypot(*weights.values())
        return Counter({token: weight / length for token, weight in weights.items()})

    _, block = next(data.impressions())
    expected = []
    for i in range(len(block)):
        user: Counter[int] = Counter()
        for row in block.history[block.history_offsets[i] : block.history_offsets[i + 1]]:
            user.update(vector(int(row)))
        length = math.hypot(*user.values()) or 1.0
        for row in block.candidates[block.offsets[i] : block.offsets[i + 1]]:
            expected.append(sum(weight * user[t] for t, weight in vector(int(row)).items()) / length)
    scores = ranking.ProfileScores(data).score(block)
    assert scores == pytest.approx(expected, abs=1e-12)
    assert max(expected) > 0.1


def test_popularity_counts_training_clicks(make_settings: MakeSettings) -> None:
    """A baseline that used the test's clicks would beat every model."""
    _, data = pair_and_data(make_settings, "test")
    counts = ranking.count_clicks(data)
    by_hand = np.zeros(data.manifest.texts.rows, int)
    for _, block in replace(data, split="train").impressions():
        for row, click in zip(block.candidates.tolist(), block.clicked.tolist(), strict=True):
            by_hand[row] += click
    assert counts.tolist() == by_hand.tolist()
    assert counts.sum() > 0


MakeRecord = Callable[..., RunRecord]


def test_the_plane_is_that_of_the_topics_means() -> None:
    """Noise in a hundred dimensions is larger than the distance between topics and must not define the
    axes."""
    generator = np.random.default_rng(0)
    topics = np.repeat([0, 1, 2], 40)
    means = np.zeros((3, 100))
    means[0, 3], means[1, 7] = 5.0, 4.0
    embeddings = means[topics] + generator.normal(size=(120, 100)) * np.where(np.arange(100) == 50, 9.0, 0.3)
    places, share = between_topics(embeddings, topics)
    middle = np.stack([places[topics == topic].mean(0) for topic in range(3)])
    apart = np.linalg.norm(middle[:, None] - middle[None], axis=-1)
    assert apart[0, 1] == pytest.approx(np.hypot(5, 4), rel=0.2)
    assert apart[0, 2] == pytest.approx(5, rel=0.2)
    assert share == pytest.approx(1.0, abs=0.05)


def test_one_topic_or_one_dimension_is_still_a_map() -> None:
    """Without differences between topics all points are at 0."""
    places, _ = between_topics(np.ones((4, 3)), np.zeros(4, dtype=np.int64))
    assert np.allclose(places, 0.0)
    places, share = between_topics(np.array([[0.0], [1.0], [2.0]]), np.array([0, 1, 1]))
    assert (places.shape, share) == ((3, 2), 1.0)


def test_a_run_leaves_its_map(make_settings: MakeSettings) -> None:
    """Test titles of all lengths are on the map, and the report draws it."""
    settings = make_settings(epochs=1)
    train(settings, quiet=True)
    found = json.loads((Path(settings.out) / MAP).read_text())
    manifest = read_manifest(settings.data)
    assert found["split"] == "test"
    assert len(found["topic"]) == len(found["x"]) == len(found["y"]) == manifest.rows("test", "topics")
    assert max(found["topic"]) < len(found["labels"]) == len(manifest.labels)
    encoder, top, _ = load_student(Path(settings.out) / "student")
    device = torch.device("cpu")
    data = SplitData.of(settings, manifest, "train")
    few = map_titles(encoder, top, data, device=device, count=100)
    assert 100 <= len(few["topic"]) < manifest.rows("train", "topics")
    assert np.trace(found["confusion"]) / np.sum(found["confusion"]) == pytest.approx(
        train(settings, quiet=True).metrics["test"]["student"]["accuracy"]
    )
    mistakes = found["mistakes"]
    assert 0 < len(mistakes) <= MISTAKES
    predictions = load(settings.out).predict([one["title"] for one in mistakes])
    for one, prediction in zip(mistakes, predictions, strict=True):
        assert prediction.topic == found["labels"][one["predicted"]] != found["labels"][one["topic"]]
        assert prediction.probability == pytest.approx(one["probability"], abs=1e-3)
    assert mistakes == sorted(mistakes, key=lambda one: -one["probability"])
    figure = map_figure(Path(settings.out))
    assert sum(len(dots.x) for dots in figure.panels[0].lines) == len(found["x"])
    assert (Path(settings.out) / "report" / "map_of_titles.png") in report(
        [settings.out], out=Path(settings.out) / "report"
    )


def test_eight_topics_have_colours(tmp_path: Path) -> None:
    """Only the largest topics have a colour; more cannot be told apart."""
    topic = [number for number in range(10) for _ in range(20 - number)]
    told = {"split": "test", "labels": [f"t{n}" for n in range(10)], "topic": topic, "share": 0.5}
    (tmp_path / MAP).write_text(json.dumps({**told, "x": [0.0] * len(topic), "y": [1.0] * len(topic)}))
    figure = map_figure(tmp_path)
    (panel,) = figure.panels
    assert [dots.label for dots in panel.lines] == [OTHERS, *(f"t{n}" for n in range(8))]
    assert [dots.colour for dots in panel.lines] == [None, *range(8)]
    assert len(panel.lines[0].x) == 12 + 11
    assert "155 titles of test" in figure.caption


def test_runs_without_a_map(tmp_path: Path, make_record: MakeRecord) -> None:
    """Runs of earlier versions have no map; their report works without it."""
    with pytest.raises(NothingToDraw, match="has none"):
        map_figure(tmp_path)
    write_record(tmp_path / "old", make_record())
    assert not any("map" in path.name for path in report([tmp_path / "old"], out=tmp_path / "out"))
