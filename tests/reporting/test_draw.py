"""Figures as PNG and SVG: complete, reproducible, readable."""

from __future__ import annotations

import struct
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from newsbert_ray.reporting import draw as drawing
from newsbert_ray.reporting.draw import draw_svg, without_single_points, write_figure
from newsbert_ray.reporting.figures import (
    AnyPanel,
    Bar,
    Bars,
    FigureData,
    Line,
    NothingToDraw,
    Panel,
)


def _figure(*, panels: int = 2, lines: int = 3) -> FigureData[Panel]:
    drawn = tuple(
        Line(
            f"N = {i}, decay = cosine",
            (0.0, 0.1, 0.2),
            (70.0 + i, 71.0 + i, 70.5 + i),
            (0.4, None, 0.2),
            (3, 1, 2),
        )
        for i in range(1, lines + 1)
    )
    teacher = Line("teacher (mean)", (0.0, 0.2), (79.0, 79.0), (None, None), (9, 9), look="reference")
    x_label = "share of the teacher's gradient, β" if panels < 3 else "epoch"
    panel = Panel("N = 1", x_label, "test accuracy (%)", (*drawn, teacher))
    return FigureData("fig", (panel,) * panels, "Data: synthetic, 1,800 train titles. " * 4)


def test_png_and_svg_are_whole(tmp_path: Path) -> None:
    """Both files are complete pictures of the expected size, and the same each time, to be compared.

    A point of one seed among points of three gets no error bar.
    """
    png, svg = write_figure(_figure(), tmp_path / "new")
    width, height = struct.unpack(">II", png.read_bytes()[16:24])
    assert width == pytest.approx(6.3 * 200, abs=1)
    assert height > 400
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["fig.png", "fig.svg"]
    again = write_figure(_figure(), tmp_path / "again")
    assert [path.read_bytes() for path in again] == [png.read_bytes(), svg.read_bytes()]
    assert "nan" not in svg.read_text().lower().replace("dominant", "")


def _scatter(*, panels: int, ticks: tuple[str, ...] = (), stopped: bool = True) -> FigureData[Panel]:
    places = tuple(float(i % max(1, len(ticks))) if ticks else 10.0 ** (i - 5) for i in range(6))
    dots = [
        Line(
            "finished",
            places,
            (70.0, 71.0, 72.0, 73.0, 72.5, 71.0),
            (0.4, None, 1.0, 1, 1, 1),
            look="finished",
        ),
        Line("best", places[:1], (74.0,), (0.3,), look="best"),
    ]
    if stopped:
        dots.append(
            Line("stopped early, below the axis", places[1:3], (68.0, 68.0), (None, None), look="below")
        )
    trend = Line("mean", places[:3], (71.0, 72.0, 71.5), (0.5, None, 0.3), look="trend")
    panel = Panel(
        "", "distill.weights.news_embedding", "validation accuracy (%)", tuple(dots), trend, ticks, not ticks
    )
    return FigureData(
        "fig",
        (replace(panel, floor=68.0 if stopped else None),) * panels,
        "Each dot is a point, its bar ± sd. " * 7,
        share_y=True,
    )


def _bars(count: int, *, panels: int = 1, chance: float | None = 0.4) -> FigureData[Bars]:
    name = "distill.weights.news_embedding"
    bars = tuple(Bar(f"{name}_{i}", 0.5 / (i + 1), 0.1, 0.9, chance) for i in range(count))
    panel = Bars("a goal", "share", bars, ("importance", "interval", "chance" if chance else ""))
    return FigureData("fig", (panel,) * panels, "Each dot is a point, its bar ± sd. " * 7, wide=True)


CASES: dict[str, FigureData[AnyPanel]] = {
    "one line": _figure(panels=1, lines=1),
    "eight lines": _figure(panels=1, lines=8),
    "two panels": _figure(panels=2, lines=3),
    "three panels": _figure(panels=3, lines=7),
    "four panels": _figure(panels=4, lines=8),
    "dots on a log axis": _scatter(panels=1),
    "dots on four": _scatter(panels=4),
    "dots over words": _scatter(panels=3, ticks=("a-very-long-n…", "none", "cosine")),
    "dots over two words": _scatter(panels=2, ticks=("false", "true"), stopped=False),
    "one bar": _bars(1),
    "twelve bars": _bars(12),
    "bars of two goals": _bars(3, panels=2, chance=None),
}


def _drawn(figure: FigureData[AnyPanel]) -> tuple[Figure, RendererAgg]:
    """The figure as it goes into files, every text in its place."""
    with matplotlib.rc_context(drawing._STYLE):
        drawn = drawing._draw(figure)
        renderer = FigureCanvasAgg(drawn).get_renderer()  # type: ignore[no-untyped-call]
        drawn.draw(renderer)
    return drawn, renderer


