"""What shows a sweep: its page, its CSV, its table in the terminal, and TensorBoard's HParams tab."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from newsbert_ray.files import format_duration, write_bytes
from newsbert_ray.methods import Task
from newsbert_ray.reporting import tables
from newsbert_ray.reporting.figures import describe
from newsbert_ray.reporting.page import Block, Command, Page, Picture, Section, Table
from newsbert_ray.reporting.paper import method_tables, table1_of_runs
from newsbert_ray.reporting.records import joined, provenance
from newsbert_ray.reporting.statistics import Against, costs_of
from newsbert_ray.reporting.sweep_data import Axis, Point, State, Sweep, Trial, listed, resume_command
from newsbert_ray.reporting.tables import Column, Summary
from newsbert_ray.settings import flatten

if TYPE_CHECKING:
    import rich.table

MAX_ROWS = 10
"""Points in the page's table; report.csv has all."""
MAX_FAILURES = 20
CHOSEN = (
    "The best of many points is partly the luckiest: its value of the metric that chose it is a little too "
    "good. The test split was not used for choosing."
)
ONE_SEED = "One seed has no spread, so the order of points that are close may be chance."
Figures = Mapping[str, Picture | str]
"""Drawn figures by name, or the reason why one could not be drawn."""
_SAMPLERS = {
    "tpe": "multivariate tree-structured Parzen estimator (TPE)",
    "nsga2": "NSGA-II",
    "gp": "Gaussian process",
    "random": "random",
    "grid": "every combination",
}
_STATES: Mapping[State, str] = {
    "finished": "finished",
    "stopped": "stopped early",
    "failed": "failed",
    "under way": "unfinished",
}


def sweep_page(sweep: Sweep, figures: Figures, *, against: Against | None = None) -> Page:
    """The whole report of a sweep; SettingsError where no point has the value that `against` names."""

    def drawn(*names: str) -> list[Block]:
        return [figure for name in names if isinstance(figure := figures.get(name), Picture)]

    over = [_figure(figures, name) for name in figures if name.startswith("metric_over_settings")]
    methods = method_tables(sweep.records, against, sweep.failed_rows) if sweep.records else []
    compared = drawn("methods_over_depth", "fig3_after_another_task", "quality_kept")
    optional: dict[str, list[Block]] = {
        "Comparison on the test split": [*methods, *compared],
        "Over beta, on the test split": drawn("fig7_beta"),
        "The teacher's gradients and the student's": drawn("block_gradients"),
        "What the best point's student learned": drawn("map_of_titles"),
        "Nodes and trials over time": drawn("nodes_and_trials"),
    }
    sections = (
        searched(sweep),
        ended(sweep),
        _best(sweep, figures),
        Section("Metric over each setting", tuple(over)),
        Section("Which settings mattered", (_figure(figures, "importances"),)),
        Section("Learning curves", (_figure(figures, "learning_curves"),)),
        *(Section(title, tuple(blocks)) for title, blocks in optional.items() if blocks),
        _cost(sweep, drawn("seconds_by_part")),
        _origin(sweep),
    )
    return Page(f"Sweep {sweep.space['name']}", _lead(sweep), sections)


def equal_points(sweep: Sweep) -> int:
    """How many points at the top of `finished` are as good as the best: they differ from it by no more than
    the larger of the two standard deviations over seeds."""
    best, *others = (point.summary() for point in sweep.finished)

    def is_equal(one: Summary | None) -> bool:
        return not (best and one) or abs(best.mean - one.mean) <= max(best.sd or 0.0, one.sd or 0.0)

    return 1 + len(list(takewhile(is_equal, others)))


def _figure(figures: Figures, name: str) -> Block:
    """A figure, or a sentence with the reason why it is missing."""
    figure = figures[name]
    return figure if isinstance(figure, Picture) else f"{figure[:1].upper()}{figure[1:]}."


