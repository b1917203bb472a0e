"""The paper's Table 2 beside our own rows of the same systems (NewsBERT, Wu et al. 2021). Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from newsbert_ray.record import RunRecord
from newsbert_ray.reporting.compared import (
    data_name,
    flat_settings,
    one_task,
    task_name,
    teacher_name,
    tuned_settings,
    varying_settings,
)
from newsbert_ray.reporting.names import NAMES
from newsbert_ray.reporting.page import Table
from newsbert_ray.reporting.points import bare
from newsbert_ray.reporting.tables import Column, columns_of, rows_as_found, show
from newsbert_ray.tasks import TaskName

PAPERS_LAYERS = 12
"""Of the encoder that the paper's speed-ups are counted from, in layers."""

_TABLE2: Mapping[tuple[str, int], tuple[float, ...]] = {
    ("glove", 1): (71.13, 49.71, 67.92, 33.09, 36.03, 41.80),
    ("finetune", 12): (74.54, 51.75, 70.53, 35.29, 38.61, 44.29),
    ("finetune", 8): (74.69, 52.10, 70.72, 35.40, 38.74, 44.41),
    ("finetune", 4): (73.53, 51.20, 69.64, 34.38, 37.65, 43.38),
    ("finetune", 2): (72.96, 50.76, 68.96, 33.52, 36.74, 42.48),
    ("finetune", 1): (72.32, 50.37, 68.02, 33.14, 36.09, 41.87),
    ("twinbert", 4): (73.59, 51.24, 69.78, 34.48, 37.76, 43.47),
    ("twinbert", 2): (72.98, 50.84, 69.12, 33.67, 36.89, 42.60),
    ("twinbert", 1): (72.40, 50.45, 68.32, 33.40, 36.34, 42.09),
    ("tinybert", 4): (73.76, 51.12, 69.90, 34.52, 37.77, 43.48),
    ("tinybert", 2): (73.15, 50.94, 69.35, 33.80, 37.42, 43.06),
    ("tinybert", 1): (72.55, 50.50, 68.40, 33.46, 36.39, 42.15),
    ("newsbert", 4): (74.45, 51.78, 70.31, 34.89, 38.32, 43.95),
    ("newsbert", 2): (74.10, 51.26, 69.89, 34.50, 37.75, 43.50),
    ("newsbert", 1): (73.49, 50.65, 68.97, 33.54, 36.77, 42.51),
}
"""Table 2, per cent: accuracy, macro-F1; AUC, MRR, nDCG@5, nDCG@10. Its rows of UniLM and those marked *;
GloVe's has no number of layers."""
_PLACE: Mapping[TaskName, slice] = {"topics": slice(0, 2), "recommendation": slice(2, 6)}
_ROWS = frozenset({"method", "student.layers"})
_OF_OTHER_LAYERS = frozenset({"bilstm_soft", "glove"})
_EXTRA = (
    Column("parameters", "million parameters", "parameters.student", 1e-6),
    Column("times_teacher", "times its teacher's titles/s", "speed.times_teacher"),
)


def table2(records: Sequence[RunRecord], failed: Sequence[Mapping[str, Any]] = ()) -> Table | None:
    """Our rows of the paper's systems, each with the paper's own numbers; None where other settings vary too,
    or only one method was run.

    Args:
        records: of one task.
        failed: `method` and `student.layers` of each run that failed, as far as they varied.
    """
    task, place = one_task(records), _PLACE.get(task_name(records[0]))
    varying = set(varying_settings(records)) | {name for row in failed for name in row}
    tuned = tuned_settings(records)
    if "method" not in varying or not varying <= _ROWS | set(tuned) or place is None:
        return None
    metrics = [column for column in columns_of(task) if column.path.startswith("test.student.")]
    rows = rows_as_found(records, (*metrics, *_EXTRA))
    everyones = flat_settings(records[0])["student.layers"]
    depths = {id(row): int(row.settings.get("student.layers", everyones)) for row in rows}
    everyone = str(flat_settings(records[0])["method"])
    found = {(str(row.settings.get("method", everyone)), depths[id(row)]): row for row in rows}
    lost = Counter(
        (str(row.get("method", everyone)), int(row.get("student.layers", everyones))) for row in failed
    )
    order = {name: number for number, name in enumerate(NAMES)}
    keys = sorted(found.keys() | lost.keys(), key=lambda key: (order[key[0]], -key[1]))
    head = (
        *("system", "layers", "seeds", _EXTRA[0].heading, f"speed-up by layers, of {PAPERS_LAYERS}"),
        _EXTRA[1].heading,
        *(column.heading for column in metrics),
        *(f"the paper's {bare(column)} %" for column in metrics),
    )
    body = []
    for method, depth in keys:
        row = found.get((method, depth))
        theirs = _TABLE2.get((method, depth), ())[place]
        ours = [show(row.columns.get(column.name), column) if row else "failed" for column in metrics]
        extra = [show(row.columns.get(column.name), column) if row else "" for column in _EXTRA]
        by_layers = "" if method in _OF_OTHER_LAYERS else f"{PAPERS_LAYERS / depth:.1f}"
        paper = [f"{value:.2f}" for value in theirs] or [""] * len(metrics)
        away = lost[method, depth]
        seeds = str(len(row.seeds) if row else 0) + (f" ({away} failed)" if away else "")
        counted = (str(depth), seeds, extra[0].removesuffix(" ± 0.0"), by_layers, extra[1])
        body.append((NAMES[method], *counted, *ours, *paper))
    return Table(head, tuple(body), words=1, caption=_caption(records, tuned))


def _caption(records: Sequence[RunRecord], tuned: Sequence[str]) -> str:
    data = " or ".join(dict.fromkeys(map(data_name, records)))
    teachers = " or ".join(dict.fromkeys(map(teacher_name, records)))
    rows = sorted({int(record.data.get("train_rows") or 0) for record in records} - {0})
    counted = " or ".join(f"{n:,}" for n in rows)
    trained = f", trained on {counted} {one_task(records).examples}" if rows else ""
    return (
        f"Table 2. Ours: {data}{trained}, encoder {teachers}{_rates(records, tuned)}; mean ± sd over seeds. "
        "The paper's: the authors' own cut of MIND, UniLMv2 (first 8 layers as teacher), 5 seeds: other data "
        "and another encoder, so that only the order of the rows compares."
    )


def _rates(records: Sequence[RunRecord], tuned: Sequence[str]) -> str:
    """What each method has of its own, in words."""
    said = []
    for name in tuned:
        values: dict[str, dict[str, None]] = {}
        for record in records:
            flat = flat_settings(record)
            values.setdefault(f"{flat.get(name)}", {})[NAMES[str(flat["method"])]] = None
        said.append(
            f"{name} " + ", ".join(f"{value} ({'; '.join(who)})" for value, who in sorted(values.items()))
        )
    return "".join(f", {words}" for words in said)