@pytest.mark.parametrize("case", CASES)
def test_nothing_overlaps_or_leaves_the_page(case: str) -> None:
    """No text overlaps another or is cut off at the edge."""
    figure, renderer = _drawn(CASES[case])
    page = figure.bbox
    caption = figure.texts[0].get_window_extent(renderer)
    legend = figure.legends[0].get_window_extent(renderer)
    axes = [box for axis in figure.axes if axis.get_visible() and (box := axis.get_tightbbox(renderer))]
    assert len(axes) == len(CASES[case].panels)
    for box in (caption, legend, *axes):
        assert box.x0 >= page.x0 - 1
        assert box.x1 <= page.x1 + 1
        assert box.y0 >= page.y0 - 1
        assert box.y1 <= page.y1 + 1
    assert caption.y1 <= legend.y0 + 1
    assert legend.y1 <= min(box.y0 for box in axes) + 1
    for one, box in enumerate(axes):
        assert not any(_overlap(box, other) for other in axes[one + 1 :])
    texts = [figure.texts[0], *figure.legends[0].get_texts()]
    texts += [label for axis in figure.axes for label in (*axis.get_xticklabels(), axis.xaxis.label)]
    texts += [label for axis in figure.axes for label in (*axis.get_yticklabels(), axis.yaxis.label)]
    assert min(float(text.get_fontsize()) for text in texts) >= 8


def _overlap(one: Bbox, other: Bbox) -> bool:
    """Whether two panels run into each other by more than a pixel."""
    across = min(one.x1, other.x1) - max(one.x0, other.x0)
    down = min(one.y1, other.y1) - max(one.y0, other.y0)
    return bool(across > 1 and down > 1)


def _on_range(low: float, high: float, *, log: bool) -> Panel:
    dots = Line("finished", (low, high), (70.0, 71.0), (None, None), look="finished")
    return Panel("", "x", "validation accuracy (%)", (dots,), log_x=log, x_range=(low, high))


@pytest.mark.parametrize(
    "panels",
    [
        CASES["dots over words"].panels,
        CASES["dots over two words"].panels,
        (_on_range(1e-5, 1e-2, log=True), _on_range(1e-4, 5e-3, log=True), _on_range(0.5, 10, log=True)),
        (_on_range(1e-4, 1e-3, log=True), _on_range(2e-5, 6e-5, log=True), _on_range(8, 512, log=True)),
        (_on_range(0.0, 0.3, log=False), _on_range(1, 12, log=False), _on_range(1e-5, 9e-5, log=False)),
    ],
    ids=["words", "truths", "decades", "one decade", "plain"],
)
def test_tick_labels_do_not_overlap(panels: tuple[AnyPanel, ...]) -> None:
    """Three long names, or six rates, below one panel stay readable."""
    figure, renderer = _drawn(FigureData("fig", panels, "Words.", share_y=True))
    for axis in figure.axes:
        left, right = axis.get_xlim()
        labels = [tick for tick in axis.get_xticklabels() if left <= tick.get_position()[0] <= right]
        assert len([label for label in labels if label.get_text()]) > 1
        if labels[0].get_rotation():
            continue
        boxes = [label.get_window_extent(renderer) for label in labels]
        assert all(one.x1 < other.x0 for one, other in pairwise(boxes))


def test_svg_for_a_page_has_no_caption() -> None:
    """The page shows the caption as text; in the drawing it would appear twice."""
    figure = _figure(panels=1, lines=1)
    assert "Data: synthetic" not in draw_svg(figure)
    whole = ElementTree.fromstring(draw_svg(figure)).get("height", "").removesuffix("pt")
    longer = ElementTree.fromstring(draw_svg(replace(figure, caption="x " * 900))).get("height", "")
    assert float(whole) == float(longer.removesuffix("pt"))


def test_lines_on_a_logarithmic_axis_stay_where_they_were_measured() -> None:
    """Error bars of several lines are shifted a little; by a share of the decade, not of the largest x."""
    lines = tuple(Line(f"{i}", (1000.0, 40_000.0), (60.0, 70.0), (0.5, 0.5), (5, 5)) for i in range(7))
    figure = drawing._draw(FigureData("fig", (Panel("", "labels", "accuracy", lines, log_x=True),), ""))
    drawn = [np.asarray(line.get_xdata(), float) for line in figure.axes[0].lines]
    starts = [float(x[0]) for x in drawn if len(x) == 2]
    assert len(set(starts)) == 7
    assert 850 < min(starts) < max(starts) < 1150


def test_single_points_are_left_out() -> None:
    """A panel of one dot looks like a result and shows nothing."""

    def panel(*x: float) -> Panel:
        return Panel("", "x", "y", (Line("a", x, x), Line("b", (1.0,), (2.0,))))

    one, two = panel(1.0), panel(1.0, 2.0)
    assert without_single_points(FigureData("f", (one, two), "")).panels == (two,)
    with pytest.raises(NothingToDraw, match="the front is left out: it would show a single point"):
        without_single_points(FigureData("the_front", (one,), ""))
