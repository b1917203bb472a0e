"""`newsbert-ray evaluate`: a finished run's metrics on a split, its prediction file, and single users."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from newsbert_ray.config import SettingsError, TrainSettings, build_settings
from newsbert_ray.data.examples import impressions_of
from newsbert_ray.data.reading import SplitData, World
from newsbert_ray.data.shards import Manifest, ShardError, Split, read_manifest, read_shard
from newsbert_ray.data.tokenizer import TokenizerError
from newsbert_ray.evaluation import scoring
from newsbert_ray.evaluation.metrics import Ints, TopicRow, rank_candidates, topic_metrics, topic_rows
from newsbert_ray.evaluation.scoring import Models, News
from newsbert_ray.files import replace_file
from newsbert_ray.methods import TaskName
from newsbert_ray.model.assemble import assemble_pair
from newsbert_ray.model.encoder import EncoderError
from newsbert_ray.model.linear import LinearModel, confusion_of, is_linear, labelled_texts
from newsbert_ray.model.saved import CHECKPOINTS, best_folders, load_best, load_student
from newsbert_ray.record import read_record
from newsbert_ray.storage.bucket import is_url
from newsbert_ray.storage.workdir import fetch, with_local_paths

MEMBER = "prediction.txt"
"""The only file of a submission's zip. A line is `<impression id> [r1,r2,...]`: the rank of each candidate in
the order of behaviors.tsv, 1 the best."""


class SubmissionError(ValueError):
    """A prediction file that cannot be written, or that MIND would not accept."""


@dataclass(frozen=True)
class TrainedRun:
    """A finished run's models and the split to score. `settings` have local paths; `location` is where the
    caller finds the shards; `models`: student and, if its weights are kept, teacher; none of a linear one."""

    settings: TrainSettings
    location: str
    data: SplitData
    models: Models
    world: World
    linear: LinearModel | None = None

    def require_model(self, name: str) -> Models:
        """One model by name; SettingsError where the run does not have or does not keep it."""
        if name not in self.models:
            kept = " and ".join(sorted(self.models)) or "a linear model"
            raise SettingsError(
                f"model '{name}': the run keeps {kept} (a teacher is kept with "
                "the checkpoints: --checkpoint.keep_finished true)"
            )
        return {name: self.models[name]}

    def confusion(self, model: str = "student") -> Ints:
        """Confusion matrix (Y, Y) of a model of topics on the split; rows are true topics."""
        data = self.data
        if self.linear is not None and model == "student":
            texts, topics = labelled_texts(data.folder, data.manifest, data.split)
            return confusion_of(self.linear.scores(texts), topics)
        models, labels = self.require_model(model), data.manifest.labels
        batches = data.batches(scoring.BATCH)
        return scoring.count_topics(models, batches, topics=len(labels), world=self.world)[model]

    def require_task(self, task: TaskName, feature: str) -> None:
        if self.settings.task != task:
            raise SettingsError(
                f"{feature} needs a run of task {task}; this one learned {self.settings.task}"
            )


def evaluate(
    run: str | Path,
    *,
    data: str | Path | None = None,
    split: Split = "test",
    submission: str | Path | None = None,
    model: str = "student",
    by_topic: bool = False,
    show: str | None = None,
) -> Any:
    """The verb `evaluate`. Arguments, result and errors are those of `newsbert_ray.evaluate`."""
    if sum((submission is not None, by_topic, show is not None)) > 1:
        raise SettingsError("give only one of submission, by_topic and show")
    trained = load_trained(run, split, data=data)
    if by_topic:
        return _by_topic(trained, model)
    if show is not None:
        return _show(trained, show, model)
    result: dict[str, Any] = {"split": split, "data": trained.location}
    if submission is not None:
        trained.require_task("recommendation", "a submission")
        trained.require_model(model)
        if is_url(submission):
            raise SettingsError(f"--submission {submission}: must be a local path, not a URL")
        if Path(submission).suffix.lower() not in (".zip", ".txt"):
            wanted = ".zip (as MIND accepts it) or .txt (the lines only)"
            raise SubmissionError(f"{submission}: expected a name that ends in {wanted}")
        if Path(submission).is_dir():
            raise SubmissionError(f"{submission}: is a folder; give the name of a file")
        _require_every_line(trained.data, trained.location)
    shards, models, world = trained.data, trained.models, trained.world
    if trained.linear is not None:
        return {**result, "student": topic_metrics(trained.confusion())}
    if shards.task != "recommendation":
        return {**result, **scoring.score_models(models, shards, world=world)}
    news = scoring.encode_news(models, shards, shards.news_rows(), world=world)
    result |= scoring.score_rankings(models, shards, news, world=world, baselines=True)
    if submission is not None:
        counts = _write_submission(Path(submission), trained, news, model)
        result["submission"] = {"file": str(submission), "model": model, **counts}
    return result


def _write_submission(path: Path, trained: TrainedRun, news: News, model: str) -> dict[str, int]:
    """Write a model's prediction file and check it against the source file; lines, and unknown candidates."""
    models, unknown = trained.require_model(model), 0

    def rankings() -> Iterator[tuple[str, Any]]:
        for rows, block in scoring.read_blocks(trained.data):
            scores = scoring.score_block(models, news, block, world=trained.world)[model]
            ranks = np.split(rank_candidates(scores, block.offsets), block.offsets[1:-1])
            yield from zip(rows.column("impression_id").to_pylist(), ranks, strict=True)

    def sizes() -> Iterator[tuple[str, int]]:
        nonlocal unknown
        for rows, block in scoring.read_blocks(trained.data):
            unknown += int((block.candidates < 0).sum())
            counts = np.diff(block.offsets).tolist()
            yield from zip(rows.column("impression_id").to_pylist(), counts, strict=True)

    write_submission(path, rankings())
    return {"lines": check_submission(path, sizes()), "unknown_candidates": unknown}