def _lead(sweep: Sweep) -> str:
    finished, state = sweep.finished, f"State of the sweep: {_state(sweep)}."
    if not finished:
        return f"No point has finished yet, so there is no best one. {state}"
    if len(sweep.goals) > 1:
        goals = listed([goal.column.label for goal in sweep.goals])
        front = len(sweep.front)
        return f"{front} of {len(finished)} finished points lie on the Pareto front of {goals}. {state}"
    column = sweep.goals[0].column
    teacher = tables.teacher_summary(finished[0].records, column.path)
    beside = f", its teacher's {column.show(teacher, unit=True)}" if teacher else ""
    value = column.show(finished[0].summary(), unit=True)
    settings, equal = describe(finished[0].values, 3) or "no setting", equal_points(sweep)
    which = f"The best of {len(finished)} finished points has {settings}."
    if equal > 1:
        spread = "they differ by no more than the seeds' standard deviation"
        which = f"{equal} of {len(finished)} finished points are equally good: {spread}. One has {settings}."
    return f"{which} Its {column.label}: {value}{beside}. {state}"


def searched(sweep: Sweep) -> Section:
    """The search space, how points were chosen, which were stopped, and the seeds."""
    space, search = sweep.space, sweep.space["search"]
    sampler = _SAMPLERS.get(search["sampler"], search["sampler"])
    if search["sampler"] != "grid":
        sampler += f", seed {search['seed']}"
    seeds = ", ".join(map(str, sweep.seeds)) + ("; their mean counts" if sweep.seeds[1:] else "")
    starts = len(space.get("start") or ())
    limits = space.get("limits") or {}
    words = {"hours": "{:g} hours of wall time", "cost": "a cost of {:g}", "target": "a first goal of {:g}"}
    ends = [text.format(limits[name]) for name, text in words.items() if limits.get(name) is not None]
    settings = (space.get("settings") or {}, sweep.plan.get("overrides") or {})
    fixed = {name: value for source in settings for name, value in flatten(source).items()}
    elsewhere = {axis.name for axis in sweep.axes} | {"data", "teacher"}
    better = {"max": "more is better", "min": "less is better"}
    facts = {
        "search space": f"{space['name']} ({sweep.plan.get('file', 'unknown file')})",
        "goal": "; ".join(f"{goal.metric}, {better[goal.mode]}" for goal in sweep.goals),
        "seeds of each point": seeds,
        "points chosen by": sampler,
        "tried first": f"{starts} point{'s' if starts > 1 else ''} of the search space" if starts else "",
        "early stopping": _stopping(sweep),
        "limits": ", ".join(ends),
        "fixed settings": ", ".join(f"{n} {tables.short(v)}" for n, v in fixed.items() if n not in elsewhere),
    }
    shown = {name: value for name, value in facts.items() if value}
    unvaried = "No setting varied: the trials differ only in their seeds."
    return Section("What was searched", (shown, _axes(sweep) if sweep.axes else unvaried))


def _stopping(sweep: Sweep) -> str:
    stopping, kind = sweep.space.get("stopping") or {}, sweep.plan.get("scheduler", "none")
    grace = int(stopping.get("grace", 1))
    least = f"each trial had at least {grace} epoch{'s' if grace > 1 else ''}"
    if kind == "asha":
        return f"ASHA, one in {stopping.get('factor', 3)} continues from each rung; {least}"
    return f"median rule; {least}" if kind == "median" else str(kind)


def _axes(sweep: Sweep) -> Table:
    grid = sweep.space["search"]["sampler"] == "grid"
    columns = 4 if any(axis.when for axis in sweep.axes) else 3
    rows = [(axis.name, *_range(axis, grid=grid), axis.condition)[:columns] for axis in sweep.axes]
    return Table(("setting", "values", "how", "only where")[:columns], tuple(rows), words=columns)


def _range(axis: Axis, *, grid: bool) -> tuple[str, str]:
    choice = "each" if grid else "one of them"
    if axis.values is not None:
        return ", ".join(map(tables.short, axis.values)), choice
    if axis.low is None:
        return "divisors of the teacher's depth", choice
    whole = "whole numbers, " if axis.integer else ""
    scale = "evenly over the logarithm" if axis.log else "evenly"
    steps = f", in steps of {tables.short(axis.step)}" if axis.step else ""
    return f"{tables.short(axis.low)} to {tables.short(axis.high)}", whole + scale + steps


