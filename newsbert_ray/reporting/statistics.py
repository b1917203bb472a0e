"""Is one row better than another, or luckier: Welch's t-test over seeds, corrected for many comparisons.

The paper repeats each experiment five times and marks p < 0.01 (4.1, 4.2). Pure; knows no record's folder.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from newsbert_ray.config import SettingsError
from newsbert_ray.methods import TASKS
from newsbert_ray.reporting.figures import Bar, Bars, FigureData, NothingToDraw
from newsbert_ray.reporting.page import Table
from newsbert_ray.reporting.sweep_data import Axis, Point, Sweep, Trial
from newsbert_ray.reporting.tables import Column, Row, Summary, bare, columns_of, number

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


LEAST_SEEDS = 3
"""With fewer repeats a spread is a guess, and a p-value would pretend to be none."""
LEVEL = 0.01
"""What the paper calls significant."""
MARK = "*"


@dataclass(frozen=True)
class Comparison:
    """A row beside the one it is compared with, in one column.

    Attributes:
        difference: of the means, row less base, as in the record (shares from 0 to 1).
        p: two-sided, of Welch's t-test; None where there are too few seeds, or no spread at all.
        corrected: p after Holm's correction over all comparisons of the column.
        paired: two-sided, of the t-test over each seed's difference: runs of one seed share their start and
            order. None where too few seeds are in both.
    """

    row: Row
    base: Row
    difference: float
    p: float | None
    corrected: float | None = None
    paired: float | None = None

    @property
    def marked(self) -> bool:
        """Whether the corrected p is below LEVEL."""
        return self.corrected is not None and self.corrected < LEVEL


class Against(NamedTuple):
    """The rows that others are compared with: those in which `setting` has the `value` (as text)."""

    setting: str
    value: str

    def __str__(self) -> str:
        return f"{self.setting} {self.value}"


def read_against(text: str) -> Against:
    """`method=newsbert` -> Against.

    Raises:
        SettingsError: no NAME=VALUE.
    """
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise SettingsError(f"--against {text}: expected SETTING=VALUE, such as method=newsbert")
    return Against(name.strip(), value.strip())


def usual_base(rows: Sequence[Row]) -> Against | None:
    """What rows of several methods are compared with where nothing else is asked: newsbert, as in the paper,
    or else the student that is fine-tuned alone."""
    methods = {row.settings.get("method") for row in rows} - {None}
    found = next((name for name in ("newsbert", "finetune") if name in methods and len(methods) > 1), None)
    return Against("method", found) if found else None


def significance_table(rows: Sequence[Row], against: Against, *, tuned: Sequence[str] = ()) -> Table | None:
    """Each row beside the one it is compared with, in each of the student's metrics; None without any.

    Args:
        rows: as `tables.rows_of` gives them, of one task.
        tuned: settings that each method has its own value of, which no row here tells.
    Raises:
        SettingsError: no row has that value.
    """
    if not any(str(row.settings.get(against.setting)) == against.value for row in rows):
        values = sorted(
            {str(row.settings[against.setting]) for row in rows if against.setting in row.settings}
        )
        known = f"it is {', '.join(values)} here" if values else "it does not vary here"
        raise SettingsError(f"--against {against.setting}={against.value}: no row has it; {known}")
    metrics = {m.name for m in TASKS[rows[0].task].metrics}
    columns = [column for column in columns_of(TASKS[rows[0].task]) if column.name in metrics]
    cells: dict[int, list[str]] = {}
    for index, column in enumerate(columns):
        for found in compare_rows(rows, column, against):
            line = cells.setdefault(rows.index(found.row), [""] * len(columns))
            line[index] = _cell(found, column)
    if not cells:
        return None
    names = list(rows[0].settings)
    body = tuple(
        (*(str(rows[index].settings[name]) for name in names), *line) for index, line in sorted(cells.items())
    )
    seeds = sorted({len(row.seeds) for row in rows})
    own = f" but {', '.join(tuned)}, which each method has its own of" if tuned else ""
    return Table(
        (*names, *(f"{bare(column)}, points" for column in columns)),
        body,
        words=len(names),
        caption=f"Difference to {against} (all else equal{own}), {_seeds(seeds)} a row, in points; p of "
        f"Welch's t-test over seeds, and after Holm's correction over the column, {MARK} below {LEVEL:g}; "
        "paired: of the t-test over each seed's difference, uncorrected. They ask whether other seeds would "
        "turn the order, not whether other news would.",
    )


def compare_rows(rows: Sequence[Row], column: Column, against: Against) -> list[Comparison]:
    """Every row against the one that is as it is but for the setting that is compared.

    Args:
        rows: as `tables.rows_of` gives them, of one task.
        column: what is compared; rows that do not know it are left out.
    """
    setting, value = against
    known = [row for row in rows if column.name in row.columns]
    bases = {_others(row, setting): row for row in known if str(row.settings.get(setting)) == value}
    pairs = [
        (row, base)
        for row in known
        if (base := bases.get(_others(row, setting))) is not None and base is not row
    ]
    tests = [welch(row.columns[column.name], base.columns[column.name]) for row, base in pairs]
    corrected = iter(holm([p for p in tests if p is not None]))
    return [
        Comparison(
            row,
            base,
            row.columns[column.name].mean - base.columns[column.name].mean,
            p,
            None if p is None else next(corrected),
            paired(row.columns[column.name], base.columns[column.name]),
        )
        for (row, base), p in zip(pairs, tests, strict=True)
    ]


def welch(one: Summary, other: Summary) -> float | None:
    """Two-sided p that both are means of the same quantity, variances unknown and unlike (Welch 1947); None
    for fewer than LEAST_SEEDS values on a side, or where neither has a spread."""
    from scipy.stats import ttest_ind_from_stats  # type: ignore[import-untyped]

    if min(one.n, other.n) < LEAST_SEEDS or not (one.sd or other.sd):
        return None
    test = ttest_ind_from_stats(one.mean, one.sd, one.n, other.mean, other.sd, other.n, equal_var=False)
    return None if math.isnan(test.pvalue) else float(test.pvalue)


def paired(one: Summary, other: Summary) -> float | None:
    """Two-sided p that the mean difference of a seed is 0 (Student's paired t-test); None for fewer than
    LEAST_SEEDS seeds in both, or where all differ alike."""
    from scipy.stats import ttest_rel

    seeds = sorted(one.by_seed.keys() & other.by_seed.keys())
    values = [[summary.by_seed[seed] for seed in seeds] for summary in (one, other)]
    differences = {round(a - b, 12) for a, b in zip(*values, strict=True)}
    if len(seeds) < LEAST_SEEDS or len(differences) < 2:
        return None
    return float(ttest_rel(*values).pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """p-values such that the chance of any false one below a level is at most that level (Holm 1979), in the
    order given."""
    found = [0.0] * len(values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        found[index] = highest
    return found


def _cell(found: Comparison, column: Column) -> str:
    """`-0.42 (p 0.012, 0.048)`; why there is no p, where there is none."""
    difference = f"{found.difference * column.factor:+.2f}"
    if found.p is None or found.corrected is None:
        seeds = min(len(found.row.seeds), len(found.base.seeds))
        few = f"{seeds} seed{'s' if seeds > 1 else ''}: too few" if seeds < LEAST_SEEDS else "no spread"
        return f"{difference} ({few})"
    mark = MARK if found.marked else ""
    alike = "" if found.paired is None else f"; paired {_p(found.paired)}"
    return f"{difference}{mark} (p {_p(found.p)}, {_p(found.corrected)}{alike})"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _seeds(numbers: Sequence[int]) -> str:
    shown = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    return f"{shown} seed{'' if numbers[-1] == 1 else 's'}"


def _others(row: Row, setting: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, repr(value)) for name, value in row.settings.items() if name != setting)


IMPORTANCE_FIGURE = "importances"
LEAST_POINTS = 10
"""Fewer points say nothing about several settings."""
LEAST_TOP = 5
"""The best points are told from the others; fewer of them than this are noise."""
REPEATS = 100


@dataclass(frozen=True)
class Importance:
    """Of one setting: its share of the whole, 5th and 95th percentile over resampled points, and the 95th
    percentile where the values are shuffled among the points."""

    name: str
    share: float
    low: float
    high: float
    chance: float


@dataclass(frozen=True)
class Importances:
    """For one goal, the most important first. The `top` of the `points`, equals included, were told
    from the rest."""

    found: tuple[Importance, ...]
    points: int
    top: int


class TooFewPoints(NothingToDraw):
    """Too few points to say which settings matter."""


def importances_of(sweep: Sweep, *, goal: int = 0) -> Importances:
    """How much each varied setting decides whether a point is among the best.

    Points that were stopped early count as behind all finished ones: that is why they were stopped. Without
    them a setting whose bad values were all stopped would seem not to matter.

    Raises:
        TooFewPoints: fewer than LEAST_POINTS, or fewer than LEAST_TOP finished.
        NothingToDraw: fewer than two settings varied.
    """
    finished, stopped = sweep.finished, sweep.of("stopped")
    count = len(finished) + len(stopped)
    if count < LEAST_POINTS or len(finished) < LEAST_TOP:
        raise TooFewPoints(
            f"too few points to say which settings mattered: {len(finished)} finished, {len(stopped)} were "
            f"stopped early; {LEAST_POINTS} are needed, {LEAST_TOP} of them finished"
        )
    sign = 1.0 if sweep.goals[goal].mode == "max" else -1.0
    scores = [(point, sign * point.mean(goal)) for point in finished]
    last = min(score for _, score in scores)
    # Of those that were stopped the later and better ones first: they must not be equals.
    stopped.sort(key=lambda p: (max(t.epoch for t in p.trials), sign * p.mean(goal)), reverse=True)
    scores += [(point, last - rank) for rank, point in enumerate(stopped, 1)]
    axes = [axis for axis in sweep.axes if len({repr(p.values.get(axis.name)) for p, _ in scores}) > 1]
    if len(axes) < 2:
        raise NothingToDraw("fewer than two settings varied over the points: there is nothing to compare")
    top = min(len(finished), max(LEAST_TOP, math.ceil(count / 10)))
    return _compare(axes, scores, top)


def _compare(axes: Sequence[Axis], scores: Sequence[tuple[Point, float]], top: int) -> Importances:
    """The estimate, its bootstrap and its shuffles; always the same for the same points."""
    chance = random.Random(0)
    real = _divergences(axes, scores, top)
    whole = sum(real.values()) or 1.0
    resampled: dict[str, list[float]] = {name: [] for name in real}
    shuffled: dict[str, list[float]] = {name: [] for name in real}
    for _ in range(REPEATS):
        again = _divergences(axes, [chance.choice(scores) for _ in scores], top)
        total = sum(again.values()) or 1.0
        values = [score for _, score in scores]
        chance.shuffle(values)
        mixed = _divergences(axes, [(p, v) for (p, _), v in zip(scores, values, strict=True)], top)
        for name in real:
            resampled[name].append(again.get(name, 0.0) / total)
            shuffled[name].append(mixed.get(name, 0.0) / whole)
    found = [
        Importance(
            name,
            value / whole,
            _percentile(resampled[name], 0.05),
            _percentile(resampled[name], 0.95),
            _percentile(shuffled[name], 0.95),
        )
        for name, value in real.items()
    ]
    found.sort(key=lambda importance: -importance.share)
    least = sorted((score for _, score in scores), reverse=True)[top - 1]
    return Importances(tuple(found), len(scores), sum(score >= least for _, score in scores))


def _percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def _divergences(axes: Sequence[Axis], scores: Sequence[tuple[Point, float]], top: int) -> dict[str, float]:
    """How far the best points' distribution lies from that of all, by setting."""
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    ranges = {axis.name: _distribution(axis, [point for point, _ in scores]) for axis in axes}
    for point, score in scores:
        own = {name: value for name, value in point.values.items() if name in ranges}
        study.add_trial(
            optuna.create_trial(params=own, distributions={name: ranges[name] for name in own}, value=score)
        )
    evaluator = PedAnovaImportanceEvaluator(target_quantile=top / len(scores))
    with warnings.catch_warnings():
        # Optuna calls shares that are not made to sum to 1 experimental, and says so each time.
        warnings.simplefilter("ignore")
        found = get_param_importances(study, evaluator=evaluator, normalize=False)
    return {axis.name: float(found.get(axis.name, 0.0)) for axis in axes}


def _distribution(axis: Axis, points: Sequence[Point]) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.values is not None or axis.low is None or axis.high is None:
        seen = [point.values[axis.name] for point in points if axis.name in point.values]
        return CategoricalDistribution(list(axis.values or dict.fromkeys(seen)))
    if axis.integer:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log, step=int(axis.step or 1))
    return FloatDistribution(axis.low, axis.high, log=axis.log, step=axis.step)


