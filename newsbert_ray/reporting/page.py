"""A report as blocks of text, facts, tables and figures, and its Markdown, HTML and LaTeX forms."""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape

LONG_CELL = 24
"""Longer numbers of a table, such as differences with their p-values, may wrap."""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str

    def markdown(self) -> str:
        """The paragraph in one line."""
        return _escape_markdown(self.text)

    def html(self) -> str:
        """A `p` element."""
        return f"<p>{escape(self.text)}</p>"


@dataclass(frozen=True)
class Facts:
    """Names and their values."""

    rows: tuple[tuple[str, str], ...]

    def markdown(self) -> str:
        """A list."""
        return "\n".join(f"- {_escape_markdown(f'{name}: {value}')}" for name, value in self.rows)

    def html(self) -> str:
        """A `dl` element."""
        rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n" for name, value in self.rows)
        return f"<dl>\n{rows}</dl>"


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: tuple[str, ...]

    def markdown(self) -> str:
        """A list."""
        return "\n".join(f"- {_escape_markdown(item)}" for item in self.items)

    def html(self) -> str:
        """A `ul` element."""
        return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in self.items) + "</ul>"


@dataclass(frozen=True)
class Command:
    """A command line."""

    text: str

    def markdown(self) -> str:
        """A code block."""
        return f"```sh\n{self.text}\n```"

    def html(self) -> str:
        """A `pre` element."""
        return f"<pre><code>{escape(self.text)}</code></pre>"


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
            kinds = ["" if column < self.words else ' class="number"' for column in range(len(cells))]
            scope = ' scope="col"' if tag == "th" else ""
            pairs = zip(kinds, cells, strict=True)
            return "<tr>" + "".join(f"<{tag}{scope}{k}>{escape(c)}</{tag}>" for k, c in pairs) + "</tr>"

        caption = f"<caption>{escape(self.caption)}</caption>" if self.caption else ""
        label = escape(self.caption or ", ".join(self.head))
        long = any(len(cell) > LONG_CELL for cells in self.rows for cell in cells[self.words :])
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
            parts += [
                f"## {_escape_markdown(section.title)}",
                *(block.markdown() for block in section.blocks),
            ]
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        """The page as one HTML document; every text in it is escaped."""
        links, sections = "", []
        for index, section in enumerate(self.sections, 1):
            title, blocks = escape(section.title), "\n".join(block.html() for block in section.blocks)
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
<style>{STYLE}</style>
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


STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --shade: #f4f6f8;
  --paper: #ffffff; --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #a3acb7; --line: #3a424c;
  --shade: #22272e; --paper: #171b20; --link: #7ab7ff; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 84rem; padding: 2rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
  Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 2.75rem 0 .75rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line); }
p, ul, dl, pre, figure, .table { margin: 0 0 1rem; }
p, ul, dl, pre, figure { max-width: 50rem; }
.lead { font-size: 1.125rem; }
nav { margin: 1.25rem 0 0; font-size: .9375rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; list-style: none; margin: 0; padding: 0; }
a { color: var(--link); }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .3rem 1.25rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9375rem; font-variant-numeric: tabular-nums; }
caption { caption-side: top; text-align: left; color: var(--soft); padding-bottom: .4rem; }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
th.number, td.number { text-align: right; }
td.number { white-space: nowrap; }
caption { max-width: min(50rem, calc(100vw - 2.5rem)); }
table.long td.number { white-space: normal; min-width: 9rem; }
table.words td { overflow-wrap: anywhere; min-width: 8rem; }
code { font: .875rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--shade); border: 1px solid var(--line); border-radius: 6px; padding: .75rem 1rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
figure { padding: 0; }
figure svg { display: block; width: 100%; height: auto; background: #ffffff; border-radius: 6px; }
figure.narrow svg { max-width: 32rem; }
figcaption { color: var(--soft); font-size: .9375rem; margin-top: .5rem; }
@media (max-width: 36rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .6rem; } }
@media print {
  :root { --ink: #000; --soft: #333; --line: #bbb; --shade: #fff; --paper: #fff; --link: #000; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  h2 { break-after: avoid; }
  figure, tr, pre { break-inside: avoid; }
  .table { overflow: visible; }
  table { font-size: 8pt; }
  th, td { padding-right: .5rem; overflow-wrap: anywhere; }
  td.number { white-space: normal; }
}
"""


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
