from __future__ import annotations

import struct
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from newsbert_ray.reporting import drawing
from newsbert_ray.reporting.drawing import write_figure
from newsbert_ray.reporting.figures import FigureData, Line, Panel


def _figure(*, panels: int = 2, lines: int = 3) -> FigureData:
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
    teacher = Line("teacher (mean)", (0.0, 0.2), (79.0, 79.0), (None, None), (9, 9), reference=True)
    x_label = "share of the teacher's gradient, β" if panels < 3 else "epoch"
    panel = Panel("N = 1", x_label, "test accuracy (%)", (*drawn, teacher))
    return FigureData("fig", (panel,) * panels, "Data: synthetic, 1,800 train titles. " * 4)


def test_png_and_svg_are_whole(tmp_path: Path) -> None:
    """A picture cut short is found when the paper is printed."""
    png, svg = write_figure(_figure(), tmp_path / "new")
    width, height = struct.unpack(">II", png.read_bytes()[16:24])
    assert width == pytest.approx(6.3 * 200, abs=1)
    assert height > 400
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["fig.png", "fig.svg"]


def test_same_data_give_the_same_bytes(tmp_path: Path) -> None:
    """A figure that changes with the day cannot be checked in or compared."""
    first = [path.read_bytes() for path in write_figure(_figure(), tmp_path / "a")]
    assert [path.read_bytes() for path in write_figure(_figure(), tmp_path / "b")] == first


@pytest.mark.parametrize(("panels", "lines"), [(1, 1), (1, 8), (2, 3), (3, 7), (4, 8)])
def test_nothing_overlaps_or_leaves_the_page(
    panels: int, lines: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A legend over the axis labels, or a caption cut off at the edge, is seen first by a reviewer."""
    kept: list[Figure] = []
    draw = drawing._draw

    def keep(figure: FigureData) -> Figure:
        kept.append(draw(figure))
        return kept[-1]

    monkeypatch.setattr(drawing, "_draw", keep)
    write_figure(_figure(panels=panels, lines=lines), tmp_path)
    (figure,) = kept
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    figure.draw(renderer)
    page = figure.bbox
    caption = figure.texts[0].get_window_extent(renderer)
    legend = figure.legends[0].get_window_extent(renderer)
    axes = [box for axis in figure.axes if axis.get_visible() and (box := axis.get_tightbbox(renderer))]
    assert len(axes) == panels
    for box in (caption, legend, *axes):
        assert box.x0 >= page.x0 - 1
        assert box.x1 <= page.x1 + 1
        assert box.y0 >= page.y0 - 1
        assert box.y1 <= page.y1 + 1
    assert caption.y1 <= legend.y0 + 1
    assert legend.y1 <= min(box.y0 for box in axes) + 1
    texts = [figure.texts[0], *figure.legends[0].get_texts()]
    texts += [label for axis in figure.axes for label in (*axis.get_xticklabels(), axis.xaxis.label)]
    assert min(float(text.get_fontsize()) for text in texts) >= 8


def test_missing_spread_draws_no_bar(tmp_path: Path) -> None:
    """Points of one seed among points of three must not get a bar of length nothing."""
    write_figure(_figure(lines=1), tmp_path)
    assert "nan" not in (tmp_path / "fig.svg").read_text().lower().replace("dominant", "")
