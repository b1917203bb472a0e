"""What a figure shows, before it is drawn; and the figures of any runs, made from their records. Figs. 3 to 7
are those of NewsBERT (Wu et al. 2021). Needs neither torch nor Ray. A function that makes a figure raises
NothingToDraw with the reason where it cannot, and ValueError for runs of several tasks."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from newsbert_ray.record import MAP, RunRecord
from newsbert_ray.reporting import records as run_records
from newsbert_ray.reporting.records import NAMES, distinct, flat_settings, grouped, one_task, varying_settings
from newsbert_ray.reporting.sweep_data import curve_of
from newsbert_ray.reporting.tables import number, short, sort_key, summarise, summary_of

LineLook = Literal["mean", "reference", "run", "cross", "plain", "trend", "means"]
"""How a line is drawn: coloured with markers and error bars (mean); dashed, for comparison (reference); thin
and grey, one run among many (run), which may end with a cross (cross); coloured without markers (plain);
means of dots with their standard errors, joined where x has an order (trend) or not (means)."""
DotLook = Literal["finished", "stopped", "below", "front", "best"]
"""How a dot is drawn: filled; hollow; hollow and pointing down, below the axis; on a Pareto front; chosen."""


class NothingToDraw(ValueError):
    """The records do not make this figure; the message says why."""


@dataclass(frozen=True)
class Line:
    """A line, or single points that look the same: the mean y of n values at each x."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    sd: tuple[float | None, ...] = ()
    """Standard deviation at each x, None for a single value; of a trend the standard error."""
    n: tuple[int, ...] = ()
    look: LineLook | DotLook = "mean"
    notes: tuple[str, ...] = ()
    """A text beside each point."""
    stairs: Literal["", "before", "after"] = ""
    """A step line through the dots that steps at once (before) or at the next dot (after)."""
    colour: int | None = None
    """Number of the colour and marker of dots; those of the look by default."""


@dataclass(frozen=True)
class Panel:
    """Lines and dots on one pair of axes."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    trend: Line | None = None
    """Means over groups of dots."""
    ticks: tuple[str, ...] = ()
    """Names of the positions 0, 1, 2, ... where x is not continuous."""
    log_x: bool = False
    floor: float | None = None
    """Lower end of y; dots that look `below` are drawn on it."""
    x_range: tuple[float, float] | None = None
    """The searched range."""


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
    """Horizontal bars, the first on top. `labels`: the legend's for value, interval and chance, if any."""

    title: str
    x_label: str
    bars: tuple[Bar, ...]
    labels: tuple[str, str, str] = ("", "", "")


AnyPanel = Panel | Bars
P_co = TypeVar("P_co", bound=AnyPanel, covariant=True)


@dataclass(frozen=True)
class FigureData(Generic[P_co]):
    """All that a figure shows. `whole_x`, `whole_y`: ticks at whole numbers only; `wide`: a single panel has
    the whole width of the text; `across`: panels in a row, at most; `alt`: the figure in words."""

    name: str
    panels: tuple[P_co, ...]
    caption: str
    whole_x: bool = False
    whole_y: bool = False
    share_y: bool = False
    wide: bool = False
    across: int = 3
    alt: str = ""


Make = Callable[[], FigureData[AnyPanel]]
BETA, DEPTH, PREREQUISITE = "distill.beta", "student.layers", "before.method"
LOSS_POINTS = 40
MAX_LINES = 8
"""Lines of one panel that can be told apart; also topics of the map."""
OTHERS = "other topics"
_BLOCK_VALUES = {"ratio": "norm ratio, block / student", "cosine": "cosine of the gradients"}


def runs_figures(records: Sequence[RunRecord]) -> dict[str, Make]:
    """Figures of any runs of one task: those that compare only where there is something to compare."""
    flats = [flat_settings(record) for record in records]
    several = {name for name in ("method", PREREQUISITE, DEPTH) if len({flat[name] for flat in flats}) > 1}
    blocks = any("blocks" in entry for record in records for entry in record.curve)
    after = partial(method_figure, records, setting=PREREQUISITE)
    makes: dict[str, tuple[bool, Make]] = {
        "fig7_beta": (len(records) > 1, partial(beta_figure, records)),
        "methods_over_depth": ("method" in several, partial(method_figure, records)),
        "fig3_after_another_task": (PREREQUISITE in several, after),
        "quality_kept": (DEPTH in several, partial(quality_figure, records)),
        "learning_curves": (True, partial(curve_figure, records)),
        "block_gradients": (blocks, partial(blocks_figure, records)),
    }
    return {name: make for name, (needed, make) in makes.items() if needed}


