"""The Ray Tune shell of a sweep: places trials on warm actors and passes their reports on. No arithmetic."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayActorError
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from newsbert_ray.config import SettingsError
from newsbert_ray.files import first_line
from newsbert_ray.ray_private import release_orphans
from newsbert_ray.ray_session import environment
from newsbert_ray.record import EarlyStop, write_stop
from newsbert_ray.reporting.hparams import HParams
from newsbert_ray.telemetry import Event, EventLog, SweepMeters
from newsbert_ray.training.loop import PreemptedError
from newsbert_ray.training.ray_group import GROUP_FOLDER, is_idle
from newsbert_ray.tune.display import SweepDisplay
from newsbert_ray.tune.resources import Place
from newsbert_ray.tune.stopping import EarlyStopping
from newsbert_ray.tune.trial import Train, run_trial
from newsbert_ray.tune.trials import CHECKPOINTS, Budget, Job, Jobs, Keeper

RETRIES = 2
"""How often a trial whose process died starts again, from its own checkpoints, without getting an epoch
further; a machine that was taken away is not counted."""

LOOK_SECONDS = 2.0
"""Between two looks at the cluster's nodes and at the trials by state."""

QUIET: Mapping[str, str] = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    # The newer output prints boxes even at verbosity 0.
    "RAY_AIR_NEW_OUTPUT": "0",
    # Tune's own memory is not used: a resume goes on from ours.
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_RESULT_BUFFER_LENGTH": "0",
}


def node_resources() -> list[dict[str, float]]:
    """What each node that is alive has, as Ray names it: {"CPU": 8.0, "GPU": 1.0, ...}."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return [dict(node["Resources"]) for node in nodes if node["Alive"]]


def run_jobs(
    jobs: Jobs,
    *,
    config: Callable[[Job], Mapping[str, Any]],
    place: Place,
    judge: EarlyStopping,
    budget: Budget,
    keeper: Keeper,
    display: SweepDisplay,
    board: HParams,
    folder: Path,
    check: Callable[[], None],
    train: Train | None = None,
) -> None:
    """Run every job that is due; returns when all have ended, when a limit is reached (see `jobs.closed`), or
    early after Ctrl-C (see `jobs.unfinished`).

    Args:
        config: what `run_trial` gets for a job.
        place: what a trial occupies.
        judge: who ends early.
        budget: whether another may start.
        keeper: tidies up after each.
        display: shows them.
        board: TensorBoard's HParams tab.
        folder: where Tune may keep files while it runs; all nodes must see it.
        check: called often; raises where the sweep is to end.
        train: what trains; the real one by default.
    """
    queue = Queue(jobs, config, place.slots, budget, refused=display.ended)
    caretaker = Caretaker() if place.nested else None
    watch = _Watch(queue, keeper, display, board, check, caretaker)
    trainable = tune.with_resources(partial(run_trial, train=train), place.resources)
    try:
        # Asked by a searcher, Tune starts one process after another unless it is told how many may wait.
        tuned = {**QUIET, "TUNE_MAX_PENDING_TRIALS_PG": str(place.slots)}
        with environment(tuned), _quiet_tune(), display.shown():
            tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    search_alg=queue,
                    scheduler=Judge(queue, judge),
                    num_samples=-1,
                    # A group's driver must die with its trial, and the group's controller with it.
                    reuse_actors=not place.nested,
                    trial_dirname_creator=_trial_id,
                ),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=str(folder.absolute()),
                    verbose=0,
                    callbacks=[watch],
                    failure_config=tune.FailureConfig(max_failures=0),
                ),
            ).fit()
            if caretaker is not None and not caretaker.settle():
                display.say("some of Ray's placement groups are held still; they go with this session")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _hparams(job: Job) -> dict[str, Any]:
    """What TensorBoard's HParams tab shows of a trial."""
    return {**job.point, "seed": job.seed}


@contextmanager
def _quiet_tune() -> Iterator[None]:
    """Tune logs a page of frames for each process that dies; the display says it in a line."""
    logger = logging.getLogger("ray.tune")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _trial_id(trial: Trial) -> str:
    """Tune's own folder of a trial; by default every setting stands in its name."""
    return str(trial.trial_id)


def _error(trial: Trial) -> BaseException | None:
    """What a trial ended with, as far as it can be read, from the file that Tune has just written for it."""
    try:
        found: BaseException | None = ray.cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    except Exception as unreadable:  # whatever the unpickling of somebody's exception raises
        return unreadable
    return found


def _machine_gone(error: BaseException | None) -> bool:
    """Whether a trial's end was its machine's: drained, which the trial heeded, or dead."""
    if isinstance(error, RayActorError):
        return error.preempted or "node has died" in str(error) or "node died" in str(error)
    return isinstance(getattr(error, "cause", None), PreemptedError)


