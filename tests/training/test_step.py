"""One update: identities that must hold, and the committed loss trace."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from newsbert_ray.config import LossWeights, TrainSettings
from newsbert_ray.data.examples import Clicks
from newsbert_ray.data.reading import Update, World, make_schedule, read_updates, training_texts, window_parts
from newsbert_ray.data.shards import read_manifest
from newsbert_ray.distill.joint import joint_losses
from newsbert_ray.distill.losses import weighted_total
from newsbert_ray.methods import LOSSES, METHODS, TASKS
from newsbert_ray.model.assemble import assemble_pair
from newsbert_ray.model.pair import Pair
from newsbert_ray.training.step import (
    Learner,
    SparseEmbeddingGradients,
    build_learner,
    learning_rate_factor,
    mean_rows,
    train_step,
)
from tests.benchmarks.bench_recommend import each_mention
from tests.conftest import MakeSettings
from tests.waits import Waits

TRACE = [
    4.11992,
    4.06997,
    4.03163,
    4.05255,
    3.85758,
    4.08754,
    3.93314,
    3.81026,
    3.82362,
    3.76472,
    3.65652,
    3.53026,
]


class FrozenAdam(torch.optim.Adam):
    """Leaves parameters and gradients unchanged."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


def start(
    settings: TrainSettings, *, rank: int = 0, world_size: int = 1, steps: int = 12
) -> tuple[Learner, list[Update]]:
    """A fresh learner and its first updates."""
    manifest = read_manifest(settings.data)
    schedule = make_schedule(settings, manifest, World(rank, world_size))
    learner = build_learner(assemble_pair(settings, manifest), settings, total_steps=schedule.total_steps)
    return learner, list(islice(read_updates(schedule), steps))


def run(settings: TrainSettings) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and total losses after 12 updates."""
    learner, updates = start(settings)
    losses = [float(train_step(learner, u.parts, step=u.step)["total"]) for u in updates]
    return dict(learner.pair.state_dict()), losses


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two sets of weights are equal bit for bit."""
    return all(torch.equal(first[name], second[name]) for name in first)


def test_two_runs_are_equal_bit_for_bit(make_settings: MakeSettings) -> None:
    """Otherwise no resume is exact and no trial can be repeated."""
    first, second = run(make_settings()), run(make_settings())
    assert equal(first[0], second[0])
    assert first[1] == second[1]
    assert not equal(first[0], run(make_settings(seed=1))[0])


def test_beta_zero_is_no_momentum(make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """beta = 0 must equal plain joint training bit for bit, and another beta must differ."""
    zero = run(make_settings(**{"distill.beta": 0.0}))[0]
    some = run(make_settings(**{"distill.beta": 0.2}))[0]
    monkeypatch.setattr("newsbert_ray.training.step.apply_momentum", lambda *_, **__: None)
    without = run(make_settings(**{"distill.beta": 0.2}))[0]
    assert equal(zero, without)
    assert not equal(some, without)


@pytest.mark.parametrize("momentum", ["gradient", "rescaled", "update"])
def test_momentum_leaves_the_teacher_alone(make_settings: MakeSettings, momentum: str) -> None:
    """The teacher's update must not depend on beta, in any form of momentum."""
    # From the second update on the teacher feels beta through the shared top, which moves with the student.
    values = {"distill.momentum": momentum}
    first = [start(make_settings(**values, **{"distill.beta": beta})) for beta in (0.0, 0.3)]
    for learner, updates in first:
        train_step(learner, updates[0].parts, step=1)
    zero, some = (learner.pair for learner, _ in first)
    assert equal(dict(zero.teacher.state_dict()), dict(some.teacher.state_dict()))
    moved, still = dict(some.student.state_dict()), dict(zero.student.state_dict())
    changed = {name for name, value in moved.items() if not torch.equal(value, still[name])}
    assert changed
    assert all("layer" in name for name in changed)


def test_accumulated_parts_are_the_whole_batch(make_settings: MakeSettings) -> None:
    """Accumulation saves memory and must not change the update (no dropout, fp32)."""
    whole, losses = run(make_settings(**{"model.dropout": 0.0}))
    parts, part_losses = run(make_settings(**{"model.dropout": 0.0, "optimizer.accumulate": 3}))
    assert part_losses == pytest.approx(losses, rel=1e-5)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=2e-5)


