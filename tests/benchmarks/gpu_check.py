"""Checks and measures everything that runs on a GPU, in a few minutes and without a download.

    python -m tests.benchmarks.gpu_check [--minutes 8] [--only steps,clicks] [--out gpu_check.json]

Models have random weights, titles are invented. Each section has a share of the time, and one that fails does
not stop the others. Without a GPU everything runs small on the CPU. Prints one table; --out gets the JSON.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import start_processes

from newsbert_ray.config import PrepareSettings, TrainSettings, build_settings, merge
from newsbert_ray.data.prepare import prepare
from newsbert_ray.data.reading import TrainingSchedule, World, make_schedule, read_updates
from newsbert_ray.data.shards import read_manifest
from newsbert_ray.data.synthetic import synthesize, synthesize_pairs
from newsbert_ray.methods import METHODS
from newsbert_ray.model.assemble import assemble_pair
from newsbert_ray.record import describe_hardware, installed_versions
from newsbert_ray.serving.predictor import Precision, load
from newsbert_ray.training.loop import read_ahead
from newsbert_ray.training.run import train
from newsbert_ray.training.step import Learner, build_learner, train_step
from newsbert_ray.training.worker import build_worker_learner, cached_teacher
from tests.waits import Waits, waits_on_gpu

SMALL = {"layers": 2, "hidden": 64, "heads": 4, "feed_forward": 128, "vocabulary": 400}
SIZES = {
    "6x384": {"layers": 6, "hidden": 384, "heads": 12, "feed_forward": 1536},
    "12x768": {"layers": 12, "hidden": 768, "heads": 12, "feed_forward": 3072},
}
TINY_SIZES = {"2x64": {"layers": 2, "hidden": 64, "heads": 4, "feed_forward": 128}}
PRECISIONS = ("fp32", "tf32", "bf16")
WARM_UP = 4
GRACE_SECONDS = 10.0
"""A section that has not ended by itself is broken off so long after its time."""


@dataclass
class Check:
    """What all sections share.

    Attributes:
        device: the GPU, or the CPU where there is none.
        folder: for shards and runs.
        rows: the results so far, a JSON object each.
        ends: when the section that runs now should end (monotonic clock).
        ceilings: operations a second of a large matrix product, by precision.
    """

    device: torch.device
    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    section: str = ""
    ends: float = 0.0
    ceilings: dict[str, float] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds that this section still has."""
        return self.ends - time.monotonic()

    def say(self, name: str, **figures: Any) -> None:
        """Add and print one result."""
        self.rows.append({"section": self.section, "name": name, **figures})
        print(json.dumps(self.rows[-1]), flush=True)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def settings(self, data: str, **values: Any) -> TrainSettings:
        """Settings of a run over the shards `data` of `make_shards`."""
        common = {
            "data": str(self.folder / data),
            "teacher": "scratch",
            "out": str(self.folder / "run"),
            "device": self.device.type,
            "scratch": SMALL,
            "token_budget": 65_536 if self.on_gpu else 8192,
            "student.layers": 1,
        }
        return build_settings(TrainSettings, merge(common, values))


def make_shards(check: Check) -> None:
    """Shards of invented titles, clicks and pairs: `small`, `pairs` for checks and `large` for speed."""
    news, users = (24_000, 4_000) if check.on_gpu else (1_500, 100)
    sources = {
        "small": synthesize(check.folder / "a", news=320, users=20, topics=4, seed=3),
        "pairs": synthesize_pairs(check.folder / "b", pairs=240, words=20, topics=4, seed=3),
        "large": synthesize(check.folder / "c", news=news, users=users, history=30, candidates=20, seed=4),
    }
    for name, files in sources.items():
        values = {
            "source": [str(file) for file in files],
            "teacher": "scratch",
            "out": str(check.folder / name),
            "workers": 0,
            "scratch": {"vocabulary": 8000 if name == "large" and check.on_gpu else 400},
        }
        prepare(build_settings(PrepareSettings, values), say=lambda _: None)


