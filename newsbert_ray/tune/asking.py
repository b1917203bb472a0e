"""What a person asks of a sweep, over its file: settings, axes, control. Knows no Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from newsbert_ray.config import merge
from newsbert_ray.tune import space as spaces
from newsbert_ray.tune.plan import require_password
from newsbert_ray.tune.space import SearchSpace
from newsbert_ray.tune.space_file import read_space
from newsbert_ray.tune.storage import absolute_storage


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
