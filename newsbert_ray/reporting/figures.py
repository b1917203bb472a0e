"""What a figure shows, pure and comparable, before anything is drawn: panels of lines, of dots, of bars."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from newsbert_ray.record import MAP, RunRecord
from newsbert_ray.reporting.records import (
    NAMES,
    data_name,
    distinct,
    flat_settings,
    one_task,
    teacher_name,
    tuned_settings,
    units_of,
    varying_settings,
)
from newsbert_ray.reporting.sweep_data import Sweep
from newsbert_ray.reporting.tables import number, summarise

Look = Literal["finished", "stopped", "below", "front", "best"]
"""How a dot is told from others: filled; hollow and grey; hollow and pointing down, for one that lies below
the axis; on a Pareto front; the one that was chosen."""


@dataclass(frozen=True)
class Line:
    """One line: at each x the mean y of n values, and their standard deviation if there are several."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    sd: tuple[float | None, ...]
    n: tuple[int, ...]
    reference: bool = False
    """A thin grey line for comparison, without markers or error bars."""
    notes: tuple[str, ...] = ()
    """What stands beside each point."""


@dataclass(frozen=True)
class Trace:
    """One run among many, thin and grey; one that was stopped early ends at a marker. Or, `main`, a panel's
    only line of single values."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    stopped: bool = False
    main: bool = False


@dataclass(frozen=True)
class Panel:
    """Lines on one pair of axes, over any traces."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    traces: tuple[Trace, ...] = ()


@dataclass(frozen=True)
class Dots:
    """Single points that look the same, each with its standard deviation if it has one."""

    label: str
    look: Look
    x: tuple[float, ...]
    y: tuple[float, ...]
    sd: tuple[float | None, ...]
    stairs: Literal["", "before", "after"] = ""
    """A line from dot to dot that steps at once (before) or at the next dot (after)."""
    colour: int | None = None
    """Which colour and mark of those that can be told apart; those of the look by default."""


@dataclass(frozen=True)
class Trend:
    """Means of dots that lie near each other, with their standard errors if there are several dots."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    error: tuple[float | None, ...]
    joined: bool = True
    """A line from mean to mean; not where x has no order."""


@dataclass(frozen=True)
class Scatter:
    """Dots on one pair of axes; `ticks` names the places 0, 1, 2, ... of x where it is not continuous."""

    title: str
    x_label: str
    y_label: str
    dots: tuple[Dots, ...]
    trend: Trend | None = None
    ticks: tuple[str, ...] = ()
    log_x: bool = False
    floor: float | None = None
    """Where y begins; dots that look `below` stand on it."""
    x_range: tuple[float, float] | None = None
    """The ends of what was searched."""


@dataclass(frozen=True)
class Bar:
    """A named bar; `low` and `high` are the ends of its interval, `chance` a mark for comparison."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    chance: float | None = None


@dataclass(frozen=True)
class Bars:
    """Bars that lie, the first on top."""

    title: str
    x_label: str
    bars: tuple[Bar, ...]
    value_label: str = ""
    interval_label: str = ""
    chance_label: str = ""
    """What the legend calls them; nothing for what is not there."""


AnyPanel = Panel | Scatter | Bars
P_co = TypeVar("P_co", bound=AnyPanel, covariant=True)


@dataclass(frozen=True)
class FigureData(Generic[P_co]):
    """All that a figure shows. `alt` says in words what is to be seen in it."""

    name: str
    panels: tuple[P_co, ...]
    caption: str
    error_bars: bool = True
    whole_x: bool = False
    """Ticks of x at whole numbers only."""
    whole_y: bool = False
    share_y: bool = False
    """One scale of y for all panels."""
    wide: bool = False
    """A lone panel as wide as the page's text."""
    across: int = 3
    """Panels in a row, at most."""
    alt: str = ""


class NothingToDraw(ValueError):
    """Records that do not make this figure; the text says why."""


