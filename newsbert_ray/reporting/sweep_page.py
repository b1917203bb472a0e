"""A sweep -> the page about it: what was searched, what was best, what mattered, what it cost."""

from __future__ import annotations

from collections.abc import Mapping

from newsbert_ray.reporting.blocks import BLOCKS_FIGURE
from newsbert_ray.reporting.compared import distinct
from newsbert_ray.reporting.corpora import table1_of_runs
from newsbert_ray.reporting.costs import COST_FIGURE, Costs, costs_of, duration
from newsbert_ray.reporting.figures import BETA_FIGURE, CHAIN_FIGURE, METHOD_FIGURE, short
from newsbert_ray.reporting.importance import IMPORTANCE_FIGURE
from newsbert_ray.reporting.maps import MAP_FIGURE
from newsbert_ray.reporting.nodes import NODES_FIGURE
from newsbert_ray.reporting.over_settings import OVER_FIGURE
from newsbert_ray.reporting.page import Block, Command, Facts, Page, Picture, Section, Table, Text
from newsbert_ray.reporting.points import bare, full, points_table, say
from newsbert_ray.reporting.provenance import joined, provenance
from newsbert_ray.reporting.quality import QUALITY_FIGURE
from newsbert_ray.reporting.runs_page import method_tables
from newsbert_ray.reporting.searched import ended, searched, state_of
from newsbert_ray.reporting.significance import Against
from newsbert_ray.reporting.sweep_figures import CURVES_FIGURE, FRONT_FIGURE, describe
from newsbert_ray.reporting.sweeps import Point, Sweep, listed, teacher_summary
from newsbert_ray.reporting.tables import columns_of, show, summary_of

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
    wall = "" if costs.wall_seconds is None else f"{duration(costs.wall_seconds)}, all starts together"
    left = f"; {costs.unknown} trials (failed, or under way) wrote none down" if costs.unknown else ""
    facts = [
        ("wall time", wall),
        ("in training loops", f"{duration(costs.seconds)} over all trials{left}"),
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
    return f"{duration(costs.first_seconds)}, {runs} that trials share (teachers, students to start from)"


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
        f"{costs.saved_epochs:g} epochs that were not trained, about {duration(costs.saved_seconds)} at "
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
