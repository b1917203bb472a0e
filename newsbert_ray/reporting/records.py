"""Which runs compare: their task, and the settings in which they differ. Pure; knows no number of theirs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from pydantic import ValidationError

from newsbert_ray.config import TrainSettings, build_settings, merge
from newsbert_ray.files import write_text
from newsbert_ray.methods import METHODS, OF_BOTH, TASKS, Task, TaskName
from newsbert_ray.record import RecordError, RunRecord, first_fault

_NOT_COMPARED = frozenset({"seed", "out", "threads", "log_every", "min_workers", "checkpoint", "device"})
"""The seed is averaged over; the others alter no number: those that a run may go on with changed."""
_TUNED = ("learning_rate", *(f"optimizer.{who}_learning_rate" for who in ("teacher", "student", "top")))


def task_name(record: RunRecord) -> TaskName:
    """What a run learned; a record of before there were several tasks learned topics."""
    name: TaskName = record.settings.get("task", "topics")
    return name


def by_task(records: Sequence[RunRecord]) -> dict[TaskName, list[RunRecord]]:
    """The records of each task that has some."""
    groups = {name: [record for record in records if task_name(record) == name] for name in TASKS}
    return {name: group for name, group in groups.items() if group}


def one_task(records: Sequence[RunRecord]) -> Task:
    """The task that all the records have learned.

    Raises:
        ValueError: they have learned several, whose numbers do not compare.
    """
    names = list(by_task(records)) or ["topics"]
    if len(names) > 1:
        raise ValueError(
            f"runs of several tasks ({', '.join(names)}) in one table; group them with `by_task`"
        )
    return TASKS[names[0]]


def flat_settings(record: RunRecord) -> dict[str, Any]:
    """The settings that may make two runs different, by dotted name.

    Shards count by what is in them and a teacher by its name, not by where they lie. A setting that an older
    record does not know was as it is by default.
    """
    flat = flat_values({n: value for n, value in record.settings.items() if n not in _NOT_COMPARED})
    flat |= {name: value for name, value in _defaults().items() if name not in flat}
    if "teacher" in flat:
        flat["teacher"] = teacher_name(record)
    if record.data.get("fingerprint"):
        flat["data"] = data_name(record)
    return flat


def units_of(task: Task) -> dict[str, str]:
    """What stands before `train`, `validation` and `test` in a count, and after `all` of them: one word for
    all where training and evaluation count the same."""
    if task.examples == task.rows:
        return {"train": "", "validation": "", "test": "", "all": f" {task.rows}"}
    rows = f"{task.rows} of "
    return {"train": f"{task.examples} of ", "validation": rows, "test": rows, "all": ""}


@cache
def _defaults() -> dict[str, Any]:
    given = ("data", "teacher", "out")
    settings = build_settings(TrainSettings, dict.fromkeys(given, "-")).model_dump()
    return flat_values({n: value for n, value in settings.items() if n not in {*_NOT_COMPARED, *given}})


def flat_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted name."""
    return dict(_flatten(settings))


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def data_name(record: RunRecord) -> str:
    """Name and the fingerprint's first digits of the shards behind a run, as far as the record knows them."""
    name = str(record.data.get("name") or PurePath(str(record.settings.get("data", "unknown"))).name)
    fingerprint = str(record.data.get("fingerprint", ""))[:8]
    return f"{name} ({fingerprint})" if fingerprint else name


def teacher_name(record: RunRecord) -> str:
    """The last part of the teacher's name: the same for a folder however it was reached, and for a model of
    the hub without its owner."""
    name = str(record.settings.get("teacher", "unknown"))
    return PurePath(name).name or name


def varying_settings(records: Sequence[RunRecord]) -> list[str]:
    """Dotted names of the settings in which the records differ, in the order of the settings; without those
    that are as they are because of a run's method."""
    flats = [flat_settings(record) for record in records]
    names = dict.fromkeys(name for flat in flats for name in flat)
    varying = [name for name in names if len({repr(flat.get(name)) for flat in flats}) > 1]
    return [name for name in varying if not _told_by_method(name, flats)]