def ended(sweep: Sweep) -> Section:
    """The sweep's state, points and trials by state, and failures with their reasons."""
    without_folder = set(sweep.failures) - {trial.name for trial in sweep.trials}
    trials = {state: sum(t.state == state for t in sweep.trials) for state in _STATES}
    points = {state: len(sweep.of(state)) for state in _STATES}
    trials["failed"] += len(without_folder)
    points["failed"] += len({name.rsplit(",seed=", 1)[0] for name in without_folder})
    fewer, repeats = sweep.planned_points - sum(points.values()), ""
    if sweep.plan.get("state", "").startswith("finished") and fewer > 0:
        repeats = f" ({fewer} times the sampler chose a known point again, which is run once)"

    def counts(numbers: Mapping[State, int]) -> str:
        shown = {state: numbers[state] for state in _STATES if numbers[state] or state == "finished"}
        return ", ".join(f"{count} {_STATES[state]}" for state, count in shown.items())

    facts = {
        "state": _state(sweep),
        "points": f"{counts(points)}; {sweep.planned_points} requested{repeats}",
        "trials": f"{counts(trials)}; {sweep.planned_points * len(sweep.seeds)} requested",
    }
    blocks: list[Block] = [facts]
    if text := _resume_text(sweep):
        file, location = str(sweep.plan.get("file", "SPACE")), str(sweep.plan.get("url", sweep.folder))
        blocks += [text, Command(resume_command(file, location))]
    if sweep.failures:
        rows = tuple(list(sweep.failures.items())[:MAX_FAILURES])
        more = f", the first {len(rows)} of {len(sweep.failures)}" if len(sweep.failures) > len(rows) else ""
        blocks.append(Table(("trial", "reason"), rows, words=2, caption=f"Trials that failed{more}"))
    return Section("How it ended", tuple(blocks))


def _state(sweep: Sweep) -> str:
    state, reason = str(sweep.plan.get("state", "unknown")), str(sweep.plan.get("ends", ""))
    if state == "running":
        return "still running; these are its results so far" if sweep.held else "was interrupted"
    return f"{state} ({reason})" if reason else state


def _resume_text(sweep: Sweep) -> str:
    """What the resume command would do; empty where nothing is left."""
    state = str(sweep.plan.get("state", ""))
    if state.startswith("ended at a limit"):
        return "Continue with a wider limit:"
    if state == "finished with failures":
        return "Try the failed trials again:"
    return "" if state == "finished" or (state == "running" and sweep.held) else "Continue with:"


def _best(sweep: Sweep, figures: Figures) -> Section:
    if not sweep.finished:
        return Section("The best settings", ("No point has finished yet.",))
    several, best = len(sweep.goals) > 1, sweep.finished[0]
    seeds = f"mean ± sd over {len(sweep.seeds)} seeds" if len(sweep.seeds) > 1 else "one seed"
    blocks: list[Block] = []
    if several:
        caption = f"The Pareto front: {len(sweep.front)} points, {seeds}"
        blocks += [_figure(figures, "pareto_front"), points_table(sweep, sweep.front, caption)]
        blocks.append(f"Best by the first goal, {sweep.goals[0].metric}:")
    blocks.append({name: tables.short(value, 4) for name, value in best.values.items()})
    columns = (*(goal.column for goal in sweep.goals), *tables.student_columns(sweep.task))
    blocks.append(tables.pair_table(best.records, columns, f"The best point, {seeds}"))
    if command := sweep.plan.get("best"):
        blocks += ["Train it again:", Command(str(command))]
    else:
        blocks.append("The command that trains it again appears here once the sweep has ended.")
    if not several and len(sweep.finished) > 1:
        shown, count = sweep.finished[:MAX_ROWS], len(sweep.finished)
        which = f"best {len(shown)} of {count} finished points" if count > MAX_ROWS else "finished points"
        equal = min(equal_points(sweep), len(shown))
        ties = f"; the first {equal} are equally good" if equal > 1 else ""
        blocks.append(points_table(sweep, shown, f"The {which}, {seeds}{ties}; report.csv has all points"))
        blocks.append(CHOSEN if len(sweep.seeds) > 1 else f"{CHOSEN} {ONE_SEED}")
    return Section("The Pareto front" if several else "The best settings", tuple(blocks))


def points_table(sweep: Sweep, points: Sequence[Point], caption: str) -> Table:
    """Settings of the points, their goals, and what else their records have of the student."""
    names = [axis.name for axis in sweep.axes]
    columns = [column for column in _other_columns(sweep) if "teacher" not in column.path]
    columns = [column for column in columns if any(tables.summary_of(p.records, column.path) for p in points)]
    goals = [goal.column for goal in sweep.goals]
    rows = tuple(
        (
            *(tables.short(point.values[name], 4) if name in point.values else "" for name in names),
            *(column.show(point.summary(index)) for index, column in enumerate(goals)),
            *(column.show(tables.summary_of(point.records, column.path)) for column in columns),
        )
        for point in points
    )
    head = (*names, *(goal.heading for goal in goals), *(column.full_label for column in columns))
    return Table(head, rows, words=len(names), caption=caption)


