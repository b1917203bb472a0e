"""A report as blocks of text, facts, tables and figures, and its Markdown, HTML and LaTeX forms."""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape
from pathlib import Path


@dataclass(frozen=True)
class Command:
    """A command line."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows under a head; the first `words` columns hold words, the others numbers."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1
    caption: str = ""

    def markdown(self) -> str:
        """The caption, then a pipe table."""
        align = tuple("---" if column < self.words else "---:" for column in range(len(self.head)))
        head, *body = (tuple(map(_escape_markdown, row)) for row in (self.head, *self.rows))
        lines = "\n".join(f"| {' | '.join(line)} |" for line in (head, align, *body))
        return f"{_escape_markdown(self.caption)}\n\n{lines}" if self.caption else lines

    @property
    def has_long_numbers(self) -> bool:
        """Whether numbers, such as differences with their p-values, are so long that they may wrap."""
        return any(len(cell) > 24 for cells in self.rows for cell in cells[self.words :])

    def latex(self) -> str:
        """A `table` environment in the style of booktabs."""
        head, *body = (" & ".join(map(_escape_latex, row)) + r" \\" for row in (self.head, *self.rows))
        caption = [f"\\caption{{{_escape_latex(self.caption)}}}"] if self.caption else []
        columns = "l" * self.words + "r" * (len(self.head) - self.words)
        lines = ["", r"\begin{table}", r"\centering", *caption, f"\\begin{{tabular}}{{{columns}}}"]
        lines += [r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", r"\end{table}"]
        return "\n".join(lines)


@dataclass(frozen=True)
class Picture:
    """A drawn figure: `file` is its PNG beside the page, `svg` the drawing that the HTML page contains."""

    file: str
    svg: str
    alt: str
    caption: str

    def markdown(self) -> str:
        """A link to the PNG, which contains the caption."""
        return f"![{_escape_markdown(self.alt)}]({self.file})"

    @property
    def inline(self) -> str:
        """The drawing for use inside a page: no prolog, no fixed size, unique ids, and a text alternative."""
        name, svg = self.file.partition(".")[0], self.svg[self.svg.index("<svg") :].strip()
        svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
        svg = re.sub(r'\bid="', f'id="{name}-', svg)
        svg = re.sub(r'href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
        box = re.search(r'viewBox="[^"]*"', svg)
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        opening = f'<svg {spaces} {box[0] if box else ""} role="img" aria-label="{escape(self.alt)}">'
        return re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)

    @property
    def is_narrow(self) -> bool:
        """Whether the drawing has a single panel."""
        width = re.search(r'viewBox="\S+ \S+ (\S+) ', self.svg)
        return width is None or float(width[1]) <= 400


Block = str | list[str] | dict[str, str] | Command | Table | Picture
"""A paragraph, a list, names with their values, and so on."""


def _markdown(block: Block) -> str:
    match block:
        case str():
            return _escape_markdown(block)
        case dict():
            return _markdown([f"{name}: {value}" for name, value in block.items()])
        case list():
            return "\n".join(f"- {_escape_markdown(item)}" for item in block)
        case Command(text):
            return f"```sh\n{text}\n```"
    return block.markdown()


@dataclass(frozen=True)
class Section:
    """Blocks under a heading."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """A whole report; `lead` states the main result."""

    title: str
    lead: str
    sections: tuple[Section, ...]

    def markdown(self) -> str:
        """The page as Markdown; its figures are the files beside it."""
        parts = [f"# {_escape_markdown(self.title)}", _escape_markdown(self.lead)]
        for section in self.sections:
            parts.append(f"## {_escape_markdown(section.title)}")
            parts += map(_markdown, section.blocks)
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        """The page as one HTML document; every text in it is escaped."""
        from jinja2 import Environment, FileSystemLoader

        folder = FileSystemLoader(Path(__file__).parent)
        templates = Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
        return templates.get_template("page.html").render(page=self)

    def latex(self) -> str:
        """Every table of the page, in its order; needs \\usepackage{booktabs}."""
        tables = [block for section in self.sections for block in section.blocks if isinstance(block, Table)]
        return "\n".join(["% \\usepackage{booktabs}", *(table.latex() for table in tables)]) + "\n"


def _escape_markdown(text: str) -> str:
    """`text` in one line, so that Markdown shows it unchanged."""
    text = re.sub(r"([\\`*<\[\]|])", r"\\\1", re.sub(r"\s+", " ", text))
    # An underscore inside a word has no effect; at a word's end it would start or end emphasis.
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "\u2212": "$-$",
    "\u2026": r"\dots{}",
}


def _escape_latex(text: str) -> str:
    return re.sub(r"\s+", " ", "".join(_LATEX.get(character, character) for character in text))
