"""A sweep's memory: its points in an Optuna study, in a storage that optuna-dashboard opens and a resume goes
on from. Knows points and their values; knows no seed, no folder of a trial, no Ray."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from newsbert_ray.tune.space import Axis, Point, SearchSpace, point_label
from newsbert_ray.tune.storage import JOURNAL as JOURNAL
from newsbert_ray.tune.storage import StudyError, one_message, open_storage, shown_storage

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial, Trial


_DIRECTION: Mapping[str, Literal["maximize", "minimize"]] = {"max": "maximize", "min": "minimize"}

IDENTITY = "newsbert_ray_sweep"
"""The study's attribute that says whose it is."""


@dataclass(frozen=True)
class Ended:
    """A point that has its values; where it was stopped early, the values that it had then."""

    number: int
    point: Point
    values: tuple[float, ...]
    stopped: bool


class Memory:
    """The points of one sweep: suggested, under way, ended. One process at a time writes to it."""

    def __init__(self, space: SearchSpace, folder: Path, identity: str = "") -> None:
        """Open the sweep's study, or begin it; points under way or failed when it was left are due.

        Args:
            folder: the sweep's; the journal file lies there where the space names no other storage.
            identity: what only this sweep is called; another one's study is refused.
        Raises:
            StudyError: the storage cannot be opened, or holds another sweep of this name.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._folder = space, folder
        self._storage = open_storage(space.search.storage, folder)
        with self._plainly():
            self._study = _open(space, self._storage, folder, identity)
            wanted = space.points - len(self.ended)
            # A resume may ask for fewer points than were begun; the others stay as they are.
            self._left = self._take_up()[: max(0, wanted)]
            self._due = wanted - len(self._left)

    @property
    def ended(self) -> list[Ended]:
        """Points with values, finished or stopped early, in the order of their numbers."""
        return [
            Ended(t.number, self._point(t), tuple(t.values or ()), stopped=t.state.name == "PRUNED")
            for t in self._trials("COMPLETE", "PRUNED")
        ]

    def next_point(self) -> tuple[int, Point] | None:
        """Number and settings of the next point to run; None when all have been handed out."""
        if self._left:
            return self._left.pop(0)
        if self._due <= 0:
            return None
        self._due -= 1
        with self._plainly():
            trial, point = self._study.ask(), Point()
            for axis in self._space.axes:
                if axis.is_active(point):
                    point[axis.name] = _suggest(trial, axis)
            trial.set_user_attr("point", point_label(point))
        return trial.number, point

    def tell(
        self,
        number: int,
        values: tuple[float, ...] | None,
        *,
        curve: Sequence[tuple[float, float]] = (),
        stopped: bool = False,
    ) -> None:
        """How a point ended.

        Args:
            values: one number per goal, the mean over the seeds; None where it has failed.
            curve: epoch and first goal's mean at each evaluation; of one goal only.
            stopped: ended early; its value is then the curve's last.
        """
        from optuna.trial import TrialState

        if stopped and values and not curve:
            curve = [(1.0, values[0])]
        with self._plainly():
            if len(self._space.goals) == 1:
                study_id = self._storage.get_study_id_from_name(self._space.name)
                trial_id = self._storage.get_trial_id_from_study_id_trial_number(study_id, number)
                for step, value in {round(epoch): value for epoch, value in curve}.items():
                    self._storage.set_trial_intermediate_value(trial_id, step, value)
            if stopped or values is None:
                self._study.tell(number, state=TrialState.PRUNED if stopped else TrialState.FAIL)
            else:
                self._study.tell(number, list(values))

    def _take_up(self) -> list[tuple[int, Point]]:
        """Points that were under way; enqueues failed ones, starting points and those of a grid that are not
        there."""
        known = self._trials("COMPLETE", "PRUNED", "WAITING")
        left, live = [], {point_label(self._point(trial)) for trial in known}

        def enqueue(point: Point) -> None:
            if point_label(point) not in live:
                self._study.enqueue_trial(point)
                live.add(point_label(point))

        for trial in self._trials("RUNNING"):
            point = self._point(trial)
            if self._is_whole(trial) and point_label(point) not in live:
                left.append((trial.number, point))
                live.add(point_label(point))
                continue
            # Killed between its birth and its last parameter, or one of two with the same parameters.
            if not self._is_whole(trial) and "fixed_params" in trial.system_attrs:
                enqueue(dict(trial.system_attrs["fixed_params"]))
            self.tell(trial.number, None)
        begun = [trial.system_attrs.get("fixed_params") for trial in self._study.get_trials(deepcopy=False)]
        for point in self._space.start:
            if point not in begun:
                enqueue(point)
        failed = [self._point(trial) for trial in self._trials("FAIL") if self._is_whole(trial)]
        for point in self._space.grid() if self._space.search.sampler == "grid" else failed:
            enqueue(point)
        return left

    def _point(self, trial: FrozenTrial) -> Point:
        """A trial's parameters, or those that it waits with; a database may give them in any order."""
        found = trial.params or trial.system_attrs.get("fixed_params", {})
        return {axis.name: found[axis.name] for axis in self._space.axes if axis.name in found}

    def _is_whole(self, trial: FrozenTrial) -> bool:
        """Whether it has a value for each axis that varies at its point."""
        return set(trial.params) == {a.name for a in self._space.axes if a.is_active(trial.params)}

    def _trials(self, *states: str) -> list[FrozenTrial]:
        with self._plainly():
            trials = self._study.get_trials(deepcopy=False)
        return [trial for trial in trials if trial.state.name in states]

    def _plainly(self) -> AbstractContextManager[None]:
        return one_message(self._space.search.storage, self._folder)


