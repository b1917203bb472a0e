"""Which runs can be compared: their task, the settings in which they differ, and names for people. Reads and
writes kept records (.jsonl files in a repository). Knows none of the metrics."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, TypeVar

from pydantic import ValidationError

from newsbert_ray.config import TrainSettings, build_settings, merge
from newsbert_ray.files import write_text
from newsbert_ray.methods import METHOD_TASK_VALUES, METHODS, TASKS, Task, TaskName
from newsbert_ray.record import RecordError, RunRecord, first_fault
from newsbert_ray.settings import flatten

NAMES: Mapping[str, str] = {
    "finetune": "fine-tuned",
    "newsbert": "NewsBERT",
    "twinbert": "TwinBERT",
    "tinybert": "TinyBERT",
    "pkd": "BERT-PKD",
    "distilbert": "DistilBERT",
    "minilm": "MiniLM",
    "bilstm_soft": "BiLSTM-soft",
    "glove": "GloVe",
    "linear": "linear SVM",
    "mutual": "mutual learning",
    "best": "recipe",
    "newsbert_warm": "NewsBERT, warm teacher",
    "disjoint": "NewsBERT, disjoint",
    "no_momentum": "NewsBERT without momentum",
    "no_soft_labels": "NewsBERT without soft labels",
    "no_hidden": "NewsBERT without hidden losses",
    "no_embedding": "NewsBERT without embedding loss",
    "no_layers": "NewsBERT without layer loss",
    "no_news_embedding": "NewsBERT without news embedding loss",
}
"""Methods by the name that tables and figures show, in the order of the tables."""
IGNORED = frozenset({"seed", "out", "threads", "log_every", "min_workers", "checkpoint", "device", "track"})
"""Rows average over the seed; the other settings do not affect results."""
_REQUIRED = ("data", "teacher", "out")
_TUNED = ("learning_rate", *(f"optimizer.{whose}_learning_rate" for whose in ("teacher", "student", "top")))
_PATHS = ("data", "teacher", "out", "student.encoder", "before.data", "distill.teacher_run", "unlabelled")
K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """The items by `key`, in the order in which the keys first appear."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def task_name(record: RunRecord) -> TaskName:
    """The task of a run; a record without one is from the version that knew topics only."""
    name: TaskName = record.settings.get("task", "topics")
    return name


def by_task(records: Sequence[RunRecord]) -> dict[TaskName, list[RunRecord]]:
    """The records of each task, in the order of TASKS."""
    groups = grouped(records, task_name)
    return {name: groups[name] for name in TASKS if name in groups}


def one_task(records: Sequence[RunRecord]) -> Task:
    """The task that all the records share; ValueError for several, whose metrics cannot be compared."""
    names = list(by_task(records)) or ["topics"]
    if len(names) > 1:
        raise ValueError(f"one table cannot hold several tasks ({', '.join(names)}); split them by `by_task`")
    return TASKS[names[0]]


def count_units(task: Task) -> dict[str, str]:
    """Words for row counts: before `train`, `validation` and `test`, and (`all`) once after a list of counts,
    where training and evaluation count the same thing."""
    if task.examples == task.rows:
        return {"train": "", "validation": "", "test": "", "all": f" {task.rows}"}
    rows = f"{task.rows} of "
    return {"train": f"{task.examples} of ", "validation": rows, "test": rows, "all": ""}


def flat_settings(record: RunRecord) -> dict[str, Any]:
    """The settings that can make two runs different, by dotted name. Shards are identified by their content
    and a teacher by its name. A setting missing from an older record has its default."""
    flat = flatten({n: value for n, value in record.settings.items() if n not in IGNORED})
    flat |= {name: value for name, value in _defaults().items() if name not in flat}
    if "teacher" in flat:
        flat["teacher"] = teacher_name(record)
    if record.data.get("fingerprint"):
        flat["data"] = data_name(record)
    return flat


@cache
def _defaults() -> dict[str, Any]:
    settings = build_settings(TrainSettings, dict.fromkeys(_REQUIRED, "-")).model_dump()
    return flatten({n: value for n, value in settings.items() if n not in {*IGNORED, *_REQUIRED}})


def data_name(record: RunRecord) -> str:
    """Name of the shards behind a run and the first digits of their fingerprint, as far as it is recorded."""
    name = str(record.data.get("name") or PurePath(str(record.settings.get("data", "unknown"))).name)
    fingerprint = str(record.data.get("fingerprint", ""))[:8]
    return f"{name} ({fingerprint})" if fingerprint else name


def teacher_name(record: RunRecord) -> str:
    """The last part of the teacher's path or Hub name, which does not depend on where the folder is."""
    name = str(record.settings.get("teacher", "unknown"))
    return PurePath(name).name or name


