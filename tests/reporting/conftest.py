"""Shared by the tests of reports: a made-up sweep in a folder, in the format of real ones."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pytest

from newsbert_ray.config import merge
from newsbert_ray.files import write_json
from newsbert_ray.methods import TASKS, TaskName, task_of
from newsbert_ray.record import METRICS, EarlyStop, RunRecord, write_record, write_stop
from newsbert_ray.reporting import report as reports
from newsbert_ray.reporting.draw import figure_paths
from newsbert_ray.reporting.figures import AnyPanel, FigureData
from newsbert_ray.reporting.sweep_data import Axis, point_label
from newsbert_ray.tune.space import SearchSpace

MakeRecord = Callable[..., RunRecord]
MakeSweep = Callable[..., Path]

AXES: Mapping[str, dict[str, Any]] = {
    "learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
    "distill.beta": {"low": 0.0, "high": 0.3},
    "student.layers": {"values": (1, 2, 4)},
    "optimizer.decay": {"values": ("none", "linear", "cosine")},
    "optimizer.warmup_share": {
        "low": 0.0,
        "high": 0.5,
        "when": {"optimizer.decay": ("linear", "cosine")},
    },
    "distill.temperature": {"low": 0.5, "high": 10.0, "log": True},
    "teacher": {"values": ("hub/a-model-with-quite-a-long-name", "folder/another", "scratch")},
    "batch_size": {"values": (8, 16, 32, 64, 128, 256, 512)},
    "epochs": {"low": 1, "high": 4, "integer": True},
    "distill.soft_label_t2": {"values": (False, True)},
    "model.teacher_layers": {"values": (None, 2, 4)},
    "method": {"values": ("finetune",)},
}
GOALS = (
    {"metric": "validation.student.accuracy", "mode": "max"},
    {"metric": "speed.student_titles_per_second", "mode": "max"},
)


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
MEASURE = """<script>onload = () => {
  const seen = [...document.querySelectorAll("iframe")].map(({contentDocument: page}) => [
    page.documentElement.scrollWidth - page.documentElement.clientWidth,
    [...page.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().height > 20).length])
  document.body.textContent = "measured " + JSON.stringify(seen) + " end" }</script>"""


def open_pages(pages: Sequence[str], folder: Path, *, dark: bool) -> list[list[int]]:
    """Each page in headless Chromium, 390 and 1280 pixels wide: pixels that overflow, figures drawn."""
    frames = [f'<iframe width="{w}" srcdoc="{escape(page)}"></iframe>' for page in pages for w in (390, 1280)]
    (folder / "frames.html").write_text(f"<body>{''.join(frames)}{MEASURE}</body>", encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync --dump-dom"
    flags += " --disable-background-networking --disable-component-update --window-size=1700,1000"
    flags += " --enable-logging=stderr" + (" --blink-settings=preferredColorScheme=0" if dark else "")
    command = [str(BROWSER), *flags.split(), f"--user-data-dir={folder}/profile"]
    done = subprocess.run(
        [*command, f"file://{folder}/frames.html"], capture_output=True, text=True, timeout=90
    )
    measured = re.search(r"measured (.*) end", done.stdout)
    assert measured, done.stderr
    assert "CONSOLE" not in done.stderr
    sizes: list[list[int]] = json.loads(measured[1])
    return sizes


def change_plan(folder: Path, **changes: Any) -> None:
    """Change values of a sweep's sweep.json."""
    path = folder / "sweep.json"
    write_json(path, {**json.loads(path.read_text()), **changes})