def beta_figure(records: Sequence[RunRecord]) -> FigureData[Panel]:
    """The task's metrics on the test split over beta, a line for each student depth N (NewsBERT Fig. 7), with
    the standard deviation over seeds. Every other setting that varies makes more lines."""
    task, records = one_task(records), distinct(records)
    varying = varying_settings(records)
    if BETA not in varying:
        raise NothingToDraw("Fig. 7 (metric over beta) is left out: beta does not vary over these runs")
    others = [name for name in varying if name != BETA]
    groups = _labelled(records, others or [DEPTH])
    _require_few(groups, f"Fig. 7 (metric over beta) is left out: {', '.join(others)} make")
    panels = []
    for metric in task.metrics:
        lines = _lines_over(BETA, groups, f"test.student.{metric.name}")
        teacher = summary_of(records, f"test.teacher.{metric.name}")
        if lines and teacher and set(varying) <= {BETA, DEPTH}:
            ends = (min(line.x[0] for line in lines), max(line.x[-1] for line in lines))
            mean, n = 100 * teacher.mean, teacher.n
            lines.append(Line("teacher (mean)", ends, (mean, mean), (None, None), (n, n), "reference"))
        if lines:
            x_label, y_label = "share of the teacher's gradient, β", f"test {metric.heading} (%)"
            panels.append(Panel("", x_label, y_label, tuple(lines)))
    if not panels:
        raise NothingToDraw("Fig. 7 (metric over beta) is left out: no run has test metrics")
    across = 2 if len(panels) == 4 else 3
    caption, alt = figure_caption(records, panels), _best_ends(panels, "β")
    return FigureData("fig7_beta", tuple(panels), caption, across=across, alt=alt)


def _require_few(lines: Sized, message: str) -> None:
    if len(lines) > MAX_LINES:
        reason = f"{message} {len(lines)} lines, {MAX_LINES} can be told apart; report fewer runs at once"
        raise NothingToDraw(reason)


def method_figure(records: Sequence[RunRecord], *, setting: str = "method") -> FigureData[Panel]:
    """The task's metrics on the test split over student depth N, a line for each method (NewsBERT Figs. 4
    and 6), and then those of the teachers that learned with the students (Fig. 5); with the standard
    deviation over seeds. With `setting` `before.method` a line for each method by which the students learned
    another task before (Fig. 3: retrieval after recommendation)."""
    before = {name: f"after {shown}" for name, shown in NAMES.items()} | {"none": "the encoder as it is"}
    names = NAMES if setting == "method" else before
    task, records = one_task(records), distinct(records)
    groups = grouped(records, lambda record: str(flat_settings(record)[setting]))
    if set(varying_settings(records)) - set(run_records.tuned_settings(records)) != {setting, DEPTH}:
        raise NothingToDraw(f"{setting} over depth is left out: not just the method and the depth vary")
    _require_few(groups, f"{setting} over depth is left out: the methods make")
    named = {names.get(value, value): group for value, group in groups.items()}
    panels = [
        Panel("", "student layers, N", f"{whose} {metric.heading} (%)", tuple(lines))
        for model, whose in (("student", "test"), ("teacher", "teacher's test"))
        for metric in task.metrics
        if (lines := _lines_over(DEPTH, named, f"test.{model}.{metric.name}"))
    ]
    if not panels:
        raise NothingToDraw(f"{setting} over depth is left out: no run has test metrics")
    caption, alt = figure_caption(records, panels), _best_ends(panels, "N")
    name = "methods_over_depth" if setting == "method" else "fig3_after_another_task"
    return FigureData(name, tuple(panels), caption, across=2, whole_x=True, alt=alt)