def importance_figure(sweep: Sweep) -> FigureData[Bars]:
    """A bar for each varied setting, a panel for each goal.

    Raises:
        TooFewPoints, NothingToDraw: as importances_of.
    """
    panels, leading = [], []
    for index, goal in enumerate(sweep.goals):
        found = importances_of(sweep, goal=index)
        panels.append(
            Bars(
                goal.column.heading if len(sweep.goals) > 1 else "",
                "share of all importance",
                tuple(Bar(i.name, i.share, i.low, i.high, i.chance) for i in found.found),
                value_label="importance",
                interval_label="90 % of 100 resamplings",
                chance_label="chance: 95 % of 100 shufflings stay below",
            )
        )
        leading.append(f"{found.found[0].name} ({found.found[0].share:.0%})")
    stopped = len(sweep.of("stopped"))
    behind = f", {stopped} stopped early that count as behind the finished ones" if stopped else ""
    clear = [bar.name for panel in panels for bar in panel.bars if bar.chance and bar.value > bar.chance]
    return FigureData(
        IMPORTANCE_FIGURE,
        tuple(panels),
        f"PED-ANOVA on {found.points} points{behind}: how far the settings of the best {found.top} lie from "
        "those of all. A bar that does not pass the mark of chance cannot be told from no influence.",
        wide=True,
        alt=f"Importance of each setting. First: {', '.join(leading)}. "
        + (f"Above chance: {', '.join(dict.fromkeys(clear))}." if clear else "None is above chance."),
    )