def terminal_points(sweep: Sweep) -> rich.table.Table | None:
    """The points with every seed, the best first, and after them those that miss one; None without any."""
    points = [*sweep.finished, *(point for point in sweep.of("under way") if point.means)]
    if not points:
        return None
    goals, names = len(sweep.goals), [axis.name.replace(".", "\n") for axis in sweep.axes]
    table = points_table(sweep, points, f"{len(points)} points, best {sweep.goals[0].metric} first")
    numbers = ["\n".join(wrap(heading, 12)) for heading in table.head[len(names) :]]
    head, spare = (*names, *numbers), numbers[: goals - 1 : -1]
    style: Any = {"right": head, "spare": spare, "fixed": numbers, "styles": {0: "bold"}}
    return tables.terminal_table(head, table.rows, title=table.caption, **style)


def points_csv(sweep: Sweep) -> str:
    """Every point, the finished ones first and the best of them on top: full precision, shares from 0 to 1,
    and in `epochs` the last epoch of the point's longest trial."""
    names = [axis.name for axis in sweep.axes]
    columns = _other_columns(sweep)
    heads = [*(goal.metric for goal in sweep.goals), *(column.name for column in columns)]
    lines = []
    for point in [*sweep.finished, *sweep.of("stopped", "under way", "failed")]:
        summaries = [point.summary(index) for index in range(len(sweep.goals))]
        summaries += [tables.summary_of(point.records, column.path) for column in columns]
        numbers = [cell for s in summaries for cell in ((s.mean, s.sd) if s else (None, None))]
        settings = [point.values.get(name) for name in names]
        epochs = max(trial.epoch for trial in point.trials)
        lines.append([*settings, point.state, len(point.trials), epochs, *numbers])
    pairs = [cell for head in heads for cell in (head, f"{head}_sd")]
    return tables.csv_text([*names, "state", "n_seeds", "epochs", *pairs], lines)


def _other_columns(sweep: Sweep) -> list[Column]:
    goals = {goal.metric for goal in sweep.goals}
    return [column for column in tables.columns_of(sweep.task) if column.path not in goals]


def _cost(sweep: Sweep, figure: Sequence[Block]) -> Section:
    costs = costs_of(sweep)
    left = f"; {costs.unknown} trials (failed or unfinished) recorded none" if costs.unknown else ""
    facts = {}
    if isinstance(wall_seconds := sweep.plan.get("seconds"), int | float):
        facts["wall time"] = f"{format_duration(wall_seconds)}, all sessions together"
    facts["training loops"] = f"{format_duration(costs.seconds)} over all trials{left}"
    if count := len(sweep.prerequisites):
        runs = f"{count} run{'s' if count > 1 else ''}"
        shared = "that trials share (teachers, students to start from)"
        facts["prerequisites"] = f"{format_duration(costs.prerequisite_seconds)}, {runs} {shared}"
    facts["processors"] = f"{costs.cpu_hours:.3g} CPU-hours, {costs.gpu_hours:.3g} GPU-hours"
    facts["money"] = "the search space states no prices"
    if costs.money is not None:
        prices, units = sweep.space["prices"], {"cpu_hour": "CPU-hour", "gpu_hour": "GPU-hour"}
        each = ", ".join(f"{prices[name]:g} per {unit}" for name, unit in units.items() if prices.get(name))
        amount = f"{costs.money:.2f}" if costs.money >= 0.1 else f"{costs.money:.2g}"
        facts["money"] = f"{amount} ({each}; training loops only)"
    if saved_seconds := costs.saved_epochs * costs.seconds_per_epoch:
        share = saved_seconds / (saved_seconds + costs.seconds)
        facts["saved by early stopping"] = (
            f"{costs.saved_epochs:g} epochs, about {format_duration(saved_seconds)} at "
            f"{costs.seconds_per_epoch:.3g} s per epoch: {share:.0%} of the time without early stopping"
        )
    return Section("What it cost", (facts, *figure))


