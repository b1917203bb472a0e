"""The joint step over clicks and pairs: the same mathematics however a batch is encoded or divided."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from newsbert_ray.config import LossWeights, PrepareSettings, TrainSettings, build_settings
from newsbert_ray.data.examples import Clicks
from newsbert_ray.data.prepare import prepare
from newsbert_ray.data.reading import make_schedule, read_updates, window_parts
from newsbert_ray.data.shards import read_manifest
from newsbert_ray.data.synthetic import synthesize_pairs
from newsbert_ray.distill.joint import joint_losses
from newsbert_ray.distill.losses import weighted_total
from newsbert_ray.evaluation.evaluate import evaluate
from newsbert_ray.methods import LOSSES
from newsbert_ray.model.assemble import assemble_pair
from newsbert_ray.model.pair import Pair
from newsbert_ray.model.saved import load_student
from newsbert_ray.training.run import train
from newsbert_ray.training.step import build_learner, train_step
from tests.benchmarks.bench_recommend import each_mention
from tests.conftest import MakeSettings


def gradients(pair: Pair, total: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss, by parameter."""
    pair.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in pair.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("losses_of", ["newsbert", "the other methods"])
def test_encoding_once_is_the_same_mathematics(make_settings: MakeSettings, losses_of: str) -> None:
    """Each loss and each gradient must be that of every mention encoded separately, padded to 30 and 50."""
    newsbert = [name for name, weight in LossWeights() if weight]
    chosen = newsbert if losses_of == "newsbert" else [name for name in LOSSES if name not in newsbert]
    weights = {f"distill.weights.{name}": float(name in chosen) for name in LOSSES}
    settings = make_settings(task="recommendation", **{"model.dropout": 0.0, **weights, "distill.beta": 0.0})
    manifest = read_manifest(settings.data)
    schedule = make_schedule(settings, manifest)
    pair = assemble_pair(settings, manifest)
    window, first, skip = next(schedule.windows_from(0))
    _, (part,) = next(iter(window_parts(schedule, window, first_step=first, skip=skip)))
    update = next(read_updates(schedule))
    (once,) = update.parts
    assert isinstance(part.examples, Clicks)
    each = each_mention(part.examples, (part.rows, part.texts, part.tokens), pad_id=0)
    assert len(each.buckets[0].input_ids) > 2 * sum(len(b.input_ids) for b in once.buckets)
    found = []
    for batch in (once, each):
        teacher, student = pair(batch)
        losses = joint_losses(teacher, student, batch, settings.distill)
        found.append((losses, gradients(pair, weighted_total(losses, settings.distill.weights))))
    (losses, ours), (others, theirs) = found
    assert set(losses) == settings.distill.losses
    for name, loss in losses.items():
        torch.testing.assert_close(loss, others[name], rtol=1e-5, atol=1e-6)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (1, 3), (3, 2)])
def test_parts_add_up_to_the_update(make_settings: MakeSettings, world_size: int, accumulate: int) -> None:
    """Workers encode a shared news each for itself; its losses must not count twice."""
    settings = make_settings(
        task="recommendation", **{"model.dropout": 0.0, "optimizer.accumulate": accumulate}
    )
    manifest = read_manifest(settings.data)
    pair = assemble_pair(settings, manifest)

    def losses(size: int, settings: TrainSettings) -> dict[str, float]:
        total: dict[str, float] = {}
        for rank in range(size):
            update = next(read_updates(make_schedule(settings, manifest, rank=rank, world_size=size)))
            for part in update.parts:
                teacher, student = pair(part)
                for name, loss in joint_losses(teacher, student, part, settings.distill).items():
                    total[name] = total.get(name, 0.0) + loss.item() * part.weight
        return total

    whole = losses(1, make_settings(task="recommendation", **{"model.dropout": 0.0}))
    assert losses(world_size, settings) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_fewer_workers_than_shares_alter_nothing(make_settings: MakeSettings, size: int) -> None:
    """A group that lost nodes trains on: with the same batches, the same dropout and the same gradients."""
    settings = make_settings(workers=3, batch_size=31, **{"model.dropout": 0.2})
    manifest = read_manifest(settings.data)

    def gradients(size: int) -> dict[str, torch.Tensor]:
        total: dict[str, torch.Tensor] = {}
        for rank in range(size):
            schedule = make_schedule(settings, manifest, rank=rank, world_size=size)
            torch.manual_seed(0)
            learner = build_learner(assemble_pair(settings, manifest), settings, total_steps=9)
            before = {name: p.clone() for name, p in learner.pair.named_parameters()}
            learner.optimizer = torch.optim.SGD(learner.pair.parameters(), lr=1.0)  # type: ignore[assignment]
            learner.optimizer.param_groups[0]["full_lr"] = 1.0
            learner.settings = settings.model_copy(
                update={"distill": settings.distill.model_copy(update={"beta": 0.0})}
            )
            train_step(learner, next(read_updates(schedule)).parts, step=1)
            for name, p in learner.pair.named_parameters():
                total[name] = total.get(name, torch.zeros_like(p)) + (p.detach() - before[name])
        return total

    whole = gradients(1)
    for name, value in gradients(size).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6)


