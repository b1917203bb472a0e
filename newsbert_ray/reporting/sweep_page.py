"""A sweep -> the page about it: what was searched, what was best, what mattered, what it cost."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from newsbert_ray.files import format_duration
from newsbert_ray.reporting.figures import (
    BETA_FIGURE,
    BLOCKS_FIGURE,
    CHAIN_FIGURE,
    MAP_FIGURE,
    METHOD_FIGURE,
    QUALITY_FIGURE,
    short,
)
from newsbert_ray.reporting.page import Block, Command, Facts, Page, Picture, Section, Table, Text
from newsbert_ray.reporting.paper import method_tables, table1_of_runs
from newsbert_ray.reporting.records import distinct, flat_values, joined, provenance
from newsbert_ray.reporting.statistics import COST_FIGURE, IMPORTANCE_FIGURE, Against, Costs, costs_of
from newsbert_ray.reporting.sweep_data import Axis, Point, State, Sweep, listed, teacher_summary
from newsbert_ray.reporting.sweep_figures import (
    CURVES_FIGURE,
    FRONT_FIGURE,
    NODES_FIGURE,
    OVER_FIGURE,
    describe,
)
from newsbert_ray.reporting.tables import Column, Summary, bare, columns_of, full, say, show, summary_of

MAX_ROWS = 10
"""Points that the page's table shows; report.csv has all."""
CHOSEN = (
    "The best of many is partly the luckiest: on what it was chosen by, its number is a little too good. The "
    "test split chose nothing."
)
Figures = Mapping[str, Picture | str]
"""Drawn figures by name, or why one could not be drawn."""


def sweep_page(sweep: Sweep, figures: Figures, *, against: Against | None = None) -> Page:
    """The whole report of a sweep.

    Raises:
        SettingsError: no point is one that the others are to be compared with.
    """
    over = [name for name in figures if name.startswith(OVER_FIGURE)]
    sections = [searched(sweep), ended(sweep), _best(sweep, figures)]
    sections += [
        Section("Metric over each setting", tuple(_figure(figures, name) for name in over)),
        Section("Which settings mattered", (_figure(figures, IMPORTANCE_FIGURE),)),
        Section("Learning curves", (_figure(figures, CURVES_FIGURE),)),
    ]
    records = distinct([trial.record for trial in sweep.trials if trial.record])
    tables = method_tables(records, against, sweep.failed_rows) if records else []
    wanted = [figures.get(name) for name in (METHOD_FIGURE, CHAIN_FIGURE, QUALITY_FIGURE)]
    beside = [found for found in wanted if isinstance(found, Picture)]
    if tables or beside:
        sections.append(Section("Compared, on the test split", (*tables, *beside)))
    if isinstance(figures.get(BETA_FIGURE), Picture):
        sections.append(Section("Over beta, on the test split", (_figure(figures, BETA_FIGURE),)))
    if isinstance(figures.get(BLOCKS_FIGURE), Picture):
        sections.append(
            Section("The teacher's gradients and the student's", (_figure(figures, BLOCKS_FIGURE),))
        )
    if isinstance(figures.get(MAP_FIGURE), Picture):
        sections.append(Section("What the best point's student learned", (_figure(figures, MAP_FIGURE),)))
    if isinstance(figures.get(NODES_FIGURE), Picture):
        sections.append(Section("The cluster under it", (_figure(figures, NODES_FIGURE),)))
    sections += [_cost(sweep, figures), _behind(sweep)]
    return Page(f"Sweep {sweep.space['name']}", _lead(sweep), tuple(sections))


