"""Checkpoints are complete or absent, and damage is detected before use."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

from newsbert_ray.config import TrainSettings
from newsbert_ray.data.reading import make_schedule, read_updates, training_texts
from newsbert_ray.data.shards import read_manifest
from newsbert_ray.model import saved
from newsbert_ray.model.assemble import assemble_pair
from newsbert_ray.model.saved import CheckpointError, write_best
from newsbert_ray.training.checkpoint import Progress, resume, write_checkpoint
from newsbert_ray.training.step import Learner, build_learner, train_step

MakeSettings = Callable[..., TrainSettings]


def learner_after(settings: TrainSettings, steps: int, *, all_words: bool = False) -> Learner:
    """A learner that has made some updates."""
    manifest = read_manifest(settings.data)
    schedule = make_schedule(settings, manifest)
    words = None if all_words else training_texts(schedule).words(manifest.tokenizer.pad_id)
    pair = assemble_pair(settings, manifest)
    learner = build_learner(pair, settings, total_steps=schedule.total_steps, words=words)
    for update in islice(read_updates(schedule), steps):
        train_step(learner, update.parts, step=update.step)
    return learner


def test_round_trip_includes_adam(make_settings: MakeSettings, tmp_path: Path) -> None:
    """Without its moments Adam would start again."""
    settings = make_settings()
    learner = learner_after(settings, 3)
    progress = Progress(step=3, curve=[{"step": 3, "x": 0.1}], sums={"total": 0.3}, count=3, titles=96)
    write_checkpoint(tmp_path, learner, progress, keep=2)
    fresh = learner_after(settings, 0)
    said: list[str] = []
    assert resume(tmp_path, fresh, say=said.append) == progress
    assert not said
    for a, b in zip(learner.pair.parameters(), fresh.pair.parameters(), strict=True):
        assert torch.equal(a, b)
        ours, read = learner.sparse_embedding.learned(a), fresh.sparse_embedding.learned(b)
        for key, value in learner.optimizer.state[ours].items():
            assert torch.equal(value, fresh.optimizer.state[read][key])


def test_adam_of_all_words_is_read(make_settings: MakeSettings, tmp_path: Path) -> None:
    """Earlier versions kept it for words that no text has, too. The next update is the same."""
    settings = make_settings(**{"model.dropout": 0.0})
    update = next(read_updates(make_schedule(settings, read_manifest(settings.data))))
    before, after = learner_after(settings, 2, all_words=True), learner_after(settings, 0)
    write_checkpoint(tmp_path, before, Progress(step=2), keep=2)
    assert resume(tmp_path, after, say=print).step == 2
    for learner in (before, after):
        train_step(learner, update.parts, step=3)
    weights = after.pair.state_dict()
    for name, value in before.pair.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [saved.WEIGHTS, saved.STATE])
@pytest.mark.parametrize("damage", ["cut", "flip", "delete"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    make_settings: MakeSettings, tmp_path: Path, name: str, damage: str
) -> None:
    """Continuing from a flipped bit would silently give a wrong student."""
    learner = learner_after(make_settings(), 1)
    write_checkpoint(tmp_path, learner, Progress(step=1), keep=2)
    newest = write_checkpoint(tmp_path, learner, Progress(step=2), keep=2) / name
    content = bytearray(newest.read_bytes())
    if damage == "cut":
        newest.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
    else:
        newest.unlink()
    said: list[str] = []
    assert resume(tmp_path, learner_after(make_settings(), 0), say=said.append).step == 1
    assert len(said) == 1
    assert "step-000000002" in said[0]
    assert "the one before it" in said[0]


def test_progress_of_an_earlier_version_is_read() -> None:
    """A run that was stopped before an update must go on after it."""
    assert Progress.from_json({"step": 7, "looks": 3}) == Progress(step=7, log_steps=3)


def test_no_intact_checkpoint_is_an_error(make_settings: MakeSettings, tmp_path: Path) -> None:
    """Starting again silently would discard what the user believes is kept."""
    learner = learner_after(make_settings(), 0)
    (write_checkpoint(tmp_path, learner, Progress(step=1), keep=2) / saved.WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints is intact"):
        resume(tmp_path, learner, say=lambda _: None)


def test_number_of_checkpoints_is_bounded(make_settings: MakeSettings, tmp_path: Path) -> None:
    """Long runs fill disks; the best model stays while a checkpoint names it. What a kill left goes."""
    learner = learner_after(make_settings(), 0)
    (tmp_path / ".step-000000009.0123abcd").mkdir()
    (tmp_path / ".step-000000009.0123abcd.lock").touch()
    for step in range(1, 6):
        best = f"best-{max(1, step // 2):09d}"
        write_best(tmp_path, learner.pair, step=max(1, step // 2))
        write_checkpoint(tmp_path, learner, Progress(step=step, best=best), keep=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["best-000000002", "step-000000004", "step-000000005"]


def test_pruning_never_counts_a_checkpoint_found_damaged(make_settings: MakeSettings, tmp_path: Path) -> None:
    """If counted, a damaged newest checkpoint would push out good ones written after it."""
    learner = learner_after(make_settings(), 0)
    for step in (2, 9):
        newest = write_checkpoint(tmp_path, learner, Progress(step=step), keep=2)
    (newest / saved.WEIGHTS).write_bytes(b"")
    assert resume(tmp_path, learner, say=lambda _: None).step == 2
    write_checkpoint(tmp_path, learner, Progress(step=4), keep=1)
    assert resume(tmp_path, learner, say=lambda _: None).step == 4


def test_a_write_that_fails_leaves_the_checkpoint_before(
    make_settings: MakeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk must cost only the newest checkpoint, and the message must say how to continue."""
    learner = learner_after(make_settings(), 0)
    write_checkpoint(tmp_path, learner, Progress(step=1), keep=1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CheckpointError, match="free some disk space"):
        write_checkpoint(tmp_path, learner, Progress(step=2), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
