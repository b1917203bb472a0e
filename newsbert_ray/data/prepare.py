"""Sources -> tokenised Parquet shards and their manifest, in constant memory.

The same steps for every kind of source: open the files, find an earlier result, assign
every row to a split, get a tokeniser, write shards, describe them in the manifest. All is written beside the
output folder, and moved there at the end.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from newsbert_ray.config import SCRATCH, PrepareSettings
from newsbert_ray.data import shards, sources
from newsbert_ray.data.mind_source import NewsSource
from newsbert_ray.data.pairs_source import PairsSource
from newsbert_ray.data.shards import MANIFEST, SPLITS, Contents, Manifest, ShardError, is_whole, read_manifest
from newsbert_ray.data.sources import PrepareError, Say, SourceFile, Workspace
from newsbert_ray.data.tables import column_names, table_suffix
from newsbert_ray.data.tokenizer import TitleTokenizer, check_encoder, learn_tokenizer, load_tokenizer
from newsbert_ray.data.word_vectors import VECTORS, fit_vectors, is_vectors, vectors_sha256
from newsbert_ray.files import checksum_of, files_in, replace_folder, write_json
from newsbert_ray.methods import METHODS, TASKS
from newsbert_ray.ray_session import inside_cluster
from newsbert_ray.storage.bucket import is_url
from newsbert_ray.storage.workdir import download_input, open_workdir

Corpus = NewsSource | PairsSource
"""The sources of one `prepare`, all of one kind."""

_FEW_CHUNKS = 16
"""So many chunks, of 2 MB, this process maps sooner than Ray starts."""
_LEARNED = ("scratch.vocabulary", "vectors")
"""Row settings of tokenisers that are made of the corpus's texts."""


def prepare(settings: PrepareSettings, *, say: Say = print) -> Manifest:
    """Prepare the shards of `settings.out`, or find them there already, as `newsbert_ray.prepare`."""
    inputs = [download_input(source) for source in settings.source]
    local = settings.model_copy(update={"source": inputs, "teacher": download_input(settings.teacher)})
    if inside_cluster() and any(map(is_url, (settings.out, *settings.source))):
        # Other machines would read and write on their own disks, so this process does all.
        local = local.model_copy(update={"workers": 0})
    try:
        with open_workdir(settings.out, markers=(MANIFEST,)) as workdir:
            local = local.model_copy(update={"out": str(workdir.path.expanduser())})
            manifest, closing = _prepare(settings, local, say)
            workdir.publish()
    except OSError as error:
        raise PrepareError(f"cannot prepare {settings.out}: {_explain(error)}") from error
    for line in closing:
        say(line)
    return manifest


def _prepare(settings: PrepareSettings, local: PrepareSettings, say: Say) -> tuple[Manifest, list[str]]:
    """The manifest and the closing lines. `local` are the settings with local paths only."""
    started, out = time.perf_counter(), Path(local.out)
    if len({Path(one).expanduser().resolve() for one in local.source}) < len(local.source):
        raise PrepareError(f"sources {', '.join(local.source)}: one is given twice; give each once")
    with replace_folder(out) as folder, ExitStack() as stack:
        rejected = out.with_name(f"{out.name}.{sources.REJECTED}")
        workspace = Workspace(folder, rejected, say, _chunk_mapper(local.workers, stack))
        tables = [source for source in local.source if table_suffix(source)]
        is_pairs = any({"query", "clicked"} <= {*column_names(table)} for table in tables)
        corpus: Corpus = (PairsSource if is_pairs else NewsSource)(local, workspace)
        made = local.teacher == SCRATCH or is_vectors(local.teacher)
        tokenizer = None if made else load_tokenizer(local.teacher)
        if tokenizer is not None:
            check_encoder(local.teacher, tokenizer)
        manifest = find_prepared(local, corpus, tokenizer, say=say)
        if manifest is not None:
            counted = ", ".join(f"{manifest.rows(split, corpus.task):,} {split}" for split in SPLITS)
            holds = f"{settings.out} holds {counted} {corpus.noun} of the same sources"
            shutil.rmtree(folder)
            return manifest, [f"already prepared: {holds}; nothing to do"]
        rows = row_settings(local, corpus)
        mark = fingerprint(rows, corpus.files, tokenizer)
        corpus.assign_rows()
        if tokenizer is None:
            tokenizer = _make_tokenizer(local, corpus, folder, say)
        contents = corpus.write(tokenizer)
        tokenizer.save(folder / "tokenizer")
        manifest = _describe(rows, corpus, contents, tokenizer, mark, folder)
        write_json(folder / MANIFEST, manifest.sealed())
        for path in folder.glob("source-*"):
            shutil.rmtree(path)
    seconds = time.perf_counter() - started
    return manifest, list(_closing_lines(manifest, corpus, settings, out, seconds))


