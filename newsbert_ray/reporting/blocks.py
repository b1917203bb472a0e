"""Records -> how the teacher's gradients stood to the student's over training, block by block: how far
momentum (NewsBERT Eqs. 7, 8) can turn an update at all. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from newsbert_ray.record import RunRecord
from newsbert_ray.reporting.compared import data_name, distinct, flat_settings, teacher_name
from newsbert_ray.reporting.figures import line_of
from newsbert_ray.reporting.panels import FigureData, Line, NothingToDraw, Panel

BLOCKS_FIGURE = "block_gradients"
_KINDS: Mapping[str, str] = {
    "ratio": "norms, block mean / student",
    "cosine": "cosine, block mean and student",
}
_NUMBER = re.compile(r"block_(\d+)_(ratio|cosine)")


def blocks_figure(records: Sequence[RunRecord]) -> FigureData[Panel]:
    """For each student depth and block the ratio of the gradients' norms and their cosine, before mixing,
    over epochs; mean and standard deviation over all runs of that depth.

    Raises:
        NothingToDraw: no run has a teacher that learns beside its student.
    """
    records = [record for record in distinct(records) if any(entry.get("blocks") for entry in record.curve)]
    if not records:
        raise NothingToDraw("gradients of blocks are left out: no teacher learned beside its student")
    depths = sorted({int(flat_settings(record)["student.layers"]) for record in records})
    panels = [
        Panel(f"N = {depth}", "epoch", label, tuple(lines))
        for depth in depths
        for kind, label in _KINDS.items()
        if (lines := list(_lines(records, depth, kind)))
    ]
    names = ", ".join(dict.fromkeys(map(data_name, records)))
    teachers = ", ".join(dict.fromkeys(map(teacher_name, records)))
    return FigureData(
        BLOCKS_FIGURE,
        tuple(panels),
        f"Data: {names}. Teacher: {teachers}. {len(records)} runs, mean ± sd over them; gradients of logged "
        "updates before mixing. Momentum adds beta x ratio of its own length to a student layer's gradient; "
        "where the cosine is small, it turns the update.",
        across=2,
        whole_x=True,
        alt="; ".join(
            f"{panel.title}, {panel.y_label}: "
            + ", ".join(f"{line.label} ends at {line.y[-1]:.2f}" for line in panel.lines)
            for panel in panels
        ),
    )


def _lines(records: Sequence[RunRecord], depth: int, kind: str) -> Iterator[Line]:
    found: dict[int, dict[float, list[float]]] = {}
    for record in records:
        if int(flat_settings(record)["student.layers"]) != depth:
            continue
        for entry in record.curve:
            for name, value in (entry.get("blocks") or {}).items():
                match = _NUMBER.fullmatch(name)
                if match and match[2] == kind:
                    at = found.setdefault(int(match[1]), {})
                    at.setdefault(float(entry["epoch"]), []).append(float(value))
    for block, by_epoch in sorted(found.items()):
        yield line_of(by_epoch, f"block {block}")
