"""`newsbert-ray bench`: titles/s and milliseconds a title of several models, tokenising included.

All models take turns on the same titles, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import multiprocessing
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from newsbert_ray.config import ModelSettings, ScratchSettings, SettingsError, TrainSettings, build_settings
from newsbert_ray.data.synthetic import invent_words
from newsbert_ray.data.tokenizer import TitleTokenizer, learn_tokenizer
from newsbert_ray.evaluation.scoring import device_name
from newsbert_ray.files import write_json, write_text
from newsbert_ray.model.encoder import Encoder
from newsbert_ray.model.families import encoder_depth, load_encoder
from newsbert_ray.model.linear import LinearModel, features_of
from newsbert_ray.model.pair import Top
from newsbert_ray.ray_session import environment
from newsbert_ray.record import describe_hardware, installed_versions
from newsbert_ray.reporting.draw import draw_svg, write_figure
from newsbert_ray.reporting.figures import FigureData, Line, Panel
from newsbert_ray.reporting.page import Page, Picture, Section, Table
from newsbert_ray.reporting.records import grouped, joined
from newsbert_ray.secrets import mask_url
from newsbert_ray.serving.predictor import (
    LinearPredictor,
    Precision,
    Predictor,
    Student,
    best_device,
    predictor_of,
    read_model,
    read_run,
)
from newsbert_ray.serving.texts import Row, open_texts
from newsbert_ray.storage.bucket import is_url
from newsbert_ray.storage.workdir import download_input

FIGURE = "speed_over_layers"
CAPTION = (
    "titles/s: median, slowest and fastest round of all titles. ms: one title alone. times: titles/s "
    "relative to the deepest model; promised: its layers divided by own layers. tokenising, pooling: share "
    "of a round. MB: of the weights; at work: the most memory that loading and reading add, on one thread."
)
SPARE = (
    *("pooling", "tokenising", "slowest", "fastest", "million parameters", "layers", "MB", "p95"),
    "MB at work",
)
"""Columns that a narrow terminal leaves out, the least important first."""
RANDOM = re.compile(r"random:(\d+)x(\d+)")
"""A BERT with random weights: as fast as a trained one."""
_HEAD_SIZE, _VOCABULARY = 64, 30_522
_RESET_PEAK = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Timing:
    """The speed of one model with a number of threads.

    Attributes:
        titles_per_second: median over the rounds of all titles; `slowest` and `fastest` are the extremes.
        p50: percentile of the milliseconds of one title alone, as `p95` and `p99`.
        shares: share of a round's seconds for `tokenise`, `pool` and `encode`.
        promised: the deepest model's layers divided by this model's; None for a model without layers.
        reached: this model's titles/s divided by the deepest model's, median over rounds.
        megabytes: of the weights.
        at_work: megabytes that loading the model and reading the titles add to a process, at most; None on a
            GPU, or where the system does not tell.
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
    promised: float | None
    reached: float
    at_work: float | None = None
    precision: str = "fp32"


class Model(NamedTuple):
    """A model's name, and the function that loads it, also in another process."""

    name: str
    load: Callable[[], Student | LinearModel]


