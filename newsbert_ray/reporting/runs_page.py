"""Records of any runs -> the page about them: a table, figures, what was run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from newsbert_ray.record import RunRecord
from newsbert_ray.reporting.page import Block, Bullets, Facts, Page, Picture, Section, Table
from newsbert_ray.reporting.provenance import provenance
from newsbert_ray.reporting.tables import distinct, rows_of, table_cells


def runs_page(records: Sequence[RunRecord], figures: Mapping[str, Picture | str]) -> Page:
    """The report of some runs; `figures` are drawn, or the reason why one is left out."""
    runs = len(distinct(records))
    head, *rows = table_cells(rows_of(records))
    words = head.index("seeds")
    notes = [found for found in figures.values() if isinstance(found, str)]
    if repeats := len(records) - runs:
        notes.insert(0, f"{repeats} repeats of a run (same settings and seed) are left out")
    blocks: list[Block] = [Table(tuple(head), tuple(map(tuple, rows)), words=words)]
    blocks += [found for found in figures.values() if isinstance(found, Picture)]
    behind: list[Block] = [Facts(tuple(provenance(records)))]
    if notes:
        behind.append(Bullets(tuple(notes)))
    return Page(
        "Report",
        f"{runs} runs, test split. Mean ± standard deviation over seeds (one seed has none).",
        (Section("Results", tuple(blocks)), Section("What was run", tuple(behind))),
    )