def _open(space: SearchSpace, storage: BaseStorage, folder: Path, identity: str) -> Study:
    import optuna
    from optuna.exceptions import ExperimentalWarning

    if space.name in optuna.get_all_study_names(storage):
        known = optuna.load_study(study_name=space.name, storage=storage)
        begun = len(known.get_trials(deepcopy=False))
        _require_own(space, known, identity, begun=begun)
    else:
        begun = 0
    study = optuna.create_study(
        storage=storage,
        study_name=space.name,
        directions=[_DIRECTION[goal.mode] for goal in space.goals],
        # A resumed sampler with the very same seed would draw its first points again.
        sampler=_sampler(space, seed=space.search.seed + begun),
        load_if_exists=True,
    )
    if study.user_attrs.get(IDENTITY) != identity:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names([goal.metric for goal in space.goals])
        study.set_user_attr(IDENTITY, identity)
    return study


def _require_own(space: SearchSpace, study: Study, identity: str, *, begun: int) -> None:
    """Refuse a study that another sweep began; one killed at its very birth has no identity and no trial."""
    directions = [_DIRECTION[goal.mode] for goal in space.goals]
    of_another = identity and study.user_attrs.get(IDENTITY, "" if begun else identity) != identity
    if of_another or [d.name.lower() for d in study.directions] != directions:
        where, cure = JOURNAL, "another --out"
        if space.search.storage is not None:
            where = f"storage {shown_storage(space.search.storage)}"
            cure = "the search space another `name:`, or another --search.storage"
        raise StudyError(
            f"{where}: holds another sweep's study '{space.name}' already ({begun} points); give {cure}"
        )


def _sampler(space: SearchSpace, *, seed: int) -> BaseSampler:
    from optuna.exceptions import ExperimentalWarning
    from optuna.samplers import GPSampler, NSGAIISampler, RandomSampler, TPESampler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        match space.search.sampler:
            case "tpe":
                # Without groups, TPE would draw conditional axes one by one.
                grouped = any(axis.when for axis in space.axes)
                return TPESampler(seed=seed, multivariate=True, constant_liar=True, group=grouped)
            case "nsga2":
                # Optuna's 50 a generation would leave a short search with nothing but its random first one.
                return NSGAIISampler(seed=seed, population_size=max(8, min(50, space.points // 5)))
            case "gp":
                if find_spec("scipy") is None:
                    raise StudyError(
                        "the gp sampler needs the package scipy: pip install scipy, or take "
                        "--search.sampler tpe"
                    )
                return GPSampler(seed=seed)
            case _:
                return RandomSampler(seed=seed)


def _suggest(trial: Trial, axis: Axis) -> Any:
    """A value for `axis`, by the study's sampler."""
    if axis.values is not None:
        return trial.suggest_categorical(axis.name, axis.values)
    assert axis.low is not None
    assert axis.high is not None
    if axis.integer:
        return trial.suggest_int(
            axis.name, int(axis.low), int(axis.high), step=int(axis.step or 1), log=axis.log
        )
    return trial.suggest_float(axis.name, axis.low, axis.high, step=axis.step, log=axis.log)
