"""`newsbert-ray evaluate`: a finished run and a split -> metrics of its student, and of its teacher where it
is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from newsbert_ray.config import TrainSettings, build_settings
from newsbert_ray.data.reading import evaluation_batches
from newsbert_ray.data.shards import SPLITS, Manifest, ShardError, read_manifest
from newsbert_ray.evaluation.scoring import Scores, score_models
from newsbert_ray.model.assemble import load_student
from newsbert_ray.model.encoder import EncoderError
from newsbert_ray.record import read_record


def evaluate(
    run: str | Path, *, data: str | Path | None = None, split: str = "test", batch_size: int = 256
) -> dict[str, Any]:
    """Topic metrics of a run's exported student, computed anew.

    Args:
        run: folder of a finished run.
        data: prepared shards; those of the run by default.
        split: train, validation or test.
        batch_size: titles a forward pass.
    Returns:
        {"split", "data", "student": {"accuracy", "macro_f1", "rows"}, "teacher": {...} where its weights are
        kept}.
    Raises:
        RecordError: no finished run there.
        ShardError: no such split, or shards whose topics are not the run's.
        EncoderError: the student's folder is damaged, or another tokeniser made the shards.
        CheckpointError: the teacher's weights are damaged.
    """
    import torch

    if split not in SPLITS:
        raise ShardError(f"split '{split}': expected one of {', '.join(SPLITS)}")
    folder = Path(run)
    settings = build_settings(TrainSettings, read_record(folder).settings, where=str(folder / "record.json"))
    shards = str(data or settings.data)
    manifest = read_manifest(shards)
    encoder, top, described = load_student(folder / "student")
    _check_fit(described, manifest, shards)
    models = {"student": (encoder, top), **_teacher(folder, settings, manifest)}
    device = torch.device("cuda" if torch.cuda.is_available() and settings.device != "cpu" else "cpu")
    scores: Scores = score_models(
        {name: (model.to(device), head.to(device)) for name, (model, head) in models.items()},
        evaluation_batches(shards, manifest, split, batch_size=batch_size),
        topics=len(manifest.labels),
        device=device,
    )
    return {"split": split, "data": shards, **scores}


def _teacher(folder: Path, settings: TrainSettings, manifest: Manifest) -> dict[str, Any]:
    """The best checkpoint's teacher under the same top; nothing where the run kept no checkpoints, or the
    teacher's configuration cannot be had any more."""
    from newsbert_ray.data.tokens import TokenizerError
    from newsbert_ray.model.assemble import assemble_pair
    from newsbert_ray.training.checkpoint import CHECKPOINTS, best_folders, load_best

    kept = best_folders(folder / CHECKPOINTS)
    if not kept:
        return {}
    try:
        pair = assemble_pair(settings, manifest).eval()
    except (EncoderError, TokenizerError):
        return {}
    load_best(folder / CHECKPOINTS, kept[-1].name, pair)
    return {"teacher": (pair.teacher, pair.top)}


def _check_fit(described: dict[str, Any], manifest: Manifest, shards: str) -> None:
    if described["tokenizer_sha256"] != manifest.tokenizer.sha256:
        raise EncoderError(
            f"{shards}: tokenised by '{manifest.tokenizer.name}', the run's student has another tokeniser; "
            "prepare the shards with the run's teacher"
        )
    if described["labels"] != manifest.labels:
        raise ShardError(
            f"{shards}: its topics are not those that the run was trained on; use shards of that corpus"
        )