def _lead(sweep: Sweep) -> str:
    done, state = sweep.finished, f"The sweep: {state_of(sweep)}."
    if not done:
        return f"No point has finished yet, so there is no best one. {state}"
    if len(sweep.goals) > 1:
        goals = listed([bare(goal.column) for goal in sweep.goals])
        front = len(sweep.front)
        return f"{front} of {len(done)} finished points lie on the Pareto front of {goals}. {state}"
    goal = sweep.goals[0]
    teacher = teacher_summary(done[0], goal.metric)
    beside = f", its teacher {say(teacher, goal.column)}" if teacher else ""
    return (
        f"The best of {len(done)} finished points has {describe(done[0].values)}. Its {bare(goal.column)}: "
        f"{say(done[0].summary(), goal.column)}{beside}. {state}"
    )


def _figure(figures: Figures, name: str) -> Block:
    found = figures[name]
    return found if isinstance(found, Picture) else Text(f"{found[:1].upper()}{found[1:]}.")


def _best(sweep: Sweep, figures: Figures) -> Section:
    """The best settings and their command; for several goals all that lie on the front."""
    if not sweep.finished:
        return Section("The best settings", (Text("No point has finished yet."),))
    several = len(sweep.goals) > 1
    best = sweep.finished[0]
    blocks: list[Block] = []
    if several:
        caption = f"The Pareto front: {len(sweep.front)} points, {_seeds(sweep)}"
        blocks += [_figure(figures, FRONT_FIGURE), points_table(sweep, sweep.front, caption)]
        blocks.append(Text(f"Best by the first goal, {sweep.goals[0].metric}:"))
    blocks.append(Facts(tuple((name, short(value, 4)) for name, value in best.values.items())))
    blocks.append(_verdict(sweep, best))
    if command := sweep.plan.get("best"):
        blocks += [Text("Train it again with:"), Command(str(command))]
    else:
        blocks.append(Text("The command that trains it again stands here once the sweep has ended."))
    if not several and len(sweep.finished) > 1:
        shown = sweep.finished[:MAX_ROWS]
        more = len(sweep.finished) > len(shown)
        which = f"best {len(shown)} of {len(sweep.finished)} finished points" if more else "finished points"
        blocks.append(points_table(sweep, shown, f"The {which}, {_seeds(sweep)}; all stand in report.csv"))
        blocks.append(Text(CHOSEN))
    return Section("The Pareto front" if several else "The best settings", tuple(blocks))


def _seeds(sweep: Sweep) -> str:
    return f"mean ± sd over {len(sweep.seeds)} seeds" if len(sweep.seeds) > 1 else "one seed each"


def _verdict(sweep: Sweep, point: Point) -> Table:
    """The best point's student beside its teacher: each goal, then the test split."""
    columns = [goal.column for goal in sweep.goals]
    columns += [column for column in columns_of(sweep.task) if column.path.startswith("test.student.")]
    rows = []
    for column in columns:
        if student := summary_of(point.records, column.path):
            teacher = show(teacher_summary(point, column.path), column)
            rows.append((full(column), show(student, column), teacher))
    return Table(
        ("", "student", "teacher"),
        tuple(rows),
        caption=f"The best point, {_seeds(sweep).removesuffix(' each')}",
    )


def _cost(sweep: Sweep, figures: Figures) -> Section:
    costs = costs_of(sweep)
    wall = "" if costs.wall_seconds is None else f"{format_duration(costs.wall_seconds)}, all starts together"
    left = f"; {costs.unknown} trials (failed, or under way) wrote none down" if costs.unknown else ""
    facts = [
        ("wall time", wall),
        ("in training loops", f"{format_duration(costs.seconds)} over all trials{left}"),
        ("in runs before", _before(costs)),
        ("processors", f"{costs.cpu_hours:.3g} CPU-hours, {costs.gpu_hours:.3g} GPU-hours"),
        ("money", _money(sweep, costs)),
        ("saved by early stopping", _saved(costs)),
    ]
    blocks: list[Block] = [Facts(tuple((name, value) for name, value in facts if value))]
    if isinstance(figures.get(COST_FIGURE), Picture):
        blocks.append(_figure(figures, COST_FIGURE))
    return Section("What it cost", tuple(blocks))


