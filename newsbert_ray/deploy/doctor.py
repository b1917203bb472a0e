"""`newsbert-ray doctor`: checks everything a run needs and names a cure for each problem. Changes nothing."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from newsbert_ray.config import SCRATCH
from newsbert_ray.data.shards import SPLITS, Part, Shard, ShardError, read_manifest
from newsbert_ray.deploy import submit
from newsbert_ray.files import first_line, sha256_of
from newsbert_ray.methods import TASKS
from newsbert_ray.ray_private import VERSIONS_PROGRAM, available_memory, container_cores
from newsbert_ray.ray_session import host_and_port, is_loopback, refusal
from newsbert_ray.record import cpu_has_bf16

COMPILED = ("torch", "transformers", "ray", "pyarrow")
"""Packages with compiled parts, which can be installed and yet fail to load."""
_GB = 1 << 30
LOW_MEMORY, ENOUGH_MEMORY = 1 * _GB, 4 * _GB
"""Bytes: a run of a small encoder takes about 1 GB, a sweep that much for each trial."""
LOW_DISK, ENOUGH_DISK = 1 * _GB, 10 * _GB
"""Bytes: a checkpoint of a BERT-size pair takes 2 GB."""
PORTS: Mapping[int, tuple[str, str]] = {
    6379: ("Ray head", "--port"),
    8265: ("dashboard", "--dashboard-port"),
    10001: ("Ray Client", "--ray-client-server-port"),
}
"""Ray's default ports, and the option of `ray start` that chooses another."""
NEW_TOKEN = "(umask 077; ray get-auth-token --generate > /dev/null)"
"""Writes ~/.ray/auth_token for this user alone; without the umask everyone may read it."""

State = Literal["ok", "note", "fix"]


class Finding(NamedTuple):
    """One line about a topic: fine (`ok`), worth knowing (`note`), or a problem (`fix`), which has a cure."""

    topic: str
    state: State
    message: str
    cure: str = ""


Parts = tuple[State, str] | tuple[State, str, str]
"""A finding without its topic."""


def doctor(
    *, data: str | None, out: str | None, address: str | None, teacher: str | None, deep: bool
) -> Iterator[Finding]:
    """The verb `doctor`. Arguments and result are those of `newsbert_ray.doctor`."""
    variables = (os.environ.get(name, "").strip() for name in ("RAY_ADDRESS", submit.ADDRESS_VARIABLE))
    address = address or next(filter(None, variables), None)
    topics = {
        "versions": check_versions(),
        "devices": check_devices(),
        "storage": check_storage(out),
        "ports": check_ports(),
        "token": check_token(address),
        "cluster": check_cluster(address),
        "shards": () if data is None else check_shards(data, deep=deep),
        "teacher": () if teacher is None else check_teacher(teacher, data),
    }
    for topic, findings in topics.items():
        yield from (Finding(topic, *parts) for parts in findings)


def check_versions() -> Iterator[Parts]:
    """Python and packages against our requirements."""
    try:
        own = metadata.distribution("newsbert-ray")
    except metadata.PackageNotFoundError:
        install = "pip install -c constraints.txt -e ."
        yield "fix", "newsbert-ray is not installed, its files are only on the path", install
        return
    python, needed = platform.python_version(), str(own.metadata["Requires-Python"])
    problems = []
    if not SpecifierSet(needed).contains(python):
        problems.append((f"Python {python}, {needed} is needed", f"make a new .venv with Python {needed}"))
    for requirement in map(Requirement, own.requires or ()):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            state = f"{requirement.name} {version}" if version else f"{requirement.name} is not installed"
            problems.append((f"{state}, {requirement.specifier} is needed", f"pip install '{requirement}'"))
    for name in filter(_version, COMPILED):
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken library may raise anything
            cure = f"pip install --force-reinstall --no-deps {name}=={_version(name)}"
            problems.append((f"{name} is installed but does not load ({first_line(error)})", cure))
    yield from (("fix", *problem) for problem in problems)
    if not problems:
        names = ", ".join(f"{name} {_version(name)}" for name in COMPILED)
        yield "ok", f"Python {python}, newsbert-ray {own.version}, {names}"


