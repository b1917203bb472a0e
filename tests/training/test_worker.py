"""Several workers without Ray: every method gives the weights of one worker."""

from __future__ import annotations

import os
import socket
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from newsbert_ray.config import TrainSettings
from newsbert_ray.data.reading import World, make_schedule, read_updates
from newsbert_ray.data.shards import read_manifest
from newsbert_ray.evaluation import scoring
from newsbert_ray.methods import METHODS
from newsbert_ray.model.saved import load_student
from newsbert_ray.training import worker
from newsbert_ray.training.run import train
from newsbert_ray.training.step import train_step
from newsbert_ray.training.worker import build_worker_learner

if TYPE_CHECKING:
    from tests.conftest import MakeSettings

STEPS = 4


def train_steps(settings: TrainSettings, world: World) -> dict[str, torch.Tensor]:
    """Weights after some updates, half of them of each stage."""
    manifest = read_manifest(settings.data)
    schedule = make_schedule(settings, manifest, world)
    learner = build_worker_learner(settings, schedule, world, stand_in=True)
    learner.total_steps = STEPS
    for update in islice(read_updates(schedule), STEPS):
        train_step(learner, update.parts, step=update.step)
    return {name: value.clone() for name, value in learner.pair.state_dict().items()}


def work(rank: int, size: int, port: int, values: list[dict[str, Any]], folder: str) -> None:
    """One of `size` processes: the weights of each run into `folder`."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    for index, one in enumerate(values):
        weights = train_steps(TrainSettings.model_validate(one), World(rank, size))
        if rank == 0:
            torch.save(weights, f"{folder}/{size}-{index}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_every_method_gives_the_weights_of_one_worker(
    make_settings: MakeSettings, tmp_path: Path, size: int
) -> None:
    """DDP must know which parameters a stage's losses use; else it stops at the second update."""
    runs: list[dict[str, Any]] = [{"method": method} for method in METHODS if method != "linear"]
    runs += [
        {"train_rows": 60, "unlabelled_share": 0.5, "task": task} for task in ("topics", "recommendation")
    ]
    runs += [{"distill.momentum": "update"}, {"distill.momentum": "rescaled", "model.trainable": 1}]
    settings = [
        make_settings(
            batch_size=30,
            workers=size,
            # Adam divides by the gradient's size: with its usual epsilon rounding noise makes a whole step.
            **{"model.dropout": 0.0, "student.layers": 1, "optimizer.epsilon": 1e-4, "epochs": 1},
            **values,
        )
        for values in runs
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = [one.model_dump() for one in settings]
    spawn(work, (size, port, values, str(tmp_path)), nprocs=size)  # type: ignore[no-untyped-call]
    for index, one in enumerate(settings):
        method = one.method
        alone = train_steps(one.model_copy(update={"workers": 1}), World())
        together = torch.load(tmp_path / f"{size}-{index}.pt", weights_only=True)
        assert alone.keys() == together.keys()
        for name, value in alone.items():
            torch.testing.assert_close(together[name], value, rtol=0, atol=1e-6, msg=f"{method}: {name}")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_has_the_runs_precision(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Many evaluations in fp32 would take a good part of a run in bf16."""
    seen = set()
    score = scoring.score_models

    def look(*arguments: Any, **values: Any) -> Any:
        seen.add(torch.is_autocast_enabled("cpu"))
        return score(*arguments, **values)

    monkeypatch.setattr(worker, "score_models", look)
    train(make_settings(precision=precision, steps=2), quiet=True)
    assert seen == {precision == "bf16"}


def test_tf32_is_set_for_the_run(make_settings: MakeSettings) -> None:
    """It is a switch of the process: the next trial in it must get its own."""
    for precision, expected in (("tf32", "high"), ("fp32", "highest")):
        settings = make_settings(precision=precision)
        schedule = make_schedule(settings, read_manifest(settings.data))
        build_worker_learner(settings, schedule, World())
        assert torch.get_float32_matmul_precision() == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_layers_compute_the_same(make_settings: MakeSettings) -> None:
    """In a whole run, with evaluations and export; the compiler may round otherwise, not more."""
    curves = []
    for compiled in (False, True):
        out = f"{make_settings().out}-{compiled}"
        settings = make_settings(
            compile=compiled, out=out, steps=12, evaluate_every=6, **{"model.dropout": 0.0}
        )
        record = train(settings, quiet=True)
        assert load_student(Path(out) / "student")
        curves.append([entry["train"] for entry in record.curve])
    for plain, compiled_losses in zip(*curves, strict=True):
        assert compiled_losses == pytest.approx(plain, rel=1e-4)
