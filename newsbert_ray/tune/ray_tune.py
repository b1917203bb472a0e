"""Runs a sweep's trials with Ray Tune: hands them to actors, passes their reports on. No arithmetic."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayActorError
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.search import Searcher
from rich.console import Console

from newsbert_ray.config import SettingsError, TrainSettings
from newsbert_ray.files import first_line
from newsbert_ray.methods import TASKS
from newsbert_ray.ray_private import release_orphans, send_no_keys
from newsbert_ray.ray_session import environment
from newsbert_ray.record import EarlyStop, write_stop
from newsbert_ray.reporting.sweep_data import TRIALS, Trial, read_curves
from newsbert_ray.reporting.sweep_page import HParams
from newsbert_ray.telemetry import STATES, Event, EventLog, SweepMeters
from newsbert_ray.training.loop import PreemptedError
from newsbert_ray.tune.display import SweepDisplay
from newsbert_ray.tune.study import EPOCH, EarlyStopping
from newsbert_ray.tune.trial import CONFIG, Train, TrialConfig, run_trial, trial_epochs
from newsbert_ray.tune.trials import Budget, Resources, Retention, RunningTrial, Trials

RETRIES = 2
"""How often a trial whose process died starts again without getting an epoch further, lost machines aside."""

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


MakeConfig = Callable[[Trial], TrialConfig]
"""Makes the configuration of a trial's actor; raises SettingsError for an impossible combination."""


def run_trials(sweep: SweepCallback, make_config: MakeConfig, *, train: Train | None = None) -> None:
    """Run every trial that is due, by `train` or the real training. Returns when all have ended, when a limit
    is reached (`trials.end_reason`), or early after Ctrl-C (`trials.unfinished`)."""
    folder = sweep.trials.folder / ".tune"  # for Tune's files while it runs; all nodes must see it
    resources = sweep.resources
    trainable = tune.with_resources(partial(run_trial, train=train), resources.tune_request)
    send_no_keys()
    # Tune logs a long stack trace for each process that dies; the display says it in one line.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # With a searcher, Tune starts one process after another unless it is told how many may be pending.
    variables = {**TUNE_ENVIRONMENT, "TUNE_MAX_PENDING_TRIALS_PG": str(resources.slots)}
    try:
        with environment(variables), sweep.display.shown():
            tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    search_alg=TrialSearcher(sweep, make_config),
                    num_samples=-1,
                    # The driver of a worker group has to die with its trial, and its controller with it.
                    reuse_actors=not resources.nested,
                    # By default Tune writes every setting into the folder's name.
                    trial_dirname_creator=lambda trial: str(trial.trial_id),
                ),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=str(folder.absolute()),
                    verbose=0,
                    stop=sweep.should_stop,
                    callbacks=[sweep],
                    failure_config=tune.FailureConfig(max_failures=0),
                ),
            ).fit()
            if resources.nested and not wait_for_groups(sweep.retention):
                message = "some of Ray's placement groups are still reserved; they end with this session"
                sweep.display.say(message)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sweep.retention.clear(at_end=True)