def machine(check: Check) -> None:
    """The machine, and what its matrix products and copies reach."""
    name = torch.cuda.get_device_name() if check.on_gpu else "CPU only: everything runs small"
    versions = {key: installed_versions().get(key) for key in ("torch", "transformers")}
    check.say("machine", device=name, **versions, **describe_hardware())
    size = 8192 if check.on_gpu else 512
    for precision in PRECISIONS if check.on_gpu else ("fp32", "bf16"):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        a, b = (torch.randn(size, size, device=check.device).to(dtype) for _ in range(2))
        with matmul_precision(precision):
            seconds = median_seconds(check, lambda a=a, b=b: a @ b)  # type: ignore[misc]
        check.ceilings[precision] = 2 * size**3 / seconds
        check.say(f"matrix product {precision}", tflops=round(check.ceilings[precision] / 1e12, 2))
    x = torch.empty(2**30 if check.on_gpu else 2**22, device=check.device)
    y = torch.empty_like(x)
    check.say("copy", gb_per_second=round(8 * len(x) / median_seconds(check, lambda: y.copy_(x)) / 1e9))


def equal(check: Check) -> None:
    """Losses and gradients on the device against the CPU's, for every method of two tasks, in fp32."""
    for method, task in configurations():
        settings = check_settings(check, method, task, **{"model.dropout": 0.0})
        with matmul_precision("fp32"):
            found = [loss_and_gradients(settings, device) for device in (torch.device("cpu"), check.device)]
        (loss, gradients), (other, others) = found
        apart = max(
            float((others[name] - g).norm() / g.norm().clamp_min(1e-12))
            for name, g in gradients.items()
            if float(g.norm()) > 1e-7
        )
        check.say(
            f"{method} {task}",
            loss_difference=abs(loss - other) / abs(loss),
            gradient_difference=apart,
            ok=abs(loss - other) <= 1e-4 * abs(loss) and apart < 1e-3,
        )
        if check.left < 0:
            return


def loss_and_gradients(settings: TrainSettings, device: torch.device) -> tuple[float, dict[str, Any]]:
    """Total loss of the first update, and every gradient after mixing, on the CPU."""
    schedule = make_schedule(settings, read_manifest(settings.data))
    pair = assemble_pair(settings, schedule.manifest, stand_in=True).to(device)
    learner = build_learner(pair, settings, total_steps=schedule.total_steps)
    update = next(read_updates(schedule))
    numbers = train_step(learner, [part.to(device) for part in update.parts], step=1)
    named = learner.pair.named_parameters()
    return float(numbers["total"]), {n: p.grad.detach().cpu() for n, p in named if p.grad is not None}


def waits(check: Check) -> None:
    """Device-to-host waits of one step, for every method and task; the goal is 0."""
    for method, task in configurations():
        settings = check_settings(check, method, task)
        schedule = make_schedule(settings, read_manifest(settings.data), World(device=check.device))
        pair = assemble_pair(settings, schedule.manifest, stand_in=True).to(check.device)
        learner = build_learner(pair, settings, total_steps=schedule.total_steps)
        updates = [[part.to(check.device) for part in u.parts] for u in islice(read_updates(schedule), 3)]
        train_step(learner, updates[0], step=1)
        with Waits() as dispatched:
            train_step(learner, updates[1], step=2)
        on_gpu: Counter[str] = Counter()
        if check.on_gpu:
            with waits_on_gpu() as on_gpu:
                train_step(learner, updates[-1], step=3)
        check.say(
            f"{method} {task}",
            dispatched=dict(dispatched.count),
            on_gpu=dict(on_gpu),
            ok=not dispatched.count and not on_gpu,
        )
        if check.left < 0:
            return


def configurations() -> Iterator[tuple[str, str]]:
    """(method, task): the most different ones first."""
    first = [("newsbert", "topics"), ("newsbert", "recommendation"), ("newsbert", "retrieval")]
    yield from first
    yield from (
        (m, t) for t in ("topics", "recommendation") for m in METHODS if m != "linear" and (m, t) not in first
    )


def check_settings(check: Check, method: str, task: str, **values: Any) -> TrainSettings:
    """A small run of a method."""
    common = {"batch_size": 32, "epochs": 2, "model.query_size": 16, "method": method, "task": task}
    data = "pairs" if task == "retrieval" else "small"
    width = {} if method == "glove" else {"scratch": SMALL}
    return check.settings(data, **merge(common, width, values))


def steps(check: Check) -> None:
    """Joint steps: titles a second of the bare step and with reading, and the share of the matrix rate."""
    sizes = SIZES if check.on_gpu else TINY_SIZES
    batches = (32, 128, 512) if check.on_gpu else (32,)
    for size, scratch in sizes.items():
        for batch in batches:
            for precision in PRECISIONS if check.on_gpu else ("fp32", "bf16"):
                if check.left < 0:
                    return
                measure(check, f"{size} batch {batch} {precision}", scratch, batch, precision)