def test_the_loss_falls_on_clicks(make_settings: MakeSettings) -> None:
    """The invented readers click by their interests: both models must learn some of it."""
    settings = make_settings(task="recommendation", epochs=12, **{"model.dropout": 0.0})
    manifest = read_manifest(settings.data)
    schedule = make_schedule(settings, manifest)
    learner = build_learner(assemble_pair(settings, manifest), settings, total_steps=schedule.total_steps)
    found = [train_step(learner, u.parts, step=u.step) for u in read_updates(schedule)]
    for name in ("teacher_task", "student_task"):
        losses = [float(numbers[name]) for numbers in found]
        assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_a_student_alone_computes_no_teacher(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fine-tuning is the baseline of every table: a teacher in it would cost time, or worse, teach."""
    settings = make_settings(task="recommendation", method="finetune")
    manifest = read_manifest(settings.data)
    schedule = make_schedule(settings, manifest)
    learner = build_learner(assemble_pair(settings, manifest), settings, total_steps=schedule.total_steps)
    before = {n: p.clone() for n, p in learner.pair.teacher.state_dict().items()}
    monkeypatch.setattr(learner.pair.teacher, "forward", None)
    for update in islice(read_updates(schedule), 3):
        numbers = train_step(learner, update.parts, step=update.step, statistics=True)
    assert set(numbers) == {"student_task", "total", "learning_rate_factor"}
    assert all(torch.equal(before[n], p) for n, p in learner.pair.teacher.state_dict().items())
    record = train(settings, quiet=True)
    assert set(record.metrics["test"]) == {"student"}
    assert set(record.metrics["parameters"]) == {"student", "top"}


def test_negatives_change_with_the_epoch_and_nothing_else(make_settings: MakeSettings) -> None:
    """Two runs of a seed are equal bit for bit; a second epoch sees other news beside the same clicks."""
    settings = make_settings(task="recommendation", **{"recommendation.npratio": 2})
    schedule = make_schedule(settings, read_manifest(settings.data))

    def drawn(epoch: int) -> set[tuple[int, ...]]:
        found: set[tuple[int, ...]] = set()
        for window in schedule.windows(epoch):
            for _, parts in window_parts(schedule, window, first_step=1, skip=0):
                for part in parts:
                    assert isinstance(part.examples, Clicks)
                    found |= {tuple(row) for row in part.examples.candidates.tolist()}
        return found

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert {row[0] for row in drawn(0)} == {row[0] for row in drawn(1)}


@pytest.fixture(scope="module")
def pair_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small invented retrieval table, prepared with a learned vocabulary."""
    folder = tmp_path_factory.mktemp("pairs")
    tables = synthesize_pairs(folder, pairs=240, words=20, topics=4, seed=3)
    values = {
        "source": [str(table) for table in tables], "teacher": "scratch", "out": str(folder / "shards"),
        "scratch": {"vocabulary": 400}, "max_tokens": 40,
    }  # fmt: skip
    prepare(build_settings(PrepareSettings, values), say=lambda _: None)
    return folder / "shards"


def test_a_retrieval_run_from_end_to_end(make_settings: MakeSettings, pair_shards: Path) -> None:
    """Two towers of shared weights, trained jointly, and the record's numbers found again from files."""
    settings = make_settings(task="retrieval", data=str(pair_shards), epochs=1)
    record = train(settings, quiet=True)
    assert set(record.metrics["test"]) == {"teacher", "student"}
    assert record.metrics["test"]["student"]["rows"] == read_manifest(pair_shards).rows("test", "retrieval")
    assert "user_embedding" not in record.curve[0]["train"]
    found = evaluate(settings.out)
    assert found["student"] == pytest.approx(record.metrics["test"]["student"])
    assert record.data["train_rows"] == read_manifest(pair_shards).examples("train", "retrieval")


def test_a_distilled_student_goes_on(make_settings: MakeSettings, pair_shards: Path, tmp_path: Path) -> None:
    """The paper fine-tunes for retrieval what was distilled on news: encoder and pooling must come along."""
    first = make_settings(task="recommendation", epochs=1)
    train(first, quiet=True)
    student = Path(first.out) / "student"
    tables = sorted(pair_shards.parent.glob("*.tsv"), reverse=True)
    values = {
        "source": [str(table) for table in tables], "teacher": str(student), "out": str(tmp_path / "shards"),
        "max_tokens": 40,
    }  # fmt: skip
    prepare(build_settings(PrepareSettings, values), say=lambda _: None)
    settings = make_settings(
        task="retrieval", method="finetune", teacher=str(student), data=str(tmp_path / "shards"), epochs=1,
        out=str(tmp_path / "second"),
    )  # fmt: skip
    pair = assemble_pair(settings, read_manifest(settings.data))
    encoder, top, _ = load_student(student)
    assert "head.threshold" in pair.top.state_dict()
    for name, weight in top.pooling.state_dict().items():
        assert torch.equal(pair.top.pooling.state_dict()[name], weight)
    for name, weight in encoder.state_dict().items():
        assert torch.equal(pair.student.state_dict()[name], weight)
    assert train(settings, quiet=True).metrics["test"].keys() == {"student"}
    again = make_settings(
        task="recommendation", teacher=str(student), out=str(tmp_path / "third"), **{"student.layers": 1}
    )
    same = assemble_pair(again, read_manifest(again.data)).top.state_dict()
    assert all(torch.equal(same[name], weight) for name, weight in top.state_dict().items())


def test_an_interrupted_recommendation_run_goes_on(make_settings: MakeSettings, tmp_path: Path) -> None:
    """Negatives and order are functions of seed and step: a resume must be bit for bit the unbroken run."""
    whole = make_settings(task="recommendation", out=str(tmp_path / "whole"))
    broken = make_settings(task="recommendation", out=str(tmp_path / "broken"))
    train(whole, quiet=True)

    def stop(entry: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(broken, quiet=True, report=stop)
    train(broken, quiet=True)
    for name in ("model.safetensors", "top.safetensors"):
        assert (tmp_path / "whole" / "student" / name).read_bytes() == (
            tmp_path / "broken" / "student" / name
        ).read_bytes()
