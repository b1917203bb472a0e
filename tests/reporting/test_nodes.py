"""Nodes and trials over time, from the events that a sweep leaves."""

from __future__ import annotations

from typing import Any

import pytest

from newsbert_ray.reporting.figure_data import NothingToDraw
from newsbert_ray.reporting.sweep_figures import node_steps, nodes_figure, trial_steps


def event(second: int, name: str, **fields: Any) -> dict[str, Any]:
    """A line of events.jsonl."""
    return {"time": f"2026-01-01T00:{second // 60:02d}:{second % 60:02d}.000Z", "event": name, **fields}


GROWN = [
    event(0, "start"),
    event(6, "node_came", nodes=1),
    event(30, "node_came", nodes=2),
    event(36, "trial_start", trial="a"),
    event(60, "node_gone", nodes=1),
    event(60, "trial_broke_off", trial="a"),
    event(90, "node_came", nodes=2),
    event(96, "trial_retry", trial="a"),
    event(120, "trial_start", trial="b"),
    event(150, "trial_end", trial="a"),
    event(180, "interrupted"),
]


def test_steps_by_hand() -> None:
    """A trial that broke off is not one that runs; an interrupted sweep runs none."""
    assert node_steps(GROWN) == [(0.1, 1), (0.5, 2), (1.0, 1), (1.5, 2)]
    assert trial_steps(GROWN) == [
        (0.0, 0), (0.6, 1), (1.0, 0), (1.6, 1), (2.0, 2), (2.5, 1), (3.0, 0),
    ]  # fmt: skip


def test_the_figure_keeps_each_value_until_the_next() -> None:
    """A slope between two counts would show half a node."""
    figure = nodes_figure(GROWN)
    (nodes,) = figure.panels[0].traces
    assert list(zip(nodes.x, nodes.y, strict=True))[:6] == [
        (0, 0), (0.1, 0), (0.1, 1), (0.5, 1), (0.5, 2), (1.0, 2),
    ]  # fmt: skip
    assert nodes.x[-1] == 3.0
    assert "up to 2 nodes, and up to 2 trials" in figure.alt


@pytest.mark.parametrize("events", [[], GROWN[:2]])
def test_one_machine_makes_no_figure(events: list[dict[str, Any]]) -> None:
    """Every sweep on a laptop would carry a picture of one node."""
    with pytest.raises(NothingToDraw):
        nodes_figure(events)
