"""Named methods, and what tasks set otherwise, as changes to the training settings: data, never code.

"NewsBERT" is Wu et al. 2021.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

MethodName = Literal["newsbert", "finetune"]

METHODS: Mapping[str, Mapping[str, Any]] = {
    "newsbert": {},
    "finetune": {
        "distill": {
            "beta": 0.0,
            "weights": {
                "teacher_task": 0.0,
                "embedding": 0.0,
                "hidden": 0.0,
                "news_embedding": 0.0,
                "user_embedding": 0.0,
                "soft_labels": 0.0,
            },
        }
    },
}
"""`finetune`: the first N layers learn from the labels alone; no teacher is computed (4.2: UniLM-1, 2, 4)."""

TASK_VALUES: Mapping[str, Mapping[str, Any]] = {"recommendation": {"distill": {"beta": 0.15}}}
"""Values that the paper gives for one task (4.1)."""