def write_submission(path: Path, impressions: Iterable[tuple[str, Ints]]) -> None:
    """Write MIND's prediction file, a .zip with prediction.txt or the lines as .txt; on an error none. The
    same ranks give the same bytes. `impressions`: id and ranks, in the order of behaviors.tsv."""
    with replace_file(path) as partial, partial.open("wb") as file, ExitStack() as stack:
        target: IO[bytes] = file
        if path.suffix.lower() == ".zip":
            info = zipfile.ZipInfo(MEMBER)  # dated 1980, whatever the clock says
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive = stack.enter_context(zipfile.ZipFile(file, "w"))
            target = stack.enter_context(archive.open(info, "w", force_zip64=True))
        for impression, ranks in impressions:
            target.write(f"{impression} [{','.join(map(str, ranks.tolist()))}]\n".encode())


def check_submission(path: Path, expected: Iterable[tuple[str, int]]) -> int:
    """Compare a written prediction file with the id and number of candidates of each impression in
    behaviors.tsv; the number of lines. SubmissionError for the first line that is missing, additional, about
    another impression, or not a permutation of 1..n."""
    number = 0
    with path.open("rb") as file, ExitStack() as stack:
        lines: Iterable[bytes] = file
        if path.suffix.lower() == ".zip":
            lines = stack.enter_context(stack.enter_context(zipfile.ZipFile(file)).open(MEMBER))
        for number, (line, one) in enumerate(zip_longest(lines, expected), 1):
            if line is None or one is None:
                missing = f"ends here; impression {one and one[0]} is missing"
                raise SubmissionError(f"{path}:{number}: {missing if one else 'a line too many'}")
            name, _, ranks = line.decode().removesuffix("]\n").partition(" [")
            every = [str(rank) for rank in range(1, one[1] + 1)]
            if name != one[0] or sorted(ranks.split(","), key=int) != every:
                wanted = f"impression {one[0]} with each rank of 1 to {one[1]} once"
                found = f"{name[:40]} [{ranks[:40]}"
                raise SubmissionError(f"{path}:{number}: expected {wanted}, but it is {found}")
    return number


def _require_every_line(data: SplitData, location: str) -> None:
    """SubmissionError if a split that is a whole behaviors.tsv lacks a line of it."""
    # A shard's name has the number of its source file; a file that several splits share is whole in none.
    numbers = {
        split: {int(shard.file.split("-")[2]) for shard in shards}
        for split, shards in data.manifest.behaviors.items()
    }
    others = set().union(*(numbers[split] for split in numbers if split != data.split))
    for source in (data.manifest.sources[number] for number in numbers.get(data.split, set()) - others):
        if source.rejected:
            raise SubmissionError(
                f"--submission: {source.folder}/{source.file} has {source.rows:,} lines, of which the shards "
                f"lack {source.rejected:,}, and MIND refuses a file without them; {location}/rejected.jsonl "
                "says which and why: correct them and prepare again"
            )


def load_trained(run: str | Path, split: Split, *, data: str | Path | None = None) -> TrainedRun:
    """A finished run's models and the shards to score, downloaded where needed; errors as `evaluate`."""
    folder = fetch(run, without=("checkpoints/step-*",))
    settings = build_settings(TrainSettings, read_record(folder).settings, where=str(folder / "record.json"))
    if data is not None:
        settings = settings.model_copy(update={"data": str(data)})
    location, settings = settings.data, with_local_paths(settings)
    manifest = read_manifest(settings.data)
    if is_linear(folder / "student"):
        shards, model = SplitData.of(settings, manifest, split), LinearModel.load(folder / "student")
        read = {"tokenizer_sha256": manifest.tokenizer.sha256, "labels": list(model.labels)}
        _check_shards(read, manifest, "topics", location)  # it reads texts, not tokens
        return TrainedRun(settings, location, shards, {}, World(), model)
    encoder, top, description = load_student(folder / "student")
    _check_shards(description, manifest, settings.task, location)
    models = {**_load_teacher(folder, settings, manifest), "student": (encoder, top)}
    device = torch.device("cuda" if torch.cuda.is_available() and settings.device != "cpu" else "cpu")
    on_device = {name: (model.to(device), head.to(device)) for name, (model, head) in models.items()}
    shards = SplitData.of(settings, manifest, split)
    return TrainedRun(settings, location, shards, on_device, World(device=device))


