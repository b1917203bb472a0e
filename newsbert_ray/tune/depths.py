"""How deep a teacher is, and which students' depths divide it, as far as that is known without its weights.
Knows no search space."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from newsbert_ray import inputs, storage
from newsbert_ray.config import SCRATCH, SettingsError, TrainSettings


def divisors(depth: int) -> tuple[int, ...]:
    """Whole numbers that divide `depth`, itself included: the students that it can teach."""
    return tuple(n for n in range(1, depth + 1) if depth % n == 0)


def check_depth(settings: TrainSettings) -> None:
    """Raise SettingsError where the student's layers do not divide the teacher's, or where one that learns
    alone has more than the encoder, as far as those are known."""
    student = settings.student.layers
    if settings.before.method != "none":
        from newsbert_ray.training.first import before_settings

        check_depth(before_settings(settings, ""))
        return
    if settings.distill.alone:
        whole = _encoder_depth(settings)
        if whole is not None and student > whole:
            raise SettingsError(f"student.layers {student}: {settings.teacher} has {whole} layers")
        return
    depth = teacher_depth(settings)
    if depth is None or depth % student == 0:
        return
    choices = [str(n) for n in divisors(depth)]
    choice = f"{', '.join(choices[:-1])} or {choices[-1]}" if len(choices) > 1 else choices[0]
    raise SettingsError(
        f"{depth} teacher layers do not divide into {student} student layers; choose {choice}"
    )


def teacher_depth(settings: TrainSettings, *, fetch: bool = False) -> int | None:
    """Layers of the teacher (NK); None where only its configuration at Hugging Face would tell.

    Args:
        fetch: read that configuration, from the local cache or over the network.
    Raises:
        SettingsError: more layers asked than there are; or, with `fetch`, no way to know them.
    """
    asked = settings.model.teacher_layers
    whole = _encoder_depth(settings)
    if whole is None and asked is None and fetch:
        whole = _fetched_depth(settings.teacher)
    if whole is not None and asked is not None and asked > whole:
        raise SettingsError(
            f"model.teacher_layers = {asked}: {settings.teacher} has {whole} layers; "
            f"give --model.teacher_layers {whole} or fewer"
        )
    return whole if asked is None else asked


def _encoder_depth(settings: TrainSettings) -> int | None:
    if settings.teacher == SCRATCH:
        return settings.scratch.layers
    place = settings.teacher
    folder = _fetch(place) if storage.is_url(place) else Path(place)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = [config[key] for key in ("num_hidden_layers", "n_layers", "num_layers") if key in config]
    except (OSError, ValueError, TypeError):
        return None
    return found[0] if found and isinstance(found[0], int) and found[0] > 0 else None


_fetch = lru_cache(maxsize=8)(inputs.fetch)
"""A teacher in a bucket: asked for once, and not again for each point of a grid."""


def _fetched_depth(teacher: str) -> int:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(teacher, trust_remote_code=False)
        return int(config.num_hidden_layers)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise SettingsError(
            f"teacher = {teacher!r}: its depth is not known here ({reason}), and `choice: divisors` needs "
            "it; give --model.teacher_layers N, or list the depths"
        ) from error
