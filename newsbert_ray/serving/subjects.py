"""What `bench` can measure: a run's student and its teacher, or a BERT of random weights, by their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from newsbert_ray import inputs
from newsbert_ray.config import ModelSettings, ScratchSettings, SettingsError, TrainSettings, build_settings
from newsbert_ray.data.tokens import TitleTokenizer, learn_tokenizer, load_tokenizer
from newsbert_ray.model.encoder import Encoder
from newsbert_ray.model.loading import encoder_depth, load_encoder
from newsbert_ray.model.pair import Top
from newsbert_ray.record import read_record
from newsbert_ray.serving.encode import Arithmetic, TextEncoder
from newsbert_ray.serving.export import read_student

RANDOM = re.compile(r"random:(\d+)x(\d+)")
"""A BERT of so many layers and such a width with random weights: for speed as good as any."""
_LONGEST, _QUERY, _HEAD, _VOCABULARY = 30, 256, 64, 30_522


@dataclass(frozen=True)
class Subject:
    """A model to be measured, in one kind of numbers."""

    name: str
    layers: int
    width: int
    parameters: int
    megabytes: float
    encoder: TextEncoder
    arithmetic: Arithmetic


class Candidate(NamedTuple):
    """A model's own name, the word that it was asked for by, and how to have it."""

    name: str
    given: str
    load: Callable[[Arithmetic], Subject]


def named_by(given: str, texts: Sequence[str]) -> Iterator[Candidate]:
    """The models that a word stands for; none is loaded yet.

    Args:
        given: folder or URL of a finished run, or random:LAYERSxWIDTH.
        texts: what a random encoder learns its vocabulary from.
    Raises:
        SettingsError: it stands for none.
        RecordError, EncoderError: as they say.
    """
    if found := RANDOM.fullmatch(given):
        layers, width = int(found[1]), int(found[2])
        if not layers or not width or width % _HEAD:
            raise SettingsError(
                f"{given}: give layers, and a width that {_HEAD} divides, as in random:12x768"
            )
        yield Candidate(given, given, lambda how: _random(given, layers, width, texts, how))
        return
    if given.startswith("random"):
        raise SettingsError(f"{given}: write it as random:LAYERSxWIDTH, such as random:12x768")
    label = f"{Path(given).name}, student"
    yield Candidate(label, given, lambda how: _student(label, given, how))
    settings = build_settings(TrainSettings, read_record(_folder(given)).settings)
    if not settings.distill.alone:
        teacher = inputs.brought(settings.teacher)
        depth = encoder_depth(teacher, settings.model, settings.scratch)
        name = f"{Path(teacher).name}, {depth} layers"
        yield Candidate(name, given, lambda how: _teacher(name, given, settings, how))


def _folder(run: str) -> Path:
    return inputs.fetch(run, without=("checkpoints/*",))


def _student(name: str, run: str, arithmetic: Arithmetic) -> Subject:
    student = read_student(run)
    tokenizer = load_tokenizer(str(student.folder / "student"))
    return _subject(name, student.encoder, student.top, tokenizer, student.longest, arithmetic)


def _teacher(name: str, run: str, settings: TrainSettings, arithmetic: Arithmetic) -> Subject:
    """The teacher's encoder as it was before the run: for speed as good as after it."""
    student = read_student(run)
    tokenizer, longest = load_tokenizer(str(student.folder / "student")), student.longest
    del student
    encoder = load_encoder(
        inputs.brought(settings.teacher),
        model=settings.model,
        scratch=settings.scratch,
        vocabulary=tokenizer.vocabulary,
        pad_id=tokenizer.pad_id,
        max_tokens=longest,
    )
    return _subject(name, encoder, _fresh_top(encoder), tokenizer, longest, arithmetic)


def _random(name: str, layers: int, width: int, texts: Sequence[str], arithmetic: Arithmetic) -> Subject:
    scratch = ScratchSettings(layers=layers, hidden=width, heads=width // _HEAD, feed_forward=4 * width)
    tokenizer = learn_tokenizer(lambda: iter(texts), vocabulary=_VOCABULARY)
    encoder = load_encoder(
        "scratch", model=ModelSettings(), scratch=scratch, vocabulary=_VOCABULARY, pad_id=tokenizer.pad_id
    )
    return _subject(name, encoder, _fresh_top(encoder), tokenizer, _LONGEST, arithmetic)


def _subject(
    name: str, encoder: Encoder, top: Top, tokenizer: TitleTokenizer, longest: int, arithmetic: Arithmetic
) -> Subject:
    ready = TextEncoder(encoder, top, tokenizer, longest=longest, arithmetic=arithmetic)
    weights = [weight for module in (encoder, top) for weight in module.parameters()]
    parameters = sum(weight.numel() for weight in weights)
    megabytes = sum(weight.numel() * weight.element_size() for weight in weights) / 1e6
    depth, width = len(encoder.layers), encoder.hidden_size
    return Subject(name, depth, width, parameters, megabytes, ready, arithmetic)


def _fresh_top(encoder: Encoder) -> Top:
    return Top(encoder.hidden_size, query_size=_QUERY, topics=2)
