"""Numbers over many runs: which differences are significant (Welch's t-test over seeds, corrected; the paper
repeats each experiment five times and marks p < 0.01), which settings matter, what a sweep cost."""

from __future__ import annotations

import math
import random
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from newsbert_ray.config import SettingsError
from newsbert_ray.methods import TASKS
from newsbert_ray.reporting.figures import Bar, Bars, FigureData, NothingToDraw, span
from newsbert_ray.reporting.page import Table
from newsbert_ray.reporting.sweep_data import Axis, Point, Sweep
from newsbert_ray.reporting.tables import Column, Row, Summary, number, student_columns

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

MIN_SEEDS = 3
"""With fewer seeds there is no p-value: the estimate of the spread would be too poor."""
LEVEL = 0.01
"""The paper's level of significance."""
MARK = "*"


class Against(NamedTuple):
    """The rows that others are compared with: those in which `setting` has the `value` (as text)."""

    setting: str
    value: str

    def __str__(self) -> str:
        return f"{self.setting} {self.value}"


def read_against(text: str) -> Against:
    """`method=newsbert` -> Against; SettingsError where the text has another form."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise SettingsError(f"--against {text}: expected SETTING=VALUE, such as method=newsbert")
    return Against(name.strip(), value.strip())


def default_base(rows: Sequence[Row]) -> Against | None:
    """What others are compared with by default: newsbert, as in the paper, or else finetune, or None."""
    methods = {row.settings.get("method") for row in rows} - {None}
    bases = [Against("method", name) for name in ("newsbert", "finetune") if name in methods]
    return bases[0] if bases and len(methods) > 1 else None


@dataclass(frozen=True)
class Comparison:
    """A row and the row it is compared with, in one column. A p is two-sided, and None for too few seeds."""

    row: Row
    base: Row
    difference: float
    """Of the means, row minus base, as in the record (shares from 0 to 1)."""
    p: float | None
    """Of Welch's t-test; None also where there is no spread at all."""
    corrected: float | None
    """After Holm's correction over the column."""
    paired: float | None
    """Of the paired t-test: a seed gives both rows the same batches and the same initial weights."""

    @property
    def significant(self) -> bool:
        """Whether the corrected p is below LEVEL."""
        return self.corrected is not None and self.corrected < LEVEL

    def show(self, column: Column) -> str:
        """`-0.42 (p 0.012, 0.048)`; without a p the reason."""
        difference = f"{self.difference * column.factor:+.2f}"
        if self.p is None or self.corrected is None:
            seeds = min(len(self.row.seeds), len(self.base.seeds))
            few = f"{seeds} seed{'s' if seeds > 1 else ''}: too few" if seeds < MIN_SEEDS else "no spread"
            return f"{difference} ({few})"
        p, corrected, paired = (
            "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"
            for value in (self.p, self.corrected, self.paired)
        )
        mark = MARK if self.significant else ""
        return f"{difference}{mark} (p {p}, {corrected}{f'; paired {paired}' if paired else ''})"


def compare_rows(rows: Sequence[Row], column: Column, against: Against) -> list[Comparison]:
    """Every row with the column against the one that differs from it only in the compared setting."""

    def others(row: Row) -> str:
        return repr({name: value for name, value in row.settings.items() if name != against.setting})

    known = [row for row in rows if column.name in row.columns]
    bases = {others(row): row for row in known if str(row.settings.get(against.setting)) == against.value}
    pairs = [(row, base) for row in known if (base := bases.get(others(row))) and base is not row]
    summaries = [(row.columns[column.name], base.columns[column.name]) for row, base in pairs]
    tests = [welch(one, other) for one, other in summaries]
    corrected = iter(holm([p for p in tests if p is not None]))
    return [
        Comparison(*pair, a.mean - b.mean, p, None if p is None else next(corrected), paired_test(a, b))
        for pair, (a, b), p in zip(pairs, summaries, tests, strict=True)
    ]


