"""`newsbert-ray evaluate`: a finished run and a split -> metrics of its student, and of its teacher where it
is kept; of a recommendation run also MIND's prediction file, or what one user would see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from newsbert_ray.config import SettingsError, TrainSettings, build_settings
from newsbert_ray.data.examples import impressions_of
from newsbert_ray.data.reading import evaluation_batches, read_impressions
from newsbert_ray.data.shards import SPLITS, Manifest, ShardError, Split, read_manifest, read_shard
from newsbert_ray.evaluation.encoding import Models
from newsbert_ray.evaluation.metrics import rank_candidates, topic_f1
from newsbert_ray.evaluation.scoring import (
    BATCH,
    count_topics,
    encode_news,
    encode_rows,
    read_blocks,
    score_block,
    score_models,
    score_rankings,
)
from newsbert_ray.evaluation.submission import check_submission, require_suffix, write_submission
from newsbert_ray.model.encoder import EncoderError
from newsbert_ray.model.saved import CHECKPOINTS, best_folders, load_best, load_student
from newsbert_ray.record import read_record
from newsbert_ray.storage.workdir import fetch, is_url, with_local_paths
from newsbert_ray.world import World


@dataclass(frozen=True)
class Trained:
    """A finished run's models, ready to score `data`'s shards; `settings` name them as they lie here."""

    settings: TrainSettings
    data: str
    manifest: Manifest
    models: Models
    world: World

    @property
    def folder(self) -> Path:
        """The shards' folder."""
        return Path(self.settings.data)

    def require(self, model: str) -> Models:
        """One of the models alone, by name.

        Raises:
            SettingsError: the run has no such model, or does not keep it.
        """
        if model not in self.models:
            raise SettingsError(
                f"model '{model}': the run keeps {' and '.join(sorted(self.models))} (a teacher is kept with "
                "the checkpoints: --checkpoint.keep_finished true)"
            )
        return {model: self.models[model]}


def evaluate(
    run: str | Path,
    *,
    data: str | Path | None = None,
    split: str = "test",
    submission: str | Path | None = None,
    model: str = "student",
) -> dict[str, Any]:
    """Metrics of a run's exported student, computed anew.

    Args:
        run: folder of a finished run, or its URL.
        data: prepared shards; those of the run by default.
        split: train, validation or test.
        submission: also write MIND's prediction file there (recommendation; .zip or .txt), labelled or not,
            read it back and check it.
        model: whose ranking the submission is.
    Returns:
        {"split", "data", "student": metrics, "teacher": metrics where its weights are kept}; of a
        recommendation run also "popularity" and "random"; with a submission "submission": {"file", "lines"}.
        No metrics where the split carries no labels.
    Raises:
        RecordError: no finished run there.
        ShardError: no such split, or shards whose topics are not the run's.
        EncoderError: the student's folder is damaged, or another tokeniser made the shards.
        CheckpointError: the teacher's weights are damaged.
        SubmissionError: the prediction file cannot be written, or did not pass its check.
        SettingsError: a submission of a run that does not recommend, or of a model that is not kept.
        StorageError: a place in a bucket cannot be read.
    """
    part = split_named(split)
    trained = load_trained(run, data=data)
    settings, manifest = trained.settings, trained.manifest
    head = {"split": split, "data": trained.data}
    if settings.task != "recommendation":
        if submission is not None:
            require_recommendation(settings, "a submission")
        return {**head, **score_models(trained.models, settings, manifest, part, world=trained.world)}
    history = settings.recommendation.history
    where: dict[str, Any] = {"history": history, "world": trained.world}
    if submission is not None:
        trained.require(model)
        if is_url(submission):
            raise SettingsError(f"--submission {submission}: it is written on this machine; give a path")
        require_suffix(Path(submission))
    news = encode_news(trained.models, trained.folder, manifest, part, **where)
    scores = score_rankings(
        trained.models, trained.folder, manifest, part, baselines=True, news=news, **where
    )
    found: dict[str, Any] = {**head, **scores}
    if submission is not None:
        chosen = trained.require(model)
        path = Path(submission)

        def ranked() -> Iterator[tuple[str, Any]]:
            for rows, block in read_blocks(trained.folder, manifest, part, history=history):
                given = score_block(chosen, news, block, world=trained.world)[model]
                ranks = np.split(rank_candidates(given, block.offsets), block.offsets[1:-1])
                yield from zip(rows.column("impression_id").to_pylist(), ranks, strict=True)

        def expected() -> Iterator[tuple[str, int]]:
            for rows, block in read_blocks(trained.folder, manifest, part, history=history):
                ids = rows.column("impression_id").to_pylist()
                yield from zip(ids, np.diff(block.offsets).tolist(), strict=True)

        write_submission(path, ranked())
        found["submission"] = {"file": str(path), "model": model, "lines": check_submission(path, expected())}
    return found