@pytest.fixture
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip drawing: empty files, a small SVG."""

    def touch(figure: FigureData[AnyPanel], folder: Path) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        paths = figure_paths(figure.name, folder)
        for path in paths:
            path.touch()
        return paths

    monkeypatch.setattr(reports, "write_figure", touch)
    monkeypatch.setattr(reports, "draw_svg", lambda figure: '<svg viewBox="0 0 9 9"></svg>')


@pytest.fixture
def make_sweep(make_record: MakeRecord, tmp_path: Path) -> MakeSweep:
    """make_sweep(axes=["distill.beta"], points=12, seeds=(0, 1), stopped=0.5, failed=1) -> its folder."""

    def make(name: str = "sweep", **asked: Any) -> Path:
        return invent(make_record, tmp_path / name, **asked)

    return make


def invent(
    make_record: MakeRecord,
    folder: Path,
    *,
    axes: Sequence[str] = ("distill.beta",),
    points: int = 12,
    seeds: Sequence[int] = (0, 1),
    stopped: float = 0.0,
    failed: int = 0,
    under_way: int = 0,
    goals: Sequence[Mapping[str, Any]] = (),
    task: TaskName = "topics",
    state: str = "finished",
    epochs: int = 9,
    **space: Any,
) -> Path:
    """Write a sweep whose metric hangs on the learning rate most, on beta and depth a little, on no other.

    The first `failed` points fail, the last `under_way` have one evaluation; of the others the worst share
    `stopped` ends after epoch 1 with its first seed.
    """
    draw = random.Random(7)
    known = tuple(Axis(name=name, **AXES[name]) for name in axes)
    values = [_draw(known, draw) for _ in range(points)]
    settings = {"data": "shards", "teacher": "scratch", "epochs": epochs, "threads": 1, "task": task}
    first = TASKS[task].primary.name
    whole = SearchSpace(
        file="space.yaml",
        name="invented",
        settings={"epochs": epochs, "task": task},
        axes=known,
        seeds=tuple(seeds),
        goals=tuple(goals) or ({"metric": f"validation.student.{first}", "mode": "max"},),
        **{"search": {"sampler": "tpe", "trials": max(1, points)}, **space},
    )
    ordered = sorted(values[failed : points - under_way], key=_worth)
    early = [point_label(point) for point in ordered[: round(stopped * len(ordered))]]
    failures = {}
    for index, point in enumerate(values):
        for seed in seeds:
            out = folder / "trials" / point_label(point, seed=seed)
            worth = _worth(point) + draw.gauss(0, 0.004)
            mine = merge(settings, point, {"seed": seed, "out": str(out)})
            record = _record(make_record, mine, worth, epochs, point)
            write_json(out / "settings.json", {"settings": record.settings, "fingerprint": "ab12cd34ef"})
            if index < failed:
                failures[out.name] = f"LossError: the loss is <nan> at step {10 + seed}"
                break
            if index >= points - under_way:
                _entries(out, record, 1)
                break
            if point_label(point) in early:
                _entries(out, record, 1)
                value = record.curve[0]["validation"]["student"][first]
                write_stop(out, EarlyStop(epoch=1.0, value=value, seconds=4.0, reason="asha"))
                break
            _entries(out, record, epochs)
            write_record(out, record)
    best = max(ordered, key=_worth, default={})
    plan = {
        "format": 2,
        "space": whole.model_dump(mode="json", exclude={"file"}),
        "file": "space.yaml",
        "overrides": {"data": "shards"},
        "settings": settings,
        "varied": list(axes),
        "metric": whole.metric,
        "mode": whole.goals[0].mode,
        "scheduler": whole.scheduler,
        "trials": points * len(seeds),
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "state": state,
        "seconds": 1234.5,
    }
    if state.startswith("finished"):
        words = " ".join(f"--{name} {value}" for name, value in best.items())
        plan |= {"best": f"newsbert-ray train {words}", "failures": failures}
    write_json(folder / "sweep.json", plan)
    return folder


def _draw(axes: Sequence[Axis], draw: random.Random) -> dict[str, Any]:
    point: dict[str, Any] = {}
    for axis in axes:
        if any(point.get(name) not in values for name, values in axis.when.items()):
            continue
        if axis.values is not None:
            point[axis.name] = draw.choice(axis.values)
        else:
            assert axis.low is not None
            assert axis.high is not None
            low, high = (math.log(axis.low), math.log(axis.high)) if axis.log else (axis.low, axis.high)
            value = draw.uniform(low, high)
            point[axis.name] = math.exp(value) if axis.log else value
    return point


def _worth(point: Mapping[str, Any]) -> float:
    """What a point is worth without noise."""
    rate = abs(math.log10(point.get("learning_rate", 1e-3)) + 3)
    beta = point.get("distill.beta", 0.15)
    return float(0.8 - 0.12 * rate - 1.5 * (beta - 0.15) ** 2 + 0.01 * point.get("student.layers", 2))


def _record(
    make_record: MakeRecord, settings: Mapping[str, Any], worth: float, epochs: int, point: Mapping[str, Any]
) -> RunRecord:
    """A record whose curve rises to `worth` and levels out."""
    given = {name: value for name, value in settings.items() if name not in ("seed", "epochs")}
    numbers = {"accuracy": worth, "auc": worth, "teacher_accuracy": 0.85, "teacher_auc": 0.85}
    record = make_record(epochs=epochs, seed=settings["seed"], **numbers, **given)
    first = task_of(record.settings).primary.name
    for entry in record.curve:
        share = 1 - 0.6 * math.exp(-0.6 * entry["epoch"])
        for model, whole in (("student", worth), ("teacher", 0.85)):
            if model in entry["validation"]:
                entry["validation"][model][first] = whole * share
    speed = {
        "student_titles_per_second": 4000.0 / (0.5 + point.get("student.layers", 2)),
        "times_teacher": 3.0,
    }
    return record.model_copy(
        update={
            "metrics": {**record.metrics, "speed": speed},
            "settings": {**record.settings, "epochs": epochs},
        }
    )


def _entries(folder: Path, record: RunRecord, epochs: int) -> None:
    lines = [json.dumps({"kind": "evaluation", **entry}) for entry in record.curve[:epochs]]
    (folder / METRICS).write_text("\n".join([json.dumps({"kind": "log", "step": 1}), *lines]) + "\n")
