"""Speeds side by side: what is divided by what, and all models read the same titles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from newsbert_ray.config import SettingsError
from newsbert_ray.screens import print_rows
from newsbert_ray.serving import bench as benchmark
from newsbert_ray.serving.bench import (
    SPARE,
    Model,
    Timing,
    bench,
    find_models,
    memory_in_use,
    speed_figure,
    timings_table,
    write_page,
)


def timing(name: str, layers: int, rate: float, base: float, threads: int = 1) -> Timing:
    """Invented, of a deepest model of 12 layers at `base` titles/s."""
    shares = {"tokenise": 0.1, "pool": 0.05, "encode": 0.85}
    ends = (rate, 0.9 * rate, 1.1 * rate)
    return Timing(
        name,
        layers,
        768,
        10**7 * layers,
        40.0 * layers,
        threads,
        *ends,
        1.0,
        2.0,
        3.0,
        shares,
        12 / layers,
        rate / base,
    )


TIMINGS = [timing("deep", 12, 100.0, 100.0), timing("flat", 1, 900.0, 100.0)]


def test_figure_by_hand() -> None:
    """Titles/s relative to the deepest model, beside what the number of layers promises."""
    (panel,) = speed_figure(TIMINGS).panels
    measured, promised = panel.lines
    assert (measured.x, measured.y) == ((1.0, 12.0), (9.0, 1.0))
    assert promised.look == "reference"
    assert promised.y[:3] == pytest.approx((12.0, 6.0, 4.0))
    assert "flat is 9.0 times as fast as the deepest model, 12.0 promised" in speed_figure(TIMINGS).alt


def test_table_has_every_number(tmp_path: Path) -> None:
    """The page has all columns."""
    table = timings_table(TIMINGS)
    row = dict(zip(table.head, table.rows[1], strict=True))
    assert (row["titles/s"], row["slowest"], row["fastest"]) == ("900", "810", "990")
    assert (row["ms p50"], row["p99"], row["times"], row["promised"]) == ("1.00", "3.00", "9.00", "12.00")
    assert (row["tokenising"], row["pooling"], row["MB"]) == ("10%", "5%", "40")
    assert set(SPARE) < set(table.head)
    facts = {
        "titles": 5,
        "input": "invented",
        "tokens_per_title": 9.0,
        "rounds": 2,
        "hardware": {},
        "versions": {},
    }
    write_page(TIMINGS, tmp_path, facts)
    assert "| flat | 1 | 10.0 |" in (tmp_path / "bench.md").read_text()


def test_narrow_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves out columns, and cuts no name."""
    table = timings_table([timing("all-MiniLM-L6-v2, 6 layers", 6, 100.0, 100.0)])
    for columns, whole in (("80", False), ("200", True)):
        monkeypatch.setenv("COLUMNS", columns)
        print_rows(table.head, table.rows, spare=SPARE)
        shown = capsys.readouterr().out
        assert "all-MiniLM-L6-v2, 6 layers" in shown
        assert "…" not in shown
        assert ("pooling" in shown) == whole
        assert "p99" in shown
        assert "promised" in shown


def test_a_model_without_layers(static_run: Path, measured_memory: list[tuple[str, str]]) -> None:
    """No number of layers promises anything for it; the figure begins at 1."""
    timings = bench([str(static_run), "random:2x64"], titles=20, alone=2, rounds=1, device="cpu")
    assert [(one.layers, one.promised) for one in timings] == [(0, None), (2, 1.0)]
    assert timings_table(timings).rows[0][-3] == ""
    (panel,) = speed_figure(timings).panels
    assert panel.lines[-1].x == (1.0, 2.0)


