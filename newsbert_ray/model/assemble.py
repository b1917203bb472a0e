"""Builds the pair of teacher, student and top that a run starts from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from newsbert_ray.config import SCRATCH, DistillSettings, ModelSettings, SettingsError, TrainSettings
from newsbert_ray.data.shards import Manifest
from newsbert_ray.data.tokenizer import load_tokenizer
from newsbert_ray.data.word_vectors import VECTORS
from newsbert_ray.methods import ATTENTION_LOSSES, losses_where
from newsbert_ray.model.encoder import Encoder, EncoderError
from newsbert_ray.model.families import load_encoder
from newsbert_ray.model.pair import Pair, Top, block_map
from newsbert_ray.model.saved import TOP, load_student, read_top
from newsbert_ray.model.word_models import (
    NrmsEncoder,
    RecurrentEncoder,
    StaticEncoder,
    reduce_width,
    token_vectors,
)

_cached_tokenizer = lru_cache(maxsize=8)(load_tokenizer)
_cached_encoder = lru_cache(maxsize=2)(load_encoder)
_cached_student = lru_cache(maxsize=1)(load_student)
"""What an earlier trial in this process has loaded."""
_MAPPED = frozenset(losses_where(widths="mapped"))
_EQUAL_WIDTHS = frozenset(losses_where(widths="equal"))


def assemble_pair(settings: TrainSettings, manifest: Manifest, *, stand_in: bool = False) -> Pair:
    """The pair that a run starts from, in training mode.

    A pretrained or scratch teacher, its student, and tops drawn from the seed; or a frozen or warm teacher
    with the top that it was fine-tuned with, which a warm teacher shares with the student. `stand_in`: an
    untrained one where a fine-tuned one is still missing, to count parameters, bytes or seconds. EncoderError
    where the teacher is missing, or its tokeniser did not make the shards; SettingsError where the student's
    layers do not divide the teacher's, or a loss compares different sizes.
    """
    distill = settings.distill
    torch.manual_seed(settings.seed)
    model = settings.model
    depth = settings.student.layers
    if distill.alone and settings.student.kind != "bilstm" and depth:  # only the student is needed
        model = model.model_copy(update={"teacher_layers": depth})
    teacher = _pretrained(settings.teacher, model, settings, manifest)
    block_map(len(teacher.layers), settings.student.layers)
    tuned = None
    if distill.warm and not (stand_in and distill.teacher_run is None):
        tuned = copy.deepcopy(_load_teacher_run(settings, manifest))  # an earlier trial may have frozen it
        teacher = tuned[0].requires_grad_(True)
        tuned[1].requires_grad_(True)
    torch.manual_seed(settings.seed)
    student = _start_student(teacher, settings, manifest, stand_in=stand_in)
    top = _draw_top(student, settings, manifest)
    _start_top(top, settings, manifest)
    teacher_top = None
    if distill.frozen and not (stand_in and distill.teacher_run is None):
        teacher, teacher_top = _load_teacher_run(settings, manifest)
    elif tuned is not None:
        top, teacher_top = (top, tuned[1]) if distill.own_tops else (tuned[1], None)
    elif distill.own_tops:
        teacher_top = _draw_top(teacher, settings, manifest)
    torch.manual_seed(settings.seed)  # loading the teacher may have drawn numbers
    state_map = nn.Linear(student.hidden_size, teacher.hidden_size) if distill.map_hidden else None
    pair = Pair(
        teacher,
        student,
        top,
        teacher_top=teacher_top,
        state_map=state_map,
        alone=distill.alone,
        frozen=distill.frozen,
        teacher_dropout=distill.teacher_dropout,
        projections=not distill.losses.isdisjoint(ATTENTION_LOSSES),
    )
    _require_comparable(pair, distill)
    _freeze_lower_layers(pair, settings.model.trainable)
    return pair.train()


def _freeze_lower_layers(pair: Pair, trainable: int | None) -> None:
    if trainable is None:
        return
    encoders = [pair.student] if pair.alone or pair.frozen else [pair.teacher, pair.student]
    for encoder in encoders:
        if len(encoder.layers):
            encoder.requires_grad_(False)
            encoder.layers[-trainable:].requires_grad_(True)


def _load_teacher_run(settings: TrainSettings, manifest: Manifest) -> tuple[Encoder, Top]:
    """The encoder and top of the run that fine-tuned the teacher, with the same task, shards and topics."""
    run = settings.distill.teacher_run
    assert run is not None, "its run comes first"
    encoder, top, description = _cached_student(Path(run) / "student")  # nothing changes a frozen teacher
    wanted = {"task": settings.task, "labels": manifest.labels, "tokenizer_sha256": manifest.tokenizer.sha256}
    for name, expected in wanted.items():
        if description[name] != expected and (name != "labels" or settings.task == "topics"):
            raise EncoderError(
                f"distill.teacher_run {run}: its {name} differs from this run's; give a run of the same task "
                "and shards, or leave it out to fine-tune one"
            )
    return encoder, top


def _start_student(
    teacher: Encoder, settings: TrainSettings, manifest: Manifest, *, stand_in: bool
) -> Encoder:
    student = settings.student
    if student.kind == "bilstm":
        return RecurrentEncoder(teacher.word_embedding, teacher.hidden_size, dropout=settings.model.dropout)
    if student.kind == "nrms":
        return NrmsEncoder(teacher.word_embedding, dropout=settings.model.dropout)
    if student.encoder is not None:
        model = settings.model.model_copy(update={"teacher_layers": student.layers})
        return _pretrained(student.encoder, model, settings, manifest)
    start_from = student.start_from or ("encoder" if student.layers else "teacher")
    if start_from == "teacher" and settings.distill.frozen and not stand_in:
        teacher = _load_teacher_run(settings, manifest)[0]
    elif student.start_from == "encoder" and settings.distill.warm:
        teacher = _pretrained(settings.teacher, settings.model, settings, manifest)
    torch.manual_seed(settings.seed)  # loading may have drawn numbers
    if not student.layers:
        return _start_words(teacher, settings, manifest, stand_in=stand_in)
    blocks = block_map(len(teacher.layers), student.layers)
    spread = student.start == "spread"
    student_layers = teacher.pick_layers([block[-1] if spread else i for i, block in enumerate(blocks, 1)])
    return student_layers.requires_grad_(True)  # a frozen teacher's copies are frozen


def _start_words(
    teacher: Encoder, settings: TrainSettings, manifest: Manifest, *, stand_in: bool
) -> StaticEncoder:
    """Word vectors from a teacher's outputs for each token; zeros for a stand-in, to save the time."""
    width = min(settings.student.width or teacher.hidden_size, teacher.hidden_size)
    before, after = _cached_tokenizer(str(Path(settings.data) / "tokenizer")).special_ids()
    vectors = torch.zeros(manifest.tokenizer.vocabulary, width)
    if not stand_in:
        vectors = reduce_width(token_vectors(teacher, len(vectors), before=before, after=after), width)
        vectors[[*before, *after]] = 0.0
    torch.manual_seed(settings.seed)  # loading the teacher may have drawn numbers
    words = nn.Embedding.from_pretrained(vectors, freeze=False)  # type: ignore[no-untyped-call, unused-ignore]
    return StaticEncoder(words, (*before, *after), dropout=settings.model.dropout)