COST_FIGURE = "seconds_by_part"
_UNITS = (("CPU-hours", 1.0), ("CPU-minutes", 60.0), ("CPU-seconds", 3600.0))
PARTS = ("train", "data", "evaluate", "checkpoint", "report")
"""Parts of a training loop's time, in the order shown."""
STOPPED, BEFORE = "stopped early", "runs before"


@dataclass(frozen=True)
class Costs:
    """Sums over trials, and over the runs that came before them. Times are those of the training loops, as
    the runs wrote them down."""

    wall_seconds: float | None
    """From start to end, all starts together; None while nobody has written it."""
    seconds: float
    """Of all trials that know it."""
    first_seconds: float
    """Of the runs that came before trials: teachers, students to start from."""
    firsts: int
    """How many those are."""
    cpu_hours: float
    gpu_hours: float
    money: float | None
    """None where the search space states no price."""
    parts: Mapping[str, float]
    """CPU-hours by part of finished trials, of those that were stopped early, and of the runs before."""
    unknown: int
    """Trials whose time is not known: failed, or under way."""
    seconds_per_epoch: float | None
    """Of all trials that know their time."""
    saved_epochs: float
    """Epochs that early stopping left out, those of seeds that never began included."""

    @property
    def saved_seconds(self) -> float:
        """Time that the left-out epochs would have taken, at the mean of those that ran."""
        return self.saved_epochs * (self.seconds_per_epoch or 0.0)