def _cause(error: BaseException | None) -> str:
    """Why a trial broke off that will go on."""
    if isinstance(getattr(error, "cause", None), PreemptedError):
        return "its machine is about to be taken away"
    return "its machine is gone" if _machine_gone(error) else "its process died"


def _reason(error: BaseException | None) -> str:
    """Why a trial is given up, in one line."""
    if error is None or isinstance(error, RayActorError):
        died = f"its process died {RETRIES + 1} times, for want of memory perhaps"
        return f"{died} ({first_line(error)})" if error else died
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {first_line(cause)}"


class _Watch(tune.Callback):
    """Passes what happens to trials on to the jobs and to the display."""

    def __init__(
        self,
        queue: Queue,
        keeper: Keeper,
        display: SweepDisplay,
        board: HParams,
        check: Callable[[], None],
        caretaker: Caretaker | None,
    ) -> None:
        self._queue = queue
        self._keeper = keeper
        self._display = display
        self._board = board
        self._check = check
        self._caretaker = caretaker
        self._log, self._meters = EventLog(queue.jobs.folder), SweepMeters(queue.jobs.folder)
        self._nodes: set[str] = set()
        self._looked = 0.0
        self._fault: Exception | None = None
        self._on_board: set[str] = set()
        self._reached: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        running = self._queue.running[trial.trial_id]
        self._log("trial_retry" if running.began else "trial_start", trial=running.job.name)
        running.began = running.began or time.monotonic()
        self._display.started(running.job)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        job = self._queue.running[trial.trial_id].job
        self._keeper.reported(job)
        if job.name not in self._on_board and self._board.start(job.name, _hparams(job)):
            self._on_board.add(job.name)
        if "epoch" in result:
            self._reached[job.name] = result["epoch"]
            self._display.reported(job, result)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        with self._noted():
            self._end(trial)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        with self._noted():
            error = _error(trial)
            running = self._queue.running.pop(trial.trial_id)
            reached = self._reached.get(running.job.name, 0.0)
            again = self._queue.again(
                running, counted=not _machine_gone(error), most=RETRIES, reached=reached
            )
            if not again:
                self._queue.jobs.finish(running.job, values=None, failure=_reason(error))
                self._close(running)
            else:
                self._log("trial_broke_off", trial=running.job.name, reason=_cause(error))
                self._display.say(f"{running.job.name}: {_cause(error)}; it goes on from its last checkpoint")

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        self._check()
        if self._fault is not None:
            raise self._fault
        if self._caretaker is not None:
            self._caretaker.tick()
        self._display.tick()
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            self._looked = time.monotonic()
            self._look()

    def _look(self) -> None:
        """Tell the cluster's meters how the sweep stands, and the log which nodes came and went."""
        jobs, running = self._queue.jobs, len(self._queue.running)
        results, best = jobs.results.values(), jobs.best()
        states = {
            "running": running,
            "waiting": max(0, jobs.unfinished - running),
            "finished": sum(len(result.values) for result in results),
            "stopped_early": sum(len(result.stops) for result in results),
            "failed": sum(len(result.failures) for result in results),
        }
        self._meters.update(states, best=best.mean if best else None)
        nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
        for node in sorted(nodes ^ self._nodes):
            event: Event = "node_came" if node in nodes else "node_gone"
            self._log(event, node=node[:12], nodes=len(nodes), running=running)
        self._nodes = nodes

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """What is raised here ends the sweep; Tune itself would log it and go on with the trial uncounted."""
        try:
            yield
        except Exception as error:
            self._fault = error
            raise

    def _end(self, trial: Trial) -> None:
        """A trial that Tune knows as complete: finished, failed by its own report, or stopped early."""
        running = self._queue.running.pop(trial.trial_id)
        result = trial.last_result or {}
        values = result.get("values")
        if running.stop is not None:
            write_stop(running.job.out, running.stop)
            self._queue.jobs.stop(running.job, running.stop)
        else:
            self._queue.jobs.finish(
                running.job,
                values=None if values is None else tuple(values),
                failure=result.get("failure", "ended without a report"),
                seconds=running.seconds,
            )
        self._close(running)

    def _close(self, running: Running) -> None:
        """What an ended trial leaves behind: bounded, and shown."""
        jobs, job = self._queue.jobs, running.job
        result = jobs.results[job.label]
        found = dict(
            zip([goal.metric for goal in jobs.space.goals], result.values.get(job.seed, ()), strict=False)
        )
        self._log("trial_end", trial=job.name, failure=result.failures.get(job.seed))
        self._board.end(job.name, _hparams(job), ok=job.seed not in result.failures, numbers=found)
        self._keeper.ended(running.job, is_idle=self._caretaker is None)
        if self._caretaker is not None:
            self._caretaker.ended(running.job.out)
        self._display.ended(running.job)