def curve_figure(records: Sequence[RunRecord]) -> FigureData[Panel]:
    """The task's first metric on validation over epochs, a panel for each student depth, mean over seeds. A
    panel shows the MAX_LINES settings that ended best; the caption says how many are missing."""
    metric = one_task(records).primary
    records = [record for record in distinct(records) if len(record.curve) > 1]
    if not records:
        raise NothingToDraw("learning curves are left out: no run has two evaluations")
    varying = varying_settings(records)
    left_out, panels = 0, []
    for label, group in _labelled(records, [DEPTH]).items():
        lines: list[Line] = []
        for name, runs in _labelled(group, [name for name in varying if name != DEPTH]).items():
            path = f"validation.student.{metric.name}"
            lines += mean_curve([record.curve for record in runs], path, name or "student")
        best = sorted(lines, key=lambda line: line.y[-1], reverse=True)[:MAX_LINES]
        left_out += len(lines) - len(best)
        shown = [line for line in lines if line in best]
        if set(varying) <= {BETA, DEPTH}:
            path = f"validation.teacher.{metric.name}"
            shown += mean_curve([record.curve for record in group], path, "teacher (mean)", "reference")
        if lines:
            panels.append(Panel(label, "epoch", f"validation {metric.heading} (%)", tuple(shown)))
    if not panels:
        raise NothingToDraw("learning curves are left out: no run has metrics of its student")
    caption, alt = figure_caption(records, panels), _best_ends(panels, "epoch")
    caption += f" {left_out} settings that ended lower are not drawn." if left_out else ""
    return FigureData("learning_curves", tuple(panels), caption, whole_x=True, share_y=True, alt=alt)


def mean_curve(
    runs: Sequence[Sequence[Mapping[str, Any]]], path: str, label: str, look: LineLook = "mean"
) -> list[Line]:
    """A metric in per cent at the epochs that all runs have, from their evaluations; empty without any."""
    pairs = [(x, 100 * y) for entries in runs for x, y in curve_of(entries, path)]
    return [replace(mean_line(pairs, label, runs=len(runs), spread=False), look=look)] if pairs else []


def loss_figure(record: RunRecord, entries: Sequence[Mapping[str, Any]]) -> FigureData[Panel]:
    """The losses of one run over epochs, those of the labels and those of distillation in a panel each, from
    the entries of its metrics.jsonl, averaged over up to LOSS_POINTS parts of the run."""
    losses: dict[str, list[tuple[float, float]]] = {}
    for entry in (entry for entry in entries if entry.get("kind") == "log"):
        part = math.ceil(LOSS_POINTS * entry["step"] / entry["steps"]) / LOSS_POINTS
        for name, value in entry.get("train", {}).items():
            losses.setdefault(name, []).append((part * entry["epochs"], value))
    losses.pop("total", None)
    lines = {n: mean_line(pairs, n.replace("_", " "), spread=False) for n, pairs in losses.items()}
    if max((len(line.x) for line in lines.values()), default=0) < 2:
        raise NothingToDraw("losses are left out: the run logged them less than twice")
    shown = tuple(
        Panel("", "epoch", heading, own)
        for heading, of_labels in (("loss of the labels", True), ("loss of distillation", False))
        if (own := tuple(line for name, line in lines.items() if name.endswith("_task") == of_labels))
    )
    caption = f"Training losses of {record.steps:,} steps before weighting, averaged over parts of the run."
    alt = "; ".join(f"{line.label} from {line.y[0]:.3g} to {line.y[-1]:.3g}" for line in lines.values())
    return FigureData("losses", shown, caption, across=2, alt=f"Losses: {alt}.")


def blocks_figure(records: Sequence[RunRecord]) -> FigureData[Panel]:
    """For each student depth and block the ratio of the gradients' norms and their cosine, before mixing,
    over epochs; mean and standard deviation over all runs of that depth."""
    records = [record for record in distinct(records) if any(entry.get("blocks") for entry in record.curve)]
    if not records:
        raise NothingToDraw("gradients of blocks are left out: no teacher learned with its student")
    panels = []
    for depth, group in sorted(grouped(records, lambda r: int(flat_settings(r)[DEPTH])).items()):
        entries = [entry for record in group for entry in record.curve]
        for kind, label in _BLOCK_VALUES.items():
            curves = (curve_of(entries, f"blocks.block_{block}_{kind}") for block in range(1, depth + 1))
            lines = [mean_line(pairs, f"block {block}") for block, pairs in enumerate(curves, 1) if pairs]
            panels += [Panel(f"N = {depth}", "epoch", label, tuple(lines))] if lines else []
    spread = f"{len(records)} runs, mean ± sd over them" if len(records) > 1 else "1 run"
    caption = (
        f"{run_records.origin(records)}. {spread}; gradients of logged steps before mixing. Momentum adds "
        "beta x ratio of its own length to a student layer's gradient; where the cosine is small, it turns "
        "the update."
    )
    alt = "; ".join(
        f"{panel.title}, {panel.y_label}: "
        + ", ".join(f"{line.label} ends at {line.y[-1]:.2f}" for line in panel.lines)
        for panel in panels
    )
    return FigureData("block_gradients", tuple(panels), caption, across=2, whole_x=True, alt=alt)


