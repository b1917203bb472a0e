"""Records -> how much of the teacher's quality each student keeps, against its measured speed-up. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from newsbert_ray.record import RunRecord
from newsbert_ray.reporting.compared import (
    distinct,
    flat_settings,
    one_task,
    tuned_settings,
    varying_settings,
)
from newsbert_ray.reporting.figures import DEPTH, MAX_LINES, figure_caption
from newsbert_ray.reporting.names import NAMES
from newsbert_ray.reporting.panels import FigureData, Line, NothingToDraw, Panel
from newsbert_ray.reporting.sweeps import Sweep
from newsbert_ray.reporting.tables import number, summarise

QUALITY_FIGURE = "quality_kept"
"""What the figure's file is called."""
_LEFT_OUT = "quality kept over speed-up is left out"


def quality_figure(records: Sequence[RunRecord], *, chosen: bool = False) -> FigureData[Panel]:
    """The student's share of its teacher's test metric over its speed-up, a line for each method, a point for
    each depth: the curve that says what a gain in speed costs.

    The speed-up is that of titles/s which the run measured at its end, student and teacher in turn. Error
    bars are the standard deviation of the share over seeds.

    Args:
        chosen: the runs are a search's best at each depth, whatever else they differ in.
    Raises:
        NothingToDraw: no two depths with a teacher beside them and both speeds, or more varies than method,
            depth and learning rates.
        ValueError: runs of several tasks.
    """
    metric = one_task(records).primary
    paths = (f"test.student.{metric.name}", f"test.teacher.{metric.name}", "speed.times_teacher")
    whole = [r for r in distinct(records) if all(number(r, path) for path in paths)]
    more = set(varying_settings(whole)) - {"method", DEPTH} - set(tuned_settings(whole))
    if more and not chosen:
        raise NothingToDraw(f"{_LEFT_OUT}: {', '.join(sorted(more))} vary too")
    found: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for record in whole:
        student, teacher, speed = (number(record, path) or 0.0 for path in paths)
        flat = flat_settings(record)
        depths = found.setdefault(str(flat["method"]), {})
        depths.setdefault(int(flat[DEPTH]), []).append((speed, 100 * student / teacher))
    if max((len(depths) for depths in found.values()), default=0) < 2:
        raise NothingToDraw(f"{_LEFT_OUT}: it takes students of two depths, with their teachers' numbers")
    if len(found) > MAX_LINES:
        raise NothingToDraw(f"{_LEFT_OUT}: of {len(found)} methods {MAX_LINES} can be told apart")
    lines = tuple(
        _line(NAMES.get(name, name), depths, noted=not place)
        for place, (name, depths) in enumerate(found.items())
    )
    panel = Panel("", "titles/s, times the teacher's", f"test {metric.heading}, % of the teacher's", lines)
    order = sorted({depth for depths in found.values() for depth in depths}, reverse=True)
    caption = (
        f"{figure_caption(whole, [panel])} Along a line from left to right: students of "
        f"{', '.join(map(str, order))} layers" + (", the search's best on validation." if chosen else ".")
    )
    alt = ". ".join(
        f"{line.label} keeps "
        + ", ".join(f"{y:.1f} % at {x:.1f} times the speed" for x, y in zip(line.x, line.y, strict=True))
        for line in lines
    )
    return FigureData(QUALITY_FIGURE, (panel,), caption, alt=f"{alt}.")


def best_at_each_depth(sweep: Sweep) -> list[RunRecord]:
    """Records of the best finished point, by the sweep's first goal, of each method at each depth."""
    best: dict[tuple[str, int], list[RunRecord]] = {}
    for point in sweep.finished:
        records = point.records
        if records:
            flat = flat_settings(records[0])
            best.setdefault((str(flat["method"]), int(flat[DEPTH])), records)
    return [record for records in best.values() for record in records]


def _line(label: str, depths: dict[int, list[tuple[float, float]]], *, noted: bool) -> Line:
    """A point for each depth, the deepest first, which is the slowest; `noted`, with its depth beside it."""
    points = []
    for depth in sorted(depths, reverse=True):
        speeds, shares = zip(*depths[depth], strict=True)
        share = summarise(shares)
        points.append((summarise(speeds).mean, share.mean, share.sd, share.n))
    x, y, sd, n = zip(*points, strict=True)
    notes = [f"{depth} layer{'s' if depth > 1 else ''}" for depth in sorted(depths, reverse=True)]
    return Line(label, x, y, sd, n, notes=tuple(notes) if noted else ())
