"""The tables of the study of recommendation, from search_spaces/results/clicks.jsonl.

`python -m tests.recommendation_tables DIR` writes that file from what `tests.benchmarks.study_recommendation`
measured into DIR: its records, and a line for each system with its differences to the others, paired over
impressions. `readme_numbers` puts the tables into the pages.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from newsbert_ray.files import write_text
from newsbert_ray.reporting.page import Table
from newsbert_ray.reporting.records import NAMES
from tests.study_tables import RESULTS, Record

RECORDS = RESULTS / "clicks.jsonl"
METRICS = ("auc", "mrr", "ndcg5", "ndcg10")
WORDS = {
    "teacher": "6-layer teacher",
    "newsbert's teacher": "6-layer teacher of NewsBERT",
    "tfidf": "TF-IDF profile of the user",
    "tfidf, 50 clicks": "TF-IDF profile, histories of 50",
    "encoder": "encoder as it comes, 6 layers",
    "encoder, 1 layer": "encoder as it comes, first layer",
    "encoder, 50 clicks": "encoder as it comes, 6 layers, histories of 50",
}
AGAINST = ("tfidf", "encoder", "finetune", "newsbert", "teacher")
"""Systems whose differences to all others are shown."""

ORDER = ("popularity", "tfidf", "encoder", "finetune", "newsbert", "best", "newsbert's teacher", "teacher")
"""Systems in the order of the tables; those that differ from one follow it."""

Array = npt.NDArray[np.float64]


def means(arrays: Mapping[str, Array]) -> dict[str, float]:
    """Mean and standard error of each metric over impressions, and the AUC's count."""
    own = {name: values[~np.isnan(values)] for name, values in arrays.items()}
    scores = {name: float(values.mean()) for name, values in own.items()}
    errors = {f"{n}_error": float(v.std(ddof=1) / np.sqrt(len(v))) for n, v in own.items()}
    return rounded({**scores, **errors, "rows": float(len(own["auc"]))})


def rounded(scores: Mapping[str, float]) -> dict[str, float]:
    """Metrics as a record keeps them."""
    return {name: round(value, 5) for name, value in scores.items() if name != "left_out"}


def compare(ours: Array, theirs: Array) -> dict[str, float]:
    """Points of AUC between two systems over the same impressions, their standard error and p (t-test)."""
    from scipy.stats import ttest_1samp  # type: ignore[import-untyped]

    points = 100 * (ours - theirs)
    points = points[~np.isnan(points)]
    p = float(ttest_1samp(points, 0.0).pvalue) if points.any() else 1.0
    error = float(points.std(ddof=1) / np.sqrt(len(points)))
    return {"points": round(float(points.mean()), 3), "error": round(error, 3), "p": float(f"{p:.2g}")}


def keep(out: Path, target: Path = RECORDS) -> None:
    """Write all records of a study, and a line for each system with its differences to all others."""
    records = [json.loads(line) for line in (out / "records.jsonl").read_text("utf-8").splitlines()]
    seeds: dict[str, dict[int | None, Array]] = defaultdict(dict)
    for record in records:
        array = np.load(impressions_file(out, record))[METRICS.index("auc")]
        seeds[record["system"]][record["seed"]] = array
    lines: list[Any] = [*records]
    for system, own in seeds.items():
        above = {name: difference(own, other) for name, other in seeds.items() if name != system}
        mean = means({"auc": np.mean(list(own.values()), axis=0)})
        lines.append({"kind": "system", "system": system, **mean, "above": above})
    write_text(target, "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))


def difference(
    ours: Mapping[int | None, Array], theirs: Mapping[int | None, Array]
) -> dict[str, float] | None:
    """As `compare`, of the means over the seeds that both have; a baseline has the seed None only."""
    common = ours.keys() & theirs.keys()
    pairs = [(ours[seed], theirs[seed]) for seed in common]
    if None in ours or None in theirs:
        pairs = [(one, other) for one in ours.values() for other in theirs.values()]
    if not pairs:
        return None
    left, right = (np.mean([pair[side] for pair in pairs], axis=0) for side in (0, 1))
    return {**compare(left, right), "seeds": len(pairs)}


def impressions_file(out: Path, record: Record) -> Path:
    """Where the study keeps a model's metrics of each test impression, (4, I)."""
    return out / "impressions" / f"{record['system']}_{record['seed']}.npy"


def scores_table(records: Sequence[Record]) -> Table:
    """A row for each system: what it read, and its metrics."""
    runs: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if "kind" not in record:
            runs[record["system"]].append(record)
    rows = []
    for line in _systems(records):
        own = runs[line["system"]]
        layers, rate = own[0]["layers"], own[0]["rate"]
        beside = own[0].get("batch_size", 0) - own[0].get("clicks", 0)
        validation = [_mean(own, "validation", name) for name in ("auc", "auc_error")]
        others = [f"{100 * _mean(own, 'test', name):.1f}" for name in ("mrr", "ndcg10")]
        numbers = (f"{layers or ''}", f"{rate:g}" if rate else "", f"{beside or ''}")
        scores = (_percent(*validation), _percent(line["auc"], line["auc_error"]), *others)
        rows.append((name_of(line["system"]), *numbers, *scores, f"{len(own)}" if rate else ""))
    columns = ("layers", "learning rate", "news beside the clicks")
    head = ("system", *columns, "validation AUC %", "test AUC %", "MRR %", "nDCG@10 %", "seeds")
    trained = next(record for record in records if record.get("steps"))
    impressions = f"{trained['test']['rows']:,.0f} test impressions"
    read = f"{trained['steps']:,} updates of {trained['clicks']} clicks, histories of {trained['history']}"
    caption = f"All trained models: {read}. AUC ± its standard error over the {impressions}."
    return Table(head, tuple(rows), words=1, caption=caption)


def differences_table(records: Sequence[Record]) -> Table:
    """Points of AUC between systems over the same impressions."""
    lines = _systems(records)
    others = [name for name in AGAINST if any(line["system"] == name for line in lines)]
    rows = [
        (name_of(line["system"]), *(_difference(line["above"].get(name)) for name in others))
        for line in lines
    ]
    head = ("system", *(f"above {name_of(name)}" for name in others))
    caption = (
        "Difference in points of test AUC, ± its standard error over the same impressions, and p of a paired "
        "t-test over them, not corrected for the number of tests."
    )
    return Table(head, tuple(rows), words=1, caption=caption)


TABLES = {"scores": scores_table, "differences": differences_table}


def recommendation(name: str, path: Path = RECORDS) -> str:
    """A table by its name in TABLES, as Markdown."""
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return TABLES[name](records).markdown()


def name_of(system: str) -> str:
    """A system as tables show it."""
    method, comma, changes = system.partition(", ")
    changes = changes.replace("unlabelled_share 0.0", "no news").replace("learning_rate", "rate")
    return WORDS.get(system) or NAMES.get(method, method) + comma + changes


def _systems(records: Sequence[Record]) -> list[Record]:
    """The lines of systems, sorted."""
    lines = [record for record in records if "kind" in record]
    return sorted(lines, key=lambda line: ORDER.index(line["system"].partition(", ")[0]))


def _mean(runs: Sequence[Record], split: str, metric: str) -> float:
    return statistics.fmean(run[split][metric] for run in runs)


def _percent(value: float, error: float) -> str:
    return f"{100 * value:.1f} ± {100 * error:.1f}"


def _difference(test: Mapping[str, float] | None) -> str:
    return f"{test['points']:+.1f} ± {test['error']:.1f} (p {test['p']:.1g})" if test else ""


if __name__ == "__main__":
    keep(Path(sys.argv[1]))
