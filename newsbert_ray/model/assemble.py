"""Settings and shards -> a fresh pair; a pair -> the exported student folder, and back."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from newsbert_ray.config import SCRATCH, ModelSettings, ScratchSettings, TrainSettings
from newsbert_ray.data.shards import Manifest
from newsbert_ray.data.tokens import load_tokenizer
from newsbert_ray.model.encoder import Encoder, EncoderError, load_encoder, load_exported
from newsbert_ray.model.pair import Pair, Top, build_pair
from newsbert_ray.tasks import TaskName

TOP = "top.safetensors"
TOP_CONFIG = "top.json"


def assemble_pair(settings: TrainSettings, manifest: Manifest) -> Pair:
    """The pair a run starts from: pretrained or scratch teacher, its student, a top drawn from the seed.

    Raises:
        EncoderError: no such teacher, or its tokeniser is not the shards'.
        SettingsError: the student's layers do not divide the teacher's.
    """
    torch.manual_seed(settings.seed)
    tokenizer, longest = manifest.tokenizer, int(manifest.settings.get("max_tokens") or 0)
    recipe = (
        settings.teacher,
        settings.model,
        settings.scratch,
        tokenizer.vocabulary,
        tokenizer.pad_id,
        longest,
    )
    if settings.teacher == SCRATCH:
        teacher = _load(*recipe)
    else:
        check_tokenizer(settings.teacher, manifest)
        teacher = copy.deepcopy(_cached(*recipe))
    torch.manual_seed(settings.seed)
    pair = build_pair(
        teacher,
        student_layers=settings.student.layers,
        query_size=settings.model.query_size,
        topics=len(manifest.labels),
        task=settings.task,
        alone=settings.distill.alone,
    )
    start_top(pair.top, settings, manifest)
    return pair


def start_top(top: Top, settings: TrainSettings, manifest: Manifest) -> None:
    """Where the teacher is a student that an earlier run exported, go on from its pooling, and from its head
    where that answers the same question."""
    from safetensors.torch import load_file

    folder = Path(settings.teacher)
    if settings.teacher == SCRATCH or not (folder / TOP).is_file():
        return
    described = _read_top(folder)
    same = described["task"] == settings.task and described["labels"] == manifest.labels
    own = top.state_dict()
    found = {
        name: value
        for name, value in load_file(folder / TOP).items()
        if name in own and own[name].shape == value.shape and (same or name.startswith("pooling."))
    }
    top.load_state_dict({**own, **found})


@lru_cache(maxsize=8)
def _identity(teacher: str) -> str:
    return load_tokenizer(teacher).sha256


def check_tokenizer(teacher: str, manifest: Manifest) -> None:
    """Refuse a teacher whose tokeniser did not make the shards.

    Raises:
        EncoderError: another tokeniser; its ids would mean other words.
    """
    if _identity(teacher) != manifest.tokenizer.sha256:
        raise EncoderError(
            f"the shards were tokenised by '{manifest.tokenizer.name}', the teacher '{teacher}' has another "
            "tokeniser: the same ids would mean other words; prepare the shards with this teacher"
        )


def _load(
    name: str, model: ModelSettings, scratch: ScratchSettings, vocabulary: int, pad_id: int, longest: int
) -> Encoder:
    return load_encoder(
        name, model=model, scratch=scratch, vocabulary=vocabulary, pad_id=pad_id, max_tokens=longest
    )


_cached = lru_cache(maxsize=1)(_load)
"""A process's pretrained teacher, kept for its next trial."""


def write_student(
    folder: Path, pair: Pair, manifest: Manifest, *, tokenizer: Path, task: TaskName = "topics"
) -> None:
    """Write the student as a Hugging Face folder (with its tokeniser) plus the shared top, whole or not at
    all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    for stale in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(stale, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    top = {
        "task": task,
        "labels": manifest.labels,
        "query_size": pair.top.pooling.key.out_features,
        "max_tokens": manifest.settings.get("max_tokens"),
        "tokenizer_sha256": manifest.tokenizer.sha256,
    }
    try:
        pair.student.backbone.save_pretrained(partial)
        if tokenizer.is_dir():
            shutil.copytree(tokenizer, partial, dirs_exist_ok=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in pair.top.state_dict().items()}, partial / TOP)
        (partial / TOP_CONFIG).write_text(json.dumps(top, indent=1), encoding="utf-8")
        partial.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    except (SafetensorError, OSError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise EncoderError(
            f"{folder}: the student cannot be written ({error}); make room or mend the disk, then run "
            "the same "
            "command again: it goes on from its last checkpoint"
        ) from error


def load_student(folder: Path) -> tuple[Encoder, Top, dict[str, Any]]:
    """An exported student: its encoder, its top and top.json (`task`, `labels`, `tokenizer_sha256`, ...), for
    evaluation.

    Raises:
        EncoderError: not an exported student.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        described = _read_top(folder)
        weights = load_file(folder / TOP)
        encoder = load_exported(folder)
        top = Top(
            encoder.hidden_size,
            query_size=described["query_size"],
            topics=len(described["labels"]),
            task=described["task"],
        )
        top.load_state_dict(weights)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise EncoderError(
            f"{folder}: no whole exported student there ({type(error).__name__}); train the run again"
        ) from error
    return encoder, top.eval(), described


def _read_top(folder: Path) -> dict[str, Any]:
    described: dict[str, Any] = json.loads((folder / TOP_CONFIG).read_text(encoding="utf-8"))
    return {"task": "topics", **described}  # students of before there were tasks