BETA, DEPTH, BEFORE = "distill.beta", "student.layers", "before.method"
BETA_FIGURE, METHOD_FIGURE, CURVE_FIGURE = "fig7_beta", "methods_over_depth", "learning_curves"
CHAIN_FIGURE = "fig3_after_another_task"
"""What the figures' files are called."""
X_BETA = "share of the teacher's gradient, β"
MAX_LINES = 8
"""Lines that one panel can hold and a reader still follow."""


def beta_figure(records: Sequence[RunRecord]) -> FigureData[Panel]:
    """The task's metrics on the test split over beta, a line for each student depth N (NewsBERT Fig. 7).

    Error bars are the standard deviation over seeds. A setting that varies besides these makes more lines.

    Raises:
        NothingToDraw: beta does not vary, or too much else does.
        ValueError: runs of several tasks.
    """
    task = one_task(records)
    records = distinct(records)
    varying = varying_settings(records)
    if BETA not in varying:
        raise NothingToDraw("Fig. 7 (metric over beta) is left out: beta does not vary over these runs")
    others = [name for name in varying if name != BETA]
    groups = _grouped(records, others or [DEPTH])
    if len(groups) > MAX_LINES:
        raise NothingToDraw(
            f"Fig. 7 (metric over beta) is left out: {', '.join(others)} make {len(groups)} lines, "
            f"{MAX_LINES} can be told apart; report fewer runs at once"
        )
    panels = []
    for metric in task.metrics:
        lines = [
            line
            for label, group in groups.items()
            if (line := _over(BETA, group, f"test.student.{metric.name}", label))
        ]
        teacher = _known(records, f"test.teacher.{metric.name}")
        if lines and teacher and set(varying) <= {BETA, DEPTH}:
            ends = (min(line.x[0] for line in lines), max(line.x[-1] for line in lines))
            mean, n = 100 * summarise(teacher).mean, len(teacher)
            lines.append(Line("teacher (mean)", ends, (mean, mean), (None, None), (n, n), reference=True))
        if lines:
            panels.append(Panel("", X_BETA, f"test {metric.heading} (%)", tuple(lines)))
    if not panels:
        raise NothingToDraw("Fig. 7 (metric over beta) is left out: no run has test metrics")
    return FigureData(
        BETA_FIGURE,
        tuple(panels),
        figure_caption(records, panels),
        across=2 if len(panels) == 4 else 3,
        alt=_best_ends(panels, "β"),
    )


def method_figure(records: Sequence[RunRecord]) -> FigureData[Panel]:
    """The task's metrics on the test split over student depth N, a line for each method (as in NewsBERT Figs.
    4 and 6), and then those of the teachers beside whom the students learned (Fig. 5).

    Error bars are the standard deviation over seeds.

    Raises:
        NothingToDraw: not just the method and the depth vary, or too many methods.
        ValueError: runs of several tasks.
    """
    return _methods_over_depth(records, METHOD_FIGURE, "method", NAMES)


def chain_figure(records: Sequence[RunRecord]) -> FigureData[Panel]:
    """The task's metrics on the test split over student depth N, a line for each method by which the students
    had learned another task before (NewsBERT Fig. 3: retrieval after recommendation).

    Raises:
        NothingToDraw: not just that method and the depth vary, or too many methods.
        ValueError: runs of several tasks.
    """
    names = {name: f"after {called}" for name, called in NAMES.items()} | {"none": "the encoder as it is"}
    return _methods_over_depth(records, CHAIN_FIGURE, BEFORE, names)


