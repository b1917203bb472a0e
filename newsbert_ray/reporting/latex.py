"""A Page's tables as LaTeX (booktabs), one file that a paper can \\input."""

from __future__ import annotations

import re
from collections.abc import Iterator

from newsbert_ray.reporting.page import Page, Table

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
        yield f"\\caption{{{_escaped(table.caption)}}}"
    yield f"\\begin{{tabular}}{{{columns}}}"
    yield "\\toprule"
    yield _row(table.head)
    yield "\\midrule"
    yield from map(_row, table.rows)
    yield "\\bottomrule"
    yield "\\end{tabular}"
    yield "\\end{table}"


def _row(cells: tuple[str, ...]) -> str:
    return " & ".join(map(_escaped, cells)) + r" \\"


def _escaped(text: str) -> str:
    return re.sub(r"\s+", " ", "".join(_SPECIAL.get(character, character) for character in text))