def load_trained(run: str | Path, *, data: str | Path | None = None) -> Trained:
    """A finished run's models on the device at hand, and the shards they are to score.

    Raises:
        RecordError, ShardError, EncoderError, CheckpointError, StorageError: as `evaluate`.
    """
    folder = fetch(run, without=("checkpoints/step-*",))
    settings = build_settings(TrainSettings, read_record(folder).settings, where=str(folder / "record.json"))
    if data is not None:
        settings = settings.model_copy(update={"data": str(data)})
    data_location, settings = settings.data, with_local_paths(settings)
    manifest = read_manifest(settings.data)
    encoder, top, described = load_student(folder / "student")
    _check_fit(described, manifest, settings.task, data_location)
    models = {**_teacher(folder, settings, manifest), "student": (encoder, top)}
    device = torch.device("cuda" if torch.cuda.is_available() and settings.device != "cpu" else "cpu")
    placed = {name: (model.to(device), head.to(device)) for name, (model, head) in models.items()}
    return Trained(settings, data_location, manifest, placed, World(device=device))


def split_named(name: str) -> Split:
    """A split by its name; ShardError where there is none such."""
    if name not in SPLITS:
        raise ShardError(f"split '{name}': expected one of {', '.join(SPLITS)}")
    return name


def require_recommendation(settings: TrainSettings, what: str) -> None:
    """SettingsError where a run learned another task."""
    if settings.task != "recommendation":
        raise SettingsError(f"{what} needs a run of task recommendation; this one learned {settings.task}")


def _teacher(folder: Path, settings: TrainSettings, manifest: Manifest) -> dict[str, Any]:
    """The best checkpoint's teacher under the same top; nothing where the run kept no checkpoints, had no
    teacher that learned, or the teacher's configuration cannot be had any more."""
    from newsbert_ray.data.tokenizer import TokenizerError
    from newsbert_ray.model.assemble import assemble_pair

    kept = best_folders(folder / CHECKPOINTS)
    if not kept or settings.distill.alone or settings.distill.frozen:
        return {}
    try:
        pair = assemble_pair(settings, manifest).eval()
    except (EncoderError, TokenizerError):
        return {}
    load_best(folder / CHECKPOINTS, kept[-1].name, pair)
    return {"teacher": pair.models()["teacher"]}


def _check_fit(described: dict[str, Any], manifest: Manifest, task: str, data: str) -> None:
    if described["tokenizer_sha256"] != manifest.tokenizer.sha256:
        raise EncoderError(
            f"{data}: tokenised by '{manifest.tokenizer.name}', the run's student has another "
            "tokeniser; prepare the shards with the run's teacher"
        )
    if task == "topics" and described["labels"] != manifest.labels:
        raise ShardError(
            f"{data}: its topics are not those that the run was trained on; use that corpus's shards"
        )


class TopicRow(NamedTuple):
    """A topic: titles of it, titles that were taken for it, and what came of both, 0 to 1.

    `precision` is None where nothing was taken for it, `recall` where no title is of it; `taken_for` is the
    other topic that its titles were most often taken for, None where they never were.
    """

    topic: str
    titles: int
    predicted: int
    precision: float | None
    recall: float | None
    f1: float
    taken_for: str | None


def by_topic(
    run: str | Path, *, data: str | Path | None = None, split: str = "test", model: str = "student"
) -> list[TopicRow]:
    """How a topics run's model does on each topic of a split, those of most titles first.

    The mean of the topics' F1 is `evaluate`'s macro-F1; topics that neither occur nor are predicted are left
    out of both.

    Args:
        run, data, split: as of `evaluate`.
        model: student or teacher.
    Raises:
        SettingsError: the run learned another task, or does not keep that model.
        ShardError: no such split, or one without labels; and as `evaluate`.
    """
    part = split_named(split)
    trained = load_trained(run, data=data)
    if trained.settings.task != "topics":
        raise SettingsError(
            f"--by_topic needs a run of task topics; this one learned {trained.settings.task}"
        )
    chosen, world, labels = trained.require(model), trained.world, trained.manifest.labels
    batches = evaluation_batches(
        trained.folder, trained.manifest, part, batch_size=BATCH, rank=world.rank, world_size=world.size
    )
    confusion = count_topics(chosen, batches, topics=len(labels), world=world)[model]
    if not confusion.sum():
        raise ShardError(f"split '{split}' of {trained.data}: no title carries a topic")
    return topic_rows(confusion, labels)


