"""`newsbert-ray sweep`: opens the sweep's folder, runs its trials on Ray, prints and reports the results."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from rich.console import Console

from newsbert_ray.config import SCRATCH, SettingsError, TrainSettings, merge
from newsbert_ray.data.shards import read_manifest
from newsbert_ray.files import format_duration, locked, write_json
from newsbert_ray.ray_session import StopSignals, ray_session
from newsbert_ray.record import RECORD, STOPPED, installed_versions
from newsbert_ray.reporting.sweep_data import FAILURES, SWEEP, TRIALS, Point, Trial, resume_command
from newsbert_ray.settings import flatten
from newsbert_ray.storage.bucket import StorageError
from newsbert_ray.storage.workdir import WorkDir, download_input, fetch, is_location, open_workdir
from newsbert_ray.telemetry import EVENTS, EventLog
from newsbert_ray.trackers import TrackedRun, require_tracker, tracked
from newsbert_ray.tune import display
from newsbert_ray.tune.display import say
from newsbert_ray.tune.space import SearchSpace
from newsbert_ray.tune.space_file import Changes, build_space, restore_changes
from newsbert_ray.tune.study import JOURNAL, SweepStudy, shown_storage
from newsbert_ray.tune.trial import Train, TrialConfig, check_nodes, check_space, trial_settings
from newsbert_ray.tune.trials import Resources, Retention, Trials, plan_resources

ESTIMATE = "plan.json"
MARKS = (SWEEP, ESTIMATE)
"""One of these files is in every sweep's folder."""
FORMAT = 2
FREE = ("limits", "prices", "gpus", "keep_students")
"""Parts of a search space that may change when a sweep is resumed: they do not affect results."""


class SweepError(ValueError):
    """A sweep that cannot start or continue; the text names the folder and the cure."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep has found: `out` is its folder on this machine, `location` the folder or URL that the user
    named; `command` trains the best point again, empty where no trial finished."""

    out: Path
    location: str | Path
    points: tuple[Point, ...]
    best: Point | None
    command: str
    seconds: float
    report: tuple[Path, ...] = ()

    @property
    def failures(self) -> dict[str, str]:
        """Reason of each failed trial, by name."""
        return {trial.name: trial.reason for point in self.points for trial in point.of_state("failed")}


