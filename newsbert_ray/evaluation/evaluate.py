"""`newsbert-ray evaluate`: a finished run and a split -> metrics of its student, and of its teacher where it
is kept; of a recommendation run also MIND's prediction file, or what one user would see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from newsbert_ray import inputs, storage
from newsbert_ray.config import SettingsError, TrainSettings, build_settings
from newsbert_ray.data.shards import SPLITS, Manifest, ShardError, Split, read_manifest
from newsbert_ray.evaluation.metrics import rank_candidates
from newsbert_ray.evaluation.place import Models, Place
from newsbert_ray.evaluation.ranking import encode_news, read_blocks, score_block, score_rankings
from newsbert_ray.evaluation.scoring import score_models
from newsbert_ray.evaluation.submission import check_submission, require_suffix, write_submission
from newsbert_ray.model.assemble import load_student
from newsbert_ray.model.encoder import EncoderError
from newsbert_ray.record import read_record


@dataclass(frozen=True)
class Trained:
    """A finished run's models, ready to score `data`'s shards; `settings` name them as they lie here."""

    settings: TrainSettings
    data: str
    manifest: Manifest
    models: Models
    place: Place

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
        return {**head, **score_models(trained.models, settings, manifest, part, place=trained.place)}
    history = settings.recommendation.history
    where: dict[str, Any] = {"history": history, "place": trained.place}
    if submission is not None:
        trained.require(model)
        if storage.is_url(submission):
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
                given = score_block(chosen, news, block, place=trained.place)[model]
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
    folder = inputs.fetch(run, without=("checkpoints/step-*",))
    settings = build_settings(TrainSettings, read_record(folder).settings, where=str(folder / "record.json"))
    if data is not None:
        settings = settings.model_copy(update={"data": str(data)})
    place, settings = settings.data, inputs.at_hand(settings)
    manifest = read_manifest(settings.data)
    encoder, top, described = load_student(folder / "student")
    _check_fit(described, manifest, settings.task, place)
    models = {**_teacher(folder, settings, manifest), "student": (encoder, top)}
    device = torch.device("cuda" if torch.cuda.is_available() and settings.device != "cpu" else "cpu")
    placed = {name: (model.to(device), head.to(device)) for name, (model, head) in models.items()}
    return Trained(settings, place, manifest, placed, Place(device))


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
    from newsbert_ray.data.tokens import TokenizerError
    from newsbert_ray.model.assemble import assemble_pair
    from newsbert_ray.training.checkpoint import CHECKPOINTS, best_folders, load_best

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
