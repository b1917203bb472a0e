"""A sweep's points in an Optuna study, in a journal file or a database, from which a resumed sweep continues;
and which of its trials end early, by Ray's schedulers. Knows no seeds and no trial folders."""

from __future__ import annotations

import itertools
import os
import random
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast
from urllib.parse import unquote

from newsbert_ray.files import first_line
from newsbert_ray.reporting.sweep_data import Axis, point_label
from newsbert_ray.secrets import MASK, find_secrets, mask_url
from newsbert_ray.tune.space import PointValues, SearchSpace

if TYPE_CHECKING:
    import optuna
    from ray.tune.schedulers import TrialScheduler

JOURNAL = "optuna.journal"
EPOCH = "epoch"
SIMULATIONS = 20
"""Random orders of the trials over which a saving is averaged."""

Curve = Sequence[tuple[float, float]]
"""(epochs done, the first goal's metric) at each evaluation, in order."""
IDENTITY = "newsbert_ray_sweep"
"""Attribute of the study that names the sweep it belongs to."""

_DIRECTION: Mapping[str, Literal["maximize", "minimize"]] = {"max": "maximize", "min": "minimize"}
_USE_ANOTHER = "give another --search.storage, or none for a journal file in the sweep's folder"
_TRY_LATER = "once it can be written again, continue with --resume"


class StudyError(ValueError):
    """A storage that cannot be opened or written, or that holds another sweep; the text is one message."""


class StudyPoint(NamedTuple):
    """A point that has ended, with one value for each goal; of a stopped point the last values it had."""

    number: int
    values: PointValues
    results: tuple[float, ...]
    stopped: bool


