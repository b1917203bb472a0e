"""A report as blocks of text, facts, tables and figures, and its Markdown, HTML and LaTeX forms."""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape
from pathlib import Path


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Facts:
    """Names and their values."""

    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: tuple[str, ...]


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

    def html(self) -> str:
        """A `table` element in a box that scrolls where the table is wider than the screen."""

        def row(tag: str, cells: tuple[str, ...]) -> str:
            kinds = [
                ' class="number"' if column >= self.words else ' class="text"' if len(cell) > 40 else ""
                for column, cell in enumerate(cells)
            ]
            scope = ' scope="col"' if tag == "th" else ""
            pairs = zip(kinds, cells, strict=True)
            return "<tr>" + "".join(f"<{tag}{scope}{k}>{escape(c)}</{tag}>" for k, c in pairs) + "</tr>"

        caption = f"<caption>{escape(self.caption)}</caption>" if self.caption else ""
        label = escape(self.caption or ", ".join(self.head))
        # Long numbers, such as differences with their p-values, may wrap.
        long = any(len(cell) > 24 for cells in self.rows for cell in cells[self.words :])
        kind = ' class="words"' if self.words == len(self.head) else ' class="long"' if long else ""
        rows = "\n".join(row("td", cells) for cells in self.rows)
        return (
            f'<div class="table" role="region" aria-label="{label}" tabindex="0"><table{kind}>{caption}\n'
            f"<thead>{row('th', self.head)}</thead>\n<tbody>\n{rows}\n</tbody></table></div>"
        )

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

    def html(self) -> str:
        """A `figure` element with the drawing inside."""
        svg = inline_svg(self.svg, name=self.file.partition(".")[0], alt=self.alt)
        width = re.search(r'viewBox="\S+ \S+ (\S+) ', svg)
        kind = ' class="narrow"' if width is None or float(width[1]) <= 400 else ""
        return f"<figure{kind}>\n{svg}\n<figcaption>{escape(self.caption)}</figcaption>\n</figure>"


Block = Text | Facts | Bullets | Command | Table | Picture


def _markdown(block: Block) -> str:
    match block:
        case Text(text):
            return _escape_markdown(text)
        case Facts(rows):
            return _markdown(Bullets(tuple(f"{name}: {value}" for name, value in rows)))
        case Bullets(items):
            return "\n".join(f"- {_escape_markdown(item)}" for item in items)
        case Command(text):
            return f"```sh\n{text}\n```"
    return block.markdown()


def _html(block: Block) -> str:
    match block:
        case Text(text):
            return f"<p>{escape(text)}</p>"
        case Facts(rows):
            pairs = (f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n" for name, value in rows)
            return f"<dl>\n{''.join(pairs)}</dl>"
        case Bullets(items):
            return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"
        case Command(text):
            return f"<pre><code>{escape(text)}</code></pre>"
    return block.html()


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
        style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
        links, sections = "", []
        for index, section in enumerate(self.sections, 1):
            title, blocks = escape(section.title), "\n".join(map(_html, section.blocks))
            links += f'<li><a href="#part-{index}">{title}</a></li>'
            heading = f'<h2 id="part-{index}">{title}</h2>'
            sections.append(f'<section aria-labelledby="part-{index}">\n{heading}\n{blocks}\n</section>')
        return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(self.title)}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{escape(self.title)}</h1>
<p class="lead">{escape(self.lead)}</p>
<nav aria-label="Contents"><ul>{links}</ul></nav>
</header>
<main>
{chr(10).join(sections)}
</main>
</body>
</html>
"""

    def latex(self) -> str:
        """Every table of the page, in its order; needs \\usepackage{booktabs}."""
        tables = [block for section in self.sections for block in section.blocks if isinstance(block, Table)]
        return "\n".join(["% \\usepackage{booktabs}", *(table.latex() for table in tables)]) + "\n"


def _escape_markdown(text: str) -> str:
    """`text` in one line, so that Markdown shows it unchanged."""
    text = re.sub(r"([\\`*<\[\]|])", r"\\\1", re.sub(r"\s+", " ", text))
    # An underscore inside a word has no effect; at a word's end it would start or end emphasis.
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)


def inline_svg(svg: str, *, name: str, alt: str) -> str:
    """A drawn SVG for use inside a page: no prolog, no fixed size, unique ids, and a text alternative."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    box = re.search(r'viewBox="[^"]*"', svg)
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    opening = f'<svg {spaces} {box[0] if box else ""} role="img" aria-label="{escape(alt)}">'
    return re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)


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
