"""A sweep's events -> its cluster's nodes and its running trials over time. Knows no Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from newsbert_ray.reporting.panels import FigureData, NothingToDraw, Panel, Trace

NODES_FIGURE = "nodes_and_trials"
_BEGINS = ("trial_start", "trial_retry")
_ENDS = ("trial_end", "trial_broke_off")
_ALL_END = ("start", "resume", "interrupted", "error", "end")


def nodes_figure(events: Sequence[Mapping[str, Any]]) -> FigureData[Panel]:
    """Nodes (the head among them) and trials under way, over the minutes since the sweep's first start.

    Args:
        events: of the sweep's events.jsonl, in order.
    Raises:
        NothingToDraw: the sweep was never on more than one node.
    """
    nodes, trials = node_steps(events), trial_steps(events)
    most = int(max((count for _, count in nodes), default=0))
    if most < 2:
        raise NothingToDraw("nodes over time are left out: the sweep ran on one machine")
    end = max(at for at, _ in [*nodes, *trials])
    panels = tuple(
        Panel("", "minutes", heading, (), (_stairs(steps, end),))
        for heading, steps in (("nodes", nodes), ("trials running", trials))
    )
    busiest = int(max((count for _, count in trials), default=0))
    return FigureData(
        NODES_FIGURE,
        panels,
        "Nodes of the cluster, its head among them, and trials under way, as events.jsonl has them.",
        error_bars=False,
        whole_y=True,
        alt=f"The cluster had up to {most} nodes, and up to {busiest} trials ran at once.",
    )


def node_steps(events: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(minutes, nodes from then on) at each change."""
    return [
        (at, float(event["nodes"]))
        for at, event in _timed(events)
        if event["event"] in ("node_came", "node_gone")
    ]


def trial_steps(events: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(minutes, trials running from then on) at each change; whatever ends the sweep ends them all."""
    running: set[str] = set()
    steps = []
    for at, event in _timed(events):
        if event["event"] in _BEGINS:
            running.add(event["trial"])
        elif event["event"] in _ENDS:
            running.discard(event["trial"])
        elif event["event"] in _ALL_END:
            running.clear()
        else:
            continue
        steps.append((at, float(len(running))))
    return steps


def _timed(events: Sequence[Mapping[str, Any]]) -> list[tuple[float, Mapping[str, Any]]]:
    """Each event with its minutes since the first."""
    times = [datetime.fromisoformat(event["time"]) for event in events]
    return [((at - times[0]).total_seconds() / 60, event) for at, event in zip(times, events, strict=True)]


def _stairs(steps: Sequence[tuple[float, float]], end: float) -> Trace:
    """A line that keeps each value until the next."""
    xs, ys = [0.0], [0.0]
    for at, value in steps:
        xs += [at, at]
        ys += [ys[-1], value]
    return Trace("", (*xs, end), (*ys, ys[-1]), main=True)
