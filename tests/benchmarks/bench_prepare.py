"""Rows per second and peak memory of `prepare`, compared with datasets.map.

Both use the same tokeniser, titles and number of processes. Each measurement runs in a process of its own, so
that imports and the start of Ray or of worker processes count for both. They take turns, and the best of
`--repeats` is taken. `--memory` measures `prepare` alone at several sizes; `growth_exponent` is that of the
CPU seconds from the size before. Prints JSON lines.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.benchmarks.subject import say

_PREPARE = """
import sys
from newsbert_ray.config import PrepareSettings
from newsbert_ray.data.prepare import prepare
sources, teacher, out, workers = sys.argv[1].split(","), sys.argv[2], sys.argv[3], int(sys.argv[4])
prepare(PrepareSettings(source=sources, teacher=teacher, out=out, workers=workers), say=lambda line: None)
"""

_DATASETS = """
import sys
from datasets import load_dataset
from datasets.utils.logging import disable_progress_bar
from transformers import AutoTokenizer
sources, teacher, out, workers = sys.argv[1].split(","), sys.argv[2], sys.argv[3], int(sys.argv[4])
disable_progress_bar()
names = ["news_id", "category", "subcategory", "title", "abstract", "url", "entities", "others"]
files = [source + "/news.tsv" for source in sources]
rows = load_dataset("csv", data_files=files, sep="\\t", column_names=names, quoting=3,
                    keep_default_na=False, split="train", cache_dir=out + "/cache")
tokenizer = AutoTokenizer.from_pretrained(teacher)
def tokenise(batch):
    return {"tokens": tokenizer(batch["title"], truncation=True, max_length=30)["input_ids"]}
kept = ["news_id", "category", "subcategory", "title"]
processes = workers if workers > 1 else None
rows = rows.select_columns(kept).map(tokenise, batched=True, num_proc=processes)
rows.to_parquet(out + "/rows.parquet")
"""


def main() -> None:
    """Measure and print JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000, help="titles of the comparison")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--teacher", help="folder with a tokeniser; one learned from the titles by default")
    parser.add_argument("--memory", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--memory-workers", type=int, default=0, help="0 measures without Ray")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as name:
        folder = Path(name)
        teacher = arguments.teacher or str(_tokenizer(folder))
        if arguments.rows:
            _compare(folder, teacher, arguments)
        before = 0, 0.0
        for rows in arguments.memory:
            sources = _corpus(folder, rows)
            measured = _measure(_PREPARE, folder, sources, teacher, arguments.memory_workers)
            if before[0]:
                growth = math.log(measured["cpu_seconds"] / before[1]) / math.log(rows / before[0])
                measured["growth_exponent"] = round(growth, 2)
            say(f"prepare, {rows:,} news", rows=rows, workers=arguments.memory_workers, **measured)
            before = rows, measured["cpu_seconds"]


def _compare(folder: Path, teacher: str, arguments: argparse.Namespace) -> None:
    sources = _corpus(folder, arguments.rows)
    rows = sum(_count(Path(source) / "news.tsv") for source in sources)
    programs = {"prepare": (_PREPARE, arguments.workers), "prepare_without_ray": (_PREPARE, 0)}
    programs["datasets.map"] = (_DATASETS, arguments.workers)
    best: dict[str, float] = {}
    for _ in range(arguments.repeats):
        for program, (code, workers) in programs.items():
            measured = _measure(code, folder, sources, teacher, workers)
            speed = rows / measured["seconds"]
            best[program] = max(best.get(program, 0.0), speed)
            say(program, news_rows=rows, workers=workers, rows_per_second=round(speed), **measured)
    ratios = {
        f"{program} / datasets.map": round(best[program] / best["datasets.map"], 2)
        for program in list(best)[:2]
    }
    say("ratio", **ratios)


def _measure(code: str, folder: Path, sources: list[str], teacher: str, workers: int) -> dict[str, Any]:
    """Seconds and peak resident memory of a process and of its largest descendant."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", code, ",".join(sources), teacher, str(out), str(workers)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        peaks: dict[str, int] = {"driver": 0, "worker": 0}
        spent: dict[int, float] = {}
        watcher = threading.Thread(target=_watch, args=(process, peaks, spent), daemon=True)
        watcher.start()
        _, errors = process.communicate()
        watcher.join()
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"a measured process failed:\n{errors}")
    memory = {f"{name}_peak_mb": peak >> 20 for name, peak in peaks.items()}
    return {"seconds": round(seconds, 2), "cpu_seconds": round(sum(spent.values()), 1), **memory}


def _watch(process: subprocess.Popen[str], peaks: dict[str, int], spent: dict[int, float]) -> None:
    """Record peak memory and the CPU seconds of every child process."""
    import psutil

    try:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            peaks["driver"] = max(peaks["driver"], root.memory_info().rss)
            spent[root.pid] = sum(root.cpu_times()[:2])
            for child in root.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    spent[child.pid] = sum(child.cpu_times()[:2])
                # Ray's own servers are not measured.
                if _is_task(child):
                    peaks["worker"] = max(peaks["worker"], child.memory_info().rss)
            time.sleep(0.05)
    except psutil.Error:
        return


def _is_task(child: Any) -> bool:
    import psutil

    try:
        return "python" in child.name().lower() or child.name().startswith("ray::")
    except psutil.Error:
        return False


def _corpus(folder: Path, rows: int) -> list[str]:
    from newsbert_ray.data.synthetic import synthesize

    target = folder / f"corpus-{rows}"
    if not target.exists():
        synthesize(target, news=rows, users=1000)
    return [str(one) for one in sorted(target.iterdir(), reverse=True)]


def _tokenizer(folder: Path) -> Path:
    from newsbert_ray.data.tokenizer import learn_tokenizer

    with open(f"{_corpus(folder, 2000)[0]}/news.tsv", encoding="utf-8") as file:
        titles = [line.split("\t")[3] for line in file]
    learn_tokenizer(titles.__iter__, vocabulary=4000).save(folder / "teacher")
    return folder / "teacher"


def _count(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


if __name__ == "__main__":
    main()
