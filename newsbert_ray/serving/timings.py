"""What `bench` measured -> a table, a page and a figure. Pure but for the writing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from newsbert_ray.record import write_text
from newsbert_ray.reporting.drawing import draw_svg, write_figure
from newsbert_ray.reporting.page import Facts, Page, Picture, Section, Table, to_markdown
from newsbert_ray.reporting.panels import FigureData, Line, Panel
from newsbert_ray.reporting.provenance import joined

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
    lines.append(Line("what layers promise", x, y, (None,) * len(x), (1,) * len(x), reference=True))
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
    write_text(out / "bench.md", to_markdown(page))
