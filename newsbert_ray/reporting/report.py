"""`newsbert-ray report`: records at or below some folders -> a table, figures and what was run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from newsbert_ray.record import RecordError, RunRecord, find_records, read_record, write_text
from newsbert_ray.reporting.drawing import figure_paths, write_figure
from newsbert_ray.reporting.figures import (
    BETA_FIGURE,
    CURVE_FIGURE,
    NothingToDraw,
    beta_figure,
    curve_figure,
)
from newsbert_ray.reporting.tables import (
    data_name,
    distinct,
    rows_of,
    teacher_name,
    to_csv,
    to_markdown,
    varying_settings,
)

_log = logging.getLogger(__name__)


def report(folders: Sequence[str | Path], *, out: str | Path) -> list[Path]:
    """Write report.md, report.csv and each figure as PNG and SVG.

    Args:
        folders: runs and sweeps; every record at or below them counts once.
        out: where to write; files of an earlier report are replaced, its figures that these records do not
            make are removed.
    Returns:
        The written files, report.md first.
    Raises:
        RecordError: a folder that is missing or holds no record, or a damaged record.
    """
    records = collect(folders)
    out = Path(out)
    pictures: list[Path] = []
    notes: list[str] = []
    if repeats := len(records) - len(distinct(records)):
        notes.append(f"{repeats} repeats of a run (same settings and seed) are left out")
    for name, make in ((BETA_FIGURE, beta_figure), (CURVE_FIGURE, curve_figure)):
        try:
            pictures += write_figure(make(records), out)
        except NothingToDraw as reason:
            notes.append(str(reason))
            for stale in figure_paths(name, out):
                stale.unlink(missing_ok=True)
    for note in notes:
        _log.info("%s", note)
    rows = rows_of(records)
    write_text(out / "report.csv", to_csv(rows))
    write_text(out / "report.md", _page(records, to_markdown(rows), pictures, notes))
    return [out / "report.md", out / "report.csv", *pictures]


def collect(folders: Sequence[str | Path]) -> list[RunRecord]:
    """Every record at or below the folders, each once.

    Raises:
        RecordError: a folder without any, or a damaged record.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        here = find_records(folder)
        if not here:
            what = (
                "no record.json at or below it; has a run finished?"
                if Path(folder).is_dir()
                else "no such folder"
            )
            raise RecordError(f"{folder}: {what}")
        found.update(dict.fromkeys(path.resolve() for path in here))
    return [read_record(path) for path in found]


def _page(records: Sequence[RunRecord], table: str, pictures: Sequence[Path], notes: Sequence[str]) -> str:
    runs = len(distinct(records))
    parts = [
        "# Report",
        f"{runs} runs, test split. Mean ± standard deviation over seeds (one seed has none).",
        table.rstrip(),
        *(f"![{path.stem}]({path.name})" for path in pictures if path.suffix == ".png"),
        "## What was run",
        "\n".join(f"- {line}" for line in [*_provenance(records), *notes]),
    ]
    return "\n\n".join(parts) + "\n"


def _provenance(records: Sequence[RunRecord]) -> list[str]:
    """Data, teacher, constant settings, versions and hardware; more than one of a kind is said as such."""
    varying = varying_settings(records)
    return [
        _kinds("data", [_describe_data(record) for record in records]),
        _kinds("teacher", [teacher_name(record) for record in records]),
        f"settings that vary: {', '.join(varying) or 'none'}",
        _kinds("versions", [_joined(record.versions) for record in records]),
        _kinds("hardware", [_joined(record.hardware) for record in records]),
    ]


def _describe_data(record: RunRecord) -> str:
    parts = ("train", "validation", "test")
    sizes = [f"{n:,} {part}" for part in parts if (n := record.data.get(f"{part}_rows"))]
    return ", ".join([data_name(record), *sizes])


def _joined(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _kinds(name: str, values: Sequence[str]) -> str:
    kinds = list(dict.fromkeys(values))
    return f"{name}: {kinds[0]}" if len(kinds) == 1 else f"{name} (they differ): {'; '.join(kinds)}"
