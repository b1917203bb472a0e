"""Several workers without Ray give the weights of one, by every method; a run of method `linear`."""

from __future__ import annotations

import os
import socket
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.multiprocessing.spawn import spawn

import newsbert_ray
from newsbert_ray.config import SettingsError, TrainSettings
from newsbert_ray.data.reading import World, make_schedule, read_updates
from newsbert_ray.data.shards import read_manifest
from newsbert_ray.evaluation import scoring
from newsbert_ray.methods import METHODS
from newsbert_ray.model.encoder import EncoderError
from newsbert_ray.model.saved import load_student
from newsbert_ray.training import worker
from newsbert_ray.training.run import train
from newsbert_ray.training.step import train_step
from newsbert_ray.training.worker import build_worker_learner, with_precision

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
            # Adam divides by the gradient's size and so amplifies rounding noise: with an epsilon of 1e-4 one
            # run is 1.7e-6 off on some processors, with 1e-3 seven times less; in float64 it is 1e-15.
            **{"model.dropout": 0.0, "student.layers": 1, "optimizer.epsilon": 1e-3, "epochs": 1},
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


@pytest.mark.parametrize(("precision", "hardware", "used"), [
    ("fp32", True, "fp32"), ("bf16", False, "bf16"), ("auto", True, "bf16"), ("auto", False, "fp32"),
])  # fmt: skip
def test_precision(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, precision: str, hardware: bool, used: str
) -> None:
    """auto is bf16 where the processor has it. Evaluation and the record have what the run used: many
    evaluations in fp32 would take a good part of a run in bf16."""
    seen = set()
    monkeypatch.setattr(worker, "cpu_has_bf16", lambda: hardware)
    score = scoring.score_models

    def look(*arguments: Any, **values: Any) -> Any:
        seen.add(torch.is_autocast_enabled("cpu"))
        return score(*arguments, **values)

    monkeypatch.setattr(worker, "score_models", look)
    record = train(make_settings(precision=precision, steps=2), quiet=True)
    assert seen == {used == "bf16"}
    assert record.settings["precision"] == used


def test_auto_precision_is_rank_zeros(make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers on different processors compute in the same numbers, and nothing was measured on a GPU."""
    settings = make_settings(precision="auto")
    monkeypatch.setattr(worker, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(World, "broadcast", lambda *_: False)
    assert with_precision(settings, World(1, 2)).precision == "fp32"
    monkeypatch.undo()
    monkeypatch.setattr(worker, "cpu_has_bf16", lambda: True)
    assert with_precision(settings, World(device=torch.device("cuda"))).precision == "fp32"


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


@pytest.fixture
def linear_run(make_settings: MakeSettings) -> Path:
    settings = make_settings(method="linear", **{"student.layers": 0})
    newsbert_ray.train(settings, quiet=True)
    return Path(settings.out)


def test_a_linear_run_is_a_run(linear_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is recorded, evaluated, predicts and is reported like the others."""
    run = linear_run
    record = newsbert_ray.read_record(run)
    best = max(entry["validation"]["student"]["accuracy"] for entry in record.curve)
    assert record.metrics["validation"]["student"]["accuracy"] == best > 0.3
    evaluated = newsbert_ray.evaluate(run)
    assert evaluated["student"] == record.metrics["test"]["student"]  # type: ignore[call-overload]
    rows: Any = newsbert_ray.evaluate(run, by_topic=True)
    assert sum(row.titles for row in rows) == record.metrics["test"]["student"]["rows"]
    model = newsbert_ray.load(run)
    (first,) = model.predict(["goal match team"], top=3)
    assert len(first.topics) == 3
    assert 0 < first.probability <= 1
    with pytest.raises(SettingsError, match="no embeddings"):
        model.embed(["goal"])
    with pytest.raises(EncoderError, match="no encoder and no embeddings"):
        newsbert_ray.export(run, to="hf", out=run / "export")
    texts = run / "texts.jsonl"
    texts.write_text('{"id": "1", "text": "Rain"}\n', encoding="utf-8")
    with pytest.raises(EncoderError, match="no encoder and no embeddings"):
        newsbert_ray.embed(run, input=[texts], out=run / "vectors", workers=0)
    newsbert_ray.predict(run, input=texts, out=run / "predicted.jsonl")
    assert '"probability"' in (run / "predicted.jsonl").read_text(encoding="utf-8")
    newsbert_ray.report([run], out=run / "report")
    assert "linear SVM" in (run / "report" / "report.md").read_text(encoding="utf-8")


def test_train_rows_and_reports(make_settings: MakeSettings) -> None:
    """It learns from as many titles as another method would, and reports each strength."""
    entries: list[dict[str, Any]] = []
    settings = make_settings(method="linear", train_rows=100, **{"student.layers": 0})
    record = newsbert_ray.train(settings, report=entries.append, quiet=True)
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5]
    assert record.data["train_rows"] == 100
    assert newsbert_ray.train(settings, quiet=True) == record  # finished


@pytest.mark.parametrize("wrong", [{"task": "recommendation"}, {"distill.weights.soft_labels": 1.0}])
def test_it_learns_topics_from_labels_only(make_settings: MakeSettings, wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="topics from labels only"):
        make_settings(method="linear", **{"student.layers": 0}, **wrong)