def costs_of(sweep: Sweep) -> Costs:
    """What the sweep has cost so far."""
    timed = [(trial, trial.seconds) for trial in sweep.trials if trial.seconds is not None]
    first = [(record, number(record, "seconds") or 0.0) for record in sweep.firsts]
    cpu = sum(seconds * _cpus(_known(trial)) for trial, seconds in timed)
    cpu += sum(seconds * _cpus(record.hardware) for record, seconds in first)
    gpu = sum(seconds * _gpus(sweep, trial) for trial, seconds in timed)
    if sweep.trials:
        gpu += sum(seconds for _, seconds in first) * _gpus(sweep, sweep.trials[0])
    cpu, gpu = cpu / 3600, gpu / 3600
    prices = sweep.space.get("prices") or {}
    hour = {name: float(prices.get(name, 0.0)) for name in ("cpu_hour", "gpu_hour")}
    epochs = sum(trial.epoch for trial, _ in timed)
    seconds = sum(seconds for _, seconds in timed)
    wall = sweep.plan.get("seconds")
    return Costs(
        wall_seconds=float(wall) if isinstance(wall, int | float) else None,
        seconds=seconds,
        first_seconds=sum(seconds for _, seconds in first),
        firsts=len(first),
        cpu_hours=cpu,
        gpu_hours=gpu,
        money=cpu * hour["cpu_hour"] + gpu * hour["gpu_hour"] if any(hour.values()) else None,
        parts=_parts(sweep),
        unknown=len(sweep.trials) - len(timed),
        seconds_per_epoch=seconds / epochs if epochs else None,
        saved_epochs=_saved_epochs(sweep),
    )


