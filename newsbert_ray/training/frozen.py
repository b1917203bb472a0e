"""What a teacher that is only read says: its metrics, and its embeddings of all texts."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from newsbert_ray.config import TrainSettings
from newsbert_ray.record import RecordError, read_record

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from newsbert_ray.data.reading import Course
    from newsbert_ray.data.shards import Manifest, Split
    from newsbert_ray.evaluation.place import Scores
    from newsbert_ray.model.pair import Pair, Remembered
    from newsbert_ray.training.loop import World


def teacher_scores(settings: TrainSettings, manifest: Manifest) -> dict[Split, Scores]:
    """A frozen teacher's metrics on validation as its own run has them; nothing where it saw other shards."""
    assert settings.distill.teacher_run is not None
    try:
        record = read_record(settings.distill.teacher_run)
    except RecordError:
        return {}
    if record.data.get("fingerprint") != manifest.fingerprint:
        return {}
    return {"validation": {"teacher": record.metrics["validation"]["student"]}}


def remembered(
    pair: Pair, settings: TrainSettings, manifest: Manifest, course: Course, world: World
) -> Remembered | None:
    """A frozen teacher's embeddings of every text that training may name, each made once, and kept beside the
    teacher for other runs; None where every stage looks into the teacher, or none is frozen.

    The texts go through the teacher in an order of their own, so that the same bits come out whoever makes
    them, and an interrupted run goes on with what it had.
    """
    from newsbert_ray.data.reading import trained_texts
    from newsbert_ray.data.texts import read_texts
    from newsbert_ray.evaluation.encoding import encode_texts
    from newsbert_ray.model.pair import Remembered
    from newsbert_ray.training.step import needs_states

    if not pair.frozen or all(map(needs_states, settings.distill.stages)):
        return None
    import torch

    rows, table = trained_texts(course), read_texts(settings.data, manifest)
    kept = _kept_file(settings, manifest, rows)
    found = world.share(_read_kept(kept, len(rows)) if world.first else None)
    if found is None:
        teacher = {"teacher": pair.models()["teacher"]}
        pad_id = manifest.tokenizer.pad_id
        found = encode_texts(teacher, table, rows, pad_id=pad_id, place=world.place)["teacher"].clone()
        if world.first:
            _keep(kept, found)
    places = torch.zeros(len(table), dtype=torch.int64)
    places[torch.from_numpy(rows)] = torch.arange(len(rows))
    return Remembered(places.to(world.device), found.to(world.device))


def _kept_file(settings: TrainSettings, manifest: Manifest, rows: npt.NDArray[np.integer]) -> Path:
    """Where the embeddings of these texts by this very teacher lie, if they do."""
    assert settings.distill.teacher_run is not None
    folder = Path(settings.distill.teacher_run)
    weights = (folder / "student" / "model.safetensors").stat()
    told = f"{manifest.fingerprint} {weights.st_size} {weights.st_mtime_ns} ".encode() + rows.tobytes()
    return folder / "texts" / f"{hashlib.sha256(told).hexdigest()[:16]}.safetensors"


def _read_kept(path: Path, rows: int) -> Tensor | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)["embeddings"]
    except (OSError, SafetensorError, KeyError):
        return None
    return found if len(found) == rows else None


def _keep(path: Path, embeddings: Tensor) -> None:
    """Write them for the next run; a teacher's folder that cannot be written to is no reason to end."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with suppress(OSError, SafetensorError):
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        save_file({"embeddings": embeddings.cpu().contiguous()}, partial)
        os.replace(partial, path)
