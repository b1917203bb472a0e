"""Generates the tables of README.md and docs/ from the records in search_spaces/results.

`python -m tests.readme_numbers` rewrites the pages; tests/test_readme.py checks that they are up to date.
A table is between `<!-- FILE: KIND -->` and `<!-- end -->`. FILE is a file of search_spaces/results, or
several joined by `+`. KIND is one of:

- the beginning of the caption of a table of the report; `results` is the table without a caption
- `against SETTING=VALUE`: the report's table of differences to this value
- `bench`: what `newsbert-ray bench` wrote to bench.json; `times`: the most important columns of it
- `lines`: the lines that a benchmark printed, one row each; `lines NAME ...`: these columns, and the lines
  that have one of them (`a/b` is b inside a)
- `study NAME`: a table of the study of students (`tests.study_tables`); `study headline` is a sentence
- `recommendation NAME`: a table of the study of recommendation (`tests.recommendation_tables`)
- `headline`: one sentence on the quality and speed of NewsBERT's student
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from newsbert_ray.record import RunRecord
from newsbert_ray.reporting.page import Table
from newsbert_ray.reporting.records import read_kept
from newsbert_ray.reporting.report import runs_page
from newsbert_ray.reporting.statistics import read_against
from newsbert_ray.serving.bench import Timing, timings_table
from tests.recommendation_tables import recommendation
from tests.study_tables import study

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "search_spaces" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"(<!-- (\S+\.jsonl?): ([^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)

_SHORT = ("model", "threads", "titles/s", "ms p50", "times", "promised")


def fill_tables(text: str) -> str:
    """`text` with every table generated again from its records."""
    return BLOCK.sub(lambda match: f"{match[1]}{_table(match[2], match[3])}\n{match[4]}", text)


def _table(file: str, which: str) -> str:
    if which in ("bench", "times"):
        return _bench(json.loads((RESULTS / file).read_text(encoding="utf-8")), short=which == "times")
    if which.startswith("study "):
        return study(which.removeprefix("study "), RESULTS / file)
    if which.startswith("recommendation "):
        return recommendation(which.removeprefix("recommendation "), RESULTS / file)
    if which.split()[0] == "lines":
        return _lines((RESULTS / file).read_text(encoding="utf-8").splitlines(), which.split()[1:])
    records = [record for name in file.split("+") for record in read_kept(RESULTS / name)]
    if which == "headline":
        return _headline(records)
    base = read_against(which.removeprefix("against ")) if which.startswith("against ") else None
    page = runs_page(records, {}, against=base)
    tables = [block for section in page.sections for block in section.blocks if isinstance(block, Table)]
    wanted = f"Difference to {base}" if base else "" if which == "results" else which
    matches = [t for t in tables if (t.caption.startswith(wanted) if wanted else not t.caption)]
    if len(matches) != 1:
        raise ValueError(f"{file}: {len(matches)} tables whose caption begins with {which!r}")
    return matches[0].markdown()


def _headline(records: list[RunRecord]) -> str:
    """Mean test accuracy and speed of NewsBERT's student compared with its teacher."""
    runs = [record for record in records if record.settings["method"] == "newsbert"]
    teacher, student = (
        mean(run.metrics["test"][model]["accuracy"] for run in runs) for model in ("teacher", "student")
    )
    times = mean(run.metrics["speed"]["times_teacher"] for run in runs)
    (layers,) = {run.settings["student"]["layers"] for run in runs}
    teacher_layers = sum(map(len, runs[0].layer_map))
    return (
        f"**On MIND titles, a student of {layers} layer keeps {student / teacher:.0%} of the accuracy of its "
        f"{teacher_layers}-layer teacher\n({student:.1%} of {teacher:.1%}) and encodes {times:.1f} times "
        f"as many titles per second** (means of {len(runs)} seeds, CPU)."
    )


def _bench(kept: dict[str, Any], *, short: bool) -> str:
    """The table of bench.json, with the hardware in its caption; `short` has the columns _SHORT only."""
    table = timings_table([Timing(**timing) for timing in kept["timings"]])
    hardware = kept["hardware"]
    caption = (
        f"{kept['titles']:,} titles, {kept['tokens_per_title']:.1f} tokens on average, {kept['rounds']} "
        f"rounds, {hardware.get('processor')}, torch {kept['versions'].get('torch')}."
    )
    if short:
        columns = [table.head.index(name) for name in _SHORT]
        rows = tuple(tuple(row[column] for column in columns) for row in table.rows)
        table = replace(table, head=_SHORT, rows=rows, caption="")
    return replace(table, caption=f"{caption} {table.caption}".strip()).markdown()


def _lines(lines: list[str], wanted: list[str]) -> str:
    """One row for each line, one column for each of the `wanted` values (all values if empty)."""
    figures = [(str(line.pop("figure")), _flatten(line)) for line in map(json.loads, lines)]
    names = wanted or list(figures[0][1])
    rows = [(figure, line) for figure, line in figures if any(name in line for name in names)]
    if missing := [name for name in names if not any(name in line for _, line in rows)]:
        raise ValueError(f"no line has {', '.join(missing)}")
    head = ("", *(name.replace("/", " ").replace("_", " ") for name in names))
    cells = tuple((figure, *(_cell(line.get(name)) for name in names)) for figure, line in rows)
    return Table(head, cells, words=1, caption="").markdown()


def _flatten(line: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in line.items():
        flat |= _flatten(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
    return flat


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
        page.write_text(fill_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