@dataclass(frozen=True)
class OpenSweep:
    """A sweep in its locked folder, and at work there."""

    workdir: WorkDir
    space: SearchSpace
    """As the command has changed it."""
    changes: Changes
    first: TrainSettings
    """The first trial's settings."""
    messages: tuple[str, ...]
    before: Mapping[str, Any]
    """sweep.json of an earlier start."""
    corpora: tuple[str, ...]
    """Fingerprints of the shards, empty where not read."""
    began: float

    @cached_property
    def plan(self) -> dict[str, Any]:
        """Content of sweep.json: search space, changes, settings of all trials, seconds of earlier starts."""
        space, changes, before = self.space, self.changes, self.before
        given = {"overrides": changes.overrides, "vary": changes.vary}
        return {
            "format": FORMAT,
            "space": _without_password(space.model_dump(mode="json", exclude={"file"})),
            "file": space.file,
            **json.loads(json.dumps({**given, "control": _without_password(changes.control)})),
            "settings": self.first.model_dump(mode="json", exclude={"out", "seed"}),
            "varied": [axis.name for axis in space.axes],
            "metric": space.metric,
            "mode": space.goals[0].mode,
            "scheduler": space.scheduler,
            "identity": before.get("identity", uuid.uuid4().hex),
            "trials": space.points * len(space.seeds),
            "corpora": list(self.corpora) or before.get("corpora", []),
            "place": before.get("place", {}),
            "seconds": before.get("seconds", 0.0),
            "defaults": defaults_of(before),
            "versions": installed_versions(),
            # The folder's name on this machine means nothing elsewhere.
            **({"url": self.workdir.location} if self.workdir.is_remote else {}),
        }

    @property
    def seconds(self) -> float:
        """Wall time of all starts."""
        return float(self.plan["seconds"]) + time.monotonic() - self.began

    def write(self, state: str, **more: Any) -> None:
        content = {**self.plan, "state": state, "seconds": self.seconds, **more}
        write_json(self.workdir.path / SWEEP, content)

    def start(
        self,
        trials: Trials,
        console: Console,
        check: Callable[[], None],
        *,
        concurrency: int | None,
        train: Train | None,
    ) -> Retention | None:
        """Run the trials that are due on Ray; None, without starting Ray, where none is."""
        trials.collect()
        if not trials.due:
            return None
        from newsbert_ray.tune.ray_tune import SweepCallback, node_resources, run_trials

        space, first = self.space, self.first
        shown = {key: self.plan[key] for key in ("file", "metric", "scheduler", "trials", "vary", "settings")}
        with ray_session() as session, tracked(first.track, trials.folder, shown, kind="sweep") as tracker:
            if not session.private:
                teachers = filter(is_location, space.samples_of("teacher", first.teacher))
                inputs = {"data": space.samples_of("data", first.data), "teachers": list(teachers)}
                check_nodes(self.workdir, **inputs if train is None else {})
            resources = plan_resources(
                first,
                node_resources(),
                trials=trials.due,
                concurrency=concurrency,
                gpus=space.gpus,
                growing=session.has_autoscaler,
            )
            # The report computes CPU-hours from it.
            cpus, gpus = resources.trial_cpus, resources.trial_gpus
            self.plan["place"] = {"slots": resources.slots, "cpus": cpus, "gpus": gpus}
            self.write("running")
            self.workdir.publish()
            say(console, *display.starting(trials, resources, session.dashboard))
            config = partial(self._trial_config, resources, shared=not session.private, tracked=tracker.run)
            callback = SweepCallback(trials, first, resources, console=console, check=check)
            run_trials(callback, config, train=train)
            if best := trials.best():
                means = zip(space.goals, best.means, strict=True)
                tracker.log({"best": {goal.metric: mean for goal, mean in means}}, len(trials.ended))
        if trials.unfinished and not trials.end_reason:
            raise KeyboardInterrupt
        return callback.retention

    def _trial_config(
        self, resources: Resources, trial: Trial, *, shared: bool, tracked: TrackedRun | None
    ) -> TrialConfig:
        """What a trial's actor receives; `shared`: it may run on a machine without the sweep's folder."""
        workdir, overrides = self.workdir, self.changes.overrides
        out = workdir.child(TRIALS, trial.name).location
        settings = trial_settings(self.space, trial.point, seed=trial.seed, out=out, overrides=overrides)
        if settings.workers > resources.workers:
            reserved = f"this sweep reserves {resources.workers} for each trial"
            raise SettingsError(f"workers = {settings.workers}: {reserved}; do not vary it")
        return TrialConfig(
            settings=settings,
            metrics=tuple(goal.metric for goal in self.space.goals),
            failures=workdir.child(FAILURES).absolute(),
            sweep=workdir.absolute() if shared else None,
            gpus=resources.gpus,
            tracked=tracked,
        )

    def result(self, trials: Trials) -> SweepResult:
        """The outcome, without the report."""
        best, points, location = trials.best(), tuple(trials.points.values()), self.workdir.location
        command = display.train_command(self.space, best, self.changes.overrides, location) if best else ""
        return SweepResult(trials.folder, location, points, best, command, self.seconds)


DEFAULTS_0_1 = {"learning_rate": 5e-5, "optimizer": {"warmup_share": 0.0, "decay": "none"}}
"""Defaults of version 0.1 that have changed: a sweep that began with them goes on with them."""