def _told_by_method(name: str, flats: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a method sets `name`, and all runs of each method here have one value of it."""
    changed = (*METHODS.values(), *OF_BOTH.values())
    told = any(name in flat_values(changes) for changes in changed)
    if name == "data":  # shards of other tokens, where a method has another encoder
        told = len({repr(flat.get("teacher")) for flat in flats}) > 1 and (
            len({str(flat.get("data")).rpartition(" (")[0] for flat in flats}) == 1
        )
    if not told or name == "student.layers":  # a BiLSTM's one layer is no reason to hide the others' depths
        return False
    found: dict[str, set[str]] = {}
    for flat in flats:
        found.setdefault(str(flat.get("method")), set()).add(repr(flat.get(name)))
    return len(found) > 1 and all(len(values) == 1 for values in found.values())


def tuned_settings(records: Sequence[RunRecord]) -> list[str]:
    """Of the settings that are tuned and not compared, those that each method has its own value of, at each
    student depth: what a fair comparison of methods lets differ."""
    flats = [flat_settings(record) for record in records]
    if len({flat.get("method") for flat in flats}) < 2:
        return []
    tuned = []
    for name in _TUNED:
        found: dict[tuple[str, str], set[str]] = {}
        for flat in flats:
            row = (str(flat.get("method")), str(flat.get("student.layers")))
            found.setdefault(row, set()).add(repr(flat.get(name)))
        if len(set.union(*found.values())) > 1 and all(len(values) == 1 for values in found.values()):
            tuned.append(name)
    return tuned


def distinct(records: Sequence[RunRecord]) -> list[RunRecord]:
    """The records without repeats of a run (same settings and seed), which would make a spread of nothing."""
    kept: dict[str, RunRecord] = {}
    for record in records:
        kept.setdefault(repr((sorted(flat_settings(record).items()), record.seed)), record)
    return list(kept.values())


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
    "mutual": "mutual learning",
    "disjoint": "NewsBERT, disjoint",
    "no_momentum": "NewsBERT without momentum",
    "no_soft_labels": "NewsBERT without soft labels",
    "no_hidden": "NewsBERT without hidden losses",
    "no_embedding": "NewsBERT without the embeddings' loss",
    "no_layers": "NewsBERT without the layers' loss",
    "no_news_embedding": "NewsBERT without the news embeddings' loss",
}
"""Systems as a person calls them."""


def provenance(records: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Data, teacher, what varies, versions and hardware of the records, by name."""
    varying = varying_settings(records)
    return [
        _kinds("data", [_describe_data(record) for record in records]),
        _kinds("teacher", [teacher_name(record) for record in records]),
        ("settings that vary", ", ".join(varying) or "none"),
        _kinds("versions", [joined(record.versions) for record in records]),
        _kinds("hardware", [joined(record.hardware) for record in records]),
    ]


def joined(values: Mapping[str, object]) -> str:
    """`python 3.11.7, torch 2.13.0`."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _describe_data(record: RunRecord) -> str:
    parts = ("train", "validation", "test")
    units = units_of(one_task([record]))
    sizes = [f"{n:,} {units[part]}{part}" for part in parts if (n := record.data.get(f"{part}_rows"))]
    return ", ".join([data_name(record), *sizes])


def _kinds(name: str, values: Sequence[str]) -> tuple[str, str]:
    kinds = list(dict.fromkeys(values))
    return (name, kinds[0]) if len(kinds) == 1 else (f"{name} (they differ)", "; ".join(kinds))


ENDING = ".jsonl"
_PLACES = ("data", "teacher", "out", "student.encoder", "before.data", "distill.teacher_run")


def is_kept(path: str | Path) -> bool:
    """Whether a place is such a file."""
    return str(path).endswith(ENDING)


def write_kept(path: Path, records: Sequence[RunRecord]) -> None:
    """Write the records, a line each, places cut to their last names.

    Raises:
        RecordError: the file's name is not that of such a file.
    """
    if not is_kept(path):
        raise RecordError(f"--keep {path}: give a file that ends in {ENDING}")
    lines = [record.model_copy(update={"settings": _unplaced(record.settings)}) for record in records]
    write_text(path, "".join(f"{record.model_dump_json()}\n" for record in lines))


def read_kept(path: Path) -> list[RunRecord]:
    """What `write_kept` wrote.

    Raises:
        RecordError: missing or damaged; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: cannot be read ({error})") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(RunRecord.model_validate_json(line))
        except ValidationError as error:
            raise RecordError(f"{path}, line {number}: no run record ({first_fault(error)})") from error
    return found


def _unplaced(settings: dict[str, Any]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for place in _PLACES:
        value: Any = settings
        for part in place.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, str):
            names[place] = PurePosixPath(value).name or value
    return merge(settings, names)
