"""FigureData -> PNG and SVG, in colours everybody can tell apart. Loads matplotlib only to draw."""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from newsbert_ray.record import write_text
from newsbert_ray.reporting.marks import draw_panel, legend_of
from newsbert_ray.reporting.panels import AnyPanel, Bars, FigureData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "svg.hashsalt": "newsbert_ray",
}
_WIDTH, _SINGLE_WIDTH, _PANEL_HEIGHT, _LINE_HEIGHT = 6.3, 4.0, 2.4, 0.16
"""Inches: the text width of a page, the width of a lone panel, a row of panels, a line of 8 pt text."""
_BAR_HEIGHT, _BARS_HEIGHT = 0.24, 0.65
"""Inches: a lying bar, and what stands around the bars of a panel."""
_LETTERS = 17.5
"""Letters of 8 pt text in an inch."""


def write_figure(figure: FigureData[AnyPanel], folder: Path) -> list[Path]:
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


def draw_svg(figure: FigureData[AnyPanel]) -> str:
    """`figure` as SVG without its caption, for a page that sets captions itself."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        svg = io.StringIO()
        _draw(figure, captioned=False).savefig(svg, format="svg", metadata={"Date": None})
    return svg.getvalue()


def figure_paths(name: str, folder: Path) -> list[Path]:
    """The files of a figure: PNG, SVG."""
    return [folder / f"{name}.png", folder / f"{name}.svg"]


def _draw(figure: FigureData[AnyPanel], *, captioned: bool = True) -> Figure:
    """The panels side by side, in rows, one legend for all below them, then the caption."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    labels = legend_of(figure)
    across = 1 if isinstance(figure.panels[0], Bars) else min(len(figure.panels), figure.across)
    rows = -(-len(figure.panels) // across)
    width = _WIDTH if across > 1 or figure.wide else _SINGLE_WIDTH
    caption = textwrap.fill(figure.caption, int(_LETTERS * width)) if captioned else ""
    legend_columns = _legend_columns(labels, width)
    caption_height = _LINE_HEIGHT * (caption.count("\n") + 1) + 0.08 if caption else 0.0
    below = caption_height + (_LINE_HEIGHT * -(-len(labels) // legend_columns) + 0.17 if labels else 0.0)
    heights = [_height(figure, row * across) for row in range(rows)]
    height = sum(heights) + below
    layout = ConstrainedLayoutEngine(rect=(0, below / height, 1, 1 - below / height), w_pad=0.06)
    drawn = Figure(figsize=(width, height), layout=layout)
    grid = drawn.subplots(rows, across, squeeze=False, sharey=figure.share_y, height_ratios=heights)
    axes = list(grid.flat)
    handles: dict[str, Any] = {}
    for index, (panel, axis) in enumerate(zip(figure.panels, axes, strict=False)):
        draw_panel(panel, axis, labels, handles, error_bars=figure.error_bars)
        _share(figure, axis, first=index % across == 0)
    for axis in axes[len(figure.panels) :]:
        axis.set_visible(False)
    if labels:
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
    if caption:
        drawn.text(0.01, 0.05 / height, caption, ha="left", va="bottom", color="#333333")
    return drawn


def _height(figure: FigureData[AnyPanel], index: int) -> float:
    panel = figure.panels[index]
    return _BARS_HEIGHT + _BAR_HEIGHT * len(panel.bars) if isinstance(panel, Bars) else _PANEL_HEIGHT


def _share(figure: FigureData[AnyPanel], axis: Axes, *, first: bool) -> None:
    """Whole numbers on x or y; y's numbers and name on a row's first panel alone, where all have them."""
    from matplotlib.ticker import MaxNLocator

    if figure.whole_x:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if figure.whole_y:
        axis.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if figure.share_y and not first:
        axis.set_ylabel("")
        axis.tick_params(axis="y", labelleft=False)


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """All in one row where they fit, otherwise as many columns as the longest label leaves room for."""
    letters = _LETTERS * width
    handle = 12
    if sum(len(label) + handle for label in labels) <= letters:
        return max(1, len(labels))
    return max(1, int(letters / (max(map(len, labels)) + handle)))