def _before(costs: Costs) -> str:
    if not costs.firsts:
        return ""
    runs = f"{costs.firsts} runs" if costs.firsts > 1 else "1 run"
    spent = format_duration(costs.first_seconds)
    return f"{spent}, {runs} that trials share (teachers, students to start from)"


def _money(sweep: Sweep, costs: Costs) -> str:
    if costs.money is None:
        return "the search space states no prices"
    prices = sweep.space["prices"]
    each = [
        f"{prices[n]:g} a {word}"
        for n, word in (("cpu_hour", "CPU-hour"), ("gpu_hour", "GPU-hour"))
        if prices.get(n)
    ]
    paid = f"{costs.money:.2f}" if costs.money >= 0.1 else f"{costs.money:.2g}"
    return f"{paid} ({', '.join(each)}; the training loops alone)"


def _saved(costs: Costs) -> str:
    if not costs.saved_epochs or costs.seconds_per_epoch is None:
        return ""
    share = costs.saved_seconds / (costs.saved_seconds + costs.seconds)
    return (
        f"{costs.saved_epochs:g} epochs that were not trained, "
        f"about {format_duration(costs.saved_seconds)} at "
        f"{costs.seconds_per_epoch:.3g} s an epoch: {share:.0%} of what all would have taken"
    )


def _behind(sweep: Sweep) -> Section:
    """Hardware, versions, data and teacher, as the finished trials recorded them."""
    records = [trial.record for trial in sweep.trials if trial.record]
    if records:
        facts = [fact for fact in provenance(records) if fact[0] != "settings that vary"]
    else:
        settings = sweep.plan.get("settings") or {}
        facts = [(name, str(settings[name])) for name in ("data", "teacher") if settings.get(name)]
        facts.append(("versions", joined(sweep.plan.get("versions") or {})))
    table = table1_of_runs(records)
    return Section("What it ran on", (Facts(tuple(facts)), *([table] if table else [])))


MAX_FAILURES = 20
_SAMPLERS = {
    "tpe": "multivariate tree-structured Parzen estimator (TPE)",
    "nsga2": "NSGA-II",
    "gp": "Gaussian process",
    "random": "random",
    "grid": "every combination",
}
_STATES: tuple[tuple[State, str], ...] = (
    ("finished", "finished"),
    ("stopped", "stopped early"),
    ("failed", "failed"),
    ("under way", "under way"),
)


def searched(sweep: Sweep) -> Section:
    """The search space, how points were chosen, which were stopped, with which seeds."""
    space = sweep.space
    search = space["search"]
    sampler = _SAMPLERS.get(search["sampler"], search["sampler"])
    if search["sampler"] != "grid":
        sampler += f", seed {search['seed']}"
    seeds = [str(seed) for seed in sweep.seeds]
    facts = [
        ("search space", f"{space['name']} ({sweep.plan.get('file', 'unknown file')})"),
        ("judged by", "; ".join(f"{g.metric}, {_direction(g.mode)}" for g in sweep.goals)),
        ("seeds of each point", f"{', '.join(seeds)}" + ("; their mean counts" if len(seeds) > 1 else "")),
        ("points chosen by", sampler),
        ("tried first", _starts(space)),
        ("early stopping", _stopping(sweep)),
        ("limits", _limits(space)),
        ("the same in all", _fixed(sweep)),
    ]
    blocks: list[Block] = [Facts(tuple((name, value) for name, value in facts if value))]
    if sweep.axes:
        blocks.append(_axes(sweep))
    else:
        blocks.append(Text("No setting varied: every trial differs only in its seed."))
    return Section("What was searched", tuple(blocks))


