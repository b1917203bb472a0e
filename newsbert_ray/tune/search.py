"""`newsbert-ray sweep`: the folder of a sweep, its trials on Ray, and what came of them."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from newsbert_ray.config import SettingsError, TrainSettings, merge
from newsbert_ray.connect import ray_session
from newsbert_ray.record import RECORD, read_record, write_json
from newsbert_ray.tune import space as spaces
from newsbert_ray.tune.jobs import TRIALS, Job, Jobs, PointResult
from newsbert_ray.tune.memory import JOURNAL, Memory
from newsbert_ray.tune.plan import SWEEP, claim_folder, make_plan, read_corpora, read_plan, require_same
from newsbert_ray.tune.space import SearchSpace
from newsbert_ray.tune.space_file import read_space

if TYPE_CHECKING:
    from rich.console import Console

    from newsbert_ray.tune.running import Place
    from newsbert_ray.tune.trial import Train

TRIALS_PER_GPU = 4
"""Trials that share a GPU where nothing else is asked for."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep came to. `command` trains the best point again; empty where no trial finished."""

    out: Path
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


def sweep(
    space: str | Path,
    *,
    out: str | Path,
    overrides: Mapping[str, Any] | None = None,
    vary: Mapping[str, Sequence[Any]] | None = None,
    resume: bool = False,
    concurrency: int | None = None,
    train: Train | None = None,
) -> SweepResult:
    """Run every trial of a search space, print its table, and write the report with its figures.

    Args:
        space: YAML file of the search space.
        out: folder of the sweep: sweep.json, optuna.journal, trials/, report/.
        overrides: training settings, nested or dotted, over the file's; one that varies is fixed by it.
        vary: other values for an axis, a new axis, or other `seeds`.
        resume: go on with the sweep in `out`, with its own overrides and axes where none are given; finished
            trials count once, others go on from their checkpoints, failed ones are tried again.
        concurrency: trials at once, at most; as many as CPUs and GPUs allow by default.
        train: what trains; `newsbert_ray.train` by default.
    Raises:
        SettingsError: the search space or a setting cannot be.
        SweepError: the folder holds another sweep, or one that was not asked to be resumed, or is in use.
        ConnectError: no Ray.
        KeyboardInterrupt: ended by Ctrl-C, tidily; what has finished counts, and a resume goes on.
    """
    from rich.console import Console

    if concurrency is not None and concurrency < 1:
        raise SettingsError(f"concurrency = {concurrency}: expected 1 or more")
    began, out, console = time.monotonic(), Path(out), Console()
    with claim_folder(out):
        before = read_plan(out)
        asked = {
            "overrides": spaces.absolute_folders(merge(overrides or {})),
            "vary": {name: list(values) for name, values in (vary or {}).items()},
        }
        if resume and before and not asked["overrides"] and not asked["vary"]:
            asked = {name: before[name] for name in asked}
        found, said = spaces.fix(spaces.vary(read_space(space), asked["vary"]), asked["overrides"])
        found = found.model_copy(update={"settings": spaces.absolute_folders(found.settings)})
        first = spaces.check_space(found, out=out, overrides=asked["overrides"])
        plan = make_plan(found, asked, first, corpora=read_corpora(found, first) if train is None else [])
        require_same(out, before, plan, resume=resume)
        plan["corpora"] = plan["corpora"] or before.get("corpora", [])
        write_json(out / SWEEP, {**plan, "state": "running"})
        jobs = Jobs(found, Memory(found, out), out)
        try:
            for line in [*said, *_opening(jobs, out)]:
                _say(console, line)
            _run(
                jobs,
                first,
                overrides=asked["overrides"],
                concurrency=concurrency,
                train=train,
                console=console,
            )
        except KeyboardInterrupt:
            _say(console, f"interrupted with {jobs.unfinished} of {jobs.total} trials to go; go on with:")
            _say(console, f"  {_resume_command(found, out)}")
            write_json(out / SWEEP, {**plan, "state": "interrupted"})
            raise
        except Exception:
            if not before and not (out / TRIALS).exists():
                _forget(out)
            raise
        result = _result(jobs, out, asked["overrides"], seconds=time.monotonic() - began)
        state = "finished with failures" if result.failures else "finished"
        write_json(out / SWEEP, {**plan, "state": state, "best": result.command})
    _close(result, console)
    return result


def _forget(out: Path) -> None:
    """Undo a sweep that ended before its first trial, so that the corrected command is not refused."""
    for name in (SWEEP, JOURNAL):
        (out / name).unlink(missing_ok=True)


def _run(
    jobs: Jobs,
    first: TrainSettings,
    *,
    overrides: Mapping[str, Any],
    concurrency: int | None,
    train: Train | None,
    console: Console,
) -> None:
    """Everything that is due, on Ray; without starting Ray where nothing is."""
    jobs.settle()
    if not jobs.due:
        return
    from newsbert_ray.tune.display import SweepDisplay
    from newsbert_ray.tune.running import node_resources, run_jobs

    def config(job: Job) -> dict[str, Any]:
        settings = spaces.trial_settings(
            jobs.space, job.point, seed=job.seed, out=job.out, overrides=overrides
        )
        notes = str((jobs.folder / "failures").absolute())
        return {"settings": settings.model_dump(), "metric": jobs.space.metric, "notes": notes}

    with ray_session():
        place = place_of(first, node_resources(), jobs=jobs.due, concurrency=concurrency)
        _say(console, f"{place.slots} trials at once; Ctrl-C ends the sweep, it can be resumed")
        display = SweepDisplay(jobs, slots=place.slots, console=console)
        run_jobs(jobs, config=config, place=place, display=display, folder=jobs.folder / ".tune", train=train)
    if jobs.unfinished:
        raise KeyboardInterrupt


