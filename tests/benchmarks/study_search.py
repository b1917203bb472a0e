"""Compares TPE with ASHA, TPE, random search and a grid on the recorded curves of a finished grid sweep.

    python -m tests.benchmarks.study_search --sweep runs/grid --noise runs/seeds --title MIND --out study

The measure is the best metric over the trial-epochs spent. Nothing is trained: each search is replayed on the
curves (`tests.benchmarks.replay`), with the sweep's own sampler, trials and early stopping. `--noise` is a
sweep of some points of the grid with several seeds, or a number (`--noise-source` then names its source).
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from newsbert_ray.files import write_text
from newsbert_ray.record import find_records, read_record
from newsbert_ray.reporting.draw import write_figure
from newsbert_ray.reporting.figures import FigureData, Line, Panel
from newsbert_ray.reporting.sweep_data import TRIALS, point_label
from newsbert_ray.settings import flatten
from newsbert_ray.tune.space import Search, SearchSpace, Stopping
from newsbert_ray.tune.trials import metric_value
from tests.benchmarks.replay import Replay, Table, read_table, replay

SHARE = 1 / 3
"""Share of the grid's budget at which the goal is checked."""
MARKS = 12
"""Number of budgets in the figure, evenly up to the whole grid's."""


@dataclass(frozen=True)
class Noise:
    """Standard deviation over seeds, and its source."""

    sd: float
    source: str


@dataclass(frozen=True)
class Study:
    """A grid, and the result of each search on it for every seed."""

    title: str
    table: Table
    noise: Noise
    replays: Mapping[str, Sequence[Replay]]

    @property
    def repeats(self) -> int:
        """Seeds of each search."""
        return len(next(iter(self.replays.values())))

    @property
    def third(self) -> float:
        """Trial-epochs at which the goal is checked."""
        return SHARE * self.table.epochs

    @property
    def best(self) -> str:
        """The grid's best point."""
        means = point_means(self.table)
        return max(means, key=lambda label: means[label])

    @property
    def top(self) -> float:
        """Metric of the grid's best point."""
        return point_means(self.table)[self.best]

    @property
    def goal(self) -> float:
        """Lowest metric within the seed noise of the grid's best."""
        return self.top - self.noise.sd


def main() -> None:
    """Replay, print the tables, and write them with the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sweep", nargs="+", required=True, help="folders of finished grid sweeps")
    parser.add_argument(
        "--noise", nargs="+", required=True, help="for each a sweep with seeds, or a standard deviation"
    )
    parser.add_argument("--noise-source", default="given", help="where a number for --noise comes from")
    parser.add_argument("--title", nargs="+", required=True, help="for each its title, such as the corpus")
    parser.add_argument("--metric", default="validation.student.accuracy", help="what points are judged by")
    parser.add_argument("--repeats", type=int, default=5, help="seeds of each search")
    parser.add_argument("--slots", type=int, default=2, help="trials at once")
    parser.add_argument("--out", required=True, help="folder for study.md and the figure")
    options = parser.parse_args()
    studies = []
    for sweep, folder_or_number, title in zip(options.sweep, options.noise, options.title, strict=True):
        table = read_table(sweep, metric=options.metric)
        noise = seed_noise(folder_or_number, table, source=options.noise_source)
        replays = {
            name: [replay(table, space, slots=options.slots, epochs=table.epochs) for space in spaces]
            for name, spaces in searches(table, repeats=options.repeats).items()
        }
        studies.append(Study(title, table, noise, replays))
        print(report(studies[-1]), flush=True)
    out = Path(options.out)
    write_text(out / "study.md", "\n".join(map(report, studies)))
    for path in write_figure(figure(studies), out):
        print(path)


def searches(table: Table, *, repeats: int) -> dict[str, list[SearchSpace]]:
    """The searches, each once for every seed, with the whole grid's budget."""
    trials = 5 * len(table.points)  # points chosen again count among them, and cost nothing
    asha = Stopping(scheduler="asha")
    seeds = range(repeats)
    return {
        "TPE + ASHA": [
            table.space(Search(sampler="tpe", trials=trials, seed=seed), stopping=asha) for seed in seeds
        ],
        "TPE": [table.space(Search(sampler="tpe", trials=trials, seed=seed)) for seed in seeds],
        "random": [table.space(Search(sampler="random", trials=trials, seed=seed)) for seed in seeds],
        "full grid": [_shuffled(table, seed) for seed in seeds],
    }


def _shuffled(table: Table, seed: int) -> SearchSpace:
    """The grid in random order, every point once."""
    points = table.points
    random.Random(seed).shuffle(points)
    return table.space(Search(sampler="random", trials=len(points)), start=points)


