"""What a report says, as blocks, and the same as Markdown; `web` makes HTML of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Facts:
    """Names and what stands for them."""

    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """A line to type."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows under a head; the first `words` columns are words, the others numbers."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """A drawn figure: `file` is its PNG beside the page, `svg` what a page holds itself."""

    file: str
    svg: str
    alt: str
    caption: str


Block = Text | Facts | Bullets | Command | Table | Picture


@dataclass(frozen=True)
class Section:
    """Blocks under a heading."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """A whole report; `lead` says the most important thing first."""

    title: str
    lead: str
    sections: tuple[Section, ...]


def to_markdown(page: Page) -> str:
    """The page as Markdown; figures are the files beside it, which hold their captions."""
    parts = [f"# {_escaped(page.title)}", _escaped(page.lead)]
    for section in page.sections:
        parts.append(f"## {_escaped(section.title)}")
        parts += [block_markdown(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def block_markdown(block: Block) -> str:
    """One block as Markdown."""
    if isinstance(block, Text):
        return _escaped(block.text)
    if isinstance(block, Facts):
        return "\n".join(f"- {_escaped(name)}: {_escaped(value)}" for name, value in block.rows)
    if isinstance(block, Bullets):
        return "\n".join(f"- {_escaped(item)}" for item in block.items)
    if isinstance(block, Command):
        return f"```sh\n{block.text}\n```"
    if isinstance(block, Picture):
        return f"![{_escaped(block.alt)}]({block.file})"
    return _table(block)


def _table(table: Table) -> str:
    align = ["---" if column < table.words else "---:" for column in range(len(table.head))]
    lines: Sequence[Sequence[str]] = [
        [_escaped(cell) for cell in table.head],
        align,
        *([_escaped(cell) for cell in row] for row in table.rows),
    ]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{_escaped(table.caption)}\n\n{body}" if table.caption else body


def _escaped(text: str) -> str:
    """`text` so that Markdown shows it as it stands, in one line."""
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"([\\`*<\[\]|])", r"\\\1", text)
    # An underscore inside a word is itself; at a word's end it would make the text slanted.
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)
