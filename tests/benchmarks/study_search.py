"""Does a search pay? TPE with ASHA, TPE, chance and the whole grid on a grid sweep's own curves: the best
metric found for the trial-epochs spent.

    python -m tests.benchmarks.study_search --sweep runs/grid --noise runs/seeds --repeats 5 --out study

Nothing is trained: each search is replayed on the curves of a finished grid sweep
(`newsbert_ray.tune.replay`), with the sweep's own sampler, jobs and early stopping. `--noise` is a sweep of
some of the grid's points with several seeds, or a number (`--noise-source` then says where it comes from).
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from newsbert_ray.record import find_records, read_record, write_text
from newsbert_ray.reporting.drawing import write_figure
from newsbert_ray.reporting.panels import FigureData, Line, Panel
from newsbert_ray.tune.jobs import TRIALS, metric_value
from newsbert_ray.tune.replay import Replay, Table, read_table, replay
from newsbert_ray.tune.space import Search, SearchSpace, Stopping, flatten, point_label

SHARE = 1 / 3
"""The share of the grid's budget at which the goal is judged."""
MARKS = 12
"""Budgets that are drawn, evenly up to the whole grid's; the third is among them."""


@dataclass(frozen=True)
class Noise:
    """Standard deviation over seeds, and what it was measured on."""

    sd: float
    source: str


def main() -> None:
    """Replay, print the table, write it with the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sweep", required=True, help="folder of a finished grid sweep")
    parser.add_argument("--metric", default="validation.student.accuracy", help="what points are judged by")
    parser.add_argument(
        "--noise", required=True, help="folder of a sweep with seeds, or a standard deviation"
    )
    parser.add_argument("--noise-source", default="given", help="where a number for --noise comes from")
    parser.add_argument("--repeats", type=int, default=5, help="seeds of each search")
    parser.add_argument("--slots", type=int, default=2, help="trials at once")
    parser.add_argument("--title", default="", help="what the figure's panel is called, such as the corpus")
    parser.add_argument("--out", required=True, help="folder for study.md and the figure")
    options = parser.parse_args()
    table = read_table(options.sweep, metric=options.metric)
    noise = seed_noise(options.noise, table, source=options.noise_source)
    found = {
        name: [replay(table, space, slots=options.slots, epochs=table.epochs) for space in spaces]
        for name, spaces in searches(table, repeats=options.repeats).items()
    }
    text = report(table, found, noise)
    print(text)
    out = Path(options.out)
    write_text(out / "study.md", text)
    for path in write_figure(figure(table, found, noise, title=options.title), out):
        print(path)


def searches(table: Table, *, repeats: int) -> dict[str, list[SearchSpace]]:
    """The searches that are compared, each once for every seed; all may go on to the whole grid's budget."""
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
    """Every point once, in an order of chance: how far a grid is before it has ended."""
    points = table.points
    random.Random(seed).shuffle(points)
    return table.space(Search(sampler="random", trials=len(points)), start=points)


def seed_noise(given: str, table: Table, *, source: str) -> Noise:
    """The spread over seeds: of the grid's best point if it was run with several, else of all that were."""
    try:
        return Noise(float(given), source)
    except ValueError:
        pass
    values: dict[str, list[float]] = {}
    names = [axis.name for axis in table.axes]
    for folder in find_records(Path(given) / TRIALS):
        record = read_record(folder)
        flat = flatten(record.settings)
        label = point_label({name: flat[name] for name in names})
        values.setdefault(label, []).append(metric_value(record, table.metric))
    several = {label: found for label, found in values.items() if len(found) > 1}
    if not several:
        raise SystemExit(f"{given}: no point there was run with several seeds")
    best = _best(table)
    if best in several:
        return Noise(statistics.stdev(several[best]), f"{len(several[best])} seeds of the grid's best point")
    pooled = statistics.fmean(statistics.variance(found) for found in several.values()) ** 0.5
    return Noise(
        pooled, f"{len(several)} points with {min(map(len, several.values()))} seeds or more, pooled"
    )


def _means(table: Table) -> Mapping[str, float]:
    return {
        point_label(point): statistics.fmean(
            table.trials[point_label(point, seed=seed)].value for seed in table.seeds
        )
        for point in table.points
    }


def _best(table: Table) -> str:
    means = _means(table)
    return max(means, key=lambda label: means[label])


def report(table: Table, found: Mapping[str, Sequence[Replay]], noise: Noise) -> str:
    """The study as Markdown: what each search had found at a third of the grid's budget, and when it was as
    good as the grid."""
    best = _best(table)
    top, third = _means(table)[best], SHARE * table.epochs
    repeats = len(next(iter(found.values())))
    lines = [
        f"Grid: {len(table.points)} points, {len(table.trials)} trials, {table.epochs:g} trial-epochs. Best: "
        f"`{best}`, {table.metric} {top:.4f}; seed noise (sd) {noise.sd:.4f}, {noise.source}.",
        "",
        f"Best found at {third:g} trial-epochs (a third of the grid's), {repeats} repeats; the goal is the "
        f"grid's best less its seed noise, {top - noise.sd:.4f}:",
        "",
        "| search | mean | min | max | goal met by the mean | goal met, repeats | trial-epochs to the goal, "
        "median |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, replays in found.items():
        values = [one.best_at(third) for one in replays]
        mean, met = statistics.fmean(values), sum(value >= top - noise.sd for value in values)
        needed = statistics.median(one.epochs_to(top - noise.sd) for one in replays)
        lines.append(
            f"| {name} | {mean:.4f} | {min(values):.4f} | {max(values):.4f} | "
            f"{'yes' if mean >= top - noise.sd else 'no'} | {met} of {repeats} | "
            f"{needed:g} ({needed / table.epochs:.0%} of the grid's) |"
        )
    return "\n".join(lines) + "\n"


def figure(
    table: Table, found: Mapping[str, Sequence[Replay]], noise: Noise, *, title: str
) -> FigureData[Panel]:
    """Best metric found over trial-epochs: mean and standard deviation over the repeats, in per cent."""
    budgets = [table.epochs * mark / MARKS for mark in range(1, MARKS + 1)]
    lines = []
    for name, replays in found.items():
        values = [[100 * one.best_at(budget) for one in replays] for budget in budgets]
        means, sds = zip(*((statistics.fmean(v), _sd(v)) for v in values), strict=True)
        lines.append(Line(name, tuple(budgets), means, sds, tuple(len(replays) for _ in budgets)))
    top, third = 100 * _means(table)[_best(table)], SHARE * table.epochs
    goal = top - 100 * noise.sd
    for label, x, y in (
        ("grid's best", (budgets[0], budgets[-1]), (top, top)),
        ("goal", (budgets[0], third, third), (goal, goal, top)),
    ):
        lines.append(Line(label, x, y, (None,) * len(x), (1,) * len(x), reference=True))
    name = table.metric.replace(".", " ").replace("validation student", "validation")
    panel = Panel(title, "trial-epochs spent", f"best {name} found (%)", tuple(lines))
    caption = (
        f"{len(table.points)} points, {table.epochs:g} trial-epochs; mean ± sd over "
        f"{len(next(iter(found.values())))} repeats. Goal: the grid's best within its seed noise "
        f"({100 * noise.sd:.2f} points) at a third of its cost ({third:g})."
    )
    return FigureData("search_study", (panel,), caption)


def _sd(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


if __name__ == "__main__":
    main()
