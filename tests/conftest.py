"""Marks are registered in pyproject.toml; here stand the few things that tests of several rooms share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import settings

from newsbert_ray.config import TrainSettings, build_settings, merge
from newsbert_ray.record import RunRecord

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

MakeRecord = Callable[..., RunRecord]


@pytest.fixture
def make_record() -> MakeRecord:
    """An invented record in the real schema: make_record(accuracy=0.7, seed=1, **{"distill.beta": 0.2})."""

    def make(
        *,
        accuracy: float = 0.7,
        macro_f1: float = 0.5,
        teacher_accuracy: float = 0.8,
        seed: int = 0,
        epochs: int = 2,
        described: Mapping[str, Any] | None = None,
        **values: Any,
    ) -> RunRecord:
        given = merge({"data": "shards", "teacher": "scratch", "out": f"runs/{seed}", "seed": seed}, values)
        curve = [
            {
                "step": 10 * epoch,
                "epoch": float(epoch),
                "validation": {
                    "student": {"accuracy": accuracy * epoch / epochs, "macro_f1": macro_f1},
                    "teacher": {"accuracy": teacher_accuracy * epoch / epochs, "macro_f1": teacher_accuracy},
                },
                "train": {"total": 1.0 / epoch},
            }
            for epoch in range(1, epochs + 1)
        ]
        test = {
            "student": {"accuracy": accuracy, "macro_f1": macro_f1},
            "teacher": {"accuracy": teacher_accuracy, "macro_f1": teacher_accuracy},
        }
        known = {"name": "synthetic_train", "fingerprint": "ab12cd34ef", "train_rows": 1800, "test_rows": 400}
        return RunRecord(
            settings=build_settings(TrainSettings, given).model_dump(),
            seed=seed,
            versions={"python": "3.11.7", "torch": "2.13.0"},
            hardware={"processor": "some processor", "cores": 2, "device": "cpu"},
            seconds={"train": 30.0, "evaluate": 3.0, "total": 33.0},
            layer_map=[[1, 2], [3, 4]],
            metrics={"test": test, "validation": curve[-1]["validation"]},
            curve=curve,
            data=dict(known if described is None else described),
            steps=10 * epochs,
            titles_per_second=800.0,
        )

    return make