def _methods_over_depth(
    records: Sequence[RunRecord], name: str, setting: str, names: Mapping[str, str]
) -> FigureData[Panel]:
    """A line for each value of `setting`, which has these names for people."""
    task = one_task(records)
    records = distinct(records)
    varying = set(varying_settings(records)) - set(tuned_settings(records))
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        groups.setdefault(str(flat_settings(record)[setting]), []).append(record)
    if varying != {setting, DEPTH}:
        raise NothingToDraw(f"{setting} over depth is left out: not just the method and the depth vary")
    if len(groups) > MAX_LINES:
        raise NothingToDraw(
            f"{setting} over depth is left out: of {len(groups)} methods {MAX_LINES} can be told apart; "
            "report fewer at once"
        )
    panels = [
        Panel("", "student layers, N", f"{whose} {metric.heading} (%)", tuple(lines))
        for model, whose in (("student", "test"), ("teacher", "teacher's test"))
        for metric in task.metrics
        if (lines := _of_methods(groups, f"test.{model}.{metric.name}", names))
    ]
    if not panels:
        raise NothingToDraw(f"{setting} over depth is left out: no run has test metrics")
    return FigureData(
        name,
        tuple(panels),
        figure_caption(records, panels),
        across=2,
        whole_x=True,
        alt=_best_ends(panels, "N"),
    )


def _of_methods(groups: Mapping[str, Sequence[RunRecord]], path: str, names: Mapping[str, str]) -> list[Line]:
    lines = (_over(DEPTH, group, path, names.get(name, name)) for name, group in groups.items())
    return [line for line in lines if line]


def curve_figure(records: Sequence[RunRecord]) -> FigureData[Panel]:
    """The task's first metric on validation over epochs, a panel for each student depth, mean over seeds.

    A panel shows at most MAX_LINES settings, those that ended best, and says so.

    Raises:
        NothingToDraw: no run was evaluated twice.
        ValueError: runs of several tasks.
    """
    metric = one_task(records).primary
    records = [record for record in distinct(records) if len(record.curve) > 1]
    if not records:
        raise NothingToDraw("learning curves are left out: no run has two evaluations")
    varying = varying_settings(records)
    depths = _grouped(records, [DEPTH])
    left_out = 0
    panels = []
    for label, group in depths.items():
        lines = [
            line
            for name, runs in _grouped(group, [name for name in varying if name != DEPTH]).items()
            if (line := _curve(runs, name or "student", f"student.{metric.name}"))
        ]
        best = sorted(lines, key=lambda line: line.y[-1], reverse=True)[:MAX_LINES]
        left_out += len(lines) - len(best)
        shown = [line for line in lines if line in best]
        teacher = _curve(group, "teacher (mean)", f"teacher.{metric.name}")
        if teacher and set(varying) <= {BETA, DEPTH}:
            shown.append(replace(teacher, reference=True))
        if lines:
            panels.append(Panel(label, "epoch", f"validation {metric.heading} (%)", tuple(shown)))
    if not panels:
        raise NothingToDraw("learning curves are left out: no run knows its students' metrics")
    note = f" {left_out} settings that ended lower are not drawn." if left_out else ""
    caption = figure_caption(records, panels, error_bars=False) + note
    alt = _best_ends(panels, "epoch")
    return FigureData(
        CURVE_FIGURE, tuple(panels), caption, error_bars=False, whole_x=True, share_y=True, alt=alt
    )


def _best_ends(panels: Sequence[Panel], x: str) -> str:
    """In words: what each panel shows, and where it is highest."""
    said = []
    for panel in panels:
        drawn = [line for line in panel.lines if not line.reference]
        y, at, label = max((y, x, line.label) for line in drawn for x, y in zip(line.x, line.y, strict=True))
        title = f"{panel.title}: " if panel.title else ""
        said.append(f"{title}{panel.y_label} over {panel.x_label}, highest {y:.1f} at {x} = {at:g} ({label})")
    return ". ".join(said) + "."


def _grouped(records: Sequence[RunRecord], names: Sequence[str]) -> dict[str, list[RunRecord]]:
    """Records by their values of `names`, in the order of the values; the key is the label of a line."""
    flats = [(flat_settings(record), record) for record in records]
    ordered = sorted(flats, key=lambda pair: [_sortable(pair[0].get(name)) for name in names])
    groups: dict[str, list[RunRecord]] = {}
    for flat, record in ordered:
        label = ", ".join(f"{symbol(name)} = {short(flat.get(name))}" for name in names)
        groups.setdefault(label, []).append(record)
    return groups