def _load_teacher(folder: Path, settings: TrainSettings, manifest: Manifest) -> dict[str, Any]:
    """The teacher of the best checkpoint; empty if none was kept, none learned, or its files are gone."""
    kept = best_folders(folder / CHECKPOINTS)
    if not kept or settings.distill.alone or settings.distill.frozen:
        return {}
    try:
        pair = assemble_pair(settings, manifest, stand_in=True).eval()
    except (EncoderError, TokenizerError):
        return {}
    load_best(folder / CHECKPOINTS, kept[-1].name, pair)
    return {"teacher": pair.models()["teacher"]}


def _check_shards(description: dict[str, Any], manifest: Manifest, task: str, location: str) -> None:
    """Refuse shards of another tokeniser or other topics than the student's."""
    if description["tokenizer_sha256"] != manifest.tokenizer.sha256:
        raise EncoderError(
            f"{location}: tokenised by '{manifest.tokenizer.name}', but the run's student has another "
            "tokeniser; prepare the shards with the run's teacher"
        )
    if task == "topics" and description["labels"] != manifest.labels:
        raise ShardError(
            f"{location}: its topics are not those that the run was trained on; use that corpus's shards"
        )


def _by_topic(trained: TrainedRun, model: str) -> list[TopicRow]:
    """Results on each topic; the mean of F1 over these is `evaluate`'s macro-F1."""
    trained.require_task("topics", "--by_topic")
    confusion = trained.confusion(model)
    if not confusion.sum():
        raise ShardError(f"split '{trained.data.split}' of {trained.location}: no title has a topic")
    return topic_rows(confusion, trained.data.manifest.labels)


@dataclass(frozen=True)
class NewsTitle:
    news_id: str
    title: str
    category: str


@dataclass(frozen=True)
class RankedCandidate:
    """`clicked` is None where it is unknown."""

    news: NewsTitle
    score: float
    clicked: bool | None


@dataclass(frozen=True)
class RankedImpression:
    """What a user had read before, oldest first, and the candidates, best first."""

    impression_id: str
    user_id: str
    time: str
    history: list[NewsTitle]
    offers: list[RankedCandidate]


def _show(trained: TrainedRun, user: str, model: str) -> list[RankedImpression]:
    """A user's impressions, ranked by a model; ShardError for a user without one names one who has."""
    trained.require_task("recommendation", "--show")
    models, shards = trained.require_model(model), trained.data
    rows = _rows_of(shards, user)
    block = impressions_of(rows, history=shards.history)
    texts = np.unique(np.concatenate([block.history, block.candidates]))
    texts = texts[texts >= 0]
    news = scoring.encode_news(models, shards, texts, world=trained.world)
    scores = scoring.score_block(models, news, block, world=trained.world)[model]
    titles = {-1: NewsTitle("", "(a news without a known title)", ""), **_read_titles(shards, texts)}
    histories = np.split(block.history, block.history_offsets[1:-1])
    offers = (np.split(one, block.offsets[1:-1]) for one in (block.candidates, scores, block.clicked))
    impressions = []
    for row, history, *arrays in zip(rows.to_pylist(), histories, *offers, strict=True):
        candidates = [
            RankedCandidate(titles[news_row], score, None if click < 0 else bool(click))
            for news_row, score, click in zip(*(array.tolist() for array in arrays), strict=True)
        ]
        # Among equal scores the later candidate comes first, as in metrics and submissions.
        ranked = sorted(reversed(candidates), key=lambda candidate: -candidate.score)
        read = [titles[news_row] for news_row in history.tolist()]
        impressions.append(RankedImpression(row["impression_id"], user, str(row["time"]), read, ranked))
    return impressions


def _read_titles(data: SplitData, rows: Ints) -> dict[int, NewsTitle]:
    """The news at some ascending rows of the table of texts, by row."""
    columns = ["news_id", "title", "category"]
    titles: dict[int, NewsTitle] = {}
    for shard, start in data.manifest.news:
        inside = rows[(rows >= start) & (rows < start + shard.rows)]
        if len(inside):
            news = read_shard(data.folder, shard, columns).take(pa.array(inside - start)).to_pylist()
            titles |= {row: NewsTitle(**one) for row, one in zip(inside.tolist(), news, strict=True)}
    return titles


def _rows_of(data: SplitData, user: str) -> pa.Table:
    """The user's rows of the split's behaviours."""
    somebody, tables = "", []
    for table, _ in replace(data, history=1).impressions():
        somebody = somebody or table.column("user_id")[0].as_py()
        tables.append(table.filter(pc.equal(table.column("user_id"), user)))
    rows = pa.concat_tables(tables)
    if not rows.num_rows:
        raise ShardError(f"user '{user}': no impression in the {data.split} split; {somebody} has one")
    return rows