def map_figure(run: Path) -> FigureData[Panel]:
    """Titles by topic in the plane that separates the topics best; `run` is the folder of a finished run."""
    try:
        points: dict[str, Any] = json.loads((run / MAP).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NothingToDraw(f"the map of titles is left out: {run.name} has none") from error
    labels, topics = points["labels"], points["topic"]
    named = [topic for topic, _ in Counter(sorted(topics)).most_common(MAX_LINES)]
    titles = zip(points["x"], points["y"], topics, strict=True)
    groups = grouped(titles, lambda title: title[2] if title[2] in named else None)
    dots = []
    for topic in (topic for topic in (None, *named) if topic in groups):
        x, y, _ = zip(*groups[topic], strict=True)
        if topic is None:
            dots.append(Line(OTHERS, x, y, look="stopped"))
        else:
            dots.append(Line(labels[topic], x, y, look="finished", colour=named.index(topic)))
    caption = (
        f"{len(topics):,} titles of {points['split']} as the student embeds them, in the plane in which the "
        f"topics' means are furthest apart ({points['share']:.0%} of the variance between them)."
    )
    alt = f"titles of {', '.join(labels[topic] for topic in named)} and others on a plane"
    panel = Panel("", "first axis", "second axis", tuple(dots))
    return FigureData("map_of_titles", (panel,), caption, wide=True, alt=alt)


def quality_figure(records: Sequence[RunRecord], *, chosen: bool = False) -> FigureData[Panel]:
    """The student's test metric in per cent of its teacher's (with the standard deviation over seeds) over
    its speed-up, of the titles/s that the run measured at its end: a line for each method, a point for each
    depth. `chosen`: the runs are a search's best at each depth, in whatever else they differ."""
    metric = one_task(records).primary
    left_out = "quality kept over speed-up is left out"
    paths = (f"test.student.{metric.name}", f"test.teacher.{metric.name}", "speed.times_teacher")
    whole = [r for r in distinct(records) if all(number(r, path) for path in paths)]
    more = set(varying_settings(whole)) - {"method", DEPTH} - set(run_records.tuned_settings(whole))
    if more and not chosen:
        raise NothingToDraw(f"{left_out}: {', '.join(sorted(more))} vary too")
    methods = {
        name: dict(sorted(grouped(group, lambda r: int(flat_settings(r)[DEPTH])).items(), reverse=True))
        for name, group in grouped(whole, lambda r: str(flat_settings(r)["method"])).items()
    }
    if max((len(depths) for depths in methods.values()), default=0) < 2:
        raise NothingToDraw(f"{left_out}: it takes students of two depths, with their teachers' metrics")
    _require_few(methods, f"{left_out}: the methods make")
    lines: list[Line] = []
    for name, depths in methods.items():
        values = [[[number(r, path) or 0.0 for r in runs] for path in paths] for runs in depths.values()]
        shares = [summarise([100 * s / t for s, t in zip(*v[:2], strict=True)]) for v in values]
        x = tuple(summarise(speeds).mean for _, _, speeds in values)
        y, sd, n = zip(*((share.mean, share.sd, share.n) for share in shares), strict=True)
        notes = () if lines else tuple(f"{depth} layer{'s' if depth > 1 else ''}" for depth in depths)
        lines.append(Line(NAMES.get(name, name), x, y, sd, n, notes=notes))
    y_label = f"test {metric.heading}, % of the teacher's"
    panel = Panel("", "titles/s, times the teacher's", y_label, tuple(lines))
    order = sorted({depth for depths in methods.values() for depth in depths}, reverse=True)
    caption = (
        f"{figure_caption(whole, [panel])} Along a line from left to right: students of "
        f"{', '.join(map(str, order))} layers" + (", the search's best on validation." if chosen else ".")
    )
    alt = ". ".join(
        f"{line.label} keeps "
        + ", ".join(f"{y:.1f} % at {x:.1f} times the speed" for x, y in zip(line.x, line.y, strict=True))
        for line in lines
    )
    return FigureData("quality_kept", (panel,), caption, alt=f"{alt}.")


def describe(values: Mapping[str, Any], digits: int = 6) -> str:
    """Settings in one line, as in a legend, by the paper's letters: `β = 0.1, N = 2`."""
    letters = {DEPTH: "N", BETA: "β", "distill.temperature": "t"}
    named = [(letters.get(name, name.split(".")[-1]), value) for name, value in values.items()]
    return ", ".join(f"{name} = {short(value, digits)}" for name, value in named)


def mean_line(
    pairs: Iterable[tuple[float, float]], label: str, *, runs: int = 0, spread: bool = True
) -> Line:
    """Mean, spread and number of the y at each x; only at x that all of so many `runs` have, if any."""
    values = {x: [y for _, y in group] for x, group in grouped(pairs, itemgetter(0)).items()}
    values = {x: ys for x, ys in values.items() if len(ys) == runs} or values
    summaries = [summarise(values[x]) for x in sorted(values)]
    means, sds, ns = zip(*((s.mean, s.sd, s.n) for s in summaries), strict=True)
    return Line(label, tuple(sorted(values)), means, sds if spread else (), ns)


def _lines_over(setting: str, groups: Mapping[str, Sequence[RunRecord]], path: str) -> list[Line]:
    """The metric at `path` in per cent over a setting, a line for each group that has it."""
    lines = []
    for label, group in groups.items():
        values = [(float(flat_settings(record)[setting]), number(record, path)) for record in group]
        pairs = [(x, 100 * y) for x, y in values if y is not None]
        lines += [mean_line(pairs, label)] if pairs else []
    return lines


def _labelled(records: Sequence[RunRecord], names: Sequence[str]) -> dict[str, list[RunRecord]]:
    """Records by their values of `names`, in the order of the values; the key is the label of a line."""
    values = {id(record): {name: flat_settings(record).get(name) for name in names} for record in records}
    ordered = sorted(records, key=lambda record: list(map(sort_key, values[id(record)].values())))
    return grouped(ordered, lambda record: describe(values[id(record)]))


def _best_ends(panels: Sequence[Panel], x: str) -> str:
    """In words: what each panel shows, and where it is highest."""
    texts = []
    for panel in panels:
        lines = [line for line in panel.lines if line.look == "mean"]
        y, at, label = max((y, x, line.label) for line in lines for x, y in zip(line.x, line.y, strict=True))
        title = f"{panel.title}: " if panel.title else ""
        text = f"{title}{panel.y_label} over {panel.x_label}"
        texts.append(f"{text}, highest {y:.1f} at {x} = {at:g} ({label})")
    return ". ".join(texts) + "."


def figure_caption(records: Sequence[RunRecord], panels: Sequence[Panel]) -> str:
    """What was measured: data, sizes, teacher, and how many seeds are behind a point."""
    units = run_records.count_units(one_task(records))
    counts = [
        f"{', '.join(sizes)} {units[split]}{split}"
        for split in ("train", "test")
        if (sizes := dict.fromkeys(f"{n:,}" for record in records if (n := record.data.get(f"{split}_rows"))))
    ]
    means = [line for panel in panels for line in panel.lines if line.look == "mean"]
    seeds = span({n for line in means for n in line.n})
    kind = "mean ± sd" if any(line.sd for line in means) else "mean"
    spread = "one seed per point" if seeds == "1" else f"{kind} over {seeds} seeds per point"
    titles = f", {' / '.join(counts)}{units['all']}" if counts else ""
    words = [text for panel in panels for text in (panel.title, *(line.label for line in panel.lines))]
    legend = " N: student layers." if any(word.startswith("N = ") for word in words) else ""
    runs = f"{len(records)} run{'s' if len(records) > 1 else ''}"
    return f"{run_records.origin(records, titles)}. {runs}, {spread}.{legend}"


def span(numbers: Collection[float]) -> str:
    """`3`, or `3 to 5`."""
    return " to ".join(map(str, dict.fromkeys((min(numbers), max(numbers)))))
