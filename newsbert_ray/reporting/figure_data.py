"""What a figure shows, pure and comparable, before anything is drawn: panels of lines, of dots, of bars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

Look = Literal["finished", "stopped", "below", "front", "best"]
"""How a dot is told from others: filled; hollow and grey; hollow and pointing down, for one that lies below
the axis; on a Pareto front; the one that was chosen."""


@dataclass(frozen=True)
class Line:
    """One line: at each x the mean y of n values, and their standard deviation if there are several."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    sd: tuple[float | None, ...]
    n: tuple[int, ...]
    reference: bool = False
    """A thin grey line for comparison, without markers or error bars."""
    notes: tuple[str, ...] = ()
    """What stands beside each point."""


@dataclass(frozen=True)
class Trace:
    """One run among many, thin and grey; one that was stopped early ends at a marker. Or, `main`, a panel's
    only line of single values."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    stopped: bool = False
    main: bool = False


@dataclass(frozen=True)
class Panel:
    """Lines on one pair of axes, over any traces."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    traces: tuple[Trace, ...] = ()


@dataclass(frozen=True)
class Dots:
    """Single points that look the same, each with its standard deviation if it has one."""

    label: str
    look: Look
    x: tuple[float, ...]
    y: tuple[float, ...]
    sd: tuple[float | None, ...]
    stairs: Literal["", "before", "after"] = ""
    """A line from dot to dot that steps at once (before) or at the next dot (after)."""
    colour: int | None = None
    """Which colour and mark of those that can be told apart; those of the look by default."""


@dataclass(frozen=True)
class Trend:
    """Means of dots that lie near each other, with their standard errors if there are several dots."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    error: tuple[float | None, ...]
    joined: bool = True
    """A line from mean to mean; not where x has no order."""


@dataclass(frozen=True)
class Scatter:
    """Dots on one pair of axes; `ticks` names the places 0, 1, 2, ... of x where it is not continuous."""

    title: str
    x_label: str
    y_label: str
    dots: tuple[Dots, ...]
    trend: Trend | None = None
    ticks: tuple[str, ...] = ()
    log_x: bool = False
    floor: float | None = None
    """Where y begins; dots that look `below` stand on it."""
    x_range: tuple[float, float] | None = None
    """The ends of what was searched."""


@dataclass(frozen=True)
class Bar:
    """A named bar; `low` and `high` are the ends of its interval, `chance` a mark for comparison."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    chance: float | None = None


@dataclass(frozen=True)
class Bars:
    """Bars that lie, the first on top."""

    title: str
    x_label: str
    bars: tuple[Bar, ...]
    value_label: str = ""
    interval_label: str = ""
    chance_label: str = ""
    """What the legend calls them; nothing for what is not there."""


AnyPanel = Panel | Scatter | Bars
P_co = TypeVar("P_co", bound=AnyPanel, covariant=True)


@dataclass(frozen=True)
class FigureData(Generic[P_co]):
    """All that a figure shows. `alt` says in words what is to be seen in it."""

    name: str
    panels: tuple[P_co, ...]
    caption: str
    error_bars: bool = True
    whole_x: bool = False
    """Ticks of x at whole numbers only."""
    whole_y: bool = False
    share_y: bool = False
    """One scale of y for all panels."""
    wide: bool = False
    """A lone panel as wide as the page's text."""
    across: int = 3
    """Panels in a row, at most."""
    alt: str = ""


class NothingToDraw(ValueError):
    """Records that do not make this figure; the text says why."""
