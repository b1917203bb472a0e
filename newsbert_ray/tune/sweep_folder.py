"""The folder of a sweep: held by one process, and sweep.json in it, which says what the sweep is."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from newsbert_ray.config import SCRATCH, SettingsError, TrainSettings, merge
from newsbert_ray.files import locked
from newsbert_ray.record import installed_versions
from newsbert_ray.storage import inputs
from newsbert_ray.storage import workdir as storage
from newsbert_ray.tune import space as spaces
from newsbert_ray.tune.space import SearchSpace, absolute_folders
from newsbert_ray.tune.space_file import read_space
from newsbert_ray.tune.storage import absolute_storage, shown_storage

SWEEP = "sweep.json"
ESTIMATE = "plan.json"
MARKS = (SWEEP, ESTIMATE)
"""Of which one is in every sweep's folder."""
FORMAT = 2
FREE = ("limits", "prices", "gpus", "keep_students")
"""Parts of a search space that may differ from one start of a sweep to the next: they alter no result."""


class SweepError(ValueError):
    """A sweep that cannot begin or go on; the text names the folder and the cure."""


@contextmanager
def claim_folder(out: Path) -> Iterator[None]:
    """The sweep's folder for this process alone; the system frees it however the process ends."""
    if out.exists() and not out.is_dir():
        raise SweepError(f"{out}: is a file; give another --out")
    ours = {SWEEP, ESTIMATE, ".lock"}
    if out.is_dir() and any(out.iterdir()) and not ours & {path.name for path in out.iterdir()}:
        raise SweepError(f"{out}: holds other files and no sweep; give an empty or new folder as --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".lock").touch()
    except OSError as error:
        raise SweepError(f"{out}: cannot be written ({error}); give another --out") from error
    busy = SweepError(f"{out}: another sweep runs in it; wait for it, or give another --out")
    with locked(out / ".lock", error=busy):
        yield


def make_plan(
    space: SearchSpace, asked: Mapping[str, Any], first: TrainSettings, *, corpora: list[str]
) -> dict[str, Any]:
    """What sweep.json says: what was asked, and what every trial shares.

    Args:
        corpora: fingerprints of the shards; empty where they were not read.
    """
    return {
        "format": FORMAT,
        "space": _without_password(space.model_dump(mode="json", exclude={"file"})),
        "file": space.file,
        **json.loads(json.dumps({**asked, "control": _without_password(asked["control"])})),
        "settings": first.model_dump(mode="json", exclude={"out", "seed"}),
        "varied": [axis.name for axis in space.axes],
        "metric": space.metric,
        "mode": space.mode,
        "scheduler": space.scheduler,
        "identity": uuid.uuid4().hex,
        "trials": space.points * len(space.seeds),
        "corpora": corpora,
        "versions": installed_versions(),
    }


def _without_password(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the storage's password masked: sweep.json is read by whoever reads the results."""
    storage = values.get("search", {}).get("storage")
    return merge(values, {"search.storage": shown_storage(storage)}) if storage else dict(values)


def require_password(control: Mapping[str, Any]) -> None:
    """Refuse a storage as sweep.json shows it.

    Raises:
        SettingsError: its password is masked.
    """
    storage = control.get("search", {}).get("storage")
    if storage and "***" in storage:
        raise SettingsError(
            f"search.storage = {storage}: a sweep's folder does not keep the password; give the whole URL "
            "again as --search.storage"
        )


def read_corpora(space: SearchSpace, first: TrainSettings) -> list[str]:
    """Fingerprints of the shards that the trials read, after each teacher's tokeniser was held against them.

    A teacher known by its Hugging Face name alone is left to the trials: it may have to be fetched.

    Raises:
        ShardError: no shards there.
        EncoderError, TokenizerError: no such teacher, or its tokeniser did not make the shards.
        StorageError: a place in a bucket cannot be read.
    """
    from newsbert_ray.data.shards import read_manifest

    varied = {axis.name: [str(value) for value in axis.samples()] for axis in space.axes}
    manifests = [read_manifest(inputs.fetch(folder)) for folder in varied.get("data", [first.data])]
    before = [first.before.data] if first.before.data else []
    for folder in varied.get("before.data", before):
        manifests.append(read_manifest(inputs.fetch(folder)))
    for teacher in varied.get("teacher", [first.teacher]):
        if teacher != SCRATCH and _is_local(teacher):
            from newsbert_ray.model.assemble import check_tokenizer

            folder = str(inputs.fetch(teacher)) if storage.is_url(teacher) else teacher
            for manifest in manifests:
                check_tokenizer(folder, manifest)
    return [manifest.fingerprint for manifest in manifests]


def _is_local(teacher: str) -> bool:
    return Path(teacher).is_dir() or teacher.startswith(("/", ".", "~")) or teacher.count("/") > 1


def read_plan(out: Path) -> dict[str, Any]:
    """The plan in the sweep's folder, its folders of data and teacher absolute; empty where there is none.

    Raises:
        SweepError: damaged, or another version's.
    """
    path = out / SWEEP
    if not path.exists():
        return {}
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        if (
            isinstance(plan, dict)
            and plan["format"] == FORMAT
            and {"space", "overrides", "vary", "control", "identity"} <= plan.keys()
        ):
            space = {**plan["space"], "settings": absolute_folders(plan["space"]["settings"])}
            return {**plan, "space": space, "overrides": absolute_folders(plan["overrides"])}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise SweepError(f"{path}: damaged, or written by another version; give another --out")


def require_same(
    out: str | Path, before: Mapping[str, Any], plan: Mapping[str, Any], *, resume: bool
) -> None:
    """Refuse to go on with another sweep than the one before, on other shards, or unasked.

    Raises:
        SweepError: what differs, and the cure.
    """
    if not before:
        return
    parts = [
        f"{name}.{key} was {_short(old.get(key))}, now {_short(new.get(key))}"
        for name in ("space", "overrides")
        for old, new in [(fixed_part(name, before[name]), fixed_part(name, plan[name]))]
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]
    if parts:
        raise SweepError(f"{out}: holds another sweep ({'; '.join(parts)}); give another --out")
    if before.get("corpora") and plan["corpora"] and before["corpora"] != plan["corpora"]:
        raise SweepError(
            f"{out}: holds trials on other shards (fingerprint {_shortest(before['corpora'])}, now "
            f"{_shortest(plan['corpora'])}): the shards were prepared anew; give another --out"
        )
    if not resume:
        raise SweepError(
            f"{out}: holds this sweep already ({before.get('state', 'unknown')}); go on with --resume, "
            "or give another --out"
        )


def fixed_part(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What of a plan's part must stay as it was; a sweep may be given more trials."""
    if name != "space":
        return dict(values)
    kept = {key: value for key, value in values.items() if key not in FREE}
    search = {key: value for key, value in values.get("search", {}).items() if key != "trials"}
    return {**kept, "search": search}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:197] + "..."


def _shortest(fingerprints: list[str]) -> str:
    return ", ".join(fingerprint[:12] for fingerprint in fingerprints)


def read_asked(
    overrides: Mapping[str, Any] | None,
    vary: Mapping[str, Sequence[Any]] | None,
    control: Mapping[str, Any] | None,
    *,
    before: Mapping[str, Any],
) -> dict[str, Any]:
    """What is asked over the file, as sweep.json keeps it; a resume without any goes on as `before`."""
    asked: dict[str, Any] = {
        "overrides": spaces.absolute_folders(merge(overrides or {})),
        "vary": {name: list(values) for name, values in (vary or {}).items()},
        "control": merge(control or {}),
    }
    if storage := asked["control"].get("search", {}).get("storage"):
        asked["control"]["search"]["storage"] = absolute_storage(storage)
    if before:
        asked["control"] = merge(before["control"], asked["control"])
        require_password(asked["control"])
        if not asked["overrides"] and not asked["vary"]:
            asked |= {name: before[name] for name in ("overrides", "vary")}
    return asked


def build_space(file: str | Path, asked: Mapping[str, Any]) -> tuple[SearchSpace, list[str]]:
    """The search space of a file with what was asked over it, its depths known, and lines to show.

    Raises:
        SettingsError: something that cannot be.
    """
    space = spaces.steer(read_space(file, task=asked["overrides"].get("task")), asked["control"])
    if space.search.storage:
        search = space.search.model_copy(update={"storage": absolute_storage(space.search.storage)})
        space = space.model_copy(update={"search": search})
    space, said = spaces.fix(spaces.vary(space, asked["vary"]), asked["overrides"])
    space = space.model_copy(update={"settings": spaces.absolute_folders(space.settings)})
    return spaces.resolve_depths(space, asked["overrides"]), said
