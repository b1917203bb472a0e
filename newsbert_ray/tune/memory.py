"""A sweep's memory: its points in an Optuna study, in a journal file that optuna-dashboard opens and a resume
goes on from. Knows points and their values; knows no seed, no folder of a trial, no Ray."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from newsbert_ray.tune.space import Axis, Point, SearchSpace, point_label

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

JOURNAL = "optuna.journal"


class Memory:
    """The points of one sweep: suggested, under way, finished. One process at a time writes to it."""

    def __init__(self, space: SearchSpace, folder: Path) -> None:
        """Open the study in `folder`, or begin it; points under way or failed when it was left are due."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._distributions = {axis.name: _distribution(axis) for axis in space.axes}
        self._study = _open(space, folder)
        self._left = self._take_up(space)
        self._due = space.points - self._count("COMPLETE") - len(self._left)

    @property
    def completed(self) -> list[tuple[int, Point, float]]:
        """Finished points in the order of their numbers: number, point, value."""
        return [(t.number, dict(t.params), float(t.values[0])) for t in self._trials("COMPLETE")]

    def next_point(self) -> tuple[int, Point] | None:
        """Number and settings of the next point to run; None when all have been handed out."""
        if self._left:
            return self._left.pop(0)
        if self._due <= 0:
            return None
        self._due -= 1
        trial = self._study.ask(fixed_distributions=self._distributions)
        point = dict(trial.params)
        trial.set_user_attr("point", point_label(point))
        return trial.number, point

    def tell(self, number: int, value: float | None) -> None:
        """A point's value; None where it has failed."""
        from optuna.trial import TrialState

        if value is None:
            self._study.tell(number, state=TrialState.FAIL)
        else:
            self._study.tell(number, value)

    def _take_up(self, space: SearchSpace) -> list[tuple[int, Point]]:
        """Points that were under way; enqueues failed ones, and those of a grid that are not there."""
        left, live = [], {point_label(_asked(trial)) for trial in self._trials("COMPLETE", "WAITING")}
        for trial in self._trials("RUNNING"):
            if set(trial.params) == set(self._distributions) and point_label(trial.params) not in live:
                left.append((trial.number, dict(trial.params)))
                live.add(point_label(trial.params))
            else:
                # Killed between its birth and its parameters, or one of two with the same parameters.
                self.tell(trial.number, None)
        wanted = [dict(t.params) for t in self._trials("FAIL") if set(t.params) == set(self._distributions)]
        if space.search.sampler == "grid":
            wanted = list(space.grid())
        for point in wanted:
            if point_label(point) not in live:
                self._study.enqueue_trial(point)
                live.add(point_label(point))
        return left

    def _trials(self, *states: str) -> list[FrozenTrial]:
        return [trial for trial in self._study.get_trials(deepcopy=False) if trial.state.name in states]

    def _count(self, state: str) -> int:
        return len(self._trials(state))


def _asked(trial: FrozenTrial) -> Point:
    """A trial's parameters, also where it waits with those that it was enqueued with."""
    return dict(trial.params) or dict(trial.system_attrs.get("fixed_params", {}))


def _open(space: SearchSpace, folder: Path) -> Study:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = folder / JOURNAL
    _mend(path)
    storage = JournalStorage(JournalFileBackend(str(path)))
    known = optuna.get_all_study_names(storage)
    begun = (
        len(optuna.load_study(study_name=space.name, storage=storage).trials) if space.name in known else 0
    )
    return optuna.create_study(
        storage=storage,
        study_name=space.name,
        direction="maximize" if space.mode == "max" else "minimize",
        # A resumed sampler with the very same seed would draw its first points again.
        sampler=_sampler(space, seed=space.search.seed + begun),
        load_if_exists=True,
    )


def _mend(path: Path) -> None:
    """Undo what a kill in the midst of a write leaves behind: half a last line, and Optuna's lock."""
    path.with_name(path.name + ".lock").unlink(missing_ok=True)
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with open(path, "r+b") as file:
            file.truncate(len(whole))


def _sampler(space: SearchSpace, *, seed: int) -> BaseSampler:
    from optuna.samplers import RandomSampler, TPESampler

    if space.search.sampler == "tpe":
        return TPESampler(seed=seed, multivariate=True, constant_liar=True)
    return RandomSampler(seed=seed)


def _distribution(axis: Axis) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.values is not None:
        return CategoricalDistribution(axis.values)
    ends: dict[str, Any] = {"low": axis.low, "high": axis.high, "log": axis.log}
    if axis.integer:
        return IntDistribution(int(ends["low"]), int(ends["high"]), log=axis.log, step=int(axis.step or 1))
    return FloatDistribution(**ends, step=axis.step)