@dataclass
class Running:
    """A trial under way: its job, how many epochs it has, when it began, its early end once that is known."""

    job: Job
    epochs: int
    began: float = 0.0
    stop: EarlyStop | None = None

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self.began if self.began else 0.0


class Queue(Searcher):
    """Hands jobs to Tune as it asks, as long as the budget allows."""

    def __init__(
        self,
        jobs: Jobs,
        config: Callable[[Job], Mapping[str, Any]],
        slots: int,
        budget: Budget,
        *,
        refused: Callable[[Job], None],
    ) -> None:
        super().__init__()
        self.running: dict[str, Running] = {}
        self.jobs = jobs
        self._config = config
        self._slots = slots
        self._budget = budget
        self._refused = refused
        self._deaths: dict[str, int] = {}
        self._began: dict[str, float] = {}
        self._reached: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: Any, **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        if len(self.running) >= self._slots:
            return None
        while (job := self.jobs.next_job()) is not None:
            if self._held_back():
                self.jobs.put_back(job)
                return Searcher.FINISHED if self.jobs.closed else None
            try:
                config = dict(self._config(job))
            except SettingsError as error:
                # A combination that cannot be, which only the sampler has brought together.
                self.jobs.finish(job, values=None, failure=str(error))
                self._refused(job)
                continue
            began = self._began.get(job.name, 0.0)
            self.running[trial_id] = Running(job, epochs=config["settings"]["epochs"], began=began)
            return config
        # One that runs may yet have to be handed out again.
        return None if self.running else Searcher.FINISHED

    def again(self, running: Running, *, counted: bool, most: int, reached: float = 0.0) -> bool:
        """Hand a trial out again that has broken off; False where it has done so too often.

        Args:
            counted: it was its own fault, as far as is known: that a machine died is known only later.
            most: how often it may go on after those without getting further.
            reached: epochs that it has reported.
        """
        name = running.job.name
        if reached > self._reached.get(name, 0.0):
            self._reached[name], self._deaths[name] = reached, 0
        self._deaths[name] = self._deaths.get(name, 0) + counted
        if self._deaths[name] > most:
            return False
        self._began[name] = running.began
        self.jobs.put_back(running.job)
        return True

    def _held_back(self) -> bool:
        """Whether no trial may start now; closes the sweep where none ever may."""
        reached = self._budget.reached()
        refusal = reached or self._budget.refusal(trial.seconds for trial in self.running.values())
        if reached or (refusal and not self.running):
            self.jobs.closed = refusal
        return bool(refusal)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep is resumed from its own memory, not from Tune's")


class Judge(FIFOScheduler):
    """Asks the sweep's judge at each report; Tune ends the trial where it says so."""

    def __init__(self, queue: Queue, judge: EarlyStopping) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._queue = queue
        self._judge = judge

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        running = self._queue.running[trial.trial_id]
        if not self._judge.stops(running.job.name, result, epochs=running.epochs):
            return str(self.CONTINUE)
        running.stop = EarlyStop(
            epoch=result["epoch"],
            value=result[self._queue.jobs.space.metric],
            seconds=running.seconds,
            reason=self._judge.reason,
        )
        return str(self.STOP)


TICK_SECONDS = 2.0
SETTLE_SECONDS = 30.0


class Caretaker:
    """Gives back, while a sweep runs and at its end, what groups hold whose trials are gone."""

    def __init__(self, *, seconds: float = TICK_SECONDS) -> None:
        self._seconds = seconds
        self._last = time.monotonic()
        self._ended: list[Path] = []

    def ended(self, run: Path) -> None:
        """This trial has ended for good: its checkpoints go as soon as no worker writes any more."""
        self._ended.append(run)

    def tick(self) -> None:
        """Look, where some time has passed since the last look; takes milliseconds."""
        if time.monotonic() - self._last >= self._seconds:
            self._look()

    def settle(self, *, seconds: float = SETTLE_SECONDS) -> bool:
        """Wait, once all trials have ended, until everything is given back; False if it was not in time."""
        end = time.monotonic() + seconds
        while self._look():
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    def _look(self) -> bool:
        """Give back what can be; whether something is still held."""
        groups = release_orphans()
        for run in [run for run in self._ended if is_idle(run)]:
            for folder in (CHECKPOINTS, GROUP_FOLDER):
                shutil.rmtree(run / folder, ignore_errors=True)
            self._ended.remove(run)
        self._last = time.monotonic()
        return bool(groups or self._ended)