def check_devices() -> Iterator[Parts]:
    """Cores, memory, GPUs and bf16, as far as this machine or container may use them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = container_cores()
    if limit < cores:
        message = f"{cores} cores, of which this container may use {limit:g}"
        cure = f"train with --threads {max(1, int(limit))}, sweep with --concurrency {max(1, int(limit))}"
        yield "note", f"{message}: PyTorch would start too many threads", cure
    else:
        yield "ok", f"{cores} cores"
    memory = available_memory()
    free = f"{memory / _GB:.1f} GB of memory free"
    if memory < LOW_MEMORY:
        cure = "close other programs, or give the container more memory"
        yield "fix", f"{free}: the first trial would be killed", cure
    elif memory < ENOUGH_MEMORY:
        yield "note", f"{free}: enough for one to three trials at once"
    else:
        yield "ok", free
    try:
        yield from _check_gpu()
    except ImportError:  # reported under versions
        return


def check_storage(out: str | None) -> Iterator[Parts]:
    """Whether results can be written to `out`, a folder (existing or not) or a URL, and the free space."""
    if out is not None and "://" in out:
        from newsbert_ray.storage.workdir import WorkDir

        try:
            WorkDir(out).check_writable()
            yield "ok", f"{out} is writable"
        except (ValueError, RuntimeError, OSError) as error:
            yield "fix", str(error), "correct --out, the credentials of its storage, or its permissions"
        return
    folder = Path(out or ".").absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".doctor-", buffering=0) as file:
            file.write(b"x")
    except OSError as error:
        reason = "is a file, not a folder" if existing.is_file() else f"is not writable ({error.strerror})"
        yield "fix", f"{existing} {reason}", f"give another --out, or: chmod u+w {existing}"
        return
    free = shutil.disk_usage(existing).free
    message = f"{existing} is writable, {free / _GB:.1f} GB free"
    if free < LOW_DISK:
        yield "fix", message, "free some space, or give another --out: a checkpoint takes up to 2 GB"
    elif free < ENOUGH_DISK:
        yield "note", f"{message}: enough for few checkpoints of a large encoder"
    else:
        yield "ok", message


def check_ports() -> Iterator[Parts]:
    """Whether Ray's default ports are free, and whether a head on this machine is open to other machines."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied:  # macOS tells it to root only
        yield "note", "this system does not tell which ports are in use"
        return
    listening: dict[int, set[str]] = {}
    for address in (one.laddr for one in connections if one.status == psutil.CONN_LISTEN):
        listening.setdefault(address.port, set()).add(address.ip.removeprefix("::ffff:"))
    taken = sorted(PORTS.keys() & listening.keys())
    for port in taken:
        name, option = PORTS[port]
        message = f"port {port} ({name}) is in use, at {', '.join(sorted(listening[port]))}"
        yield "note", message, f"to start a second head here: ray start --head {option} PORT"
    if not taken:
        yield "ok", f"Ray's default ports are free ({', '.join(map(str, PORTS))})"
    for ports, mode in _local_heads():
        addresses = {address for port in ports for address in listening.get(port, ())}
        outside = ", ".join(sorted(address for address in addresses if not is_loopback(address)))
        head = f"a Ray head runs here, port {', '.join(map(str, ports)) or 'unknown'}"
        is_open = f"{head}, open to other machines at {outside}, and asks for"
        if ports and not outside:
            yield "ok", f"{head}, on the loopback only"
        elif mode is None:
            yield "note", f"{head}, open to other machines; another user's: does it ask for a token?"
        elif mode == "token":
            yield "ok", f"{is_open} a token"
        else:
            risk = "no token: everyone who can reach it can run programs as you"
            cure = f"stop this head; {NEW_TOKEN}; RAY_AUTH_MODE=token ray start --head ..."
            yield "fix", f"{is_open} {risk}", cure


def check_token(address: str | None) -> Iterator[Parts]:
    """Whether Ray would send a token to the cluster at `address`, and whether other users can read it."""
    mode = os.environ.get("RAY_AUTH_MODE", "").strip().lower()
    if mode != "token":
        state = f"RAY_AUTH_MODE is {mode or 'not set'}"
        if address is not None and not is_loopback(host_and_port(address)[0] or ""):
            yield "fix", f"{state}: Ray sends no token to {address}", "export RAY_AUTH_MODE=token"
        else:
            yield "note", f"{state}: a private session makes its own token"
    elif "RAY_AUTH_TOKEN" in os.environ:
        if os.environ["RAY_AUTH_TOKEN"].strip():
            yield "ok", "the token is in RAY_AUTH_TOKEN"
        else:
            yield "fix", "RAY_AUTH_TOKEN is empty", "unset RAY_AUTH_TOKEN, or set it to the cluster's token"
        return
    path = submit.token_path()
    if mode == "token" or "RAY_AUTH_TOKEN_PATH" in os.environ or path.is_file():
        found = list(_problems(partial(submit.read_token, path)))
        yield from found or [("ok", f"{path}: only this user can read it")]


