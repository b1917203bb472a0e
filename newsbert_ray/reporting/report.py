"""`newsbert-ray report`: the records below some folders, or a sweep -> a page, tables and figures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from newsbert_ray.data.shards import MANIFEST, read_manifest
from newsbert_ray.files import write_text
from newsbert_ray.methods import TASKS, Task, TaskName
from newsbert_ray.record import MAP, RecordError, RunRecord, find_records, read_record
from newsbert_ray.reporting.draw import draw_svg, figure_paths, write_figure
from newsbert_ray.reporting.figures import (
    BEFORE,
    BETA_FIGURE,
    BLOCKS_FIGURE,
    CHAIN_FIGURE,
    CURVE_FIGURE,
    DEPTH,
    MAP_FIGURE,
    METHOD_FIGURE,
    QUALITY_FIGURE,
    AnyPanel,
    FigureData,
    NothingToDraw,
    Panel,
    best_at_each_depth,
    beta_figure,
    blocks_figure,
    chain_figure,
    curve_figure,
    map_figure,
    method_figure,
    quality_figure,
)
from newsbert_ray.reporting.page import (
    Block,
    Bullets,
    Facts,
    Page,
    Picture,
    Section,
    Table,
    to_html,
    to_latex,
    to_markdown,
)
from newsbert_ray.reporting.paper import corpora_csv, corpora_page, method_tables, table1_of_runs
from newsbert_ray.reporting.records import (
    by_task,
    distinct,
    flat_settings,
    is_kept,
    provenance,
    read_kept,
    write_kept,
)
from newsbert_ray.reporting.statistics import (
    COST_FIGURE,
    IMPORTANCE_FIGURE,
    Against,
    cost_figure,
    importance_figure,
    read_against,
)
from newsbert_ray.reporting.sweep_data import Sweep, is_sweep, read_sweep
from newsbert_ray.reporting.sweep_figures import (
    CURVES_FIGURE,
    FRONT_FIGURE,
    NODES_FIGURE,
    OVER_FIGURE,
    learning_curves,
    nodes_figure,
    over_settings,
    pareto_front,
)
from newsbert_ray.reporting.sweep_page import points_csv, sweep_page
from newsbert_ray.reporting.tables import number, rows_of, summary_of, table_cells, to_csv
from newsbert_ray.storage import workdir as storage
from newsbert_ray.telemetry import read_events

_log = logging.getLogger(__name__)

Make = Callable[[], FigureData[AnyPanel]]
_OF_RUNS = {
    BETA_FIGURE: beta_figure,
    METHOD_FIGURE: method_figure,
    CHAIN_FIGURE: chain_figure,
    QUALITY_FIGURE: quality_figure,
    CURVE_FIGURE: curve_figure,
    BLOCKS_FIGURE: blocks_figure,
}
"""Figures of any runs of one task."""
NAMES = (
    BETA_FIGURE,
    METHOD_FIGURE,
    CHAIN_FIGURE,
    QUALITY_FIGURE,
    BLOCKS_FIGURE,
    CURVE_FIGURE,
    MAP_FIGURE,
    OVER_FIGURE,
    IMPORTANCE_FIGURE,
    CURVES_FIGURE,
    FRONT_FIGURE,
    COST_FIGURE,
    NODES_FIGURE,
)


def report(
    folders: Sequence[str | Path],
    *,
    out: str | Path,
    against: str | None = None,
    keep: str | None = None,
) -> list[Path]:
    """Write report.md, report.html (the same, in one file), report.csv, tables.tex (the page's tables for
    LaTeX) and each figure as PNG and SVG.

    Args:
        folders: one sweep's folder, also of a sweep that runs or was interrupted; or runs and sweeps, of
            which every record at or below them counts once, or files that `keep` wrote; or prepared shards
            (Table 1); URLs too.
        out: a folder, where to write; files of an earlier report are replaced, its figures that are not made
            again are removed.
        against: SETTING=VALUE of the rows that others are compared with (Welch's t-test over seeds); of
            several methods newsbert by default.
        keep: a file (.jsonl) for the records themselves, without this machine's places.
    Returns:
        The written files, report.md first.
    Raises:
        RecordError: a folder that is missing or holds no record, or a damaged record or sweep.json.
        ShardError: damaged shards.
        SettingsError: `against` is none, or no row is so.
        StorageError: a place in a bucket cannot be read.
    """
    if storage.is_url(out):
        raise RecordError(f"--out {storage.shown(out)}: a report is read on this machine; give a folder")
    with ExitStack() as stack:
        here = [stack.enter_context(storage.snapshot(folder)) for folder in folders]
        base = read_against(against) if against else None
        written = _report(here, named=folders, out=Path(out), against=base)
        if keep is not None:
            write_kept(Path(keep), distinct(collect(here, named=folders)))
            written.append(Path(keep))
        return written


def _report(
    folders: Sequence[Path], *, named: Sequence[str | Path], out: Path, against: Against | None
) -> list[Path]:
    """The report of `folders`, which a person calls as they are `named`."""
    if all((folder / MANIFEST).is_file() for folder in folders):
        shards = {str(name): read_manifest(folder) for name, folder in zip(named, folders, strict=True)}
        page = corpora_page(shards)
        return _write(page, corpora_csv(shards), [], out)
    if len(folders) == 1 and is_sweep(folders[0]):
        return _report_sweep(read_sweep(folders[0]), out, against)
    records = collect(folders, named=named)
    groups = by_task(records)
    makes: dict[str, Make] = {}
    for task, group in groups.items():
        if len(groups) == 1:
            makes = {name: partial(make, group) for name, make in _of_runs(group).items()}
        else:
            for name, make in _of_runs(group).items():
                makes[f"{name}_{task}"] = partial(_of_task, make, group, task)
    alone = [folder for folder in folders if (folder / MAP).is_file()]
    if len(records) == 1 and alone:
        makes[MAP_FIGURE] = lambda: map_figure(alone[0])
    figures, pictures = _draw(makes, out)
    for reason in figures.values():
        if isinstance(reason, str):
            _log.info("%s", reason)
    rows = [row for group in groups.values() for row in rows_of(group)]
    page = runs_page(records, figures, against=against, failed=_failed(folders))
    return _write(page, to_csv(rows), pictures, out)


def _failed(folders: Sequence[Path]) -> dict[TaskName, list[Mapping[str, Any]]]:
    """What varied of each run that failed in those folders that are sweeps."""
    found: dict[TaskName, list[Mapping[str, Any]]] = {}
    for sweep in (read_sweep(folder) for folder in folders if is_sweep(folder)):
        name = next(name for name, task in TASKS.items() if task is sweep.task)
        found.setdefault(name, []).extend(sweep.failed_rows)
    return found


def _of_runs(records: Sequence[RunRecord]) -> dict[str, Callable[[Sequence[RunRecord]], FigureData[Panel]]]:
    """The figures that one task's runs ask for: of methods only where there are several."""
    wanted = {
        METHOD_FIGURE: len({record.settings.get("method") for record in records}) > 1,
        CHAIN_FIGURE: len({flat_settings(record)[BEFORE] for record in records}) > 1,
        QUALITY_FIGURE: len({flat_settings(record)[DEPTH] for record in records}) > 1,
        BLOCKS_FIGURE: any("blocks" in entry for record in records for entry in record.curve),
    }
    return {name: make for name, make in _OF_RUNS.items() if wanted.get(name, True)}


def _of_task(
    make: Callable[[Sequence[RunRecord]], FigureData[Panel]], records: Sequence[RunRecord], task: TaskName
) -> FigureData[Panel]:
    """The figure of one task's runs, among those of others."""
    try:
        figure = make(records)
    except NothingToDraw as reason:
        raise NothingToDraw(f"{task}: {reason}") from reason
    return replace(figure, name=f"{figure.name}_{task}")


def collect(folders: Sequence[str | Path], *, named: Sequence[str | Path] | None = None) -> list[RunRecord]:
    """Every record at or below the folders, each once; a message says what they are `named`.

    Raises:
        RecordError: a folder without any, or a damaged record.
    """
    found: dict[Path, None] = {}
    kept: list[RunRecord] = []
    for folder, name in zip(folders, named or folders, strict=True):
        if is_kept(folder):
            kept += read_kept(Path(folder))
            continue
        here = find_records(folder)
        if not here:
            what = (
                "no record.json at or below it; has a run finished?"
                if Path(folder).is_dir()
                else "no such folder"
            )
            raise RecordError(f"{name}: {what}")
        found.update(dict.fromkeys(path.resolve() for path in here))
    return [*kept, *(read_record(path) for path in found)]


def _report_sweep(sweep: Sweep, out: Path, against: Against | None) -> list[Path]:
    records = distinct([trial.record for trial in sweep.trials if trial.record])
    makes: dict[str, Make] = {FRONT_FIGURE: lambda: pareto_front(sweep)}
    for goal in range(len(sweep.goals)):
        name = OVER_FIGURE if goal == 0 else f"{OVER_FIGURE}_{goal + 1}"
        makes[name] = lambda goal=goal: over_settings(sweep, goal=goal)  # type: ignore[misc]
    makes |= {
        IMPORTANCE_FIGURE: lambda: importance_figure(sweep),
        CURVES_FIGURE: lambda: learning_curves(sweep),
        COST_FIGURE: lambda: cost_figure(sweep),
        NODES_FIGURE: lambda: nodes_figure(read_events(sweep.folder)),
        QUALITY_FIGURE: lambda: quality_figure(best_at_each_depth(sweep), chosen=True),
        BLOCKS_FIGURE: lambda: blocks_figure(records),
    }
    if sweep.finished and sweep.task is TASKS["topics"]:
        best = sweep.folder / "trials" / sweep.finished[0].trials[0].name
        makes[MAP_FIGURE] = lambda: map_figure(best)
    if sweep.space["search"]["sampler"] == "grid":
        # Of points that a sampler has scattered each would be a line of its own.
        makes[BETA_FIGURE] = lambda: beta_figure(records)
        makes[METHOD_FIGURE] = lambda: method_figure(records)
        makes[CHAIN_FIGURE] = lambda: chain_figure(records)
    figures, pictures = _draw(makes, out)
    return _write(sweep_page(sweep, figures, against=against), points_csv(sweep), pictures, out)


def _draw(makes: Mapping[str, Make], out: Path) -> tuple[dict[str, Picture | str], list[Path]]:
    """Every figure that can be made, or why it cannot; figures of an earlier report go."""
    figures: dict[str, Picture | str] = {}
    written: list[Path] = []
    for name, make in makes.items():
        try:
            figure = make()
        except NothingToDraw as reason:
            figures[name] = str(reason)
            continue
        paths = write_figure(figure, out)
        written += paths
        figures[name] = Picture(paths[0].name, draw_svg(figure), figure.alt, figure.caption)
    stale = {path for name in (*NAMES, *_further(out)) for path in figure_paths(name, out)} - set(written)
    for path in stale:
        path.unlink(missing_ok=True)
    return figures, written


def _further(out: Path) -> list[str]:
    """Figures of an earlier report over the settings of a second goal and more, or of one task among
    several."""
    of_tasks = [f"{name}_{task}" for name in _OF_RUNS for task in TASKS]
    return [*(path.stem for path in out.glob(f"{OVER_FIGURE}_[0-9]*.png")), *of_tasks]


def _write(page: Page, rows: str, pictures: Sequence[Path], out: Path) -> list[Path]:
    texts = {"report.md": to_markdown(page), "report.html": to_html(page), "report.csv": rows}
    texts["tables.tex"] = to_latex(page)
    for name, text in texts.items():
        write_text(out / name, text)
    return [*(out / name for name in texts), *pictures]


def runs_page(
    records: Sequence[RunRecord],
    figures: Mapping[str, Picture | str],
    *,
    against: Against | None = None,
    failed: Mapping[TaskName, Sequence[Mapping[str, Any]]] | None = None,
) -> Page:
    """The report of some runs; `figures` are drawn, or the reason why one is left out.

    Args:
        failed: of each task, what varied of each run that failed.
    Raises:
        SettingsError: no run is one that the others are to be compared with.
    """
    runs = len(distinct(records))
    groups = by_task(records)
    notes = [found for found in figures.values() if isinstance(found, str)]
    if repeats := len(records) - runs:
        notes.insert(0, f"{repeats} repeats of a run (same settings and seed) are left out")
    blocks: list[Block] = [
        _table(group, "" if list(groups) == ["topics"] else _caption(name, distinct(group)))
        for name, group in groups.items()
    ]
    blocks += [
        table
        for name, group in groups.items()
        for table in method_tables(group, against, (failed or {}).get(name, ()))
    ]
    blocks += [found for found in figures.values() if isinstance(found, Picture)]
    behind: list[Block] = [Facts(tuple(provenance(records)))]
    if table := table1_of_runs(records):
        behind.append(table)
    if notes:
        behind.append(Bullets(tuple(notes)))
    return Page(
        "Report",
        f"{runs} runs, test split. Mean ± standard deviation over seeds (one seed has none).",
        (Section("Results", tuple(blocks)), Section("What was run", tuple(behind))),
    )


def _table(records: Sequence[RunRecord], caption: str) -> Table:
    head, *rows = table_cells(rows_of(records))
    return Table(tuple(head), tuple(map(tuple, rows)), words=head.index("seeds"), caption=caption)


def _caption(name: TaskName, records: Sequence[RunRecord]) -> str:
    """`Recommendation: 3 runs, 982 impressions (3 left out). Standard error over the impressions, ...`."""
    task = TASKS[name]
    sizes = {
        f"{rows:,.0f} {task.rows}" + (f" ({out:,.0f} left out)" if out else "")
        for record in records
        if (rows := number(record, "test.student.rows"))
        for out in [number(record, "test.student.left_out")]
    }
    counted = f", {' or '.join(sorted(sizes))}" if sizes else ""
    runs = f"{len(records)} run{'s' if len(records) > 1 else ''}"
    unlabelled = sum(not record.metrics.get("test") for record in records)
    unknown = f", {unlabelled} on a test split without labels" if unlabelled else ""
    return f"{name.capitalize()}: {runs}{counted}{unknown}.{_noise(task, records)}"


def _noise(task: Task, records: Sequence[RunRecord]) -> str:
    """How far the metrics hang on which rows there are, whatever the seed."""
    errors = {
        metric.heading: summary.error
        for metric in task.metrics
        if (summary := summary_of(records, f"test.student.{metric.name}")) and summary.error is not None
    }
    if not errors:
        return ""
    listed = ", ".join(f"{heading} {100 * error:.1f}" for heading, error in errors.items())
    alone = any(len(row.seeds) == 1 for row in rows_of(records))
    brackets = "; in brackets that of a single seed's number" if alone else ""
    return f" Standard error over the {task.rows}, students' mean: {listed}{brackets}."