def welch(one: Summary, other: Summary) -> float | None:
    """Two-sided p that two means are equal, with unknown and unequal variances (Welch 1947). None for fewer
    than MIN_SEEDS values on a side, or where neither side has a spread."""
    from scipy.stats import ttest_ind_from_stats  # type: ignore[import-untyped]

    if min(one.n, other.n) < MIN_SEEDS or not (one.sd or other.sd):
        return None
    test = ttest_ind_from_stats(one.mean, one.sd, one.n, other.mean, other.sd, other.n, equal_var=False)
    return None if math.isnan(test.pvalue) else float(test.pvalue)


def paired_test(one: Summary, other: Summary) -> float | None:
    """Two-sided p that the mean difference of a seed is 0 (Student's paired t-test). None for fewer than
    MIN_SEEDS common seeds, or where all differences are equal."""
    from scipy.stats import ttest_rel

    seeds = sorted(one.by_seed.keys() & other.by_seed.keys())
    values = [[summary.by_seed[seed] for seed in seeds] for summary in (one, other)]
    differences = {round(a - b, 12) for a, b in zip(*values, strict=True)}
    if len(seeds) < MIN_SEEDS or len(differences) < 2:
        return None
    return float(ttest_rel(*values).pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected so that any false one is below a level with at most that chance (Holm 1979)."""
    order, corrected = np.argsort(values, kind="stable"), np.empty(len(values))
    products = np.arange(len(values), 0, -1) * np.asarray(values, np.float64)[order]
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(products))
    return [float(p) for p in corrected]


def significance_table(rows: Sequence[Row], against: Against, *, tuned: Sequence[str] = ()) -> Table | None:
    """The difference of each row, of one task, to its base in each of the student's metrics; None without
    any. `tuned`: settings that each method has its own value of. SettingsError without such a base."""
    known = {str(row.settings[against.setting]) for row in rows if against.setting in row.settings}
    if against.value not in known:
        here = f"it is {', '.join(sorted(known))} here" if known else "it does not vary here"
        raise SettingsError(f"--against {against.setting}={against.value}: no row has it; {here}")
    columns = student_columns(TASKS[rows[0].task])
    cells: dict[int, list[str]] = {}
    for index, column in enumerate(columns):
        for comparison in compare_rows(rows, column, against):
            line = cells.setdefault(rows.index(comparison.row), [""] * len(columns))
            line[index] = comparison.show(column)
    if not cells:
        return None
    names, counts = list(rows[0].settings), {len(row.seeds) for row in rows}
    seeds = f"{span(counts)} seed{'' if max(counts) == 1 else 's'}"
    own = f" except {', '.join(tuned)}, tuned for each method" if tuned else ""
    return Table(
        (*names, *(f"{column.label}, points" for column in columns)),
        tuple((*map(str, rows[index].settings.values()), *line) for index, line in sorted(cells.items())),
        words=len(names),
        caption=f"Difference to {against} (all else equal{own}), {seeds} per row, in points. p: Welch's "
        f"t-test over seeds, then the same after Holm's correction over the column ({MARK} below {LEVEL:g}); "
        "paired: t-test over the differences of each seed, uncorrected. The tests show whether other seeds "
        "would change the order, not whether other news would.",
    )


MIN_POINTS, MIN_FINISHED = 10, 5
"""Points needed to compare settings. At least MIN_FINISHED points count as the best."""
REPEATS = 100
"""Bootstrap samples and shuffles."""


def importances_of(sweep: Sweep, *, goal: int = 0) -> tuple[tuple[Bar, ...], int, int]:
    """How much each varied setting decides whether a point is among the best (PED-ANOVA). Points that were
    stopped early count as worse than all finished ones: without them a setting whose bad values were all
    stopped would seem not to matter.

    Returns a bar for each setting, the most important first: its share of the total, the 5th and 95th
    percentile over resampled points, and the 95th where the values are shuffled among the points (`chance`);
    how many points were compared; and how many of them count as the best."""
    finished, stopped = sweep.finished, sweep.of("stopped")
    if len(finished) + len(stopped) < MIN_POINTS or len(finished) < MIN_FINISHED:
        raise NothingToDraw(
            f"too few points to say which settings mattered: {len(finished)} finished, {len(stopped)} were "
            f"stopped early; {MIN_POINTS} are needed, {MIN_FINISHED} of them finished"
        )
    sign = sweep.goals[goal].sign
    scores = [(point, sign * point.mean(goal)) for point in finished]
    worst = min(score for _, score in scores)
    # Among stopped points the later and better ones come first, so that none are ties.
    stopped.sort(key=lambda p: (max(t.epoch for t in p.trials), sign * p.mean(goal)), reverse=True)
    scores += [(point, worst - rank) for rank, point in enumerate(stopped, 1)]
    axes = sweep.varied([point for point, _ in scores])
    if len(axes) < 2:
        raise NothingToDraw("fewer than two settings varied over the points: there is nothing to compare")
    top = min(len(finished), max(MIN_FINISHED, math.ceil(len(scores) / 10)))
    real = _divergences(axes, scores, top)
    total = real.sum() or 1.0
    resampled, shuffled = [], []
    generator = random.Random(0)
    for _ in range(REPEATS):
        again = _divergences(axes, [generator.choice(scores) for _ in scores], top)
        resampled.append(again / (again.sum() or 1.0))
        values = [score for _, score in scores]
        generator.shuffle(values)
        mixed = [(point, value) for (point, _), value in zip(scores, values, strict=True)]
        shuffled.append(_divergences(axes, mixed, top) / total)
    p5, p95 = int(0.05 * REPEATS), int(0.95 * REPEATS)
    low, high = np.sort(resampled, axis=0)[[p5, p95]]
    numbers = zip((real / total).tolist(), low, high, np.sort(shuffled, axis=0)[p95], strict=True)
    bars = [Bar(axis.name, *map(float, row)) for axis, row in zip(axes, numbers, strict=True)]
    threshold = sorted((score for _, score in scores), reverse=True)[top - 1]
    ranked = tuple(sorted(bars, key=lambda bar: -bar.value))
    return ranked, len(scores), sum(score >= threshold for _, score in scores)


def _divergences(axes: Sequence[Axis], scores: Sequence[tuple[Point, float]], top: int) -> np.ndarray:
    """Distance of the best points' distribution from that of all points, on each axis (PED-ANOVA)."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    ranges = {axis.name: _distribution(axis, [point for point, _ in scores]) for axis in axes}
    for point, score in scores:
        own = {name: value for name, value in point.values.items() if name in ranges}
        known = {name: ranges[name] for name in own}
        study.add_trial(optuna.create_trial(params=own, distributions=known, value=score))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=top / len(scores))
    with warnings.catch_warnings():
        # Optuna warns on each call that unnormalised importances are experimental.
        warnings.simplefilter("ignore")
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator, normalize=False)
    return np.array([shares.get(axis.name, 0.0) for axis in axes])