def clicks(check: Check) -> None:
    """The same for recommendation; what counts is clicks."""
    for size, scratch in (SIZES if check.on_gpu else TINY_SIZES).items():
        for batch in (32, 128) if check.on_gpu else (32,):
            for precision in ("tf32", "bf16") if check.on_gpu else ("fp32",):
                if check.left < 0:
                    return
                name = f"{size} batch {batch} {precision}"
                measure(check, name, scratch, batch, precision, task="recommendation")


def student(check: Check) -> None:
    """A one-layer student of a finished teacher whose embeddings are kept (method twinbert)."""
    size, scratch = next(iter((SIZES if check.on_gpu else TINY_SIZES).items()))
    rows = 2000 if check.on_gpu else 64
    teacher = check.settings(
        "large",
        scratch=scratch,
        out=str(check.folder / "teacher"),
        method="finetune",
        epochs=1,
        batch_size=128 if check.on_gpu else 32,
        train_rows=rows,
        **{"student.layers": scratch["layers"]},
    )
    train(teacher, quiet=True)
    for batch in (128, 512) if check.on_gpu else (32,):
        for precision in ("tf32", "bf16") if check.on_gpu else ("fp32",):
            if check.left < 0:
                return
            more: dict[str, Any] = {
                "method": "twinbert",
                "distill.teacher_run": str(check.folder / "teacher"),
            }
            measure(check, f"{size} batch {batch} {precision}", scratch, batch, precision, **more)


def compiled(check: Check) -> None:
    """Joint steps with each encoder's layers compiled; the first steps wait for the compiler."""
    choices = (("6x384", 32), ("6x384", 512), ("12x768", 128)) if check.on_gpu else (("2x64", 32),)
    for size, batch in choices:
        for precision in ("bf16", "tf32") if check.on_gpu else ("fp32",):
            if check.left < 0:
                return
            scratch = (SIZES if check.on_gpu else TINY_SIZES)[size]
            began = time.perf_counter()
            measure(check, f"{size} batch {batch} {precision}", scratch, batch, precision, compiled=True)
            check.say(f"{size} batch {batch} {precision}", seconds_in_all=round(time.perf_counter() - began))


def measure(
    check: Check,
    name: str,
    scratch: dict[str, int],
    batch: int,
    precision: str,
    *,
    compiled: bool = False,
    **values: Any,
) -> None:
    """Measure steps of one configuration and say the figures, or why it cannot run."""
    kind = precision if precision in ("fp32", "bf16") else "fp32"
    settings = check.settings(
        "large", scratch=scratch, batch_size=batch, epochs=1000, precision=kind, **values
    )
    try:
        with matmul_precision(precision):
            figures = step_figures(check, settings, precision, compiled=compiled)
    except (RuntimeError, ValueError) as error:
        check.say(name, error=f"{type(error).__name__}: {str(error).splitlines()[0]}")
    else:
        check.say(name, **figures)


