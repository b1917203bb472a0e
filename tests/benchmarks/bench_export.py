"""Quality and speed of a topics run's student exported to ONNX (model.onnx, model_int8.onnx).

    python -m tests.benchmarks.bench_export --run RUN --data SHARDS

The baseline is the student in PyTorch. All three read every test title in the same batches of one length, in
turns. Prints JSON lines: metrics in percent, points relative to PyTorch, titles/s relative to PyTorch,
megabytes of the file.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch

from newsbert_ray.config import TrainSettings, build_settings
from newsbert_ray.data.batches import Topics
from newsbert_ray.data.reading import SplitData
from newsbert_ray.data.shards import read_manifest
from newsbert_ray.evaluation.metrics import topic_metrics
from newsbert_ray.model.heads import TopicHead
from newsbert_ray.serving.export import export
from newsbert_ray.serving.predictor import Student, read_run
from tests.benchmarks.subject import add_subject, finished_run, say

Arrays = npt.NDArray[Any]
Read = Callable[[Arrays, Arrays], Arrays]
"""Token ids and mask (B, L) -> logits (B, topics)."""
_BATCH = 64


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_subject(parser)
    parser.add_argument("--run", help="a finished topics run; a short one over the subject by default")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    run = finished_run(options.run, options)
    torch.set_num_threads(options.threads)
    record, folder = read_run(run)
    student = Student.read(folder)
    data = options.data or build_settings(TrainSettings, record.settings).data
    manifest = read_manifest(data)
    topics = len(manifest.labels)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "onnx"
        export(run, to="onnx", out=folder, int8=True)
        reads = {"newsbert_ray": _own(student)}
        reads |= {part: _onnx(folder / part, options.threads) for part in ("model.onnx", "model_int8.onnx")}
        confusions = {part: np.zeros((topics, topics), np.int64) for part in reads}
        seconds = dict.fromkeys(reads, 0.0)
        for batch in SplitData(Path(data), manifest, "test").batches(_BATCH):
            assert isinstance(batch.target, Topics)
            labels = batch.target.labels.numpy()
            for part, read in reads.items():
                began = time.perf_counter()
                logits_parts = [read(b.input_ids.numpy(), b.attention_mask.numpy()) for b in batch.buckets]
                seconds[part] += time.perf_counter() - began
                np.add.at(confusions[part], (labels, np.concatenate(logits_parts).argmax(1)), 1)
        sizes = {part: (folder / part).stat().st_size / 1e6 for part in reads if part.endswith(".onnx")}
        external = folder / "model.onnx.data"
        if external.is_file():
            sizes["model.onnx"] += external.stat().st_size / 1e6
    first = topic_metrics(confusions["newsbert_ray"])
    for part in reads:
        metrics = topic_metrics(confusions[part])
        say(
            part,
            **{name: round(100 * metrics[name], 2) for name in ("accuracy", "macro_f1")},
            **{
                f"{name}_points": round(100 * (metrics[name] - first[name]), 2)
                for name in ("accuracy", "macro_f1")
            },
            times_speed=round(seconds["newsbert_ray"] / seconds[part], 2),
            megabytes=round(sizes.get(part, 0.0), 1),
            titles=int(confusions[part].sum()),
        )


def _own(student: Any) -> Read:
    encoder, top = student.encoder.eval(), student.top.eval()
    dense = cast("TopicHead", top.head).dense

    @torch.inference_mode()
    def read(ids: Arrays, mask: Arrays) -> Arrays:
        inputs = torch.from_numpy(ids), torch.from_numpy(mask)
        logits: Arrays = dense(top.embed(encoder(*inputs), inputs[1])).numpy()
        return logits

    return read


def _onnx(path: Path, threads: int) -> Read:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def read(ids: Arrays, mask: Arrays) -> Arrays:
        inputs = {"input_ids": ids.astype(np.int64), "attention_mask": mask.astype(np.int64)}
        (logits,) = session.run(["logits"], inputs)
        return cast("Arrays", logits)

    return read


if __name__ == "__main__":
    main()
