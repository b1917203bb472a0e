"""A machine's ills are found, each with what mends it, and a sound machine has none."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from newsbert_ray.deploy import doctor as machine
from newsbert_ray.deploy.doctor import check_devices, check_storage, check_versions
from tests.deploy.conftest import ill, notes, the_one_to_mend

ROOT = Path(__file__).parents[2]
GB = 1 << 30


def test_this_checkout_is_fit() -> None:
    """A doctor who finds something with everybody is not asked twice."""
    findings = check_versions(ROOT)
    assert ill(findings) == []
    assert f"torch {metadata.version('torch')}" in findings[-1].found


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Versions other than the true ones; None for a package that is not installed."""
    other: dict[str, str | None] = {}
    true = metadata.version

    def version(name: str) -> str:
        found = other[name] if name in other else true(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    return other


def test_an_old_package_and_a_missing_one(installed: dict[str, str | None]) -> None:
    """An old Ray fails in the midst of a sweep, with a message about an argument."""
    installed |= {"ray": "2.9.3", "optuna": None}
    found = {finding.found: finding.cure for finding in ill(check_versions(ROOT))}
    assert found == {
        "ray 2.9.3, 2.55 or newer is needed": "pip install 'ray>=2.55'",
        "optuna is not installed, 4.2 or newer is needed": "pip install 'optuna>=4.2'",
    }


def test_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout on PYTHONPATH runs under any Python, up to the first line that it cannot read."""
    monkeypatch.setattr(sys, "version_info", (3, 10, 4, "final", 0))
    found = the_one_to_mend(check_versions(ROOT))
    assert found.found == "Python 3.10.4, 3.11 or newer is needed"


def test_a_package_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip says it is there; a missing system library says otherwise, five frames deep."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    found = the_one_to_mend(check_versions(ROOT))
    assert "pyarrow is installed and does not load" in found.found
    assert found.cure.startswith("pip install --force-reinstall --no-deps pyarrow==")


def test_only_the_files_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its metadata nothing is known of what the package needs."""
    monkeypatch.setattr(machine, "DISTRIBUTION", "newsbert-ray-of-nobody")
    assert "is not installed here" in the_one_to_mend(check_versions(ROOT)).found


def test_other_versions_than_the_pinned_are_noted(tmp_path: Path) -> None:
    """Numbers that differ from the README's are put down to bad luck, and it was another torch."""
    (tmp_path / "constraints.txt").write_text("# pinned\ntorch==1.0.0\nPyYAML==0.1\nnobody==9\n")
    findings = check_versions(tmp_path)
    assert ill(findings) == []
    assert f"torch {metadata.version('torch').partition('+')[0]} (pinned 1.0.0)" in notes(findings)
    assert "pyyaml" in notes(findings)
    assert "nobody" not in notes(findings)


def machine_at(
    root: Path, *, available: int = 16 * GB, cpu: str = "max 100000", limit: str = "max", used: int = 0
) -> Path:
    """A file system that says so."""
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {available // 1024} kB\n")
    (root / "proc/cpuinfo").write_text("flags : fpu avx512_bf16 sse\n")
    (root / "sys/fs/cgroup").mkdir(parents=True)
    (root / "sys/fs/cgroup/cpu.max").write_text(f"{cpu}\n")
    (root / "sys/fs/cgroup/memory.max").write_text(f"{limit}\n")
    (root / "sys/fs/cgroup/memory.current").write_text(f"{used}\n")
    (root / "dev").mkdir()
    return root


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch sees none, whatever this machine has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)


@pytest.mark.usefixtures("no_gpu")
def test_a_whole_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU is no ill machine."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    findings = check_devices(machine_at(tmp_path))
    assert {finding.state for finding in findings} == {"ok"}
    said = [finding.found for finding in findings]
    assert said == [
        "8 cores",
        "16.0 GB of memory free",
        "no GPU, the processor is used (with bf16 in hardware)",
    ]


@pytest.mark.usefixtures("no_gpu")
def test_a_container_with_fewer_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 trials on a quota of two cores take turns, and each is slower than alone."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    findings = check_devices(machine_at(tmp_path, cpu="250000 100000"))
    assert "64 cores are seen, this container may use 2.5" in notes(findings)
    assert "--concurrency 2" in notes(findings)


@pytest.mark.usefixtures("no_gpu")
def test_the_older_files_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the clusters still have the first version of control groups."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    root = machine_at(tmp_path)
    shutil.rmtree(root / "sys/fs/cgroup")
    (root / "sys/fs/cgroup/cpu").mkdir(parents=True)
    (root / "sys/fs/cgroup/memory").mkdir()
    (root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us").write_text("400000\n")
    (root / "sys/fs/cgroup/cpu/cpu.cfs_period_us").write_text("100000\n")
    (root / "sys/fs/cgroup/memory/memory.limit_in_bytes").write_text(f"{GB}\n")
    (root / "sys/fs/cgroup/memory/memory.usage_in_bytes").write_text(f"{GB // 2}\n")
    findings = check_devices(root)
    assert "may use 4:" in notes(findings)
    assert the_one_to_mend(findings).found.startswith("0.5 GB of memory free")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    "given",
    [{"available": GB // 2}, {"limit": str(4 * GB), "used": 4 * GB - GB // 2}],
    ids=["machine", "container"],
)
def test_too_little_memory(tmp_path: Path, given: dict[str, Any]) -> None:
    """The kernel's killer says nothing to the one whose process it was."""
    assert the_one_to_mend(check_devices(machine_at(tmp_path, **given))).found.startswith("0.5 GB")


@pytest.mark.parametrize(("cuda", "said"), [(None, "was built without CUDA"), ("12.8", "cannot use it")])
def test_a_gpu_that_torch_does_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: str | None, said: str
) -> None:
    """A night on the processor beside an idle GPU: nothing fails, so nobody looks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    root = machine_at(tmp_path)
    (root / "dev/nvidia0").touch()
    found = the_one_to_mend(check_devices(root))
    assert said in found.found
    assert ("driver for CUDA 12.8" in found.cure) == (cuda is not None)


def test_a_cuda_build_without_a_gpu_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right on a cluster's head; in a container it is a forgotten flag."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "docker run --gpus all" in notes(check_devices(machine_at(tmp_path)))


def test_a_gpu_is_named_with_its_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 on a card without it is emulated, slower than fp32."""
    cards = [
        SimpleNamespace(name="T4", total_memory=16 * GB, major=7),
        SimpleNamespace(name="L4", total_memory=24 * GB, major=8),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: cards[index])
    said = [finding.found for finding in check_devices(machine_at(tmp_path))]
    assert said[-2:] == [
        "GPU 0: T4, 16 GB, without bf16 in hardware",
        "GPU 1: L4, 24 GB, with bf16 in hardware",
    ]


def test_storage_that_can_be_written(tmp_path: Path) -> None:
    """Looking must leave no trace, and make no folder."""
    (found,) = check_storage(str(tmp_path / "runs/new"))
    assert found.state in ("ok", "note")  # as much room as this machine has
    assert f"{tmp_path} can be written" in found.found
    assert list(tmp_path.iterdir()) == []


def test_storage_at_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong credentials of a bucket are found by the first checkpoint, on machines paid by the hour."""

    def check(place: str) -> None:
        if place != "s3://bucket/runs":
            raise ValueError(f"{place}: no such bucket")

    monkeypatch.setitem(sys.modules, "newsbert_ray.storage.workdir", SimpleNamespace(check_writable=check))
    assert [found.state for found in check_storage("s3://bucket/runs")] == ["ok"]
    found = the_one_to_mend(check_storage("s3://other/runs"))
    assert found.found == "s3://other/runs: no such bucket"
    assert "credentials" in found.cure


def test_storage_that_is_a_file(tmp_path: Path) -> None:
    """The run itself would find out after the teacher was loaded."""
    (tmp_path / "runs").write_text("no folder")
    assert "is a file" in the_one_to_mend(check_storage(str(tmp_path / "runs/first"))).found


def test_storage_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared disk that is mounted read-only is found by the first checkpoint, an epoch in."""

    def refuse(**options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(options["dir"]))

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    found = the_one_to_mend(check_storage(str(tmp_path)))
    assert found.found == f"{tmp_path} cannot be written (Permission denied)"


@pytest.mark.parametrize(("free", "state"), [(GB // 2, "mend"), (5 * GB, "note"), (50 * GB, "ok")])
def test_room_for_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, state: str) -> None:
    """A disk that fills in the night ends every trial from then on."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    (found,) = check_storage(str(tmp_path))
    assert found.state == state
