"""Texts with labels as people have them -> one line of JSON for each: tables, folders of text files by label,
and Hugging Face datasets. In constant memory; what follows reads the lines as it reads MIND's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from newsbert_ray.config import ColumnSettings
from newsbert_ray.data.sources import BadLine, PrepareError, Say, SourceFile, read_through
from newsbert_ray.data.tables import SUFFIXES, Record, check_text, open_table, read_table, table_suffix
from newsbert_ray.files import first_line

TEXTS = (
    "title", "text", "headline", "sentence", "content", "body", "review", "document", "article",
    "description", "message", "question", "tweet", "comment", "abstract", "sentence1",
)  # fmt: skip
LABELS = (
    "label", "category", "topic", "class", "target", "label_text", "category_name", "class_name",
    "class_index", "section", "sentiment", "intent", "genre", "tag", "y",
)  # fmt: skip
IDS = ("news_id", "id", "nid", "guid", "uid", "doc_id")
"""Names of columns, the likeliest first; case, blanks and hyphens do not matter."""
NO_LABEL = "none"
"""As `columns.label`: the texts have no labels."""

_UNLABELLED = ("unsup", "unlabelled", "unlabeled", "unsupervised")
_DATASET_FILES = ("dataset_info.json", "dataset_dict.json", "state.json")
_EXCERPT = 200  # characters of a bad row that are kept
_LOADED = (".parquet", ".csv", ".tsv", ".jsonl", ".json", ".arrow", ".gz")


class Part(NamedTuple):
    """A part of a corpus, such as its train split: the folder and name that messages give it, its rows, and
    the table that it is, if it is one."""

    folder: str
    name: str
    rows: Iterator[Record]
    file: SourceFile | None = None


class Columns(NamedTuple):
    """The columns of a source that hold the text, the label and the id."""

    texts: list[str]
    label: str | None
    name: str | None

    def describe(self) -> str:
        return f"text from {', '.join(self.texts)}; label from {self.label or 'no column'}"

    def pick(self, prefix: str, record: Record) -> Record:
        """A row of the values of these columns as [id, label, text]; the label is "" where there is none."""
        return record.map(partial(self._make_row, prefix, record.number))

    def _make_row(self, prefix: str, number: int, *values: Any) -> list[str]:
        *rest, label, name = values
        texts = [check_text(column, one) for column, one in zip(self.texts, rest, strict=True) if one]
        text = " ".join(chain.from_iterable(text.split() for text in texts))
        if not text:
            raise BadLine(f"{self.texts[0]}: empty")
        name = f"{prefix}{_plain('id', name) or number}"
        return ["_".join(name.split()), _plain("label", label) or "", text]


def open_parts(source: str, settings: ColumnSettings, *, say: Say) -> list[Part]:
    """The parts of a source that is a table, a folder of text files, or a dataset; PrepareError where it is
    none of them, or its columns are not found."""
    path = Path(source).expanduser()
    if table_suffix(path):
        return [_table(source, settings, say)]
    if path.is_file():
        raise PrepareError(
            f"source {source}: neither a folder, a zip nor a table ({', '.join(SUFFIXES)}, also with .gz)"
        )
    if not path.is_dir() and (source.startswith(("/", ".", "~")) or source.count("/") > 1):
        raise PrepareError(f"source {source}: no such file or folder")
    if path.is_dir() and not any((path / name).is_file() for name in _DATASET_FILES):
        title, folders = path.resolve().name, sorted(one for one in path.iterdir() if one.is_dir())
        if any(next(folder.glob("*.txt"), None) for folder in folders):
            return [Part(title, "texts", _text_files(path, ""))]
        if parts := [one for one in folders if next(one.glob("*/*.txt"), None)]:
            return [Part(title, one.name, _text_files(one, f"{one.name}-")) for one in parts]
        if not any(one.suffix.lower() in _LOADED for one in path.glob("**/*")):
            raise PrepareError(
                f"source {source}: no news.tsv of MIND in it, no LABEL/*.txt, and no file of a data set "
                f"({', '.join(_LOADED)})"
            )
    return _dataset(source, path, settings, say)


def write_parts(parts: Sequence[Part], folder: Path) -> Iterator[SourceFile]:
    """Each part as a file of lines below `folder`, read through; `mind.parse_text` reads a line."""
    for number, part in enumerate(parts):
        path = folder / str(number) / part.name
        path.parent.mkdir(parents=True)
        with path.open("w", encoding="utf-8") as file:
            for record in part.rows:
                row = record.values
                row = [record.number, str(row), record.shown[:_EXCERPT]] if isinstance(row, BadLine) else row
                file.write(json.dumps(row) + "\n")
        lines = read_through(path, folder=part.folder)
        own = part.file or lines
        yield replace(lines, bytes=own.bytes, sha256=own.sha256)


def usual_name(names: Sequence[str], usual: Iterable[str]) -> str | None:
    """The first of `names` that is a usual one."""
    plain = {name.strip().lower().replace(" ", "_").replace("-", "_"): name for name in reversed(names)}
    return next((plain[name] for name in usual if name in plain), None)


def find_columns(label: str, names: Sequence[str], settings: ColumnSettings) -> Columns:
    """The columns of a source with these `names`: those of the settings, or the first of a usual name.
    PrepareError where one is missing; `label` names the source in it."""
    shown = ", ".join(repr(name[:40]) for name in names[:12]) + (", ..." if len(names) > 12 else "") or "none"

    def find(flag: str, named: str | None, usual: Iterable[str], cure: str) -> str | None:
        if named in names:
            return named
        column = usual_name(names, usual) if named is None else None
        if column is None and (named is not None or cure):
            fault = f"no {flag} column" if named is None else f"no column {named!r}"
            raise PrepareError(f"{label}: {fault}; found {shown}; name it by --columns.{flag}{cure}")
        return column

    wrong = (
        " (a number where the first line is no header); if these are no columns, see --columns.delimiter and "
        "--columns.encoding"
    )
    wanted: list[str | None] = [*map(str.strip, settings.text.split(","))] if settings.text else [None]
    texts = [name for one in wanted if (name := find("text", one, TEXTS, wrong)) is not None]
    target = None
    if settings.label != NO_LABEL:
        target = find("label", settings.label, LABELS, f", or --columns.label {NO_LABEL} if there is none")
    return Columns(texts, target, find("id", settings.id, IDS, ""))


def _plain(name: str, value: Any) -> str | None:
    """A label or id as text; None where it is empty."""
    value = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
    if value is None or value != value:  # NaN
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, list | dict | tuple):
        raise BadLine(f"{name}: {type(value).__name__} found, a word or number expected")
    text = " ".join(str(value).split())
    if len(text) > 200:
        raise BadLine(f"{name}: {len(text)} characters, at most 200 expected")
    return check_text(name, text) if text else None


def _table(source: str, settings: ColumnSettings, say: Say) -> Part:
    table = open_table(source, columns=(), settings=settings)
    columns = find_columns(table.label, table.names, settings)
    say(f"{table.label}: {columns.describe()}")
    names = [*columns.texts, columns.label, columns.name]
    prefix = "" if columns.name else f"{table.path.name.partition('.')[0]}-"
    rows = (columns.pick(prefix, record) for record in read_table(table, names, required=False))
    return Part(table.source.folder, table.source.name, rows, table.source)


def _text_files(folder: Path, prefix: str) -> Iterator[Record]:
    """FOLDER/label/*.txt in the order of names; the id is label/name."""
    columns = Columns(["text"], "label", "id")
    labels = sorted(path for path in folder.iterdir() if path.is_dir())
    paths = (path for label in labels for path in sorted(label.glob("*.txt")))
    for number, path in enumerate(paths, 1):
        label = path.parent.name
        topic = None if label.lower() in _UNLABELLED else label
        values = [path.read_bytes(), topic, f"{label}/{path.stem}"]
        yield columns.pick(prefix, Record(number, path.name, values))


def _dataset(source: str, path: Path, settings: ColumnSettings, say: Say) -> list[Part]:
    import datasets

    name, _, config = source.partition(":")
    datasets.disable_progress_bars()
    try:
        if path.is_dir() and any((path / file).is_file() for file in _DATASET_FILES[1:]):
            loaded = datasets.load_from_disk(str(path))
        else:
            location = str(path) if path.is_dir() else name
            loaded = datasets.load_dataset(location, name=config or None, streaming=True)
    except Exception as error:  # the Hub, the disk or a builder: the message is the same
        raise PrepareError(
            f"source {source}: no such file or folder, and no data set of this name could be loaded "
            f"({first_line(error)}); give a table, a folder, or a name of the Hugging Face Hub, which "
            "needs the network"
        ) from error
    splits = loaded if isinstance(loaded, dict) else {"all": loaded}
    title = path.resolve().name if path.is_dir() else name.rpartition("/")[2]
    parts: dict[str, list[Iterator[Record]]] = {}
    for split, data in splits.items():
        names = data.column_names or list(next(iter(data), {}))
        columns = find_columns(f"{title}/{split}", names, settings)
        say(f"{title}/{split}: {columns.describe()}")
        main = next(iter(splits)) if split in _UNLABELLED else split
        parts.setdefault(main, []).append(_dataset_rows(data, columns, f"{split}-"))
    return [Part(title, split, chain.from_iterable(rows)) for split, rows in parts.items()]


def _dataset_rows(data: Any, columns: Columns, prefix: str) -> Iterator[Record]:
    feature = (data.features or {}).get(columns.label)
    classes = getattr(feature, "names", None)
    number = 0
    for batch in data.iter(batch_size=256):
        empty = [None] * len(batch[columns.texts[0]])
        lists = [batch[name] if name else empty for name in [*columns.texts, columns.label, columns.name]]
        for *rest, label, name in zip(*lists, strict=True):
            number += 1
            if classes and isinstance(label, int):
                label = classes[label] if 0 <= label < len(classes) else None
            yield columns.pick(prefix, Record(number, str(rest[0])[:200], [*rest, label, name]))