@dataclass
class _Subject:
    """A loaded model, and what was measured: seconds of all titles and of one, shares of a round's parts."""

    name: str
    predictor: Predictor
    at_work: float | None
    seconds: list[float] = field(default_factory=list)
    single: list[float] = field(default_factory=list)
    shares: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


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
    """The verb `bench`. Arguments, result and errors are those of `newsbert_ray.bench`."""
    if out is not None and is_url(out):
        raise SettingsError(f"--out {mask_url(str(out))}: a page is written on this machine; give a folder")
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: PyTorch finds no GPU here; leave it out to use the processor")
    device = device or best_device()
    texts = _read_titles(input, titles)
    by_name = {model.name: model for argument in models for model in find_models(argument, texts)}
    if not by_name:
        raise SettingsError("no model to measure; give a finished run, or random:12x768")
    variants = list(product(dict.fromkeys(precision), by_name.values()))
    loaded: list[tuple[str, Predictor, float | None]] = []
    for numbers, model in variants:
        at_work = None
        if device == "cpu":
            say(f"memory of {model.name}" + (f", {numbers}" if len(variants) > len(by_name) else ""))
            at_work = memory_in_use(model, texts, precision=numbers)
        loaded.append((model.name, predictor_of(model.load(), device=device, precision=numbers), at_work))
    timings: list[Timing] = []
    for count in threads:
        say(f"models: {len(variants)}, titles: {len(texts):,}, rounds: {rounds}, threads: {count}")
        subjects = [_Subject(*one) for one in loaded]
        with _threads(count):
            for number in range(rounds + 1):
                for subject in subjects:
                    _run_round(subject, texts, alone // rounds + 1, count=number > 0)
                say(f"round {number} of {rounds}" + ("" if number else " (not counted)"))
        timings += _timings(subjects, titles=len(texts), threads=count)
    if out is not None:
        encoders = [one for _, one, _ in loaded if not isinstance(one, LinearPredictor)]
        tokens = _token_ids(encoders[0], texts) if encoders else [text.split() for text in texts]
        facts = {
            "titles": len(texts),
            "tokens_per_title": statistics.fmean(map(len, tokens)),
            "rounds": rounds,
            "input": Path(input).name if input else "invented",
            "hardware": {**describe_hardware(), "device": device_name(torch.device(device))},
            "versions": installed_versions(),
        }
        write_json(Path(out) / "bench.json", {**facts, "timings": [asdict(timing) for timing in timings]})
        write_page(timings, Path(out), facts)
    return timings


def find_models(argument: str, texts: Sequence[str]) -> Iterator[Model]:
    """The models that an argument of `bench` names, not loaded; a random one learns `texts`' vocabulary."""
    if argument.startswith("random"):
        match = RANDOM.fullmatch(argument)
        layers, width = map(int, match.groups()) if match else (0, 0)
        if not layers or not width or width % _HEAD_SIZE:
            raise SettingsError(
                f"{argument}: write random:LAYERSxWIDTH, with a width that {_HEAD_SIZE} divides, such as "
                "random:12x768"
            )
        yield Model(argument, partial(_random_bert, layers, width, texts))
        return
    record, folder = read_run(argument)
    yield Model(f"{Path(argument).name}, student", partial(read_model, folder))
    settings = build_settings(TrainSettings, record.settings)
    if not settings.distill.alone:
        teacher = download_input(settings.teacher)
        depth = encoder_depth(teacher, settings.model, settings.scratch)
        yield Model(f"{Path(teacher).name}, {depth} layers", partial(_teacher, teacher, settings, folder))


def memory_in_use(model: Model, texts: Sequence[str], *, precision: Precision = "fp32") -> float | None:
    """`Timing.at_work`, measured in a process of its own on the processor; None where it cannot be."""
    if not _RESET_PEAK.exists():
        return None
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_peak_memory, model.load, list(texts), precision).result()
        except BrokenProcessPool:
            return None  # killed, for example because memory ran out


def timings_table(timings: Sequence[Timing]) -> Table:
    """A row for each model and number of threads."""
    columns: dict[str, Callable[[Timing], str]] = {
        "model": lambda t: t.name,
        "precision": lambda t: t.precision,
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
        "promised": lambda t: "" if t.promised is None else f"{t.promised:.2f}",
        "tokenising": lambda t: f"{t.shares['tokenise']:.0%}",
        "pooling": lambda t: f"{t.shares['pool']:.0%}",
    }
    if all(timing.precision == "fp32" for timing in timings):
        del columns["precision"]
    rows = tuple(tuple(show(timing) for show in columns.values()) for timing in timings)
    return Table(tuple(columns), rows, words=1, caption=CAPTION)


