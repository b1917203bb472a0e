"""The tables of README.md and search_spaces/results/README.md, made from the records that the repository
keeps: `python -m tests.readme_numbers` writes them anew, `tests/test_readme.py` asks whether they still
stand.

A table stands between `<!-- FILE: WHICH -->` and `<!-- end -->`: a file of search_spaces/results, or several
joined by `+`, and how the caption of one of their report's tables begins; `bench` of what `newsbert-ray
bench` wrote (bench.json), `times` the least of it; `lines` of what a benchmark printed.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from newsbert_ray.reporting.kept import read_kept
from newsbert_ray.reporting.page import Table, block_markdown
from newsbert_ray.reporting.runs_page import runs_page
from newsbert_ray.serving.timings import Timing, timings_table

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
    if which == "lines":
        return _lines((RESULTS / file).read_text(encoding="utf-8").splitlines())
    page = runs_page([record for name in file.split("+") for record in read_kept(RESULTS / name)], {})
    tables = [block for section in page.sections for block in section.blocks if isinstance(block, Table)]
    wanted = "" if which == "results" else which
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


def _lines(lines: list[str]) -> str:
    """A row a line, a column a key."""
    rows = [json.loads(line) for line in lines]
    head = tuple(str(key).replace("_", " ") for key in rows[0])
    cells = tuple(tuple(str(value) for value in row.values()) for row in rows)
    return block_markdown(Table(head, cells, words=1, caption=""))


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
