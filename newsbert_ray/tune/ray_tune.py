"""Runs a sweep's trials with Ray Tune: hands them to actors, passes their reports on. No arithmetic."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.exceptions import RayActorError
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from newsbert_ray.config import SettingsError, TrainSettings
from newsbert_ray.files import first_line
from newsbert_ray.methods import TASKS
from newsbert_ray.ray_private import release_orphans, send_no_keys
from newsbert_ray.ray_session import environment
from newsbert_ray.record import EarlyStop, write_stop
from newsbert_ray.reporting.sweep_data import TRIALS
from newsbert_ray.reporting.sweep_page import HParams
from newsbert_ray.telemetry import STATES, Event, EventLog, SweepMeters
from newsbert_ray.training.loop import PreemptedError
from newsbert_ray.tune.display import SweepDisplay
from newsbert_ray.tune.study import EPOCH, EarlyStopping
from newsbert_ray.tune.trial import CONFIG, Train, TrialConfig, run_trial, trial_epochs
from newsbert_ray.tune.trials import (
    Budget,
    Resources,
    Retention,
    RunningTrial,
    Trials,
    TrialSpec,
    read_curves,
)

if TYPE_CHECKING:
    from rich.console import Console

RETRIES = 2
"""How often a trial whose process died starts again from its own checkpoints without getting an epoch
further; losing the machine does not count."""

STATUS_SECONDS = 2.0
"""Between two updates of the meters and of the list of nodes, and two clean-ups after ended groups."""

TUNE_ENVIRONMENT: Mapping[str, str] = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    # The newer output prints boxes even at verbosity 0.
    "RAY_AIR_NEW_OUTPUT": "0",
    # Tune's own experiment state is not used: a resume uses ours.
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_RESULT_BUFFER_LENGTH": "0",
}


def node_resources() -> list[dict[str, float]]:
    """The resources of each living node, as Ray names them: {"CPU": 8.0, "GPU": 1.0, ...}."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return [dict(node["Resources"]) for node in nodes if node["Alive"]]


class SweepParts:
    """What runs a sweep together. `make_config` makes the configuration of a trial's actor, and raises
    SettingsError for an impossible combination; `check` raises KeyboardInterrupt where the sweep has to
    end."""

    def __init__(
        self,
        trials: Trials,
        first: TrainSettings,
        resources: Resources,
        *,
        make_config: Callable[[TrialSpec], TrialConfig],
        console: Console,
        check: Callable[[], None],
    ) -> None:
        space = trials.space
        self.trials, self.resources, self.make_config, self.check = trials, resources, make_config, check
        self.budget = Budget(trials, resources)
        self.retention = Retention(trials, resources, checkpoints=first.checkpoint.keep)
        self.display = SweepDisplay(trials, self.budget, console=console)
        epochs = max(space.samples_of("epochs", trial_epochs(first)))
        self.early_stopping = EarlyStopping(space, epochs=epochs)
        for name, curve in read_curves(trials.folder, space.metric).items():
            self.early_stopping.load_curve(name, curve)
        goals = [goal.metric for goal in space.goals]
        folder = trials.folder / TRIALS
        self.board = HParams(folder, space.axes, seeds=space.seeds, goals=goals, task=TASKS[first.task])


def run_trials(sweep: SweepParts, *, train: Train | None = None) -> None:
    """Run every trial that is due, by `train` or the real training. Returns when all have ended, when a limit
    is reached (`trials.end_reason`), or early after Ctrl-C (`trials.unfinished`)."""
    folder = sweep.trials.folder / ".tune"  # for Tune's files while it runs; all nodes must see it
    nested, searcher = sweep.resources.nested, TrialSearcher(sweep)
    trainable = tune.with_resources(partial(run_trial, train=train), sweep.resources.tune_request)
    # With a searcher, Tune starts one process after another unless it is told how many may be pending.
    send_no_keys()
    variables = {**TUNE_ENVIRONMENT, "TUNE_MAX_PENDING_TRIALS_PG": str(sweep.resources.slots)}
    try:
        with environment(variables), _quiet_tune(), sweep.display.shown():
            tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    search_alg=searcher,
                    scheduler=StoppingScheduler(sweep),
                    num_samples=-1,
                    # The driver of a worker group has to die with its trial, and its controller with it.
                    reuse_actors=not nested,
                    # By default Tune writes every setting into the folder's name.
                    trial_dirname_creator=lambda trial: str(trial.trial_id),
                ),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=str(folder.absolute()),
                    verbose=0,
                    callbacks=[SweepCallback(sweep, searcher)],
                    failure_config=tune.FailureConfig(max_failures=0),
                ),
            ).fit()
            if nested and not wait_for_groups(sweep.retention):
                message = "some of Ray's placement groups are still reserved; they end with this session"
                sweep.display.say(message)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _quiet_tune() -> Iterator[None]:
    """Tune logs a long stack trace for each process that dies; the display says it in one line."""
    logger = logging.getLogger("ray.tune")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


