"""Fixtures that tests of several packages share: prepared shards, run settings, records, an S3 bucket."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import settings

from newsbert_ray import ray_session
from newsbert_ray.config import PrepareSettings, TrainSettings, build_settings, merge
from newsbert_ray.data.batches import Batch, Bucket, Topics
from newsbert_ray.data.prepare import prepare
from newsbert_ray.data.synthetic import synthesize, synthesize_pairs
from newsbert_ray.record import RunRecord

if TYPE_CHECKING:
    from moto.server import ThreadedMotoServer

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
torch.set_num_threads(1)  # tests run side by side, one process a core

MakeRecord = Callable[..., RunRecord]
MakeSettings = Callable[..., TrainSettings]


def topic_batch(ids: torch.Tensor, mask: torch.Tensor | None = None) -> Batch:
    """A batch of titles, token ids (B, L), in one bucket, all of topic 0."""
    attention_mask = torch.ones_like(ids) if mask is None else mask
    bucket, labels = Bucket(ids, attention_mask), torch.zeros(len(ids), dtype=torch.int64)
    return Batch((bucket,), Topics(labels), len(ids), len(ids), int(attention_mask.sum()))


def change_json(path: Path, **changes: Any) -> None:
    """Change values of a JSON file, as an earlier version would have written it: without checksums."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if k not in ("check", "files")}), "utf-8")


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c() -> None:
    """A shell lets what it starts with `&` ignore Ctrl-C, which some tests send."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_ray_without_its_mark(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make quick` must stay quick: a test that starts Ray has the mark."""
    if request.node.get_closest_marker("ray") is None:
        monkeypatch.setattr(
            ray_session, "_init", lambda *_, **__: pytest.fail("mark it with pytest.mark.ray")
        )


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a small synthetic corpus with a learned vocabulary."""
    folder = tmp_path_factory.mktemp("corpus")
    sources = synthesize(folder / "mind", news=320, users=10, topics=4, seed=3)
    values = {
        "source": [str(source) for source in sources],
        "teacher": "scratch",
        "out": str(folder / "shards"),
        "workers": 0,
        "scratch": {"vocabulary": 400},
    }
    prepare(build_settings(PrepareSettings, values), say=lambda _: None)
    return folder / "shards"


@pytest.fixture(scope="session")
def pair_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic retrieval table, prepared with a learned vocabulary."""
    folder = tmp_path_factory.mktemp("pairs")
    tables = synthesize_pairs(folder, pairs=240, words=20, topics=4, seed=3)
    values = {
        "source": [str(table) for table in tables], "teacher": "scratch", "out": str(folder / "shards"),
        "scratch": {"vocabulary": 400}, "max_tokens": 40,
    }  # fmt: skip
    prepare(build_settings(PrepareSettings, values), say=lambda _: None)
    return folder / "shards"


@pytest.fixture
def make_settings(shards: Path, tmp_path: Path) -> MakeSettings:
    """Settings of a short run in tmp_path/run: make_settings(**{"distill.beta": 0.2})."""

    def make(**values: Any) -> TrainSettings:
        small = {
            "data": str(shards),
            "teacher": "scratch",
            "out": str(tmp_path / "run"),
            "scratch": {"layers": 4, "hidden": 16, "heads": 2, "feed_forward": 32},
            "model.query_size": 8,
            "student.layers": 2,
            "batch_size": 32,
            "learning_rate": 2e-3,
            "precision": "fp32",
            "optimizer": {"decay": "none", "warmup_share": 0.0},
            "epochs": 2,
            "threads": 1,
            "log_every": 5,
        }
        return build_settings(TrainSettings, merge(small, values))

    return make


def _ranking_metrics(task: str, auc: float) -> dict[str, float]:
    """Invented ranking metrics that depend on `auc`, each with a standard error."""
    metrics = {"auc": auc}
    if task == "recommendation":
        metrics |= {"mrr": auc - 0.32, "ndcg5": auc - 0.3, "ndcg10": auc - 0.24}
    errors = {f"{name}_error": 0.008 for name in metrics}
    return {**metrics, **errors, "rows": 397.0, "left_out": 3.0}


