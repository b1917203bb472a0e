"""What a sweep searched and how it ended, in words: the first sections of its report."""

from __future__ import annotations

import shlex
from typing import Any

from newsbert_ray.reporting.compared import flat_values
from newsbert_ray.reporting.figures import short
from newsbert_ray.reporting.page import Block, Command, Facts, Section, Table, Text
from newsbert_ray.reporting.sweeps import Axis, State, Sweep, listed

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