class _Stateless:
    """Tune saves no state of ours: a sweep is resumed from its own study."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class TrialSearcher(_Stateless, Searcher):
    """Hands trials to Tune when it asks for one, as long as the budget allows."""

    def __init__(self, sweep: SweepParts) -> None:
        super().__init__()
        self._sweep = sweep
        self._trials = sweep.trials
        self._to_restart: dict[str, RunningTrial] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: Any, **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        if len(self._trials.running) >= self._sweep.resources.slots:
            return None
        while (spec := self._trials.next_trial()) is not None:
            if self._over_budget():
                self._trials.put_back(spec)
                return Searcher.FINISHED if self._trials.end_reason else None
            try:
                config = self._sweep.make_config(spec)
            except SettingsError as error:
                # An impossible combination that only the sampler has drawn.
                self._trials.fail(spec, str(error))
                self._sweep.display.ended(spec)
                continue
            running = self._to_restart.pop(spec.name, None)
            self._trials.running[trial_id] = running or RunningTrial(spec, trial_epochs(config.settings))
            return {CONFIG: config}
        # A running trial may still have to be handed out again.
        return None if self._trials.running else Searcher.FINISHED

    def retry(self, running: RunningTrial, *, machine_lost: bool) -> bool:
        """Hand a trial out again whose process has died; False where that happened too often, machines
        aside."""
        epoch = running.numbers.get(EPOCH, 0.0)
        if epoch > running.epoch_at_death:
            running.epoch_at_death, running.deaths = epoch, 0
        running.deaths += not machine_lost
        if running.deaths > RETRIES:
            return False
        self._to_restart[running.spec.name] = running
        self._trials.put_back(running.spec)
        return True

    def _over_budget(self) -> bool:
        """Whether no trial may start now; ends the sweep where none ever may."""
        reached = self._sweep.budget.target_reached()
        refusal = reached or self._sweep.budget.refusal()
        if reached or (refusal and not self._trials.running):
            self._trials.end_reason = refusal
        return bool(refusal)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep is resumed from its own study, not from Tune's state")


class StoppingScheduler(_Stateless, FIFOScheduler):
    """Asks the sweep's early stopping at each report."""

    def __init__(self, sweep: SweepParts) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._trials = sweep.trials
        self._early_stopping = sweep.early_stopping

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        running = self._trials.running[trial.trial_id]
        if not self._early_stopping.should_stop(running.spec.name, result, epochs=running.epochs):
            return str(self.CONTINUE)
        epoch, value, reason = result[EPOCH], result[self._trials.space.metric], self._early_stopping.reason
        running.stop = EarlyStop(epoch=epoch, value=value, seconds=running.seconds, reason=reason)
        return str(self.STOP)