@contextmanager
def open_sweep(
    file: str | Path,
    changes: Changes,
    *,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    read_data: bool = True,
) -> Iterator[OpenSweep]:
    """Lock the sweep's folder and check everything that is known without Ray."""
    began = time.monotonic()
    if resume and overwrite:
        raise SettingsError("give only one of resume and overwrite")
    with open_workdir(out, markers=MARKS, small=True) as workdir, lock_folder(workdir.path):
        if overwrite:
            workdir.clear()
        before = read_plan(workdir.path)
        changes = restore_changes(changes, before if resume else {})
        space, messages = build_space(file, changes)
        if defaults_of(before) == "0.1":
            space = space.model_copy(update={"settings": merge(DEFAULTS_0_1, space.settings)})
            before["space"]["settings"] = merge(DEFAULTS_0_1, before["space"]["settings"])
        first = check_space(space, out=workdir.location, overrides=changes.overrides)
        require_tracker(first.track)
        corpora = check_corpora(space, first) if read_data else ()
        yield OpenSweep(workdir, space, changes, first, tuple(messages), before, corpora, began)


def sweep(
    space: str | Path,
    changes: Changes,
    *,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    concurrency: int | None = None,
    train: Train | None = None,
) -> SweepResult:
    """Run every trial of a search space, print its table, and write the report; see `newsbert_ray.sweep`."""
    console, modes = Console(), {"resume": resume, "overwrite": overwrite, "read_data": train is None}
    with StopSignals() as signals, open_sweep(space, changes, out=out, **modes) as run:
        workdir, before = run.workdir, run.before
        require_same(workdir.location, before, run.plan, resume=resume)
        run.write("running")
        log = EventLog(workdir.path)
        log("resume" if before else "start", space=str(space))
        try:
            study = SweepStudy(run.space, workdir.path, run.plan["identity"])
            trials = Trials(run.space, study, workdir)
            say(console, *run.messages, *display.opening(trials))
            retention = run.start(trials, console, signals.check, concurrency=concurrency, train=train)
        except KeyboardInterrupt:
            run.write("interrupted")
            log("interrupted")
            # From the trials' folders alone: right whatever was interrupted.
            done, early = (len([*workdir.path.glob(f"{TRIALS}/*/{file}")]) for file in (RECORD, STOPPED))
            ended = f"interrupted: {done} trials finished, {early} stopped early"
            again = resume_command(run.space.file, workdir.location)
            say(console, f"{ended}. Continue with:", f"  {again}")
            workdir.publish()
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            if not before and not (workdir.path / TRIALS).exists():
                # Nothing of this sweep stays, so that the corrected command works.
                for name in (SWEEP, JOURNAL, EVENTS, f".{EVENTS}.lock"):
                    (workdir.path / name).unlink(missing_ok=True)
            else:
                run.write("broken off", ends=reason)
                log("error", reason=reason)
            if not isinstance(error, StorageError):
                workdir.publish()
            raise
        result, ends = run.result(trials), trials.end_reason
        failures, state = result.failures, "ended at a limit" if ends else "finished"
        with_failures = f"{state} with failures" if failures else state
        run.write(with_failures, ends=ends, best=result.command, failures=failures)
        log("end", state=state, failures=len(failures))
        if result.best:
            from newsbert_ray.reporting.report import report

            result = replace(result, report=tuple(report([result.out], out=result.out / "report")))
        workdir.publish()
        comparison = ""
        if retention and not before and not ends:
            subject, slots = estimate_subject(run.space, run.changes.overrides), retention.slots
            comparison = compare_with_estimate(workdir.path, subject, seconds=run.seconds, slots=slots)
    display.print_result(result, trials, retention, console, comparison=comparison)
    return result