def origin(records: Sequence[RunRecord], sizes: str = "") -> str:
    """`Data: NAME (fingerprint), sizes. Teacher: NAME`."""
    data, teachers = (", ".join(dict.fromkeys(map(name, records))) for name in (data_name, teacher_name))
    return f"Data: {data}{sizes}. Teacher: {teachers}"


def varying_settings(records: Sequence[RunRecord]) -> list[str]:
    """Dotted names of the settings in which the records differ, without those that the method implies."""
    flats = [flat_settings(record) for record in records]
    names = dict.fromkeys(name for flat in flats for name in flat)
    varying = [name for name in names if len({repr(flat.get(name)) for flat in flats}) > 1]
    return [name for name in varying if not _implied_by_method(name, flats)]


def tuned_settings(records: Sequence[RunRecord]) -> list[str]:
    """Learning rates that each method has its own value of, at each student depth. A fair comparison tunes
    them for each method, so that they do not count as a difference."""
    flats = [flat_settings(record) for record in records]
    if len({flat.get("method") for flat in flats}) < 2:
        return []
    return [name for name in _TUNED if _follows(name, ("method", "student.layers"), flats)]


def _implied_by_method(name: str, flats: Sequence[Mapping[str, Any]]) -> bool:
    """Whether methods set `name`, and all runs of each method here have the same value of it."""
    if name == "data":  # a method with another encoder needs shards of the same corpus with other tokens
        teachers = {repr(flat.get("teacher")) for flat in flats}
        corpora = {str(flat.get("data")).rpartition(" (")[0] for flat in flats}
        implied = len(teachers) > 1 and len(corpora) == 1
    else:  # a BiLSTM's single layer is no reason to hide the depths of the others
        changes = map(flatten, (*METHODS.values(), *METHOD_TASK_VALUES.values()))
        implied = name != "student.layers" and any(name in change for change in changes)
    return implied and _follows(name, ("method",), flats)


def _follows(name: str, others: Sequence[str], flats: Sequence[Mapping[str, Any]]) -> bool:
    """Whether `name` varies, but never between runs that agree in the `others`."""
    groups = grouped(flats, lambda flat: tuple(str(flat.get(other)) for other in others))
    values = [{repr(flat.get(name)) for flat in group} for group in groups.values()]
    return len(set().union(*values)) > 1 and all(len(group) == 1 for group in values)


def distinct(records: Sequence[RunRecord]) -> list[RunRecord]:
    """The records without repeats of a run (same settings and seed), which would falsify a spread."""
    groups = grouped(records, lambda record: repr((sorted(flat_settings(record).items()), record.seed)))
    return [group[0] for group in groups.values()]


def provenance(records: Sequence[RunRecord]) -> dict[str, str]:
    """Data, teacher, varying settings, versions and hardware of the records."""
    facts = {
        "data": [_describe_data(record) for record in records],
        "teacher": [teacher_name(record) for record in records],
        "settings that vary": [", ".join(varying_settings(records)) or "none"],
        "versions": [joined(record.versions) for record in records],
        "hardware": [joined(record.hardware) for record in records],
    }
    unique = {name: list(dict.fromkeys(values)) for name, values in facts.items()}
    return {name + " (they differ)" * (len(v) > 1): "; ".join(v) for name, v in unique.items()}


def joined(values: Mapping[str, object]) -> str:
    """`python 3.11.7, torch 2.13.0`."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _describe_data(record: RunRecord) -> str:
    units = count_units(one_task([record]))
    counts = {split: record.data.get(f"{split}_rows") for split in ("train", "validation", "test")}
    sizes = [f"{count:,} {units[split]}{split}" for split, count in counts.items() if count]
    return ", ".join([data_name(record), *sizes])


def is_kept(path: str | Path) -> bool:
    """Whether a path is that of a file of kept records."""
    return str(path).endswith(".jsonl")


def write_kept(path: Path, records: Sequence[RunRecord]) -> None:
    """Write the records, one line each, with every path cut to its last part. The name must end in .jsonl."""
    if not is_kept(path):
        raise RecordError(f"--keep {path}: the file name must end in .jsonl")
    text = ""
    for record in records:
        flat = flatten(record.settings)
        paths = {name: flat[name] for name in _PATHS if isinstance(flat.get(name), str)}
        names = {name: PurePosixPath(path).name or path for name, path in paths.items()}
        text += record.model_copy(update={"settings": merge(record.settings, names)}).model_dump_json() + "\n"
    write_text(path, text)


def read_kept(path: Path) -> list[RunRecord]:
    """The records that `write_kept` wrote. Raises RecordError for a missing or damaged file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: cannot be read ({error})") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(RunRecord.model_validate_json(line))
        except ValidationError as error:
            raise RecordError(f"{path}, line {number}: not a run record ({first_fault(error)})") from error
    return records
