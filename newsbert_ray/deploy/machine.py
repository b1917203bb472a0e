"""Is this machine fit: versions, processors, memory, GPUs, and the place for results. Knows no cluster."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from newsbert_ray.deploy.finding import Finding, Topic

DISTRIBUTION = "newsbert-ray"
IMPORTED = ("torch", "transformers", "ray", "pyarrow")
"""Packages with compiled parts, which can be installed and yet not load."""
LEAST_MEMORY, SCANT_MEMORY = 1 << 30, 4 << 30
"""Bytes: a run of a small encoder takes about one GB; a sweep takes it for each trial at once."""
LEAST_DISK, SCANT_DISK = 1 << 30, 10 << 30
"""Bytes: checkpoints of a BERT-size pair take 2 GB each."""
_GB = 1 << 30


def check_versions(checkout: Path) -> list[Finding]:
    """Python and packages against the lower bounds of our own metadata; where `checkout` holds a
    constraints.txt, also against what is pinned there."""
    topic = Topic("versions")
    try:
        own = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        topic.mend(
            f"{DISTRIBUTION} is not installed here, only its files", "pip install -c constraints.txt -e ."
        )
        return topic.findings
    least = str(own.metadata["Requires-Python"]).removeprefix(">=")
    python = ".".join(map(str, sys.version_info[:3]))
    if _numbers(python) < _numbers(least):
        topic.mend(f"Python {python}, {least} or newer is needed", f"make a new .venv with Python {least}")
    old = list(_too_old(own.requires or []))
    for name, version, wanted in old:
        found = f"{name} {version}" if version else f"{name} is not installed"
        topic.mend(f"{found}, {wanted} or newer is needed", f"pip install '{name}>={wanted}'")
    for name in IMPORTED:
        if name in [missing for missing, version, _ in old if not version]:
            continue
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken library raises whatever it likes
            topic.mend(
                f"{name} is installed and does not load ({_first_line(error)})",
                f"pip install --force-reinstall --no-deps {name}=={metadata.version(name)}",
            )
    pinned = list(_unlike_pinned(checkout / "constraints.txt", own.requires or []))
    if pinned:
        topic.note(f"not the pinned versions: {', '.join(pinned)}", "pip install -c constraints.txt -e .")
    if not any(finding.state == "mend" for finding in topic.findings):
        names = ", ".join(f"{name} {metadata.version(name)}" for name in IMPORTED)
        topic.ok(f"Python {python}, {DISTRIBUTION} {own.version}, {names}")
    return topic.findings


def check_devices(root: Path = Path("/")) -> list[Finding]:
    """Cores, memory, GPUs and bf16, as a process of this machine or container may use them.

    Args:
        root: of the file system that says so (/proc, /sys, /dev).
    """
    topic = Topic("devices")
    _check_cores(topic, root)
    _check_memory(topic, root)
    _check_gpu(topic, root)
    return topic.findings


def check_storage(out: str | None) -> list[Finding]:
    """Whether results can be written to `out`, a folder (there or not yet) or a URL, and how much room is
    left there; without `out` to the folder at hand."""
    topic = Topic("storage")
    if out is not None and "://" in out:
        from newsbert_ray.storage import check_writable

        try:
            check_writable(out)
        except (ValueError, OSError) as error:
            topic.mend(str(error), "correct --out, the credentials of its storage, or its permissions")
        else:
            topic.ok(f"{out} can be written")
        return topic.findings
    folder = Path(out or ".").absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        topic.mend(f"{there} is a file, not a folder", "give another --out")
        return topic.findings
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".doctor-") as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        topic.mend(
            f"{there} cannot be written ({error.strerror})", f"give another --out, or: chmod u+w {there}"
        )
        return topic.findings
    free = shutil.disk_usage(there).free
    said = f"{there} can be written, {free / _GB:.1f} GB free"
    if free < LEAST_DISK:
        topic.mend(said, "make room there, or give another --out: a checkpoint takes up to 2 GB")
    elif free < SCANT_DISK:
        topic.note(f"{said}: enough for few checkpoints of a large encoder")
    else:
        topic.ok(said)
    return topic.findings


def _too_old(requires: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """(name, installed version or nothing, least version) of what is below its bound."""
    for requirement in requires:
        found = re.match(r"([\w.-]+)(?:\[[^\]]*\])?>=([\d.]+)", requirement.replace(" ", ""))
        if found is None or "extra==" in requirement.replace(" ", ""):
            continue
        name, least = found.groups()
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = ""
        if not version or _numbers(version) < _numbers(least):
            yield name, version, least


def _unlike_pinned(path: Path, requires: Sequence[str]) -> Iterator[str]:
    """`torch 2.12.0 (pinned 2.13.0)` of each own requirement that is installed in another version."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    pins = {_plain(name): pin for name, equals, pin in (line.partition("==") for line in lines) if equals}
    for requirement in requires:
        name = re.split(r"[\s\[><=;]", requirement)[0]
        pin = pins.get(_plain(name))
        try:
            version = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
        if pin is not None and version != pin:
            yield f"{name} {version} (pinned {pin})"


