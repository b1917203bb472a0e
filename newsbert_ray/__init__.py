"""Distil a pretrained language model into a fast news encoder, teacher and student learning together
(NewsBERT, Wu et
al. 2021), and search how best to do it over a Ray cluster. Every verb of the command line is one function
here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from newsbert_ray.config import PrepareSettings, TrainSettings
    from newsbert_ray.data.prepare import prepare
    from newsbert_ray.data.synthetic import synthesize
    from newsbert_ray.deploy.submit import submit
    from newsbert_ray.evaluation.evaluate import evaluate
    from newsbert_ray.record import RunRecord, read_record
    from newsbert_ray.reporting.report import report
    from newsbert_ray.training.run import train
    from newsbert_ray.tune.sweep import sweep

__version__ = "0.2.0"

_ROOMS = {
    "PrepareSettings": "config",
    "TrainSettings": "config",
    "RunRecord": "record",
    "read_record": "record",
    "synthesize": "data.synthetic",
    "prepare": "data.prepare",
    "train": "training.run",
    "evaluate": "evaluation.evaluate",
    "sweep": "tune.sweep",
    "report": "reporting.report",
    "submit": "deploy.submit",
}

__all__ = [
    "PrepareSettings",
    "RunRecord",
    "TrainSettings",
    "__version__",
    "evaluate",
    "prepare",
    "read_record",
    "report",
    "submit",
    "sweep",
    "synthesize",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a verb's room when it is first used: `import newsbert_ray` alone stays light."""
    if name in _ROOMS:
        return getattr(import_module(f"newsbert_ray.{_ROOMS[name]}"), name)
    raise AttributeError(f"module 'newsbert_ray' has no attribute '{name}'")
