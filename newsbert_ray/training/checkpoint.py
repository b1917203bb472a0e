"""Everything a resume needs <-> a folder that is there whole or not at all. Safetensors and JSON; nothing is
pickled."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from newsbert_ray.training.step import Learner

CHECKPOINTS = "checkpoints"
"""Where a run's folder holds them."""
STATE = "state.json"
WEIGHTS = "weights.safetensors"
_PREFIX = "step-"
_BEST = "best-"
_ADAM = ("exp_avg", "exp_avg_sq", "step")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the text names the folder and the cure."""


@dataclass
class Progress:
    """How far a run is: all of its memory besides tensors.

    Attributes:
        step: updates done.
        curve: one entry an evaluation (see RunRecord.curve).
        best: name of the best model's folder, with its validation metric and step; empty before the first
            evaluation.
        sums: loss sums since the last evaluation, and `count` of updates in them.
        blocks: sums of the blocks' gradient ratios and cosines at the logged updates since then, and `looks`
            of them.
        seconds: seconds spent over all starts, by what they went to (`train`, `data`, `evaluate`,
            `checkpoint`, `report`).
        titles: titles trained on.
    """

    step: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    best: str = ""
    best_metric: float = -1.0
    best_step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0
    blocks: dict[str, float] = field(default_factory=dict)
    looks: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    titles: int = 0


def write_checkpoint(folder: Path, learner: Learner, progress: Progress, *, keep: int) -> Path:
    """Write folder/step-N and prune: the `keep` newest steps stay, and the best models they name.

    Args:
        folder: the run's checkpoints/.
    """
    path = folder / f"{_PREFIX}{progress.step:09d}"
    _write_folder(path, learner_tensors(learner), {"progress": asdict(progress)})
    for later in step_folders(folder):
        if later.name > path.name:  # found unusable by the resume that led here
            shutil.rmtree(later, ignore_errors=True)
    _prune(folder, keep)
    return path


def learner_tensors(learner: Learner) -> dict[str, Tensor]:
    """All tensors that a resume needs: weights and Adam's state."""
    tensors = {f"model.{name}": value for name, value in learner.pair.state_dict().items()}
    for name, parameter in learner.pair.named_parameters():
        for key, value in learner.optimizer.state.get(parameter, {}).items():
            tensors[f"adam.{name}.{key}"] = value
    return tensors


def write_best(folder: Path, pair: nn.Module, *, step: int) -> str:
    """Write the pair's weights as folder/best-N and return that name; older ones go when no checkpoint names
    them."""
    name = best_name(step)
    _write_folder(folder / name, dict(pair.state_dict()), {"step": step})
    return name


def best_name(step: int) -> str:
    """Folder of the best model found at `step`."""
    return f"{_BEST}{step:09d}"


def load_best(folder: Path, name: str, pair: nn.Module) -> None:
    """Put the weights of folder/`name` into `pair`.

    Raises:
        CheckpointError: missing or damaged.
    """
    tensors, _ = _read_folder(folder / name)
    pair.load_state_dict(tensors)


def resume(folder: Path, learner: Learner, *, say: Callable[[str], None]) -> Progress:
    """Load the newest whole checkpoint into `learner`; a damaged one is named to `say` and the one before it
    used.

    Returns:
        The progress to go on from; an empty one where there is no checkpoint.
    Raises:
        CheckpointError: checkpoints are there and none is whole.
    """
    found = step_folders(folder)
    for path in reversed(found):
        try:
            tensors, state = _read_folder(path)
            progress = Progress(**state["progress"])
            if progress.best:
                _verify(folder / progress.best)
            load_tensors(learner, tensors)
        except (CheckpointError, KeyError, TypeError, RuntimeError) as error:
            say(f"checkpoint {path} is not usable ({error}); trying the one before it")
            continue
        return progress
    if found:
        raise CheckpointError(
            f"{folder}: none of its {len(found)} checkpoints is whole; delete the run's folder and "
            "train again"
        )
    return Progress()


def step_folders(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(folder.glob(f"{_PREFIX}*"))


def best_folders(folder: Path) -> list[Path]:
    """The best models in `folder`, oldest first."""
    return sorted(folder.glob(f"{_BEST}*"))


def load_tensors(learner: Learner, tensors: Mapping[str, Tensor]) -> None:
    """Put what `learner_tensors` gave into `learner`.

    Raises:
        KeyError, RuntimeError: they are another learner's.
    """
    model = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    learner.pair.load_state_dict(model)
    for name, parameter in learner.pair.named_parameters():
        values = {key: tensors[f"adam.{name}.{key}"] for key in _ADAM if f"adam.{name}.{key}" in tensors}
        if values:
            learner.optimizer.state[parameter] = {
                key: value if key == "step" and not parameter.is_cuda else value.to(parameter.device)
                for key, value in values.items()
            }


def _write_folder(path: Path, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        owned = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(owned, partial / WEIGHTS)
        body = {**state, "sha256": _digest(partial / WEIGHTS)}
        text = json.dumps(body)
        document = {"body": body, "check": hashlib.sha256(text.encode()).hexdigest()}
        (partial / STATE).write_text(json.dumps(document), encoding="utf-8")
        for name in (WEIGHTS, STATE):
            _sync(partial / name)
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
    except (SafetensorError, OSError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{path}: cannot be written ({error}); make room or mend the disk, then run the same "
            "command again: "
            "it goes on from the checkpoint before"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _read_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state = _verify(path)
    try:
        return load_file(path / WEIGHTS), state
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: {WEIGHTS} holds no safetensors ({error})") from error


def _verify(path: Path) -> dict[str, Any]:
    """The state of a checkpoint whose every byte is as it was written."""
    try:
        document = json.loads((path / STATE).read_text(encoding="utf-8"))
        body: dict[str, Any] = document["body"]
        whole = hashlib.sha256(json.dumps(body).encode()).hexdigest() == document["check"]
        whole = whole and _digest(path / WEIGHTS) == body["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: incomplete or damaged ({type(error).__name__})") from error
    if not whole:
        raise CheckpointError(f"{path}: damaged, its hash is another")
    return body


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _prune(folder: Path, keep: int) -> None:
    for path in step_folders(folder)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
    named = set()
    for path in step_folders(folder):
        try:
            named.add(json.loads((path / STATE).read_text(encoding="utf-8"))["body"]["progress"]["best"])
        except (OSError, ValueError, KeyError):
            continue
    for path in best_folders(folder):
        if path.name not in named:
            shutil.rmtree(path, ignore_errors=True)
    for stale in folder.glob(".*"):
        if stale.is_dir():
            shutil.rmtree(stale, ignore_errors=True)
