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
from newsbert_ray.record import describe_hardware, installed_versions, write_json
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
        out: folder for bench.json, a table and a figure; none by default.
        say: told what is being done.
    Raises:
        SettingsError: no model, or one that is none.
        RecordError, EncoderError, TextsError: as they say.
    """
    if out is not None and storage.is_url(out):
        raise SettingsError(f"--out {storage.shown(out)}: a page is read on this machine; give a folder")
    texts = _texts(input, titles)
    candidates = {one.name: one for name in models for one in named_by(name, texts)}
    if not candidates:
        raise SettingsError("no model to measure; give a finished run, or random:12x768")
    distinct = [one.load() for one in candidates.values()]
    memory = {}
    for one in candidates.values():
        say(f"memory of {one.name}")
        memory[one.name] = megabytes_at_work(one.given, one.name, texts)
    found: list[Timing] = []
    before = torch.get_num_threads()
    try:
        for count in threads:
            say(f"{len(distinct)} models, {len(texts):,} titles, {rounds} rounds, {count} threads")
            with _threads(count):
                found += [
                    replace(timing, at_work=memory[timing.name])
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
            "hardware": describe_hardware(),
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
    seconds: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    single: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    parts: dict[str, list[dict[str, float]]] = {subject.name: [] for subject in subjects}
    for number in range(rounds + 1):
        for subject in subjects:
            began = time.perf_counter()
            subject.encoder.encode(texts)
            took = time.perf_counter() - began
            ones = []
            for text in texts[: alone // rounds + 1]:
                began = time.perf_counter()
                subject.encoder.encode([text])
                ones.append(1000 * (time.perf_counter() - began))
            if number:
                seconds[subject.name].append(took)
                single[subject.name] += ones
                parts[subject.name].append(_parts(subject, texts, took))
        say(f"round {number} of {rounds}" + (" (not counted)" if not number else ""))
    deepest = max(subjects, key=lambda subject: (subject.layers, subject.parameters))
    for subject in subjects:
        own, base = seconds[subject.name], seconds[deepest.name]
        rates = [len(texts) / took for took in own]
        p50, p95, p99 = np.percentile(single[subject.name], [50, 95, 99])
        yield Timing(
            subject.name,
            subject.layers,
            subject.width,
            subject.parameters,
            4 * subject.parameters / 1e6,
            threads,
            statistics.median(rates),
            min(rates),
            max(rates),
            float(p50),
            float(p95),
            float(p99),
            {
                part: statistics.median(found[part] for found in parts[subject.name])
                for part in parts[subject.name][0]
            },
            deepest.layers / subject.layers,
            statistics.median(b / o for b, o in zip(base, own, strict=True)),
        )


def _parts(subject: Subject, texts: Sequence[str], whole: float) -> dict[str, float]:
    """Shares of a round: the tokeniser by itself, the pooling by itself on states of that size, and the rest,
    which are the encoder's layers, embeddings and padding."""
    encoder = subject.encoder
    began = time.perf_counter()
    ids = list(encoder.tokenizer.encode(texts, max_tokens=encoder.longest))
    tokenising = time.perf_counter() - began
    tokens = sum(map(len, ids))
    states = torch.zeros(max(1, tokens // 16), 16, subject.width)
    mask = torch.ones(states.shape[:2], dtype=torch.int64)
    with torch.inference_mode():
        began = time.perf_counter()
        encoder.top.pooling(states, mask)
        pooling = time.perf_counter() - began
    rest = max(0.0, whole - tokenising - pooling)
    return {
        name: value / whole for name, value in (("tokenise", tokenising), ("pool", pooling), ("encode", rest))
    }


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