def seed_noise(folder_or_number: str, table: Table, *, source: str) -> Noise:
    """Spread over seeds: of the grid's best point if it has several seeds, else of all points that have."""
    try:
        return Noise(float(folder_or_number), source)
    except ValueError:
        pass
    values: dict[str, list[float]] = {}
    names = [axis.name for axis in table.axes]
    for folder in find_records(Path(folder_or_number) / TRIALS):
        record = read_record(folder)
        flat = flatten(record.settings)
        label = point_label({name: flat[name] for name in names})
        values.setdefault(label, []).append(metric_value(record, table.metric))
    several = {label: replays for label, replays in values.items() if len(replays) > 1}
    if not several:
        raise SystemExit(f"{folder_or_number}: no point there was run with several seeds")
    means = point_means(table)
    if (best := max(means, key=lambda label: means[label])) in several:
        return Noise(statistics.stdev(several[best]), f"{len(several[best])} seeds of the grid's best point")
    pooled = statistics.fmean(map(statistics.variance, several.values())) ** 0.5
    return Noise(
        pooled, f"{len(several)} points with {min(map(len, several.values()))} seeds or more, pooled"
    )


def point_means(table: Table) -> dict[str, float]:
    """Each point's metric, the mean over the grid's seeds."""
    return {
        point_label(point): statistics.fmean(
            table.trials[point_label(point, seed=seed)].value for seed in table.seeds
        )
        for point in table.points
    }


def report(study: Study) -> str:
    """The study as Markdown: the best metric of each search at a third of the grid's budget, and when it
    reached the grid's best."""
    table, noise, goal = study.table, study.noise, study.goal
    lines = [
        f"{study.title}: {len(table.points)} points, {len(table.trials)} trials, {table.epochs:g} "
        f"trial-epochs. Best: `{study.best}`, {table.metric} {study.top:.4f}; seed noise (sd) "
        f"{noise.sd:.4f}, {noise.source}.",
        "",
        f"Best found at {study.third:g} trial-epochs (a third of the grid's), {study.repeats} repeats; the "
        f"goal is the grid's best less its seed noise, {goal:.4f}:",
        "",
        "| search | mean | min | max | mean meets the goal | repeats that meet it | "
        "trial-epochs to the goal, median |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, replays in study.replays.items():
        values = [one.best_at(study.third) for one in replays]
        mean, met = statistics.fmean(values), sum(value >= goal for value in values)
        needed = statistics.median(one.epochs_to(goal) for one in replays)
        lines.append(
            f"| {name} | {mean:.4f} | {min(values):.4f} | {max(values):.4f} | "
            f"{'yes' if mean >= goal else 'no'} | {met} of {study.repeats} | "
            f"{needed:g} ({needed / table.epochs:.0%} of the grid's) |"
        )
    return "\n".join(lines) + "\n"


def figure(studies: Sequence[Study]) -> FigureData[Panel]:
    """Best metric found over trial-epochs: mean and standard deviation over the repeats, in per cent."""
    goals = [
        f"{study.title} {100 * study.noise.sd:.2f} points, {study.third:g} of {study.table.epochs:g}"
        for study in studies
    ]
    caption = (
        f"Mean ± sd over {studies[0].repeats} repeats; the full grid's points are in random order. "
        "Goal: the grid's best within its seed noise at a third of its trial-epochs "
        f"({'; '.join(goals)}). Replayed on the grids' own curves."
    )
    return FigureData("search_study", tuple(map(_panel, studies)), caption)


def _panel(study: Study) -> Panel:
    epochs = study.table.epochs
    budgets = tuple(epochs * mark / MARKS for mark in range(1, MARKS + 1))
    lines = []
    for name, replays in study.replays.items():
        values = [[100 * one.best_at(budget) for one in replays] for budget in budgets]
        means, sds = zip(*((statistics.fmean(v), _sd(v)) for v in values), strict=True)
        lines.append(Line(name, budgets, means, sds, tuple(len(replays) for _ in budgets)))
    top, goal, third = 100 * study.top, 100 * study.goal, study.third
    for label, x, y in (
        ("grid's best", (budgets[0], budgets[-1]), (top, top)),
        ("goal", (budgets[0], third, third), (goal, goal, top)),
    ):
        lines.append(Line(label, x, y, (None,) * len(x), (1,) * len(x), look="reference"))
    name = study.table.metric.replace(".student.", " ").replace("_", "-")
    return Panel(study.title, "trial-epochs spent", f"best {name} found (%)", tuple(lines))


def _sd(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


if __name__ == "__main__":
    main()