def _parts(sweep: Sweep) -> dict[str, float]:
    parts: dict[str, float] = {}
    for trial in sweep.trials:
        share = _cpus(_known(trial)) / 3600
        if trial.record:
            for name, seconds in trial.record.seconds.items():
                if name != "total":
                    parts[name] = parts.get(name, 0.0) + seconds * share
        elif trial.seconds is not None:
            parts[STOPPED] = parts.get(STOPPED, 0.0) + trial.seconds * share
    for record in sweep.firsts:
        share = _cpus(record.hardware) / 3600
        parts[BEFORE] = parts.get(BEFORE, 0.0) + (number(record, "seconds") or 0.0) * share
    last = (STOPPED, BEFORE)
    order = [*PARTS, *(name for name in parts if name not in (*PARTS, *last)), *last]
    return {name: parts[name] for name in order if name in parts}


def _saved_epochs(sweep: Sweep) -> float:
    saved = 0.0
    for point in sweep.of("stopped"):
        saved += sum(max(0.0, t.epochs - t.epoch) for t in point.trials if t.state == "stopped")
        saved += (len(sweep.seeds) - len(point.trials)) * point.trials[0].epochs
    return saved


def _cpus(hardware: Mapping[str, Any]) -> float:
    return float(hardware.get("threads") or 1) * float(hardware.get("workers") or 1)


def _gpus(sweep: Sweep, trial: Trial) -> float:
    """GPUs of a trial: what sweep.json says that it was given, else the space's share for each worker.

    Early-ended trials leave no record; they ran where the others did.
    """
    place = sweep.plan.get("place")
    if isinstance(place, dict) and "gpus" in place:
        return float(place["gpus"])
    devices = {str(t.record.hardware.get("device", "cpu")) for t in sweep.trials if t.record}
    if devices <= {"cpu"}:
        return 0.0
    return float(sweep.space.get("gpus") or 1.0) * float(_known(trial).get("workers") or 1)


def _known(trial: Trial) -> Mapping[str, Any]:
    """What a trial ran with: its record's hardware, and its settings where that says nothing."""
    return {**trial.settings, **(trial.record.hardware if trial.record else {})}


def cost_figure(sweep: Sweep) -> FigureData[Bars]:
    """What the trials' time went into.

    Raises:
        NothingToDraw: no trial has written its time down.
    """
    parts = costs_of(sweep).parts
    if not parts:
        raise NothingToDraw("no trial has written down its time yet")
    largest = max(parts.values())
    unit, factor = next(pair for pair in _UNITS if largest * pair[1] >= 1 or pair == _UNITS[-1])
    return FigureData(
        COST_FIGURE,
        (Bars("", unit, tuple(Bar(name, hours * factor) for name, hours in parts.items())),),
        "Processor time of all trials by what it went into; of trials that were stopped early, and of the "
        "runs that came before trials (teachers, students to start from), the sum.",
        wide=True,
        alt=f"{unit} by part: " + ", ".join(f"{name} {hours * factor:.3g}" for name, hours in parts.items()),
    )
