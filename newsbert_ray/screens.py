"""What the verbs print for a person: metrics, a user's ranking, the doctor's findings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from newsbert_ray.evaluation.evaluate import TopicRow


def print_finding(finding: Any) -> None:
    """One line of the doctor: state, topic and message; the cure below."""
    from rich.console import Console
    from rich.text import Text

    style = {"ok": "green", "note": "yellow", "fix": "bold red"}[finding.state]
    line = Text.assemble((f"{finding.state:<5}", style), f"{finding.topic:<9} {finding.message}")
    Console().print(line, soft_wrap=True)
    if finding.cure:
        label = "cure: " if finding.state == "fix" else ""
        Console().print(Text(f"{'':<15}{label}{finding.cure}"), soft_wrap=True)


def print_metrics(metrics: dict[str, Any]) -> None:
    """A line for each model, a column for each number with its standard error; the rest stands below."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from newsbert_ray.methods import HEADINGS

    submission = metrics.pop("submission", None)
    models = {name: numbers for name, numbers in metrics.items() if isinstance(numbers, dict)}
    columns = list(dict.fromkeys(key for numbers in models.values() for key in numbers))
    columns = [column for column in columns if column in HEADINGS]
    console = Console()
    if models:
        table = Table(
            "model", *(HEADINGS[column] for column in columns), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        for name, numbers in models.items():
            table.add_row(name, *(_number(numbers, column) for column in columns))
        console.print(table)
        counted = next(iter(models.values()))
        left_out = f", {counted['left_out']:.0f} left out" if "left_out" in counted else ""
        if "rows" in counted:
            console.print(f"{counted['rows']:.0f} rows evaluated{left_out}", highlight=False)
        if any(f"{column}_error" in numbers for numbers in models.values() for column in columns):
            console.print("± is the standard error of the mean over what was evaluated", highlight=False)
    else:
        console.print("no metrics: the split carries no labels", highlight=False)
    for name, value in metrics.items():
        if name not in models:
            console.print(f"{name} {value}", highlight=False, soft_wrap=True)
    if submission:
        console.print(
            f"{submission['file']}: {submission['lines']:,} impressions as the {submission['model']} ranks "
            "them, read back and found whole",
            highlight=False,
            soft_wrap=True,
        )


def _number(numbers: dict[str, float], column: str) -> str:
    value, error = numbers.get(column), numbers.get(f"{column}_error")
    if value is None:
        return ""
    return f"{value:.4f}" + (f" ±{error:.4f}" if error is not None else "")


def print_shown(found: list[Any], *, model: str) -> None:
    """A user's impressions: what they read, then the candidates in the model's order."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for one in found:
        console.print(f"user {one.user_id}, impression {one.impression_id}, {one.time}", style="bold")
        read = Table(f"read before ({len(one.history)}, newest last)", "category", title_justify="left")
        for news in one.history:
            read.add_row(Text(news.title), Text(news.category))
        console.print(read if one.history else "no history: ranked as for a newcomer")
        ranked = Table("rank", "score", "clicked", f"candidates as the {model} ranks them", "category")
        for rank, offer in enumerate(one.offers, 1):
            click = {True: "clicked", False: "", None: "unknown"}[offer.clicked]
            ranked.add_row(
                str(rank),
                f"{offer.score:.3f}",
                click,
                Text(offer.news.title),
                Text(offer.news.category),
                style="green" if offer.clicked else None,
            )
        console.print(ranked)


def print_answer(answer: Any) -> None:
    """What is like a text, or for a user: the texts asked by, then those found with their scores."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(answer.question), style="bold")
    for text in answer.given[-5:]:
        console.print(Text(f"  {text}"))
    if len(answer.given) > 5:
        console.print(f"  (the last 5 of {len(answer.given)})")
    table = Table("score", "id", "text")
    for one in answer.found:
        table.add_row(f"{one.score:.3f}", Text(one.name), Text(one.text))
    console.print(table)


def print_topics(rows: Sequence[TopicRow]) -> None:
    """A line for each topic, per cent."""
    from newsbert_ray.reporting.page import Table

    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f}"

    head = ("topic", "titles", "predicted", "precision", "recall", "F1", "most often taken for")
    cells = tuple(
        (
            row.topic,
            f"{row.titles:,}",
            f"{row.predicted:,}",
            *map(percent, (row.precision, row.recall, row.f1)),
            row.taken_for or "",
        )
        for row in rows
    )
    print_table(Table(head, cells, words=1), spare=("predicted", "most often taken for"))
    mean = 100 * sum(row.f1 for row in rows) / len(rows)
    print(f"per cent; macro-F1 {mean:.1f}, the mean of {len(rows)} topics' F1")


def print_table(table: Any, *, spare: Sequence[str] = ()) -> None:
    """A report's table in a terminal, without as many of the `spare` columns, from the first on, as its width
    asks for."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    kept = list(range(len(table.head)))
    widths = [max(map(len, column)) for column in zip(table.head, *table.rows, strict=True)]
    for name in spare:
        if sum(widths[number] + 2 for number in kept) + 2 <= console.width:
            break
        kept.remove(table.head.index(name))
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number in kept:
        shown.add_column(table.head[number], justify="left" if number < table.words else "right")
    for row in table.rows:
        shown.add_row(*(row[number] for number in kept))
    console.print(shown)