def speed_figure(timings: Sequence[Timing]) -> FigureData[Panel]:
    """Titles/s over layers, relative to the deepest model, beside what the number of layers promises."""
    lines, several = [], len({t.precision for t in timings}) > 1
    for (count, numbers), own in grouped(timings, lambda t: (t.threads, t.precision)).items():
        label = f"{count} thread{'s' if count > 1 else ''}" + (f", {numbers}" if several else "")
        x, y = zip(*sorted((float(t.layers), t.reached) for t in own), strict=True)
        lines.append(Line(label, x, y))
    deepest = max(t.layers for t in timings)
    depths = tuple(float(depth) for depth in range(max(1, min(t.layers for t in timings)), deepest + 1))
    promised = tuple(deepest / depth for depth in depths)
    if depths:
        lines.append(Line("promised by the layers", depths, promised, look="reference"))
    panel = Panel("", "layers", "titles/s relative to the deepest model", tuple(lines))
    best = max(timings, key=lambda t: t.reached)
    alt = f"{best.name} is {best.reached:.1f} times as fast as the deepest model"
    alt += f", {best.promised:.1f} promised" if best.promised else ""
    caption = "With tokenising; median over rounds in which all models took turns."
    return FigureData(FIGURE, (panel,), caption, alt=alt, whole_x=True)


def write_page(timings: Sequence[Timing], out: Path, facts: Mapping[str, Any]) -> None:
    """Write bench.md and its figure; `facts` as in bench.json."""
    figure = speed_figure(timings)
    path = write_figure(figure, out)[0]
    texts = f"{facts['titles']:,}, {facts['input']}, {facts['tokens_per_title']:.1f} tokens on average"
    rounds = f"{facts['rounds']}, all models in turn, after one that is not counted"
    made = {name: joined(facts[name]) for name in ("hardware", "versions")}
    picture = Picture(path.name, draw_svg(figure), figure.alt, figure.caption)
    rows = {"texts": texts, "rounds": rounds, **made}
    section = Section("Measured", (timings_table(timings), picture, rows))
    write_text(out / "bench.md", Page("Speed", "Tokenising included.", (section,)).markdown())


def _run_round(subject: _Subject, texts: Sequence[str], alone: int, *, count: bool) -> None:
    """Time all titles and `alone` single ones; tokeniser and pooling alone, the rest is the encoder's."""
    predictor = subject.predictor
    whole = _seconds(_read, predictor, texts)
    single = [_seconds(_read, predictor, [text]) for text in texts[:alone]]
    if not count:
        return
    subject.seconds.append(whole)
    subject.single.extend(single)
    parts = _parts(predictor, texts)
    parts["encode"] = max(0.0, whole - sum(parts.values()))
    for name, seconds in parts.items():
        subject.shares[name].append(seconds / whole)