def place_of(
    settings: TrainSettings, nodes: Sequence[Mapping[str, float]], *, jobs: int, concurrency: int | None
) -> Place:
    """What a trial occupies, and how many run at once.

    Args:
        nodes: what each node of the cluster has, as Ray names it: {"CPU": 8.0, "GPU": 1.0}.
        jobs: trials that are due.
        concurrency: trials at once, at most.
    Raises:
        SettingsError: not even one trial would fit on a node, and Ray would wait for ever.
    """
    from newsbert_ray.tune.running import Place

    cpus = settings.threads or 1
    gpus = sum(node.get("GPU", 0.0) for node in nodes) if settings.device != "cpu" else 0.0
    if settings.device == "cuda" and not gpus:
        raise SettingsError("device = cuda: Ray has no GPU; take --device auto or cpu")
    sizes = [node.get("CPU", 0.0) for node in nodes if node.get("GPU") or not gpus]
    slots = sum(int(size // cpus) for size in sizes)
    if slots < 1:
        kind = "node with a GPU" if gpus else "node"
        raise SettingsError(
            f"threads = {cpus}: a trial needs {cpus} CPUs of one node, Ray's largest {kind} has "
            f"{max(sizes, default=0.0):g}; take fewer threads"
        )
    if gpus and concurrency is None:
        slots = min(slots, int(gpus * TRIALS_PER_GPU))
    slots = max(1, min(slots, jobs, concurrency or slots))
    return Place(slots=slots, cpus=cpus, gpus=min(1.0, int(gpus / slots * 1000) / 1000) if gpus else 0.0)


def _opening(jobs: Jobs, out: Path) -> list[str]:
    space = jobs.space
    axes = ", ".join(axis.name for axis in space.axes) or "nothing"
    lines = [
        f"{space.name}: {space.points} points over {axes}, seeds {', '.join(map(str, space.seeds))}: "
        f"{jobs.total} trials in {out}"
    ]
    if jobs.found:
        lines.append(f"{jobs.found} of them had finished before")
    return lines


def _result(jobs: Jobs, out: Path, overrides: Mapping[str, Any], *, seconds: float) -> SweepResult:
    best = jobs.best()
    written: list[Path] = []
    if best:
        from newsbert_ray.reporting.report import report

        written = report(_finished(out, jobs.results.values()), out=out / "report")
    return SweepResult(
        out=out,
        space=jobs.space,
        points=tuple(jobs.results.values()),
        best=best,
        command=_train_command(jobs.space, best, overrides, out) if best else "",
        seconds=seconds,
        report=tuple(written),
    )


def _finished(out: Path, points: Iterable[PointResult]) -> list[Path]:
    """Folders of the trials that have a value; a failed one may hold half a record."""
    folders = [out / TRIALS / spaces.point_label(p.point, seed=seed) for p in points for seed in p.values]
    return [folder for folder in folders if (folder / RECORD).exists()]


def _close(result: SweepResult, console: Console) -> None:
    """The table, the failures, the best point as a command, and where things are."""
    from newsbert_ray.reporting.tables import sweep_table

    records = [read_record(folder) for folder in _finished(result.out, result.points)]
    if records:
        console.print(
            sweep_table(
                records,
                metric=result.space.metric,
                mode=result.space.mode,
                seeds=len(result.space.seeds),
            )
        )
    for trial, reason in result.failures.items():
        _say(console, f"failed: {trial}: {reason}")
    if result.failures:
        _say(
            console,
            f"frames in {result.out / 'failures'}; try them again with: "
            f"{_resume_command(result.space, result.out)}",
        )
    if result.best is None:
        _say(console, "no trial finished")
        return
    sd = f" (sd {result.best.sd:.4f})" if len(result.best.values) > 1 else ""
    _say(
        console,
        f"best: {result.best.label}, {result.space.metric} {result.best.mean:.4f}{sd}; train it again with:",
    )
    _say(console, f"  {result.command}")
    figures = ", ".join(str(path) for path in result.report if path.suffix == ".png")
    _say(
        console,
        f"{result.seconds:.0f} s; report in {result.out / 'report'}" + (f" ({figures})" if figures else ""),
    )
    _say(
        console,
        f"next: newsbert-ray report {result.out} --out {result.out / 'report'}   |   "
        f"optuna-dashboard {result.out / 'optuna.journal'}   |   tensorboard --logdir {result.out / TRIALS}",
    )


def _train_command(space: SearchSpace, best: PointResult, overrides: Mapping[str, Any], out: Path) -> str:
    settings = spaces.flatten(spaces.absolute_folders(merge(space.settings, overrides, best.point)))
    settings |= {"seed": space.seeds[0], "out": str(out / "best")}
    words = [word for name, value in settings.items() for word in (f"--{name}", _word(value))]
    return shlex.join(["newsbert-ray", "train", *words])


def _resume_command(space: SearchSpace, out: Path) -> str:
    return shlex.join(["newsbert-ray", "sweep", space.file, "--out", str(out), "--resume"])


def _word(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