def check_cluster(address: str | None) -> Iterator[Parts]:
    """Whether the cluster answers, accepts our token, and has our versions; `address` is the URL of a
    dashboard, HOST:PORT of a head, or None."""
    if address is None or address == "local":
        yield "ok", "none given (--address, RAY_ADDRESS, RAY_API_SERVER_ADDRESS)"
    elif "://" in address:
        found = list(_problems(lambda warn: submit.connect(address, warn=warn)))
        yield from found or [("ok", f"{address} answers and accepts us: Ray {metadata.version('ray')}")]
    else:
        yield from _check_head(address)


def _problems(check: Callable[[submit.Warn], object]) -> Iterator[Parts]:
    """What `check` warns of or raises."""
    warnings: list[tuple[str, str]] = []
    try:
        check(lambda *warning: warnings.append(warning))
    except submit.DashboardError as error:
        problem, cure = error.args
        warnings.append((problem, cure))
    yield from (("fix", *warning) for warning in warnings)


def check_shards(data: str, *, deep: bool = False) -> Iterator[Parts]:
    """Whether all files of the shards in `data` exist in the right size; with `deep` also their hashes."""
    cure = f"newsbert-ray prepare ... --out {data} --overwrite"
    try:
        manifest = read_manifest(data)
    except (ShardError, OSError) as error:
        yield "fix", str(error), cure
        return
    faults = ((part.file, _fault(Path(data), part, deep)) for part in manifest.parts())
    if damaged := [f"{name} ({fault})" for name, fault in faults if fault]:
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        yield "fix", f"{data}: {', '.join(damaged[:3])}{more}", cure
        return
    rows = "; ".join(
        f"{task} " + ", ".join(f"{manifest.rows(split, task):,} {split}" for split in SPLITS)
        for task in TASKS
        if any(manifest.rows(split, task) for split in SPLITS)
    )
    compared = "all hashes are right" if deep else "all files have their size (--deep compares hashes)"
    yield "ok", f"{data}: {rows}; {compared}"


def check_teacher(teacher: str, data: str | None) -> Iterator[Parts]:
    """Whether `teacher` loads without pickle or foreign code, and has the tokeniser of the shards."""
    if teacher == SCRATCH:
        yield "ok", "scratch: a small encoder with random weights, nothing to load"
        return
    from newsbert_ray.config import ModelSettings, ScratchSettings
    from newsbert_ray.data.tokenizer import TokenizerError, load_tokenizer
    from newsbert_ray.model.assemble import check_tokenizer
    from newsbert_ray.model.encoder import EncoderError
    from newsbert_ray.model.families import load_encoder

    folder, manifest = Path(teacher).expanduser(), None
    with suppress(ShardError, OSError):  # reported under shards
        manifest = read_manifest(data) if data is not None else None
    try:
        if folder.is_dir():
            load_encoder(str(folder), model=ModelSettings(), scratch=ScratchSettings(), vocabulary=0)
        if manifest is None:
            load_tokenizer(teacher)
            yield "ok", f"{teacher}: loads; not compared with shards (--data)"
        else:
            check_tokenizer(teacher, manifest)
            yield "ok", f"{teacher}: loads, and has the tokeniser of the shards"
    except EncoderError as error:
        make = f"newsbert-ray prepare ... --teacher {teacher} --out NEW"
        yield "fix", str(error), f"give another encoder, or make shards of this one: {make}"
    except TokenizerError as error:
        yield "fix", str(error), "give an encoder's folder, or download it where there is a network"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _check_gpu() -> Iterator[Parts]:
    import torch
    from torch.utils.collect_env import get_nvidia_driver_version, run

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            bf16 = "with" if card.major >= 8 else "without"
            memory = f"{card.total_memory / _GB:.0f} GB"
            yield "ok", f"GPU {index}: {card.name}, {memory}, {bf16} bf16 in hardware"
        return
    driver = get_nvidia_driver_version(run)  # type: ignore[no-untyped-call]
    if driver is None:
        bf16 = "with" if cpu_has_bf16() else "without"
        yield "ok", f"no GPU, the processor is used ({bf16} bf16 in hardware)"
        if torch.version.cuda is not None:
            message = "PyTorch is built for CUDA and no GPU is visible: fine on a cluster's head"
            yield "note", message, "in a container: docker run --gpus all"
        return
    pytorch = f"an NVIDIA GPU is here, but PyTorch {torch.__version__}"
    if torch.version.cuda is None:
        cure = "pip install --force-reinstall torch, without PyTorch's CPU index in PIP_EXTRA_INDEX_URL"
        yield "fix", f"{pytorch} is built without CUDA", cure
    else:
        cure = f"install a driver for CUDA {torch.version.cuda} (nvidia-smi), or unset CUDA_VISIBLE_DEVICES"
        yield "fix", f"{pytorch} cannot use it (driver {driver})", cure


