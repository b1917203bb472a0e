"""`newsbert-ray report`: runs, a sweep or prepared shards -> a page, tables and figures."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from newsbert_ray.data.shards import MANIFEST, read_manifest
from newsbert_ray.files import write_text
from newsbert_ray.methods import TASKS, TaskName
from newsbert_ray.record import MAP, METRICS, RecordError, RunRecord, find_records, read_entries, read_record
from newsbert_ray.reporting import records as run_records
from newsbert_ray.reporting import tables
from newsbert_ray.reporting.draw import draw_svg, figure_paths, without_single_points, write_figure
from newsbert_ray.reporting.figures import Make, NothingToDraw, loss_figure, map_figure, runs_figures
from newsbert_ray.reporting.page import Block, Page, Picture, Section, Table
from newsbert_ray.reporting.paper import corpora_csv, corpora_page, method_tables, table1_of_runs
from newsbert_ray.reporting.records import NAMES, by_task, distinct, is_kept, one_task, provenance
from newsbert_ray.reporting.statistics import Against, read_against
from newsbert_ray.reporting.sweep_data import is_sweep, read_sweep
from newsbert_ray.reporting.sweep_figures import sweep_figures
from newsbert_ray.reporting.sweep_page import points_csv, sweep_page
from newsbert_ray.reporting.tables import PARAMETERS, SPEED, Column, number, rows_of, summary_of
from newsbert_ray.secrets import mask_url
from newsbert_ray.storage.bucket import is_url
from newsbert_ray.storage.workdir import snapshot

_SIZES = (PARAMETERS, Column("speed", "titles/s at work", "speed.student_titles_per_second", digits=0))
_log = logging.getLogger(__name__)


def report(
    folders: Sequence[str | Path], *, out: str | Path, against: str | None = None, keep: str | None = None
) -> list[Path]:
    """Write report.md, report.html, report.csv, tables.tex and each figure as PNG and SVG."""
    if is_url(out):
        raise RecordError(f"--out {mask_url(str(out))}: a report is read on this machine; give a folder")
    with ExitStack() as stack:
        local = {str(folder): stack.enter_context(snapshot(folder)) for folder in folders}
        written = _report(local, Path(out), read_against(against) if against else None)
        if keep is not None:
            run_records.write_kept(Path(keep), distinct(collect(local)))
            written.append(Path(keep))
        return written


def _report(folders: Mapping[str, Path], out: Path, against: Against | None) -> list[Path]:
    paths = list(folders.values())
    if all((folder / MANIFEST).is_file() for folder in paths):
        shards = {name: read_manifest(folder) for name, folder in folders.items()}
        return _write(corpora_page(shards), corpora_csv(shards), {}, out)
    if len(paths) == 1 and is_sweep(paths[0]):
        sweep = read_sweep(paths[0])
        figures = _draw(sweep_figures(sweep), out)
        return _write(sweep_page(sweep, figures, against=against), points_csv(sweep), figures, out)
    records = collect(folders)
    groups, figures = by_task(records), dict[str, Picture | str]()
    run = find_records(paths[0])[0] if len(records) == 1 and not is_kept(paths[0]) else None
    topics: list[Table] = []
    if run and (run / MAP).exists():
        topics = tables.topic_tables(json.loads((run / MAP).read_text(encoding="utf-8")))
    for task, group in groups.items():
        makes = runs_figures(group)
        if run:
            losses = partial(loss_figure, group[0], read_entries(run / METRICS))
            makes = {"losses": losses, **makes, "map_of_titles": partial(map_figure, run)}
        figures |= _draw(makes, out, task=task if len(groups) > 1 else "")
    for reason in (figure for figure in figures.values() if isinstance(figure, str)):
        _log.info("%s", reason)
    sweeps = [read_sweep(folder) for folder in paths if is_sweep(folder)]
    failed = {
        name: [row for sweep in sweeps if sweep.task is TASKS[name] for row in sweep.failed_rows]
        for name in groups
    }
    rows = [row for group in groups.values() for row in rows_of(group)]
    page = runs_page(records, figures, against=against, failed=failed, topics=topics)
    return _write(page, tables.to_csv(rows), figures, out)


def collect(folders: Mapping[str, Path]) -> list[RunRecord]:
    """Every record at or below the folders, each once; RecordError where one is missing or damaged."""
    kept: list[RunRecord] = []
    runs: dict[Path, None] = {}
    for name, folder in folders.items():
        if is_kept(folder):
            kept += run_records.read_kept(folder)
        elif paths := find_records(folder):
            runs |= dict.fromkeys(path.resolve() for path in paths)
        else:
            missing = "no record.json at or below it; has a run finished?"
            raise RecordError(f"{name}: {missing if folder.is_dir() else 'no such folder'}")
    return [*kept, *map(read_record, runs)]


def _draw(makes: Mapping[str, Make], out: Path, *, task: str = "") -> dict[str, Picture | str]:
    """Write every figure that can be made; for the others the reason why not. Both name a `task`."""
    figures: dict[str, Picture | str] = {}
    for kind, make in makes.items():
        name = f"{kind}_{task}" if task else kind
        try:
            figure = replace(without_single_points(make()), name=name)
        except NothingToDraw as reason:
            figures[name] = f"{task}: {reason}" if task else str(reason)
            continue
        png, _ = write_figure(figure, out)
        figures[name] = Picture(png.name, draw_svg(figure), figure.alt, figure.caption)
    return figures


def _write(page: Page, rows: str, figures: Mapping[str, Picture | str], out: Path) -> list[Path]:
    """Write the page in all its forms; remove the figures of an earlier report."""
    earlier = out / "report.md"
    stale = re.findall(r"\]\((\w+)\.png\)", earlier.read_text(encoding="utf-8")) if earlier.exists() else []
    texts = {"report.md": page.markdown(), "report.html": page.html()}
    texts |= {"report.csv": rows, "tables.tex": page.latex()}
    for name, text in texts.items():
        write_text(out / name, text)
    names = [name for name, figure in figures.items() if isinstance(figure, Picture)]
    drawn = [path for name in names for path in figure_paths(name, out)]
    for path in (path for name in set(stale) - set(names) for path in figure_paths(name, out)):
        path.unlink(missing_ok=True)
    return [*(out / name for name in texts), *drawn]


def runs_page(
    records: Sequence[RunRecord],
    figures: Mapping[str, Picture | str],
    *,
    against: Against | None = None,
    failed: Mapping[TaskName, Sequence[Mapping[str, Any]]] | None = None,
    topics: Sequence[Table] = (),
) -> Page:
    """The page about any runs: a table for each task, comparisons, figures or why they are left out, what was
    run. `failed`: for each task the varied settings of its failed runs; `topics`: tables of a single run."""
    runs, groups = len(distinct(records)), by_task(records)
    captions = {} if list(groups) == ["topics"] else {name: _caption(name, groups[name]) for name in groups}
    blocks: list[Block] = [tables.results_table(rows_of(groups[n]), captions.get(n, "")) for n in groups]
    if len(records) == 1 and number(records[0], SPEED.path):
        columns = (*tables.student_columns(one_task(records)), *_SIZES, SPEED)
        blocks.append(tables.pair_table(records, columns, "The student beside its teacher."))
    for name, group in groups.items():
        blocks += method_tables(group, against, (failed or {}).get(name, ()))
    blocks += [figure for figure in figures.values() if isinstance(figure, Picture)]
    blocks += topics
    notes = [reason for reason in figures.values() if isinstance(reason, str)]
    if repeats := len(records) - runs:
        notes.insert(0, f"{repeats} repeats of a run (same settings and seed) are left out")
    behind = [block for block in (provenance(records), table1_of_runs(records), notes) if block]
    several = f"{runs} runs, test split. Mean ± standard deviation over seeds (one seed has none)."
    lead = several if runs > 1 else _lead_of_one(records[0])
    return Page("Report", lead, (Section("Results", tuple(blocks)), Section("What was run", tuple(behind))))


def _lead_of_one(record: RunRecord) -> str:
    task = one_task([record])
    name = task.primary.name
    student, teacher = number(record, f"test.student.{name}"), number(record, f"test.teacher.{name}")
    speed = number(record, "speed.times_teacher")
    method = NAMES.get(str(record.settings.get("method", "newsbert")), "")
    text = f"One run ({method}, seed {record.seed})."
    if student is not None:
        text += f" Its student's test {task.primary.heading}: {100 * student:.1f} %"
        text += "." if teacher is None else f"; its teacher's: {100 * teacher:.1f} %."
    return text + (f" The student is {speed:.1f} times as fast as its teacher." if speed else "")


def _caption(name: TaskName, records: Sequence[RunRecord]) -> str:
    """`Recommendation: 3 runs, 982 impressions (3 left out). Standard error over the impressions, ...`."""
    task, records = TASKS[name], distinct(records)
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
        brackets = "; in brackets where there is one seed" if single else ""
        noise = f" Standard error over the {task.rows}, students' mean: {', '.join(errors)}{brackets}."
    runs = f"{len(records)} run{'s' if len(records) > 1 else ''}"
    return f"{name.capitalize()}: {runs}{counted}{unknown}.{noise}"
