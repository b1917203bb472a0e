"""Speed of embedding titles: `newsbert-ray embed` compared with Sentence Transformers and transformers.

    python -m tests.benchmarks.bench_embed --run RUN --input MINDsmall_dev/news.tsv --titles 8000 --threads 1
    python -m tests.benchmarks.bench_embed --run RUN --data SHARDS --precision fp32 bf16 int8 --threads 1

All use the same weights and cores. In each round they take turns; ratios are medians over rounds. With the
shards of a topics run, the texts are its labelled test titles, and the accuracy of each precision is printed.
`--cpu_seconds` measures the process's own time, for a machine that others use too.
`transformers` is its feature extraction with the exported pooling: batches of 32 texts in the order of the
file, padded to the longest. Prints JSON lines.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch

from newsbert_ray.data.shards import read_manifest
from newsbert_ray.model.heads import TopicHead
from newsbert_ray.model.linear import labelled_texts
from newsbert_ray.serving.export import export
from newsbert_ray.serving.predictor import Precision, Predictor, Student
from newsbert_ray.serving.texts import Row, open_texts
from tests.benchmarks.subject import FOLDER, add_subject, finished_run, say

Encode = Callable[[Sequence[str]], Any]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_subject(parser)
    parser.add_argument("--run", help="a finished run; a short one over the subject by default")
    parser.add_argument("--input", help="texts as `newsbert-ray embed` takes them; invented ones by default")
    parser.add_argument(
        "--precision", nargs="+", default=["fp32"], choices=get_args(Precision), help="fp32 first"
    )
    parser.add_argument("--cpu_seconds", action="store_true")
    parser.add_argument("--titles", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args(arguments)
    run = finished_run(options.run, options)
    texts, topics = _texts(options)
    clock = time.process_time if options.cpu_seconds else time.perf_counter
    with tempfile.TemporaryDirectory() as name:
        ours = {
            _name(numbers): Predictor(Student.read(run / "student"), device="cpu", precision=numbers)
            for numbers in options.precision
        }
        others = _others(str(run), Path(name))
        for threads in options.threads:
            torch.set_num_threads(threads)
            encoders = {name: predictor.embed for name, predictor in ours.items()} | others
            embeddings = _compare(encoders, texts, rounds=options.rounds, threads=threads, clock=clock)
        for name, predictor in ours.items() if topics is not None else ():
            logits = cast("TopicHead", predictor.top.head).dense(torch.from_numpy(embeddings[name]))
            say(f"accuracy of {name}", accuracy=100 * float((logits.argmax(-1).numpy() == topics).mean()))


def _name(precision: str) -> str:
    return "newsbert_ray" + (f" {precision}" if precision != "fp32" else "")


def _texts(options: argparse.Namespace) -> tuple[list[str], Any]:
    """The titles, and their topics where they are known."""
    if options.data and not options.input:
        texts, topics = labelled_texts(options.data, read_manifest(options.data), "test")
        return texts[: options.titles], topics[: options.titles]
    rows = open_texts(options.input or FOLDER / "corpus" / "synthetic_train" / "news.tsv").rows
    return [row.text for row in rows if isinstance(row, Row)][: options.titles], None


def _others(run: str, folder: Path) -> dict[str, Encode]:
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer

    export(run, to="sentence-transformers", out=folder / "st")
    export(run, to="hf", out=folder / "hf")
    theirs = SentenceTransformer(str(folder / "st"), trust_remote_code=True, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    model = AutoModel.from_pretrained(folder / "hf", trust_remote_code=True).eval()

    @torch.inference_mode()
    def plain(texts: Sequence[str]) -> Any:
        parts = []
        for start in range(0, len(texts), 32):
            inputs = tokenizer(
                list(texts[start : start + 32]), padding=True, truncation=True, return_tensors="pt"
            )
            parts.append(model(inputs["input_ids"], inputs["attention_mask"]).pooler_output.numpy())
        return np.concatenate(parts)

    return {
        "sentence_transformers": lambda texts: theirs.encode(list(texts), show_progress_bar=False),
        "transformers": plain,
    }


def _compare(
    encoders: dict[str, Encode],
    texts: Sequence[str],
    *,
    rounds: int,
    threads: int,
    clock: Callable[[], float],
) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    embeddings: dict[str, Any] = {}
    for number in range(rounds + 1):
        for name, encode in encoders.items():
            began = clock()
            embeddings[name] = encode(texts)
            if number:
                seconds[name].append(clock() - began)
    for name, took in seconds.items():
        apart = float(np.abs(embeddings[name] - embeddings["newsbert_ray"]).max())
        ratios = [own / ours for own, ours in zip(took, seconds["newsbert_ray"], strict=True)]
        times = [st / own for own, st in zip(took, seconds["sentence_transformers"], strict=True)]
        say(
            name,
            threads=threads,
            titles=len(texts),
            titles_per_second=round(len(texts) / statistics.median(took)),
            times_slower=round(statistics.median(ratios), 2),
            least=round(min(ratios), 2),
            most=round(max(ratios), 2),
            times_sentence_transformers=round(statistics.median(times), 2),
            largest_difference=f"{apart:.1e}",
        )
    return embeddings


if __name__ == "__main__":
    main()