def _distribution(axis: Axis, points: Sequence[Point]) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.values is not None or axis.low is None or axis.high is None:
        seen = [point.values[axis.name] for point in points if axis.name in point.values]
        return CategoricalDistribution(list(axis.values or dict.fromkeys(seen)))
    if axis.integer:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log, step=int(axis.step or 1))
    return FloatDistribution(axis.low, axis.high, log=axis.log, step=axis.step)


def importance_figure(sweep: Sweep) -> FigureData[Bars]:
    """A bar for each varied setting, a panel for each goal."""
    results = [importances_of(sweep, goal=goal) for goal in range(len(sweep.goals))]
    titles = [goal.column.heading for goal in sweep.goals] if len(sweep.goals) > 1 else [""]
    labels = ("importance", "90 % of 100 resamplings", "chance: 95 % of 100 shuffles stay below")
    titled = zip(titles, results, strict=True)
    panels = tuple(Bars(title, "share of the total importance", bars, labels) for title, (bars, *_) in titled)
    leading = [f"{bars[0].name} ({bars[0].value:.0%})" for bars, *_ in results]
    clear = dict.fromkeys(bar.name for p in panels for bar in p.bars if bar.chance and bar.value > bar.chance)
    stopped = len(sweep.of("stopped"))
    behind = f", of which {stopped} were stopped early and count as worse than the others" if stopped else ""
    caption = (
        f"PED-ANOVA on {results[0][1]} points{behind}: how much the settings of the best "
        f"{results[0][2]} differ from those of all points. A bar that ends before its mark of chance shows "
        "no influence."
    )
    above = f"Above chance: {', '.join(clear)}." if clear else "None is above chance."
    alt = f"Importance of each setting. First: {', '.join(leading)}. {above}"
    return FigureData("importances", panels, caption, wide=True, alt=alt)