def symbol(name: str) -> str:
    """The paper's letter for a setting, or the last part of its name."""
    return {DEPTH: "N", BETA: "β", "distill.temperature": "t"}.get(name, name.split(".")[-1])


def short(value: Any, digits: int = 6) -> str:
    """A setting's value in a label: so many digits of a number, a word as it stands in a search space."""
    if isinstance(value, bool) or value is None:
        return {None: "none", True: "true", False: "false"}[value]
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def _sortable(value: Any) -> tuple[float, str]:
    return (float(value), "") if isinstance(value, int | float) else (0.0, str(value))


def _known(records: Sequence[RunRecord], path: str) -> list[float]:
    return [value for record in records if (value := number(record, path)) is not None]


def _over(setting: str, records: Sequence[RunRecord], path: str, label: str) -> Line | None:
    """Mean and spread in per cent of the metric at `path`, at each value of a setting; None where nobody
    knows it."""
    found: dict[float, list[float]] = {}
    for record in records:
        value = number(record, path)
        if value is not None:
            found.setdefault(float(flat_settings(record)[setting]), []).append(100 * value)
    return line_of(found, label) if found else None


def _curve(records: Sequence[RunRecord], label: str, name: str) -> Line | None:
    """`name` (`student.accuracy`) on validation in per cent over epochs, at the epochs that all records have;
    None where nobody knows it."""
    found: dict[float, list[float]] = {}
    model, _, metric = name.partition(".")
    for record in records:
        for entry in record.curve:
            value = entry["validation"].get(model, {}).get(metric)
            if value is not None:
                found.setdefault(float(entry["epoch"]), []).append(100 * value)
    common = {x: values for x, values in found.items() if len(values) == len(records)} or found
    return line_of(common, label) if common else None


def line_of(found: Mapping[float, Sequence[float]], label: str) -> Line:
    """Mean, spread and number of the values at each x, as a line."""
    xs = tuple(sorted(found))
    summaries = [summarise(found[x]) for x in xs]
    means, sds, ns = zip(*((s.mean, s.sd, s.n) for s in summaries), strict=True)
    return Line(label, xs, means, sds, ns)


def figure_caption(records: Sequence[RunRecord], panels: Sequence[Panel], *, error_bars: bool = True) -> str:
    """What was measured on what: data, sizes, teacher, and how many seeds stand behind a point."""
    data = ", ".join(dict.fromkeys(data_name(record) for record in records))
    units = units_of(one_task(records))
    counts = [
        f"{', '.join(sizes)} {units[part]}{part}"
        for part in ("train", "test")
        if (sizes := dict.fromkeys(f"{n:,}" for record in records if (n := record.data.get(f"{part}_rows"))))
    ]
    teachers = ", ".join(dict.fromkeys(teacher_name(record) for record in records))
    counts_of = sorted({n for panel in panels for line in panel.lines if not line.reference for n in line.n})
    seeds = " to ".join(str(n) for n in dict.fromkeys((counts_of[0], counts_of[-1])))
    kind = "mean ± sd" if error_bars else "mean"
    spread = "one seed a point" if seeds == "1" else f"{kind} over {seeds} seeds a point"
    titles = f", {' / '.join(counts)}{units['all']}" if counts else ""
    words = [text for panel in panels for text in (panel.title, *(line.label for line in panel.lines))]
    legend = " N: student layers." if any(word.startswith("N = ") for word in words) else ""
    return f"Data: {data}{titles}. Teacher: {teachers}. {len(records)} runs, {spread}.{legend}"


BLOCKS_FIGURE = "block_gradients"
_KINDS: Mapping[str, str] = {
    "ratio": "norms, block mean / student",
    "cosine": "cosine, block mean and student",
}
_NUMBER = re.compile(r"block_(\d+)_(ratio|cosine)")