class SweepCallback(_Stateless, tune.Callback):
    """Tells the trials, the display, the log and the meters what happens in Tune."""

    def __init__(self, sweep: SweepParts, searcher: TrialSearcher) -> None:
        self._sweep = sweep
        self._trials = sweep.trials
        self._searcher = searcher
        folder = sweep.trials.folder
        self._log, self._meters = EventLog(folder), SweepMeters(folder)
        self._nodes: set[str] = set()
        self._status_time = 0.0
        self._error: Exception | None = None
        self._on_board: set[str] = set()

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        running = self._trials.running[trial.trial_id]
        self._log("trial_retry" if running.began else "trial_start", trial=running.spec.name)
        running.began = running.began or time.monotonic()
        self._sweep.display.draw()

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: Any, **info: Any
    ) -> None:
        running = self._trials.running[trial.trial_id]
        spec = running.spec
        self._sweep.retention.reported(spec)
        if spec.name not in self._on_board and self._sweep.board.start(spec.name, _hparams(spec)):
            self._on_board.add(spec.name)
        if EPOCH in result:
            running.numbers = result
            self._sweep.display.draw()

    def on_trial_complete(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        with self._errors_end_sweep():
            running = self._trials.running.pop(trial.trial_id)
            spec, result = running.spec, trial.last_result or {}
            if running.stop is not None:
                write_stop(spec.out, running.stop)
                self._trials.stop(spec, running.stop)
            elif (values := result.get("values")) is not None:
                self._trials.finish(spec, tuple(values), seconds=running.seconds)
            else:
                self._trials.fail(spec, result.get("failure", "ended without a report"))
            self._after_end(running)

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        with self._errors_end_sweep():
            error = _read_error(trial)
            running = self._trials.running.pop(trial.trial_id)
            name = running.spec.name
            if self._searcher.retry(running, machine_lost=_machine_lost(error)):
                reason = _retry_reason(error)
                self._log("trial_broke_off", trial=name, reason=reason)
                self._sweep.display.say(f"{name}: {reason}; it continues from its last checkpoint")
            else:
                self._trials.fail(running.spec, _failure_reason(error))
                self._after_end(running)

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        self._sweep.check()
        if self._error is not None:
            raise self._error
        self._sweep.display.tick()
        if time.monotonic() - self._status_time >= STATUS_SECONDS:
            self._status_time = time.monotonic()
            self._update_status()

    def _update_status(self) -> None:
        """Release what ended groups hold; update the meters; log which nodes have joined or left."""
        if self._sweep.resources.nested:
            release_groups(self._sweep.retention)
        trials, running = self._trials, len(self._trials.running)
        states = [trial.state for trial in trials.ended.values()]
        counts = {name: states.count(name.removesuffix("_early")) for name in STATES}  # type: ignore[arg-type]
        counts |= {"running": running, "waiting": max(0, trials.unfinished - running)}
        best = trials.best()
        self._meters.update(counts, best=best.means[0] if best else None)
        nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
        for node in sorted(nodes ^ self._nodes):
            event: Event = "node_came" if node in nodes else "node_gone"
            self._log(event, node=node[:12], nodes=len(nodes), running=running)
        self._nodes = nodes

    @contextmanager
    def _errors_end_sweep(self) -> Iterator[None]:
        """Keep an exception for `on_step_end`; Tune would log it and go on without counting the trial."""
        try:
            yield
        except Exception as error:
            self._error = error
            raise

    def _after_end(self, running: RunningTrial) -> None:
        """Log and show an ended trial, and remove files that are no longer needed."""
        sweep, spec = self._sweep, running.spec
        trial = sweep.trials.ended[spec.name]
        failed = trial.state == "failed"
        values = trial.values if trial.state == "finished" else ()
        numbers = {goal.metric: v for goal, v in zip(sweep.trials.space.goals, values, strict=False)}
        self._log("trial_end", trial=spec.name, failure=trial.reason if failed else None)
        sweep.board.end(spec.name, _hparams(spec), ok=not failed, numbers=numbers)
        sweep.retention.ended(spec)
        sweep.display.ended(spec, seconds=running.seconds)


def _hparams(spec: TrialSpec) -> dict[str, Any]:
    """What TensorBoard's HParams tab shows of a trial."""
    return {**spec.point, "seed": spec.seed}


def _read_error(trial: TuneTrial) -> BaseException | None:
    """A trial's exception, from the file that Tune has just written for it."""
    try:
        error: BaseException | None = ray.cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    except Exception as unreadable:  # unpickling a foreign exception may raise anything
        return unreadable
    return error


def _machine_lost(error: BaseException | None) -> bool:
    """Whether a trial ended with its machine: drained, which the trial noticed, or dead."""
    if isinstance(error, RayActorError):
        return error.preempted or "node has died" in str(error) or "node died" in str(error)
    return isinstance(getattr(error, "cause", None), PreemptedError)


def _retry_reason(error: BaseException | None) -> str:
    if isinstance(getattr(error, "cause", None), PreemptedError):
        return "its machine is about to be taken away"
    return "its machine is gone" if _machine_lost(error) else "its process died"


def _failure_reason(error: BaseException | None) -> str:
    """Why a trial is given up, in one line."""
    if error is None or isinstance(error, RayActorError):
        died = f"its process died {RETRIES + 1} times, perhaps out of memory"
        return f"{died} ({first_line(error)})" if error else died
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {first_line(cause)}"


def release_groups(retention: Retention) -> bool:
    """Release placement groups and files of worker groups whose trials have ended; whether some are left."""
    groups = release_orphans()
    return retention.clear() or bool(groups)


def wait_for_groups(retention: Retention, *, seconds: float = 30.0) -> bool:
    """Wait, once all trials have ended, until everything is released; False if that takes too long."""
    end = time.monotonic() + seconds
    while release_groups(retention):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