def ended(sweep: Sweep) -> Section:
    """How it ended: its state, points and trials by what became of them, failures with their reasons."""
    trials = {state: sum(t.state == state for t in sweep.trials) for state, _ in _STATES}
    # Some failed before they had a folder.
    trials["failed"] += len(set(sweep.failures) - {trial.name for trial in sweep.trials})
    points = {state: len(sweep.of(state)) for state, _ in _STATES}
    known = {trial.name for trial in sweep.trials}
    points["failed"] += len({name.rsplit(",seed=", 1)[0] for name in sweep.failures if name not in known})
    facts = [
        ("state", state_of(sweep)),
        ("points", f"{_counts(points)}; {sweep.asked} asked for{_repeats(sweep, sum(points.values()))}"),
        ("trials", f"{_counts(trials)}; {sweep.asked * len(sweep.seeds)} asked for"),
    ]
    blocks: list[Block] = [Facts(tuple(facts))]
    if how := _going_on(sweep):
        blocks += [Text(how), Command(resume_command(sweep))]
    if sweep.failures:
        rows = tuple(list(sweep.failures.items())[:MAX_FAILURES])
        more = len(sweep.failures) - len(rows)
        caption = "Trials that failed" + (f", the first {len(rows)} of {len(sweep.failures)}" if more else "")
        blocks.append(Table(("trial", "reason"), rows, words=2, caption=caption))
    return Section("How it ended", tuple(blocks))


def state_of(sweep: Sweep) -> str:
    """The sweep's state as a person would say it."""
    state = str(sweep.plan.get("state", "unknown"))
    why = str(sweep.plan.get("ends", ""))
    if state == "running":
        return "runs still; these are its numbers so far" if sweep.held else "was cut off while it ran"
    return f"{state} ({why})" if why else state


def resume_command(sweep: Sweep) -> str:
    """What to type to go on."""
    file = str(sweep.plan.get("file", "SPACE"))
    place = str(sweep.plan.get("url", sweep.folder))
    return shlex.join(["newsbert-ray", "sweep", file, "--out", place, "--resume"])


def _going_on(sweep: Sweep) -> str:
    """What the resume's command would do; empty where nothing is left."""
    state = str(sweep.plan.get("state", ""))
    if state.startswith("ended at a limit"):
        return "With a wider limit it goes on with:"
    if state == "finished with failures":
        return "What failed is tried again with:"
    return "" if state == "finished" or (state == "running" and sweep.held) else "It goes on with:"


def _direction(mode: str) -> str:
    return "more is better" if mode == "max" else "less is better"


def _starts(space: Any) -> str:
    count = len(space.get("start") or ())
    return f"{count} point{'s' if count > 1 else ''} that the search space names" if count else ""


def _stopping(sweep: Sweep) -> str:
    stopping = sweep.space.get("stopping") or {}
    kind = sweep.plan.get("scheduler") or stopping.get("scheduler") or _default_scheduler(sweep)
    grace = int(stopping.get("grace", 1))
    least = f"each trial had {grace} epoch{'s' if grace > 1 else ''} at least"
    if kind == "asha":
        return f"ASHA, one in {stopping.get('factor', 3)} goes on from each rung; {least}"
    return f"median rule; {least}" if kind == "median" else str(kind)


def _default_scheduler(sweep: Sweep) -> str:
    """As a search space has it that says nothing."""
    early = len(sweep.goals) == 1 and sweep.goals[0].metric.startswith("validation.")
    return "asha" if early and sweep.space["search"]["sampler"] != "grid" else "none"


def _limits(space: Any) -> str:
    limits = space.get("limits") or {}
    words = {"hours": "{:g} hours of wall time", "cost": "a cost of {:g}", "target": "a first goal of {:g}"}
    return ", ".join(
        word.format(limits[name]) for name, word in words.items() if limits.get(name) is not None
    )


def _fixed(sweep: Sweep) -> str:
    """Settings that the search space or the command line fixed; data and teacher stand elsewhere."""
    given = {
        **flat_values(sweep.space.get("settings") or {}),
        **flat_values(sweep.plan.get("overrides") or {}),
    }
    left = {axis.name for axis in sweep.axes} | {"data", "teacher"}
    return ", ".join(f"{name} {short(value)}" for name, value in given.items() if name not in left)


