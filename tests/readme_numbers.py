"""The tables of README.md and search_spaces/results/README.md, made from the records that the repository
keeps: `python -m tests.readme_numbers` writes them anew, `tests/test_readme.py` asks whether they still
stand.

A table stands between `<!-- FILE: WHICH -->` and `<!-- end -->`: a file of search_spaces/results, or several
joined by `+`, and how the caption of one of their report's tables begins, or `against SETTING=VALUE` for its
table of differences to that; `bench` of what `newsbert-ray bench` wrote (bench.json), `times` the least of
it; `lines` of what a benchmark printed, a row a line, `lines NAME ...` those of its figures that are named,
from the lines that have any of them (`a/b` is b in a).
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from newsbert_ray.reporting.page import Table, block_markdown
from newsbert_ray.reporting.records import read_kept
from newsbert_ray.reporting.report import runs_page
from newsbert_ray.reporting.statistics import read_against
from newsbert_ray.serving.bench import Timing, timings_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "search_spaces" / "results"
PAGES = (ROOT / "README.md", RESULTS / "README.md")
BLOCK = re.compile(r"(<!-- (\S+\.jsonl?): ([^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)

_SHORT = ("model", "threads", "titles/s", "ms p50", "times", "promised")


def filled(text: str) -> str:
    """`text` with each table as its records make it now."""
    return BLOCK.sub(lambda found: f"{found[1]}{_table(found[2], found[3])}\n{found[4]}", text)


def _table(file: str, which: str) -> str:
    if which in ("bench", "times"):
        return _bench(json.loads((RESULTS / file).read_text(encoding="utf-8")), short=which == "times")
    if which.split()[0] == "lines":
        return _lines((RESULTS / file).read_text(encoding="utf-8").splitlines(), which.split()[1:])
    records = [record for name in file.split("+") for record in read_kept(RESULTS / name)]
    base = read_against(which.removeprefix("against ")) if which.startswith("against ") else None
    page = runs_page(records, {}, against=base)
    tables = [block for section in page.sections for block in section.blocks if isinstance(block, Table)]
    wanted = f"Difference to {base}" if base else "" if which == "results" else which
    found = [table for table in tables if (table.caption.startswith(wanted) if wanted else not table.caption)]
    if len(found) != 1:
        raise ValueError(f"{file}: {len(found)} tables whose caption begins with {which!r}")
    return block_markdown(found[0])


def _bench(kept: dict[str, Any], *, short: bool) -> str:
    """What was measured, and on what; in `short` how many times as fast each is."""
    table = timings_table([Timing(**timing) for timing in kept["timings"]])
    hardware = kept["hardware"]
    caption = (
        f"{kept['titles']:,} titles, {kept['tokens_per_title']:.1f} tokens on average, {kept['rounds']} "
        f"rounds, {hardware.get('processor')}, torch {kept['versions'].get('torch')}."
    )
    if short:
        places = [table.head.index(name) for name in _SHORT]
        rows = tuple(tuple(row[place] for place in places) for row in table.rows)
        table = replace(table, head=_SHORT, rows=rows, caption="")
    return block_markdown(replace(table, caption=f"{caption} {table.caption}".strip()))


def _lines(lines: list[str], wanted: list[str]) -> str:
    """A row a line, a column a figure; of those `wanted`, if any are, and of the lines that have one."""
    found = [(str(line.pop("figure")), _flat(line)) for line in map(json.loads, lines)]
    names = wanted or list(found[0][1])
    rows = [(figure, line) for figure, line in found if any(name in line for name in names)]
    if missing := [name for name in names if not any(name in line for _, line in rows)]:
        raise ValueError(f"no line has {', '.join(missing)}")
    head = ("", *(name.replace("/", " ").replace("_", " ") for name in names))
    cells = tuple((figure, *(_cell(line.get(name)) for name in names)) for figure, line in rows)
    return block_markdown(Table(head, cells, words=1, caption=""))


def _flat(line: dict[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in line.items():
        found |= _flat(value, f"{before}{name}/") if isinstance(value, dict) else {before + name: value}
    return found


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