def test_workers_gradients_add_up_to_the_batchs(make_settings: MakeSettings) -> None:
    """Two workers' summed gradients equal one worker's to 1e-6, also for unequal shares."""
    settings = make_settings(**{"model.dropout": 0.0, "batch_size": 31})

    def gradients(rank: int, world_size: int) -> dict[str, Tensor]:
        learner, updates = start(settings, rank=rank, world_size=world_size)
        learner.optimizer = FrozenAdam(learner.optimizer.param_groups)
        learner.settings = settings.model_copy(
            update={"distill": settings.distill.model_copy(update={"beta": 0.0})}
        )
        train_step(learner, updates[0].parts, step=1)
        return {n: p.grad for n, p in learner.pair.named_parameters() if p.grad is not None}

    whole, first, second = gradients(0, 1), gradients(0, 2), gradients(1, 2)
    for name, gradient in whole.items():
        torch.testing.assert_close(first[name] + second[name], gradient, rtol=1e-5, atol=1e-6)


def test_loss_trace(make_settings: MakeSettings) -> None:
    """A refactoring without intended effect must not change these losses."""
    losses = run(make_settings(**{"model.dropout": 0.0}))[1]
    assert losses == pytest.approx(TRACE, rel=1e-5)


def test_loss_falls(make_settings: MakeSettings) -> None:
    """A sign error anywhere shows here first."""
    learner, updates = start(make_settings(epochs=12), steps=100)
    losses = [train_step(learner, u.parts, step=u.step) for u in updates]
    for name in ("teacher_task", "student_task"):
        first, last = (sum(float(one[name]) for one in part) for part in (losses[:5], losses[-5:]))
        assert last < 0.7 * first


def test_clipping_bounds_the_mixed_gradient(make_settings: MakeSettings) -> None:
    """The bound applies to the gradient that Adam receives, after mixing."""
    learner, updates = start(make_settings(**{"optimizer.clip_norm": 0.01}))
    train_step(learner, updates[0].parts, step=1)
    norms = [p.grad.norm() for p in learner.pair.parameters() if p.grad is not None]
    assert float(torch.stack(norms).norm()) == pytest.approx(0.01, rel=1e-4)


def test_each_model_has_its_own_rate(make_settings: MakeSettings) -> None:
    """A teacher at its student's high learning rate is over-trained."""
    rates = {"optimizer.teacher_learning_rate": 1e-12, "optimizer.top_learning_rate": 1e-12}
    learner, updates = start(make_settings(**rates))
    before = {n: p.detach().clone() for n, p in learner.pair.named_parameters()}
    train_step(learner, updates[0].parts, step=1)
    moved = {
        n.split(".")[0] for n, p in learner.pair.named_parameters() if (p - before[n]).abs().max() > 1e-6
    }
    assert moved == {"student"}


@pytest.mark.parametrize(
    ("decay", "by_hand"),
    [
        ("none", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, None, 0.5, None]),
    ],
)
def test_schedule_by_hand(make_settings: MakeSettings, decay: str, by_hand: list[float | None]) -> None:
    """Warm-up over the first third of 6 steps, then the decay; the last step still learns."""
    settings = make_settings(**{"optimizer.warmup_share": 1 / 3, "optimizer.decay": decay})
    found = [learning_rate_factor(step, settings, total_steps=6) for step in range(1, 7)]
    for value, expected in zip(found, by_hand, strict=True):
        if expected is not None:
            assert value == pytest.approx(expected)
    assert found[-1] > 0


def test_statistics_are_given_on_request(make_settings: MakeSettings) -> None:
    """They show how far momentum can turn an update."""
    learner, updates = start(make_settings())
    found = train_step(learner, updates[0].parts, step=1, statistics=True)
    assert {"block_1_ratio", "block_1_cosine", "block_2_ratio", "block_2_cosine"} <= set(found)
    assert -1.0 <= float(found["block_1_cosine"]) <= 1.0