def _draw_top(encoder: Encoder, settings: TrainSettings, manifest: Manifest) -> Top:
    return Top(
        encoder.hidden_size,
        query_size=settings.model.query_size,
        topics=len(manifest.labels),
        task=settings.task,
        user=settings.recommendation.user,
    )


def _require_comparable(pair: Pair, distill: DistillSettings) -> None:
    if pair.alone:
        return
    student, teacher = pair.student.hidden_size, pair.teacher.hidden_size
    same_width = _EQUAL_WIDTHS | (frozenset() if distill.map_hidden else _MAPPED)
    if student != teacher and (wrong := sorted(distill.losses & same_width)):
        raise SettingsError(
            f"the student is {student} wide and the teacher {teacher}: {', '.join(wrong)} cannot compare "
            "them; set their weights to 0" + (", or distill.map_hidden true" if set(wrong) <= _MAPPED else "")
        )
    if student != teacher and not distill.own_tops:
        raise SettingsError(
            f"the student is {student} wide and the teacher {teacher}: they cannot share a top; set "
            "distill.shared_top false, or distill.teacher frozen"
        )
    if distill.beta > 0 and not pair.layers_match:
        raise SettingsError(
            f"beta {distill.beta}: student and teacher layers have different parameters, so their gradients "
            "cannot be mixed; set distill.beta 0"
        )
    if not distill.losses.isdisjoint(ATTENTION_LOSSES) and pair.student.heads != pair.teacher.heads:
        raise SettingsError(
            f"the student has {pair.student.heads} heads and the teacher {pair.teacher.heads}: losses on "
            "attention compare head by head; set their weights to 0"
        )


