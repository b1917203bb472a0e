"""`newsbert-ray bench`: titles/s and milliseconds a title, end to end with tokenising, of several models in
one runner, beside what their layers promise."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from newsbert_ray import storage
from newsbert_ray.config import SettingsError
from newsbert_ray.data.mind import BadLine
from newsbert_ray.data.synthetic import invent_words
from newsbert_ray.evaluation.place import device_name
from newsbert_ray.record import describe_hardware, installed_versions, write_json
from newsbert_ray.serving.encode import Arithmetic, Precision, best_device
from newsbert_ray.serving.memory import megabytes_at_work
from newsbert_ray.serving.subjects import Subject, named_by
from newsbert_ray.serving.texts import cut_file, read_rows
from newsbert_ray.serving.timings import Timing, write_page

_WORDS = 20_000
_TITLE_WORDS = (4, 18)


def bench(
    models: Sequence[str],
    *,
    input: str | None = None,
    titles: int = 2000,
    alone: int = 200,
    rounds: int = 5,
    threads: Sequence[int] = (1,),
    precision: Sequence[Precision] = ("fp32",),
    device: str | None = None,
    out: str | Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Timing]:
    """Measure models against each other: every round all of them, in turn, on the same titles.

    Args:
        models: folders of finished runs (each its student, and once its teacher), or random:LAYERSxWIDTH.
        input: texts as `embed` takes them; invented titles by default.
        titles: texts of a round.
        alone: of these so many are also read one at a time, for the percentiles.
        rounds: repeats; the first is not counted.
        threads: numbers of CPU threads to try.
        precision: numbers that the encoders compute in; of several, each model takes its turn in each, and
            the deepest model in the first of them is what the others are held against.
        device: cpu or cuda; a GPU where there is one by default.
        out: folder for bench.json, a table and a figure; none by default.
        say: told what is being done.
    Raises:
        SettingsError: no model, or one that is none; a device that is not there.
        RecordError, EncoderError, TextsError: as they say.
    """
    if out is not None and storage.is_url(out):
        raise SettingsError(f"--out {storage.shown(out)}: a page is read on this machine; give a folder")
    place = _device(device)
    texts = _texts(input, titles)
    candidates = {one.name: one for name in models for one in named_by(name, texts)}
    if not candidates:
        raise SettingsError("no model to measure; give a finished run, or random:12x768")
    kinds = list(dict.fromkeys(precision))
    distinct = [one.load(Arithmetic(place, kind)) for kind in kinds for one in candidates.values()]
    memory: dict[tuple[str, str], float | None] = {}
    for kind in kinds if place == "cpu" else ():
        for one in candidates.values():
            say(f"memory of {one.name}" + (f", {kind}" if len(kinds) > 1 else ""))
            memory[one.name, kind] = megabytes_at_work(one.given, one.name, texts, precision=kind)
    found: list[Timing] = []
    before = torch.get_num_threads()
    try:
        for count in threads:
            say(f"{len(distinct)} models, {len(texts):,} titles, {rounds} rounds, {count} threads")
            with _threads(count):
                found += [
                    replace(timing, at_work=memory.get((timing.name, timing.precision)))
                    for timing in _measure(
                        distinct, texts, alone=alone, rounds=rounds, threads=count, say=say
                    )
                ]
    finally:
        torch.set_num_threads(before)
    if out is not None:
        what = {
            "titles": len(texts),
            "tokens_per_title": _tokens(distinct[0], texts),
            "rounds": rounds,
            "input": Path(input).name if input else "invented",
            "hardware": {**describe_hardware(), "device": device_name(torch.device(place))},
            "versions": installed_versions(),
        }
        write_json(Path(out) / "bench.json", {**what, "timings": [asdict(timing) for timing in found]})
        write_page(found, Path(out), what)
    return found


def _measure(
    subjects: Sequence[Subject],
    texts: Sequence[str],
    *,
    alone: int,
    rounds: int,
    threads: int,
    say: Callable[[str], None],
) -> Iterator[Timing]:
    seconds: list[list[float]] = [[] for _ in subjects]
    single: list[list[float]] = [[] for _ in subjects]
    parts: list[list[dict[str, float]]] = [[] for _ in subjects]
    for number in range(rounds + 1):
        for place, subject in enumerate(subjects):
            began = time.perf_counter()
            subject.encoder.encode(texts)
            took = time.perf_counter() - began
            ones = []
            for text in texts[: alone // rounds + 1]:
                began = time.perf_counter()
                subject.encoder.encode([text])
                ones.append(1000 * (time.perf_counter() - began))
            if number:
                seconds[place].append(took)
                single[place] += ones
                parts[place].append(_parts(subject, texts, took))
        say(f"round {number} of {rounds}" + (" (not counted)" if not number else ""))
    first = [place for place, subject in enumerate(subjects) if subject.arithmetic == subjects[0].arithmetic]
    deepest = max(first, key=lambda place: (subjects[place].layers, subjects[place].parameters))
    base, depth = seconds[deepest], subjects[deepest].layers
    for subject, own, ones, shares in zip(subjects, seconds, single, parts, strict=True):
        rates = [len(texts) / took for took in own]
        p50, p95, p99 = np.percentile(ones, [50, 95, 99])
        yield Timing(
            subject.name,
            subject.layers,
            subject.width,
            subject.parameters,
            subject.megabytes,
            threads,
            statistics.median(rates),
            min(rates),
            max(rates),
            float(p50),
            float(p95),
            float(p99),
            {part: statistics.median(found[part] for found in shares) for part in shares[0]},
            depth / subject.layers,
            statistics.median(b / o for b, o in zip(base, own, strict=True)),
            precision=subject.arithmetic.precision,
        )


def _parts(subject: Subject, texts: Sequence[str], whole: float) -> dict[str, float]:
    """Shares of a round: the tokeniser by itself, the pooling by itself on states of that size, and the rest,
    which are the encoder's layers, embeddings and padding."""
    encoder = subject.encoder
    began = time.perf_counter()
    ids = list(encoder.tokenizer.encode(texts, max_tokens=encoder.longest))
    tokenising = time.perf_counter() - began
    tokens = sum(map(len, ids))
    states = torch.zeros(max(1, tokens // 16), 16, subject.width, device=encoder.device)
    mask = torch.ones(states.shape[:2], dtype=torch.int64, device=encoder.device)
    with torch.inference_mode():
        began = time.perf_counter()
        encoder.top.pooling(states, mask).cpu()
        pooling = time.perf_counter() - began
    rest = max(0.0, whole - tokenising - pooling)
    return {
        name: value / whole for name, value in (("tokenise", tokenising), ("pool", pooling), ("encode", rest))
    }


def _device(asked: str | None) -> str:
    if asked == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: PyTorch finds no GPU here; leave it out for the processor")
    return asked or best_device()


def _texts(source: str | None, count: int) -> list[str]:
    """The first texts of a file, or invented titles."""
    if source is None:
        generator = np.random.default_rng(0)
        words = np.array(invent_words(generator, _WORDS))
        lengths = generator.integers(*_TITLE_WORDS, size=count, endpoint=True)
        return [" ".join(words[generator.integers(_WORDS, size=n)]) for n in lengths.tolist()]
    _, pieces = cut_file(source)
    rows = (row for piece in pieces for row in read_rows(piece))
    found = [row.text for row in islice((r for r in rows if not isinstance(r, BadLine)), count)]
    if not found:
        raise SettingsError(f"--input {source}: no text in it")
    return found


def _tokens(subject: Subject, texts: Sequence[str]) -> float:
    encoder = subject.encoder
    return statistics.fmean(map(len, encoder.tokenizer.encode(texts, max_tokens=encoder.longest)))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many threads for the arithmetic; the tokeniser takes all cores or one."""
    torch.set_num_threads(count)
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if count > 1 else "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