def _origin(sweep: Sweep) -> Section:
    """Hardware, versions, data and teacher, as the finished trials recorded them."""
    if sweep.records:
        facts = provenance(sweep.records)
        del facts["settings that vary"]
    else:
        settings = sweep.plan.get("settings") or {}
        facts = {name: str(settings[name]) for name in ("data", "teacher") if settings.get(name)}
        facts["versions"] = joined(sweep.plan.get("versions") or {})
    table = table1_of_runs(sweep.records)
    return Section("Data, versions and hardware", (facts, *([table] if table else [])))


_EVENTS = "events.out.tfevents.0000000000"
"""Sorts before a trial's own event files: TensorBoard reads those of a run in order and never goes back."""


class HParams:
    """TensorBoard's HParams tab of a sweep: what varies, and each trial's settings, metrics and status. An
    existing file is replaced, so that a resume, or a second end of a trial, makes no second session."""

    def __init__(
        self, trials: Path, axes: Sequence[Axis], *, seeds: Sequence[int], goals: Sequence[str], task: Task
    ) -> None:
        """Write which settings vary over which values, and which metrics count, in the trials' folder."""
        from tensorboard.plugins.hparams import summary_v2 as api

        self._trials, self._goals = trials, goals
        types = {a.name: {float if type(v) is int else type(v) for v in a.values or ()} for a in axes}
        self._as_text = {name for name, found in types.items() if len(found) > 1 or type(None) in found}
        settings = [api.HParam("seed", api.Discrete([float(seed) for seed in seeds]))]
        for axis in axes:
            values = [self._plain(axis.name, value) for value in axis.values or ()]
            domain = api.Discrete(values) if values else None
            if axis.low is not None and axis.high is not None:
                domain = api.RealInterval(float(axis.low), float(axis.high))
            settings.append(api.HParam(axis.name, domain))
        logged = [f"validation.student.{metric.name}" for metric in task.metrics]
        names = dict.fromkeys((*goals, *logged, f"validation.teacher.{task.primary.name}"))
        metrics = [api.Metric(name.replace(".", "/"), display_name=name) for name in names]
        content = api.hparams_config_pb(settings, metrics, time.time())
        _write_events(trials / f"{_EVENTS}.hparams", [content])

    def start(self, trial: Trial) -> bool:
        """The trial runs; False, and nothing is written, where it has left no settings in its folder."""
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        settings = self._trials / trial.name / "settings.json"
        if not settings.exists():
            return False
        values = {**trial.point, "seed": trial.seed}
        plain = {name: self._plain(name, value) for name, value in values.items()}
        events = settings.parent / "tensorboard"
        (events / f"{_EVENTS}.hparams-end").unlink(missing_ok=True)
        content = hparams_pb(plain, trial.name, settings.stat().st_mtime)
        _write_events(events / f"{_EVENTS}.hparams-start", [content])
        return True

    def end(self, trial: Trial) -> bool:
        """The trial has ended, whether or not `start` was called. Writes its goals that it never logged."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import api_pb2, metadata
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

        if not self.start(trial):
            return False
        status = api_pb2.STATUS_FAILURE if trial.state == "failed" else api_pb2.STATUS_SUCCESS
        info = HParamsPluginData(session_end_info=SessionEndInfo(status=status, end_time_secs=time.time()))
        tag, of_session = metadata.SESSION_END_INFO_TAG, metadata.create_summary_metadata(info)
        written = [Summary.Value(tag=tag, metadata=of_session, tensor=metadata.NULL_TENSOR)]
        for goal, value in zip(self._goals, trial.values if trial.state == "finished" else (), strict=False):
            if not goal.startswith("validation."):
                written.append(Summary.Value(tag=goal.replace(".", "/"), simple_value=value))
        path = self._trials / trial.name / "tensorboard" / f"{_EVENTS}.hparams-end"
        _write_events(path, [Summary(value=[value]) for value in written])
        return True

    def _plain(self, name: str, value: Any) -> bool | float | str:
        """`value` as the tab can hold it: null, and every value of a setting of several types, as text."""
        if value is None or name in self._as_text:
            return tables.short(value)
        return float(value) if type(value) in (int, float) else value


def _write_events(path: Path, summaries: Sequence[Any]) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer, now = io.BytesIO(), time.time()
    writer = RecordWriter(buffer)
    writer.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
    for summary in summaries:
        writer.write(Event(wall_time=now, summary=summary).SerializeToString())
    write_bytes(path, buffer.getvalue())