@pytest.mark.parametrize(
    "weights",
    [{"teacher_task": 0.0}, {"student_task": 0.0, "soft_labels": 0.0, "embedding": 0.0, "hidden": 0.0}],
)
def test_losses_may_be_left_out(make_settings: MakeSettings, weights: dict[str, float]) -> None:
    """Every accepted ablation must run; a teacher without a loss stays unchanged."""
    learner, updates = start(make_settings(**{"distill.beta": 0.0, "distill.weights": weights}))
    before = {name: value.clone() for name, value in learner.pair.teacher.state_dict().items()}
    train_step(learner, updates[0].parts, step=1, statistics=True)
    assert equal(before, dict(learner.pair.teacher.state_dict())) == ("teacher_task" in weights)


def test_bf16_stays_near_fp32(make_settings: MakeSettings) -> None:
    """Mixed precision may round only: losses agree to one percent over 12 updates."""
    exact = run(make_settings(**{"model.dropout": 0.0}))[1]
    mixed = run(make_settings(**{"model.dropout": 0.0, "precision": "bf16"}))[1]
    assert mixed == pytest.approx(exact, rel=1e-2)
    assert mixed != exact
    learner, updates = start(make_settings(precision="bf16"))
    found = train_step(learner, updates[0].parts, step=1)
    assert {v.dtype for v in found.values() if isinstance(v, Tensor)} == {torch.float32}