def _local_heads() -> Iterator[tuple[list[int], str | None]]:
    """Ports and RAY_AUTH_MODE of each Ray head on this machine; None where another user's cannot be read."""
    for process in psutil.process_iter(["name", "cmdline"]):
        port = re.search(r"--gcs_server_port=(\d+)", " ".join(process.info["cmdline"] or ()))
        if process.info["name"] != "gcs_server" or not port:
            continue
        ports = [int(port[1])] if int(port[1]) else []  # 0: it chose one itself
        try:
            mode = process.environ().get("RAY_AUTH_MODE", "").lower()
            own = process.net_connections(kind="tcp") if not ports else []
            ports += sorted({c.laddr.port for c in own if c.status == psutil.CONN_LISTEN})
        except psutil.Error:
            mode = None
        yield ports, mode


def _check_head(address: str) -> Iterator[Parts]:
    host, port = host_and_port(address)
    if not host or not port:
        cure = "give http://HOST:8265 (to submit) or HOST:6379 (RAY_ADDRESS)"
        yield "fix", f"{address}: not an address", cure
        return
    if reason := refusal(host, port):
        cure = "start the cluster, correct the address, or open the tunnel to it; it is HOST:6379 of the head"
        yield "fix", f"{address}: no Ray head answers ({reason})", cure
        return
    try:  # in a process of its own: Ray's client may wait for ever, or end the process
        done = subprocess.run(
            [sys.executable, "-c", VERSIONS_PROGRAM, f"{host}:{port}"],
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            timeout=20,
        )
        code, errors = done.returncode, done.stderr
    except subprocess.TimeoutExpired:
        code, errors = 1, "no answer within 20 s"
    if "AuthenticationError" in errors or "InvalidAuthToken" in errors:
        cure = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token"
        yield "fix", f"{address}: the cluster does not accept our token, or got none", cure
        return
    if code:
        reason = (errors.strip().splitlines() or [f"exit code {code}"])[-1][:200]
        yield "fix", f"{address}: no Ray head answers ({reason})", "give HOST:6379 of the head"
        return
    # Ray accepts only its own version and the same Python.
    own = {"ray": metadata.version("ray"), "python": platform.python_version()}
    versions = json.loads(done.stdout.splitlines()[-1])
    other = {name: versions[f"{name}_version"] for name in own if versions[f"{name}_version"] != own[name]}
    for name, version in other.items():
        install = f"pip install ray=={version}" if name == "ray" else f"use Python {version}"
        message = f"{address}: the cluster has {name.title()} {version}, this machine {own[name]}"
        yield "fix", message, f"{install} here, or change the cluster's"
    if not other:
        yield "ok", f"{address} answers and accepts us: Ray {own['ray']}, Python {own['python']}"


def _fault(folder: Path, part: Shard | Part, deep: bool) -> str:
    """What is wrong with a file of the shards; empty if nothing."""
    path = folder / part.file
    if not path.is_file():
        return "missing"
    if (size := path.stat().st_size) != part.bytes:
        return f"{size:,} bytes instead of {part.bytes:,}"
    return "its content has changed" if deep and sha256_of(path) != part.sha256 else ""