def _axes(sweep: Sweep) -> Table:
    conditional = any(axis.when for axis in sweep.axes)
    grid = sweep.space["search"]["sampler"] == "grid"
    rows = tuple(
        (axis.name, _range(axis), _draw(axis, grid), *([_condition(axis)] if conditional else []))
        for axis in sweep.axes
    )
    head = ("setting", "values", "how", *(["only where"] if conditional else []))
    return Table(head, rows, words=len(head))


def _range(axis: Axis) -> str:
    if axis.values is not None:
        return ", ".join(short(value) for value in axis.values)
    return (
        f"{short(axis.low)} to {short(axis.high)}"
        if axis.low is not None
        else "divisors of the teacher's depth"
    )


def _draw(axis: Axis, grid: bool) -> str:
    if axis.values is not None or axis.low is None:
        return "each" if grid else "one of them"
    kind = "whole numbers, " if axis.integer else ""
    scale = "evenly over the logarithm" if axis.log else "evenly"
    return kind + scale + (f", in steps of {short(axis.step)}" if axis.step else "")


def _condition(axis: Axis) -> str:
    return ", ".join(f"{name} is {_either(values)}" for name, values in axis.when.items())


def _either(values: Any) -> str:
    return listed([short(value) for value in values]).replace(" and ", " or ")


def _counts(counts: dict[State, int]) -> str:
    return ", ".join(
        f"{counts[state]} {word}" for state, word in _STATES if counts[state] or state == "finished"
    )


def _repeats(sweep: Sweep, tried: int) -> str:
    fewer = sweep.asked - tried
    if sweep.plan.get("state", "").startswith("finished") and fewer > 0:
        return f" ({fewer} times the sampler chose a point again, which is run once)"
    return ""


def points_table(sweep: Sweep, points: Sequence[Point], caption: str) -> Table:
    """Settings of the points, their goals, and what else their records know of the student."""
    names = [axis.name for axis in sweep.axes]
    columns = [
        column
        for column in _others(sweep)
        if "teacher" not in column.path and any(_summary(point, column) for point in points)
    ]
    goals = [goal.column.heading for goal in sweep.goals]
    head = (*names, *goals, *(full(column) for column in columns))
    rows = tuple(
        (
            *(short(point.values[name], 4) if name in point.values else "" for name in names),
            *(show(point.summary(index), goal.column) for index, goal in enumerate(sweep.goals)),
            *(show(_summary(point, column), column) for column in columns),
        )
        for point in points
    )
    return Table(head, rows, words=len(names), caption=caption)


def points_csv(sweep: Sweep) -> str:
    """Every point, the finished ones first and the best of them on top: full precision, shares from 0 to 1.

    `epochs` is how far the furthest of its trials came.
    """
    names = [axis.name for axis in sweep.axes]
    columns = _others(sweep)
    heads = [*(goal.metric for goal in sweep.goals), *(column.name for column in columns)]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    pairs = [cell for head in heads for cell in (head, f"{head}_sd")]
    writer.writerow([*names, "state", "n_seeds", "epochs", *pairs])
    for point in [*sweep.finished, *sweep.of("stopped", "under way", "failed")]:
        known = [point.summary(index) for index in range(len(sweep.goals))]
        known += [_summary(point, column) for column in columns]
        numbers = [cell for s in known for cell in ((s.mean, s.sd) if s else (None, None))]
        settings = [point.values.get(name) for name in names]
        reached = max(trial.epoch for trial in point.trials)
        writer.writerow([*settings, point.state, len(point.trials), reached, *numbers])
    return file.getvalue()


def _others(sweep: Sweep) -> list[Column]:
    judged = {goal.metric for goal in sweep.goals}
    return [column for column in columns_of(sweep.task) if column.path not in judged]


def _summary(point: Point, column: Column) -> Summary | None:
    return summary_of(point.records, column.path)