_PARTS = ("train", "data", "evaluate", "checkpoint", "report")
_STOPPED, _PREREQUISITES = "stopped early", "prerequisites"


class Costs(NamedTuple):
    """What a sweep cost so far, by the times of the training loops; money is None without prices."""

    seconds: float
    prerequisite_seconds: float
    """Of the runs before the trials: teachers, students to start from."""
    cpu_hours: float
    gpu_hours: float
    money: float | None
    unknown: int
    """Trials without a known time: failed or unfinished."""
    seconds_per_epoch: float
    saved_epochs: float
    """Left out by early stopping, including those of seeds that never started."""


def costs_of(sweep: Sweep) -> Costs:
    timed = [(trial, trial.seconds) for trial in sweep.trials if trial.seconds is not None]
    before = sum(number(record, "seconds") or 0.0 for record in sweep.prerequisites)
    epochs, seconds = sum(trial.epoch for trial, _ in timed), sum(seconds for _, seconds in timed)
    hours = (seconds + before) / 3600
    cpu_hours, gpu_hours = hours * sweep.resources["cpus"], hours * sweep.resources["gpus"]
    prices = sweep.space.get("prices") or {}
    cpu_price, gpu_price = (float(prices.get(name, 0.0)) for name in ("cpu_hour", "gpu_hour"))
    money = cpu_hours * cpu_price + gpu_hours * gpu_price if cpu_price or gpu_price else None
    saved = 0.0
    for point in sweep.of("stopped"):
        saved += sum(max(0.0, t.epochs - t.epoch) for t in point.trials if t.state == "stopped")
        saved += (len(sweep.seeds) - len(point.trials)) * point.trials[0].epochs
    unknown, per_epoch = len(sweep.trials) - len(timed), seconds / epochs if epochs else 0.0
    return Costs(seconds, before, cpu_hours, gpu_hours, money, unknown, per_epoch, saved)


def cpu_hours_by_part(sweep: Sweep) -> dict[str, float]:
    """CPU-hours of the finished trials by part, of trials stopped early, and of prerequisites."""
    parts = defaultdict[str, float](float)
    for trial in sweep.trials:
        stopped = {_STOPPED: trial.seconds} if trial.seconds is not None else {}
        for name, seconds in (trial.record.seconds if trial.record else stopped).items():
            parts[name] += seconds
    for record in sweep.prerequisites:
        parts[_PREREQUISITES] += number(record, "seconds") or 0.0
    others = [name for name in parts if name not in (*_PARTS, _STOPPED, _PREREQUISITES, "total")]
    names = (name for name in (*_PARTS, *others, _STOPPED, _PREREQUISITES) if name in parts)
    return {name: parts[name] * sweep.resources["cpus"] / 3600 for name in names}


def cost_figure(sweep: Sweep) -> FigureData[Bars]:
    parts = cpu_hours_by_part(sweep)
    if not parts:
        raise NothingToDraw("no trial has recorded its time yet")
    units = {"CPU-hours": 1.0, "CPU-minutes": 60.0, "CPU-seconds": 3600.0}
    unit = next((unit for unit in units if max(parts.values()) * units[unit] >= 1), "CPU-seconds")
    bars = tuple(Bar(name, hours * units[unit]) for name, hours in parts.items())
    caption = (
        "Processor time of all trials by part; for trials that were stopped early, and for prerequisites "
        "(teachers, students to start from), the total."
    )
    alt = f"{unit} by part: " + ", ".join(f"{bar.name} {bar.value:.3g}" for bar in bars)
    return FigureData("seconds_by_part", (Bars("", unit, bars),), caption, wide=True, alt=alt)
