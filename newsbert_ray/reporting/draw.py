"""FigureData -> PNG and SVG, in colours for colour-blind readers too. Imports matplotlib to draw only."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from newsbert_ray.files import write_bytes, write_text
from newsbert_ray.reporting.figures import AnyPanel, Bars, DotLook, FigureData, Line, NothingToDraw, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SMALL = ("font.size", "axes.labelsize", "axes.titlesize", "legend.fontsize", "xtick.labelsize")
_STYLE: dict[Any, Any] = {
    **dict.fromkeys((*_SMALL, "ytick.labelsize"), 8),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "svg.hashsalt": "newsbert_ray",
}
_WIDTH, _SINGLE_WIDTH, _PANEL_HEIGHT, _LINE_HEIGHT = 6.3, 4.0, 2.4, 0.16
"""Inches: the text width of a page, the width of a lone panel, a row of panels, a line of 8 pt text."""
_BAR_HEIGHT, _BARS_HEIGHT = 0.24, 0.65
"""Inches: a horizontal bar, and the space around the bars of a panel."""
_LETTERS = 17.5
"""Letters of 8 pt text in an inch."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
"""Okabe and Ito's colours, strongest on white first."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_STYLES = ("-", "--", "-.", ":")
_TICK_LETTERS = 30
"""Letters that fit below an axis of a third of the page's width."""
_LABEL_LETTERS = 24
"""A longer dotted name is wider than a third of the page."""
_GREY, _DARK = "#8A8A8A", "#555555"
_RUN = {"color": "#AAAAAA", "linewidth": 0.6, "alpha": 0.8}
_CROSS = {"marker": "x", "markersize": 4, "markevery": [-1], "markeredgewidth": 0.9}
_MEANS = {
    **{"color": "#D55E00", "linewidth": 1.3, "capsize": 3, "elinewidth": 1.3, "zorder": 8},
    **{"marker": "_", "markersize": 9, "markeredgewidth": 1.6},
}
_LOOKS: Mapping[str, dict[str, Any]] = {
    "mean": {"markersize": 4, "linewidth": 1.3, "capsize": 2, "elinewidth": 0.8},
    "reference": {"color": _DARK, "linewidth": 0.9, "dashes": (6, 3)},
    "run": _RUN,
    "cross": {**_RUN, **_CROSS, "markeredgecolor": "#777777"},
    "plain": {"color": COLOURS[0], "linewidth": 1.4},
    "trend": {**_MEANS, "linestyle": "-"},
    "means": {**_MEANS, "linestyle": "none"},
    "finished": {"marker": "o", "color": "#56B4E9", "markersize": 4, "markeredgewidth": 0, "alpha": 0.85},
    "stopped": {"marker": "o", "color": _GREY, "markersize": 3.5, "markerfacecolor": "none"},
    "below": {"marker": "v", "color": _GREY, "markersize": 4, "markerfacecolor": "none"},
    "front": {"marker": "D", "color": "#0072B2", "markersize": 5, "linewidth": 1.0},
    "best": {"marker": "*", "color": "#000000", "markersize": 9, "markeredgewidth": 0},
}


def write_figure(figure: FigureData[AnyPanel], folder: Path) -> list[Path]:
    """Draw `figure` as folder/NAME.png (200 dpi) and NAME.svg; the same data give the same bytes."""
    import matplotlib

    png, paths = io.BytesIO(), figure_paths(figure.name, folder)
    with matplotlib.rc_context(_STYLE):
        _draw(figure).savefig(png, format="png", dpi=200, metadata={"Software": None})
    write_bytes(paths[0], png.getvalue())
    write_text(paths[1], draw_svg(figure, captioned=True))
    return paths


def draw_svg(figure: FigureData[AnyPanel], *, captioned: bool = False) -> str:
    """`figure` as SVG; without its caption for a page that shows the caption as text."""
    import matplotlib

    svg = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        _draw(figure, captioned=captioned).savefig(svg, format="svg", metadata={"Date": None})
    return svg.getvalue()


def without_single_points(figure: FigureData[AnyPanel]) -> FigureData[AnyPanel]:
    """`figure` without panels that would show nothing but a dot or a bar."""

    def positions(panel: AnyPanel) -> int:
        if isinstance(panel, Bars):
            return len(panel.bars)
        dots = sum(len(line.x) for line in panel.lines if line.look in get_args(DotLook))
        return dots or len({x for line in panel.lines for x in line.x})

    panels = tuple(panel for panel in figure.panels if positions(panel) > 1)
    if not panels:
        raise NothingToDraw(f"{figure.name.replace('_', ' ')} is left out: it would show a single point")
    return replace(figure, panels=panels)


