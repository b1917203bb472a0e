"""Are shards and teacher fit for a run, and for each other. Loads no weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from newsbert_ray.config import SCRATCH
from newsbert_ray.data.shards import SPLITS, Manifest, Part, Shard, ShardError, read_manifest
from newsbert_ray.deploy.finding import Finding, Topic
from newsbert_ray.tasks import TASKS

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_PREPARE = "newsbert-ray prepare ... --out {folder} --overwrite true"


def check_shards(data: str, *, deep: bool = False) -> list[Finding]:
    """Whether the shards in `data` are all there in the right sizes; with `deep`, byte for byte."""
    topic = Topic("shards")
    try:
        manifest = read_manifest(data)
    except (ShardError, OSError) as error:
        topic.mend(str(error), _PREPARE.format(folder=data))
        return topic.findings
    damaged = [
        f"{part.file} ({fault})" for part in _parts(manifest) if (fault := _fault(Path(data), part, deep))
    ]
    if not (Path(data) / "tokenizer/tokenizer.json").is_file():
        damaged.append("tokenizer/tokenizer.json (missing)")
    if damaged:
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        topic.mend(f"{data}: {', '.join(damaged[:3])}{more}", _PREPARE.format(folder=data))
        return topic.findings
    counted = "; ".join(
        f"{task} " + ", ".join(f"{manifest.rows(split, task):,} {split}" for split in SPLITS)
        for task in TASKS
        if any(manifest.rows(split, task) for split in SPLITS)
    )
    how = "each hash is right" if deep else "each file is there in its size (--deep compares hashes)"
    topic.ok(f"{data}: {counted}; {how}")
    return topic.findings


def check_teacher(teacher: str, data: str | None) -> list[Finding]:
    """Whether `teacher` can be loaded without pickle or foreign code, and made the shards' tokens.

    Args:
        data: the shards; None compares nothing.
    """
    topic = Topic("teacher")
    if teacher == SCRATCH:
        topic.ok("scratch: a small encoder with random weights, nothing to fetch")
        return topic.findings
    folder = Path(teacher).expanduser()
    if folder.is_dir() and not _check_folder(topic, folder):
        return topic.findings
    from newsbert_ray.data.tokens import TokenizerError, load_tokenizer
    from newsbert_ray.model.assemble import check_tokenizer
    from newsbert_ray.model.encoder import EncoderError

    try:
        manifest = read_manifest(data) if data is not None else None
    except (ShardError, OSError):  # said under shards
        manifest = None
    try:
        if manifest is None:
            load_tokenizer(teacher)
            topic.ok(f"{teacher}: loads; not compared with shards (--data)")
        else:
            check_tokenizer(teacher, manifest)
            topic.ok(f"{teacher}: loads, and its tokeniser made the shards")
    except EncoderError as error:
        topic.mend(str(error), f"newsbert-ray prepare ... --teacher {teacher} --out ANOTHER")
    except TokenizerError as error:
        topic.mend(str(error), "give an encoder's folder, or fetch it where there is a network")
    return topic.findings


def _check_folder(topic: Topic, folder: Path) -> bool:
    """Whether a folder holds what an encoder is loaded from."""
    path = folder / "config.json"
    if not path.is_file():
        topic.mend(f"{folder}: no config.json there", "give a Hugging Face encoder's folder, or `scratch`")
        return False
    from transformers import AutoConfig

    try:
        kind = AutoConfig.from_pretrained(str(folder), trust_remote_code=False).model_type
        foreign = "auto_map" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        topic.mend(f"{path}: cannot be used ({reason[:200]})", "fetch the encoder's folder again")
        return False
    if foreign:
        topic.note(f"{folder}: brings Python files of its own; they are never run, only the usual {kind} is")
    if any((folder / name).is_file() for name in WEIGHTS):
        return True
    pickled = sorted(p.name for pattern in PICKLED for p in folder.glob(pattern))
    what = f"only pickled weights ({', '.join(pickled)}), which can run code" if pickled else "no weights"
    topic.mend(
        f"{folder}: {what}; model.safetensors is needed",
        "where you trust them, load them with transformers, then save_pretrained(FOLDER)",
    )
    return False


def _parts(manifest: Manifest) -> Iterator[Shard | Part]:
    for task in TASKS:
        for split in SPLITS:
            yield from manifest.shards(split, task)
    yield from manifest.others
    yield from (manifest.texts.tokens, manifest.texts.offsets)


def _fault(folder: Path, part: Shard | Part, deep: bool) -> str:
    """What is wrong with a file of the shards; nothing where nothing is."""
    path = folder / part.file
    try:
        size = path.stat().st_size
        if size != part.bytes:
            return f"{size:,} bytes instead of {part.bytes:,}"
        if not deep:
            return ""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return error.strerror or type(error).__name__
    return "" if digest == part.sha256 else "other bytes than were written"
