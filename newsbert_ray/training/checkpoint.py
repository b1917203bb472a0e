"""Checkpoints: everything that a resume needs, in folders that are complete or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from newsbert_ray.model import saved
from newsbert_ray.training.step import Learner

_PREFIX = "step-"
_ADAM_STATE = ("exp_avg", "exp_avg_sq", "step")


@dataclass
class Progress:
    """How far a run is: all of its state besides tensors.

    Attributes:
        step, titles: updates done, and titles trained on.
        curve: one entry per evaluation (see RunRecord.curve).
        best: folder of the best model so far, with its validation metric and step; empty before the first
            evaluation.
        sums: sum of each loss since the last evaluation, over `count` updates.
        blocks: sums of the gradient statistics since then, over `log_steps` logged updates.
        seconds: time over all starts by what it was spent on (`train`, `data`, `evaluate`, `checkpoint`,
            `report`).
    """

    step: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    best: str = ""
    best_metric: float = -1.0
    best_step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0
    blocks: dict[str, float] = field(default_factory=dict)
    log_steps: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    titles: int = 0

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """From state.json, where an earlier version said `looks`; TypeError if it has an unknown key."""
        return cls(**{"log_steps" if name == "looks" else name: value for name, value in values.items()})


def write_checkpoint(folder: Path, learner: Learner, progress: Progress, *, keep: int) -> Path:
    """Write folder/step-N; keep the newest `keep` checkpoints, with the best models that they name."""
    path = folder / f"{_PREFIX}{progress.step:09d}"
    saved.write_weights(path, learner_tensors(learner), {"progress": asdict(progress)})
    for later in step_folders(folder):
        if later.name > path.name:  # found damaged when this run was resumed
            shutil.rmtree(later, ignore_errors=True)
    _prune(folder, keep)
    return path


def learner_tensors(learner: Learner) -> dict[str, Tensor]:
    """All tensors that a resume needs: weights and Adam's state."""
    tensors = {f"model.{name}": value for name, value in learner.pair.state_dict().items()}
    for name, parameter in learner.pair.named_parameters():
        learned = learner.sparse_embedding.learned(parameter)
        for key, value in learner.optimizer.state.get(learned, {}).items():
            tensors[f"adam.{name}.{key}"] = value
    return tensors


def load_tensors(learner: Learner, tensors: Mapping[str, Tensor]) -> None:
    """Load what `learner_tensors` returned; KeyError or RuntimeError if it belongs to another model."""
    prefix = "model."
    model = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    learner.pair.load_state_dict(model)
    for name, parameter in learner.pair.named_parameters():
        learned, words = learner.sparse_embedding.learned(parameter), learner.sparse_embedding.words
        own = {key: tensors.get(f"adam.{name}.{key}") for key in _ADAM_STATE}
        state = {key: value.to(parameter.device) for key, value in own.items() if value is not None}
        for key in _ADAM_STATE[:2] if state and learned is not parameter else ():
            if len(state[key]) == len(parameter):  # an earlier version had all words
                state[key] = state[key][words]
        if state:
            learner.optimizer.state[learned] = state


def resume(folder: Path, learner: Learner, *, say: Callable[[str], object]) -> Progress:
    """Load the newest intact checkpoint into `learner` and return its progress, empty if there is none;
    CheckpointError if there are checkpoints, but none is intact."""
    paths = step_folders(folder)
    for path in reversed(paths):
        try:
            tensors, state = saved.read_weights(path)
            progress = Progress.from_json(state["progress"])
            if progress.best:
                saved.verify_weights(folder / progress.best)
            load_tensors(learner, tensors)
            return progress
        except (saved.CheckpointError, KeyError, TypeError, RuntimeError) as error:
            say(f"checkpoint {path} cannot be used ({error}); trying the one before it")
    if paths:
        raise saved.CheckpointError(
            f"{folder}: none of the {len(paths)} checkpoints is intact; delete the run's folder and train "
            "again"
        )
    return Progress()


def step_folders(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_PREFIX}*"))


def keep_best(folder: Path, name: str) -> None:
    """Delete everything in a finished run's checkpoints but the best model `name`."""
    for path in folder.iterdir():
        if path.name != name:
            shutil.rmtree(path, ignore_errors=True)


def _prune(folder: Path, keep: int) -> None:
    for path in step_folders(folder)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
    named = set()
    for path in step_folders(folder):
        with suppress(OSError, ValueError, KeyError):
            state = json.loads((path / saved.STATE).read_text(encoding="utf-8"))
            named.add(state["body"]["progress"]["best"])
    for path in saved.best_folders(folder):
        if path.name not in named:
            shutil.rmtree(path, ignore_errors=True)
    for leftover in folder.glob(".*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:  # the lock of a folder that a killed process was writing
            leftover.unlink(missing_ok=True)
