"""What a sweep came to, and what it says to a person: at its start, and at its end. Knows no Ray."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from newsbert_ray import storage
from newsbert_ray.config import merge
from newsbert_ray.record import RECORD, read_record
from newsbert_ray.tune import space as spaces
from newsbert_ray.tune.jobs import FAILURES, TRIALS, Jobs, PointResult
from newsbert_ray.tune.keeping import Keeper, pareto_front
from newsbert_ray.tune.place import Place
from newsbert_ray.tune.space import SearchSpace
from newsbert_ray.tune.storage import JOURNAL, shown_storage

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class SweepResult:
    """What a sweep came to.

    `out` is its folder on this machine, `place` what the user calls it; `command` trains the best point
    again, empty where no trial finished.
    """

    out: Path
    place: str | Path
    space: SearchSpace
    points: tuple[PointResult, ...]
    best: PointResult | None
    command: str
    seconds: float
    report: tuple[Path, ...]

    @property
    def failures(self) -> dict[str, str]:
        """Why trials failed, by trial."""
        return {
            spaces.point_label(point.point, seed=seed): reason
            for point in self.points
            for seed, reason in point.failures.items()
        }


def opening(jobs: Jobs) -> list[str]:
    """What the sweep is, before it starts."""
    space = jobs.space
    axes = ", ".join(axis.name for axis in space.axes) or "nothing"
    early = {"asha": "asha by epoch", "median": "the median rule by epoch", "none": "none"}[space.scheduler]
    lines = [
        f"{space.name}: {space.points} points over {axes} by {space.search.sampler}, "
        f"seeds {', '.join(map(str, space.seeds))}: {jobs.total} trials in {jobs.place}",
        f"judged by {', '.join(f'{goal.metric} ({goal.mode})' for goal in space.goals)}; "
        f"early stopping: {early}" + (" (several goals run without)" if len(space.goals) > 1 else ""),
    ]
    if jobs.found:
        lines.append(f"{jobs.found} of them had ended before")
    return lines


def starting(jobs: Jobs, place: Place, dashboard: str | None) -> list[str]:
    """What stands on the screen while the trials run: how to watch, to stop and to go on."""
    many = f"{place.slots} trials at once" if place.slots > 1 else "one trial after another"
    workers = f", {place.workers} Ray Train workers each" if place.nested else ""
    lines = [
        f"{many}{workers}; Ctrl-C ends the sweep, and it goes on with:",
        f"  {resume_command(jobs.space, jobs.place)}",
        *watching(jobs),
    ]
    return lines + ([f"Ray's dashboard: {dashboard}"] if dashboard else [])


def watching(jobs: Jobs) -> list[str]:
    """Commands that show the sweep in a browser, while it runs and after."""
    storage = jobs.space.search.storage
    study = shown_storage(storage) if storage else str(jobs.folder / JOURNAL)
    return [
        f"watch: tensorboard --logdir {jobs.folder / TRIALS}   (SCALARS and HPARAMS)",
        f"       optuna-dashboard {study}",
    ]


def finished(out: Path, points: Iterable[PointResult]) -> list[Path]:
    """Folders of the trials that have values; a failed one may hold half a record."""
    folders = [out / TRIALS / spaces.point_label(p.point, seed=seed) for p in points for seed in p.values]
    return [folder for folder in folders if (folder / RECORD).exists()]


def close(result: SweepResult, jobs: Jobs, keeper: Keeper | None, console: Console, *, planned: str) -> None:
    """The table, what ended early, the failures, the best point as a command, and where things are."""
    records = [read_record(folder) for folder in finished(result.out, result.points)]
    if records:
        from newsbert_ray.reporting.terminal import sweep_table

        seeds = len(result.space.seeds)
        console.print(sweep_table(records, metric=result.space.metric, mode=result.space.mode, seeds=seeds))
    for line in [*_outcome(result, jobs), *_best_lines(result)]:
        say(console, line)
    if keeper:
        say(console, keeper.line())
    html = [str(path) for path in result.report if path.suffix == ".html"]
    say(console, f"{result.seconds:.0f} s in all; report: {html[0] if html else result.out / 'report'}")
    for line in [planned, *watching(jobs)] if planned else watching(jobs):
        say(console, line)


def _outcome(result: SweepResult, jobs: Jobs) -> list[str]:
    stops = sum(len(point.stops) for point in result.points)
    skipped = sum(len(point.skipped) for point in result.points)
    lines = []
    if stops:
        seeds = f", {skipped} further seeds of theirs not begun" if skipped else ""
        lines.append(f"{stops} trials stopped early by {jobs.space.scheduler}{seeds}")
    if jobs.closed:
        lines.append(f"ended before its last trial, {jobs.unfinished} not begun: {jobs.closed}")
        lines.append(f"  go on with a wider limit: {resume_command(result.space, result.place)}")
    lines += [f"failed: {trial}: {reason}" for trial, reason in result.failures.items()]
    if result.failures:
        again = resume_command(result.space, result.place)
        lines.append(f"frames in {storage.join(result.place, FAILURES)}; try them again with: {again}")
    return lines


def _best_lines(result: SweepResult) -> list[str]:
    if result.best is None:
        return ["no trial finished"]
    lines = []
    if len(result.space.goals) > 1:
        lines.append("Pareto front (no other point is as good in every goal and better in one):")
        names = [goal.metric for goal in result.space.goals]
        for point in front(result.space, result.points):
            numbers = ", ".join(f"{n} {v:.4g}" for n, v in zip(names, point.means, strict=True))
            lines.append(f"  {point.label}: {numbers}")
    sd = f" (sd {result.best.sd:.4f})" if len(result.best.values) > 1 else ""
    lines.append(
        f"best: {result.best.label}, {result.space.metric} {result.best.mean:.4f}{sd}; train it again with:"
    )
    return [*lines, f"  {result.command}"]


def front(space: SearchSpace, points: Iterable[PointResult]) -> list[PointResult]:
    """The points with all seeds that make the Pareto front, the best by the first goal first."""
    whole = [point for point in points if len(point.values) == len(space.seeds)]
    signs = [1.0 if goal.mode == "max" else -1.0 for goal in space.goals]
    signed = [tuple(s * v for s, v in zip(signs, point.means, strict=True)) for point in whole]
    return [whole[i] for i in sorted(pareto_front(signed), key=lambda i: signed[i], reverse=True)]


def train_command(
    space: SearchSpace, best: PointResult, overrides: Mapping[str, Any], out: str | Path
) -> str:
    """The command that trains the best point again, with the first seed."""
    settings = spaces.flatten(spaces.absolute_folders(merge(space.settings, overrides, best.point)))
    settings |= {"seed": space.seeds[0], "out": str(storage.join(out, "best"))}
    words = [word for name, value in settings.items() for word in (f"--{name}", _word(value))]
    return shlex.join(["newsbert-ray", "train", *words])


def resume_command(space: SearchSpace, out: str | Path) -> str:
    """The command that goes on with the sweep; what else was asked stands in its folder."""
    return shlex.join(["newsbert-ray", "sweep", space.file, "--out", str(out), "--resume"])


def _word(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)


def say(console: Console, line: str) -> None:
    """One line, as it is: no markup, no colours, never broken."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
