"""The map of titles that a topics run leaves behind, as a figure. Pure but for the reading."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from newsbert_ray.record import MAP
from newsbert_ray.reporting.panels import Dots, FigureData, NothingToDraw, Scatter

MAP_FIGURE = "map_of_titles"
TOPICS = 8
"""Colours that can be told apart; the other topics are grey."""
OTHERS = "other topics"


def map_figure(run: Path) -> FigureData[Scatter]:
    """Titles by topic in the plane that parts the topics best.

    Args:
        run: folder of a finished run of topics.
    Raises:
        NothingToDraw: it left no map.
    """
    try:
        found: dict[str, Any] = json.loads((run / MAP).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NothingToDraw(f"the map of titles is left out: {run.name} left none") from error
    labels, topics = found["labels"], found["topic"]
    counts = Counter(topics)
    shown = [topic for topic, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))][:TOPICS]
    groups: dict[str, list[int]] = {OTHERS: []}
    for topic in shown:
        groups[labels[topic]] = []
    for place, topic in enumerate(topics):
        groups[labels[topic] if topic in shown else OTHERS].append(place)
    dots = tuple(
        Dots(
            name,
            "stopped" if name == OTHERS else "finished",
            tuple(found["x"][place] for place in places),
            tuple(found["y"][place] for place in places),
            (None,) * len(places),
            colour=None if name == OTHERS else list(groups).index(name) - 1,
        )
        for name, places in groups.items()
        if places
    )
    panel = Scatter("", "first axis", "second axis", dots)
    caption = (
        f"{len(topics):,} titles of {found['split']} as the student embeds them, in the plane in which the "
        f"topics' means lie furthest apart ({found['share']:.0%} of the variance between them)."
    )
    named = ", ".join(labels[topic] for topic in shown)
    return FigureData(
        MAP_FIGURE, (panel,), caption, wide=True, alt=f"titles of {named} and others on a plane"
    )