class _Stateless:
    """Tune saves no state of ours: a sweep is resumed from its own study."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class TrialSearcher(_Stateless, Searcher):
    """Hands trials to Tune when it asks for one, as long as the budget allows."""

    def __init__(self, sweep: SweepCallback, make_config: MakeConfig) -> None:
        super().__init__()
        self._sweep, self._make_config = sweep, make_config

    def suggest(self, trial_id: str) -> Any:
        trials = self._sweep.trials
        if len(trials.running) >= self._sweep.resources.slots:
            return None
        while (trial := trials.next_trial()) is not None:
            if self._over_budget():
                trials.put_back(trial)
                return Searcher.FINISHED if trials.end_reason else None
            try:
                config = self._make_config(trial)
            except SettingsError as error:
                # An impossible combination that only the sampler has drawn.
                trials.fail(trial, str(error))
                self._sweep.display.ended(trials.ended[trial.name])
                continue
            running = self._sweep.to_restart.pop(trial.name, None)
            trials.running[trial_id] = running or RunningTrial(trial, trial_epochs(config.settings))
            return {CONFIG: config}
        # A running trial may still have to be handed out again.
        return None if trials.running else Searcher.FINISHED

    def _over_budget(self) -> bool:
        """Whether no trial may start now; ends the sweep where none ever may."""
        trials, budget = self._sweep.trials, self._sweep.budget
        reached = budget.target_reached()
        refusal = reached or budget.refusal()
        if reached or (refusal and not trials.running):
            trials.end_reason = refusal
        return bool(refusal)

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass


class SweepCallback(_Stateless, tune.Callback):
    """Tells the trials, the display, the log and the meters what happens in Tune; stops trials early.
    `check` raises KeyboardInterrupt where the sweep has to end."""

    def __init__(
        self,
        trials: Trials,
        first: TrainSettings,
        resources: Resources,
        *,
        console: Console,
        check: Callable[[], None],
    ) -> None:
        space, folder = trials.space, trials.folder
        self.trials, self.resources, self._check = trials, resources, check
        self.budget = Budget(trials, resources)
        self.retention = Retention(trials, resources, checkpoints=first.checkpoint.keep)
        self.display = SweepDisplay(trials, self.budget, console=console)
        self.to_restart: dict[str, RunningTrial] = {}
        """Trials whose process died, by name."""
        epochs = max(space.samples_of("epochs", trial_epochs(first)))
        self._early_stopping = EarlyStopping(space, epochs=epochs)
        for name, curve in read_curves(folder, space.metric).items():
            for epoch, value in curve:
                self._early_stopping.should_stop(name, {EPOCH: epoch, space.metric: value}, epochs=0)
        goals, task = [goal.metric for goal in space.goals], TASKS[first.task]
        self._board = HParams(folder / TRIALS, space.axes, seeds=space.seeds, goals=goals, task=task)
        self._log, self._meters = EventLog(folder), SweepMeters(folder)
        self._nodes: set[str] = set()
        self._status_time = 0.0
        self._error: Exception | None = None

    def should_stop(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Whether a trial ends early with this report; Tune asks at each."""
        running, early = self.trials.running[trial_id], self._early_stopping
        if not early.should_stop(running.trial.name, result, epochs=running.epochs):
            return False
        epoch, value = result[EPOCH], result[self.trials.space.metric]
        running.stop = EarlyStop(epoch=epoch, value=value, seconds=running.seconds, reason=early.reason)
        return True

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        running = self.trials.running[trial.trial_id]
        self._log("trial_retry" if running.began else "trial_start", trial=running.trial.name)
        running.began = running.began or time.monotonic()
        self.display.draw()

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: Any, **info: Any
    ) -> None:
        running = self.trials.running[trial.trial_id]
        self.retention.reported(running.trial.name)
        if not running.numbers:
            self._board.start(running.trial)
        if EPOCH in result:
            running.numbers = result
            self.display.draw()

    def on_trial_complete(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        with self._errors_end_sweep():
            running = self.trials.running.pop(trial.trial_id)
            result = trial.last_result or {}
            if running.stop is not None:
                write_stop(self.trials.out(running.trial.name), running.stop)
                self.trials.stop(running.trial, running.stop)
            elif (values := result.get("values")) is not None:
                self.trials.finish(running.trial, tuple(values), seconds=running.seconds)
            else:
                self.trials.fail(running.trial, result.get("failure", "ended without a report"))
            self._after_end(running)

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        with self._errors_end_sweep():
            error = _read_error(trial)
            running = self.trials.running.pop(trial.trial_id)
            name = running.trial.name
            lost = _machine_lost(error)
            if self.retry(running, machine_lost=bool(lost)):
                reason = lost or "its process died"
                self._log("trial_broke_off", trial=name, reason=reason)
                self.display.say(f"{name}: {reason}; it continues from its last checkpoint")
            else:
                self.trials.fail(running.trial, _failure_reason(error))
                self._after_end(running)

    def retry(self, running: RunningTrial, *, machine_lost: bool) -> bool:
        """Hand out a trial again whose process died; False if too often, lost machines aside."""
        epoch = running.numbers.get(EPOCH, 0.0)
        if epoch > running.epoch_at_death:
            running.epoch_at_death, running.deaths = epoch, 0
        running.deaths += not machine_lost
        if running.deaths > RETRIES:
            return False
        self.to_restart[running.trial.name] = running
        self.trials.put_back(running.trial)
        return True

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        self._check()
        if self._error is not None:
            raise self._error
        self.display.tick()
        if time.monotonic() - self._status_time >= STATUS_SECONDS:
            self._status_time = time.monotonic()
            self._update_status()

    def _update_status(self) -> None:
        """Release what ended groups hold; update the meters; log which nodes have joined or left."""
        if self.resources.nested:
            release_groups(self.retention)
        trials, running = self.trials, len(self.trials.running)
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
        trial = self.trials.ended[running.trial.name]
        failure = trial.reason if trial.state == "failed" else None
        self._log("trial_end", trial=trial.name, failure=failure)
        self._board.end(trial)
        self.retention.ended(trial.name)
        self.display.ended(trial, seconds=running.seconds)


def _read_error(trial: TuneTrial) -> BaseException | None:
    """A trial's exception, from the file that Tune has just written for it."""
    try:
        error: BaseException | None = ray.cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    except Exception as unreadable:  # unpickling a foreign exception may raise anything
        return unreadable
    return error


def _machine_lost(error: BaseException | None) -> str:
    """How a trial's machine was lost: drained, which the trial noticed, or dead; empty where it was not."""
    if isinstance(getattr(error, "cause", None), PreemptedError):
        return "its machine is about to be taken away"
    words = ("node has died", "node died")
    died = isinstance(error, RayActorError) and (error.preempted or any(w in str(error) for w in words))
    return "its machine is gone" if died else ""


def _failure_reason(error: BaseException | None) -> str:
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
