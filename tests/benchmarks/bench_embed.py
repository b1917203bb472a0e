"""Speed of embedding titles: `newsbert-ray embed` compared with Sentence Transformers and transformers.

    python -m tests.benchmarks.bench_embed --run RUN --input MINDsmall_dev/news.tsv --titles 8000 --threads 1

All three use the same weights and cores. In each round they take turns; ratios are medians over rounds.
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
from typing import Any

import numpy as np
import torch

from newsbert_ray.serving.export import export
from newsbert_ray.serving.predictor import load
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
    parser.add_argument("--titles", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args(arguments)
    run = finished_run(options.run, options)
    rows = open_texts(options.input or FOLDER / "corpus" / "synthetic_train" / "news.tsv").rows
    texts = [row.text for row in rows if isinstance(row, Row)][: options.titles]
    with tempfile.TemporaryDirectory() as name:
        encoders = _encoders(str(run), Path(name))
        for threads in options.threads:
            torch.set_num_threads(threads)
            _compare(encoders, texts, rounds=options.rounds, threads=threads)


def _encoders(run: str, folder: Path) -> dict[str, Encode]:
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer

    export(run, to="sentence-transformers", out=folder / "st")
    export(run, to="hf", out=folder / "hf")
    ours = load(run, device="cpu")
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
        "newsbert_ray": ours.embed,
        "sentence_transformers": lambda texts: theirs.encode(list(texts), show_progress_bar=False),
        "transformers": plain,
    }


def _compare(encoders: dict[str, Encode], texts: Sequence[str], *, rounds: int, threads: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    embeddings: dict[str, Any] = {}
    for number in range(rounds + 1):
        for name, encode in encoders.items():
            began = time.perf_counter()
            embeddings[name] = encode(texts)
            if number:
                seconds[name].append(time.perf_counter() - began)
    for name, took in seconds.items():
        apart = float(np.abs(embeddings[name] - embeddings["newsbert_ray"]).max())
        ratios = [own / ours for own, ours in zip(took, seconds["newsbert_ray"], strict=True)]
        say(
            name,
            threads=threads,
            titles=len(texts),
            titles_per_second=round(len(texts) / statistics.median(took)),
            times_slower=round(statistics.median(ratios), 2),
            least=round(min(ratios), 2),
            most=round(max(ratios), 2),
            largest_difference=f"{apart:.1e}",
        )


if __name__ == "__main__":
    main()
