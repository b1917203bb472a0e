"""Everything a resume needs <-> a folder that is there whole or not at all. Safetensors and JSON; nothing is
pickled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from newsbert_ray.model.saved import (
    STATE,
    CheckpointError,
    best_folders,
    read_weights,
    verify_weights,
    write_weights,
)
from newsbert_ray.training.step import Learner

_PREFIX = "step-"
_ADAM = ("exp_avg", "exp_avg_sq", "step")


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
    write_weights(path, learner_tensors(learner), {"progress": asdict(progress)})
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
            tensors, state = read_weights(path)
            progress = Progress(**state["progress"])
            if progress.best:
                verify_weights(folder / progress.best)
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