def blocks_figure(records: Sequence[RunRecord]) -> FigureData[Panel]:
    """For each student depth and block the ratio of the gradients' norms and their cosine, before mixing,
    over epochs; mean and standard deviation over all runs of that depth.

    Raises:
        NothingToDraw: no run has a teacher that learns beside its student.
    """
    records = [record for record in distinct(records) if any(entry.get("blocks") for entry in record.curve)]
    if not records:
        raise NothingToDraw("gradients of blocks are left out: no teacher learned beside its student")
    depths = sorted({int(flat_settings(record)["student.layers"]) for record in records})
    panels = [
        Panel(f"N = {depth}", "epoch", label, tuple(lines))
        for depth in depths
        for kind, label in _KINDS.items()
        if (lines := list(_lines(records, depth, kind)))
    ]
    names = ", ".join(dict.fromkeys(map(data_name, records)))
    teachers = ", ".join(dict.fromkeys(map(teacher_name, records)))
    return FigureData(
        BLOCKS_FIGURE,
        tuple(panels),
        f"Data: {names}. Teacher: {teachers}. {len(records)} runs, mean ± sd over them; gradients of logged "
        "updates before mixing. Momentum adds beta x ratio of its own length to a student layer's gradient; "
        "where the cosine is small, it turns the update.",
        across=2,
        whole_x=True,
        alt="; ".join(
            f"{panel.title}, {panel.y_label}: "
            + ", ".join(f"{line.label} ends at {line.y[-1]:.2f}" for line in panel.lines)
            for panel in panels
        ),
    )


def _lines(records: Sequence[RunRecord], depth: int, kind: str) -> Iterator[Line]:
    found: dict[int, dict[float, list[float]]] = {}
    for record in records:
        if int(flat_settings(record)["student.layers"]) != depth:
            continue
        for entry in record.curve:
            for name, value in (entry.get("blocks") or {}).items():
                match = _NUMBER.fullmatch(name)
                if match and match[2] == kind:
                    at = found.setdefault(int(match[1]), {})
                    at.setdefault(float(entry["epoch"]), []).append(float(value))
    for block, by_epoch in sorted(found.items()):
        yield line_of(by_epoch, f"block {block}")


MAP_FIGURE = "map_of_titles"
TOPICS = 8
"""Colours that can be told apart; the other topics are grey."""
OTHERS = "other topics"


def map_figure(run: Path) -> FigureData[Scatter]:
    """Titles by topic in the plane that parts the topics best.

    Args:
        run: folder of a finished run of topics.
    Raises:
        NothingToDraw: it left no map.
    """
    try:
        found: dict[str, Any] = json.loads((run / MAP).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NothingToDraw(f"the map of titles is left out: {run.name} left none") from error
    labels, topics = found["labels"], found["topic"]
    counts = Counter(topics)
    shown = [topic for topic, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))][:TOPICS]
    groups: dict[str, list[int]] = {OTHERS: []}
    for topic in shown:
        groups[labels[topic]] = []
    for place, topic in enumerate(topics):
        groups[labels[topic] if topic in shown else OTHERS].append(place)
    dots = tuple(
        Dots(
            name,
            "stopped" if name == OTHERS else "finished",
            tuple(found["x"][place] for place in places),
            tuple(found["y"][place] for place in places),
            (None,) * len(places),
            colour=None if name == OTHERS else list(groups).index(name) - 1,
        )
        for name, places in groups.items()
        if places
    )
    panel = Scatter("", "first axis", "second axis", dots)
    caption = (
        f"{len(topics):,} titles of {found['split']} as the student embeds them, in the plane in which the "
        f"topics' means lie furthest apart ({found['share']:.0%} of the variance between them)."
    )
    named = ", ".join(labels[topic] for topic in shown)
    return FigureData(
        MAP_FIGURE, (panel,), caption, wide=True, alt=f"titles of {named} and others on a plane"
    )


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
