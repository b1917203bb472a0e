"""Weights on disk: the exported student folder, and checksummed weight folders for checkpoints.

A folder is written beside its final place and renamed, so that it is complete or absent. Weights are
safetensors and the rest is JSON; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from newsbert_ray import files
from newsbert_ray.data.shards import Manifest
from newsbert_ray.methods import TaskName
from newsbert_ray.model.encoder import Encoder, EncoderError, save_tensors
from newsbert_ray.model.families import load_exported
from newsbert_ray.model.linear import require_encoder
from newsbert_ray.model.pair import Pair, Top

CHECKPOINTS = "checkpoints"
"""Folder of a run that holds its checkpoints and best models."""
STATE = "state.json"
WEIGHTS = "weights.safetensors"
TOP = "top.safetensors"
TOP_CONFIG = "top.json"
_BEST = "best-"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message names the folder and the remedy."""


def write_weights(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Replace folder `path` by weights.safetensors and state.json (JSON values), with checksums of both;
    CheckpointError if the disk is full or not writable."""
    from safetensors import SafetensorError

    try:
        with files.replace_folder(path) as partial:
            save_tensors(tensors, partial / WEIGHTS)
            body = {**state, "sha256": files.sha256_of(partial / WEIGHTS)}
            document = {"body": body, "check": hashlib.sha256(json.dumps(body).encode()).hexdigest()}
            (partial / STATE).write_text(json.dumps(document), encoding="utf-8")
            for name in (WEIGHTS, STATE):
                files.sync(partial / name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error}); free some disk space, then run the same command again: it "
            "continues from the previous checkpoint"
        ) from error


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a folder that `write_weights` wrote; CheckpointError if missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state = verify_weights(path)
    try:
        return load_file(path / WEIGHTS), state
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: {WEIGHTS} is not a safetensors file ({error})") from error


def verify_weights(path: Path) -> dict[str, Any]:
    """The state of a weight folder, after checking both checksums; errors as `read_weights`."""
    try:
        document = json.loads((path / STATE).read_text(encoding="utf-8"))
        body: dict[str, Any] = document["body"]
        intact = hashlib.sha256(json.dumps(body).encode()).hexdigest() == document["check"]
        intact = intact and files.sha256_of(path / WEIGHTS) == body["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: incomplete or damaged ({type(error).__name__})") from error
    if not intact:
        raise CheckpointError(f"{path}: damaged, its checksum does not match")
    return body


def best_name(step: int) -> str:
    return f"{_BEST}{step:09d}"


def best_folders(folder: Path) -> list[Path]:
    """The best models in a run's checkpoints folder, oldest first."""
    return sorted(folder.glob(f"{_BEST}*"))


def write_best(folder: Path, pair: nn.Module, *, step: int) -> str:
    """Write the pair's weights as folder/best-N and return that name."""
    name = best_name(step)
    write_weights(folder / name, dict(pair.state_dict()), {"step": step})
    return name


def load_best(folder: Path, name: str, pair: nn.Module) -> None:
    pair.load_state_dict(read_weights(folder / name)[0])


def write_student(
    folder: Path, pair: Pair, manifest: Manifest, *, tokenizer: Path, task: TaskName = "topics"
) -> None:
    """Replace `folder` by the student as a Hugging Face folder with its tokeniser (a folder) and its top;
    EncoderError if the disk is full or not writable."""
    from safetensors import SafetensorError

    top = {
        "task": task,
        "labels": manifest.labels,
        "user": "self_attention" if getattr(pair.top.head, "attention", None) is not None else "pooling",
        "query_size": pair.top.pooling.key.out_features,
        "max_tokens": manifest.settings.get("max_tokens"),
        "tokenizer_sha256": manifest.tokenizer.sha256,
    }
    try:
        with files.replace_folder(folder) as partial:
            pair.student.save(partial)
            if tokenizer.is_dir():
                shutil.copytree(tokenizer, partial, dirs_exist_ok=True)
            save_tensors(pair.top.state_dict(), partial / TOP)
            (partial / "README.md").write_text(_card(pair.student), encoding="utf-8")
            top["files"] = {n: digest for n, digest in files.files_in(partial).items() if n != "README.md"}
            files.write_json(partial / TOP_CONFIG, {**top, "check": files.checksum_of(top)})
    except (SafetensorError, OSError) as error:
        raise EncoderError(
            f"{folder}: the student cannot be written ({error}); free some disk space, then run the same "
            "command again: it continues from its last checkpoint"
        ) from error


def _card(encoder: Encoder) -> str:
    """What the folder of a student is, for those who open it with another library."""
    what = "`AutoModel.from_pretrained` of transformers loads the encoder alone"
    if type(encoder) is not Encoder:
        what = "transformers does not load this folder, because the encoder has a form of its own"
    return f"""# A student, as its run left it

Load it with `newsbert_ray.load(RUN)`; RUN is the folder above. Other libraries: {what}.
Pooling and head (topics or clicks) are in `{TOP}`, which only newsbert_ray reads.
`newsbert-ray export RUN --to hf` (or sentence-transformers, onnx) writes a folder that they load as a whole.
"""


def load_student(folder: Path) -> tuple[Encoder, Top, dict[str, Any]]:
    """An exported student in evaluation mode: its encoder, its top, and top.json (`task`, `labels`,
    `tokenizer_sha256`, ...). EncoderError where the folder is incomplete, or a file of it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    require_encoder(folder)
    try:
        description = read_top(folder)
        files.require_intact(
            folder, description.pop("files", {}), lambda text: _Damage(f"{text}; train the run again")
        )
        encoder = load_exported(folder)
        top = Top(
            encoder.hidden_size,
            query_size=description["query_size"],
            topics=len(description["labels"]),
            task=description["task"],
            user=description["user"],
        )
        top.load_state_dict(load_file(folder / TOP))
    except _Damage:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise EncoderError(
            f"{folder}: not a complete exported student ({type(error).__name__}); train the run again"
        ) from error
    return encoder, top.eval(), description


class _Damage(EncoderError):
    """A file of a student whose content has changed."""


def read_top(folder: Path) -> dict[str, Any]:
    """The description of an exported student's top (top.json); EncoderError if it has changed since."""
    description: dict[str, Any] = json.loads((folder / TOP_CONFIG).read_text(encoding="utf-8"))
    check = description.pop("check", None)  # early versions wrote none
    if check is not None and check != files.checksum_of(description):
        raise _Damage(f"{folder / TOP_CONFIG}: damaged: its content has changed; train the run again")
    return {"task": "topics", "user": "pooling", **description}  # early versions wrote neither