def figure_paths(name: str, folder: Path) -> list[Path]:
    return [folder / f"{name}.png", folder / f"{name}.svg"]


def _draw(figure: FigureData[AnyPanel], *, captioned: bool = True) -> Figure:
    """The panels side by side, in rows, one legend for all below them, then the caption."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    labels = _legend_labels(figure)
    across = 1 if isinstance(figure.panels[0], Bars) else min(len(figure.panels), figure.across)
    width = _WIDTH if across > 1 or figure.wide else _SINGLE_WIDTH
    caption = textwrap.fill(figure.caption, int(_LETTERS * width)) if captioned else ""
    legend_columns = _legend_columns(labels, width)
    caption_height = _LINE_HEIGHT * (caption.count("\n") + 1) + 0.08 if caption else 0.0
    below = caption_height + (_LINE_HEIGHT * -(-len(labels) // legend_columns) + 0.17 if labels else 0.0)
    heights = [
        _BARS_HEIGHT + _BAR_HEIGHT * len(panel.bars) if isinstance(panel, Bars) else _PANEL_HEIGHT
        for panel in figure.panels[::across]
    ]
    height = sum(heights) + below
    layout = ConstrainedLayoutEngine(rect=(0, below / height, 1, 1 - below / height), w_pad=0.06)
    drawn = Figure(figsize=(width, height), layout=layout)
    grid = drawn.subplots(len(heights), across, squeeze=False, sharey=figure.share_y, height_ratios=heights)
    axes = list(grid.flat)
    handles: dict[str, Any] = {}
    for index, (panel, axis) in enumerate(zip(figure.panels, axes, strict=False)):
        if isinstance(panel, Bars):
            _draw_bars(panel, axis, handles)
        else:
            _draw_lines(panel, axis, labels, handles)
            axis.set_ylabel(panel.y_label)
            axis.margins(x=0.05, y=0.1)
            _set_range(panel, axis)
        axis.set_title(panel.title)
        head, dot, tail = panel.x_label.rpartition(".")
        long = dot and len(panel.x_label) > _LABEL_LETTERS
        axis.set_xlabel(f"{head}.\n{tail}" if long else panel.x_label)
        _set_ticks(figure, axis, first=index % across == 0)
    for axis in axes[len(figure.panels) :]:
        axis.set_visible(False)
    if labels:
        style: Any = {"frameon": False, "handlelength": 3.2, "borderpad": 0, "ncols": legend_columns}
        anchor = (0.5, caption_height / height)
        drawn.legend([handles[n] for n in labels], labels, loc="lower center", bbox_to_anchor=anchor, **style)
    if caption:
        drawn.text(0.01, 0.05 / height, caption, ha="left", va="bottom", color="#333333")
    return drawn


def _set_ticks(figure: FigureData[AnyPanel], axis: Axes, *, first: bool) -> None:
    """Whole numbers where asked for; with a shared y, numbers and label in the first panel of a row only."""
    from matplotlib.ticker import MaxNLocator

    for whole, line in ((figure.whole_x, axis.xaxis), (figure.whole_y, axis.yaxis)):
        if whole:
            line.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if figure.share_y and not first:
        axis.set_ylabel("")
        axis.tick_params(axis="y", labelleft=False)


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """All labels in one row where they fit, otherwise as many columns as the longest label allows."""
    letters, widths = _LETTERS * width, [len(label) + 12 for label in labels]
    fitting = len(labels) if sum(widths) <= letters else int(letters / max(widths))
    return max(1, fitting)


def _legend_labels(figure: FigureData[AnyPanel]) -> list[str]:
    labels: list[str] = []
    for panel in figure.panels:
        if isinstance(panel, Bars):
            labels += panel.labels
        else:
            labels += [line.label for line in (*panel.lines, panel.trend) if line]
    return [label for label in dict.fromkeys(labels) if label]


def _draw_lines(panel: Panel, axis: Axes, labels: Sequence[str], handles: dict[str, Any]) -> None:
    """Draw the lines and dots; puts the legend's handle of each label into `handles`."""
    from matplotlib.patheffects import withStroke

    if panel.log_x:
        axis.set_xscale("log")
    means = [line for line in panel.lines if line.look == "mean"]
    ends = [x for line in panel.lines if line.look in ("mean", "reference") for x in (line.x[0], line.x[-1])]
    ordered = sorted(panel.lines, key=lambda line: line.look not in ("run", "cross"))
    for order, line in enumerate((*ordered, panel.trend) if panel.trend else ordered):
        style, x = _style(line, order), line.x
        if line.look in ("reference", "run", "cross", "plain"):
            (handles[line.label],) = axis.plot(x, line.y, **style)
            continue
        if line.look == "mean":
            index = labels.index(line.label)
            style |= {**_numbered(index), "linestyle": _STYLES[index % len(_STYLES)]}
            # Shifted slightly, so that the error bars of two lines at one x do not hide each other.
            side = means.index(line) - (len(means) - 1) / 2
            share = 0.008 * side if line.sd else 0.0
            if panel.log_x:
                x = tuple(at * (max(ends) / min(ends)) ** share for at in x)
            else:
                x = tuple(at + share * (max(ends) - min(ends)) for at in x)
        bars = [math.nan if sd is None else sd for sd in line.sd] if any(line.sd) else None
        handles[line.label] = axis.errorbar(x, line.y, yerr=bars, **style)
        halo: dict[str, Any] = {"path_effects": [withStroke(linewidth=2.5, foreground="white")], "zorder": 9}
        note_style = {"textcoords": "offset points", "color": _DARK, "fontsize": "small", **halo}
        for at, y, note in zip(x, line.y, line.notes, strict=bool(line.notes)):
            axis.annotate(note, (at, y), (5, 4), **note_style)


