"""What a report says, as blocks, and the same as Markdown; `web` makes HTML of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape


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


STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --shade: #f4f6f8;
  --paper: #ffffff; --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #a3acb7; --line: #3a424c;
  --shade: #22272e; --paper: #171b20; --link: #7ab7ff; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 50rem; padding: 2rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
  Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 2.75rem 0 .75rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line); }
p, ul, dl, pre, figure, .table { margin: 0 0 1rem; }
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
th.number, td.number { text-align: right; white-space: nowrap; }
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
  th.number, td.number { white-space: normal; }
}
"""


def to_html(page: Page) -> str:
    """The page as one HTML document; every text in it is escaped."""
    sections = "\n".join(_section(section, index) for index, section in enumerate(page.sections, 1))
    links = "".join(
        f'<li><a href="#part-{index}">{escape(section.title)}</a></li>'
        for index, section in enumerate(page.sections, 1)
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(page.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(page.title)}</h1>
<p class="lead">{escape(page.lead)}</p>
<nav aria-label="Contents"><ul>{links}</ul></nav>
</header>
<main>
{sections}
</main>
</body>
</html>
"""


def _section(section: Section, index: int) -> str:
    blocks = "\n".join(_block(block) for block in section.blocks)
    return (
        f'<section aria-labelledby="part-{index}">\n<h2 id="part-{index}">{escape(section.title)}</h2>\n'
        f"{blocks}\n</section>"
    )


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return f"<p>{escape(block.text)}</p>"
    if isinstance(block, Facts):
        rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n" for name, value in block.rows)
        return f"<dl>\n{rows}</dl>"
    if isinstance(block, Bullets):
        return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Command):
        return f"<pre><code>{escape(block.text)}</code></pre>"
    if isinstance(block, Picture):
        return _picture(block)
    return _table_web(block)


def _table_web(table: Table) -> str:
    def cell(tag: str, text: str, column: int, scope: str = "") -> str:
        kind = ' class="number"' if column >= table.words else ""
        return f"<{tag}{scope}{kind}>{escape(text)}</{tag}>"

    head = "".join(cell("th", text, column, ' scope="col"') for column, text in enumerate(table.head))
    rows = "\n".join(
        "<tr>" + "".join(cell("td", text, column) for column, text in enumerate(row)) + "</tr>"
        for row in table.rows
    )
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    label = escape(table.caption or ", ".join(table.head))
    kind = ' class="words"' if table.words == len(table.head) else ""
    return (
        f'<div class="table" role="region" aria-label="{label}" tabindex="0"><table{kind}>{caption}\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )


def _picture(picture: Picture) -> str:
    svg = inline_svg(picture.svg, name=picture.file.partition(".")[0], alt=picture.alt)
    kind = "" if _width(svg) > 400 else ' class="narrow"'
    return f"<figure{kind}>\n{svg}\n<figcaption>{escape(picture.caption)}</figcaption>\n</figure>"


def inline_svg(svg: str, *, name: str, alt: str) -> str:
    """A drawn SVG to stand in a page: no prolog, its size free, its ids its own, said in words."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    box = re.search(r'viewBox="[^"]*"', svg)
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    opening = f'<svg {spaces} {box[0] if box else ""} role="img" aria-label="{escape(alt)}">'
    return re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)


def _width(svg: str) -> float:
    """Points that the drawing is wide."""
    found = re.search(r'viewBox="\S+ \S+ (\S+) ', svg)
    return float(found[1]) if found else 0.0


_SPECIAL = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "±": "$\\pm$",
    "\u2212": "$-$",
    "\u2026": "\\dots{}",
}


def to_latex(page: Page) -> str:
    """Every table of the page, in its order; needs \\usepackage{booktabs}."""
    tables = [block for section in page.sections for block in section.blocks if isinstance(block, Table)]
    return (
        "\n".join(["% \\usepackage{booktabs}", *(line for table in tables for line in _lines(table))]) + "\n"
    )


def _lines(table: Table) -> Iterator[str]:
    columns = "l" * table.words + "r" * (len(table.head) - table.words)
    yield ""
    yield "\\begin{table}"
    yield "\\centering"
    if table.caption:
        yield f"\\caption{{{_escaped_latex(table.caption)}}}"
    yield f"\\begin{{tabular}}{{{columns}}}"
    yield "\\toprule"
    yield _row(table.head)
    yield "\\midrule"
    yield from map(_row, table.rows)
    yield "\\bottomrule"
    yield "\\end{tabular}"
    yield "\\end{table}"


def _row(cells: tuple[str, ...]) -> str:
    return " & ".join(map(_escaped_latex, cells)) + r" \\"


def _escaped_latex(text: str) -> str:
    return re.sub(r"\s+", " ", "".join(_SPECIAL.get(character, character) for character in text))