def _chunk_mapper(workers: int | None, stack: ExitStack) -> sources.MapAll:
    """Maps chunks in turn in this process, or as Ray tasks if they are many. Ray starts at the first use."""

    @cache
    def start_ray() -> None:
        from newsbert_ray.ray_session import ray_session

        stack.enter_context(ray_session(cpus=workers))

    def map_all(items: Sequence[Any], function: Callable[[Any, Any], Any], shared: Any) -> Iterator[Any]:
        if workers == 0 or (workers is None and len(items) <= _FEW_CHUNKS):
            yield from (function(item, shared) for item in items)
            return
        from newsbert_ray.data.stream import map_chunks

        start_ray()
        for result in map_chunks(items, partial(_catch, function), shared, workers=workers):
            if isinstance(result, PrepareError):
                raise result
            yield result

    return map_all


def _catch(function: Callable[[Any, Any], Any], item: Any, shared: Any) -> Any:
    """The result, or the error that a file or disk caused: Ray would wrap it and end the whole pipeline."""
    try:
        return function(item, shared)
    except PrepareError as error:
        return error
    except OSError as error:
        return PrepareError(_explain(error))


def _explain(error: OSError) -> str:
    """One message for a full disk, or a path that a worker cannot see."""
    where = f" ({error.filename})" if error.filename else ""
    cure = "free some room beside --out; on several machines every one must see all files at the same path"
    return f"{error.strerror or error}{where}; {cure}"


def _make_tokenizer(settings: PrepareSettings, corpus: Corpus, folder: Path, say: Say) -> TitleTokenizer:
    """WordPieces of the training texts; or the words that a file of vectors knows, written to `folder`."""
    if settings.teacher == SCRATCH:
        vocabulary = settings.scratch.vocabulary
        say(f"learning up to {vocabulary:,} WordPieces from the training texts")
        return learn_tokenizer(lambda: corpus.all_texts(training_only=True), vocabulary=vocabulary)
    path = Path(settings.teacher).expanduser()
    say(f"reading {path.name}: which of the corpus's words it knows")
    vectors = fit_vectors(path, corpus.all_texts(training_only=False))
    np.save(folder / VECTORS, vectors.table)
    say(
        f"{path.name} knows {vectors.known:,} of {vectors.words:,} words, {vectors.share:.1%} of all "
        f"occurrences; vectors {vectors.table.shape[1]} wide"
    )
    return vectors.tokenizer


def _describe(
    rows: dict[str, Any],
    corpus: Corpus,
    contents: Contents,
    tokenizer: TitleTokenizer,
    mark: str,
    folder: Path,
) -> Manifest:
    total: Counter[str] = sum((rejected.counts for rejected in corpus.rejected), Counter())
    return Manifest(
        format=shards.FORMAT,
        fingerprint=mark,
        settings=rows,
        sources=[
            shards.Source(
                folder=file.folder,
                file=file.name,
                bytes=file.bytes,
                sha256=file.sha256,
                rows=rows_of_file,
                rejected=rejected.counts.total(),
            )
            for file, rows_of_file, rejected in zip(corpus.files, corpus.rows, corpus.rejected, strict=True)
        ],
        tokenizer=shards.Tokenizer.model_validate(tokenizer, from_attributes=True),
        rejected=dict(sorted(total.items())),
        tokenizer_files=files_in(folder / "tokenizer"),
        **dict(contents),
    )


def _closing_lines(
    manifest: Manifest, corpus: Corpus, settings: PrepareSettings, folder: Path, seconds: float
) -> Iterator[str]:
    yield from corpus.summary(manifest)
    for kind, count in manifest.rejected.items():
        yield f"rejected, {kind}: {count:,}"
    examples = [line for rejected in corpus.rejected for line in rejected.examples]
    yield from (f"  {line}" for line in examples[: sources.SHOWN_ROWS])
    count = sum(corpus.rows)
    yield f"{count:,} rows in {seconds:.1f} s ({count / seconds:,.0f} rows/s)"
    yield f"{settings.out} holds the shards, {MANIFEST}, {sources.REJECTED} and tokenizer/"
    tasks = [task for task in TASKS if manifest.examples("train", task)]
    for word, task in zip(("next:", "or:  "), tasks, strict=False):
        flags = f"--data {settings.out} {_encoder_flags(settings, folder)}"
        flags = flags if task == "topics" else f"--task {task} {flags}"
        yield f"{word} newsbert-ray train {flags} --out RUN"


