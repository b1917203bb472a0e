"""`newsbert-ray report`: runs, a sweep or prepared shards -> a page, tables and figures."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from newsbert_ray.data.shards import MANIFEST, read_manifest
from newsbert_ray.files import write_text
from newsbert_ray.methods import TASKS, TaskName
from newsbert_ray.record import MAP, RecordError, RunRecord, find_records, read_record
from newsbert_ray.reporting.draw import draw_svg, figure_paths, write_figure
from newsbert_ray.reporting.figures import (
    BETA_FIGURE,
    BLOCKS_FIGURE,
    CHAIN_FIGURE,
    CURVE_FIGURE,
    DEPTH,
    MAP_FIGURE,
    METHOD_FIGURE,
    PREREQUISITE,
    QUALITY_FIGURE,
    AnyPanel,
    FigureData,
    NothingToDraw,
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
    best_at_each_depth,
    learning_curves,
    nodes_figure,
    over_settings,
    pareto_front,
)
from newsbert_ray.reporting.sweep_page import points_csv, sweep_page
from newsbert_ray.reporting.tables import number, results_table, rows_of, summary_of, to_csv
from newsbert_ray.storage import workdir as storage
from newsbert_ray.telemetry import read_events

_log = logging.getLogger(__name__)

Make = Callable[[], FigureData[AnyPanel]]
FIGURES = (
    *(BETA_FIGURE, METHOD_FIGURE, CHAIN_FIGURE, QUALITY_FIGURE, BLOCKS_FIGURE, CURVE_FIGURE, MAP_FIGURE),
    *(OVER_FIGURE, IMPORTANCE_FIGURE, CURVES_FIGURE, FRONT_FIGURE, COST_FIGURE, NODES_FIGURE),
)
"""Names of the figures' files; one of several goals or tasks has its number or name at the end."""


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
        folders: one sweep, finished or not; or any runs, sweeps and files that `keep` wrote, of which every
            record counts once; or prepared shards (Table 1). Folders or URLs.
        out: the folder to write. Files and figures of an earlier report in it are replaced.
        against: SETTING=VALUE of the rows that others are compared with (Welch's t-test over seeds); with
            several methods newsbert by default.
        keep: a .jsonl file for the records themselves, without this machine's paths.
    Returns:
        The written files, report.md first.
    Raises:
        RecordError: a folder is missing or has no record, or a record or sweep.json is damaged.
        ShardError: damaged shards.
        SettingsError: `against` has another form, or no row has that value.
        StorageError: a bucket cannot be read.
    """
    if storage.is_url(out):
        raise RecordError(f"--out {storage.shown(out)}: a report is read on this machine; give a folder")
    with ExitStack() as stack:
        local = {str(folder): stack.enter_context(storage.snapshot(folder)) for folder in folders}
        written = _report(local, Path(out), read_against(against) if against else None)
        if keep is not None:
            write_kept(Path(keep), distinct(collect(local)))
            written.append(Path(keep))
        return written


def _report(folders: Mapping[str, Path], out: Path, against: Against | None) -> list[Path]:
    """The report of local folders, by the names that the user gave them."""
    paths = list(folders.values())
    if all((folder / MANIFEST).is_file() for folder in paths):
        shards = {name: read_manifest(folder) for name, folder in folders.items()}
        return _write(corpora_page(shards), corpora_csv(shards), {}, out)
    if len(paths) == 1 and is_sweep(paths[0]):
        sweep = read_sweep(paths[0])
        figures = _draw(_sweep_figures(sweep), out)
        return _write(sweep_page(sweep, figures, against=against), points_csv(sweep), figures, out)
    records = collect(folders)
    groups = by_task(records)
    figures = {}
    for task, group in groups.items():
        several = len(groups) > 1
        for name, drawn in _draw(_run_figures(group), out, suffix=f"_{task}" if several else "").items():
            figures[name] = f"{task}: {drawn}" if several and isinstance(drawn, str) else drawn
    with_map = [folder for folder in paths if (folder / MAP).is_file()]
    if len(records) == 1 and with_map:
        figures |= _draw({MAP_FIGURE: partial(map_figure, with_map[0])}, out)
    for reason in figures.values():
        if isinstance(reason, str):
            _log.info("%s", reason)
    failed: dict[TaskName, list[Mapping[str, Any]]] = {}
    for sweep in (read_sweep(folder) for folder in paths if is_sweep(folder)):
        task = next(name for name, task in TASKS.items() if task is sweep.task)
        failed.setdefault(task, []).extend(sweep.failed_rows)
    rows = [row for group in groups.values() for row in rows_of(group)]
    return _write(runs_page(records, figures, against=against, failed=failed), to_csv(rows), figures, out)


def collect(folders: Mapping[str, Path]) -> list[RunRecord]:
    """Every record at or below the folders, each once; messages name the folders by their keys.

    Raises:
        RecordError: a folder without any, or a damaged record.
    """
    kept = [record for folder in folders.values() if is_kept(folder) for record in read_kept(folder)]
    runs: dict[Path, None] = {}
    for name, folder in folders.items():
        if is_kept(folder):
            continue
        paths = find_records(folder)
        if not paths:
            missing = "no record.json at or below it; has a run finished?"
            raise RecordError(f"{name}: {missing if folder.is_dir() else 'no such folder'}")
        runs.update(dict.fromkeys(path.resolve() for path in paths))
    return [*kept, *map(read_record, runs)]


def _run_figures(records: Sequence[RunRecord]) -> dict[str, Make]:
    """Figures of any runs of one task: those that compare only where there is something to compare."""
    flats = [flat_settings(record) for record in records]
    several = {name for name in ("method", PREREQUISITE, DEPTH) if len({flat[name] for flat in flats}) > 1}
    blocks = any("blocks" in entry for record in records for entry in record.curve)
    wanted = [
        (BETA_FIGURE, beta_figure, True),
        (METHOD_FIGURE, method_figure, "method" in several),
        (CHAIN_FIGURE, chain_figure, PREREQUISITE in several),
        (QUALITY_FIGURE, quality_figure, DEPTH in several),
        (CURVE_FIGURE, curve_figure, True),
        (BLOCKS_FIGURE, blocks_figure, blocks),
    ]
    return {name: partial(make, records) for name, make, needed in wanted if needed}


def _sweep_figures(sweep: Sweep) -> dict[str, Make]:
    records = distinct([trial.record for trial in sweep.trials if trial.record])
    makes: dict[str, Make] = {FRONT_FIGURE: partial(pareto_front, sweep)}
    for goal in range(len(sweep.goals)):
        makes[OVER_FIGURE if goal == 0 else f"{OVER_FIGURE}_{goal + 1}"] = partial(
            over_settings, sweep, goal=goal
        )
    makes |= {
        IMPORTANCE_FIGURE: partial(importance_figure, sweep),
        CURVES_FIGURE: partial(learning_curves, sweep),
        COST_FIGURE: partial(cost_figure, sweep),
        NODES_FIGURE: lambda: nodes_figure(read_events(sweep.folder)),
        QUALITY_FIGURE: lambda: quality_figure(best_at_each_depth(sweep), chosen=True),
        BLOCKS_FIGURE: partial(blocks_figure, records),
    }
    if sweep.finished and sweep.task is TASKS["topics"]:
        makes[MAP_FIGURE] = partial(map_figure, sweep.folder / "trials" / sweep.finished[0].trials[0].name)
    if sweep.space["search"]["sampler"] == "grid":  # other samplers' points would be a line each
        makes[BETA_FIGURE] = partial(beta_figure, records)
        makes[METHOD_FIGURE] = partial(method_figure, records)
        makes[CHAIN_FIGURE] = partial(chain_figure, records)
    return makes


def _draw(makes: Mapping[str, Make], out: Path, *, suffix: str = "") -> dict[str, Picture | str]:
    """Write every figure that can be made; for the others the reason why not."""
    figures: dict[str, Picture | str] = {}
    for name, make in makes.items():
        try:
            figure = replace(make(), name=name + suffix)
        except NothingToDraw as reason:
            figures[name + suffix] = str(reason)
            continue
        png, _ = write_figure(figure, out)
        figures[name + suffix] = Picture(png.name, draw_svg(figure), figure.alt, figure.caption)
    return figures


def _write(page: Page, rows: str, figures: Mapping[str, Picture | str], out: Path) -> list[Path]:
    """Write the page in all its forms; remove the figures of an earlier report."""
    texts = {"report.md": to_markdown(page), "report.html": to_html(page), "report.csv": rows}
    texts["tables.tex"] = to_latex(page)
    for name, text in texts.items():
        write_text(out / name, text)
    drawn = [name for name, figure in figures.items() if isinstance(figure, Picture)]
    paths = [path for name in drawn for path in figure_paths(name, out)]
    ours = re.compile(rf"({'|'.join(FIGURES)})(_\d+|_{'|_'.join(TASKS)})?\.(png|svg)")
    for path in set(out.iterdir()) - set(paths):
        if ours.fullmatch(path.name):
            path.unlink()
    return [*(out / name for name in texts), *paths]


def runs_page(
    records: Sequence[RunRecord],
    figures: Mapping[str, Picture | str],
    *,
    against: Against | None = None,
    failed: Mapping[TaskName, Sequence[Mapping[str, Any]]] | None = None,
) -> Page:
    """The page about any runs: a table for each task, comparisons, figures, what was run.

    Args:
        figures: drawn figures by name, or the reason why one is left out.
        failed: for each task the varied settings of each run that failed.
    Raises:
        SettingsError: no run has the value that the others are to be compared with.
    """
    runs, groups = len(distinct(records)), by_task(records)
    only_topics = list(groups) == ["topics"]
    blocks: list[Block] = []
    for name, group in groups.items():
        caption = "" if only_topics else _caption(name, distinct(group))
        blocks.append(results_table(rows_of(group), caption))
    for name, group in groups.items():
        blocks += method_tables(group, against, (failed or {}).get(name, ()))
    blocks += [figure for figure in figures.values() if isinstance(figure, Picture)]
    notes = [reason for reason in figures.values() if isinstance(reason, str)]
    if repeats := len(records) - runs:
        notes.insert(0, f"{repeats} repeats of a run (same settings and seed) are left out")
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


def _caption(name: TaskName, records: Sequence[RunRecord]) -> str:
    """`Recommendation: 3 runs, 982 impressions (3 left out). Standard error over the impressions, ...`."""
    task = TASKS[name]
    sizes = {
        f"{rows:,.0f} {task.rows}" + (f" ({left_out:,.0f} left out)" if left_out else "")
        for record in records
        if (rows := number(record, "test.student.rows"))
        for left_out in [number(record, "test.student.left_out")]
    }
    counted = f", {' or '.join(sorted(sizes))}" if sizes else ""
    unlabelled = sum(not record.metrics.get("test") for record in records)
    unknown = f", {unlabelled} on a test split without labels" if unlabelled else ""
    errors = [
        f"{metric.heading} {100 * summary.error:.1f}"
        for metric in task.metrics
        if (summary := summary_of(records, f"test.student.{metric.name}")) and summary.error is not None
    ]
    noise = ""
    if errors:
        single = any(len(row.seeds) == 1 for row in rows_of(records))
        brackets = "; in brackets that of a single seed's number" if single else ""
        noise = f" Standard error over the {task.rows}, students' mean: {', '.join(errors)}{brackets}."
    return (
        f"{name.capitalize()}: {len(records)} run{'s' if len(records) > 1 else ''}{counted}{unknown}.{noise}"
    )