def test_bf16_casts_each_weight_once_a_step(make_settings: MakeSettings) -> None:
    """Casting again for every bucket would cost a launch for each weight."""

    class Casts(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ == "_to_copy" and kwargs.get("dtype") == torch.bfloat16:
                casts[args[0].data_ptr()] += 1
            return func(*args, **(kwargs or {}))

    settings = make_settings(task="recommendation", precision="bf16", token_budget=512)
    learner, updates = start(settings)
    weights = {p.data_ptr(): n for n, p in learner.pair.named_parameters()}
    casts: Counter[int] = Counter()
    (batch,) = updates[0].parts
    assert len(batch.buckets) > 2
    with Casts(), torch.enable_grad():  # type: ignore[no-untyped-call, unused-ignore]
        learner.model(batch, settings.distill.weights)
    counts = {name: casts[address] for address, name in weights.items() if address in casts}
    assert len(counts) > 40
    assert set(counts.values()) == {1}


@pytest.mark.parametrize("task", ["topics", "recommendation"])
def test_bf16_on_a_cpu_leaves_out_fused_attention(make_settings: MakeSettings, task: str) -> None:
    """Its backward took a third of a step, ten times as long as in fp32."""
    learner, updates = start(make_settings(task=task, precision="bf16", **{"model.dropout": 0.0}))
    with torch.profiler.profile() as profile:
        train_step(learner, updates[0].parts, step=1)
    names = {event.name for event in profile.events() or ()}
    assert "aten::bmm" in names
    assert not [name for name in names if "flash" in name]


def test_part_weight_zero_adds_nothing(make_settings: MakeSettings) -> None:
    """A part that only keeps a worker in step must not be counted."""
    learner, updates = start(make_settings(**{"model.dropout": 0.0}))
    batch = replace(updates[0].parts[0], weight=0.0)
    found = train_step(learner, [batch], step=1)
    assert float(found["total"]) == 0.0
    assert all(float(p.grad.abs().max()) == 0.0 for p in learner.pair.parameters() if p.grad is not None)


def gradients(pair: Pair, total: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss, by parameter."""
    pair.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in pair.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("losses_of", ["newsbert", "the other methods"])
def test_encoding_once_is_the_same_mathematics(make_settings: MakeSettings, losses_of: str) -> None:
    """Losses and gradients must equal those of every mention encoded separately."""
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
    """Workers may encode the same news; its losses must count once."""
    settings = make_settings(
        task="recommendation", **{"model.dropout": 0.0, "optimizer.accumulate": accumulate}
    )
    manifest = read_manifest(settings.data)
    pair = assemble_pair(settings, manifest)

    def losses(size: int, settings: TrainSettings) -> dict[str, float]:
        total: dict[str, float] = {}
        for rank in range(size):
            update = next(read_updates(make_schedule(settings, manifest, World(rank, size))))
            for part in update.parts:
                teacher, student = pair(part)
                for name, loss in joint_losses(teacher, student, part, settings.distill).items():
                    total[name] = total.get(name, 0.0) + loss.item() * part.weight
        return total

    whole = losses(1, make_settings(task="recommendation", **{"model.dropout": 0.0}))
    assert losses(world_size, settings) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_fewer_workers_than_shares_alter_nothing(make_settings: MakeSettings, size: int) -> None:
    """A group that lost nodes keeps the same batches, dropout and gradients."""
    settings = make_settings(workers=3, batch_size=31, **{"model.dropout": 0.2})
    manifest = read_manifest(settings.data)

    def gradients(size: int) -> dict[str, torch.Tensor]:
        total: dict[str, torch.Tensor] = {}
        for rank in range(size):
            schedule = make_schedule(settings, manifest, World(rank, size))
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
    """Synthetic users click by their interests: both models must learn that."""
    settings = make_settings(task="recommendation", epochs=12, **{"model.dropout": 0.0})
    manifest = read_manifest(settings.data)
    schedule = make_schedule(settings, manifest)
    learner = build_learner(assemble_pair(settings, manifest), settings, total_steps=schedule.total_steps)
    found = [train_step(learner, u.parts, step=u.step) for u in read_updates(schedule)]
    for name in ("teacher_task", "student_task"):
        losses = [float(numbers[name]) for numbers in found]
        assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_word_gradients_equal_autograds_dense_ones(make_settings: MakeSettings) -> None:
    """Touching only a batch's rows must give Adam the gradient that autograd would."""
    settings = make_settings()
    learner, updates = start(settings)
    manifest = read_manifest(settings.data)
    dense = build_learner(assemble_pair(settings, manifest), settings, total_steps=12)
    for table in dense.sparse_embedding.embeddings:
        table.sparse = False
    dense.sparse_embedding = SparseEmbeddingGradients([])
    for update in updates:
        train_step(learner, update.parts, step=update.step)
        train_step(dense, update.parts, step=update.step)
    for a, b in zip(learner.pair.parameters(), dense.pair.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("values", [
    {},
    {"optimizer.clip_norm": 0.5},
    {"method": "finetune", "student.layers": 0},
    {"unlabelled_share": 0.5, "train_rows": 60},
])  # fmt: skip
def test_adam_of_the_corpus_words_alone(make_settings: MakeSettings, values: dict[str, Any]) -> None:
    """The other words' gradients are zero, so that nothing changes but the time. Saved weights have the
    tokeniser's order, and a loaded model computes the same."""
    settings = make_settings(**{"model.dropout": 0.0}, **values)
    manifest = read_manifest(settings.data)
    schedule = make_schedule(settings, manifest)
    words = training_texts(schedule).words(manifest.tokenizer.pad_id)
    alone, whole = (
        build_learner(assemble_pair(settings, manifest), settings, total_steps=9, words=each)
        for each in (words, None)
    )
    updates = list(islice(read_updates(schedule), 4))
    before = {name: value.clone() for name, value in whole.pair.state_dict().items()}
    for name, value in alone.pair.state_dict().items():
        assert torch.equal(value, before[name])
    for update in updates:
        numbers = [train_step(one, update.parts, step=update.step) for one in (alone, whole)]
        torch.testing.assert_close(*(one["total"] for one in numbers), rtol=1e-5, atol=0)
    after = alone.pair.state_dict()
    for name, value in whole.pair.state_dict().items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)
    sizes = {len(p) for group in alone.optimizer.param_groups for p in group["params"] if p.ndim}
    table = alone.sparse_embedding.embeddings[0].weight
    assert len(words) < len(table)
    assert len(words) in sizes
    assert len(table) not in sizes
    loaded = build_learner(assemble_pair(settings, manifest), settings, total_steps=9)
    loaded.pair.load_state_dict(after)
    totals = [train_step(one, updates[0].parts, step=1)["total"] for one in (alone, loaded)]
    torch.testing.assert_close(*totals, rtol=1e-6, atol=0)


@pytest.mark.parametrize("padding", [None, 1, 3])
def test_padding_among_the_corpus_words_or_not(padding: int | None) -> None:
    """Some encoders pad with another id than the tokeniser; that of padding alone does not learn."""
    embedding = torch.nn.Embedding(6, 2, padding_idx=padding)
    gradients = SparseEmbeddingGradients([embedding], words=np.array([0, 3, 5]))
    before = embedding.state_dict()["weight"].clone()
    ids = torch.tensor([[5, 3, 3]])
    assert torch.equal(embedding(ids), before[ids])
    embedding(ids).sum().backward()
    gradients.gather()
    grad = gradients.learned(embedding.weight).grad
    assert grad is not None
    assert grad.tolist() == [[0, 0], [0, 0] if padding == 3 else [2, 2], [1, 1]]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "linear"])