@contextmanager
def lock_folder(out: Path) -> Iterator[None]:
    """Hold the sweep's folder for this process alone; SweepError where that cannot be."""
    if out.exists() and not out.is_dir():
        raise SweepError(f"{out}: is a file; give another --out")
    ours = {SWEEP, ESTIMATE, ".lock"}
    if out.is_dir() and any(out.iterdir()) and not ours & {path.name for path in out.iterdir()}:
        raise SweepError(f"{out}: holds other files and no sweep; give an empty or new folder as --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".lock").touch()
    except OSError as error:
        raise SweepError(f"{out}: cannot be written ({error}); give another --out") from error
    busy = SweepError(f"{out}: another sweep runs in it; wait for it, or give another --out")
    with locked(out / ".lock", error=busy):
        yield


def defaults_of(plan: Mapping[str, Any]) -> str:
    """The version whose default settings a sweep's trials have: that in which it was started."""
    return str(plan.get("defaults", "0.1")) if plan else "0.2"


def _without_password(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the storage's password masked: everybody who reads the results reads sweep.json."""
    url = values.get("search", {}).get("storage")
    return merge(values, {"search.storage": shown_storage(url)}) if url else dict(values)


def read_plan(out: Path) -> dict[str, Any]:
    """sweep.json, empty where there is none; SweepError where it is damaged, or of another version."""
    path = out / SWEEP
    if not path.exists():
        return {}
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        if plan["format"] == FORMAT and {"space", "overrides", "vary", "control", "identity"} <= plan.keys():
            return dict(plan)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise SweepError(f"{path}: damaged, or written by another version; give another --out")


def require_same(out: str, before: Mapping[str, Any], plan: Mapping[str, Any], *, resume: bool) -> None:
    """Raise SweepError instead of continuing another sweep, on other shards, or without --resume."""
    if not before:
        return
    old, new = (
        flatten(_fixed_part(values["space"]))
        | {f"--{name}": value for name, value in flatten(values["overrides"]).items()}
        for values in (before, plan)
    )
    differences = [
        f"{key} {_short(old.get(key))} instead of {_short(new.get(key))}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]
    if differences:
        raise SweepError(
            f"{out}: holds another sweep, with {', '.join(differences)}; give its settings and --resume to "
            "go on with it, another --out for a new one, or --overwrite to replace it"
        )
    if before.get("corpora") and plan["corpora"] and before["corpora"] != plan["corpora"]:
        was, now = (", ".join(name[:12] for name in names) for names in (before["corpora"], plan["corpora"]))
        what = f"holds trials on other shards (fingerprint {was}, now {now})"
        raise SweepError(f"{out}: {what}: the shards were prepared again; give another --out, or --overwrite")
    if not resume:
        what = f"holds this sweep already ({before.get('state', 'unknown')})"
        raise SweepError(f"{out}: {what}; continue with --resume, or give another --out or --overwrite")


def _fixed_part(space: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a search space that must stay the same; a sweep may be given more trials."""
    search = {key: value for key, value in space.get("search", {}).items() if key != "trials"}
    return {key: value for key, value in space.items() if key not in FREE} | {"search": search}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:197] + "..."


def compare_with_estimate(out: Path, subject: Mapping[str, Any], *, seconds: float, slots: int) -> str:
    """How close plan.json in `out` was to what the sweep took; empty where there is none for this sweep."""
    try:
        plan = json.loads((out / ESTIMATE).read_text(encoding="utf-8"))
        if plan["of"] != subject or plan["slots"] != slots:
            return ""
        wall = float(plan["wall"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f"planned {format_duration(wall)}, took {format_duration(seconds)} ({seconds / wall - 1:+.0%})"


def estimate_subject(space: SearchSpace, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What an estimate is for: everything that affects how long the sweep takes."""
    values = _fixed_part(space.model_dump(mode="json", exclude={"file"}))
    return dict(json.loads(json.dumps({**values, "points": space.points, "overrides": overrides})))


def check_corpora(space: SearchSpace, first: TrainSettings) -> tuple[str, ...]:
    """Fingerprints of the shards that trials read; each teacher's tokeniser is compared with the shards'. A
    teacher that may have to be downloaded from Hugging Face is left to the trials."""
    folders = space.samples_of("data", first.data) + space.samples_of("before.data", first.before.data)
    manifests = [read_manifest(fetch(folder)) for folder in folders if folder]
    for teacher in space.samples_of("teacher", first.teacher):
        is_folder = Path(teacher).is_dir() or teacher.startswith(("/", ".", "~")) or teacher.count("/") > 1
        if teacher != SCRATCH and is_folder:
            from newsbert_ray.model.assemble import check_tokenizer

            folder = download_input(teacher)
            for manifest in manifests:
                check_tokenizer(folder, manifest)
    return tuple(manifest.fingerprint for manifest in manifests)
