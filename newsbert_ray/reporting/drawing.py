"""FigureData -> PNG and SVG, in colours everybody can tell apart. Loads matplotlib only to draw."""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from newsbert_ray.record import write_text
from newsbert_ray.reporting.figures import FigureData, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
"""Okabe and Ito's colours, told apart with every common colour blindness, strongest on white first."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_STYLES = ("-", "--", "-.", ":")
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "svg.hashsalt": "newsbert_ray",
}
_WIDTH, _SINGLE_WIDTH, _PANEL_HEIGHT, _LINE_HEIGHT = 6.3, 4.0, 2.4, 0.16
"""Inches: the text width of a page, the width of a lone panel, a row of panels, a line of 8 pt text."""
_LETTERS = 17.5
"""Letters of 8 pt text in an inch."""


def write_figure(figure: FigureData, folder: Path) -> list[Path]:
    """Draw `figure` as folder/NAME.png (200 dpi) and NAME.svg; the same data give the same bytes."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        drawn = _draw(figure)
        png, svg = io.BytesIO(), io.StringIO()
        drawn.savefig(png, format="png", dpi=200, metadata={"Software": None})
        drawn.savefig(svg, format="svg", metadata={"Date": None})
    paths = figure_paths(figure.name, folder)
    folder.mkdir(parents=True, exist_ok=True)
    part = paths[0].with_suffix(".png.part")
    part.write_bytes(png.getvalue())
    os.replace(part, paths[0])
    write_text(paths[1], svg.getvalue())
    return paths


def figure_paths(name: str, folder: Path) -> list[Path]:
    """The files of a figure: PNG, SVG."""
    return [folder / f"{name}.png", folder / f"{name}.svg"]


def _draw(figure: FigureData) -> Figure:
    """The panels side by side, three a row, one legend for all below them, then the caption."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    labels = list(dict.fromkeys(line.label for panel in figure.panels for line in panel.lines))
    across = min(len(figure.panels), 3)
    rows = -(-len(figure.panels) // across)
    width = _WIDTH if across > 1 else _SINGLE_WIDTH
    caption = textwrap.fill(figure.caption, int(_LETTERS * width))
    legend_columns = _legend_columns(labels, width)
    caption_height = _LINE_HEIGHT * (caption.count("\n") + 1) + 0.08
    below = caption_height + _LINE_HEIGHT * -(-len(labels) // legend_columns) + 0.17
    height = rows * _PANEL_HEIGHT + below
    layout = ConstrainedLayoutEngine(rect=(0, below / height, 1, 1 - below / height), w_pad=0.06)
    drawn = Figure(figsize=(width, height), layout=layout)
    axes = list(drawn.subplots(rows, across, squeeze=False, sharey=figure.whole_x).flat)
    handles: dict[str, Any] = {}
    for panel, axis in zip(figure.panels, axes, strict=False):
        _draw_panel(panel, axis, labels, handles, error_bars=figure.error_bars)
        if figure.whole_x:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.label_outer(remove_inner_ticks=False)
            axis.tick_params(axis="x", labelbottom=True)
    for axis in axes[len(figure.panels) :]:
        axis.set_visible(False)
    drawn.legend(
        [handles[label] for label in labels],
        labels,
        loc="lower center",
        bbox_to_anchor=(0.5, caption_height / height),
        ncols=legend_columns,
        frameon=False,
        handlelength=3.2,
        borderpad=0,
    )
    drawn.text(0.01, 0.05 / height, caption, ha="left", va="bottom", color="#333333")
    return drawn


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """All in one row where they fit, otherwise as many columns as the longest label leaves room for."""
    letters = _LETTERS * width
    handle = 12
    if sum(len(label) + handle for label in labels) <= letters:
        return len(labels)
    return max(1, int(letters / (max(map(len, labels)) + handle)))


def _draw_panel(
    panel: Panel, axis: Axes, labels: Sequence[str], handles: dict[str, Any], *, error_bars: bool
) -> None:
    drawn = [line for line in panel.lines if not line.reference]
    reach = max(line.x[-1] for line in panel.lines) - min(line.x[0] for line in panel.lines)
    for line in panel.lines:
        index = labels.index(line.label)
        if line.reference:
            (handles[line.label],) = axis.plot(line.x, line.y, color="#555555", linewidth=0.9, dashes=(6, 3))
            continue
        # A hair to the side, so that the error bars of two lines at one x do not hide each other.
        aside = 0.008 * reach * (drawn.index(line) - (len(drawn) - 1) / 2) if error_bars else 0.0
        handles[line.label] = axis.errorbar(
            [x + aside for x in line.x],
            line.y,
            yerr=[math.nan if sd is None else sd for sd in line.sd] if error_bars and any(line.sd) else None,
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            linestyle=_STYLES[index % len(_STYLES)],
            markersize=4,
            linewidth=1.3,
            capsize=2,
            elinewidth=0.8,
        )
    axis.set_title(panel.title)
    axis.set_xlabel(panel.x_label)
    axis.set_ylabel(panel.y_label)
    axis.margins(x=0.05, y=0.1)
