"""`newsbert-ray bench`: titles/s and milliseconds a title, end to end with tokenising, of several models in
one runner, beside what their layers promise."""

from __future__ import annotations

import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from newsbert_ray.config import ModelSettings, ScratchSettings, SettingsError, TrainSettings, build_settings
from newsbert_ray.data.sources import BadLine
from newsbert_ray.data.synthetic import invent_words
from newsbert_ray.data.tokenizer import TitleTokenizer, learn_tokenizer, load_tokenizer
from newsbert_ray.evaluation.encoding import device_name
from newsbert_ray.files import write_json, write_text
from newsbert_ray.model.encoder import Encoder
from newsbert_ray.model.families import encoder_depth, load_encoder
from newsbert_ray.model.pair import Top
from newsbert_ray.record import describe_hardware, installed_versions, read_record
from newsbert_ray.reporting.draw import draw_svg, write_figure
from newsbert_ray.reporting.figures import FigureData, Line, Panel
from newsbert_ray.reporting.page import Facts, Page, Picture, Section, Table
from newsbert_ray.reporting.records import joined
from newsbert_ray.secrets import mask_url
from newsbert_ray.serving.embed import cut_file, read_rows
from newsbert_ray.serving.export import read_student
from newsbert_ray.serving.predictor import Arithmetic, Precision, TextEncoder, best_device
from newsbert_ray.storage import workdir as storage
from newsbert_ray.storage.workdir import download_input, fetch

if TYPE_CHECKING:
    from newsbert_ray.serving.predictor import Precision


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

    Arguments, result and errors are those of `newsbert_ray.bench`.
    """
    if out is not None and storage.is_url(out):
        raise SettingsError(f"--out {mask_url(str(out))}: a page is read on this machine; give a folder")
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


FIGURE = "speed_over_layers"
CAPTION = (
    "Titles/s: median, slowest and fastest round of all titles together. ms: one title alone. times: of the "
    "deepest model's titles/s; promised: its layers over own. tokenising, pooling: shares of a round. MB: of "
    "the weights; at work: what the model and a round of reading add to a process at most, on one thread."
)

SPARE = (
    "pooling",
    "tokenising",
    "slowest",
    "fastest",
    "million parameters",
    "layers",
    "MB",
    "p95",
    "MB at work",
)
"""Columns that a narrow terminal can do without, the least wanted first."""


@dataclass(frozen=True)
class Timing:
    """What one model took with so many threads.

    `titles_per_second` is the median over rounds of all titles together, `slowest` and `fastest` the ends;
    `p50`, `p95`, `p99` milliseconds of one title alone; `shares` of a round's seconds by part; `promised` is
    the deepest model's layers over this one's, `reached` its titles/s over that one's, in the same round.
    `megabytes` are those of its weights, `at_work` what loading it and reading the titles added to a process
    at most, None where the system does not tell or a GPU works.
    """

    name: str
    layers: int
    width: int
    parameters: int
    megabytes: float
    threads: int
    titles_per_second: float
    slowest: float
    fastest: float
    p50: float
    p95: float
    p99: float
    shares: dict[str, float]
    promised: float
    reached: float
    at_work: float | None = None
    precision: str = "fp32"


def timings_table(timings: Sequence[Timing]) -> Table:
    """A row for each model and number of threads."""
    columns: dict[str, Callable[[Timing], str]] = {
        "model": lambda t: t.name,
        "layers": lambda t: str(t.layers),
        "million parameters": lambda t: f"{t.parameters / 1e6:.1f}",
        "MB": lambda t: f"{t.megabytes:,.0f}",
        "MB at work": lambda t: "" if t.at_work is None else f"{t.at_work:,.0f}",
        "threads": lambda t: str(t.threads),
        "titles/s": lambda t: f"{t.titles_per_second:,.0f}",
        "slowest": lambda t: f"{t.slowest:,.0f}",
        "fastest": lambda t: f"{t.fastest:,.0f}",
        "ms p50": lambda t: f"{t.p50:.2f}",
        "p95": lambda t: f"{t.p95:.2f}",
        "p99": lambda t: f"{t.p99:.2f}",
        "times": lambda t: f"{t.reached:.2f}",
        "promised": lambda t: f"{t.promised:.2f}",
        "tokenising": lambda t: f"{t.shares['tokenise']:.0%}",
        "pooling": lambda t: f"{t.shares['pool']:.0%}",
    }
    if any(timing.precision != "fp32" for timing in timings):
        columns = {"model": columns.pop("model"), "precision": lambda t: t.precision, **columns}
    rows = tuple(tuple(show(timing) for show in columns.values()) for timing in timings)
    return Table(tuple(columns), rows, words=1, caption=CAPTION)


def speed_figure(timings: Sequence[Timing]) -> FigureData[Panel]:
    """Titles/s over layers, times the deepest model's, beside what the number of layers promises."""
    lines = []
    several = len({t.precision for t in timings}) > 1
    for count, kind in dict.fromkeys((t.threads, t.precision) for t in timings):
        own = sorted(
            (t for t in timings if (t.threads, t.precision) == (count, kind)), key=lambda t: t.layers
        )
        x = tuple(float(t.layers) for t in own)
        y = tuple(t.reached for t in own)
        label = f"{count} thread{'s' if count > 1 else ''}" + (f", {kind}" if several else "")
        lines.append(Line(label, x, y, (None,) * len(x), (1,) * len(x)))
    deepest = max(t.layers for t in timings)
    x = tuple(float(n) for n in range(min(t.layers for t in timings), deepest + 1))
    y = tuple(deepest / n for n in x)
    lines.append(Line("what layers promise", x, y, (None,) * len(x), (1,) * len(x), look="reference"))
    panel = Panel("", "layers", "titles/s, times the deepest model's", tuple(lines))
    best = max(timings, key=lambda t: t.reached)
    alt = (
        f"{best.name} is {best.reached:.1f} times as fast as the deepest model, {best.promised:.1f} promised"
    )
    caption = "End to end with tokenising, median over rounds in which all models took turns."
    return FigureData(FIGURE, (panel,), caption, alt=alt, whole_x=True)