def topic_rows(confusion: npt.NDArray[np.int64], labels: list[str]) -> list[TopicRow]:
    """The rows of a confusion matrix (Y, Y), rows true topics, columns predicted ones."""
    scores = topic_f1(confusion)
    found = []
    for number, (topic, f1) in enumerate(zip(labels, scores.tolist(), strict=True)):
        titles, predicted = int(confusion[number].sum()), int(confusion[:, number].sum())
        if not titles and not predicted:
            continue
        hits = int(confusion[number, number])
        others = confusion[number].copy()
        others[number] = 0
        found.append(
            TopicRow(
                topic,
                titles,
                predicted,
                hits / predicted if predicted else None,
                hits / titles if titles else None,
                f1,
                labels[int(others.argmax())] if others.any() else None,
            )
        )
    return sorted(found, key=lambda row: -row.titles)


@dataclass(frozen=True)
class Title:
    """A news as a person sees it."""

    news_id: str
    title: str
    category: str


@dataclass(frozen=True)
class Offer:
    """A candidate: its news, score, and whether it was clicked (None: unknown)."""

    news: Title
    score: float
    clicked: bool | None


@dataclass(frozen=True)
class Shown:
    """One impression of a user: what they had read, oldest first, and the candidates, best first."""

    impression_id: str
    user_id: str
    time: str
    history: list[Title]
    offers: list[Offer]


def show(
    run: str | Path,
    user: str,
    *,
    data: str | Path | None = None,
    split: str = "test",
    model: str = "student",
) -> list[Shown]:
    """A user's impressions in a split as a run's model ranks them.

    Args:
        user: a user id of the behaviours.
        model: student or teacher.
    Raises:
        ShardError: the user has no impression in this split; the message names some who have.
        SettingsError: the run does not recommend, or does not keep that model.
    """
    part = split_named(split)
    trained = load_trained(run, data=data)
    require_recommendation(trained.settings, "--show")
    chosen = trained.require(model)
    rows = _rows_of(trained, user, part)
    block = impressions_of(rows, history=trained.settings.recommendation.history)
    named = np.unique(np.concatenate([block.history, block.candidates]))
    news = encode_rows(chosen, trained.folder, trained.manifest, named, world=trained.world)
    scores = score_block(chosen, news, block, world=trained.world)[model]
    titles = read_titles(trained.folder, trained.manifest, named.tolist())
    found = []
    for i in range(len(block)):
        own = slice(int(block.offsets[i]), int(block.offsets[i + 1]))
        read = block.history[block.history_offsets[i] : block.history_offsets[i + 1]]
        offers = [
            Offer(titles[row], score, None if click < 0 else bool(click))
            for row, score, click in zip(
                block.candidates[own].tolist(), scores[own].tolist(), block.clicked[own].tolist(), strict=True
            )
        ]
        found.append(
            Shown(
                impression_id=rows.column("impression_id")[i].as_py(),
                user_id=user,
                time=str(rows.column("time")[i].as_py()),
                history=[titles[row] for row in read.tolist()],
                # As metrics and submissions order them: of equal scores the later candidate comes first.
                offers=sorted(reversed(offers), key=lambda offer: -offer.score),
            )
        )
    return found


def read_titles(folder: Path, manifest: Manifest, wanted: Iterable[int]) -> dict[int, Title]:
    """The news at some rows of the table of texts, by row."""
    rows = np.array(sorted(wanted), np.int64)
    found: dict[int, Title] = {}
    for shard, start in manifest.news:
        inside = rows[(rows >= start) & (rows < start + shard.rows)]
        if len(inside):
            table = read_shard(folder, shard, ["news_id", "title", "category"]).take(pa.array(inside - start))
            columns = (table.column(name).to_pylist() for name in ("news_id", "title", "category"))
            found |= {row: Title(*news) for row, *news in zip(inside.tolist(), *columns, strict=True)}
    return found


def _rows_of(trained: Trained, user: str, split: str) -> pa.Table:
    tables = list(_matching(trained, user, split))
    if tables:
        return pa.concat_tables(tables)
    first, _ = next(read_impressions(trained.folder, trained.manifest, split_named(split), history=1))
    raise ShardError(
        f"user '{user}': no impression in the {split} split; {first.column('user_id')[0].as_py()} has one"
    )


def _matching(trained: Trained, user: str, split: str) -> Iterator[pa.Table]:
    for table, _ in read_impressions(trained.folder, trained.manifest, split_named(split), history=1):
        mine = table.filter(pc.equal(table.column("user_id"), user))
        if mine.num_rows:
            yield mine