@pytest.fixture
def make_record() -> MakeRecord:
    """An invented record: make_record(accuracy=0.7, seed=1, **{"distill.beta": 0.2}).

    With task="recommendation" it has that task's metrics, with method="finetune" no teacher, with
    labelled=False no metrics of the test split.
    """

    def make(
        *,
        accuracy: float = 0.7,
        macro_f1: float = 0.5,
        teacher_accuracy: float = 0.8,
        auc: float = 0.62,
        teacher_auc: float = 0.66,
        labelled: bool = True,
        seed: int = 0,
        epochs: int = 2,
        described: Mapping[str, Any] | None = None,
        **values: Any,
    ) -> RunRecord:
        settings = merge(
            {"data": "shards", "teacher": "scratch", "out": f"runs/{seed}", "seed": seed}, values
        )
        task = settings.get("task", "topics")
        alone = build_settings(TrainSettings, settings).distill.alone
        models = ("student",) if alone else ("student", "teacher")

        def scores(share: float) -> dict[str, Any]:
            """Both models' metrics; `share` is the progress of the first metric."""
            metrics = {
                "student": {"accuracy": accuracy * share, "macro_f1": macro_f1},
                "teacher": {"accuracy": teacher_accuracy * share, "macro_f1": teacher_accuracy},
            }
            if task != "topics":
                values = {"student": auc * share, "teacher": teacher_auc * share}
                metrics = {model: _ranking_metrics(task, value) for model, value in values.items()}
            return {model: metrics[model] for model in models}

        curve = [
            {
                "step": 10 * epoch,
                "epoch": float(epoch),
                "validation": scores(epoch / epochs),
                "train": {"total": 1.0 / epoch},
            }
            for epoch in range(1, epochs + 1)
        ]
        test = scores(1.0) if labelled else {}
        data = {"name": "synthetic_train", "fingerprint": "ab12cd34ef", "train_rows": 1800, "test_rows": 400}
        return RunRecord(
            settings=build_settings(TrainSettings, settings).model_dump(),
            seed=seed,
            versions={"python": "3.11.7", "torch": "2.13.0"},
            hardware={"processor": "some processor", "cores": 2, "device": "cpu"},
            seconds={"train": 30.0, "evaluate": 3.0, "total": 33.0},
            layer_map=[[1, 2], [3, 4]],
            metrics={"test": test, "validation": curve[-1]["validation"]},
            curve=curve,
            data=dict(data if described is None else described),
            steps=10 * epochs,
            titles_per_second=800.0,
        )

    return make


@dataclass
class S3:
    """An S3 bucket on a local server; it keeps its content while the server is stopped."""

    url: str
    server: ThreadedMotoServer
    stopped: bool = False

    @property
    def files(self) -> Any:
        """pyarrow's file system, and the bucket's name."""
        from pyarrow.fs import FileSystem

        return FileSystem.from_uri(self.url)

    def stop(self) -> None:
        """Simulate an outage."""
        self.server.stop()
        self.stopped = True

    def start(self) -> None:
        """End the outage; the address stays the same."""
        self.server.start()
        self.stopped = False


@pytest.fixture(scope="session")
def s3_server() -> Iterator[ThreadedMotoServer]:
    """A local S3 server for all tests of a process: to stop one takes half a second."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    server._port = server.get_host_and_port()[1]  # so that a restart uses the same address
    yield server
    server.stop()


@pytest.fixture
def bucket(s3_server: ThreadedMotoServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """An empty bucket on a local S3 server, and a cache folder for this test."""
    from pyarrow.fs import FileSystem

    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    host, port = s3_server.get_host_and_port()
    values = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NEWSBERT_CACHE": str(tmp_path / "cache"),
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{tmp_path.name}".lower().replace("_", "-")[:60].strip("-")
    FileSystem.from_uri(f"s3://{name}?allow_bucket_creation=true")[0].create_dir(name)
    s3 = S3(f"s3://{name}", s3_server)
    yield s3
    if s3.stopped:
        s3.start()
