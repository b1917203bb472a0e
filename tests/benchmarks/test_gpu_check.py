"""The check for the first GPU must itself run everywhere: a GPU's minutes are no time to find its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks import gpu_check


def test_a_failing_section_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One error of a library would cost all figures of a short loan."""

    def fails(_: gpu_check.Check) -> None:
        raise RuntimeError("no such kernel")

    def works(check: gpu_check.Check) -> None:
        check.say("newsbert topics", loss_difference=0.25, ok=True)

    def hangs(check: gpu_check.Check) -> None:
        while True:
            check.wait()

    sections = {"broken": (fails, 1.0), "hangs": (hangs, 0.2), "equal": (works, 1.0)}
    monkeypatch.setattr(gpu_check, "SECTIONS", sections)
    monkeypatch.setattr(gpu_check, "GRACE_SECONDS", 0.0)
    out = tmp_path / "found.json"
    assert gpu_check.main(["--minutes", "0.001", "--out", str(out)]) == 1
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert [(row["section"], "error" in row) for row in rows[1:]] == [
        ("broken", True),
        ("hangs", True),
        ("equal", False),
    ]
    printed = capsys.readouterr().out
    assert "| equal | all | loss_difference 0.25, checked 1, wrong 0 |" in printed
    assert "No GPU was found" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sections", "minutes"), [("machine,equal,waits,steps,clicks,student,serving", 4.0), ("workers", 5.0)]
)
def test_everything_but_ray_runs_small_on_the_cpu(tmp_path: Path, sections: str, minutes: float) -> None:
    """Every section gives figures without a GPU; compiled layers have their own test, of minutes."""
    assert {*sections.split(",")} < {*gpu_check.SECTIONS}
    out = tmp_path / "found.json"
    assert gpu_check.main(["--minutes", str(minutes), "--only", sections, "--out", str(out)]) == 0
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert {row["section"] for row in rows} == {"", *sections.split(",")}