@pytest.fixture
def measured_memory(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Model and precision of each measurement of memory, here without its own process."""
    seen: list[tuple[str, str]] = []

    def measure(model: Model, texts: list[str], *, precision: str) -> float:
        seen.append((model.name, precision))
        return 10.0 * len(seen)

    monkeypatch.setattr(benchmark, "memory_in_use", measure)
    return seen


def test_models_are_measured_side_by_side(
    run: Path, tmp_path: Path, measured_memory: list[tuple[str, str]]
) -> None:
    """A run gives its student and its teacher; the deepest model is the reference."""
    lines: list[str] = []
    timings = bench(
        [str(run), "random:5x64"],
        titles=40,
        alone=4,
        rounds=1,
        threads=[1],
        out=tmp_path / "out",
        say=lines.append,
    )
    assert [(one.name, one.layers) for one in timings] == [
        ("run, student", 2),
        ("scratch, 4 layers", 4),
        ("random:5x64", 5),
    ]
    for one in timings:
        assert one.slowest <= one.titles_per_second <= one.fastest
        assert 0 < one.p50 <= one.p95 <= one.p99
        assert one.promised == 5 / one.layers
        assert sum(one.shares.values()) == pytest.approx(1.0, abs=0.5)
    assert timings[2].reached == 1.0
    written = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert (written["titles"], len(written["timings"])) == (40, 3)
    assert lines[-1] == "round 1 of 1"
    assert lines[0] == "memory of run, student"
    assert measured_memory == [(one.name, "fp32") for one in timings]
    assert [one.at_work for one in timings] == [10.0, 20.0, 30.0]


def test_several_precisions(measured_memory: list[tuple[str, str]]) -> None:
    """Each model in each precision; the reference is the deepest in the first; weights have half the size."""
    models = ["random:2x64", "random:3x64"]
    timings = bench(models, titles=20, alone=2, rounds=1, precision=["bf16", "fp32"], device="cpu")
    variants = [(one.layers, one.precision) for one in timings]
    assert variants == [(2, "bf16"), (3, "bf16"), (2, "fp32"), (3, "fp32")]
    assert measured_memory == [(one.name, one.precision) for one in timings]
    assert timings[1].reached == 1.0
    assert timings[3].promised == 1.0
    assert timings[3].reached != 1.0
    assert 0.5 < timings[1].megabytes / timings[3].megabytes < 0.6  # pooling stays as it was
    assert "precision" in timings_table(timings).head
    (panel,) = speed_figure(timings).panels
    assert [line.label for line in panel.lines[:2]] == ["1 thread, bf16", "1 thread, fp32"]


def test_missing_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Must not be replaced by the processor silently."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match="finds no GPU here"):
        bench(["random:1x64"], titles=5, device="cuda")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not tell a peak")
def test_memory_of_model_and_work() -> None:
    """At least the weights, and not those of another model; a wider one needs more."""
    texts = [f"title {n} of the news" for n in range(50)]
    narrow, wide = (
        memory_in_use(next(find_models(name, texts)), texts) for name in ("random:1x128", "random:2x640")
    )
    assert narrow is not None
    assert wide is not None
    weights = 4 * 2 * 12 * 640 * 640 / 1e6
    assert narrow < weights < wide < 10 * weights


def test_url_is_refused() -> None:
    """A URL must not become a folder of that name."""
    with pytest.raises(SettingsError, match="give a folder"):
        bench(["random:1x64"], titles=5, out="s3://bucket/speed")


@pytest.mark.parametrize("name", ["random:0", "random:2x100", "random"])
def test_wrong_model_names(name: str) -> None:
    """A typing error must not measure another model."""
    with pytest.raises(SettingsError, match=r"random:12x768|that 64 divides"):
        bench([name], titles=5)


@pytest.mark.usefixtures("measured_memory")
@pytest.mark.parametrize("others", [[], ["random:1x64"]])
def test_a_linear_model_beside_others(linear_run: Path, tmp_path: Path, others: list[str]) -> None:
    """It has no layers and no tokeniser; what is timed is its predictions."""
    linear, *rest = bench([str(linear_run), *others], titles=30, alone=4, rounds=1, out=tmp_path)
    assert (linear.name, linear.layers, linear.width, linear.promised) == ("linear, student", 0, 0, None)
    assert linear.titles_per_second > 0
    assert linear.shares["tokenise"] > 0
    assert len(rest) == len(others)
    assert json.loads((tmp_path / "bench.json").read_text())["tokens_per_title"] > 3