def _encoder_flags(settings: PrepareSettings, folder: Path) -> str:
    """The encoder for `newsbert-ray train`, for shards of these settings."""
    if not is_vectors(settings.teacher):
        return f"--teacher {settings.teacher}"
    width = int(np.load(folder / VECTORS, mmap_mode="r").shape[1])
    heads = next(n for n in range(12, 0, -1) if width % n == 0)
    usual = METHODS["glove"]["scratch"]["hidden"]
    sizes = "" if width == usual else f" --scratch.hidden {width} --scratch.heads {heads}"
    return f"--method glove --teacher {SCRATCH}{sizes}"


def row_settings(settings: PrepareSettings, corpus: Corpus) -> dict[str, Any]:
    """The settings that alter a row."""
    path = Path(settings.teacher).expanduser()
    return {
        "max_tokens": settings.max_tokens or corpus.max_tokens,
        "query_tokens": settings.query_tokens if corpus.task == "retrieval" else None,
        "validation_share": settings.validation_share,
        "test_share": settings.test_share,
        "seed": settings.seed,
        "scratch.vocabulary": settings.scratch.vocabulary if settings.teacher == SCRATCH else None,
        **({"columns": corpus.columns} if corpus.columns else {}),
        **({"vectors": vectors_sha256(path)} if is_vectors(settings.teacher) else {}),
    }


def fingerprint(rows: dict[str, Any], files: Iterable[SourceFile], tokenizer: TitleTokenizer | None) -> str:
    """SHA-256 over sources, tokeniser (None: to be made of the texts) and the settings that alter a row."""
    made_from = {
        "format": shards.FORMAT,
        "sources": [[file.number, file.sha256] for file in files],
        "tokenizer": SCRATCH if tokenizer is None else tokenizer.sha256,
        "settings": rows,
    }
    return checksum_of(made_from)


def find_prepared(
    settings: PrepareSettings, corpus: Corpus, tokenizer: TitleTokenizer | None, *, say: Say
) -> Manifest | None:
    """The manifest at --out if it was made from the same and is whole; None where --out may be written.
    PrepareError where it holds something else, which is named. `tokenizer` is None if it is still to be made.
    """
    out, rows, files = Path(settings.out), row_settings(settings, corpus), corpus.files
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file():
        raise PrepareError(f"out {out}: exists, and is no folder of prepared shards; give another --out")
    try:
        manifest = read_manifest(out)
    except ShardError as error:
        if settings.overwrite:
            return None
        raise PrepareError(str(error)) from error
    name = Path(settings.teacher).name if tokenizer is None else tokenizer.name
    changes = [*_changed_sources(manifest, files), *_changed_rows(manifest, rows, name, tokenizer)]
    if not changes and manifest.fingerprint != fingerprint(rows, files, tokenizer):
        changes = ["the sources in another order"]
    if changes and not settings.overwrite:
        raise PrepareError(
            f"out {out}: prepared from something else: {'; '.join(changes)}; add --overwrite, or give "
            "another --out"
        )
    damaged = [] if changes else [part.file for part in manifest.parts() if not is_whole(out, part)]
    if damaged:
        say(f"{out / damaged[0]}: missing or damaged ({len(damaged)} in all), so all is prepared again")
    return None if changes or damaged else manifest


def _changed_sources(manifest: Manifest, files: Sequence[SourceFile]) -> Iterator[str]:
    """How the sources differ from those of `manifest`, a phrase each."""
    old = {f"{source.folder}/{source.file}": source.sha256 for source in manifest.sources}
    new = {file.label: file.sha256 for file in files}
    if sorted(old.values()) == sorted(new.values()):
        return
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            state = "is new" if name not in old else "is not given now" if name not in new else "has changed"
            yield f"source {name} {state}"


def _changed_rows(
    manifest: Manifest, rows: Mapping[str, Any], name: str, tokenizer: TitleTokenizer | None
) -> Iterator[str]:
    """How tokeniser (called `name`) and settings differ from those of `manifest`, a phrase each."""
    old = manifest.settings
    if tokenizer is None or any(old.get(key) for key in _LEARNED):
        same = all(bool(old.get(key)) == bool(rows.get(key)) for key in _LEARNED)
    else:
        same = manifest.tokenizer.sha256 == tokenizer.sha256
    if not same:
        contents = ", with other contents" if manifest.tokenizer.name == name else ""
        yield f"tokeniser {manifest.tokenizer.name} then, {name} now{contents}"
        return
    for key, value in rows.items():
        if old.get(key) != value:
            yield f"{key} {old.get(key)} then, {value} now"