def _check_cores(topic: Topic, root: Path) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = _cgroup_cores(root)
    if limit is not None and limit < cores:
        topic.note(
            f"{cores} cores are seen, this container may use {limit:g}: Ray and torch start too much",
            f"give --threads {max(1, int(limit))} to train, --concurrency {max(1, int(limit))} to sweep",
        )
    else:
        topic.ok(f"{cores} cores")


def _cgroup_cores(root: Path) -> float | None:
    """Cores that the container's quota comes to; None without one."""
    groups = root / "sys/fs/cgroup"
    words = _read(groups / "cpu.max").split()
    if not words:
        words = [_read(groups / f"cpu/cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    quota, period = [*words, "", ""][:2]
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _check_memory(topic: Topic, root: Path) -> None:
    found = re.search(r"MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo"))
    available = int(found[1]) * 1024 if found else None
    groups = root / "sys/fs/cgroup"
    limit = _read(groups / "memory.max").strip() or _read(groups / "memory/memory.limit_in_bytes").strip()
    used = _read(groups / "memory.current").strip() or _read(groups / "memory/memory.usage_in_bytes").strip()
    if limit.isdigit() and used.isdigit():
        left = max(0, int(limit) - int(used))
        available = left if available is None else min(left, available)
    if available is None:
        topic.note("how much memory is free is not known here")
    elif available < LEAST_MEMORY:
        topic.mend(
            f"{available / _GB:.1f} GB of memory free: the first trial would be killed",
            "end other programs, or give the container more memory",
        )
    elif available < SCANT_MEMORY:
        topic.note(f"{available / _GB:.1f} GB of memory free: enough for one to three trials at once")
    else:
        topic.ok(f"{available / _GB:.1f} GB of memory free")


def _check_gpu(topic: Topic, root: Path) -> None:
    try:
        import torch
    except Exception:  # said under versions already
        return
    flags = _read(root / "proc/cpuinfo")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            bf16 = "with" if card.major >= 8 else "without"
            topic.ok(f"GPU {index}: {card.name}, {card.total_memory / _GB:.0f} GB, {bf16} bf16 in hardware")
        return
    card_there = any((root / "dev").glob("nvidia[0-9]*"))
    if card_there and torch.version.cuda is None:
        topic.mend(
            f"an NVIDIA GPU is here, torch {torch.__version__} was built without CUDA",
            "pip install --force-reinstall torch, without PIP_EXTRA_INDEX_URL set to PyTorch's CPU index",
        )
    elif card_there:
        topic.mend(
            f"an NVIDIA GPU is here, torch {torch.__version__} cannot use it",
            f"install a driver for CUDA {torch.version.cuda} (see nvidia-smi), or unset CUDA_VISIBLE_DEVICES",
        )
    else:
        bf16 = "with" if re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags) else "without"
        topic.ok(f"no GPU, the processor is used ({bf16} bf16 in hardware)")
    if torch.version.cuda is not None and not card_there:
        topic.note(
            "torch was built for CUDA and no GPU is visible: right for a cluster's head, else wasted room",
            "in a container: docker run --gpus all",
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` -> (2, 13, 0)."""
    found = re.match(r"[\d.]*\d", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