def _parts(predictor: Predictor, texts: Sequence[str]) -> dict[str, float]:
    """Seconds of the tokeniser and of the pooling alone; a linear model has no pooling."""
    if isinstance(predictor, LinearPredictor):
        return {"tokenise": _seconds(features_of, predictor.model.vectorizers, texts), "pool": 0.0}
    tokens = sum(map(len, _token_ids(predictor, texts)))
    states = torch.zeros(max(1, tokens // 16), 16, predictor.width, device=predictor.device)
    mask = torch.ones(states.shape[:2], dtype=torch.int64, device=predictor.device)
    tokenising = _seconds(_token_ids, predictor, texts)
    with torch.inference_mode():
        pooling = _seconds(lambda: predictor.top.pooling(states, mask).cpu())
    return {"tokenise": tokenising, "pool": pooling}


def _timings(subjects: Sequence[_Subject], *, titles: int, threads: int) -> Iterator[Timing]:
    """What the rounds give; the reference is the deepest model in the first precision."""
    first = subjects[0].predictor.precision
    base = max((s for s in subjects if s.predictor.precision == first), key=lambda s: _size(s.predictor))
    deepest = _size(base.predictor)[0]
    for subject in subjects:
        predictor = subject.predictor
        layers, parameters, size = _size(predictor)
        rate, slowest, fastest = np.quantile(np.divide(titles, subject.seconds), [0.5, 0, 1]).tolist()
        p50, p95, p99 = (1000 * np.percentile(subject.single, [50, 95, 99])).tolist()
        shares = {part: statistics.median(shares) for part, shares in subject.shares.items()}
        reached = float(np.median(np.divide(base.seconds, subject.seconds)))
        model = (subject.name, layers, predictor.width, parameters, size / 1e6, threads)
        ratios = (shares, deepest / layers if layers else None, reached, subject.at_work, predictor.precision)
        yield Timing(*model, rate, slowest, fastest, p50, p95, p99, *ratios)


def _read(predictor: Predictor, texts: Sequence[str]) -> object:
    """What a model is for: embeddings, or a linear model's topics."""
    return (predictor.predict if isinstance(predictor, LinearPredictor) else predictor.embed)(texts)


def _seconds(work: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def _size(predictor: Predictor) -> tuple[int, int, int]:
    """Layers, and number and bytes of the weights."""
    if isinstance(predictor, LinearPredictor):
        return 0, predictor.model.parameters, 4 * predictor.model.parameters
    weights = [weight for module in (predictor.encoder, predictor.top) for weight in module.parameters()]
    parameters = sum(weight.numel() for weight in weights)
    return len(predictor.encoder.layers), parameters, sum(weight.nbytes for weight in weights)


def _token_ids(predictor: Predictor, texts: Sequence[str]) -> list[list[int]]:
    return list(predictor.tokenizer.encode(texts, max_tokens=predictor.max_tokens))


def _read_titles(source: str | None, count: int) -> list[str]:
    """The first titles of a file, or invented ones."""
    if source is None:
        generator = np.random.default_rng(0)
        words = np.array(invent_words(generator, 20_000))
        lengths = generator.integers(4, 18, size=count, endpoint=True)
        return [" ".join(words[generator.integers(len(words), size=n)]) for n in lengths.tolist()]
    titles = list(islice((row.text for row in open_texts(source).rows if isinstance(row, Row)), count))
    if not titles:
        raise SettingsError(f"--input {source}: contains no text")
    return titles


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """`count` threads for PyTorch; the tokeniser uses all cores, or one."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with environment({"TOKENIZERS_PARALLELISM": "true" if count > 1 else "false"}, over=True):
            yield
    finally:
        torch.set_num_threads(before)


def _teacher(name: str, settings: TrainSettings, run: Path) -> Student:
    """The teacher's encoder as it was before the run, which is as fast as after it."""
    student = Student.read(run)
    tokenizer, most = student.tokenizer, student.max_tokens
    sizes: Any = {"vocabulary": tokenizer.vocabulary, "pad_id": tokenizer.pad_id, "max_tokens": most}
    encoder = load_encoder(name, model=settings.model, scratch=settings.scratch, **sizes)
    return _untrained(encoder, tokenizer, most)


def _random_bert(layers: int, width: int, texts: Sequence[str]) -> Student:
    tokenizer = learn_tokenizer(lambda: iter(texts), vocabulary=_VOCABULARY)
    scratch = ScratchSettings(layers=layers, hidden=width, heads=width // _HEAD_SIZE, feed_forward=4 * width)
    encoder = load_encoder(
        "scratch", model=ModelSettings(), scratch=scratch, vocabulary=_VOCABULARY, pad_id=tokenizer.pad_id
    )
    return _untrained(encoder, tokenizer, max_tokens=30)


def _untrained(encoder: Encoder, tokenizer: TitleTokenizer, max_tokens: int) -> Student:
    top = Top(encoder.hidden_size, query_size=256, topics=2)
    return Student(encoder, top, tokenizer, "topics", ("0", "1"), max_tokens)


def _peak_memory(
    load: Callable[[], Student | LinearModel], texts: Sequence[str], precision: Precision
) -> float:
    torch.set_num_threads(1)
    small = _random_bert(1, 64, texts)  # loads the libraries before anything is measured
    Predictor(small, device="cpu", precision=precision).embed(texts[:100])
    _RESET_PEAK.write_text("5")
    before = _status_kilobytes("VmRSS")
    _read(predictor_of(load(), device="cpu", precision=precision), texts)
    return (_status_kilobytes("VmHWM") - before) * 1024 / 1e6


def _status_kilobytes(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"^{field}:\s+(\d+)", status, re.MULTILINE)[1])  # type: ignore[index]