def _style(line: Line, order: int) -> dict[str, Any]:
    style = dict(_LOOKS[line.look])
    if line.look == "run" and len(line.x) == 1:
        style |= {"marker": ".", "markersize": 3}
    if line.look in get_args(DotLook):
        style |= {"elinewidth": 0.6, "capsize": 0, "zorder": 9 if line.look == "best" else 3 + order}
        style["linestyle"] = "-" if line.stairs else "none"
    if line.stairs:
        style["drawstyle"] = {"before": "steps-pre", "after": "steps-post"}[line.stairs]
    if line.colour is not None:
        style |= {**_numbered(line.colour), "markersize": 3, "alpha": 0.6}
    return style


def _numbered(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}


def _set_range(panel: Panel, axis: Axes) -> None:
    if panel.x_range and panel.log_x:
        _set_log_range(*panel.x_range, axis)
    elif panel.x_range:
        low, high = panel.x_range
        axis.set_xlim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    if panel.floor is not None:
        top = axis.get_ylim()[1]
        axis.set_ylim(panel.floor - 0.04 * (top - panel.floor), top)
    if panel.ticks:
        room = _TICK_LETTERS / len(panel.ticks)
        crowded = any((len(left) + len(right)) / 2 + 1 > room for left, right in pairwise(panel.ticks))
        slant: dict[str, Any] = {"rotation": 50, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
        axis.set_xticks(range(len(panel.ticks)), panel.ticks, **slant)
        axis.set_xlim(-0.5, len(panel.ticks) - 0.5)
        axis.grid(False, axis="x")


def _set_log_range(low: float, high: float, axis: Axes) -> None:
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter, StrMethodFormatter

    span = high / low
    margin = span**0.04
    axis.set_xlim(low / margin, high * margin)
    steps = (1.0, 2.0, 5.0) if span <= 12 else (1.0, 3.0) if span <= 30 else (1.0,)
    axis.xaxis.set_major_locator(LogLocator(subs=steps))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}") if span <= 30 else LogFormatterSciNotation())
    axis.xaxis.set_minor_formatter(NullFormatter())


def _draw_bars(panel: Bars, axis: Axes, handles: dict[str, Any]) -> None:
    rows, (value_label, interval_label, chance_label) = range(len(panel.bars)), panel.labels
    drawn = axis.barh(rows, [bar.value for bar in panel.bars], height=0.6, color="#56B4E9")
    if value_label:
        handles[value_label] = drawn
    else:
        axis.bar_label(drawn, [f"{bar.value:.3g}" for bar in panel.bars], padding=3)
        axis.margins(x=0.1)
    interval: dict[str, Any] = {"color": "#000000", "linewidth": 1.2, "marker": "|", "markersize": 6}
    for row, bar in zip(rows, panel.bars, strict=True):
        if bar.low is not None and bar.high is not None:
            (handles[interval_label],) = axis.plot((bar.low, bar.high), (row, row), **interval)
        if bar.chance is not None:
            ends = ((bar.chance, bar.chance), (row - 0.38, row + 0.38))
            (handles[chance_label],) = axis.plot(*ends, color="#D55E00", linewidth=1.6)
    axis.set_yticks(rows, [bar.name for bar in panel.bars])
    axis.set_ylim(len(panel.bars) - 0.4, -0.6)
    axis.set_xlim(left=0.0)
    axis.grid(False, axis="y")