def _pretrained(name: str, model: ModelSettings, settings: TrainSettings, manifest: Manifest) -> Encoder:
    """A copy of a pretrained encoder, or one from scratch, drawn from torch's generator."""
    if name != SCRATCH:
        check_tokenizer(name, manifest)
    load: Callable[..., Encoder] = load_encoder if name == SCRATCH else _cached_encoder
    encoder = load(
        name,
        model=model,
        scratch=settings.scratch,
        vocabulary=manifest.tokenizer.vocabulary,
        pad_id=manifest.tokenizer.pad_id,
        max_tokens=int(manifest.settings.get("max_tokens") or 0),
    )
    if name != SCRATCH:
        return copy.deepcopy(encoder)
    _load_word_vectors(encoder, Path(settings.data) / VECTORS)
    return encoder


def _load_word_vectors(encoder: Encoder, path: Path) -> None:
    """Start an encoder from scratch from the shards' word vectors, if there are any."""
    if not path.is_file():
        return
    try:
        table = torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError) as error:
        raise EncoderError(f"{path}: damaged word vectors ({error}); prepare the shards again") from error
    words = encoder.word_embedding.weight
    if table.shape[1] != words.shape[1]:
        raise EncoderError(
            f"the shards' word vectors are {table.shape[1]} wide, the encoder {words.shape[1]}: give "
            f"--scratch.hidden {table.shape[1]} and a --scratch.heads that divides it"
        )
    if table.shape != words.shape:
        raise EncoderError(f"{path}: does not fit the shards' vocabulary; prepare the shards again")
    with torch.no_grad():
        words.copy_(table)


def _start_top(top: Top, settings: TrainSettings, manifest: Manifest) -> None:
    """Start from an exported student's pooling and, for the same task and topics, its head."""
    from safetensors.torch import load_file

    folder = Path(settings.teacher)
    if settings.teacher == SCRATCH or not (folder / TOP).is_file():
        return
    description = read_top(folder)
    same = description["task"] == settings.task and description["labels"] == manifest.labels
    weights = top.state_dict()
    known = {
        name: value
        for name, value in load_file(folder / TOP).items()
        if name in weights and weights[name].shape == value.shape and (same or name.startswith("pooling."))
    }
    top.load_state_dict({**weights, **known})


def check_tokenizer(teacher: str, manifest: Manifest) -> None:
    """Raise EncoderError if another tokeniser than the teacher's made the shards."""
    if _cached_tokenizer(teacher).sha256 != manifest.tokenizer.sha256:
        raise EncoderError(
            f"the shards were tokenised by '{manifest.tokenizer.name}', the teacher '{teacher}' has another "
            "tokeniser: the same ids would mean other words; prepare the shards with this teacher"
        )
