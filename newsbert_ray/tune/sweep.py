"""`newsbert-ray sweep`: the folder of a sweep, its trials on Ray, and what came of them."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from newsbert_ray.config import SettingsError, TrainSettings
from newsbert_ray.files import write_json
from newsbert_ray.ray_session import ray_session
from newsbert_ray.record import RECORD, STOPPED
from newsbert_ray.storage import workdir as storage
from newsbert_ray.telemetry import EVENTS, EventLog
from newsbert_ray.tune import space as spaces
from newsbert_ray.tune.display import (
    SweepResult,
    close,
    opening,
    resume_command,
    say,
    starting,
    train_command,
)
from newsbert_ray.tune.preview import compared
from newsbert_ray.tune.resources import Place, place_of
from newsbert_ray.tune.space import SearchSpace
from newsbert_ray.tune.stopping import EarlyStopping
from newsbert_ray.tune.storage import JOURNAL
from newsbert_ray.tune.study import Memory
from newsbert_ray.tune.sweep_folder import (
    MARKS,
    SWEEP,
    build_space,
    claim_folder,
    make_plan,
    read_asked,
    read_corpora,
    read_plan,
    require_same,
)
from newsbert_ray.tune.trials import FAILURES, TRIALS, Budget, Job, Jobs, Keeper

if TYPE_CHECKING:
    from rich.console import Console

    from newsbert_ray.tune.trial import Train


def sweep(
    space: str | Path,
    *,
    out: str | Path,
    overrides: Mapping[str, Any] | None = None,
    vary: Mapping[str, Sequence[Any]] | None = None,
    control: Mapping[str, Any] | None = None,
    resume: bool = False,
    concurrency: int | None = None,
    train: Train | None = None,
) -> SweepResult:
    """Run every trial of a search space, print its table, and write the report with its figures.

    Args:
        space: YAML file of the search space.
        out: folder of the sweep: sweep.json, optuna.journal, trials/, report/; one that all nodes share, or a
            URL.
        overrides: training settings, nested or dotted, over the file's; one that varies is fixed by it.
        vary: other values for an axis, a new axis, or other `seeds`.
        control: the file's `search`, `stopping`, `limits`, `prices`, `gpus` and `keep_students`, nested or
            dotted, over the file's own ({"search.trials": 20}).
        resume: go on with the sweep in `out`, with its own overrides, axes and control where none are given;
            finished trials count once, others go on from their checkpoints, failed ones are tried again.
        concurrency: trials at once, at most; as many as CPUs and GPUs allow by default.
        train: what trains; `newsbert_ray.train` by default.
    Raises:
        SettingsError: the search space or a setting cannot be.
        SweepError: the folder holds another sweep, or one that was not asked to be resumed, or is in use.
        StudyError: Optuna's storage cannot be used, or holds another sweep's study of that name.
        StorageError: a place in a bucket cannot be read or written, or another sweep runs in it.
        NodeError: a node cannot read or write what it has to.
        ConnectError: no Ray.
        KeyboardInterrupt: ended by Ctrl-C, tidily; what has finished counts, and a resume goes on.
    """
    from rich.console import Console

    if concurrency is not None and concurrency < 1:
        raise SettingsError(f"concurrency = {concurrency}: expected 1 or more")
    began, place, console = time.monotonic(), out if storage.is_url(out) else Path(out), Console()
    with heeded() as check, storage.working(place, marks=MARKS, small=True) as out, claim_folder(out):
        before = read_plan(out)
        asked = read_asked(overrides, vary, control, before=before if resume else {})
        found, said = build_space(space, asked)
        first = spaces.check_space(found, out=place, overrides=asked["overrides"])
        plan = make_plan(found, asked, first, corpora=read_corpora(found, first) if train is None else [])
        require_same(place, before, plan, resume=resume)
        plan["corpora"] = plan["corpora"] or before.get("corpora", [])
        plan["identity"] = before.get("identity", plan["identity"])
        plan["place"] = before.get("place", {})
        if storage.is_url(place):
            plan["url"] = place  # its folder's name on this machine means nothing
        folder = _Folder(out, plan, place=place, before=float(before.get("seconds", 0.0)), began=began)
        folder.write("running")
        log = EventLog(out)
        log("resume" if before else "start", space=str(space))
        try:
            jobs = Jobs(found, Memory(found, out, plan["identity"]), out, place=place)
            for line in [*said, *opening(jobs)]:
                say(console, line)
            keeper = _run(
                jobs,
                first,
                overrides=asked["overrides"],
                concurrency=concurrency,
                train=train,
                console=console,
                check=check,
                placed=folder.placed,
            )
        except KeyboardInterrupt:
            folder.write("interrupted")
            log("interrupted")
            say(console, f"interrupted; {_standing(out)}go on with:")
            say(console, f"  {resume_command(found, place)}")
            storage.publish(place)
            raise
        except Exception as error:
            if not before and not (out / TRIALS).exists():
                _forget(out)
            else:
                folder.write("broken off", ends=f"{type(error).__name__}: {error}")
                log("error", reason=f"{type(error).__name__}: {error}")
            if not isinstance(error, storage.StorageError):
                storage.publish(place)
            raise
        result = _result(jobs, asked["overrides"], seconds=folder.seconds)
        state = "ended at a limit" if jobs.closed else "finished"
        folder.write(
            state + (" with failures" if result.failures else ""),
            ends=jobs.closed,
            best=result.command,
            failures=result.failures,
        )
        log("end", state=state, failures=len(result.failures))
        result = _reported(result)
        storage.publish(place)
    planned = ""
    if keeper and not before and not jobs.closed:
        planned = compared(
            out, found, asked["overrides"], seconds=time.monotonic() - began, slots=keeper.slots
        )
    close(result, jobs, keeper, console, planned=planned)
    return result


class _Folder:
    """sweep.json: what the sweep is, how it stands, and the wall time of all its starts."""

    def __init__(
        self, out: Path, plan: Mapping[str, Any], *, place: str | Path, before: float, began: float
    ) -> None:
        self._path = out / SWEEP
        self._place = place
        self._plan = dict(plan)
        self._before = before
        self._began = began

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._began

    def placed(self, place: Place) -> None:
        """Note what a trial occupies: the report counts hours with it."""
        cpus, gpus = place.cpus * place.workers, place.gpus * place.workers
        self._plan["place"] = {"slots": place.slots, "cpus": cpus, "gpus": gpus}
        self.write("running")
        storage.publish(self._place)

    def write(self, state: str, **more: Any) -> None:
        write_json(self._path, {**self._plan, "state": state, "seconds": self.seconds, **more})


def _standing(out: Path) -> str:
    """How many trials have left an end, from their folders alone: right whatever was interrupted."""
    done = len(list((out / TRIALS).glob(f"*/{RECORD}")))
    early = len(list((out / TRIALS).glob(f"*/{STOPPED}")))
    return f"{done} trials finished, {early} stopped early; "


def _forget(out: Path) -> None:
    """Undo a sweep that ended before its first trial, so that the corrected command is not refused."""
    for name in (SWEEP, JOURNAL, EVENTS):
        (out / name).unlink(missing_ok=True)


def _run(
    jobs: Jobs,
    first: TrainSettings,
    *,
    overrides: Mapping[str, Any],
    concurrency: int | None,
    train: Train | None,
    console: Console,
    check: Callable[[], None],
    placed: Callable[[Place], None],
) -> Keeper | None:
    """Everything that is due, on Ray; without starting Ray where nothing is."""
    jobs.settle()
    if not jobs.due:
        return None
    from newsbert_ray.reporting.hparams import HParams
    from newsbert_ray.tune.display import SweepDisplay
    from newsbert_ray.tune.ray_tune import node_resources, run_jobs
    from newsbert_ray.tune.resources import check_nodes

    judge = EarlyStopping(jobs.space, epochs=_most_epochs(jobs.space, first))
    for name, curve in jobs.curves():
        judge.recall(name, curve)
    with ray_session() as session:
        if not session.private:
            check_nodes(jobs.place, **_inputs(jobs.space, first) if train is None else {})
        place = place_of(
            first,
            node_resources(),
            jobs=jobs.due,
            concurrency=concurrency,
            gpus=jobs.space.gpus,
            growing=session.growing,
        )
        placed(place)
        budget = Budget(jobs, cpus=place.cpus * place.workers, gpus=place.gpus * place.workers)
        keeper = Keeper(jobs, slots=place.slots, keep=first.checkpoint.keep)
        for line in starting(jobs, place, session.dashboard):
            say(console, line)
        epochs = None if any(axis.name == "epochs" for axis in jobs.space.axes) else first.epochs
        display = SweepDisplay(jobs, slots=place.slots, console=console, epochs=epochs, budget=budget)
        goals = [goal.metric for goal in jobs.space.goals]
        board = HParams(
            jobs.folder / TRIALS, jobs.space.axes, seeds=jobs.space.seeds, goals=goals, task=first.task
        )
        board.begin()
        run_jobs(
            jobs,
            config=partial(_trial_config, jobs, overrides, place, shared=not session.private),
            place=place,
            judge=judge,
            budget=budget,
            keeper=keeper,
            display=display,
            board=board,
            folder=jobs.folder / ".tune",
            check=check,
            train=train,
        )
        keeper.settle()
    if jobs.unfinished and not jobs.closed:
        raise KeyboardInterrupt
    return keeper


def _inputs(space: SearchSpace, first: TrainSettings) -> dict[str, list[str]]:
    """The shards and teachers that trials read, where they are no Hugging Face names."""
    varied = {axis.name: [str(value) for value in axis.samples()] for axis in space.axes}
    given = {name: varied.get(name, [getattr(first, name)]) for name in ("data", "teacher")}
    return {
        "data": given["data"],
        "teachers": [place for place in given["teacher"] if storage.is_url(place) or Path(place).is_dir()],
    }


def _trial_config(
    jobs: Jobs, overrides: Mapping[str, Any], place: Place, job: Job, *, shared: bool
) -> dict[str, Any]:
    """What `run_trial` gets; `shared` where it may run on a machine that does not see the sweep's folder.

    Raises:
        SettingsError: a combination that cannot be.
    """
    out = storage.join(jobs.place, TRIALS, job.name) if storage.is_url(jobs.place) else job.out
    settings = spaces.trial_settings(jobs.space, job.point, seed=job.seed, out=out, overrides=overrides)
    if settings.workers > place.workers:
        raise SettingsError(
            f"workers = {settings.workers}: the sweep's place is for {place.workers}; do not vary it"
        )
    return {
        "settings": settings.model_dump(),
        "metrics": [goal.metric for goal in jobs.space.goals],
        "notes": storage.absolute(storage.join(jobs.place, FAILURES)),
        "sweep": storage.absolute(jobs.place) if shared else None,
        "gpus": place.gpus,
    }


def _most_epochs(space: SearchSpace, first: TrainSettings) -> int:
    """The most epochs that a trial has: the scheduler's last rung."""
    varied = [int(value) for axis in space.axes if axis.name == "epochs" for value in axis.samples()]
    return max([first.epochs, *varied])


def _result(jobs: Jobs, overrides: Mapping[str, Any], *, seconds: float) -> SweepResult:
    best = jobs.best()
    return SweepResult(
        out=jobs.folder,
        place=jobs.place,
        space=jobs.space,
        points=tuple(jobs.results.values()),
        best=best,
        command=train_command(jobs.space, best, overrides, jobs.place) if best else "",
        seconds=seconds,
        report=(),
    )


def _reported(result: SweepResult) -> SweepResult:
    """The same with its report written, where there is something to report."""
    if result.best is None:
        return result
    from newsbert_ray.reporting.report import report

    return replace(result, report=tuple(report([result.out], out=result.out / "report")))


@contextmanager
def heeded() -> Iterator[Callable[[], None]]:
    """Notes each Ctrl-C for as long as the block runs, and raises KeyboardInterrupt as usual.

    Yields:
        A check to call now and then: raises KeyboardInterrupt where one came and was swallowed.
    """
    hits: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        hits.append(number)
        raise KeyboardInterrupt

    def check() -> None:
        if hits:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