def write_page(timings: Sequence[Timing], out: Path, what: Mapping[str, Any]) -> None:
    """bench.md beside its figure."""
    figure = speed_figure(timings)
    path = write_figure(figure, out)[0]
    facts = (
        ("texts", f"{what['titles']:,}, {what['input']}, {what['tokens_per_title']:.1f} tokens on average"),
        ("rounds", f"{what['rounds']}, all models in turn; the first is not counted"),
        ("hardware", joined(what["hardware"])),
        ("versions", joined(what["versions"])),
    )
    picture = Picture(path.name, draw_svg(figure), figure.alt, figure.caption)
    blocks = (timings_table(timings), picture, Facts(facts))
    page = Page("Speed", "End to end, tokenising included.", (Section("Measured", blocks),))
    write_text(out / "bench.md", page.markdown())


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
        teacher = download_input(settings.teacher)
        depth = encoder_depth(teacher, settings.model, settings.scratch)
        name = f"{Path(teacher).name}, {depth} layers"
        yield Candidate(name, given, lambda how: _teacher(name, given, settings, how))


def _folder(run: str) -> Path:
    return fetch(run, without=("checkpoints/*",))


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
        download_input(settings.teacher),
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


_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_FIRST = "random:1x64"
"""A small model, which brings the libraries in before anything is measured."""


def megabytes_at_work(
    given: str, name: str, texts: Sequence[str], *, precision: Precision = "fp32"
) -> float | None:
    """What loading a model and reading `texts` on one thread add to a process's memory at most.

    Args:
        given, name: word and name of one of `subjects.named_by`'s candidates.
        texts: what it reads, on the processor.
        precision: the encoder's numbers.
    Returns:
        Megabytes (10^6); None where the system does not tell.
    """
    if not _RESET.exists():
        return None
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_weigh, args=(there, given, name, list(texts), precision))
    process.start()
    there.close()
    try:
        return float(here.recv())
    except EOFError:
        return None  # it was ended from outside, as for want of memory
    finally:
        process.join()


def _weigh(connection: Connection, given: str, name: str, texts: Sequence[str], precision: Precision) -> None:
    import torch

    from newsbert_ray.serving.predictor import Arithmetic

    torch.set_num_threads(1)
    arithmetic = Arithmetic("cpu", precision)
    first = next(named_by(_FIRST, texts)).load(arithmetic)
    first.encoder.encode(texts[:100])
    candidate = next(one for one in named_by(given, texts) if one.name == name)
    _RESET.write_text("5")  # the peak is counted anew
    before = _kilobytes("VmRSS")
    candidate.load(arithmetic).encoder.encode(texts)
    connection.send((_kilobytes("VmHWM") - before) * 1024 / 1e6)


def _kilobytes(field: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"{_STATUS} has no {field}")