def test_a_step_does_not_wait_for_the_device(
    make_settings: MakeSettings, pair_shards: Path, method: str, task: str
) -> None:
    """A wait leaves a GPU without work. Both stages of a method, bf16 and clipping are in it."""
    more = {"data": str(pair_shards)} if task == "retrieval" else {}
    common = {"student.layers": 1, "optimizer.clip_norm": 1.0, "precision": "bf16"}
    settings = make_settings(method=method, task=task, **common, **more)
    schedule = make_schedule(settings, read_manifest(settings.data))
    pair = assemble_pair(settings, schedule.manifest, stand_in=True)
    learner = build_learner(pair, settings, total_steps=2)
    first, second = islice(read_updates(schedule), 2)
    train_step(learner, first.parts, step=1)
    with Waits() as waits:
        train_step(learner, first.parts, step=1)
        train_step(learner, second.parts, step=2)
    assert not waits.count


def test_workers_of_gpus_exchange_without_a_wait(tmp_path: Path) -> None:
    """The count of different rows would be one; both forms must give the same gradient."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        touched, rows = torch.tensor([4, 1, 4]), torch.randn(3, 2)
        with Waits() as waits:
            found = mean_rows(touched, rows, world_size=1, merge=False)
        merged = mean_rows(touched, rows, world_size=1)
    finally:
        torch.distributed.destroy_process_group()
    assert not waits.count
    dense, others = (torch.zeros(6, 2).index_add_(0, *pair) for pair in (found, merged))
    torch.testing.assert_close(dense, others)


def test_a_wait_is_counted() -> None:
    """The test above must fail when a wait comes back."""
    values = torch.ones(3)
    with Waits() as waits:
        values.sum().item()
        values[values > 0]
        values.to("meta")
    assert sum(waits.count.values()) >= 3


def test_an_item_that_is_put_back_is_counted(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same, inside a step."""
    learner, updates = start(make_settings())

    def total(losses: dict[str, Tensor], weights: LossWeights) -> Tensor:
        assert all(loss.item() >= 0 for loss in losses.values())
        return weighted_total(losses, weights)

    monkeypatch.setattr("newsbert_ray.training.step.weighted_total", total)
    with Waits() as waits:
        train_step(learner, updates[0].parts, step=1)
    assert waits.count["_local_scalar_dense"] >= 5


def test_a_learned_map_computes_in_fp32(make_settings: MakeSettings) -> None:
    """TinyBERT's losses compare its result; bf16 would round them."""
    learner, updates = start(make_settings(method="finetune", precision="bf16"))
    pair = learner.pair
    pair.state_map = torch.nn.Linear(16, 24)
    with torch.autocast("cpu", torch.bfloat16):
        _, student = pair(updates[0].parts[0])
    assert student.mapped_states is not None
    expected = torch.nn.functional.linear(student.hidden_states[0][1], *pair.state_map.parameters())
    assert torch.equal(student.mapped_states[0][1], expected)
    assert expected.dtype == torch.float32