class SweepStudy:
    """The points of one sweep: drawn, running, ended. Only one process at a time writes to it."""

    def __init__(self, space: SearchSpace, folder: Path, identity: str = "") -> None:
        """Open or create the study of a sweep in `folder` by its unique `identity`. Points that were running,
        or had failed, are run again. Raises StudyError, also where it holds another sweep of this name."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._folder = space, folder
        self._storage = open_storage(space.search.storage, folder)
        with self._storage_errors():
            self._study = _open_study(space, self._storage, identity)
            wanted = space.points - len(self.ended)
            # A resume may ask for fewer points than were started; the others stay as they are.
            self._restarted = self._restart_points()[: max(0, wanted)]
            self._to_draw = wanted - len(self._restarted)

    @property
    def ended(self) -> list[StudyPoint]:
        """Points that finished or were stopped early, in the order of their numbers."""
        return [
            StudyPoint(t.number, self._values(t), tuple(t.values or ()), stopped=t.state.name == "PRUNED")
            for t in self._trials("COMPLETE", "PRUNED")
        ]

    def next_point(self) -> tuple[int, PointValues] | None:
        """Number and values of the next point to run; None when all have been handed out."""
        if self._restarted:
            return self._restarted.pop(0)
        if self._to_draw <= 0:
            return None
        self._to_draw -= 1
        with self._storage_errors():
            trial, point = self._study.ask(), PointValues()
            for axis in self._space.axes:
                if axis.is_active(point):
                    point[axis.name] = _suggest(trial, axis)
            trial.set_user_attr("point", point_label(point))
        return trial.number, point

    def tell(
        self, number: int, results: Sequence[float], *, curve: Curve = (), stopped: bool = False
    ) -> None:
        """Record how a point ended: its mean for each goal, none where it failed; and with a single goal its
        `curve`, epoch and mean at each evaluation."""
        from optuna.trial import TrialState

        if stopped and results and not curve:
            curve = [(1.0, results[0])]
        with self._storage_errors():
            if len(self._space.goals) == 1:
                study_id = self._storage.get_study_id_from_name(self._space.name)
                trial_id = self._storage.get_trial_id_from_study_id_trial_number(study_id, number)
                for step, value in {round(epoch): value for epoch, value in curve}.items():
                    self._storage.set_trial_intermediate_value(trial_id, step, value)
            if stopped or not results:
                self._study.tell(number, state=TrialState.PRUNED if stopped else TrialState.FAIL)
            else:
                self._study.tell(number, list(results))

    def _restart_points(self) -> list[tuple[int, PointValues]]:
        """Points that were running; enqueues failed points, starting points, and a grid's unknown points."""
        running: list[tuple[int, PointValues]] = []
        known = {point_label(self._values(t)) for t in self._trials("COMPLETE", "PRUNED", "WAITING")}

        def enqueue(point: PointValues) -> None:
            if point_label(point) not in known:
                self._study.enqueue_trial(point)
                known.add(point_label(point))

        for trial in self._trials("RUNNING"):
            point = self._values(trial)
            if self._is_complete(trial) and point_label(point) not in known:
                running.append((trial.number, point))
                known.add(point_label(point))
                continue
            # Killed before its last parameter was drawn, or one of two trials with the same parameters.
            if not self._is_complete(trial) and "fixed_params" in trial.system_attrs:
                enqueue(dict(trial.system_attrs["fixed_params"]))
            self.tell(trial.number, ())
        before = [t.system_attrs.get("fixed_params") for t in self._study.get_trials(deepcopy=False)]
        failed = [self._values(trial) for trial in self._trials("FAIL") if self._is_complete(trial)]
        again = self._space.grid() if self._space.search.sampler == "grid" else failed
        for point in itertools.chain((p for p in self._space.start if p not in before), again):
            enqueue(point)
        return running

    def _values(self, trial: optuna.trial.FrozenTrial) -> PointValues:
        """A trial's parameters, or those it was enqueued with, in the order of the axes."""
        params = trial.params or trial.system_attrs.get("fixed_params", {})
        return {axis.name: params[axis.name] for axis in self._space.axes if axis.name in params}

    def _is_complete(self, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether it has a value for each axis that is active at its point."""
        return set(trial.params) == {a.name for a in self._space.axes if a.is_active(trial.params)}

    def _trials(self, *states: str) -> list[optuna.trial.FrozenTrial]:
        with self._storage_errors():
            trials = self._study.get_trials(deepcopy=False)
        return [trial for trial in trials if trial.state.name in states]

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        """Raise an error of the open storage (disk full, server gone) as a StudyError without password."""
        from optuna.exceptions import StorageInternalError
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (OSError, StorageInternalError, SQLAlchemyError) as error:
            raise _study_error(error, self._space.search.storage, self._folder, cure=_TRY_LATER) from None


def _open_study(space: SearchSpace, storage: optuna.storages.BaseStorage, identity: str) -> optuna.Study:
    import optuna

    name, directions = space.name, [_DIRECTION[goal.mode] for goal in space.goals]
    study = optuna.create_study(study_name=name, directions=directions, storage=storage, load_if_exists=True)
    started = len(study.get_trials(deepcopy=False))
    # One without identity and trials was killed while it was created.
    foreign = identity and study.user_attrs.get(IDENTITY, "" if started else identity) != identity
    if foreign or [d.name.lower() for d in study.directions] != directions:
        where, cure = JOURNAL, "another --out"
        if url := space.search.storage:
            where = f"storage {shown_storage(url)}"
            cure = "the search space another `name:`, or another --search.storage"
        message = f"holds the study '{space.name}' of another sweep ({started} points)"
        raise StudyError(f"{where}: {message}; give {cure}")
    # A resumed sampler with the same seed would draw its first points again.
    study.sampler = _sampler(space, seed=space.search.seed + started)
    if study.user_attrs.get(IDENTITY) != identity:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([goal.metric for goal in space.goals])
        study.set_user_attr(IDENTITY, identity)
    return study


def _sampler(space: SearchSpace, *, seed: int) -> optuna.samplers.BaseSampler:
    from optuna import exceptions, samplers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", exceptions.ExperimentalWarning)
        match space.search.sampler:
            case "tpe":
                # Without groups, TPE would draw conditional axes independently.
                grouped = any(axis.when for axis in space.axes)
                return samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True, group=grouped)
            case "nsga2":
                # With Optuna's 50 points a generation, a short search would only see the random first one.
                return samplers.NSGAIISampler(seed=seed, population_size=max(8, min(50, space.points // 5)))
            case "gp":
                return samplers.GPSampler(seed=seed)
            case _:
                return samplers.RandomSampler(seed=seed)


def _suggest(trial: optuna.Trial, axis: Axis) -> Any:
    if axis.values is not None:
        return trial.suggest_categorical(axis.name, axis.values)
    low, high = cast(float, axis.low), cast(float, axis.high)
    if axis.integer:
        step = int(axis.step or 1)
        return trial.suggest_int(axis.name, int(low), int(high), step=step, log=axis.log)
    return trial.suggest_float(axis.name, low, high, step=axis.step, log=axis.log)


def shown_storage(url: str) -> str:
    """`url` with its password masked: the only form that is shown or written to a file."""
    return MASK if "://" not in url and "@" in url else mask_url(url)


def absolute_storage(url: str) -> str:
    """`url` with an SQLite file's path absolute, so that a resume from another folder finds it."""
    scheme, separator, path = url.partition(":///")
    relative = separator and path and not path.startswith((":", "/", "file:"))
    if not relative or scheme.partition("+")[0] != "sqlite":
        return url
    return f"{scheme}:///{Path(path).absolute()}"


def open_storage(url: str | None, folder: Path) -> optuna.storages.BaseStorage:
    """Optuna's storage at `url`, or the journal file in `folder`, repaired after a kill. Raises StudyError
    where it cannot be opened, or its driver is not installed."""
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    try:
        if url is not None:
            return RDBStorage(url)
        # A kill during a write leaves an incomplete last line and Optuna's lock behind.
        path = folder / JOURNAL
        path.with_name(f"{JOURNAL}.lock").unlink(missing_ok=True)
        if path.exists():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        return JournalStorage(JournalFileBackend(str(path)))
    except Exception as error:
        # Database drivers raise exceptions of their own; as a cause one might show the password.
        raise _study_error(error, url, folder, cure=_USE_ANOTHER) from None


def _study_error(error: Exception, url: str | None, folder: Path, *, cure: str) -> StudyError:
    cause: BaseException = error
    while cause.__cause__ is not None:  # SQLAlchemy's own message contains a page of SQL
        cause = cause.__cause__
    reason, where, what = first_line(cause), str(folder / JOURNAL), "cannot be opened or written"
    if url is not None:
        where = f"storage {shown_storage(url)}"
        reason = reason.replace(url, shown_storage(url))
        for secret in find_secrets(url):
            reason = reason.replace(secret, MASK).replace(unquote(secret), MASK)
        if isinstance(error, ImportError):
            what, cure = "its driver is not installed", f"install it, or {cure}"
    elif isinstance(error, OSError):
        what, cure = "cannot be read or written", _TRY_LATER
    else:
        what, reason = "damaged", f"{type(error).__name__}: {reason}"
        cure = "move it away and continue with --resume: the results in the trials' folders count"
    return StudyError(f"{where}: {what} ({reason}); {cure}")


class _NamedTrial(NamedTuple):
    """A trial as far as Ray's schedulers use it."""

    trial_id: str


class EarlyStopping:
    """Decides which trials end early, by the rungs of all trials it has seen. A trial is never stopped at its
    last epoch: that is already paid for."""

    def __init__(self, space: SearchSpace, *, epochs: int) -> None:
        """Decide by the first goal of `space`; `epochs`: the most that a trial may have."""
        self.reason = space.scheduler
        self._metric = space.metric
        self._scheduler = _ray_scheduler(space, epochs=epochs)
        self._trials: dict[str, Any] = {}
        # The median rule asks for waiting trials, in order to pause one; our trials are never paused.
        self._controller: Any = SimpleNamespace(get_live_trials=list)

    def should_stop(self, name: str, result: Mapping[str, Any], *, epochs: int) -> bool:
        """Whether the trial `name`, of so many `epochs`, ends with this evaluation."""
        if self._scheduler is None or EPOCH not in result or self._metric not in result:
            return False
        if name not in self._trials:
            self._trials[name] = _NamedTrial(name)
            self._scheduler.on_trial_add(self._controller, self._trials[name])
        decision = self._scheduler.on_trial_result(self._controller, self._trials[name], dict(result))
        return decision == "STOP" and result[EPOCH] < epochs


def _ray_scheduler(space: SearchSpace, *, epochs: int) -> TrialScheduler | None:
    if space.scheduler == "none":
        return None
    from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule

    options: dict[str, Any] = {"time_attr": EPOCH, "metric": space.metric, "mode": space.goals[0].mode}
    options["grace_period"] = min(space.stopping.grace, epochs)
    if space.scheduler == "median":
        return MedianStoppingRule(**options)
    options |= {"max_t": epochs, "reduction_factor": space.stopping.factor, "stop_last_trials": False}
    return AsyncHyperBandScheduler(**options)


class Saving(NamedTuple):
    """What remains with early stopping: the shares of epochs and of trials that reach their end; and why."""

    epochs: float
    finished: float
    source: str


def estimate_saving(
    space: SearchSpace, epochs: Sequence[int], *, slots: int, curves: Sequence[Curve] | None = None
) -> Saving:
    """What early stopping leaves of trials of so many `epochs`, over SIMULATIONS random orders. Recorded
    curves are assigned at random, the last value of a short one stays; without, trials keep their rank."""
    generator = random.Random(space.search.seed)
    spent, finished = 0, 0
    for _ in range(SIMULATIONS):
        if not curves:
            drawn: Sequence[Curve] = [[(1.0, generator.random())] for _ in epochs]
        elif len(curves) >= len(epochs):
            drawn = generator.sample(curves, len(epochs))
        else:
            drawn = generator.choices(curves, k=len(epochs))
        trials = []
        for last, curve in zip(epochs, drawn, strict=True):
            # At each epoch the last value by its end; before the first evaluation, that one's value.
            known = (bisect_right(curve, epoch, key=itemgetter(0)) for epoch in range(1, last + 1))
            trials.append([curve[max(1, count) - 1][1] for count in known])
        for trial_epochs, is_finished in _simulate(space, trials, slots=slots):
            spent += trial_epochs
            finished += is_finished
    source = "assuming that trials keep their rank from the first epoch to the last"
    if curves:
        source = f"simulated on {len(curves)} recorded curves in random order"
    return Saving(spent / (SIMULATIONS * sum(epochs)), finished / (SIMULATIONS * len(epochs)), source)


def _simulate(space: SearchSpace, trials: list[list[float]], *, slots: int) -> Iterator[tuple[int, bool]]:
    early = EarlyStopping(space, epochs=max(map(len, trials)))
    waiting, running = list(range(len(trials))), dict[int, int]()
    while waiting or running:
        while waiting and len(running) < slots:
            running[waiting.pop(0)] = 0
        for number, epoch in [(number, done + 1) for number, done in running.items()]:
            running[number], values = epoch, trials[number]
            result = {EPOCH: float(epoch), space.metric: values[epoch - 1]}
            stopped = early.should_stop(str(number), result, epochs=len(values))
            if stopped or epoch == len(values):
                del running[number]
                yield epoch, not stopped