def step_figures(check: Check, settings: TrainSettings, precision: str, *, compiled: bool) -> dict[str, Any]:
    """Speed of updates that lie ready on the device, and of the same with reading and copying."""
    world = World(device=check.device)
    schedule = make_schedule(settings, read_manifest(settings.data), world)
    learner = build_worker_learner(settings, schedule, world)
    learner.pair.teacher_cache = cached_teacher(learner.pair, schedule, world)
    for layer in (*learner.pair.teacher.layers, *learner.pair.student.layers) if compiled else ():
        layer.compile(dynamic=True)
    if check.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    ready = [[part.to(check.device) for part in u.parts] for u in islice(read_updates(schedule), 12)]
    tokens = statistics.mean(sum(part.padded_tokens for part in parts) for parts in ready)
    seconds = 1.2 if check.on_gpu else 0.6
    alone, host = run_steps(check, learner, cycle(ready), seconds)
    fed, _ = run_steps(check, learner, fed_parts(schedule, check.device), seconds)
    rows, achieved = settings.batch_size, product_operations(learner, tokens) / alone
    figures = {
        "per_second": round(rows / alone),
        "per_second_with_reading": round(rows / fed),
        "step_ms": round(1e3 * alone, 2),
        "host_ms": round(1e3 * host, 2),
        "tokens": round(tokens),
        "tflops": round(achieved / 1e12, 3),
    }
    if precision in check.ceilings:
        figures["share_of_product_rate"] = round(achieved / check.ceilings[precision], 3)
    if check.on_gpu:
        figures["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return figures


def fed_parts(schedule: TrainingSchedule, device: torch.device) -> Iterator[list[Any]]:
    """The parts of each update as a run's loop gets them."""
    for update in read_ahead(read_updates(schedule), device):
        yield list(update.parts)


def run_steps(
    check: Check, learner: Learner, updates: Iterator[list[Any]], seconds: float
) -> tuple[float, float]:
    """Mean seconds of a step, and seconds that the process needs to start one."""
    for step, parts in enumerate(islice(updates, WARM_UP), 1):
        train_step(learner, parts, step=step)
    check.wait()
    began, count, host = time.perf_counter(), 0, 0.0
    while count < 3 or time.perf_counter() - began < seconds:
        parts = next(updates)
        before = time.perf_counter()
        train_step(learner, parts, step=WARM_UP + count + 1)
        host += time.perf_counter() - before
        count += 1
        if count % 10 == 0:
            check.wait()  # as a logged step does; otherwise `host` would hold the time of a full queue
    check.wait()
    return (time.perf_counter() - began) / count, host / count


def product_operations(learner: Learner, tokens: float) -> float:
    """Operations of a step's matrix products in the Transformer layers, forward and backward."""
    config = learner.pair.teacher.backbone.config
    hidden, inner = int(config.hidden_size), int(config.intermediate_size)
    layer = 2 * tokens * (4 * hidden * hidden + 2 * hidden * inner)
    learned = len(learner.pair.student.layers)
    learned += 0 if learner.pair.frozen else len(learner.pair.teacher.layers)
    return 3 * layer * learned


def serving(check: Check) -> None:
    """A whole run by `train`, then `embed` and `predict` of its student."""
    out = check.folder / "served"
    scratch = next(iter((SIZES if check.on_gpu else TINY_SIZES).values()))
    rows = 4000 if check.on_gpu else 200
    began = time.perf_counter()
    record = train(
        check.settings(
            "large", scratch=scratch, out=str(out), batch_size=64, epochs=1, train_rows=rows, log_every=10
        ),
        quiet=True,
    )
    check.say(
        "train",
        seconds=round(time.perf_counter() - began, 1),
        per_second=round(record.titles_per_second),
        seconds_by_part={name: round(value, 2) for name, value in record.seconds.items()},
        accuracy=record.metrics["test"]["student"]["accuracy"],
    )
    lines = (check.folder / "c" / "synthetic_train" / "news.tsv").read_text(encoding="utf-8").splitlines()
    texts = [line.split("\t")[3] for line in lines]
    both: tuple[Precision, ...] = ("fp32", "bf16")
    for precision in both:
        predictor = load(out, device=check.device.type, precision=precision)
        for name, work in (("embed", predictor.embed), ("predict", predictor.predict)):
            seconds = median_seconds(check, lambda work=work: work(texts), most=5.0)  # type: ignore[misc]
            check.say(f"{name} {precision}", per_second=round(len(texts) / seconds), titles=len(texts))


def workers(check: Check) -> None:
    """Two processes on one device (gloo) against one: their weights after six updates."""
    with tempfile.TemporaryDirectory() as folder:
        settings = check_settings(
            check, "newsbert", "topics", **{"model.dropout": 0.0, "workers": 2, "batch_size": 16}
        )
        found = {}
        for size in (1, 2):
            files = Path(folder) / f"store{size}", Path(folder) / f"weights{size}.pt"
            arguments = (size, settings, check.device.type, *map(str, files))
            group = start_processes(_one_worker, arguments, nprocs=size, join=False)  # type: ignore[no-untyped-call]
            assert group is not None
            try:
                while not group.join():
                    pass
            finally:
                for process in group.processes:
                    process.terminate()
            found[size] = torch.load(files[1])
        apart = max(float((found[1][name] - value).abs().max()) for name, value in found[2].items())
        check.say("two workers against one", weight_difference=apart, ok=apart < 1e-4)


def _one_worker(rank: int, size: int, settings: TrainSettings, device: str, store: str, weights: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    world = World(rank, size, torch.device(device, 0) if device == "cuda" else torch.device(device))
    schedule = make_schedule(settings, read_manifest(settings.data), world)
    learner = build_worker_learner(settings, schedule, world)
    for update in islice(read_updates(schedule), 6):
        train_step(learner, [part.to(world.device) for part in update.parts], step=update.step)
    if rank == 0:
        torch.save({n: p.detach().cpu() for n, p in learner.pair.named_parameters()}, weights)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def sweeps(check: Check) -> None:
    """A sweep of four trials that share the GPU, on Ray."""
    try:
        import ray  # noqa: F401
    except ImportError:
        check.say("sweep", skipped="Ray is not installed")
        return
    from newsbert_ray.tune.space_file import Changes
    from newsbert_ray.tune.sweep import sweep

    space = check.folder / "space.yaml"
    gpus = "gpus: 0.25\n" if check.on_gpu else ""
    space.write_text(
        f"name: gpu_check\nsettings: {{}}\n{gpus}space:\n  distill.beta: {{grid: [0, 0.1, 0.2, 0.3]}}\n"
        "seeds: [0]\n",
        encoding="utf-8",
    )
    settings = check.settings("small", batch_size=32, epochs=2)
    overrides = settings.model_dump(exclude_unset=True, exclude={"out", "distill", "method"})
    began = time.perf_counter()
    result = sweep(space, Changes(overrides), out=check.folder / "sweep")
    check.say(
        "sweep",
        seconds=round(time.perf_counter() - began, 1),
        points=len(result.points),
        failures=result.failures,
        ok=not result.failures,
    )


SECTIONS: dict[str, tuple[Callable[[Check], None], float]] = {
    "machine": (machine, 0.06),
    "equal": (equal, 0.12),
    "waits": (waits, 0.12),
    "steps": (steps, 0.30),
    "clicks": (clicks, 0.12),
    "student": (student, 0.08),
    "serving": (serving, 0.08),
    "workers": (workers, 0.06),
    "compiled": (compiled, 0.15),
    "sweeps": (sweeps, 0.10),
}
"""Each section with its share of the time; what one leaves over goes to those after it."""


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """TF32 in matrix products of fp32 numbers, while the block runs, for precision tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def median_seconds(check: Check, work: Callable[[], Any], *, most: float = 1.0) -> float:
    """Median time of `work` over at most 20 repeats or `most` seconds, after a warm-up."""
    work()
    check.wait()
    times: list[float] = []
    while len(times) < 20 and sum(times) < most:
        began = time.perf_counter()
        work()
        check.wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def run_section(check: Check, name: str, seconds: float) -> None:
    """Run one section for at most about `seconds`; an error becomes a row."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"broken off after {seconds + GRACE_SECONDS:.0f} s")

    check.section, check.ends = name, time.monotonic() + seconds
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds + GRACE_SECONDS)
    try:
        SECTIONS[name][0](check)
    except Exception as error:
        traceback.print_exc()
        check.say(name, error=f"{type(error).__name__}: {str(error)[:300]}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """All results, a line each."""
    lines = ["| section | what | result |", "|---|---|---|"]
    for section in ("equal", "waits"):
        checked = [row for row in rows if row["section"] == section and "ok" in row]
        if checked:
            worst = {k: max(row[k] for row in checked) for k, v in checked[0].items() if isinstance(v, float)}
            bad = [row["name"] for row in checked if not row["ok"]]
            summary = {"section": section, "name": "all", **worst, "checked": len(checked), "wrong": len(bad)}
            rows = [row for row in rows if row not in checked or not row["ok"]] + [summary]
    for row in rows:
        figures = {key: value for key, value in row.items() if key not in ("section", "name")}
        text = ", ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in figures.items()
        )
        lines.append(f"| {row['section']} | {row['name']} | {text} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections, print the table; 1 if something failed or differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, help="file for the results as JSON, written after each section")
    parser.add_argument("--only", help=f"sections, separated by commas: {', '.join(SECTIONS)}")
    options = parser.parse_args(arguments)
    chosen = [name for name in SECTIONS if not options.only or name in options.only.split(",")]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ends = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        check = Check(device, Path(folder))
        began = time.perf_counter()
        make_shards(check)
        check.say("shards", seconds=round(time.perf_counter() - began, 1))
        for position, name in enumerate(chosen):
            shares = [SECTIONS[later][1] for later in chosen[position:]]
            run_section(check, name, max(1.0, ends - time.monotonic()) * shares[0] / sum(shares))
            if options.out:
                options.out.write_text(json.dumps(check.rows, indent=1) + "\n", encoding="utf-8")
    print(table(check.rows))
    if device.type == "cpu":
        print("No GPU was found: these are small runs on the CPU.")
    return int(any("error" in row or row.get("ok") is False for row in check.rows))


if __name__ == "__main__":
    sys.exit(main())
